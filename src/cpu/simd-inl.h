// Per-target helpers of the kernels: rows of any storage type as f32 vectors. Included once for each SIMD target
// (Highway's foreach_target), so the guard toggles.
#if defined(EXPRESS_SRC_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EXPRESS_SRC_CPU_SIMD_INL_H_
#undef EXPRESS_SRC_CPU_SIMD_INL_H_
#else
#define EXPRESS_SRC_CPU_SIMD_INL_H_
#endif

#include <cstdint>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "src/cpu/scalar.h"

HWY_BEFORE_NAMESPACE();
namespace express::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;

// Lanes(F32()) elements at p as f32. p need not be aligned.
HWY_INLINE hn::Vec<F32> LoadF32(F32 d, const float* p) { return hn::LoadU(d, p); }
HWY_INLINE hn::Vec<F32> LoadF32(F32 d, const Half* p) {
  const hn::Rebind<hwy::float16_t, F32> dh;
  return hn::PromoteTo(d, hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(p)));
}
HWY_INLINE hn::Vec<F32> LoadF32(F32 d, const BFloat16* p) {
  const hn::Rebind<uint16_t, F32> d16;
  const hn::RebindToUnsigned<F32> d32;
  const auto bits = hn::PromoteTo(d32, hn::LoadU(d16, reinterpret_cast<const uint16_t*>(p)));
  return hn::BitCast(d, hn::ShiftLeft<16>(bits));
}

// Stores f32 lanes in another type, rounded to nearest even.
HWY_INLINE void StoreF32(hn::Vec<F32> v, F32 d, float* p) { hn::StoreU(v, d, p); }
HWY_INLINE void StoreF32(hn::Vec<F32> v, F32, Half* p) {
  const hn::Rebind<hwy::float16_t, F32> dh;
  hn::StoreU(hn::DemoteTo(dh, v), dh, reinterpret_cast<hwy::float16_t*>(p));
}
HWY_INLINE void StoreF32(hn::Vec<F32> v, F32 d, BFloat16* p) {
  HWY_ALIGN float lanes[hn::MaxLanes(F32())];
  hn::Store(v, d, lanes);
  for (size_t i = 0; i < hn::Lanes(d); ++i) p[i] = ToBFloat16(lanes[i]);
}

// sum_i a[i] * b[i]
template <class T>
HWY_INLINE float DotRow(const float* HWY_RESTRICT a, const T* HWY_RESTRICT b, size_t count) {
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  auto sum = hn::Zero(d);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) sum = hn::MulAdd(hn::LoadU(d, a + i), LoadF32(d, b + i), sum);
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < count; ++i) total += a[i] * ToFloat(b[i]);
  return total;
}

// Copies `count` elements as f32.
template <class T>
HWY_INLINE void LoadRow(const T* HWY_RESTRICT from, size_t count, float* HWY_RESTRICT to) {
  const F32 d;
  const size_t lanes = hn::Lanes(d);
  size_t i = 0;
  for (; i + lanes <= count; i += lanes) hn::StoreU(LoadF32(d, from + i), d, to + i);
  for (; i < count; ++i) to[i] = ToFloat(from[i]);
}

}  // namespace express::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // EXPRESS_SRC_CPU_SIMD_INL_H_
