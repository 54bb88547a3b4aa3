// A view of an array, in the shape of DLPack. The caller owns data, shape and strides.
#ifndef EXPRESS_TENSOR_H_
#define EXPRESS_TENSOR_H_

#include <cstddef>

#include "express/types.h"

namespace express {

struct Tensor {
  void* data = nullptr;
  DeviceType device_type = DeviceType::kCpu;
  int32_t device_id = 0;
  DType dtype = DType::kF32;
  int32_t ndim = 0;
  const int64_t* shape = nullptr;    // (ndim)
  const int64_t* strides = nullptr;  // (ndim), in elements; nullptr: row-major and contiguous
};

// A contiguous array on the CPU that carries its own shape: cache.Append(0, View(k, {n, heads, dim}), View(v, {n,
// heads, dim})).
template <size_t kRank>
class View {
 public:
  View(const void* data, const int64_t (&shape)[kRank], DType dtype = DType::kF32)
      : data_(const_cast<void*>(data)), dtype_(dtype) {
    for (size_t i = 0; i < kRank; ++i) shape_[i] = shape[i];
  }
  // Valid as long as this view.
  operator Tensor() const { return {data_, DeviceType::kCpu, 0, dtype_, static_cast<int32_t>(kRank), shape_, nullptr}; }

 private:
  int64_t shape_[kRank];
  void* data_;
  DType dtype_;
};

}  // namespace express

#endif  // EXPRESS_TENSOR_H_
