// Decode attention over a slab: bounded by the bandwidth of memory, so every key and value is read once for all query
// rows of its KV head.
#include "src/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/attend.cc"
#include "hwy/foreach_target.h"
#include "src/cpu/simd-inl.h"

#ifndef EXPRESS_SRC_CPU_ATTEND_SHARED_
#define EXPRESS_SRC_CPU_ATTEND_SHARED_
#include <algorithm>
#include <cmath>
#include <limits>

namespace express::cpu {
inline constexpr int64_t kTile = 64;  // live slots whose logits are formed before their values are read
}
#endif  // EXPRESS_SRC_CPU_ATTEND_SHARED_

HWY_BEFORE_NAMESPACE();
namespace express::cpu::HWY_NAMESPACE {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// logits[r][j] = <q_r, k_j> for kRows query rows and the tile's keys.
template <int kRows, class T>
HWY_INLINE void TileLogits(const T* HWY_RESTRICT key, int64_t dim, const int32_t* slots, int64_t count,
                           const float* HWY_RESTRICT q, float* HWY_RESTRICT logits) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t j = 0; j < count; ++j) {
    const T* HWY_RESTRICT k = key + slots[j] * dim;
    auto s0 = hn::Zero(d), s1 = hn::Zero(d), s2 = hn::Zero(d), s3 = hn::Zero(d);
    int64_t i = 0;
    for (; i + lanes <= dim; i += lanes) {
      const auto x = LoadF32(d, k + i);
      s0 = hn::MulAdd(x, hn::LoadU(d, q + i), s0);
      if constexpr (kRows > 1) s1 = hn::MulAdd(x, hn::LoadU(d, q + dim + i), s1);
      if constexpr (kRows > 2) s2 = hn::MulAdd(x, hn::LoadU(d, q + 2 * dim + i), s2);
      if constexpr (kRows > 3) s3 = hn::MulAdd(x, hn::LoadU(d, q + 3 * dim + i), s3);
    }
    float sum[4] = {hn::GetLane(hn::SumOfLanes(d, s0)), 0, 0, 0};
    if constexpr (kRows > 1) sum[1] = hn::GetLane(hn::SumOfLanes(d, s1));
    if constexpr (kRows > 2) sum[2] = hn::GetLane(hn::SumOfLanes(d, s2));
    if constexpr (kRows > 3) sum[3] = hn::GetLane(hn::SumOfLanes(d, s3));
    for (; i < dim; ++i)
      for (int r = 0; r < kRows; ++r) sum[r] += q[r * dim + i] * ToFloat(k[i]);
    for (int r = 0; r < kRows; ++r) logits[r * kTile + j] = sum[r];
  }
}

// out[r] += sum_j p[r][j] v_j for kRows rows.
template <int kRows, class T>
HWY_INLINE void TileValues(const T* HWY_RESTRICT value, int64_t dim, const int32_t* slots, int64_t count,
                           const float* HWY_RESTRICT p, float* HWY_RESTRICT out) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + 2 * lanes <= dim; i += 2 * lanes) {  // two vectors of the dimension at a time, summed in registers
    hn::Vec<F32> a0 = hn::LoadU(d, out + i), b0 = hn::LoadU(d, out + i + lanes);
    hn::Vec<F32> a1 = hn::Zero(d), b1 = a1, a2 = a1, b2 = a1, a3 = a1, b3 = a1;
    if constexpr (kRows > 1) a1 = hn::LoadU(d, out + dim + i), b1 = hn::LoadU(d, out + dim + i + lanes);
    if constexpr (kRows > 2) a2 = hn::LoadU(d, out + 2 * dim + i), b2 = hn::LoadU(d, out + 2 * dim + i + lanes);
    if constexpr (kRows > 3) a3 = hn::LoadU(d, out + 3 * dim + i), b3 = hn::LoadU(d, out + 3 * dim + i + lanes);
    for (int64_t j = 0; j < count; ++j) {
      const T* HWY_RESTRICT v = value + slots[j] * dim + i;
      const auto x = LoadF32(d, v), y = LoadF32(d, v + lanes);
      const auto add = [&](int r, auto& a, auto& b) HWY_ATTR {
        const auto weight = hn::Set(d, p[r * kTile + j]);
        a = hn::MulAdd(weight, x, a);
        b = hn::MulAdd(weight, y, b);
      };
      add(0, a0, b0);
      if constexpr (kRows > 1) add(1, a1, b1);
      if constexpr (kRows > 2) add(2, a2, b2);
      if constexpr (kRows > 3) add(3, a3, b3);
    }
    const auto store = [&](int r, auto a, auto b) HWY_ATTR {
      hn::StoreU(a, d, out + r * dim + i);
      hn::StoreU(b, d, out + r * dim + i + lanes);
    };
    store(0, a0, b0);
    if constexpr (kRows > 1) store(1, a1, b1);
    if constexpr (kRows > 2) store(2, a2, b2);
    if constexpr (kRows > 3) store(3, a3, b3);
  }
  for (; i < dim; ++i)
    for (int r = 0; r < kRows; ++r)
      for (int64_t j = 0; j < count; ++j) out[r * dim + i] += p[r * kTile + j] * ToFloat(value[slots[j] * dim + i]);
}

