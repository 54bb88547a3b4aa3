// Entries in and out of a slab: conversion of storage types, copies, swaps.
#include "src/cpu/kernels.h"
#include "src/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/entries.cc"
#include "hwy/foreach_target.h"
#include "src/cpu/simd-inl.h"

#ifndef EXPRESS_SRC_CPU_ENTRIES_SHARED_
#define EXPRESS_SRC_CPU_ENTRIES_SHARED_
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace express::cpu {

inline constexpr BFloat16 kNotFinite{0x7FC0};  // a quiet NaN

// The scale of a row whose largest magnitude this is, not 0: rounded up.
inline BFloat16 ScaleFor(float largest) {
  const float scale = std::max(largest / 127, std::numeric_limits<float>::min());
  return {static_cast<uint16_t>((std::bit_cast<uint32_t>(scale) + 0xFFFFu) >> 16)};
}

}  // namespace express::cpu
#endif  // EXPRESS_SRC_CPU_ENTRIES_SHARED_

HWY_BEFORE_NAMESPACE();
namespace express::cpu::HWY_NAMESPACE {

template <class From, class To>
void ConvertTyped(const From* HWY_RESTRICT from, To* HWY_RESTRICT to, int64_t count) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) StoreF32(LoadF32(d, from + i), d, to + i);
  for (; i < count; ++i) FromFloat(ToFloat(from[i]), to + i);
}

void Convert(const void* from, DType from_type, void* to, DType to_type, int64_t count) {
  WithType(from_type, [&](auto f) {
    WithType(to_type, [&](auto t) {
      ConvertTyped(static_cast<const decltype(f)*>(from), static_cast<decltype(t)*>(to), count);
    });
  });
}

// x - x is NaN exactly for NaN and infinity.
template <class T>
bool AllFiniteTyped(const T* data, int64_t count) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto bad = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    const auto v = LoadF32(d, data + i);
    bad = hn::Add(bad, hn::Sub(v, v));
  }
  float rest = 0;
  for (; i < count; ++i) rest += ToFloat(data[i]) - ToFloat(data[i]);
  return hn::AllTrue(d, hn::Eq(bad, hn::Zero(d))) && rest == 0;
}

bool AllFinite(const void* data, DType dtype, int64_t count) {
  return WithType(dtype, [&](auto t) { return AllFiniteTyped(static_cast<const decltype(t)*>(data), count); });
}

// A row's codes, and its scale. The quotients are rounded by the division's own rules: the same codes on every target.
template <class From>
BFloat16 QuantiseTyped(const From* HWY_RESTRICT from, int64_t count, int8_t* HWY_RESTRICT to) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  if (!AllFiniteTyped(from, count)) {
    std::fill_n(to, count, int8_t{0});
    return kNotFinite;
  }
  auto top = hn::Zero(d);
  float largest = 0;
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) top = hn::Max(top, hn::Abs(LoadF32(d, from + i)));
  for (; i < count; ++i) largest = std::max(largest, std::abs(ToFloat(from[i])));
  largest = std::max(largest, hn::GetLane(hn::MaxOfLanes(d, top)));
  if (largest == 0) {
    std::fill_n(to, count, int8_t{0});
    return BFloat16{0};
  }
  const BFloat16 stored = ScaleFor(largest);
  const float scale = ToFloat(stored);
  const hn::Rebind<int8_t, F32> d8;
  for (i = 0; i + lanes <= count; i += lanes) {
    const auto quotient = hn::Div(LoadF32(d, from + i), hn::Set(d, scale));
    hn::StoreU(hn::DemoteTo(d8, hn::NearestInt(quotient)), d8, to + i);
  }
  for (; i < count; ++i) to[i] = static_cast<int8_t>(std::nearbyint(ToFloat(from[i]) / scale));
  return stored;
}

uint16_t Quantise(const void* from, DType from_type, int64_t count, int8_t* to) {
  return WithType(from_type, [&](auto f) { return QuantiseTyped(static_cast<const decltype(f)*>(from), count, to); })
      .bits;
}

void ConvertCodes(const StoredRow<Int8>& from, void* to, DType to_type, int64_t count) {
  WithType(to_type, [&](auto t) {
    const F32 d;
    const auto lanes = static_cast<int64_t>(hn::Lanes(d));
    auto* out = static_cast<decltype(t)*>(to);
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) StoreF32(LoadF32(d, from, i), d, out + i);
    for (; i < count; ++i) FromFloat(from[i], out + i);
  });
}

}  // namespace express::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
#include <algorithm>
#include <cstring>

