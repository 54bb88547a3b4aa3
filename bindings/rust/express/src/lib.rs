//! KV caches of transformers inside a fixed memory budget, with attention over what they keep.
//!
//! ```
//! use express::{Cache, Config, Tensor, TensorMut};
//!
//! # fn main() -> Result<(), express::Error> {
//! let config = Config::new(8, 2, 64).budget(256); // query heads, KV heads, head dimension; entries per KV head
//! let mut cache = Cache::new(&config)?;
//! let (mut out, q, kv) = (vec![0f32; 8 * 64], vec![0.5f32; 8 * 64], vec![0.25f32; 2 * 64]);
//! for _ in 0..2000 {
//!     let (k, v) = (Tensor::new(&kv, &[1, 2, 64])?, Tensor::new(&kv, &[1, 2, 64])?);
//!     cache.append(0, &k, &v)?;
//!     cache.attend(0, &Tensor::new(&q, &[1, 8, 64])?, &mut TensorMut::new(&mut out, &[1, 8, 64])?, None)?;
//! }
//! println!("{} entries for {} tokens", cache.entries(0, 0)?, cache.stats(None)?.tokens);
//! # Ok(())
//! # }
//! ```
//!
//! Shapes, dtypes and errors are those of `express.h`, to which each function refers by its name. Calls that change a cache take
//! `&mut self`; the others may run from many threads at once. A call that fails changed nothing (but for [`Status::Broken`]).
#![deny(missing_docs)]

mod cache;
mod config;
mod error;
mod tensor;

pub use cache::{append_batch, attend_batch, compress_kv, compress_kv_workspace, size, version, Cache, Size, Stats};
pub use config::{BudgetUnit, Config, Halving, HeadBudgets, HeadSetting, ProtectionScore, RopeLayout, Schedule};
pub use error::{Error, Result, Status};
pub use tensor::{Bf16, DType, Device, Element, Tensor, TensorMut, F16};

// The README's program is a test.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
