//! The crate against what express.h promises.

use express::*;
use std::collections::BTreeSet;

const HEADS: usize = 6;
const KV: usize = 2;
const DIM: usize = 16;

fn config() -> Config {
    Config::new(HEADS as i32, KV as i32, DIM as i32).layers(2).budget(64).threads(1).seed(3)
}

/// Numbers in [-1, 1).
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / 8388608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

struct Stream {
    n: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}
impl Stream {
    fn new(n: usize, seed: u32) -> Stream {
        Stream {
            n,
            q: numbers(n * HEADS * DIM, seed),
            k: numbers(n * KV * DIM, seed + 1),
            v: numbers(n * KV * DIM, seed + 2),
        }
    }
    fn append(&self, cache: &mut Cache, layer: i32) {
        self.append_rows(cache, layer, 0, self.n)
    }
    fn append_rows(&self, cache: &mut Cache, layer: i32, begin: usize, end: usize) {
        let rows = begin * KV * DIM..end * KV * DIM;
        let shape = [end - begin, KV, DIM];
        let (k, v) = (Tensor::new(&self.k[rows.clone()], &shape), Tensor::new(&self.v[rows], &shape));
        cache.append(layer, &k.unwrap(), &v.unwrap()).unwrap();
    }
    fn attend(&self, cache: &Cache, layer: i32) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.n * HEADS * DIM];
        let shape = [self.n, HEADS, DIM];
        let q = Tensor::new(&self.q, &shape).unwrap();
        cache.attend(layer, &q, &mut TensorMut::new(&mut out, &shape).unwrap(), None).unwrap();
        out
    }
}

/// Positions, keys and weights of a KV head, by position.
fn held(cache: &Cache, layer: i32, head: i32) -> Vec<(i64, Vec<u32>, u32)> {
    let count = cache.entries(layer, head).unwrap() as usize;
    let (mut k, mut v) = (vec![0f32; count * DIM], vec![0f32; count * DIM]);
    let (mut weight, mut position) = (vec![0f32; count], vec![0i64; count]);
    let written = cache
        .export(
            layer,
            head,
            &mut TensorMut::new(&mut k, &[count, DIM]).unwrap(),
            &mut TensorMut::new(&mut v, &[count, DIM]).unwrap(),
            Some(&mut TensorMut::new(&mut weight, &[count]).unwrap()),
            Some(&mut TensorMut::new(&mut position, &[count]).unwrap()),
        )
        .unwrap();
    assert_eq!(written as usize, count);
    let mut all: Vec<_> = (0..count)
        .map(|j| (position[j], k[j * DIM..][..DIM].iter().map(|x| x.to_bits()).collect(), weight[j].to_bits()))
        .collect();
    all.sort();
    all
}

#[test]
fn weights_add_up_and_the_budget_is_kept() {
    let mut cache = Cache::new(&config()).unwrap();
    let bytes = size(&config()).unwrap();
    Stream::new(3000, 1).append(&mut cache, 1);
    assert_eq!((cache.bytes().unwrap(), bytes.mean_entries), (bytes.bytes, 64));
    for head in 0..KV as i32 {
        let all = held(&cache, 1, head);
        assert!(all.len() <= 64);
        assert_eq!(all.iter().map(|e| e.0).collect::<BTreeSet<_>>().len(), all.len());
        let sum: f32 = all.iter().map(|e| f32::from_bits(e.2).exp().round()).sum();
        assert_eq!(sum, 3000.0);
    }
    let stats = cache.stats(Some(1)).unwrap();
    assert_eq!((stats.tokens, stats.entries_budget), (3000, 128));
    assert!(stats.halvings > 0 && cache.stats(None).unwrap().tokens == 0);
    cache.reset().unwrap();
    assert_eq!(cache.entries(1, 0).unwrap(), 0);
}

#[test]
fn attention_is_softmax_over_what_is_exported() {
    let mut cache = Cache::new(&config().weight_exponent(1.0)).unwrap();
    Stream::new(40, 5).append(&mut cache, 0); // no halving: every weight is 1
    let s = Stream::new(3, 9);
    let out = s.attend(&cache, 0);
    let past = Stream::new(40, 5);
    for row in 0..3 * HEADS {
        let (q, head) = (&s.q[row * DIM..][..DIM], row % HEADS / (HEADS / KV));
        let logits: Vec<f32> = (0..40)
            .map(|t| past.k[(t * KV + head) * DIM..][..DIM].iter().zip(q).map(|(a, b)| a * b).sum::<f32>() / 4.0)
            .collect();
        let sum: f32 = logits.iter().map(|x| x.exp()).sum();
        for d in 0..DIM {
            let want: f32 = (0..40).map(|t| logits[t].exp() / sum * past.v[(t * KV + head) * DIM + d]).sum();
            assert!((out[row * DIM + d] - want).abs() < 1e-5);
        }
    }
}

