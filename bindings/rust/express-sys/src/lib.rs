//! The C ABI of Express, version 1.1, one to one. What each function does, and who owns what, is in `express.h`; the crate
//! `express` makes it safe.
#![allow(non_camel_case_types)]

use std::os::raw::{c_char, c_void};

/// `express_status`: pinned numbers, to which later versions may add.
pub type express_status = i32;
pub const EXPRESS_STATUS_OK: express_status = 0;
pub const EXPRESS_STATUS_INVALID_ARGUMENT: express_status = 1;
pub const EXPRESS_STATUS_OUT_OF_RANGE: express_status = 2;
pub const EXPRESS_STATUS_SHAPE_MISMATCH: express_status = 3;
pub const EXPRESS_STATUS_DTYPE_MISMATCH: express_status = 4;
pub const EXPRESS_STATUS_DEVICE_MISMATCH: express_status = 5;
pub const EXPRESS_STATUS_NOT_FINITE: express_status = 6;
pub const EXPRESS_STATUS_BUDGET_TOO_SMALL: express_status = 7;
pub const EXPRESS_STATUS_WOULD_COMPRESS: express_status = 8;
pub const EXPRESS_STATUS_ROLLBACK_UNAVAILABLE: express_status = 9;
pub const EXPRESS_STATUS_BUFFER_TOO_SMALL: express_status = 10;
pub const EXPRESS_STATUS_SIZE_OVERFLOW: express_status = 11;
pub const EXPRESS_STATUS_OUT_OF_MEMORY: express_status = 12;
pub const EXPRESS_STATUS_UNSUPPORTED: express_status = 13;
pub const EXPRESS_STATUS_BROKEN: express_status = 14;
pub const EXPRESS_STATUS_INTERNAL: express_status = 15;
pub const EXPRESS_STATUS_DEVICE_ERROR: express_status = 16;
pub const EXPRESS_STATUS_STEPS_PENDING: express_status = 17;
pub const EXPRESS_STATUS_RING_FULL: express_status = 18;

pub const EXPRESS_DTYPE_F32: i32 = 0;
pub const EXPRESS_DTYPE_F16: i32 = 1;
pub const EXPRESS_DTYPE_BF16: i32 = 2;
pub const EXPRESS_DTYPE_I8: i32 = 3;
pub const EXPRESS_DTYPE_I64: i32 = 16;

pub const EXPRESS_DEVICE_CPU: i32 = 1;
pub const EXPRESS_DEVICE_CUDA: i32 = 2;

pub const EXPRESS_AUTO: i32 = -1;

pub const EXPRESS_SCHEDULE_BUDGET: i32 = 0;
pub const EXPRESS_SCHEDULE_ROUNDS: i32 = 1;
pub const EXPRESS_HALVING_KERNEL: i32 = 0;
pub const EXPRESS_HALVING_COIN: i32 = 1;
pub const EXPRESS_HEAD_BUDGETS_AUTO: i32 = 0;
pub const EXPRESS_HEAD_BUDGETS_FIXED: i32 = 1;
pub const EXPRESS_HEAD_BUDGETS_OBSERVED: i32 = 2;
pub const EXPRESS_PROTECTION_SCORE_AUTO: i32 = 0;
pub const EXPRESS_PROTECTION_SCORE_ENERGY: i32 = 1;
pub const EXPRESS_PROTECTION_SCORE_ENERGY_VALUE: i32 = 2;
pub const EXPRESS_ROPE_LAYOUT_HALVES: i32 = 0;
pub const EXPRESS_ROPE_LAYOUT_INTERLEAVED: i32 = 1;
pub const EXPRESS_BUDGET_ENTRIES: i32 = 0;
pub const EXPRESS_BUDGET_BYTES: i32 = 1;

