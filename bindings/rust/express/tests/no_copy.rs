//! The pointers that the C ABI was given, as recorded by bindings/no_copy, are those of the slices.

use express::{Bf16, Cache, Config, Tensor, TensorMut};

fn at<T>(x: &[T]) -> String {
    format!("{:x}", x.as_ptr() as usize)
}

#[test]
#[ignore = "run by test.sh, under the recorder of bindings/no_copy"]
fn nothing_is_copied() {
    let path = std::env::var("EXPRESS_POINTERS").expect("run by test.sh");
    let mut cache = Cache::new(&Config::new(4, 2, 16).budget(64)).unwrap();
    let (q, k, half) = (vec![1f32; 2 * 4 * 16], vec![1f32; 2 * 2 * 16], vec![Bf16::default(); 3 * 2 * 16]);
    let (mut out, mut lse) = (vec![0f32; 2 * 4 * 16], vec![0f32; 2 * 4]);
    let want = [
        format!("express_append {} {}", at(&k), at(&half[2 * 16..])),
        format!("express_attend {} {} {}", at(&q), at(&out), at(&lse)),
        format!("express_prefill {} {} {} {} 0", at(&q), at(&k), at(&k), at(&out)),
    ];
    let (tq, tk) = (Tensor::new(&q, &[2, 4, 16]).unwrap(), Tensor::new(&k, &[2, 2, 16]).unwrap());
    let tv = Tensor::with_strides(&half[2 * 16..], &[2, 2, 16], &[2 * 16, 16, 1]).unwrap();
    cache.append(0, &tk, &tv).unwrap();
    let mut to = TensorMut::new(&mut out, &[2, 4, 16]).unwrap();
    let mut tl = TensorMut::new(&mut lse, &[2, 4]).unwrap();
    cache.attend(0, &tq, &mut to, Some(&mut tl)).unwrap();
    cache.prefill(0, &tq, &tk, &tk, &mut to, None).unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    assert_eq!(text.lines().collect::<Vec<_>>(), want);
}
