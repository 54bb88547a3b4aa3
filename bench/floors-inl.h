// The loops behind floors.h, once per SIMD target.
#if defined(EXPRESS_BENCH_FLOORS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EXPRESS_BENCH_FLOORS_INL_H_
#undef EXPRESS_BENCH_FLOORS_INL_H_
#else
#define EXPRESS_BENCH_FLOORS_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace express::bench::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Reads `count` floats, eight vectors at a time; returns something that depends on all of them.
inline float ReadAll(const float* HWY_RESTRICT data, int64_t count) {
  const hn::ScalableTag<float> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  for (int64_t i = 0; i + 8 * lanes <= count; i += 8 * lanes) {
    const float* p = data + i;
    s0 = hn::Add(s0, hn::LoadU(d, p));
    s1 = hn::Add(s1, hn::LoadU(d, p + lanes));
    s2 = hn::Add(s2, hn::LoadU(d, p + 2 * lanes));
    s3 = hn::Add(s3, hn::LoadU(d, p + 3 * lanes));
    s4 = hn::Add(s4, hn::LoadU(d, p + 4 * lanes));
    s5 = hn::Add(s5, hn::LoadU(d, p + 5 * lanes));
    s6 = hn::Add(s6, hn::LoadU(d, p + 6 * lanes));
    s7 = hn::Add(s7, hn::LoadU(d, p + 7 * lanes));
  }
  s0 = hn::Add(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)), hn::Add(hn::Add(s4, s5), hn::Add(s6, s7)));
  return hn::GetLane(hn::SumOfLanes(d, s0));
}

// 12 independent chains of multiply-adds in registers, `steps` each; returns their sum. Sets the multiply-adds done.
inline float MultiplyAdds(int64_t steps, int64_t* done) {
  const hn::ScalableTag<float> d;
  const auto a = hn::Set(d, 0.999f), b = hn::Set(d, 0.001f);
  auto s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0;
  auto s6 = hn::Set(d, 1.0f), s7 = s6, s8 = s6, s9 = s6, s10 = s6, s11 = s6;
  for (int64_t i = 0; i < steps; ++i) {
    s0 = hn::MulAdd(s0, a, b), s1 = hn::MulAdd(s1, a, b), s2 = hn::MulAdd(s2, a, b), s3 = hn::MulAdd(s3, a, b);
    s4 = hn::MulAdd(s4, a, b), s5 = hn::MulAdd(s5, a, b), s6 = hn::MulAdd(s6, a, b), s7 = hn::MulAdd(s7, a, b);
    s8 = hn::MulAdd(s8, a, b), s9 = hn::MulAdd(s9, a, b), s10 = hn::MulAdd(s10, a, b), s11 = hn::MulAdd(s11, a, b);
#if defined(__GNUC__) && defined(__x86_64__) && HWY_TARGET != HWY_SCALAR
    // Else the compiler would see that chains with the same start are the same.
    asm volatile("" : "+x"(s0.raw), "+x"(s1.raw), "+x"(s2.raw), "+x"(s3.raw), "+x"(s4.raw), "+x"(s5.raw));
    asm volatile("" : "+x"(s6.raw), "+x"(s7.raw), "+x"(s8.raw), "+x"(s9.raw), "+x"(s10.raw), "+x"(s11.raw));
#endif
  }
  *done = steps * 12 * static_cast<int64_t>(hn::Lanes(d));
  const auto low = hn::Add(hn::Add(hn::Add(s0, s1), hn::Add(s2, s3)), hn::Add(s4, s5));
  const auto high = hn::Add(hn::Add(hn::Add(s6, s7), hn::Add(s8, s9)), hn::Add(s10, s11));
  return hn::GetLane(hn::SumOfLanes(d, hn::Add(low, high)));
}

}  // namespace express::bench::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // EXPRESS_BENCH_FLOORS_INL_H_
