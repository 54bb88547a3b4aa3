package express

/*
#include "calls.h"
*/
import "C"

import (
	"fmt"
	"math/bits"
	"unsafe"
)

// DType is an element type: express_dtype.
type DType int32

// Element types. I64 is for positions only. I8 is for Config.DType only: 8-bit codes, and a scale for each key and value.
const (
	DTypeF32  DType = C.EXPRESS_DTYPE_F32
	DTypeF16  DType = C.EXPRESS_DTYPE_F16
	DTypeBF16 DType = C.EXPRESS_DTYPE_BF16
	DTypeI8   DType = C.EXPRESS_DTYPE_I8
	DTypeI64  DType = C.EXPRESS_DTYPE_I64
)

// DeviceType is where a tensor or a cache is: express_device_type.
type DeviceType int32

// Devices, numbered as in DLPack.
const (
	DeviceCPU  DeviceType = C.EXPRESS_DEVICE_CPU
	DeviceCUDA DeviceType = C.EXPRESS_DEVICE_CUDA
)

// MaxDims is the most dimensions that a tensor can have.
const MaxDims = 4

// Tensor is a view of a slice, or of a device's memory: nothing is copied, the library reads or writes where the numbers are. The
// zero Tensor stands for none, where an argument may be left out.
//
// A shape that does not fit its slice is no error here: the call that is given the tensor returns it and does nothing.
type Tensor struct {
	data   unsafe.Pointer // into the slice; nil of an empty one and of a device's memory
	length int            // of the slice
	wrong  problem
	view   C.view
}

// problem is why a tensor cannot be used. It becomes a message only when somebody wants one, so that tensors allocate nothing.
type problem uint8

const (
	tooManyDims problem = 1 << iota
	otherStrides
	negative
	doesNotFit
)

// F32 is a slice of float32, row-major and contiguous.
func F32(data []float32, shape ...int) Tensor {
	t := Tensor{length: len(data)}
	if len(data) > 0 {
		t.data = unsafe.Pointer(&data[0])
	}
	return t.of(DTypeF32, shape)
}

// F16 is a slice of IEEE binary16 numbers, as their bits.
func F16(data []uint16, shape ...int) Tensor { return of16(data, DTypeF16, shape) }

// BF16 is a slice of bfloat16 numbers, as their bits.
func BF16(data []uint16, shape ...int) Tensor { return of16(data, DTypeBF16, shape) }

func of16(data []uint16, dtype DType, shape []int) Tensor {
	t := Tensor{length: len(data)}
	if len(data) > 0 {
		t.data = unsafe.Pointer(&data[0])
	}
	return t.of(dtype, shape)
}

// I64 is a slice of positions, which Export and CompressKV write.
func I64(data []int64, shape ...int) Tensor {
	t := Tensor{length: len(data)}
	if len(data) > 0 {
		t.data = unsafe.Pointer(&data[0])
	}
	return t.of(DTypeI64, shape)
}

// OnDevice is memory of an NVIDIA GPU, which must hold all that shape and strides reach until the stream has passed the calls that
// are given the tensor. Nobody checks that.
func OnDevice(address uintptr, deviceID int, dtype DType, shape ...int) Tensor {
	t := Tensor{}.of(dtype, shape)
	t.view.address = C.uint64_t(address)
	t.view.device_type = C.EXPRESS_DEVICE_CUDA
	t.view.device_id = index(deviceID)
	t.wrong &^= doesNotFit
	return t
}

// WithStrides is the same memory with strides, in elements, of which the last must be 1: a part of a larger tensor, for example.
func (t Tensor) WithStrides(strides ...int) Tensor {
	if len(strides) != int(t.view.ndim) {
		t.wrong |= otherStrides
	}
	if t.wrong&(tooManyDims|otherStrides) != 0 {
		return t
	}
	for i, stride := range strides {
		t.view.strides[i] = C.int64_t(stride)
	}
	t.wrong &^= negative | doesNotFit
	t.check()
	return t
}

func (t Tensor) of(dtype DType, shape []int) Tensor {
	t.view.device_type = C.EXPRESS_DEVICE_CPU
	t.view.dtype = C.int32_t(dtype)
	t.view.ndim = index(len(shape))
	t.view.present = 1
	if len(shape) > MaxDims {
		t.wrong = tooManyDims
		return t
	}
	contiguous := uint64(1)
	for i := len(shape) - 1; i >= 0; i-- {
		t.view.shape[i] = C.int64_t(shape[i])
		t.view.strides[i] = C.int64_t(contiguous)
		if shape[i] > 1 {
			high, low := bits.Mul64(contiguous, uint64(shape[i]))
			if high != 0 || low>>63 != 0 {
				low = 1 << 62 // no memory has so many elements: refused here or by the library
			}
			contiguous = low
		}
	}
	t.check()
	return t
}

// check that all elements are inside the slice. Of a device's memory nobody knows.
func (t *Tensor) check() {
	last, left := C.int64_t(0), C.int64_t(t.length)
	empty := t.view.address != 0
	for i := range t.view.shape[:t.view.ndim] {
		if t.view.shape[i] < 0 || t.view.strides[i] < 0 {
			t.wrong |= negative
			return
		}
		empty = empty || t.view.shape[i] == 0
	}
	if empty {
		return
	}
	for i := range t.view.shape[:t.view.ndim] {
		size, stride := t.view.shape[i], t.view.strides[i]
		if size > 1 && stride > (left-1-last)/(size-1) {
			t.wrong |= doesNotFit
			return
		}
		last += (size - 1) * stride
	}
	if last >= left {
		t.wrong |= doesNotFit
	}
}

// bytes is how the data goes to C: as what holds no pointers, so that cgo has nothing to look for.
func (t *Tensor) bytes() *C.uint8_t { return (*C.uint8_t)(t.data) }

// err of the first of the tensors that cannot be used.
func wrongOf(names []string, tensors ...*Tensor) error {
	for i, t := range tensors {
		if t.wrong != 0 {
			return t.err(names[i])
		}
	}
	return nil
}

func (t *Tensor) err(name string) error {
	shape := make([]int, 0, MaxDims)
	strides := make([]int, 0, MaxDims)
	for i := 0; i < int(t.view.ndim) && i < MaxDims; i++ {
		shape = append(shape, int(t.view.shape[i]))
		strides = append(strides, int(t.view.strides[i]))
	}
	what := ""
	switch {
	case t.wrong&tooManyDims != 0:
		what = fmt.Sprintf(".shape: expected at most %d dimensions, got %d", MaxDims, t.view.ndim)
	case t.wrong&otherStrides != 0:
		what = fmt.Sprintf(".strides: expected %d", t.view.ndim)
	case t.wrong&negative != 0:
		what = fmt.Sprintf(".shape: expected numbers >= 0, got shape %v, strides %v", shape, strides)
	default:
		what = fmt.Sprintf(".shape: %v with strides %v does not fit a slice of %d", shape, strides, t.length)
	}
	return &Error{StatusShapeMismatch, name + what}
}
