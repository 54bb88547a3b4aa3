package express

import (
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestStatusesRoundTrip(t *testing.T) {
	for name, number := range golden(t) {
		if !strings.HasPrefix(name, "EXPRESS_STATUS_") {
			continue
		}
		status := Status(number)
		same(t, "name", name, status.String())
		wrapped := fmt.Errorf("layer 3: %w", &Error{status, "k.shape: wrong"})
		for other := StatusOK; other <= StatusRingFull; other++ {
			same(t, name, other == status, errors.Is(wrapped, other))
		}
		var err *Error
		if !errors.As(wrapped, &err) || err.Status != status || err.Error() != name+": k.shape: wrong" {
			t.Errorf("%s: %v", name, wrapped)
		}
	}
	same(t, "one more", "EXPRESS_STATUS_UNKNOWN", (StatusRingFull + 1).String())
	same(t, "one less", "EXPRESS_STATUS_UNKNOWN", Status(-1).String())
}

func TestErrorsNameTheArgumentAndChangeNothing(t *testing.T) {
	cache, s := newCache(t, testConfig()), newStream(100, 12)
	s.appendTo(t, cache, 0)
	before := held(t, cache, 0, 0)
	q, k, v := s.rows(0, 100)
	_, _, short := s.rows(0, 99)
	heads3, small, huge, infinite := NewConfig(3, 2, 16), testConfig(), testConfig(), testConfig()
	small.Budget, huge.Threads, infinite.Validate = 3, 1<<32, true
	create := func(config Config) error { _, err := New(&config); return err }
	entries := func(layer, head int) error { _, err := cache.Entries(layer, head); return err }
	nan := F32([]float32{float32(math.NaN()), 31: 0}, 1, kvHeads, dim)
	for _, c := range []struct {
		err    error
		status Status
		text   string
	}{
		{cache.Append(2, k, v), StatusOutOfRange, "layer"},
		{cache.Append(1<<32, k, v), StatusOutOfRange, "layer"},
		{cache.Append(0, k, short), StatusShapeMismatch, "v.shape"},
		{cache.Append(0, k, Tensor{}), StatusInvalidArgument, "v"},
		{cache.Append(0, k, I64(make([]int64, 3200), 100, kvHeads, dim)), StatusDTypeMismatch, "v.dtype"},
		{cache.Append(0, k, F32(s.v, 101, kvHeads, dim)), StatusShapeMismatch, "v.shape: [101 2 16]"},
		{cache.AppendAll(F32(s.k, 1, 1, 1, 1, 1), v), StatusShapeMismatch, "k.shape: expected at most 4"},
		{cache.Attend(0, q, F32(nil, 100, heads, dim), Tensor{}), StatusShapeMismatch, "out.shape"},
		{cache.Attend(0, q, q.WithStrides(1), Tensor{}), StatusShapeMismatch, "out.strides: expected 3"},
		{cache.Attend(0, q.WithStrides(heads*dim, -dim, 1), q, Tensor{}), StatusShapeMismatch, "q.shape: expected numbers >= 0"},
		{cache.Prefill(0, q, k, v, q, F32(nil, 1), Workspace{}), StatusShapeMismatch, "lse.shape"},
		{entries(0, 9), StatusOutOfRange, "kv_head"},
		{create(heads3), StatusInvalidArgument, "query_heads"},
		{create(small), StatusBudgetTooSmall, "budget"},
		{create(huge), StatusInvalidArgument, "config.threads"},
		{newCache(t, infinite).Append(0, nan, nan), StatusNotFinite, "k"},
	} {
		var err *Error
		if !errors.As(c.err, &err) || err.Status != c.status || !strings.Contains(err.Message, c.text) {
			t.Errorf("expected %v with %q, got %v", c.status, c.text, c.err)
		}
	}
	same(t, "entries", before, held(t, cache, 0, 0))
}

// Goroutines wander between threads, and the library keeps messages by thread: each must still get its own. More threads than
// processors, so that many are taken off theirs in the midst of a call.
func TestMessagesBelongToTheirCall(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(8 * runtime.NumCPU()))
	cache := newCache(t, testConfig())
	var group sync.WaitGroup
	for i := 2; i < 66; i++ {
		group.Add(1)
		go func(layer int) {
			defer group.Done()
			want := fmt.Sprintf("got %d", layer)
			for j := 0; j < 3000; j++ {
				_, err := cache.Entries(layer, 0)
				if err == nil || !strings.HasSuffix(err.Error(), want) {
					t.Errorf("layer %d: %v", layer, err)
					return
				}
			}
		}(i)
	}
	group.Wait()
}

func TestAClosedCacheRefuses(t *testing.T) {
	config := testConfig()
	cache, err := New(&config)
	must(t, err)
	must(t, cache.Close())
	must(t, cache.Close())
	for _, err := range []error{cache.Reset(), cache.Rollback(1), cache.CopyFrom(cache)} {
		if !errors.Is(err, StatusInvalidArgument) || !strings.Contains(err.Error(), "cache") {
			t.Errorf("closed: %v", err)
		}
	}
}

func TestForgottenCachesAreFreed(t *testing.T) {
	pages := func() (all int) {
		text, err := os.ReadFile("/proc/self/statm")
		if err != nil {
			t.Skip("no /proc")
		}
		fmt.Sscan(string(text), &all)
		return all
	}
	config, before := testConfig(), pages()
	config.Budget = 1 << 20
	bytes, _, err := Size(&config)
	must(t, err)
	for i := 0; i < 100; i++ {
		_, err := New(&config)
		must(t, err)
		runtime.GC() // finalizers run soon after, not at once
	}
	for i := 0; i < 100 && pages()-before > 10*int(bytes)/os.Getpagesize(); i++ {
		time.Sleep(10 * time.Millisecond)
	}
	if left := pages() - before; left > 10*int(bytes)/os.Getpagesize() {
		t.Errorf("%d pages of 100 caches of %d bytes are left", left, bytes)
	}
}
