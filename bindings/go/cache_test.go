package express

import (
	"bytes"
	"errors"
	"math"
	"math/rand"
	"reflect"
	"sort"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"express/internal/abi"
)

const heads, kvHeads, dim = 6, 2, 16

func testConfig() Config {
	config := NewConfig(heads, kvHeads, dim)
	config.Layers, config.Budget, config.Threads, config.Seed = 2, 64, 1, 3
	return config
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newCache(t testing.TB, config Config) *Cache {
	t.Helper()
	cache, err := New(&config)
	must(t, err)
	t.Cleanup(func() { cache.Close() })
	return cache
}

func numbers(n int, seed int64) []float32 {
	random, x := rand.New(rand.NewSource(seed)), make([]float32, n)
	for i := range x {
		x[i] = float32(random.NormFloat64())
	}
	return x
}

type stream struct {
	n       int
	q, k, v []float32
}

func newStream(n int, seed int64) stream {
	return stream{n, numbers(n*heads*dim, seed), numbers(n*kvHeads*dim, seed+1), numbers(n*kvHeads*dim, seed+2)}
}

func (s stream) rows(begin, end int) (q, k, v Tensor) {
	n := end - begin
	return F32(s.q[begin*heads*dim:end*heads*dim], n, heads, dim), F32(s.k[begin*kvHeads*dim:end*kvHeads*dim], n, kvHeads, dim),
		F32(s.v[begin*kvHeads*dim:end*kvHeads*dim], n, kvHeads, dim)
}

func (s stream) appendTo(t testing.TB, cache *Cache, layer int) {
	t.Helper()
	_, k, v := s.rows(0, s.n)
	must(t, cache.Append(layer, k, v))
}

func (s stream) attend(t testing.TB, cache *Cache, layer int) []float32 {
	t.Helper()
	out := make([]float32, s.n*heads*dim)
	q, _, _ := s.rows(0, s.n)
	must(t, cache.Attend(layer, q, F32(out, s.n, heads, dim), Tensor{}))
	return out
}

type entry struct {
	position  int64
	key       [dim]float32
	logWeight float32
}

// held is what a KV head holds, by position.
func held(t testing.TB, cache *Cache, layer, head int) []entry {
	t.Helper()
	count, err := cache.Entries(layer, head)
	must(t, err)
	k, v := make([]float32, count*dim), make([]float32, count*dim)
	weight, position := make([]float32, count), make([]int64, count)
	written, err := cache.Export(layer, head, F32(k, count, dim), F32(v, count, dim), F32(weight, count), I64(position, count))
	must(t, err)
	if written != count {
		t.Fatalf("%d entries, %d exported", count, written)
	}
	all := make([]entry, count)
	for i := range all {
		all[i] = entry{position: position[i], logWeight: weight[i]}
		copy(all[i].key[:], k[i*dim:])
	}
	sort.Slice(all, func(a, b int) bool { return all[a].position < all[b].position })
	return all
}

func same(t testing.TB, what string, a, b any) {
	t.Helper()
	if !reflect.DeepEqual(a, b) {
		t.Errorf("%s: expected %v, got %v", what, a, b)
	}
}

func TestWeightsAddUpAndTheBudgetIsKept(t *testing.T) {
	config := testConfig()
	bytes, entries, err := Size(&config)
	must(t, err)
	cache := newCache(t, config)
	newStream(3000, 1).appendTo(t, cache, 1)
	now, err := cache.Bytes()
	must(t, err)
	same(t, "bytes", bytes, now)
	same(t, "mean entries", int64(64), entries)
	for head := 0; head < kvHeads; head++ {
		sum := 0.0
		for _, e := range held(t, cache, 1, head) {
			sum += math.Round(math.Exp(float64(e.logWeight)))
		}
		same(t, "sum of weights", 3000.0, sum)
	}
	stats, err := cache.Stats(1)
	must(t, err)
	if stats.Tokens != 3000 || stats.EntriesBudget != 128 || stats.Halvings == 0 || stats.Bytes != bytes || stats.MinWeight != 1 ||
		stats.Entries > 128 || stats.EntriesPeak < stats.Entries || stats.MaxWeight < 2 || stats.BytesPeak < bytes || stats.CompressSeconds <= 0 {
		t.Errorf("stats: %+v", stats)
	}
	all, err := cache.Stats(AllLayers)
	must(t, err)
	same(t, "tokens of all layers", int64(0), all.Tokens)
	must(t, cache.Reset())
	same(t, "after a reset", 0, len(held(t, cache, 1, 0)))
}

func TestAttentionIsSoftmaxOverWhatIsExported(t *testing.T) {
	cache, s := newCache(t, testConfig()), newStream(3, 9)
	past := newStream(40, 5) // no halving: every weight is 1
	past.appendTo(t, cache, 0)
	out, lse := make([]float32, len(s.q)), make([]float32, 3*heads)
	must(t, cache.Attend(0, F32(s.q, 3, heads, dim), F32(out, 3, heads, dim), F32(lse, 3, heads)))
	for row := 0; row < 3*heads; row++ {
		head, p, sum := row%heads/(heads/kvHeads), [40]float64{}, 0.0
		for i := range p {
			dot := 0.0
			for d := 0; d < dim; d++ {
				dot += float64(s.q[row*dim+d]) * float64(past.k[(i*kvHeads+head)*dim+d])
			}
			p[i] = math.Exp(dot / 4)
			sum += p[i]
		}
		if math.Abs(float64(lse[row])-math.Log(sum)) > 1e-4 {
			t.Errorf("lse of row %d: expected %g, got %g", row, math.Log(sum), lse[row])
		}
		for d := 0; d < dim; d++ {
			want := 0.0
			for i := range p {
				want += p[i] / sum * float64(past.v[(i*kvHeads+head)*dim+d])
			}
			if math.Abs(float64(out[row*dim+d])-want) > 1e-4 {
				t.Fatalf("row %d: expected %g, got %g", row, want, out[row*dim+d])
			}
		}
	}
}

func TestPrefillIsTheSameWholeAndInChunks(t *testing.T) {
	s, config := newStream(200, 2), testConfig()
	config.PrefillBlock = 16
	run := func(chunk int) ([]float32, []entry) {
		cache, out := newCache(t, config), make([]float32, len(s.q))
		bytes, err := cache.WorkspaceSize(200)
		must(t, err)
		same(t, "workspace", uint64(0), bytes)
		for begin := 0; begin < s.n; begin += chunk {
			end := begin + chunk
			if end > s.n {
				end = s.n
			}
			q, k, v := s.rows(begin, end)
			must(t, cache.Prefill(0, q, k, v, F32(out[begin*heads*dim:], end-begin, heads, dim), Tensor{}, Workspace{}))
		}
		return out, held(t, cache, 0, 1)
	}
	whole, a := run(200)
	parts, b := run(48)
	same(t, "outputs", whole, parts)
	same(t, "caches", a, b)
}

func TestAllLayersAtOnce(t *testing.T) {
	s, all, one := newStream(100, 3), newCache(t, testConfig()), newCache(t, testConfig())
	both := append(append([]float32{}, s.k...), s.v...)
	must(t, all.AppendAll(F32(both, 2, 100, kvHeads, dim), F32(both, 2, 100, kvHeads, dim)))
	k, v := F32(s.k, 100, kvHeads, dim), F32(s.v, 100, kvHeads, dim)
	must(t, one.Append(0, k, k))
	must(t, one.Append(1, v, v))
	same(t, "layer 1", held(t, one, 1, 1), held(t, all, 1, 1))
}

func TestBatchesAreSingleCalls(t *testing.T) {
	s, single, batched := newStream(3, 4), []*Cache{}, []*Cache{}
	for i := 0; i < 3; i++ {
		config := testConfig()
		config.Budget += 8 * i
		single, batched = append(single, newCache(t, config)), append(batched, newCache(t, config))
	}
	_, k, v := s.rows(0, 3)
	for i := 0; i < 100; i++ {
		must(t, AppendBatch(batched, 0, k, v))
		for j, cache := range single {
			_, k, v := s.rows(j, j+1)
			must(t, cache.Append(0, k, v))
		}
	}
	out := make([]float32, len(s.q))
	must(t, AttendBatch(batched, 0, F32(s.q, 3, heads, dim), F32(out, 3, heads, dim), Tensor{}))
	for i, cache := range single {
		rows := stream{1, s.q[i*heads*dim : (i+1)*heads*dim], nil, nil}
		one := make([]float32, heads*dim)
		must(t, cache.Attend(0, F32(rows.q, 1, heads, dim), F32(one, 1, heads, dim), Tensor{}))
		same(t, "output", one, out[i*heads*dim:(i+1)*heads*dim])
	}
	for _, caches := range [][]*Cache{{batched[0], batched[0], batched[0]}, {batched[0], nil, batched[1]}, nil} {
		err := AppendBatch(caches, 0, k, v)
		if !errors.Is(err, StatusInvalidArgument) || !strings.Contains(err.Error(), "caches") && !strings.Contains(err.Error(), "count") {
			t.Errorf("%v: %v", caches, err)
		}
	}
}

func TestSavedAndCopiedCachesGoOn(t *testing.T) {
	s, cache, loaded, copied := newStream(300, 6), newCache(t, testConfig()), newCache(t, testConfig()), newCache(t, testConfig())
	s.appendTo(t, cache, 0)
	data, err := cache.Save()
	must(t, err)
	must(t, loaded.Load(data))
	must(t, copied.CopyFrom(cache))
	_, k, v := s.rows(7, 60)
	for _, one := range []*Cache{cache, loaded, copied} {
		must(t, one.Append(0, k, v))
	}
	same(t, "loaded", held(t, cache, 0, 0), held(t, loaded, 0, 0))
	same(t, "copied", held(t, cache, 0, 0), held(t, copied, 0, 0))
	data[len(data)-1] ^= 1
	err = loaded.Load(data)
	if !errors.Is(err, StatusInvalidArgument) || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("damaged: %v", err)
	}
	same(t, "after damage", held(t, cache, 0, 0), held(t, loaded, 0, 0))
	if err := cache.SaveTo(data[1:]); !errors.Is(err, StatusBufferTooSmall) {
		t.Errorf("a short buffer: %v", err)
	}
	if loaded.Load(nil) == nil || cache.SaveTo(nil) == nil {
		t.Error("no data was taken")
	}
}

