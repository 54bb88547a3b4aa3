// Per-target helpers of the kernels: rows of any storage type as f32 vectors. Included once for each SIMD target
// (Highway's foreach_target), so the guard toggles.
#if defined(EXPRESS_SRC_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef EXPRESS_SRC_CPU_SIMD_INL_H_
#undef EXPRESS_SRC_CPU_SIMD_INL_H_
#else
#define EXPRESS_SRC_CPU_SIMD_INL_H_
#endif

#include <cstdint>

#include "hwy/highway.h"
#include "src/cpu/rows.h"
#include "src/cpu/scalar.h"

HWY_BEFORE_NAMESPACE();
namespace express::cpu::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;

// Whether Highway converts f16 by instructions of the target. Its emulation elsewhere (1.0.3) truncates and turns NaN
// and infinity into numbers, so those targets take the integer arithmetic below.
constexpr bool kNativeHalf = HWY_ARCH_X86 ? HWY_TARGET <= HWY_AVX2 : HWY_ARCH_ARM_A64 && HWY_TARGET != HWY_SCALAR;

// f16 bits in u32 lanes to f32: exponent and mantissa moved into place, then scaled by 2^(127 - 15), which also makes
// subnormals normal. Exponents of all ones stay so.
HWY_INLINE hn::Vec<F32> WidenHalf(hn::Vec<hn::RebindToUnsigned<F32>> bits) {
  const F32 d;
  const hn::RebindToUnsigned<F32> du;
  const auto magnitude = hn::And(bits, hn::Set(du, 0x7FFFu));
  const auto special = hn::Gt(magnitude, hn::Set(du, 0x7BFFu));
  const auto scaled = hn::Mul(hn::BitCast(d, hn::ShiftLeft<13>(magnitude)), hn::Set(d, 0x1p112f));
  const auto all_ones = hn::Or(hn::ShiftLeft<13>(magnitude), hn::Set(du, 0x7F800000u));
  const auto value = hn::IfThenElse(special, all_ones, hn::BitCast(du, scaled));
  return hn::BitCast(d, hn::Or(value, hn::ShiftLeft<16>(hn::And(bits, hn::Set(du, 0x8000u)))));
}

// f32 to f16 bits in u32 lanes, to nearest even: subnormal results are rounded by the addition of 1/2, whose last bit
// is theirs; the others by carrying into the bits that stay.
HWY_INLINE hn::Vec<hn::RebindToUnsigned<F32>> NarrowHalf(hn::Vec<F32> v) {
  const F32 d;
  const hn::RebindToUnsigned<F32> du;
  const auto bits = hn::BitCast(du, v);
  const auto magnitude = hn::And(bits, hn::Set(du, 0x7FFFFFFFu));
  const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(du, 1u));
  const auto rebased = hn::Sub(magnitude, hn::Set(du, (127u - 15u) << 23));
  const auto normal = hn::ShiftRight<13>(hn::Add(hn::Add(rebased, hn::Set(du, 0xFFFu)), odd));
  const auto half = hn::Set(d, 0.5f);
  const auto small = hn::Sub(hn::BitCast(du, hn::Add(hn::BitCast(d, magnitude), half)), hn::BitCast(du, half));
  const auto infinite = hn::Gt(magnitude, hn::Set(du, 0x477FFFFFu));  // from 65536 on
  const auto nan = hn::Gt(magnitude, hn::Set(du, 0x7F800000u));
  auto out = hn::IfThenElse(hn::Lt(magnitude, hn::Set(du, 113u << 23)), small, normal);
  out = hn::IfThenElse(infinite, hn::Set(du, 0x7C00u), out);
  out = hn::IfThenElse(nan, hn::Set(du, 0x7E00u), out);
  return hn::Or(out, hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 0x8000u)));
}

// f32 to bf16 bits in u32 lanes, to nearest even; NaN stays NaN.
HWY_INLINE hn::Vec<hn::RebindToUnsigned<F32>> NarrowBFloat16(hn::Vec<F32> v) {
  const hn::RebindToUnsigned<F32> du;
  const auto bits = hn::BitCast(du, v), top = hn::ShiftRight<16>(bits);
  const auto odd = hn::And(top, hn::Set(du, 1u));
  const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(du, 0x7FFFu)), odd));
  const auto nan = hn::Gt(hn::And(bits, hn::Set(du, 0x7FFFFFFFu)), hn::Set(du, 0x7F800000u));
  return hn::IfThenElse(nan, hn::Or(top, hn::Set(du, 0x40u)), rounded);
}

// 16 bits of each lane, from and to memory.
HWY_INLINE hn::Vec<hn::RebindToUnsigned<F32>> LoadBits16(const void* p) {
  const hn::Rebind<uint16_t, F32> d16;
  return hn::PromoteTo(hn::RebindToUnsigned<F32>(), hn::LoadU(d16, static_cast<const uint16_t*>(p)));
}
HWY_INLINE void StoreBits16(hn::Vec<hn::RebindToUnsigned<F32>> bits, void* p) {
  const hn::Rebind<uint16_t, F32> d16;
  const hn::RebindToSigned<F32> di;  // no lane is above 2^16 - 1, so none saturates
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, bits)), d16, static_cast<uint16_t*>(p));
}

