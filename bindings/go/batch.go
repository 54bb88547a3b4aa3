package express

/*
#include "calls.h"
*/
import "C"

import (
	"runtime"
	"sync"
)

// pool of the arrays that batches are passed in: they would escape to the heap in every call.
var pool = sync.Pool{New: func() any { return new([]*C.handle) }}

// withHandles calls with the handles of the caches, which live until it returns.
func withHandles(caches []*Cache, call func(handles **C.handle, count C.int64_t) C.result) error {
	array := pool.Get().(*[]*C.handle)
	handles := (*array)[:0]
	for _, c := range caches {
		if c == nil {
			handles = append(handles, nil) // which the library refuses
		} else {
			handles = append(handles, c.handle)
		}
	}
	var at **C.handle
	if len(handles) > 0 {
		at = &handles[0]
	}
	r := call(at, C.int64_t(len(handles)))
	runtime.KeepAlive(caches)
	*array = handles
	pool.Put(array)
	return failure(r)
}

// AppendBatch is express_append_batch: one token in each of the caches; k (count, kv_heads, key_dim), v (count, kv_heads, value_dim).
func AppendBatch(caches []*Cache, layer int, k, v Tensor) error {
	if k.wrong|v.wrong != 0 {
		return wrongOf([]string{"k", "v"}, &k, &v)
	}
	return withHandles(caches, func(handles **C.handle, count C.int64_t) C.result {
		return C.call_append_batch(handles, count, index(layer), k.view, k.bytes(), v.view, v.bytes())
	})
}

// AttendBatch is express_attend_batch: one query token in each of the caches; q (count, query_heads, key_dim), out (count, query_heads,
// value_dim), lse (count, query_heads) of float32 or the zero Tensor.
func AttendBatch(caches []*Cache, layer int, q, out, lse Tensor) error {
	if q.wrong|out.wrong|lse.wrong != 0 {
		return wrongOf([]string{"q", "out", "lse"}, &q, &out, &lse)
	}
	return withHandles(caches, func(handles **C.handle, count C.int64_t) C.result {
		return C.call_attend_batch(handles, count, index(layer), q.view, q.bytes(), out.view, out.bytes(), lse.view, lse.bytes())
	})
}
