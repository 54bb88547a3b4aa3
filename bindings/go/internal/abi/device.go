package abi

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

// NVIDIA's driver, if there is one, and the context of device 0 that the library uses too.
static int (*set_context)(void *), (*alloc)(uint64_t *, size_t), (*to_device)(uint64_t, const void *, size_t);
static int (*from_device)(void *, uint64_t, size_t), (*synchronize)(void);
static void *context;

static int load(void *driver, const char *name, void *function) {
  *(void **)function = dlsym(driver, name);
  return *(void **)function != NULL;
}

static int open_device(void) {
  int (*init)(unsigned), (*get)(int *, int), (*retain)(void **, int), device = 0;
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  return driver != NULL && load(driver, "cuInit", &init) && load(driver, "cuDeviceGet", &get) &&
         load(driver, "cuDevicePrimaryCtxRetain", &retain) && load(driver, "cuCtxSetCurrent", &set_context) &&
         load(driver, "cuMemAlloc_v2", &alloc) && load(driver, "cuMemcpyHtoD_v2", &to_device) &&
         load(driver, "cuMemcpyDtoH_v2", &from_device) && load(driver, "cuCtxSynchronize", &synchronize) &&
         init(0) == 0 && get(&device, 0) == 0 && retain(&context, device) == 0;
}

// Contexts are current by thread, which goroutines change.
static uint64_t put(const uint8_t *data, size_t bytes) {
  uint64_t address = 0;
  if (set_context(context) != 0 || alloc(&address, bytes) != 0 || to_device(address, data, bytes) != 0) return 0;
  return address;
}
static int get(uint8_t *data, uint64_t address, size_t bytes) {
  return set_context(context) != 0 || synchronize() != 0 || from_device(data, address, bytes) != 0;
}
*/
import "C"

import (
	"errors"
	"unsafe"
)

// OpenDevice finds out whether there is an NVIDIA GPU.
func OpenDevice() bool { return C.open_device() != 0 }

// ToDevice copies to memory of the GPU, which nobody frees; 0 is a failure.
func ToDevice(data []float32) uintptr {
	return uintptr(C.put((*C.uint8_t)(unsafe.Pointer(&data[0])), C.size_t(4*len(data))))
}

// FromDevice waits for the GPU and copies from it.
func FromDevice(data []float32, address uintptr) error {
	if C.get((*C.uint8_t)(unsafe.Pointer(&data[0])), C.uint64_t(address), C.size_t(4*len(data))) != 0 {
		return errors.New("the GPU's memory cannot be read")
	}
	return nil
}
