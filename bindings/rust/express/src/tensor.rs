use crate::error::{Error, Result, Status};
use express_sys as sys;
use std::marker::PhantomData;
use std::os::raw::c_void;

/// An IEEE binary16 number, as its bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct F16(pub u16);

/// A bfloat16 number, as its bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Bf16 {
    /// Rounds to nearest, ties to even.
    pub fn from_f32(x: f32) -> Bf16 {
        let bits = x.to_bits();
        if x.is_nan() {
            return Bf16((bits >> 16) as u16 | 0x40);
        }
        Bf16((bits.wrapping_add(0x7FFF + ((bits >> 16) & 1)) >> 16) as u16)
    }
    /// Exactly.
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}

/// Element types.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DType {
    F32,
    F16,
    Bf16,
    /// Storage only: 8-bit codes, and a scale for each key and each value.
    I8,
    /// Positions only.
    I64,
}

impl DType {
    pub(crate) fn number(self) -> i32 {
        match self {
            DType::F32 => sys::EXPRESS_DTYPE_F32,
            DType::F16 => sys::EXPRESS_DTYPE_F16,
            DType::Bf16 => sys::EXPRESS_DTYPE_BF16,
            DType::I8 => sys::EXPRESS_DTYPE_I8,
            DType::I64 => sys::EXPRESS_DTYPE_I64,
        }
    }
}

/// Where a tensor or a cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Device {
    Cpu,
    /// An NVIDIA GPU, by its number.
    Cuda(i32),
}

impl Device {
    pub(crate) fn numbers(self) -> (i32, i32) {
        match self {
            Device::Cpu => (sys::EXPRESS_DEVICE_CPU, 0),
            Device::Cuda(id) => (sys::EXPRESS_DEVICE_CUDA, id),
        }
    }
}

mod sealed {
    pub trait Sealed {}
}

/// Types whose slices can be tensors.
pub trait Element: Copy + sealed::Sealed {
    /// Their number in the library.
    const DTYPE: DType;
}
macro_rules! elements {
    ($($type:ty => $dtype:ident),*) => {$(
        impl sealed::Sealed for $type {}
        impl Element for $type {
            const DTYPE: DType = DType::$dtype;
        }
    )*};
}
elements!(f32 => F32, F16 => F16, Bf16 => Bf16, i64 => I64);

const MOST_DIMS: usize = 4;

#[derive(Clone, Copy, Debug)]
struct View {
    data: *mut c_void,
    device: Device,
    dtype: DType,
    dims: usize,
    shape: [i64; MOST_DIMS],
    strides: [i64; MOST_DIMS],
}

impl View {
    #[inline]
    fn new(
        data: *mut c_void,
        device: Device,
        dtype: DType,
        shape: &[usize],
        strides: Option<&[usize]>,
    ) -> Result<View> {
        let wrong = |what: &str| Err(Error::new(Status::ShapeMismatch, what));
        if shape.len() > MOST_DIMS {
            return wrong("shape: expected at most 4 dimensions");
        }
        if strides.map_or(false, |s| s.len() != shape.len()) {
            return wrong("strides: expected as many as dimensions");
        }
        let mut view = View { data, device, dtype, dims: shape.len(), shape: [0; MOST_DIMS], strides: [0; MOST_DIMS] };
        let mut contiguous: usize = 1;
        for i in (0..shape.len()).rev() {
            let stride = strides.map_or(contiguous, |s| s[i]);
            let (size, stride) = match (i64::try_from(shape[i]), i64::try_from(stride)) {
                (Ok(size), Ok(stride)) => (size, stride),
                _ => return wrong("shape: a size does not fit 64 bits"),
            };
            view.shape[i] = size;
            view.strides[i] = stride;
            contiguous = match contiguous.checked_mul(shape[i].max(1)) {
                Some(product) => product,
                None => return wrong("shape: the product of the sizes does not fit"),
            };
        }
        Ok(view)
    }

    /// Elements from the first one to the last.
    #[inline]
    fn extent(&self) -> Option<usize> {
        let mut last: usize = 0;
        for i in 0..self.dims {
            if self.shape[i] == 0 {
                return Some(0);
            }
            last = last.checked_add((self.shape[i] as usize - 1).checked_mul(self.strides[i] as usize)?)?;
        }
        last.checked_add(1)
    }

    /// Whether no element is at two places.
    #[inline]
    fn is_injective(&self) -> bool {
        let (mut order, mut dims) = ([0; MOST_DIMS], 0);
        for i in (0..self.dims).filter(|&i| self.shape[i] > 1) {
            order[dims] = i;
            dims += 1;
        }
        let order = &mut order[..dims];
        order.sort_unstable_by_key(|&i| self.strides[i]);
        let mut extent = 1;
        order.iter().all(|&i| {
            let fits = self.strides[i] >= extent;
            extent += (self.shape[i] - 1).saturating_mul(self.strides[i]);
            fits
        })
    }

    #[inline]
    fn fits(self, elements: usize) -> Result<View> {
        match self.extent() {
            Some(extent) if extent <= elements => Ok(self),
            _ => Err(self.misfit(elements)),
        }
    }

    #[cold]
    fn misfit(&self, elements: usize) -> Error {
        let shape = &self.shape[..self.dims];
        Error::new(Status::ShapeMismatch, format!("shape {shape:?} does not fit a slice of {elements}"))
    }

