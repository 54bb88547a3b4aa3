//! overhead.c in Rust.

use express::{Cache, Config, Result, Tensor, TensorMut};
use std::time::Instant;

const DIM: usize = 16;

fn numbers(a: usize, b: usize) -> Vec<f32> {
    (0..DIM).map(|i| (i * a % b) as f32 / b as f32).collect()
}

fn main() -> Result<()> {
    let calls: usize = std::env::args().nth(1).and_then(|x| x.parse().ok()).expect("overhead CALLS");
    let (q, k, v, mut out) = (numbers(5, 7), numbers(3, 5), numbers(7, 11), vec![0f32; DIM]);
    let mut cache = Cache::new(&Config::new(1, 1, DIM as i32).budget(16).threads(1))?;
    let shape = [1, 1, DIM];
    let start = Instant::now();
    for _ in 0..calls {
        cache.append(0, &Tensor::new(&k, &shape)?, &Tensor::new(&v, &shape)?)?;
        cache.attend(0, &Tensor::new(&q, &shape)?, &mut TensorMut::new(&mut out, &shape)?, None)?;
    }
    let step = start.elapsed();
    let start = Instant::now();
    for _ in 0..calls {
        cache.bytes()?;
    }
    let look = start.elapsed();
    let each = |time: std::time::Duration| time.as_nanos() as f64 / calls as f64;
    let sum: f64 = out.iter().map(|&x| f64::from(x)).sum();
    println!("{:.1} {:.1} {:.4} {}", each(step), each(look), sum, cache.stats(Some(0))?.halvings);
    Ok(())
}
