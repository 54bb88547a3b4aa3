package express

import (
	"errors"
	"math"
	"testing"

	"express/internal/abi"
)

const gpuHeads, gpuKVHeads, gpuDim = 4, 2, 64

func near(t *testing.T, what string, want, got []float32) {
	t.Helper()
	sum, off := 0.0, 0.0
	for i := range want {
		sum += math.Abs(float64(want[i]))
		off += math.Abs(float64(want[i] - got[i]))
	}
	if !(sum > 0 && off < 0.02*sum) {
		t.Errorf("%s: the GPU is off by %g of %g", what, off, sum)
	}
}

// Memory of a GPU, scratch and saved caches: what the GPU computes is what the CPU does.
func TestOnAGPU(t *testing.T) {
	config := NewConfig(gpuHeads, gpuKVHeads, gpuDim)
	config.Budget, config.PrefillBlock = 128, 64
	here := newCache(t, config)
	config.DeviceType = DeviceCUDA
	there, err := New(&config)
	if errors.Is(err, StatusUnsupported) || errors.Is(err, StatusDeviceError) {
		t.Skip(err)
	}
	must(t, err)
	defer there.Close()
	if !abi.OpenDevice() {
		t.Fatal("the library has a GPU, and NVIDIA's driver has none")
	}

	const n = 300
	q, k, v := numbers(n*gpuHeads*gpuDim, 1), numbers(n*gpuKVHeads*gpuDim, 2), numbers(n*gpuKVHeads*gpuDim, 3)
	out, got := make([]float32, len(q)), make([]float32, len(q))
	dq, dk, dv, do := abi.ToDevice(q), abi.ToDevice(k), abi.ToDevice(v), abi.ToDevice(out)
	bytes, err := there.WorkspaceSize(n)
	must(t, err)
	scratch := Workspace{abi.ToDevice(make([]float32, bytes/4+1)), bytes}
	if bytes == 0 || dq == 0 || dk == 0 || dv == 0 || do == 0 || scratch.Address == 0 {
		t.Fatalf("no memory; a workspace of %d bytes", bytes)
	}
	gpu := func(address uintptr, rows, heads int) Tensor {
		return OnDevice(address, 0, DTypeF32, rows, heads, gpuDim)
	}

	must(t, here.Prefill(0, F32(q, n, gpuHeads, gpuDim), F32(k, n, gpuKVHeads, gpuDim), F32(v, n, gpuKVHeads, gpuDim),
		F32(out, n, gpuHeads, gpuDim), Tensor{}, Workspace{}))
	must(t, there.Prefill(0, gpu(dq, n, gpuHeads), gpu(dk, n, gpuKVHeads), gpu(dv, n, gpuKVHeads), gpu(do, n, gpuHeads), Tensor{}, scratch))
	must(t, abi.FromDevice(got, do))
	near(t, "prefill", out, got)

	must(t, here.Append(0, F32(k, 5, gpuKVHeads, gpuDim), F32(v, 5, gpuKVHeads, gpuDim)))
	must(t, there.Append(0, gpu(dk, 5, gpuKVHeads), gpu(dv, 5, gpuKVHeads)))
	must(t, AppendBatch([]*Cache{here}, 0, F32(k, 1, gpuKVHeads, gpuDim), F32(v, 1, gpuKVHeads, gpuDim)))
	must(t, AppendBatch([]*Cache{there}, 0, gpu(dk, 1, gpuKVHeads), gpu(dv, 1, gpuKVHeads)))
	must(t, here.Attend(0, F32(q, n, gpuHeads, gpuDim), F32(out, n, gpuHeads, gpuDim), Tensor{}))
	must(t, there.Attend(0, gpu(dq, n, gpuHeads), gpu(do, n, gpuHeads), Tensor{}))
	must(t, abi.FromDevice(got, do))
	near(t, "attend", out, got)

	// Saved there, loaded here: the same attention.
	data, err := there.Save()
	must(t, err)
	must(t, here.Load(data))
	must(t, here.Attend(0, F32(q, n, gpuHeads, gpuDim), F32(out, n, gpuHeads, gpuDim), Tensor{}))
	near(t, "attend over what was saved", out, got)

	must(t, there.SetStream(0))
	if err := there.Append(0, F32(k, 1, gpuKVHeads, gpuDim), F32(v, 1, gpuKVHeads, gpuDim)); !errors.Is(err, StatusDeviceMismatch) {
		t.Errorf("a slice for a cache on a GPU: %v", err)
	}
}