func TestRollbackAndCompress(t *testing.T) {
	config := testConfig()
	config.RollbackReserve = 4
	cache, s := newCache(t, config), newStream(300, 8)
	s.appendTo(t, cache, 0)
	s.appendTo(t, cache, 1)
	available, err := cache.RollbackAvailable()
	must(t, err)
	if available < 4 {
		t.Errorf("%d tokens can be taken back", available)
	}
	must(t, cache.Rollback(3))
	stats, err := cache.Stats(AllLayers)
	must(t, err)
	same(t, "tokens", int64(297), stats.Tokens)
	for _, layer := range []int{AllLayers, 1} {
		if now, err := cache.Compress(layer, 2); err != nil || now < 2 {
			t.Errorf("compress: %d, %v", now, err)
		}
	}
	if err := cache.Rollback(1000); !errors.Is(err, StatusRollbackUnavailable) {
		t.Errorf("rollback of 1000: %v", err)
	}
}

func TestAppendsThatWouldHalveCanBeRefused(t *testing.T) {
	config := testConfig()
	config.AutoCompress = false
	cache, s := newCache(t, config), newStream(300, 8)
	_, k, v := s.rows(0, 300)
	if err := cache.Append(0, k, v); !errors.Is(err, StatusWouldCompress) {
		t.Errorf("append: %v", err)
	}
	same(t, "entries", 0, len(held(t, cache, 0, 0)))
}

