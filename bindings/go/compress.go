package express

/*
#include "calls.h"
*/
import "C"

// CompressKVWorkspace is express_compress_kv_workspace: bytes of scratch that CompressKV needs.
func CompressKVWorkspace(config *Config) (uint64, error) {
	raw, at, err := config.raw()
	if err != nil {
		return 0, err
	}
	r := C.call_compress_kv_workspace(raw, at.shares, at.settings, at.frequencies)
	return uint64(r.value), failure(r)
}

// CompressKV is express_compress_kv: k (n, kv_heads, key_dim), v (n, kv_heads, value_dim) to outK (kv_heads, capacity, key_dim), outV
// (kv_heads, capacity, value_dim), logWeight (kv_heads, capacity) of float32, and position (kv_heads, capacity) of int64 or the zero
// Tensor. It returns the entries of every KV head. On a GPU the workspace is the caller's; on the CPU a zero one is allocated for the
// call.
func CompressKV(config *Config, k, v, outK, outV, logWeight, position Tensor, workspace Workspace) (int, error) {
	if k.wrong|v.wrong|outK.wrong|outV.wrong|logWeight.wrong|position.wrong != 0 {
		return 0, wrongOf([]string{"k", "v", "out_k", "out_v", "log_weight", "position"}, &k, &v, &outK, &outV, &logWeight, &position)
	}
	raw, at, err := config.raw()
	if err != nil {
		return 0, err
	}
	r := C.call_compress_kv(raw, at.shares, at.settings, at.frequencies, k.view, k.bytes(), v.view, v.bytes(), outK.view, outK.bytes(), outV.view,
		outV.bytes(), logWeight.view, logWeight.bytes(), position.view, position.bytes(), C.uint64_t(workspace.Address),
		C.uint64_t(workspace.Bytes))
	return int(r.value), failure(r)
}