    #[inline]
    fn raw(&self) -> sys::express_tensor {
        let (device_type, device_id) = self.device.numbers();
        sys::express_tensor {
            data: self.data,
            device_type,
            device_id,
            dtype: self.dtype.number(),
            ndim: self.dims as i32,
            shape: self.shape.as_ptr(),
            strides: self.strides.as_ptr(),
        }
    }
}

/// A view of an array that is read.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    view: View,
    data: PhantomData<&'a [u8]>,
}

impl<'a> Tensor<'a> {
    /// Row-major and contiguous.
    pub fn new<T: Element>(data: &'a [T], shape: &[usize]) -> Result<Tensor<'a>> {
        Tensor::strided(data, shape, None)
    }
    /// With strides in elements, of which the last must be 1.
    pub fn with_strides<T: Element>(data: &'a [T], shape: &[usize], strides: &[usize]) -> Result<Tensor<'a>> {
        Tensor::strided(data, shape, Some(strides))
    }
    fn strided<T: Element>(data: &'a [T], shape: &[usize], strides: Option<&[usize]>) -> Result<Tensor<'a>> {
        let view = View::new(data.as_ptr() as *mut c_void, Device::Cpu, T::DTYPE, shape, strides)?.fits(data.len())?;
        Ok(Tensor { view, data: PhantomData })
    }
    /// Memory of a device.
    ///
    /// # Safety
    /// `data` is valid memory of the device for all that shape and strides reach, until the stream has passed the calls that
    /// take the tensor.
    pub unsafe fn on_device(
        data: *const c_void,
        device: Device,
        dtype: DType,
        shape: &[usize],
        strides: Option<&[usize]>,
    ) -> Result<Tensor<'a>> {
        Ok(Tensor { view: View::new(data as *mut c_void, device, dtype, shape, strides)?, data: PhantomData })
    }
    pub(crate) fn raw(&self) -> sys::express_tensor {
        self.view.raw()
    }
}

/// A view of an array that is written.
#[derive(Debug)]
pub struct TensorMut<'a> {
    view: View,
    data: PhantomData<&'a mut [u8]>,
}

impl<'a> TensorMut<'a> {
    /// Row-major and contiguous.
    pub fn new<T: Element>(data: &'a mut [T], shape: &[usize]) -> Result<TensorMut<'a>> {
        TensorMut::strided(data, shape, None)
    }
    /// With strides in elements, of which the last must be 1.
    pub fn with_strides<T: Element>(data: &'a mut [T], shape: &[usize], strides: &[usize]) -> Result<TensorMut<'a>> {
        TensorMut::strided(data, shape, Some(strides))
    }
    fn strided<T: Element>(data: &'a mut [T], shape: &[usize], strides: Option<&[usize]>) -> Result<TensorMut<'a>> {
        let elements = data.len();
        let view =
            View::new(data.as_mut_ptr() as *mut c_void, Device::Cpu, T::DTYPE, shape, strides)?.fits(elements)?;
        if !view.is_injective() {
            return Err(Error::new(Status::ShapeMismatch, "strides: elements of an output must not overlap"));
        }
        Ok(TensorMut { view, data: PhantomData })
    }
    /// Memory of a device.
    ///
    /// # Safety
    /// As of [`Tensor::on_device`], and nobody else uses the memory until then.
    pub unsafe fn on_device(
        data: *mut c_void,
        device: Device,
        dtype: DType,
        shape: &[usize],
        strides: Option<&[usize]>,
    ) -> Result<TensorMut<'a>> {
        Ok(TensorMut { view: View::new(data, device, dtype, shape, strides)?, data: PhantomData })
    }
    pub(crate) fn raw(&mut self) -> sys::express_tensor {
        self.view.raw()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn views_stay_inside_their_slices() {
        let data = [0f32; 24];
        assert!(Tensor::new(&data, &[2, 3, 4]).is_ok());
        assert!(Tensor::new(&data, &[2, 3, 5]).is_err());
        assert!(Tensor::new(&data, &[usize::MAX, 2]).is_err());
        assert!(Tensor::new(&data, &[1, 1, 1, 1, 1]).is_err());
        assert!(Tensor::with_strides(&data, &[3, 2, 4], &[8, 4, 1]).is_ok());
        assert!(Tensor::with_strides(&data, &[3, 2, 4], &[12, 4, 1]).is_err());
        assert!(Tensor::with_strides(&data, &[3, 2, 4], &[8, 4]).is_err());
        assert!(Tensor::with_strides(&data, &[usize::MAX / 2, 1, 4], &[8, 4, 1]).is_err());
        assert!(Tensor::new(&data, &[0, 100]).is_ok());
        assert!(Tensor::with_strides(&data, &[4, 1, 4], &[0, 4, 1]).is_ok());
        let mut out = [0f32; 24];
        assert!(TensorMut::with_strides(&mut out, &[2, 3, 4], &[4, 8, 1]).is_ok());
        assert!(TensorMut::with_strides(&mut out, &[4, 1, 4], &[0, 4, 1]).is_err());
        assert!(TensorMut::with_strides(&mut out, &[3, 2, 4], &[4, 4, 1]).is_err());
    }

    #[test]
    fn bfloat16_rounds_to_nearest_even() {
        for (x, bits) in
            [(1.0, 0x3F80), (1.00390625, 0x3F80), (1.01171875, 0x3F82), (-2.0, 0xC000), (f32::INFINITY, 0x7F80)]
        {
            assert_eq!(Bf16::from_f32(x).0, bits, "{x}");
        }
        assert!(Bf16::from_f32(f32::NAN).to_f32().is_nan());
        assert_eq!(Bf16(0x3F82).to_f32(), 1.015625);
    }
}