// Lanes(F32()) elements at p as f32. p need not be aligned.
HWY_INLINE hn::Vec<F32> LoadF32(F32 d, const float* p) { return hn::LoadU(d, p); }
HWY_INLINE hn::Vec<F32> LoadF32(F32 d, const Half* p) {
  if constexpr (kNativeHalf) {
    const hn::Rebind<hwy::float16_t, F32> dh;
    return hn::PromoteTo(d, hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(p)));
  } else {
    return WidenHalf(LoadBits16(p));
  }
}
HWY_INLINE hn::Vec<F32> LoadF32(F32 d, const BFloat16* p) { return hn::BitCast(d, hn::ShiftLeft<16>(LoadBits16(p))); }
HWY_INLINE hn::Vec<F32> LoadF32(F32 d, const Int8* p) {  // codes, not scaled
  const hn::Rebind<int8_t, F32> d8;
  const hn::RebindToSigned<F32> di;
  return hn::ConvertTo(d, hn::PromoteTo(di, hn::LoadU(d8, &p->code)));
}
// Elements of a row from `at` on.
template <class T>
HWY_INLINE hn::Vec<F32> LoadF32(F32 d, const StoredRow<T>& row, int64_t at) {
  if constexpr (kScaled<T>) return hn::Mul(LoadF32(d, row.data + at), hn::Set(d, row.scale));
  return LoadF32(d, row.data + at);
}

// Stores f32 lanes in another type, rounded to nearest even.
HWY_INLINE void StoreF32(hn::Vec<F32> v, F32 d, float* p) { hn::StoreU(v, d, p); }
HWY_INLINE void StoreF32(hn::Vec<F32> v, F32, Half* p) {
  if constexpr (kNativeHalf) {
    const hn::Rebind<hwy::float16_t, F32> dh;
    hn::StoreU(hn::DemoteTo(dh, v), dh, reinterpret_cast<hwy::float16_t*>(p));
  } else {
    StoreBits16(NarrowHalf(v), p);
  }
}
HWY_INLINE void StoreF32(hn::Vec<F32> v, F32, BFloat16* p) { StoreBits16(NarrowBFloat16(v), p); }

// 2^x for x <= 0 to within 2e-7 of itself; exactly 1 for 0, exactly 0 below -125 and for -inf.
HWY_INLINE hn::Vec<F32> Exp2(hn::Vec<F32> x) {
  const F32 d;
  const hn::RebindToSigned<F32> di;
  const auto floor = hn::Set(d, -125.0f);
  const auto clamped = hn::Max(x, floor);
  // The sum has the nearest integer n in its low bits, to be moved into the exponent.
  const auto round = hn::Set(d, 0x1.8p23f), sum = hn::Add(clamped, round);
  const auto f = hn::Sub(clamped, hn::Sub(sum, round));  // in [-1/2, 1/2]
  auto p = hn::Set(d, 0.001326472731307149f);            // minimax for 2^f = 1 + f p(f)
  p = hn::MulAdd(p, f, hn::Set(d, 0.009671512991189957f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.05550733581185341f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.24022242426872253f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.6931470036506653f));
  p = hn::MulAdd(p, f, hn::Set(d, 1.0f));
  const auto exponent = hn::ShiftLeft<23>(hn::BitCast(di, sum));
  const auto result = hn::BitCast(d, hn::Add(hn::BitCast(di, p), exponent));
  return hn::IfThenElseZero(hn::Ge(x, floor), result);
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
HWY_INLINE void LoadRow(const StoredRow<T>& from, int64_t count, float* HWY_RESTRICT to) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) hn::StoreU(LoadF32(d, from, i), d, to + i);
  for (; i < count; ++i) to[i] = from[i];
}

// to[i * stride + r] = rows[r * row_stride + i] for r < 4, i < dim.
HWY_INLINE void TransposeFour(const float* HWY_RESTRICT rows, int64_t row_stride, int64_t dim, float* HWY_RESTRICT to,
                              int64_t stride) {
  const float *r0 = rows, *r1 = r0 + row_stride, *r2 = r1 + row_stride, *r3 = r2 + row_stride;
  int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::FixedTag<float, 4> d4;
  for (; i + 4 <= dim; i += 4) {
    const auto v0 = hn::LoadU(d4, r0 + i), v1 = hn::LoadU(d4, r1 + i);
    const auto v2 = hn::LoadU(d4, r2 + i), v3 = hn::LoadU(d4, r3 + i);
    const auto low02 = hn::InterleaveLower(d4, v0, v2), low13 = hn::InterleaveLower(d4, v1, v3);
    const auto high02 = hn::InterleaveUpper(d4, v0, v2), high13 = hn::InterleaveUpper(d4, v1, v3);
    hn::StoreU(hn::InterleaveLower(d4, low02, low13), d4, to + i * stride);
    hn::StoreU(hn::InterleaveUpper(d4, low02, low13), d4, to + (i + 1) * stride);
    hn::StoreU(hn::InterleaveLower(d4, high02, high13), d4, to + (i + 2) * stride);
    hn::StoreU(hn::InterleaveUpper(d4, high02, high13), d4, to + (i + 3) * stride);
  }
#endif
  for (; i < dim; ++i) {
    to[i * stride] = r0[i];
    to[i * stride + 1] = r1[i];
    to[i * stride + 2] = r2[i];
    to[i * stride + 3] = r3[i];
  }
}