#[test]
fn prefill_is_the_same_whole_and_in_chunks() {
    let s = Stream::new(200, 2);
    let run = |chunk: usize| {
        let mut cache = Cache::new(&config().prefill_block(16)).unwrap();
        assert_eq!(cache.workspace_size(200).unwrap(), 0);
        let mut out = vec![f32::NAN; s.q.len()];
        for begin in (0..s.n).step_by(chunk) {
            let n = chunk.min(s.n - begin);
            let (a, b) = (begin * HEADS * DIM, begin * KV * DIM);
            let q = Tensor::new(&s.q[a..], &[n, HEADS, DIM]).unwrap();
            let (k, v) =
                (Tensor::new(&s.k[b..], &[n, KV, DIM]).unwrap(), Tensor::new(&s.v[b..], &[n, KV, DIM]).unwrap());
            let mut out = TensorMut::new(&mut out[a..], &[n, HEADS, DIM]).unwrap();
            cache.prefill(0, &q, &k, &v, &mut out, None).unwrap();
        }
        (out, held(&cache, 0, 1))
    };
    assert_eq!(run(200), run(48));
}

#[test]
fn batches_are_single_calls() {
    let s = Stream::new(3, 4);
    let make = || -> Vec<Cache> { (0..3).map(|i| Cache::new(&config().budget(64 + 8 * i)).unwrap()).collect() };
    let (mut single, mut batched) = (make(), make());
    let shape = [3, KV, DIM];
    for _ in 0..100 {
        for (i, cache) in single.iter_mut().enumerate() {
            s.append_rows(cache, 0, i, i + 1);
        }
        let mut all: Vec<&mut Cache> = batched.iter_mut().collect();
        append_batch(&mut all, 0, &Tensor::new(&s.k, &shape).unwrap(), &Tensor::new(&s.v, &shape).unwrap()).unwrap();
    }
    let mut out = vec![f32::NAN; s.q.len()];
    let all: Vec<&Cache> = batched.iter().collect();
    let q = Tensor::new(&s.q, &[3, HEADS, DIM]).unwrap();
    attend_batch(&all, 0, &q, &mut TensorMut::new(&mut out, &[3, HEADS, DIM]).unwrap(), None).unwrap();
    for (i, cache) in single.iter().enumerate() {
        let one = s.attend(cache, 0);
        let rows = i * HEADS * DIM..(i + 1) * HEADS * DIM;
        assert_eq!(out[rows.clone()], one[rows]);
    }
}

#[test]
fn saved_and_copied_caches_go_on() {
    let s = Stream::new(300, 6);
    let mut cache = Cache::new(&config()).unwrap();
    s.append(&mut cache, 0);
    let data = cache.save().unwrap();
    let (mut loaded, mut copied) = (Cache::new(&config().threads(2)).unwrap(), Cache::new(&config()).unwrap());
    loaded.load(&data).unwrap();
    copied.copy_from(&cache).unwrap();
    for one in [&mut cache, &mut loaded, &mut copied] {
        s.append_rows(one, 0, 7, 60);
    }
    assert_eq!(held(&cache, 0, 0), held(&loaded, 0, 0));
    assert_eq!(held(&cache, 0, 0), held(&copied, 0, 0));
    let mut damaged = data.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let error = loaded.load(&damaged).unwrap_err();
    assert_eq!(error.status(), Status::InvalidArgument);
    assert!(error.message().contains("checksum"), "{error}");
    assert_eq!(held(&cache, 0, 0), held(&loaded, 0, 0));
}

#[test]
fn rotary_frequencies_change_what_is_kept() {
    let kept = |config: Config| {
        let mut cache = Cache::new(&config.head_budgets(HeadBudgets::Fixed).budget(96)).unwrap();
        Stream::new(400, 8).append(&mut cache, 0);
        held(&cache, 0, 0)
    };
    let frequencies = [1.0, 0.5, 0.25, 0.1];
    let plain = kept(config());
    let halves = kept(config().rope_frequencies(&frequencies, RopeLayout::Halves));
    assert_ne!(halves, plain);
    assert_ne!(kept(config().rope_frequencies(&frequencies, RopeLayout::Interleaved)), halves);
    let score = |score| config().rope_frequencies(&frequencies, RopeLayout::Halves).protection_score(score);
    assert_eq!(kept(score(ProtectionScore::Energy)), halves);
    assert_ne!(kept(score(ProtectionScore::EnergyValue)), halves);
    let error = Cache::new(&config().rope_frequencies(&[0.1, 4.0], RopeLayout::Halves)).unwrap_err();
    assert!(error.to_string().contains("rope_frequencies[1]"), "{error}");
}

#[test]
fn rollback_and_compress() {
    let mut cache = Cache::new(&config().rollback_reserve(4)).unwrap();
    let s = Stream::new(300, 8);
    s.append(&mut cache, 0);
    s.append(&mut cache, 1);
    assert!(cache.rollback_available().unwrap() >= 4);
    cache.rollback(3).unwrap();
    assert_eq!(cache.stats(None).unwrap().tokens, 297);
    assert!(cache.compress(None, 2).unwrap() >= 2 && cache.compress(Some(1), 1).unwrap() >= 1);
    let error = cache.rollback(1000).unwrap_err();
    assert_eq!(error.status(), Status::RollbackUnavailable);
}

