// Package abi is what the tests need of C, where cgo cannot be used.
package abi

/*
#cgo pkg-config: express
#include <express.h>

static int64_t calls;

// An express_parallel_for on the thread of the caller.
static void serial(void *context, int64_t count, void (*body)(void *, int64_t, int32_t), void *task) {
  int64_t i;
  for (i = 0; i < count; ++i) body(task, i, 0);
  *(int64_t *)context += 1;
}
static void *serial_for(void) { return (void *)serial; }
static void *serial_calls(void) { return &calls; }
*/
import "C"

import (
	"reflect"
	"unsafe"
)

// Structs of express.h, as cgo lays them out.
var Structs = map[string]reflect.Type{
	"express_config":       reflect.TypeOf(C.express_config{}),
	"express_head_setting": reflect.TypeOf(C.express_head_setting{}),
	"express_stats":        reflect.TypeOf(C.express_stats{}),
	"express_tensor":       reflect.TypeOf(C.express_tensor{}),
	"express_workspace":    reflect.TypeOf(C.express_workspace{}),
}

// SerialFor is a parallel_for and its context, the number of its calls.
func SerialFor() (function unsafe.Pointer, calls *int64) {
	return C.serial_for(), (*int64)(C.serial_calls())
}
