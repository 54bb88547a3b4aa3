package express

/*
#cgo pkg-config: express
#include "calls.h"
*/
import "C"

import (
	"math"
	"runtime"
	"unsafe"
)

// AllLayers is the layer of calls that can be about all of them.
const AllLayers = C.EXPRESS_AUTO

// Cache is the cache of one sequence: all layers, inside a budget that never grows.
type Cache struct {
	handle *C.handle
}

// Workspace is scratch in a GPU's memory, which nobody else may use until the stream has passed the call. On the CPU it is zero.
type Workspace struct {
	Address uintptr
	Bytes   uint64
}

// New is express_create. The garbage collector frees caches that are forgotten, but knows nothing of their size: Close them.
func New(config *Config) (*Cache, error) {
	raw, at, err := config.raw()
	if err != nil {
		return nil, err
	}
	made := C.call_create(raw, at.shares, at.settings, at.frequencies)
	if err := failure(made.result); err != nil {
		return nil, err
	}
	c := &Cache{made.cache}
	runtime.SetFinalizer(c, (*Cache).Close)
	return c, nil
}

// Size is express_size: what New would take, without taking it, in bytes, and the mean entries per KV head.
func Size(config *Config) (bytes, meanEntries int64, err error) {
	raw, at, err := config.raw()
	if err != nil {
		return 0, 0, err
	}
	s := C.call_size(raw, at.shares, at.settings, at.frequencies)
	return int64(s.bytes), int64(s.mean_entries), failure(s.result)
}

// Close is express_destroy: frees the memory. Closing again does nothing; other calls then fail. The error is always nil.
func (c *Cache) Close() error {
	handle := c.handle
	c.handle = nil
	runtime.SetFinalizer(c, nil)
	C.call_destroy(handle)
	return nil
}

// index narrows an index: what does not fit becomes one that does not exist.
func index(i int) C.int32_t {
	if i < math.MinInt32 || i > math.MaxInt32 {
		return math.MinInt32
	}
	return C.int32_t(i)
}

// done is the end of a call on c, which must live until then: its finalizer frees what the call uses.
func (c *Cache) done(r C.result) error {
	runtime.KeepAlive(c)
	return failure(r)
}

// Reset is express_reset: forgets all tokens, keeps the memory.
func (c *Cache) Reset() error { return c.done(C.call_reset(c.handle)) }

// Append is express_append: k (n, kv_heads, key_dim), v (n, kv_heads, value_dim).
func (c *Cache) Append(layer int, k, v Tensor) error {
	if k.wrong|v.wrong != 0 {
		return wrongOf([]string{"k", "v"}, &k, &v)
	}
	return c.done(C.call_append(c.handle, index(layer), k.view, k.bytes(), v.view, v.bytes()))
}

// AppendAll is express_append_all: the same with a dimension of layers in front.
func (c *Cache) AppendAll(k, v Tensor) error {
	if k.wrong|v.wrong != 0 {
		return wrongOf([]string{"k", "v"}, &k, &v)
	}
	return c.done(C.call_append_all(c.handle, k.view, k.bytes(), v.view, v.bytes()))
}

// Attend is express_attend: q (n, query_heads, key_dim), out (n, query_heads, value_dim), and lse (n, query_heads) of float32 or the
// zero Tensor. It may run beside other calls that change nothing.
func (c *Cache) Attend(layer int, q, out, lse Tensor) error {
	if q.wrong|out.wrong|lse.wrong != 0 {
		return wrongOf([]string{"q", "out", "lse"}, &q, &out, &lse)
	}
	return c.done(C.call_attend(c.handle, index(layer), q.view, q.bytes(), out.view, out.bytes(), lse.view, lse.bytes()))
}

// WorkspaceSize is express_workspace_size: bytes of scratch that Prefill of n tokens needs, 0 on the CPU.
func (c *Cache) WorkspaceSize(n int) (uint64, error) {
	r := C.call_workspace_size(c.handle, C.int64_t(n))
	return uint64(r.value), c.done(r)
}

// Prefill is express_prefill: causal attention of n new tokens and their append. q, out, lse as in Attend, k, v as in Append.
func (c *Cache) Prefill(layer int, q, k, v, out, lse Tensor, workspace Workspace) error {
	if q.wrong|k.wrong|v.wrong|out.wrong|lse.wrong != 0 {
		return wrongOf([]string{"q", "k", "v", "out", "lse"}, &q, &k, &v, &out, &lse)
	}
	return c.done(C.call_prefill(c.handle, index(layer), q.view, q.bytes(), k.view, k.bytes(), v.view, v.bytes(), out.view,
		out.bytes(), lse.view, lse.bytes(), C.uint64_t(workspace.Address), C.uint64_t(workspace.Bytes)))
}

