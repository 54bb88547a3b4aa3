use crate::config::{Config, HeadBudgets};
use crate::error::{check, Error, Result, Status};
use crate::tensor::{Tensor, TensorMut};
use express_sys as sys;
use std::ffi::CStr;
use std::os::raw::c_void;
use std::ptr;

/// What a cache of a configuration takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Bytes in all.
    pub bytes: i64,
    /// Mean entries per KV head.
    pub mean_entries: i64,
}

/// Counts of a layer, or of all; see `express_stats`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)]
#[non_exhaustive]
pub struct Stats {
    pub tokens: i64,
    pub entries: i64,
    pub entries_peak: i64,
    pub entries_budget: i64,
    pub min_weight: i64,
    pub max_weight: i64,
    pub halvings: i64,
    pub bytes: i64,
    pub bytes_peak: i64,
    pub compress_seconds: f64,
    /// What the configuration's came to: `Fixed` or `Observed`.
    pub head_budgets: HeadBudgets,
}

/// The cache of one sequence: all layers, inside a budget that never grows.
#[derive(Debug)]
pub struct Cache {
    raw: *mut sys::express_cache,
}

// A cache belongs to no thread; functions that take &self call those of the library that may run at once.
unsafe impl Send for Cache {}
unsafe impl Sync for Cache {}

impl Drop for Cache {
    fn drop(&mut self) {
        unsafe { sys::express_destroy(&mut self.raw) }
    }
}

fn layer_or_all(layer: Option<i32>) -> i32 {
    layer.unwrap_or(sys::EXPRESS_AUTO)
}

/// A pointer to the tensor, or null; the tensor itself is in `room`.
fn optional(tensor: Option<&mut TensorMut<'_>>, room: &mut Option<sys::express_tensor>) -> *const sys::express_tensor {
    *room = tensor.map(|t| t.raw());
    room.as_ref().map_or(ptr::null(), |t| t as *const _)
}

impl Cache {
    /// `express_create`.
    pub fn new(config: &Config) -> Result<Cache> {
        let mut raw = ptr::null_mut();
        check(unsafe { sys::express_create(&config.raw(), &mut raw) })?;
        Ok(Cache { raw })
    }

    /// `express_reset`: forgets all tokens, keeps the memory.
    pub fn reset(&mut self) -> Result<()> {
        check(unsafe { sys::express_reset(self.raw) })
    }

    /// `express_append`: k (n, kv_heads, key_dim), v (n, kv_heads, value_dim).
    pub fn append(&mut self, layer: i32, k: &Tensor<'_>, v: &Tensor<'_>) -> Result<()> {
        check(unsafe { sys::express_append(self.raw, layer, &k.raw(), &v.raw()) })
    }

    /// `express_append_all`: the same with a dimension of layers in front.
    pub fn append_all(&mut self, k: &Tensor<'_>, v: &Tensor<'_>) -> Result<()> {
        check(unsafe { sys::express_append_all(self.raw, &k.raw(), &v.raw()) })
    }

    /// `express_attend`: q (n, query_heads, key_dim), out (n, query_heads, value_dim), lse (n, query_heads) of f32.
    pub fn attend(
        &self,
        layer: i32,
        q: &Tensor<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
    ) -> Result<()> {
        let mut room = None;
        let lse = optional(lse, &mut room);
        check(unsafe { sys::express_attend(self.raw, layer, &q.raw(), &out.raw(), lse) })
    }

    /// `express_workspace_size`: bytes of scratch that a prefill of n tokens needs; 0 on the CPU.
    pub fn workspace_size(&self, n: i64) -> Result<usize> {
        let mut bytes = 0;
        check(unsafe { sys::express_workspace_size(self.raw, n, &mut bytes) })?;
        Ok(bytes)
    }

    /// `express_prefill` of a cache on the CPU: causal attention of n new tokens, and their append.
    pub fn prefill(
        &mut self,
        layer: i32,
        q: &Tensor<'_>,
        k: &Tensor<'_>,
        v: &Tensor<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
    ) -> Result<()> {
        // Without memory, which a cache on a GPU refuses.
        unsafe { self.prefill_with(layer, q, k, v, out, lse, ptr::null_mut(), 0) }
    }

