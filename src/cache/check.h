// Tensors of the caller's: validated, then addressed.
#ifndef EXPRESS_SRC_CACHE_CHECK_H_
#define EXPRESS_SRC_CACHE_CHECK_H_

#include <cstdint>
#include <initializer_list>

#include "express/status.h"
#include "express/tensor.h"

namespace express::cache {

inline constexpr int64_t kAnySize = -1;
inline constexpr int32_t kMaxRank = 4;

// A tensor that has passed Check: element (i, j, ...) begins at data + i stride[0] + j stride[1] + ... elements.
struct Array {
  char* data = nullptr;
  DType dtype = DType::kF32;
  int32_t rank = 0;
  int64_t shape[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};

  void* At(int64_t i, int64_t j = 0, int64_t k = 0) const {
    return data + (i * stride[0] + j * stride[1] + k * stride[2]) * SizeOf(dtype);
  }
  int64_t elements() const {
    int64_t n = 1;
    for (int32_t i = 0; i < rank; ++i) n *= shape[i];
    return n;
  }
};

enum class Types { kFloat, kF32, kI64 };  // kFloat: F32, F16 or BF16

// Where tensors must live.
struct TensorCheck {
  DeviceType device_type = DeviceType::kCpu;
  int32_t device_id = 0;
  // Null on the CPU. Whether `data` is memory that kernels of this device can read.
  Status (*check_pointer)(const char* name, const void* data, int32_t device_id) = nullptr;
  int64_t row_alignment = 1;  // bytes to which every row of a floating tensor is aligned
};

// Checks a tensor against the shape it must have (kAnySize: any length >= 0) and takes its parts. `name` is the
// argument's.
Status CheckTensor(const TensorCheck& check, const char* name, const Tensor& tensor, Types types,
                   std::initializer_list<int64_t> shape, Array* array);

// NaN or infinity in an input.
Status CheckFinite(const char* name, const Array& array);

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_CHECK_H_