func TestCompressKVKeepsRowsOfItsInput(t *testing.T) {
	s, config := newStream(500, 10), NewConfig(kvHeads, kvHeads, dim)
	config.Budget = 64
	k, v := make([]float32, kvHeads*64*dim), make([]float32, kvHeads*64*dim)
	weight, position := make([]float32, kvHeads*64), make([]int64, kvHeads*64)
	_, ik, iv := s.rows(0, 500)
	run := func() (int, error) {
		return CompressKV(&config, ik, iv, F32(k, kvHeads, 64, dim), F32(v, kvHeads, 64, dim), F32(weight, kvHeads, 64),
			I64(position, kvHeads, 64), Workspace{})
	}
	count, err := run()
	must(t, err)
	if bytes, err := CompressKVWorkspace(&config); err != nil || bytes == 0 {
		t.Errorf("workspace: %d, %v", bytes, err)
	}
	for head := 0; head < kvHeads; head++ {
		sum := 0.0
		for i := head * 64; i < head*64+count; i++ {
			sum += math.Round(math.Exp(float64(weight[i])))
			from := (int(position[i])*kvHeads + head) * dim
			same(t, "row", s.k[from:from+dim], k[i*dim:(i+1)*dim])
		}
		same(t, "sum of weights", 500.0, sum)
	}
	config.Layers = 2
	if _, err := run(); !errors.Is(err, StatusInvalidArgument) {
		t.Errorf("two layers: %v", err)
	}
}