    /// `express_prefill` with scratch on the cache's device.
    ///
    /// # Safety
    /// `workspace` is null, or memory of the device of `bytes` bytes that nobody else uses until the stream has passed the call.
    #[allow(clippy::too_many_arguments)]
    pub unsafe fn prefill_with(
        &mut self,
        layer: i32,
        q: &Tensor<'_>,
        k: &Tensor<'_>,
        v: &Tensor<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
        workspace: *mut c_void,
        bytes: usize,
    ) -> Result<()> {
        let mut room = None;
        let lse = optional(lse, &mut room);
        let scratch = sys::express_workspace { data: workspace, bytes };
        check(sys::express_prefill(self.raw, layer, &q.raw(), &k.raw(), &v.raw(), &out.raw(), lse, &scratch))
    }

    /// `express_compress`: halves ahead of need; returns how many tokens the layer (all: None) now takes without a halving.
    pub fn compress(&mut self, layer: Option<i32>, tokens: i64) -> Result<i64> {
        let mut achieved = 0;
        check(unsafe { sys::express_compress(self.raw, layer_or_all(layer), tokens, &mut achieved) })?;
        Ok(achieved)
    }

    /// `express_rollback`: drops the last tokens of every layer.
    pub fn rollback(&mut self, tokens: i64) -> Result<()> {
        check(unsafe { sys::express_rollback(self.raw, tokens) })
    }

    /// `express_rollback_available`.
    pub fn rollback_available(&self) -> Result<i64> {
        let mut tokens = 0;
        check(unsafe { sys::express_rollback_available(self.raw, &mut tokens) })?;
        Ok(tokens)
    }

    /// `express_entries`: entries that a KV head holds now.
    pub fn entries(&self, layer: i32, kv_head: i32) -> Result<i64> {
        let mut count = 0;
        check(unsafe { sys::express_entries(self.raw, layer, kv_head, &mut count) })?;
        Ok(count)
    }

    /// `express_export`: k (capacity, key_dim), v (capacity, value_dim), log weights (capacity) of f32, positions (capacity) of i64;
    /// returns how many rows were written.
    pub fn export(
        &self,
        layer: i32,
        kv_head: i32,
        k: &mut TensorMut<'_>,
        v: &mut TensorMut<'_>,
        log_weight: Option<&mut TensorMut<'_>>,
        position: Option<&mut TensorMut<'_>>,
    ) -> Result<i64> {
        let (mut weight_room, mut position_room, mut count) = (None, None, 0);
        let log_weight = optional(log_weight, &mut weight_room);
        let position = optional(position, &mut position_room);
        check(unsafe {
            sys::express_export(self.raw, layer, kv_head, &k.raw(), &v.raw(), log_weight, position, &mut count)
        })?;
        Ok(count)
    }

    /// `express_get_stats` of a layer, or of all.
    pub fn stats(&self, layer: Option<i32>) -> Result<Stats> {
        let size = std::mem::size_of::<sys::express_stats>() as u32;
        let mut s = sys::express_stats { struct_size: size, ..Default::default() };
        check(unsafe { sys::express_get_stats(self.raw, layer_or_all(layer), &mut s) })?;
        Ok(Stats {
            tokens: s.tokens,
            entries: s.entries,
            entries_peak: s.entries_peak,
            entries_budget: s.entries_budget,
            min_weight: s.min_weight,
            max_weight: s.max_weight,
            halvings: s.halvings,
            bytes: s.bytes,
            bytes_peak: s.bytes_peak,
            compress_seconds: s.compress_seconds,
            head_budgets: match s.head_budgets {
                sys::EXPRESS_HEAD_BUDGETS_OBSERVED => HeadBudgets::Observed,
                _ => HeadBudgets::Fixed,
            },
        })
    }

    /// `express_bytes`: what the cache has allocated.
    pub fn bytes(&self) -> Result<i64> {
        let mut bytes = 0;
        check(unsafe { sys::express_bytes(self.raw, &mut bytes) })?;
        Ok(bytes)
    }

    /// `express_save`: all it holds, for [`Cache::load`] of any cache of the same model, budgets, method and seed.
    pub fn save(&self) -> Result<Vec<u8>> {
        let mut bytes = 0;
        check(unsafe { sys::express_save_size(self.raw, &mut bytes) })?;
        let mut data = vec![0u8; bytes];
        check(unsafe { sys::express_save(self.raw, data.as_mut_ptr().cast(), bytes) })?;
        Ok(data)
    }

    /// `express_load`: takes the place of all it holds.
    pub fn load(&mut self, data: &[u8]) -> Result<()> {
        check(unsafe { sys::express_load(self.raw, data.as_ptr().cast(), data.len()) })
    }

    /// `express_copy`: holds what `from` holds, to fork a sequence or to reorder beams.
    pub fn copy_from(&mut self, from: &Cache) -> Result<()> {
        check(unsafe { sys::express_copy(self.raw, from.raw) })
    }

