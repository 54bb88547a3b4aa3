// Package express keeps the KV caches of transformers inside a fixed memory budget and computes attention over what they keep.
//
// It is the C ABI of Express, express.h, in Go. Every method names its function there, where shapes, types, errors and the state
// after a failure are written down in full. A call that fails changed nothing (but for StatusBroken).
//
// Slices become tensors without a copy, and calls of append, attend and prefill allocate nothing. Calls that change a cache must not
// run beside other calls on it; Attend and the others that only look may run at once. Distinct caches are independent. A long call
// keeps its operating-system thread, as every call of C does.
package express

/*
#include "calls.h"
*/
import "C"

// Version of the library that is loaded, for example "1.1.0".
func Version() string { return C.GoString(C.express_version_string()) }

// VersionNumber is major * 10000 + minor * 100 + patch of the library that is loaded.
func VersionNumber() uint32 { return uint32(C.express_version()) }
