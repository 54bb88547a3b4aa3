// Slabs with guarded memory, random entries and one run per SIMD target, for the tests of the CPU kernels.
#ifndef EXPRESS_TESTS_CPU_TESTING_H_
#define EXPRESS_TESTS_CPU_TESTING_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "src/cpu/kernels.h"
#include "src/cpu/reference.h"
#include "src/cpu/scalar.h"

namespace express::cpu {

inline constexpr float kFree = -std::numeric_limits<float>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
inline constexpr DType kFloating[] = {DType::kF32, DType::kF16, DType::kBF16};
inline constexpr DType kStorage[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kI8};

inline const char* Name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kF16:
      return "f16";
    case DType::kBF16:
      return "bf16";
    case DType::kI8:
      return "i8";
    default:
      return "?";
  }
}

// Runs every test of the suite once for each SIMD target.
class SimdTest : public testing::TestWithParam<int> {
 protected:
  void SetUp() override { ForceSimdTarget(GetParam()); }
  void TearDown() override { ForceSimdTarget(-1); }
};
#define EXPRESS_FOR_EVERY_TARGET(suite)                    \
  INSTANTIATE_TEST_SUITE_P(                                \
      Target, suite, testing::Range(0, SimdTargetCount()), \
      [](const testing::TestParamInfo<int>& target) { return std::string(SimdTargetName(target.param)); })

// Elements of any storage type, allocated exactly (so that a sanitizer sees reads past the end) and full of NaN. Of 8-bit
// storage: rows of `columns` codes, whose scales are elsewhere.
class Buffer {
 public:
  Buffer(DType dtype, int64_t count, int64_t columns = 1, const RowScales* scales = nullptr,
         uint16_t RowScales::*scale = nullptr)
      : dtype_(dtype),
        count_(count),
        columns_(columns),
        scales_(scales),
        scale_(scale),
        bytes_(new char[static_cast<size_t>(count * SizeOf(dtype))]) {
    std::memset(bytes_.get(), 0xFF, size());
  }
  DType dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  size_t size() const { return static_cast<size_t>(count_ * SizeOf(dtype_)); }
  char* at(int64_t i) const { return bytes_.get() + i * SizeOf(dtype_); }
  float Get(int64_t i) const {
    if (dtype_ == DType::kI8)
      return ToFloat(BFloat16{scales_[i / columns_].*scale_}) * static_cast<float>(static_cast<int8_t>(*at(i)));
    return WithType(dtype_, [&](auto t) { return ToFloat(*reinterpret_cast<const decltype(t)*>(at(i))); });
  }
  void Set(int64_t i, float x) {
    WithType(dtype_, [&](auto t) { FromFloat(x, reinterpret_cast<decltype(t)*>(at(i))); });
  }
  std::string Bytes() const { return std::string(bytes_.get(), size()); }

 private:
  DType dtype_;
  int64_t count_;
  int64_t columns_;
  const RowScales* scales_;
  uint16_t RowScales::*scale_;
  std::unique_ptr<char[]> bytes_;
};

// A slab and its memory. Every slot is poisoned until it is set.
struct TestSlab {
  TestSlab(DType dtype, int64_t capacity, int32_t key_dim, int32_t value_dim)
      : scale(dtype == DType::kI8 ? static_cast<size_t>(capacity) : 0, RowScales{0xFFFF, 0xFFFF}),
        key(dtype, capacity * key_dim, key_dim, scale.data(), &RowScales::key),
        value(dtype, capacity * value_dim, value_dim, scale.data(), &RowScales::value),
        position(static_cast<size_t>(capacity), -1),
        log_weight(static_cast<size_t>(capacity), kFree),
        slab{key.at(0), value.at(0), position.data(), capacity,
             key_dim,   value_dim,   dtype,           dtype == DType::kI8 ? scale.data() : nullptr} {}

  template <class DrawKey, class DrawValue>
  void Fill(int64_t slot, const DrawKey& draw_key, const DrawValue& draw_value, int64_t at_position) {
    const uint16_t key_scale = SetRow(key, slot, slab.key_dim, draw_key);
    const uint16_t value_scale = SetRow(value, slot, slab.value_dim, draw_value);
    if (!scale.empty()) scale[static_cast<size_t>(slot)] = {key_scale, value_scale};
    position[static_cast<size_t>(slot)] = at_position;
  }
  // Bytes of one slot: key, value, scales, position.
  std::string Entry(int64_t slot) const {
    const auto element = SizeOf(slab.dtype);
    std::string bytes(key.at(slot * slab.key_dim), static_cast<size_t>(slab.key_dim * element));
    bytes.append(value.at(slot * slab.value_dim), static_cast<size_t>(slab.value_dim * element));
    if (!scale.empty())
      bytes.append(reinterpret_cast<const char*>(&scale[static_cast<size_t>(slot)]), sizeof(RowScales));
    return bytes.append(reinterpret_cast<const char*>(&position[static_cast<size_t>(slot)]), sizeof(int64_t));
  }

  std::vector<RowScales> scale;  // of 8-bit storage
  Buffer key, value;
  std::vector<int64_t> position;
  std::vector<float> log_weight;
  Slab slab;

 private:
  // Returns the scale of what is stored in 8 bits.
  template <class Draw>
  static uint16_t SetRow(Buffer& rows, int64_t row, int64_t columns, const Draw& draw) {
    std::vector<float> x(static_cast<size_t>(columns));
    for (float& e : x) e = draw();
    if (rows.dtype() != DType::kI8) {
      for (size_t d = 0; d < x.size(); ++d) rows.Set(row * columns + static_cast<int64_t>(d), x[d]);
      return 0;
    }
    const reference::Quantised codes = reference::Quantise(x);
    for (size_t d = 0; d < x.size(); ++d)
      *rows.at(row * columns + static_cast<int64_t>(d)) = static_cast<char>(codes.code[d]);
    return ToBFloat16(static_cast<float>(codes.scale)).bits;
  }
};

// Rows `slots` of a (?, columns) buffer, in double.
inline reference::Matrix Gather(const Buffer& from, int64_t columns, const std::vector<int32_t>& slots) {
  reference::Matrix m(static_cast<int64_t>(slots.size()), columns);
  for (size_t i = 0; i < slots.size(); ++i)
    for (int64_t d = 0; d < columns; ++d)
      m.row(static_cast<int64_t>(i))[d] = static_cast<double>(from.Get(slots[i] * columns + d));
  return m;
}
inline reference::Matrix All(const Buffer& from, int64_t columns) {
  std::vector<int32_t> rows(static_cast<size_t>(columns > 0 ? from.count() / columns : 0));
  std::iota(rows.begin(), rows.end(), 0);
  return Gather(from, columns, rows);
}

// 64-byte aligned scratch of exactly the size asked for, full of NaN.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : bytes_(static_cast<char*>(::operator new(bytes, std::align_val_t(64)))) {
    std::memset(bytes_, 0xFF, bytes);
  }
  ~Scratch() { ::operator delete(bytes_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return bytes_; }

 private:
  char* bytes_;
};

// `count` of the slots 0 .. capacity - 1, in random order.
inline std::vector<int32_t> RandomSlots(std::mt19937& rng, int64_t capacity, int64_t count) {
  std::vector<int32_t> slots(static_cast<size_t>(capacity));
  std::iota(slots.begin(), slots.end(), 0);
  std::shuffle(slots.begin(), slots.end(), rng);
  slots.resize(static_cast<size_t>(count));
  return slots;
}

}  // namespace express::cpu

#endif  // EXPRESS_TESTS_CPU_TESTING_H_