// The register-blocked product behind halving and prefill: rows whose sums are in registers, and vectors of columns
// (24 or 12 sums, by the number of registers).
constexpr int64_t kSix = 6;
constexpr int64_t kWide = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64 ? 4 : 2;

// c[r][j] = sum_i a[r][i] b[i][j], or += if kAdd, for kSix rows r, kWidth vectors of columns j and i < depth.
// a[r][i] is at a + r * a_row + i * a_step; rows of b and c are b_row and c_row apart, and aligned to vectors.
template <int64_t kWidth, bool kAdd>
HWY_INLINE void Multiply(const float* HWY_RESTRICT a, int64_t a_row, int64_t a_step, const float* HWY_RESTRICT b,
                         int64_t b_row, int64_t depth, float* HWY_RESTRICT c, int64_t c_row) {
  static_assert(kSix == 6);
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto load = [&](int64_t r, int64_t w)
                        HWY_ATTR { return kAdd ? hn::Load(d, c + r * c_row + w * lanes) : hn::Zero(d); };
  auto c00 = load(0, 0), c10 = load(1, 0), c20 = load(2, 0), c30 = load(3, 0), c40 = load(4, 0), c50 = load(5, 0);
  auto c01 = c00, c11 = c10, c21 = c20, c31 = c30, c41 = c40, c51 = c50;
  auto c02 = c00, c12 = c10, c22 = c20, c32 = c30, c42 = c40, c52 = c50;
  auto c03 = c00, c13 = c10, c23 = c20, c33 = c30, c43 = c40, c53 = c50;
  if constexpr (kWidth > 1)
    c01 = load(0, 1), c11 = load(1, 1), c21 = load(2, 1), c31 = load(3, 1), c41 = load(4, 1), c51 = load(5, 1);
  if constexpr (kWidth > 2)
    c02 = load(0, 2), c12 = load(1, 2), c22 = load(2, 2), c32 = load(3, 2), c42 = load(4, 2), c52 = load(5, 2);
  if constexpr (kWidth > 3)
    c03 = load(0, 3), c13 = load(1, 3), c23 = load(2, 3), c33 = load(3, 3), c43 = load(4, 3), c53 = load(5, 3);
  for (int64_t i = 0; i < depth; ++i, b += b_row) {
    const auto b0 = hn::Load(d, b);
    auto b1 = b0, b2 = b0, b3 = b0;
    if constexpr (kWidth > 1) b1 = hn::Load(d, b + lanes);
    if constexpr (kWidth > 2) b2 = hn::Load(d, b + 2 * lanes);
    if constexpr (kWidth > 3) b3 = hn::Load(d, b + 3 * lanes);
    const auto step = [&](int64_t r, auto& x0, auto& x1, auto& x2, auto& x3) HWY_ATTR {
      const auto x = hn::Set(d, a[r * a_row + i * a_step]);
      x0 = hn::MulAdd(x, b0, x0);
      if constexpr (kWidth > 1) x1 = hn::MulAdd(x, b1, x1);
      if constexpr (kWidth > 2) x2 = hn::MulAdd(x, b2, x2);
      if constexpr (kWidth > 3) x3 = hn::MulAdd(x, b3, x3);
    };
    step(0, c00, c01, c02, c03);
    step(1, c10, c11, c12, c13);
    step(2, c20, c21, c22, c23);
    step(3, c30, c31, c32, c33);
    step(4, c40, c41, c42, c43);
    step(5, c50, c51, c52, c53);
  }
  const auto store = [&](int64_t r, auto x0, auto x1, auto x2, auto x3) HWY_ATTR {
    float* to = c + r * c_row;
    hn::Store(x0, d, to);
    if constexpr (kWidth > 1) hn::Store(x1, d, to + lanes);
    if constexpr (kWidth > 2) hn::Store(x2, d, to + 2 * lanes);
    if constexpr (kWidth > 3) hn::Store(x3, d, to + 3 * lanes);
  };
  store(0, c00, c01, c02, c03);
  store(1, c10, c11, c12, c13);
  store(2, c20, c21, c22, c23);
  store(3, c30, c31, c32, c33);
  store(4, c40, c41, c42, c43);
  store(5, c50, c51, c52, c53);
}

}  // namespace express::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // EXPRESS_SRC_CPU_SIMD_INL_H_
