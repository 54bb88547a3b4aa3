// Inputs of the kernel benchmarks.
#ifndef EXPRESS_BENCH_KERNEL_INPUTS_H_
#define EXPRESS_BENCH_KERNEL_INPUTS_H_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "src/cpu/kernels.h"

namespace express::bench {

// Normal numbers, repeated after a while: their generation must not take longer than the benchmark.
inline std::vector<float> Normals(int64_t count, uint32_t seed = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> period(100003);
  for (float& x : period) x = normal(rng);
  std::vector<float> all(static_cast<size_t>(count));
  for (size_t i = 0; i < all.size(); ++i) all[i] = period[i % period.size()];
  return all;
}

inline const char* Name(DType dtype) {
  return dtype == DType::kF32 ? "f32" : dtype == DType::kF16 ? "f16" : dtype == DType::kI8 ? "i8" : "bf16";
}

// A slab whose slots are all live with weight 1.
class FullSlab {
 public:
  FullSlab(DType dtype, int64_t capacity, int32_t key_dim, int32_t value_dim)
      : memory_(static_cast<size_t>(capacity * (key_dim + value_dim) * SizeOf(dtype) / 4) + 32),
        position_(static_cast<size_t>(capacity)),
        scale_(static_cast<size_t>(capacity)),
        log_weight(static_cast<size_t>(capacity), 0.0f) {
    const std::vector<float> normals = Normals(std::max(key_dim, value_dim) * int64_t{1009});
    char* key = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64);
    slab = {key,   key + capacity * key_dim * SizeOf(dtype),     position_.data(), capacity, key_dim, value_dim,
            dtype, dtype == DType::kI8 ? scale_.data() : nullptr};
    for (int64_t i = 0; i < capacity; ++i) {
      const auto slot = static_cast<int32_t>(i);
      const float* row = normals.data() + i % 1009 * std::max(key_dim, value_dim);
      cpu::WriteEntries(slab, &slot, 1, i, {row, key_dim, DType::kF32}, {row, value_dim, DType::kF32});
    }
  }
  // Of rows; their scales, where they have some, are elsewhere.
  int64_t bytes() const { return slab.capacity * (slab.key_dim + slab.value_dim) * SizeOf(slab.dtype); }

 private:
  std::vector<float> memory_;
  std::vector<int64_t> position_;
  std::vector<cpu::RowScales> scale_;

 public:
  std::vector<float> log_weight;
  cpu::Slab slab;
};

}  // namespace express::bench

#endif  // EXPRESS_BENCH_KERNEL_INPUTS_H_
