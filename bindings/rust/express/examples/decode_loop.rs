//! Decoding far beyond the budget: a cache of 256 entries per KV head, on average, takes 4096 tokens, one by one, as a decoder would.

use express::{Cache, Config, Result, Tensor, TensorMut};

const LAYERS: i32 = 2;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;

/// Stands in for a model: numbers in [-1, 1).
fn fill(x: &mut [f32], state: &mut u32) {
    for value in x {
        *state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        *value = (*state >> 8) as f32 / 8388608.0 - 1.0;
    }
}

fn main() -> Result<()> {
    let config = Config::new(HEADS as i32, KV_HEADS as i32, DIM as i32).layers(LAYERS).budget(256);
    let mut cache = Cache::new(&config)?;
    let (mut q, mut k, mut v) = ([0f32; HEADS * DIM], [0f32; KV_HEADS * DIM], [0f32; KV_HEADS * DIM]);
    let (mut out, mut state) = ([0f32; HEADS * DIM], 1);
    for _ in 0..4096 {
        for layer in 0..LAYERS {
            fill(&mut q, &mut state);
            fill(&mut k, &mut state);
            fill(&mut v, &mut state);
            cache.append(layer, &Tensor::new(&k, &[1, KV_HEADS, DIM])?, &Tensor::new(&v, &[1, KV_HEADS, DIM])?)?;
            let q = Tensor::new(&q, &[1, HEADS, DIM])?;
            cache.attend(layer, &q, &mut TensorMut::new(&mut out, &[1, HEADS, DIM])?, None)?;
        }
    }
    println!(
        "{} tokens: {} entries of all KV heads, {} bytes",
        cache.stats(None)?.tokens,
        cache.stats(None)?.entries,
        cache.bytes()?
    );
    Ok(())
}