    /// `express_set_stream`.
    ///
    /// # Safety
    /// The stream lives as long as the cache uses it, and is ordered after the work of this cache on the last one.
    pub unsafe fn set_stream(&mut self, stream: *mut c_void) -> Result<()> {
        check(sys::express_set_stream(self.raw, stream))
    }

    /// `express_step_prepare`: plans the coming n tokens for a captured graph.
    pub fn step_prepare(&mut self, n: i64) -> Result<()> {
        check(unsafe { sys::express_step_prepare(self.raw, n) })
    }

    /// `express_step_cancel`: takes prepared steps back that were not replayed; the stream has been synchronised.
    pub fn step_cancel(&mut self) -> Result<()> {
        check(unsafe { sys::express_step_cancel(self.raw) })
    }
}

/// `express_append_batch`: one token for each of the caches; k (count, kv_heads, key_dim), v (count, kv_heads, value_dim).
pub fn append_batch(caches: &mut [&mut Cache], layer: i32, k: &Tensor<'_>, v: &Tensor<'_>) -> Result<()> {
    let raw: Vec<_> = caches.iter().map(|c| c.raw).collect();
    check(unsafe { sys::express_append_batch(raw.as_ptr(), raw.len() as i64, layer, &k.raw(), &v.raw()) })
}

/// `express_attend_batch`: one query for each of the caches; q (count, query_heads, key_dim), out (count, query_heads, value_dim).
pub fn attend_batch(
    caches: &[&Cache],
    layer: i32,
    q: &Tensor<'_>,
    out: &mut TensorMut<'_>,
    lse: Option<&mut TensorMut<'_>>,
) -> Result<()> {
    let raw: Vec<*const sys::express_cache> = caches.iter().map(|c| c.raw as *const _).collect();
    let mut room = None;
    let lse = optional(lse, &mut room);
    check(unsafe { sys::express_attend_batch(raw.as_ptr(), raw.len() as i64, layer, &q.raw(), &out.raw(), lse) })
}

/// `express_size`: what [`Cache::new`] would take.
pub fn size(config: &Config) -> Result<Size> {
    let (mut bytes, mut mean_entries) = (0, 0);
    check(unsafe { sys::express_size(&config.raw(), &mut bytes, &mut mean_entries) })?;
    Ok(Size { bytes, mean_entries })
}

/// `express_compress_kv_workspace`: bytes of scratch of [`compress_kv`].
pub fn compress_kv_workspace(config: &Config) -> Result<usize> {
    let mut bytes = 0;
    check(unsafe { sys::express_compress_kv_workspace(&config.raw(), &mut bytes) })?;
    Ok(bytes)
}

/// `express_compress_kv` on the CPU: k (n, kv_heads, key_dim), v (n, kv_heads, value_dim) to out_k (kv_heads, capacity, key_dim),
/// out_v (kv_heads, capacity, value_dim), log weights (kv_heads, capacity), positions (kv_heads, capacity); returns the entries of
/// every KV head.
pub fn compress_kv(
    config: &Config,
    k: &Tensor<'_>,
    v: &Tensor<'_>,
    out_k: &mut TensorMut<'_>,
    out_v: &mut TensorMut<'_>,
    log_weight: &mut TensorMut<'_>,
    position: Option<&mut TensorMut<'_>>,
) -> Result<i64> {
    let raw = config.raw();
    if raw.device_type != sys::EXPRESS_DEVICE_CPU {
        return Err(Error::new(
            Status::Unsupported,
            "config: here on the CPU only; express_sys::express_compress_kv takes device memory",
        ));
    }
    let bytes = compress_kv_workspace(config)?;
    #[repr(align(64))]
    #[derive(Clone, Copy)]
    struct Line {
        _bytes: [u8; 64],
    }
    let mut lines = vec![Line { _bytes: [0; 64] }; (bytes + 63) / 64];
    let scratch = sys::express_workspace { data: lines.as_mut_ptr().cast(), bytes: lines.len() * 64 };
    let (mut room, mut count) = (None, 0);
    let position = optional(position, &mut room);
    check(unsafe {
        sys::express_compress_kv(
            &raw,
            &k.raw(),
            &v.raw(),
            &out_k.raw(),
            &out_v.raw(),
            &log_weight.raw(),
            position,
            &mut count,
            &scratch,
        )
    })?;
    Ok(count)
}

/// The version of the library that is loaded, for example "1.1.0".
pub fn version() -> &'static str {
    // A static string, ASCII.
    unsafe { CStr::from_ptr(sys::express_version_string()) }.to_str().unwrap_or("")
}