#[test]
fn compress_kv_keeps_rows_of_its_input() {
    let s = Stream::new(500, 10);
    let (mut k, mut v) = (vec![0f32; KV * 64 * DIM], vec![0f32; KV * 64 * DIM]);
    let (mut weight, mut position) = (vec![0f32; KV * 64], vec![-1i64; KV * 64]);
    let count = compress_kv(
        &Config::new(KV as i32, KV as i32, DIM as i32).budget(64),
        &Tensor::new(&s.k, &[500, KV, DIM]).unwrap(),
        &Tensor::new(&s.v, &[500, KV, DIM]).unwrap(),
        &mut TensorMut::new(&mut k, &[KV, 64, DIM]).unwrap(),
        &mut TensorMut::new(&mut v, &[KV, 64, DIM]).unwrap(),
        &mut TensorMut::new(&mut weight, &[KV, 64]).unwrap(),
        Some(&mut TensorMut::new(&mut position, &[KV, 64]).unwrap()),
    )
    .unwrap() as usize;
    for head in 0..KV {
        assert_eq!(weight[head * 64..][..count].iter().map(|w| w.exp().round()).sum::<f32>(), 500.0);
        for j in 0..count {
            let token = position[head * 64 + j] as usize;
            assert_eq!(k[(head * 64 + j) * DIM..][..DIM], s.k[(token * KV + head) * DIM..][..DIM]);
        }
    }
}

#[test]
fn errors_name_the_argument_and_change_nothing() {
    let mut cache = Cache::new(&config()).unwrap();
    let s = Stream::new(100, 12);
    s.append(&mut cache, 0);
    let before = held(&cache, 0, 0);
    let k = Tensor::new(&s.k, &[100, KV, DIM]).unwrap();
    let short = Tensor::new(&s.v, &[99, KV, DIM]).unwrap();
    for (error, status, text) in [
        (cache.append(2, &k, &k).unwrap_err(), Status::OutOfRange, "layer"),
        (cache.append(0, &k, &short).unwrap_err(), Status::ShapeMismatch, "v.shape"),
        (cache.entries(0, 9).unwrap_err(), Status::OutOfRange, "kv_head"),
        (Cache::new(&Config::new(3, 2, 16)).unwrap_err(), Status::InvalidArgument, "query_heads"),
        (Cache::new(&config().budget(3)).unwrap_err(), Status::BudgetTooSmall, "budget"),
    ] {
        assert_eq!(error.status(), status);
        assert!(error.message().contains(text), "{error}");
        assert!(error.to_string().starts_with("EXPRESS_STATUS_"));
    }
    assert_eq!(held(&cache, 0, 0), before);
}

#[test]
fn threads_share_a_cache_and_take_one_along() {
    let mut cache = Cache::new(&config()).unwrap();
    let s = Stream::new(50, 14);
    s.append(&mut cache, 0);
    let want = s.attend(&cache, 0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..20).for_each(|_| assert_eq!(s.attend(&cache, 0), want)));
        }
    });
    std::thread::spawn(move || drop(cache)).join().unwrap();
}

#[test]
fn sixteen_bit_caches_and_tensors() {
    let mut cache = Cache::new(&config().dtype(DType::Bf16)).unwrap();
    let s = Stream::new(100, 16);
    let half: Vec<Bf16> = s.k.iter().map(|&x| Bf16::from_f32(x)).collect();
    let k = Tensor::new(&half, &[100, KV, DIM]).unwrap();
    cache.append(0, &k, &k).unwrap();
    for (position, key, _) in held(&cache, 0, 1) {
        let row = &half[(position as usize * KV + 1) * DIM..][..DIM];
        assert_eq!(key, row.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>());
    }
}

#[test]
fn storage_in_eight_bits() {
    let mut cache = Cache::new(&config().dtype(DType::I8)).unwrap();
    let s = Stream::new(100, 16);
    s.append(&mut cache, 0);
    for (position, key, _) in held(&cache, 0, 1) {
        let row = &s.k[(position as usize * KV + 1) * DIM..][..DIM];
        let largest = row.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (stored, x) in key.iter().map(|&bits| f32::from_bits(bits)).zip(row) {
            assert!((stored - x).abs() <= largest / 254.0 * 1.01, "{stored} for {x}");
        }
    }
}

#[test]
fn without_a_gpu_cuda_is_a_status() {
    match Cache::new(&config().device(Device::Cuda(0)).prefill_block(64)) {
        Ok(_) => println!("there is an NVIDIA GPU"),
        Err(error) => assert!(
            matches!(error.status(), Status::Unsupported | Status::DeviceError | Status::DeviceMismatch),
            "{error}"
        ),
    }
    let mut cache = Cache::new(&config()).unwrap();
    cache.step_prepare(3).unwrap(); // nothing to do on the CPU
    cache.step_cancel().unwrap();
    assert_eq!(unsafe { cache.set_stream(std::ptr::null_mut()) }.unwrap_err().status(), Status::Unsupported);
    assert!(version().starts_with("1."));
}
