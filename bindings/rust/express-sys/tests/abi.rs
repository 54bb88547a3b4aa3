//! Sizes, offsets, numbers and functions of this crate are those of the C ABI.

use express_sys::*;
use std::collections::BTreeMap;
use std::mem::size_of;

macro_rules! offsets {
    ($map:ident, $type:ident { $($field:ident),* $(,)? }) => {
        $map.insert(format!("sizeof({})", stringify!($type)), size_of::<$type>() as i64);
        $({
            let value = std::mem::MaybeUninit::<$type>::uninit();
            let base = value.as_ptr();
            let at = unsafe { std::ptr::addr_of!((*base).$field) } as usize - base as usize;
            $map.insert(format!("offsetof({}, {})", stringify!($type), stringify!($field)), at as i64);
        })*
    };
}
macro_rules! numbers {
    ($map:ident, $($name:ident),* $(,)?) => { $($map.insert(stringify!($name).to_string(), i64::from($name));)* };
}

fn ours() -> BTreeMap<String, i64> {
    let mut map = BTreeMap::new();
    offsets!(map, express_tensor { data, device_type, device_id, dtype, ndim, shape, strides });
    offsets!(map, express_workspace { data, bytes });
    offsets!(map, express_head_setting { budget, sinks, window, protected_entries });
    offsets!(
        map,
        express_config {
            struct_size,
            layers,
            query_heads,
            kv_heads,
            key_dim,
            value_dim,
            scale,
            dtype,
            device_type,
            device_id,
            first_layer,
            first_kv_head,
            budget_unit,
            budget,
            sinks,
            window,
            protected_entries,
            rollback_reserve,
            head_share,
            head_share_count,
            head_settings,
            head_settings_count,
            schedule,
            halving,
            weight_exponent,
            gamma,
            tau,
            delta,
            level_fraction,
            level_floor,
            max_levels,
            seed,
            prefill_block,
            auto_compress,
            validate,
            threads,
            parallel_for,
            parallel_for_context,
            stream,
            head_budgets,
            protection_score,
            rope_frequencies,
            rope_frequency_count,
            rope_layout,
            reserved,
        }
    );
    offsets!(
        map,
        express_stats {
            struct_size,
            head_budgets,
            tokens,
            entries,
            entries_peak,
            entries_budget,
            min_weight,
            max_weight,
            halvings,
            bytes,
            bytes_peak,
            compress_seconds,
        }
    );
    numbers!(
        map,
        EXPRESS_STATUS_OK,
        EXPRESS_STATUS_INVALID_ARGUMENT,
        EXPRESS_STATUS_OUT_OF_RANGE,
        EXPRESS_STATUS_SHAPE_MISMATCH,
        EXPRESS_STATUS_DTYPE_MISMATCH,
        EXPRESS_STATUS_DEVICE_MISMATCH,
        EXPRESS_STATUS_NOT_FINITE,
        EXPRESS_STATUS_BUDGET_TOO_SMALL,
        EXPRESS_STATUS_WOULD_COMPRESS,
        EXPRESS_STATUS_ROLLBACK_UNAVAILABLE,
        EXPRESS_STATUS_BUFFER_TOO_SMALL,
        EXPRESS_STATUS_SIZE_OVERFLOW,
        EXPRESS_STATUS_OUT_OF_MEMORY,
        EXPRESS_STATUS_UNSUPPORTED,
        EXPRESS_STATUS_BROKEN,
        EXPRESS_STATUS_INTERNAL,
        EXPRESS_STATUS_DEVICE_ERROR,
        EXPRESS_STATUS_STEPS_PENDING,
        EXPRESS_STATUS_RING_FULL,
        EXPRESS_DTYPE_F32,
        EXPRESS_DTYPE_F16,
        EXPRESS_DTYPE_BF16,
        EXPRESS_DTYPE_I8,
        EXPRESS_DTYPE_I64,
        EXPRESS_DEVICE_CPU,
        EXPRESS_DEVICE_CUDA,
        EXPRESS_AUTO,
        EXPRESS_SCHEDULE_BUDGET,
        EXPRESS_SCHEDULE_ROUNDS,
        EXPRESS_HALVING_KERNEL,
        EXPRESS_HALVING_COIN,
        EXPRESS_HEAD_BUDGETS_AUTO,
        EXPRESS_HEAD_BUDGETS_FIXED,
        EXPRESS_HEAD_BUDGETS_OBSERVED,
        EXPRESS_PROTECTION_SCORE_AUTO,
        EXPRESS_PROTECTION_SCORE_ENERGY,
        EXPRESS_PROTECTION_SCORE_ENERGY_VALUE,
        EXPRESS_ROPE_LAYOUT_HALVES,
        EXPRESS_ROPE_LAYOUT_INTERLEAVED,
        EXPRESS_BUDGET_ENTRIES,
        EXPRESS_BUDGET_BYTES,
    );
    map
}

/// capi/abi.txt: the numbers of express.h as a C compiler sees them, which all languages compare themselves with.
#[test]
fn layouts_and_numbers_are_those_of_the_abi() {
    let golden: BTreeMap<String, i64> = include_str!("../../../../capi/abi.txt")
        .lines()
        .map(|line| line.split_once(" = ").unwrap())
        .map(|(name, number)| (name.to_string(), number.parse().unwrap()))
        .collect();
    assert!(golden.len() > 90);
    assert_eq!(ours(), golden);
}

#[test]
fn every_function_is_declared() {
    let here = include_str!("../src/lib.rs");
    let functions: Vec<&str> = include_str!("../../../../capi/symbols.txt").lines().collect();
    assert!(functions.len() > 30);
    for name in functions {
        assert!(here.contains(&format!("fn {name}(")), "{name} is not declared");
    }
}

#[test]
fn functions_can_be_called() {
    unsafe {
        assert!(express_version() >= 10100);
        let mut config = std::mem::MaybeUninit::<express_config>::zeroed().assume_init();
        assert_eq!(express_config_init(&mut config, size_of::<express_config>() as u32), EXPRESS_STATUS_OK);
        assert_eq!((config.layers, config.budget, config.prefill_block), (1, 1024, 256));
    }
}
