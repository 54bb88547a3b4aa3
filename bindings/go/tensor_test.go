package express

import (
	"math"
	"testing"
)

func TestTensorsStayInsideTheirSlices(t *testing.T) {
	data := make([]float32, 24)
	for _, c := range []struct {
		tensor Tensor
		fits   bool
	}{
		{F32(data, 2, 3, 4), true},
		{F32(data, 2, 3, 5), false},
		{F32(data, math.MaxInt, 2), false},
		{F32(data, math.MaxInt, math.MaxInt, math.MaxInt, math.MaxInt), false},
		{F32(data, 4, 1<<62, 4), false},
		{F32(data, 1, 1, 1, 1, 1), false},
		{F32(data, -1, 4), false},
		{F32(data, 0, 100), true},
		{F32(data, 0, -1), false},
		{F32(data[:0], 1), false},
		{F32(nil, 0), true},
		{F32(data, 3, 2, 4).WithStrides(8, 4, 1), true},
		{F32(data, 3, 2, 4).WithStrides(12, 4, 1), false},
		{F32(data, 100, 2, 4).WithStrides(0, 4, 1), true},
		{F32(data, 3, 2, 4).WithStrides(8, 4), false},
		{F32(data, math.MaxInt, 1, 4).WithStrides(8, 4, 1), false},
		{F32(data, 3, 1, 4).WithStrides(math.MaxInt, 4, 1), false},
		{F16(make([]uint16, 6), 2, 3), true},
		{BF16(make([]uint16, 6), 2, 4), false},
		{I64(make([]int64, 6), 6), true},
		{OnDevice(4096, 0, DTypeBF16, 1<<20, 128), true},
		{OnDevice(4096, 0, DTypeBF16, 1<<20, -128), false},
		{Tensor{}, true},
	} {
		if (c.tensor.wrong == 0) != c.fits {
			t.Errorf("shape %v, strides %v of %d: expected %v", c.tensor.view.shape, c.tensor.view.strides, c.tensor.length, c.fits)
		}
	}
}