/// Opaque.
#[repr(C)]
pub struct express_cache {
    _private: [u8; 0],
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct express_tensor {
    pub data: *mut c_void,
    pub device_type: i32,
    pub device_id: i32,
    pub dtype: i32,
    pub ndim: i32,
    pub shape: *const i64,
    pub strides: *const i64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct express_workspace {
    pub data: *mut c_void,
    pub bytes: usize,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct express_head_setting {
    pub budget: i64,
    pub sinks: i64,
    pub window: i64,
    pub protected_entries: i64,
}

pub type express_body = unsafe extern "C" fn(task: *mut c_void, i: i64, worker: i32);
pub type express_parallel_for =
    unsafe extern "C" fn(context: *mut c_void, count: i64, body: express_body, task: *mut c_void);

#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct express_config {
    pub struct_size: u32,
    pub layers: i32,
    pub query_heads: i32,
    pub kv_heads: i32,
    pub key_dim: i32,
    pub value_dim: i32,
    pub scale: f64,
    pub dtype: i32,
    pub device_type: i32,
    pub device_id: i32,
    pub first_layer: i32,
    pub first_kv_head: i32,
    pub budget_unit: i32,
    pub budget: i64,
    pub sinks: i64,
    pub window: i64,
    pub protected_entries: i64,
    pub rollback_reserve: i64,
    pub head_share: *const f32,
    pub head_share_count: i64,
    pub head_settings: *const express_head_setting,
    pub head_settings_count: i64,
    pub schedule: i32,
    pub halving: i32,
    pub weight_exponent: f64,
    pub gamma: f64,
    pub tau: f64,
    pub delta: f64,
    pub level_fraction: f64,
    pub level_floor: i64,
    pub max_levels: i64,
    pub seed: u64,
    pub prefill_block: i32,
    pub auto_compress: i32,
    pub validate: i32,
    pub threads: i32,
    pub parallel_for: Option<express_parallel_for>,
    pub parallel_for_context: *mut c_void,
    pub stream: *mut c_void,
    pub head_budgets: i32,
    pub protection_score: i32,
    pub rope_frequencies: *const f32,
    pub rope_frequency_count: i64,
    pub rope_layout: i32,
    pub reserved: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct express_stats {
    pub struct_size: u32,
    pub head_budgets: i32,
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
}

#[rustfmt::skip]
extern "C" {
    pub fn express_status_name(status: express_status) -> *const c_char;
    pub fn express_last_error() -> *const c_char;
    pub fn express_version() -> u32;
    pub fn express_version_string() -> *const c_char;
    pub fn express_config_init(config: *mut express_config, struct_size: u32) -> express_status;
    pub fn express_size(config: *const express_config, bytes: *mut i64, mean_entries: *mut i64) -> express_status;
    pub fn express_create(config: *const express_config, cache: *mut *mut express_cache) -> express_status;
    pub fn express_destroy(cache: *mut *mut express_cache);
    pub fn express_reset(cache: *mut express_cache) -> express_status;
    pub fn express_append(cache: *mut express_cache, layer: i32, k: *const express_tensor, v: *const express_tensor) -> express_status;
    pub fn express_append_all(cache: *mut express_cache, k: *const express_tensor, v: *const express_tensor) -> express_status;
    pub fn express_attend(cache: *const express_cache, layer: i32, q: *const express_tensor, out: *const express_tensor, lse: *const express_tensor) -> express_status;
    pub fn express_append_batch(caches: *const *mut express_cache, count: i64, layer: i32, k: *const express_tensor, v: *const express_tensor) -> express_status;
    pub fn express_attend_batch(caches: *const *const express_cache, count: i64, layer: i32, q: *const express_tensor, out: *const express_tensor, lse: *const express_tensor) -> express_status;
    pub fn express_set_stream(cache: *mut express_cache, stream: *mut c_void) -> express_status;
    pub fn express_step_prepare(cache: *mut express_cache, n: i64) -> express_status;
    pub fn express_step_cancel(cache: *mut express_cache) -> express_status;
    pub fn express_workspace_size(cache: *const express_cache, n: i64, bytes: *mut usize) -> express_status;
    pub fn express_prefill(cache: *mut express_cache, layer: i32, q: *const express_tensor, k: *const express_tensor, v: *const express_tensor, out: *const express_tensor, lse: *const express_tensor, workspace: *const express_workspace) -> express_status;
    pub fn express_compress(cache: *mut express_cache, layer: i32, tokens: i64, achieved: *mut i64) -> express_status;
    pub fn express_rollback(cache: *mut express_cache, tokens: i64) -> express_status;
    pub fn express_rollback_available(cache: *const express_cache, tokens: *mut i64) -> express_status;
    pub fn express_entries(cache: *const express_cache, layer: i32, kv_head: i32, count: *mut i64) -> express_status;
    pub fn express_export(cache: *const express_cache, layer: i32, kv_head: i32, k: *const express_tensor, v: *const express_tensor, log_weight: *const express_tensor, position: *const express_tensor, count: *mut i64) -> express_status;
    pub fn express_save_size(cache: *const express_cache, bytes: *mut usize) -> express_status;
    pub fn express_save(cache: *const express_cache, data: *mut c_void, bytes: usize) -> express_status;
    pub fn express_load(cache: *mut express_cache, data: *const c_void, bytes: usize) -> express_status;
    pub fn express_copy(cache: *mut express_cache, from: *const express_cache) -> express_status;
    pub fn express_compress_kv_workspace(config: *const express_config, bytes: *mut usize) -> express_status;
    pub fn express_compress_kv(config: *const express_config, k: *const express_tensor, v: *const express_tensor, out_k: *const express_tensor, out_v: *const express_tensor, log_weight: *const express_tensor, position: *const express_tensor, count: *mut i64, workspace: *const express_workspace) -> express_status;
    pub fn express_get_stats(cache: *const express_cache, layer: i32, stats: *mut express_stats) -> express_status;
    pub fn express_bytes(cache: *const express_cache, bytes: *mut i64) -> express_status;
}
