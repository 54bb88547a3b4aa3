use crate::tensor::{DType, Device};
use express_sys as sys;
use std::os::raw::c_void;

/// How the coreset is thinned out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// One level is halved when no slot is free.
    Budget,
    /// The paper's rounds of four.
    Rounds,
}

/// How pairs are decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halving {
    /// Kernel halving.
    Kernel,
    /// A fair coin: uniform sampling, the baseline.
    Coin,
}

/// Whether budgets of heads stay, or follow the attention that heads are seen to pay to far tokens; `Auto`: where they can.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum HeadBudgets {
    Auto,
    Fixed,
    Observed,
}

/// By which score entries are protected; keys are taken without their positions where rotary frequencies are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProtectionScore {
    /// By the budget.
    Auto,
    /// How far a key is from the mean key.
    Energy,
    /// The same times the norm of the value.
    EnergyValue,
}

/// Which elements of a key are turned together, of 2 n that are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeLayout {
    /// Elements i and n + i.
    Halves,
    /// Elements 2 i and 2 i + 1.
    Interleaved,
}

/// What [`Config::budget`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BudgetUnit {
    /// Entries per KV head, the mean over all layers and heads.
    Entries,
    /// Bytes of the whole cache.
    Bytes,
}

/// The setting of one (layer, KV head); negative numbers of the last three are automatic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct HeadSetting {
    pub budget: i64,
    pub sinks: i64,
    pub window: i64,
    pub protected_entries: i64,
}

/// What a cache is made of: the fields of `express_config`, each with its default until it is set.
#[derive(Clone, Debug)]
pub struct Config {
    raw: sys::express_config,
    head_share: Vec<f32>,
    head_settings: Vec<sys::express_head_setting>,
    rope_frequencies: Vec<f32>,
}

// The only pointers in `raw` are a stream's, which is a handle, and those that `raw()` sets for the length of a call.
unsafe impl Send for Config {}
unsafe impl Sync for Config {}

macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {$(
        $(#[$doc])*
        pub fn $name(mut self, value: $type) -> Config {
            self.raw.$name = value.into();
            self
        }
    )*};
}

impl Config {
    /// One layer of a model with so many query heads, KV heads and dimensions of a head, on the CPU, with defaults for the rest.
    pub fn new(query_heads: i32, kv_heads: i32, dim: i32) -> Config {
        let mut raw = std::mem::MaybeUninit::<sys::express_config>::uninit();
        let size = std::mem::size_of::<sys::express_config>() as u32;
        // Fills all of it; fails only for a size that no version had.
        let status = unsafe { sys::express_config_init(raw.as_mut_ptr(), size) };
        assert_eq!(status, sys::EXPRESS_STATUS_OK, "express-sys does not match the library");
        let mut raw = unsafe { raw.assume_init() };
        raw.query_heads = query_heads;
        raw.kv_heads = kv_heads;
        raw.key_dim = dim;
        raw.value_dim = dim;
        Config { raw, head_share: Vec::new(), head_settings: Vec::new(), rope_frequencies: Vec::new() }
    }

    fields! {
        /// Layers of the model.
        layers: i32;
        /// The dimension of values, where it is not that of keys.
        value_dim: i32;
        /// The softmax scale; default 1 / sqrt(key_dim).
        scale: f64;
        /// The global index of the first layer, in a model that is split over processes.
        first_layer: i32;
        /// The global index of the first KV head.
        first_kv_head: i32;
        /// Entries per KV head, or bytes; see [`Config::budget_unit`].
        budget: i64;
        /// How many of the first tokens are kept exactly.
        sinks: i64;
        /// How many of the last tokens are kept exactly; default: from the budget.
        window: i64;
        /// How many tokens whose keys stand out are kept exactly; default: from the budget.
        protected_entries: i64;
        /// How many tokens [`crate::Cache::rollback`] can always take back.
        rollback_reserve: i64;
        /// The exponent of weights in attention; default: from the budget.
        weight_exponent: f64;
        /// The key kernel, from 0 (exponential) to 1 (Gaussian).
        gamma: f64;
        /// The scale of the halving's thresholds.
        tau: f64;
        /// The failure probability of the halving.
        delta: f64;
        /// The population of a level over that of the one above.
        level_fraction: f64;
        /// A level is halved at so many entries or more.
        level_floor: i64;
        /// Levels alive at once.
        max_levels: i64;
        /// The seed of all random choices.
        seed: u64;
        /// Queries of one block of a prefill share the cache of its start.
        prefill_block: i32;
        /// false: an append that needs a halving is refused.
        auto_compress: bool;
        /// true: refuses NaN and infinity in inputs.
        validate: bool;
        /// Threads to compute on.
        threads: i32;
    }