func TestSixteenBitCachesAndTensors(t *testing.T) {
	config := testConfig()
	config.DType = DTypeBF16
	cache, x := newCache(t, config), numbers(100*kvHeads*dim, 16)
	half := make([]uint16, len(x))
	for i := range x {
		half[i] = uint16(math.Float32bits(x[i]) >> 16)
	}
	must(t, cache.Append(0, BF16(half, 100, kvHeads, dim), BF16(half, 100, kvHeads, dim)))
	for _, e := range held(t, cache, 0, 1) {
		for d, got := range e.key {
			bits := half[(int(e.position)*kvHeads+1)*dim+d]
			same(t, "key", math.Float32frombits(uint32(bits)<<16), got)
		}
	}
	config.DType = DTypeF16
	cache = newCache(t, config)
	one := make([]uint16, kvHeads*dim)
	for i := range one {
		one[i] = 0x3E00 // 1.5
	}
	must(t, cache.Append(1, F16(one, 1, kvHeads, dim), F16(one, 1, kvHeads, dim)))
	same(t, "1.5", float32(1.5), held(t, cache, 1, 0)[0].key[3])
}

func TestStorageInEightBits(t *testing.T) {
	config := testConfig()
	config.DType = DTypeI8
	cache, s := newCache(t, config), newStream(100, 16)
	s.appendTo(t, cache, 0)
	for _, e := range held(t, cache, 0, 1) {
		row := s.k[(int(e.position)*kvHeads+1)*dim:][:dim]
		largest := 0.0
		for _, x := range row {
			largest = math.Max(largest, math.Abs(float64(x)))
		}
		for d, got := range e.key {
			if math.Abs(float64(got-row[d])) > largest/254*1.01 {
				t.Errorf("key: %v for %v", got, row[d])
			}
		}
	}
}

func TestStridesAndPartsOfLargerArrays(t *testing.T) {
	s, plain, strided := newStream(40, 11), newCache(t, testConfig()), newCache(t, testConfig())
	s.appendTo(t, plain, 0)
	wide := make([]float32, 40*3*dim) // (token, one head more, dim)
	for token := 0; token < 40; token++ {
		copy(wide[(token*3+1)*dim:], s.k[token*kvHeads*dim:(token+1)*kvHeads*dim])
	}
	k := F32(wide[dim:], 40, kvHeads, dim).WithStrides(3*dim, dim, 1)
	must(t, strided.Append(0, k, F32(s.v, 40, kvHeads, dim)))
	same(t, "caches", held(t, plain, 0, 1), held(t, strided, 0, 1))

	want, out := s.attend(t, plain, 0), make([]float32, 40*8*dim)
	q, _, _ := s.rows(0, 40)
	must(t, plain.Attend(0, q, F32(out[dim:], 40, heads, dim).WithStrides(8*dim, dim, 1), Tensor{}))
	for token := 0; token < 40; token++ {
		row := out[token*8*dim : (token+1)*8*dim]
		same(t, "output", want[token*heads*dim:(token+1)*heads*dim], row[dim:7*dim])
		same(t, "beside it", make([]float32, 2*dim), append(append([]float32{}, row[:dim]...), row[7*dim:]...))
	}
}

func TestNoTokens(t *testing.T) {
	cache := newCache(t, testConfig())
	must(t, cache.Append(0, F32(nil, 0, kvHeads, dim), F32(nil, 0, kvHeads, dim)))
	same(t, "entries", 0, len(held(t, cache, 0, 0)))
}