namespace express::cpu {

HWY_EXPORT(Convert);
HWY_EXPORT(AllFinite);
HWY_EXPORT(Quantise);
HWY_EXPORT(ConvertCodes);

void Convert(const void* from, DType from_type, void* to, DType to_type, int64_t count) {
  if (from_type == to_type) {
    if (count > 0) std::memcpy(to, from, static_cast<size_t>(count * SizeOf(from_type)));
    return;
  }
  HWY_DYNAMIC_DISPATCH(Convert)(from, from_type, to, to_type, count);
}

bool AllFinite(const void* data, DType dtype, int64_t count) {
  return HWY_DYNAMIC_DISPATCH(AllFinite)(data, dtype, count);
}

namespace {

char* Row(void* base, int64_t row, int64_t dim, DType dtype) {
  return static_cast<char*>(base) + row * dim * SizeOf(dtype);
}
const char* Row(ConstRows rows, int64_t i) {
  return static_cast<const char*>(rows.data) + i * rows.stride * SizeOf(rows.dtype);
}

}  // namespace

void WriteEntries(const Slab& slab, const int32_t* slots, int64_t count, int64_t first_position, ConstRows key,
                  ConstRows value) {
  for (int64_t i = 0; i < count; ++i) {
    slab.position[slots[i]] = first_position + i;
    if (slab.dtype == DType::kI8) {
      const auto quantise = [&](ConstRows rows, void* base, int64_t dim) {
        return HWY_DYNAMIC_DISPATCH(Quantise)(Row(rows, i), rows.dtype, dim,
                                              static_cast<int8_t*>(base) + slots[i] * dim);
      };
      slab.scale[slots[i]] = {quantise(key, slab.key, slab.key_dim), quantise(value, slab.value, slab.value_dim)};
      continue;
    }
    Convert(Row(key, i), key.dtype, Row(slab.key, slots[i], slab.key_dim, slab.dtype), slab.dtype, slab.key_dim);
    Convert(Row(value, i), value.dtype, Row(slab.value, slots[i], slab.value_dim, slab.dtype), slab.dtype,
            slab.value_dim);
  }
}

void ReadEntry(const Slab& slab, int64_t slot, Rows key, Rows value) {
  if (slab.dtype == DType::kI8) {
    HWY_DYNAMIC_DISPATCH(ConvertCodes)(KeyRow<Int8>(slab, slot), key.data, key.dtype, slab.key_dim);
    HWY_DYNAMIC_DISPATCH(ConvertCodes)(ValueRow<Int8>(slab, slot), value.data, value.dtype, slab.value_dim);
    return;
  }
  Convert(Row(slab.key, slot, slab.key_dim, slab.dtype), slab.dtype, key.data, key.dtype, slab.key_dim);
  Convert(Row(slab.value, slot, slab.value_dim, slab.dtype), slab.dtype, value.data, value.dtype, slab.value_dim);
}

void CopyEntry(const Slab& slab, int32_t from, int32_t to) {
  const auto copy = [&](void* base, int64_t dim) {
    std::memcpy(Row(base, to, dim, slab.dtype), Row(base, from, dim, slab.dtype),
                static_cast<size_t>(dim * SizeOf(slab.dtype)));
  };
  copy(slab.key, slab.key_dim);
  copy(slab.value, slab.value_dim);
  if (slab.scale != nullptr) slab.scale[to] = slab.scale[from];
  slab.position[to] = slab.position[from];
}

void SwapEntries(const Slab& slab, int32_t a, int32_t b) {
  const auto swap = [&](void* base, int64_t dim) {
    char* row = Row(base, a, dim, slab.dtype);
    std::swap_ranges(row, row + dim * SizeOf(slab.dtype), Row(base, b, dim, slab.dtype));
  };
  swap(slab.key, slab.key_dim);
  swap(slab.value, slab.value_dim);
  if (slab.scale != nullptr) std::swap(slab.scale[a], slab.scale[b]);
  std::swap(slab.position[a], slab.position[b]);
}

}  // namespace express::cpu
#endif  // HWY_ONCE
