//! Memory of a GPU: what the GPU computes is what the CPU does. NVIDIA's driver is called as it is, without a crate.

use express::*;
use std::ffi::CString;
use std::os::raw::{c_char, c_int, c_void};
use std::ptr;

const HEADS: usize = 4;
const KV: usize = 2;
const DIM: usize = 64;

#[cfg_attr(target_os = "linux", link(name = "dl"))]
extern "C" {
    fn dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

type Put = unsafe extern "C" fn(u64, *const c_void, usize) -> c_int;
type Get = unsafe extern "C" fn(*mut c_void, u64, usize) -> c_int;

/// The driver, with the context of device 0 that the library uses too. Memory is freed at the end of the process.
struct Driver {
    alloc: unsafe extern "C" fn(*mut u64, usize) -> c_int,
    put: Put,
    get: Get,
    stream: unsafe extern "C" fn(*mut *mut c_void, u32) -> c_int,
    wait: unsafe extern "C" fn(*mut c_void) -> c_int,
}

impl Driver {
    fn open() -> Driver {
        unsafe {
            let name = CString::new("libcuda.so.1").unwrap();
            let library = dlopen(name.as_ptr(), 2);
            assert!(!library.is_null(), "the library has a GPU, and there is no NVIDIA driver");
            let find = |name: &str| {
                let name = CString::new(name).unwrap();
                let found = dlsym(library, name.as_ptr());
                assert!(!found.is_null(), "{name:?}");
                found
            };
            let init: unsafe extern "C" fn(u32) -> c_int = std::mem::transmute(find("cuInit"));
            let retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int =
                std::mem::transmute(find("cuDevicePrimaryCtxRetain"));
            let current: unsafe extern "C" fn(*mut c_void) -> c_int = std::mem::transmute(find("cuCtxSetCurrent"));
            let mut context = ptr::null_mut();
            assert_eq!((init(0), retain(&mut context, 0), current(context)), (0, 0, 0));
            Driver {
                alloc: std::mem::transmute(find("cuMemAlloc_v2")),
                put: std::mem::transmute::<*mut c_void, Put>(find("cuMemcpyHtoD_v2")),
                get: std::mem::transmute::<*mut c_void, Get>(find("cuMemcpyDtoH_v2")),
                stream: std::mem::transmute(find("cuStreamCreate")),
                wait: std::mem::transmute(find("cuStreamSynchronize")),
            }
        }
    }
    fn to_device(&self, data: &[f32]) -> *mut c_void {
        let mut address = 0;
        let bytes = std::mem::size_of_val(data);
        unsafe {
            assert_eq!((self.alloc)(&mut address, bytes), 0);
            assert_eq!((self.put)(address, data.as_ptr() as *const c_void, bytes), 0);
        }
        address as *mut c_void
    }
    fn from_device(&self, address: *mut c_void, count: usize) -> Vec<f32> {
        let mut data = vec![f32::NAN; count];
        assert_eq!(unsafe { (self.get)(data.as_mut_ptr() as *mut c_void, address as u64, 4 * count) }, 0);
        data
    }
}

fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1664525).wrapping_add(1013904223);
        (state >> 8) as f32 / 8388608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn near(what: &str, want: &[f32], got: &[f32]) {
    let sum: f64 = want.iter().map(|x| f64::from(x.abs())).sum();
    let off: f64 = want.iter().zip(got).map(|(a, b)| f64::from((a - b).abs())).sum();
    assert!(sum > 0.0 && off < 0.02 * sum, "{what}: the GPU is off by {off} of {sum}");
}

fn on_gpu<'a>(address: *mut c_void, rows: usize, heads: usize) -> (Tensor<'a>, TensorMut<'a>) {
    let shape = [rows, heads, DIM];
    unsafe {
        (
            Tensor::on_device(address, Device::Cuda(0), DType::F32, &shape, None).unwrap(),
            TensorMut::on_device(address, Device::Cuda(0), DType::F32, &shape, None).unwrap(),
        )
    }
}

#[test]
fn on_a_gpu() {
    let config = Config::new(HEADS as i32, KV as i32, DIM as i32).budget(128).prefill_block(64);
    let mut there = match Cache::new(&config.clone().device(Device::Cuda(0))) {
        Ok(cache) => cache,
        Err(error) => {
            assert!(matches!(error.status(), Status::Unsupported | Status::DeviceError), "{error}");
            eprintln!("NO GPU: THE CRATE IS NOT TESTED ON ONE ({error})");
            return;
        }
    };
    let driver = Driver::open();
    let mut here = Cache::new(&config).unwrap();
    let mut stream = ptr::null_mut();
    unsafe {
        assert_eq!((driver.stream)(&mut stream, 1), 0);
        there.set_stream(stream).unwrap();
    }

    const N: usize = 300;
    let (q, k, v) = (numbers(N * HEADS * DIM, 1), numbers(N * KV * DIM, 2), numbers(N * KV * DIM, 3));
    let mut out = vec![0f32; q.len()];
    let (tq, tk) = (Tensor::new(&q, &[N, HEADS, DIM]).unwrap(), Tensor::new(&k, &[N, KV, DIM]).unwrap());
    let tv = Tensor::new(&v, &[N, KV, DIM]).unwrap();
    let result = driver.to_device(&out);
    let (dq, mut to) = (on_gpu(driver.to_device(&q), N, HEADS).0, on_gpu(result, N, HEADS).1);
    let (dk, dv) = (on_gpu(driver.to_device(&k), N, KV).0, on_gpu(driver.to_device(&v), N, KV).0);
    let fetch = || {
        assert_eq!(unsafe { (driver.wait)(stream) }, 0);
        driver.from_device(result, N * HEADS * DIM)
    };

    let bytes = there.workspace_size(N as i64).unwrap();
    assert!(bytes > 0 && here.workspace_size(N as i64).unwrap() == 0);
    let scratch = driver.to_device(&vec![0f32; bytes / 4 + 1]);
    unsafe { there.prefill_with(0, &dq, &dk, &dv, &mut to, None, scratch, bytes) }.unwrap();
    here.prefill(0, &tq, &tk, &tv, &mut TensorMut::new(&mut out, &[N, HEADS, DIM]).unwrap(), None).unwrap();
    near("prefill", &out, &fetch());

    there.append(0, &dk, &dv).unwrap();
    here.append(0, &tk, &tv).unwrap();
    there.attend(0, &dq, &mut to, None).unwrap();
    here.attend(0, &tq, &mut TensorMut::new(&mut out, &[N, HEADS, DIM]).unwrap(), None).unwrap();
    near("attend", &out, &fetch());

    here.load(&there.save().unwrap()).unwrap(); // saved on a GPU, loaded without one
    assert_eq!(here.stats(None).unwrap().tokens, 2 * N as i64);
    here.attend(0, &tq, &mut TensorMut::new(&mut out, &[N, HEADS, DIM]).unwrap(), None).unwrap();
    near("attend over what was saved", &out, &fetch());
    let error = there.append(0, &tk, &tv).unwrap_err();
    assert_eq!(error.status(), Status::DeviceMismatch);
    println!("on a GPU: prefill, append, attend, save");
}
