package express

import "testing"

// step is a decode step of one layer: append and attend of one token.
func step(t testing.TB) (*Cache, func()) {
	cache, s, out := newCache(t, testConfig()), newStream(1, 1), make([]float32, heads*dim)
	return cache, func() {
		q, k, v := s.rows(0, 1)
		if cache.Append(0, k, v) != nil || cache.Attend(0, q, F32(out, 1, heads, dim), Tensor{}) != nil {
			t.Fatal("a step failed")
		}
	}
}

func batch(t testing.TB) func() {
	caches, s, out := []*Cache{newCache(t, testConfig()), newCache(t, testConfig())}, newStream(2, 1), make([]float32, 2*heads*dim)
	return func() {
		q, k, v := s.rows(0, 2)
		if AppendBatch(caches, 0, k, v) != nil || AttendBatch(caches, 0, q, F32(out, 2, heads, dim), Tensor{}) != nil {
			t.Fatal("a step failed")
		}
	}
}

// Under the race detector sync.Pool forgets at random, on purpose: test.sh runs this without it.
func TestCallsAllocateNothing(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector allocates")
	}
	cache, one := step(t)
	data := make([]byte, 1<<20)
	for name, call := range map[string]func(){
		"append and attend": one,
		"batches":           batch(t),
		"entries":           func() { cache.Entries(0, 0) },
		"stats":             func() { cache.Stats(AllLayers) },
		"bytes":             func() { cache.Bytes() },
		"compress":          func() { cache.Compress(AllLayers, 1) },
		"rollback":          func() { cache.Rollback(0) },
		"save":              func() { cache.SaveTo(data) },
		"copy":              func() { cache.CopyFrom(cache) },
	} {
		if allocated := testing.AllocsPerRun(200, call); allocated != 0 {
			t.Errorf("%s: %g allocations", name, allocated)
		}
	}
}

func BenchmarkStep(b *testing.B) {
	_, call := step(b)
	b.ReportAllocs()
	for i := 0; i < b.N; i++ {
		call()
	}
}

func BenchmarkBatchOfTwo(b *testing.B) {
	call := batch(b)
	b.ReportAllocs()
	for i := 0; i < b.N; i++ {
		call()
	}
}

func BenchmarkBytes(b *testing.B) {
	cache, _ := step(b)
	b.ReportAllocs()
	for i := 0; i < b.N; i++ {
		cache.Bytes()
	}
}