    /// The type of what is kept.
    pub fn dtype(mut self, dtype: DType) -> Config {
        self.raw.dtype = dtype.number();
        self
    }
    /// Where the cache is.
    pub fn device(mut self, device: Device) -> Config {
        let (device_type, device_id) = device.numbers();
        self.raw.device_type = device_type;
        self.raw.device_id = device_id;
        self
    }
    /// What the budget counts.
    pub fn budget_unit(mut self, unit: BudgetUnit) -> Config {
        self.raw.budget_unit = unit as i32;
        self
    }
    /// How the coreset is thinned out.
    pub fn schedule(mut self, schedule: Schedule) -> Config {
        self.raw.schedule = schedule as i32;
        self
    }
    /// How pairs are decided.
    pub fn halving(mut self, halving: Halving) -> Config {
        self.raw.halving = halving as i32;
        self
    }
    /// How the budgets of heads come about.
    pub fn head_budgets(mut self, budgets: HeadBudgets) -> Config {
        self.raw.head_budgets = budgets as i32;
        self
    }
    /// By which score entries are protected.
    pub fn protection_score(mut self, score: ProtectionScore) -> Config {
        self.raw.protection_score = score as i32;
        self
    }
    /// The model's rotary positions: by how many radians each pair of a key's elements is turned from one token to the next, in all layers
    /// and heads alike. Protected entries are then chosen by keys without them.
    pub fn rope_frequencies(mut self, frequencies: &[f32], layout: RopeLayout) -> Config {
        self.rope_frequencies = frequencies.to_vec();
        self.raw.rope_layout = layout as i32;
        self
    }
    /// Shares of the budget, one per layer or per (layer, KV head).
    pub fn head_share(mut self, shares: &[f32]) -> Config {
        self.head_share = shares.to_vec();
        self
    }
    /// Explicit settings, one per layer or per (layer, KV head).
    pub fn head_settings(mut self, settings: &[HeadSetting]) -> Config {
        self.head_settings = settings
            .iter()
            .map(|s| sys::express_head_setting {
                budget: s.budget,
                sinks: s.sinks,
                window: s.window,
                protected_entries: s.protected_entries,
            })
            .collect();
        self
    }
    /// The CUDA stream (`cudaStream_t`) of calls.
    ///
    /// # Safety
    /// The stream lives as long as the cache uses it.
    pub unsafe fn stream(mut self, stream: *mut c_void) -> Config {
        self.raw.stream = stream;
        self
    }

    /// Valid as long as self is not changed.
    pub(crate) fn raw(&self) -> sys::express_config {
        let mut raw = self.raw;
        if !self.head_share.is_empty() {
            raw.head_share = self.head_share.as_ptr();
            raw.head_share_count = self.head_share.len() as i64;
        }
        if !self.head_settings.is_empty() {
            raw.head_settings = self.head_settings.as_ptr();
            raw.head_settings_count = self.head_settings.len() as i64;
        }
        if !self.rope_frequencies.is_empty() {
            raw.rope_frequencies = self.rope_frequencies.as_ptr();
            raw.rope_frequency_count = self.rope_frequencies.len() as i64;
        }
        raw
    }
}