// Compress is express_compress: halves ahead of need; returns how many tokens the layer (or AllLayers) now takes without a halving.
func (c *Cache) Compress(layer, tokens int) (int, error) {
	r := C.call_compress(c.handle, index(layer), C.int64_t(tokens))
	return int(r.value), c.done(r)
}

// Rollback is express_rollback: drops the last tokens of every layer.
func (c *Cache) Rollback(tokens int) error {
	return c.done(C.call_rollback(c.handle, C.int64_t(tokens)))
}

// RollbackAvailable is express_rollback_available.
func (c *Cache) RollbackAvailable() (int, error) {
	r := C.call_rollback_available(c.handle)
	return int(r.value), c.done(r)
}

// Entries is express_entries: how many a KV head holds now.
func (c *Cache) Entries(layer, kvHead int) (int, error) {
	r := C.call_entries(c.handle, index(layer), index(kvHead))
	return int(r.value), c.done(r)
}

// Export is express_export: k (capacity, key_dim), v (capacity, value_dim), and, or the zero Tensor, log weights (capacity) of float32
// and positions (capacity) of int64. It returns how many rows were written.
func (c *Cache) Export(layer, kvHead int, k, v, logWeight, position Tensor) (int, error) {
	if k.wrong|v.wrong|logWeight.wrong|position.wrong != 0 {
		return 0, wrongOf([]string{"k", "v", "log_weight", "position"}, &k, &v, &logWeight, &position)
	}
	r := C.call_export(c.handle, index(layer), index(kvHead), k.view, k.bytes(), v.view, v.bytes(), logWeight.view,
		logWeight.bytes(), position.view, position.bytes())
	return int(r.value), c.done(r)
}

// SaveSize is express_save_size: how many bytes Save returns.
func (c *Cache) SaveSize() (int, error) {
	r := C.call_save_size(c.handle)
	return int(r.value), c.done(r)
}

// Save is express_save: all the cache holds, for Load of any cache of the same model, budgets, method and seed.
func (c *Cache) Save() ([]byte, error) {
	size, err := c.SaveSize()
	if err != nil {
		return nil, err
	}
	data := make([]byte, size)
	return data, c.SaveTo(data)
}

// SaveTo is Save into memory of the caller's, of at least SaveSize bytes.
func (c *Cache) SaveTo(data []byte) error {
	return c.done(C.call_save(c.handle, first(data), C.uint64_t(len(data))))
}

// Load is express_load: takes the place of all the cache holds. Damaged data and other configurations are refused.
func (c *Cache) Load(data []byte) error {
	return c.done(C.call_load(c.handle, first(data), C.uint64_t(len(data))))
}

func first(data []byte) *C.uint8_t {
	if len(data) == 0 {
		return nil
	}
	return (*C.uint8_t)(unsafe.Pointer(&data[0]))
}

// CopyFrom is express_copy: holds what another cache holds, to fork a sequence or to reorder beams.
func (c *Cache) CopyFrom(from *Cache) error {
	err := c.done(C.call_copy(c.handle, from.handle))
	runtime.KeepAlive(from)
	return err
}

// Stats are the counts of express_stats.
type Stats struct {
	Tokens, Entries, EntriesPeak, EntriesBudget int64
	MinWeight, MaxWeight, Halvings              int64
	Bytes, BytesPeak                            int64
	CompressSeconds                             float64
	HeadBudgets                                 HeadBudgets // what Config.HeadBudgets came to
}

// Stats is express_get_stats of a layer, or of AllLayers.
func (c *Cache) Stats(layer int) (Stats, error) {
	r := C.call_get_stats(c.handle, index(layer))
	return statsOf(&r.stats), c.done(r.result)
}

func statsOf(s *C.express_stats) Stats {
	return Stats{int64(s.tokens), int64(s.entries), int64(s.entries_peak), int64(s.entries_budget), int64(s.min_weight),
		int64(s.max_weight), int64(s.halvings), int64(s.bytes), int64(s.bytes_peak), float64(s.compress_seconds),
		HeadBudgets(s.head_budgets)}
}

// Bytes is express_bytes: what the cache has allocated, constant from New to Close.
func (c *Cache) Bytes() (int64, error) {
	r := C.call_bytes(c.handle)
	return int64(r.value), c.done(r)
}

// SetStream is express_set_stream: the cudaStream_t of later calls.
func (c *Cache) SetStream(stream uintptr) error {
	return c.done(C.call_set_stream(c.handle, C.uint64_t(stream)))
}

// StepPrepare is express_step_prepare: plans the coming n tokens of all layers for a captured CUDA graph.
func (c *Cache) StepPrepare(n int) error { return c.done(C.call_step_prepare(c.handle, C.int64_t(n))) }

// StepCancel is express_step_cancel: takes prepared steps back that were not replayed.
func (c *Cache) StepCancel() error { return c.done(C.call_step_cancel(c.handle)) }