func TestAParallelForOfTheCallers(t *testing.T) {
	config := testConfig()
	function, calls := abi.SerialFor()
	before := *calls
	config.Threads = 2
	config.ParallelFor, config.ParallelForContext = function, unsafe.Pointer(calls)
	own, plain, s := newCache(t, config), newCache(t, testConfig()), newStream(500, 12)
	q, k, v := s.rows(0, 500)
	for _, cache := range []*Cache{own, plain} {
		must(t, cache.Prefill(0, q, k, v, F32(make([]float32, len(s.q)), 500, heads, dim), Tensor{}, Workspace{}))
	}
	same(t, "caches", held(t, plain, 0, 0), held(t, own, 0, 0))
	if *calls == before {
		t.Error("it was not called")
	}
}

func TestBudgetsThatDifferByHead(t *testing.T) {
	config := testConfig()
	config.HeadSettings = []HeadSetting{{64, 4, Auto, Auto}, {96, 4, Auto, Auto}}
	cache, s := newCache(t, config), newStream(2000, 13)
	for layer, want := range []int64{128, 192} {
		s.appendTo(t, cache, layer)
		stats, err := cache.Stats(layer)
		must(t, err)
		same(t, "budget", want, stats.EntriesBudget)
	}
	config.HeadSettings, config.HeadShare = nil, []float32{0, 1, 1, 3}
	stats, err := newCache(t, config).Stats(1)
	must(t, err)
	if stats.EntriesBudget <= 128 {
		t.Errorf("shares: %+v", stats)
	}
	config.HeadShare = []float32{1, 2, 3}
	if _, err := New(&config); !errors.Is(err, StatusInvalidArgument) {
		t.Errorf("three shares: %v", err)
	}
}

func TestRotaryFrequenciesChangeWhatIsSaved(t *testing.T) {
	config := testConfig()
	config.HeadBudgets = HeadBudgetsFixed
	saved := func() []byte {
		cache, s := newCache(t, config), newStream(400, 15)
		s.appendTo(t, cache, 0)
		data, err := cache.Save()
		must(t, err)
		return data
	}
	plain := saved()
	config.RopeFrequencies = []float32{1, 0.5, 0.25}
	rotary := saved()
	if bytes.Equal(rotary, plain) {
		t.Error("the same")
	}
	config.ProtectionScore = ProtectionScoreEnergyValue
	if bytes.Equal(saved(), rotary) {
		t.Error("values make no difference")
	}
	config.RopeLayout = RopeLayoutInterleaved
	config.ProtectionScore = ProtectionScoreAuto
	if bytes.Equal(saved(), rotary) {
		t.Error("the layout makes no difference")
	}
	config.RopeFrequencies[1] = 4
	if _, err := New(&config); !errors.Is(err, StatusInvalidArgument) {
		t.Errorf("4 radians: %v", err)
	}
}

func TestGoroutinesShareACache(t *testing.T) {
	cache, s := newCache(t, testConfig()), newStream(50, 14)
	s.appendTo(t, cache, 0)
	want := s.attend(t, cache, 0)
	var group sync.WaitGroup
	for i := 0; i < 4; i++ {
		group.Add(1)
		go func() {
			defer group.Done()
			for j := 0; j < 20; j++ {
				same(t, "output", want, s.attend(t, cache, 0))
			}
		}()
	}
	group.Wait()
}

func TestWithoutAGPUCudaIsAStatus(t *testing.T) {
	config := testConfig()
	config.DeviceType, config.PrefillBlock = DeviceCUDA, 64
	cache, err := New(&config)
	if err == nil {
		t.Log("there is an NVIDIA GPU")
		cache.Close()
	} else if !errors.Is(err, StatusUnsupported) && !errors.Is(err, StatusDeviceError) && !errors.Is(err, StatusDeviceMismatch) {
		t.Error(err)
	}
	cache = newCache(t, testConfig())
	must(t, cache.StepPrepare(3)) // nothing to do on the CPU
	must(t, cache.StepCancel())
	if err := cache.SetStream(0); !errors.Is(err, StatusUnsupported) {
		t.Errorf("a stream on the CPU: %v", err)
	}
	device := OnDevice(0x1000, 0, DTypeF32, 1, kvHeads, dim)
	if err := cache.Append(0, device, device.WithStrides(kvHeads*dim, dim, 1)); !errors.Is(err, StatusDeviceMismatch) {
		t.Errorf("device memory for a cache on the CPU: %v", err)
	}
}