// Turns a row of products <q, k_j> into exp(logit_j - max), logit_j = product + bias_j, after bringing the row's state to
// the new maximum. bias (kTile) is -inf where the tile ends.
HWY_INLINE void SoftmaxRow(float* HWY_RESTRICT logits, const float* HWY_RESTRICT bias, int64_t dim, float* max,
                           float* sum, float* HWY_RESTRICT out) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto low = hn::Set(d, -kLargestLogit), high = hn::Set(d, kLargestLogit);
  auto top = hn::Set(d, kMinusInfinity);
  for (int64_t j = 0; j < kTile; j += lanes) {
    // In this order NaN, the sum of opposite overflows, becomes a number too.
    const auto product = hn::Min(hn::Max(hn::Load(d, logits + j), low), high);
    const auto logit = hn::Add(product, hn::Load(d, bias + j));
    top = hn::Max(top, logit);
    hn::Store(logit, d, logits + j);
  }
  const float new_max = std::max(*max, hn::GetLane(hn::MaxOfLanes(d, top)));
  if (new_max > *max) {
    const float factor = *max == kMinusInfinity ? 0.0f : std::exp(*max - new_max);
    *sum *= factor;
    for (int64_t i = 0; i < dim; ++i) out[i] *= factor;
    *max = new_max;
  }
  auto total = hn::Zero(d);
  const auto shift = hn::Set(d, new_max), log2e = hn::Set(d, kLog2E);
  for (int64_t j = 0; j < kTile; j += lanes) {
    const auto e = Exp2(hn::Mul(hn::Sub(hn::Load(d, logits + j), shift), log2e));
    total = hn::Add(total, e);
    hn::Store(e, d, logits + j);
  }
  *sum += hn::GetLane(hn::SumOfLanes(d, total));
}

// Calls f(std::integral_constant<int, rows>()) for groups of four rows and the rest.
template <class F>
HWY_INLINE void ByRows(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>(), r);
  if (rows - r == 3) f(std::integral_constant<int, 3>(), r);
  if (rows - r == 2) f(std::integral_constant<int, 2>(), r);
  if (rows - r == 1) f(std::integral_constant<int, 1>(), r);
}

template <class T>
void AttendTyped(const Slab& slab, const float* HWY_RESTRICT log_weight, float exponent, int64_t begin, int64_t end,
                 const float* q, int64_t rows, const Partial& partial) {
  const auto* key = static_cast<const T*>(slab.key);
  const auto* value = static_cast<const T*>(slab.value);
  const int64_t dk = slab.key_dim, dv = slab.value_dim;
  HWY_ALIGN float logits[kMaxQueryRows][kTile] = {};
  HWY_ALIGN float bias[kTile];
  int32_t slots[kTile];
  std::fill_n(partial.max, rows, kMinusInfinity);
  std::fill_n(partial.sum, rows, 0.0f);
  std::fill_n(partial.out, rows * dv, 0.0f);
  for (int64_t next = begin; next < end;) {
    int64_t count = 0;  // live slots of the tile
    for (; next < end && count < kTile; ++next) {
      if (log_weight[next] == kMinusInfinity) continue;
      bias[count] = exponent * log_weight[next];
      slots[count++] = static_cast<int32_t>(next);
    }
    if (count == 0) break;
    std::fill_n(bias + count, kTile - count, kMinusInfinity);
    ByRows(rows,
           [&](auto n, int64_t r) HWY_ATTR { TileLogits<n.value>(key, dk, slots, count, q + r * dk, logits[r]); });
    for (int64_t r = 0; r < rows; ++r) {
      SoftmaxRow(logits[r], bias, dv, partial.max + r, partial.sum + r, partial.out + r * dv);
    }
    ByRows(rows, [&](auto n, int64_t r)
                     HWY_ATTR { TileValues<n.value>(value, dv, slots, count, logits[r], partial.out + r * dv); });
  }
}

void AttendPartial(const Slab& slab, const float* log_weight, float exponent, int64_t begin, int64_t end,
                   const float* q, int64_t rows, const Partial& partial) {
  WithType(slab.dtype,
           [&](auto type) { AttendTyped<decltype(type)>(slab, log_weight, exponent, begin, end, q, rows, partial); });
}

}  // namespace express::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace express::cpu {

HWY_EXPORT(AttendPartial);

void AttendPartial(const Slab& slab, const float* log_weight, float exponent, int64_t begin, int64_t end,
                   const float* q, int64_t rows, const Partial& partial) {
  HWY_DYNAMIC_DISPATCH(AttendPartial)(slab, log_weight, exponent, begin, end, q, rows, partial);
}

void MergePartial(const Partial& into, const Partial& from, int64_t rows, int32_t value_dim) {
  for (int64_t r = 0; r < rows; ++r) {
    if (from.sum[r] == 0) continue;
    const float max = std::max(into.max[r], from.max[r]);
    const float a = into.sum[r] == 0 ? 0.0f : std::exp(into.max[r] - max), b = std::exp(from.max[r] - max);
    float* out = into.out + r * value_dim;
    const float* other = from.out + r * value_dim;
    for (int64_t i = 0; i < value_dim; ++i) out[i] = a * out[i] + b * other[i];
    into.sum[r] = a * into.sum[r] + b * from.sum[r];
    into.max[r] = max;
  }
}

void FinishPartial(const Partial& partial, int64_t rows, int32_t value_dim, Rows out, float* lse, int64_t lse_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    float* row = partial.out + r * value_dim;
    const float sum = partial.sum[r], inverse = sum > 0 ? 1 / sum : 0;
    for (int64_t i = 0; i < value_dim; ++i) row[i] *= inverse;
    Convert(row, DType::kF32, static_cast<char*>(out.data) + r * out.stride * SizeOf(out.dtype), out.dtype, value_dim);
    if (lse != nullptr)
      lse[r * lse_stride] = sum > 0 ? partial.max[r] + std::log(sum) : -std::numeric_limits<float>::infinity();
  }
}

}  // namespace express::cpu
#endif  // HWY_ONCE
