// Kernel halving (DESIGN 3.1; the formula stands beside the scalar code in reference.cc).
//
// Pairs are decided in order, in blocks of kPairs. For a block, D_ab against all earlier pairs b is formed tile by tile
// and summed with the signs already chosen into S_a at once, so no h x h matrix exists; then the block's own triangle
// of D is scanned pair by pair.
#include "src/cpu/kernels.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/halve.cc"
#include "hwy/foreach_target.h"
#include "src/cpu/simd-inl.h"

#ifndef EXPRESS_SRC_CPU_HALVE_SHARED_
#define EXPRESS_SRC_CPU_HALVE_SHARED_
#include <algorithm>
#include <cmath>

namespace express::cpu {

inline constexpr int64_t kPairs = 16;    // pairs of a block
inline constexpr int64_t kColumns = 64;  // columns are padded to a multiple of this

inline int64_t PadColumns(int64_t pairs) { return (pairs + kColumns - 1) / kColumns * kColumns; }

// Scratch of one halving: the list, centred, transposed, and split into the first (x) and second (y) of each pair, so
// that a vector of columns is a vector of pairs.
struct HalveWork {
  int64_t pairs;    // h
  int64_t columns;  // h, padded
  float* key;       // (key_dim, 2, columns): x then y
  float* value;     // (value_dim, 2, columns)
  float* norm;      // (2, columns): c_i
  float* sign;      // (columns): +1 when x was kept, -1 when y was, 0 for the padding and what is not decided
};

}  // namespace express::cpu
#endif  // EXPRESS_SRC_CPU_HALVE_SHARED_

HWY_BEFORE_NAMESPACE();
namespace express::cpu::HWY_NAMESPACE {

// Vectors of columns that are worked on at a time: with 32 registers two, else one.
constexpr int64_t kVectors = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64 ? 2 : 1;

// The Gram entries <x_i, x_j>, <x_i, y_j>, <y_i, x_j>, <y_i, y_j> of pair `pair` with kVectors vectors of pairs from
// `column` on.
HWY_INLINE void Gram(const float* HWY_RESTRICT m, int64_t dim, int64_t columns, int64_t pair, int64_t column,
                     float (&out)[2][2][kVectors * hn::MaxLanes(F32())]) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto xx0 = hn::Zero(d), xy0 = hn::Zero(d), yx0 = hn::Zero(d), yy0 = hn::Zero(d);
  auto xx1 = hn::Zero(d), xy1 = hn::Zero(d), yx1 = hn::Zero(d), yy1 = hn::Zero(d);
  for (int64_t i = 0; i < dim; ++i, m += 2 * columns) {
    const auto rx = hn::Set(d, m[pair]), ry = hn::Set(d, m[columns + pair]);
    const auto cx0 = hn::Load(d, m + column), cy0 = hn::Load(d, m + columns + column);
    xx0 = hn::MulAdd(rx, cx0, xx0);
    xy0 = hn::MulAdd(rx, cy0, xy0);
    yx0 = hn::MulAdd(ry, cx0, yx0);
    yy0 = hn::MulAdd(ry, cy0, yy0);
    if constexpr (kVectors == 2) {
      const auto cx1 = hn::Load(d, m + column + lanes), cy1 = hn::Load(d, m + columns + column + lanes);
      xx1 = hn::MulAdd(rx, cx1, xx1);
      xy1 = hn::MulAdd(rx, cy1, xy1);
      yx1 = hn::MulAdd(ry, cx1, yx1);
      yy1 = hn::MulAdd(ry, cy1, yy1);
    }
  }
  hn::Store(xx0, d, out[0][0]);
  hn::Store(xy0, d, out[0][1]);
  hn::Store(yx0, d, out[1][0]);
  hn::Store(yy0, d, out[1][1]);
  if constexpr (kVectors == 2) {
    hn::Store(xx1, d, out[0][0] + lanes);
    hn::Store(xy1, d, out[0][1] + lanes);
    hn::Store(yx1, d, out[1][0] + lanes);
    hn::Store(yy1, d, out[1][1] + lanes);
  }
}

// D_ab of pair a = `pair` and the kVectors vectors of pairs b from `column` on:
//   kappa(x_a, x_b) - kappa(x_a, y_b) - kappa(y_a, x_b) + kappa(y_a, y_b),
//   kappa(i, j) = exp(beta <k_i, k_j> - c_i - c_j) (<v_i, v_j> + b^2)
HWY_INLINE void PairProducts(const HalveWork& w, int32_t key_dim, int32_t value_dim, float beta, float b2, int64_t pair,
                             int64_t column, float* HWY_RESTRICT out) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  HWY_ALIGN float keys[2][2][kVectors * hn::MaxLanes(F32())];
  HWY_ALIGN float values[2][2][kVectors * hn::MaxLanes(F32())];
  Gram(w.key, key_dim, w.columns, pair, column, keys);
  Gram(w.value, value_dim, w.columns, pair, column, values);
  const auto scale = hn::Set(d, beta), offset = hn::Set(d, b2), zero = hn::Zero(d);
  for (int64_t vector = 0; vector < kVectors; ++vector) {
    const int64_t at = vector * lanes;
    const auto kappa = [&](int row, int col) {
      const auto ci = hn::Set(d, w.norm[row * w.columns + pair]);
      const auto cj = hn::Load(d, w.norm + col * w.columns + column + at);
      const auto exponent = hn::MulSub(scale, hn::Load(d, keys[row][col] + at), hn::Add(ci, cj));
      // No exponent is positive but for rounding.
      return hn::Mul(Exp2(hn::Mul(hn::Min(exponent, zero), hn::Set(d, kLog2E))),
                     hn::Add(hn::Load(d, values[row][col] + at), offset));
    };
    const auto same = hn::Add(kappa(0, 0), kappa(1, 1)), other = hn::Add(kappa(0, 1), kappa(1, 0));
    hn::Store(hn::Sub(same, other), d, out + at);
  }
}

// S_a += sum_b sign_b D_ab over the columns [0, end), end a multiple of kColumns; for the pairs [first, first + count).
void Accumulate(const HalveWork& w, int32_t key_dim, int32_t value_dim, float beta, float b2, int64_t first,
                int64_t count, int64_t end, float* sums) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d)), step = kVectors * lanes;
  HWY_ALIGN float products[kVectors * hn::MaxLanes(F32())];
  HWY_ALIGN float partial[kPairs][hn::MaxLanes(F32())] = {};
  for (int64_t column = 0; column < end; column += step)
    for (int64_t a = 0; a < count; ++a) {
      PairProducts(w, key_dim, value_dim, beta, b2, first + a, column, products);
      auto sum = hn::Load(d, partial[a]);
      for (int64_t at = 0; at < step; at += lanes)
        sum = hn::MulAdd(hn::Load(d, w.sign + column + at), hn::Load(d, products + at), sum);
      hn::Store(sum, d, partial[a]);
    }
  for (int64_t a = 0; a < count; ++a) sums[a] += hn::GetLane(hn::SumOfLanes(d, hn::Load(d, partial[a])));
}

// D of the block's own pairs: triangle (count, kColumns), row a against the kColumns columns that hold the block.
void Triangle(const HalveWork& w, int32_t key_dim, int32_t value_dim, float beta, float b2, int64_t first,
              int64_t count, float* triangle) {
  const F32 d;
  const auto step = kVectors * static_cast<int64_t>(hn::Lanes(d));
  const int64_t base = first / kColumns * kColumns;
  for (int64_t a = 0; a < count; ++a)
    for (int64_t column = base; column < base + kColumns; column += step) {
      if (column + step <= first || column > first + a) continue;  // decided already, or later than a
      PairProducts(w, key_dim, value_dim, beta, b2, first + a, column, triangle + a * kColumns + (column - base));
    }
}

}  // namespace express::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace express::cpu {

HWY_EXPORT(Accumulate);
HWY_EXPORT(Triangle);

namespace {

// Takes the list apart into `work`: centred keys, values, c_i; returns b.
template <class T>
float LoadList(const Slab& slab, const int32_t* slots, const HalveParams& params, HalveWork& w, float* mean) {
  const int64_t count = 2 * w.pairs, dk = slab.key_dim, dv = slab.value_dim;
  const auto key_row = [&](int64_t i) { return static_cast<const T*>(slab.key) + slots[i] * dk; };
  const auto value_row = [&](int64_t i) { return static_cast<const T*>(slab.value) + slots[i] * dv; };
  std::fill_n(w.key, dk * 2 * w.columns, 0.0f);
  std::fill_n(w.value, dv * 2 * w.columns, 0.0f);
  std::fill_n(w.norm, 2 * w.columns, 0.0f);
  std::fill_n(w.sign, w.columns, 0.0f);
  std::fill_n(mean, dk, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const T* row = key_row(i);
    for (int64_t d = 0; d < dk; ++d) mean[d] += ToFloat(row[d]);
  }
  for (int64_t d = 0; d < dk; ++d) mean[d] /= static_cast<float>(count);
  float largest = 0, largest_norm = 0;
  for (int64_t i = 0; i < count; ++i) {
    const T* key = key_row(i);
    const T* value = value_row(i);
    const int64_t at = i % 2 * w.columns + i / 2;
    float norm = 0;
    for (int64_t d = 0; d < dk; ++d) {
      const float x = ToFloat(key[d]) - mean[d];
      w.key[d * 2 * w.columns + at] = x;
      norm += x * x;
    }
    for (int64_t d = 0; d < dv; ++d) {
      const float x = ToFloat(value[d]);
      w.value[d * 2 * w.columns + at] = x;
      largest = std::max(largest, std::abs(x));
    }
    w.norm[at] = norm;
    largest_norm = std::max(largest_norm, norm);
  }
  // c_i = gamma beta ||k_i||^2 / 2 + (1 - gamma) beta max_j ||k_j||^2 / 2
  const float half = 0.5f * params.scale, gamma = params.gamma;
  for (int64_t i = 0; i < count; ++i) {
    float& c = w.norm[i % 2 * w.columns + i / 2];
    c = half * (gamma * c + (1 - gamma) * largest_norm);
  }
  return largest;
}

// Decides all pairs; sign[a] = +1 keeps x_a. The list is in `w`.
void Decide(const Slab& slab, const HalveParams& params, const StreamKey& key, uint64_t number, float b2, HalveWork& w,
            float* triangle) {
  const float factor =
      params.tau *
      static_cast<float>(0.5 + std::log(2.0 * static_cast<double>(2 * w.pairs) / static_cast<double>(params.delta)));
  float largest = 0;  // max_{b <= a} sqrt(D_bb)
  for (int64_t first = 0; first < w.pairs; first += kPairs) {
    const int64_t count = std::min(kPairs, w.pairs - first), base = first / kColumns * kColumns;
    float sums[kPairs] = {};
    // Whole groups of columns; decided pairs of the block's own group have their signs, the others 0.
    if (first > 0) HWY_DYNAMIC_DISPATCH(Accumulate)
    (w, slab.key_dim, slab.value_dim, params.scale, b2, first, count, PadColumns(first), sums);
    HWY_DYNAMIC_DISPATCH(Triangle)(w, slab.key_dim, slab.value_dim, params.scale, b2, first, count, triangle);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t a = first + i;
      const float* row = triangle + i * kColumns + (first - base);
      float sum = sums[i];
      for (int64_t j = 0; j < i; ++j) sum += w.sign[first + j] * row[j];
      const float root = std::sqrt(std::max(0.0f, row[i]));
      largest = std::max(largest, root);
      const float threshold = factor * root * largest;
      const float r = UniformFromBits(DrawBits(key, RandomPurpose::kHalve, number, static_cast<uint32_t>(a)));
      const bool keep_y = threshold > 0 && a > 0 ? (2 * r - 1) * threshold < sum : r < 0.5f;
      w.sign[a] = keep_y ? -1.0f : 1.0f;
    }
  }
}

void DecideByCoins(const StreamKey& key, uint64_t number, HalveWork& w) {
  for (int64_t a = 0; a < w.pairs; ++a) {
    const float r = UniformFromBits(DrawBits(key, RandomPurpose::kHalve, number, static_cast<uint32_t>(a)));
    w.sign[a] = r < 0.5f ? -1.0f : 1.0f;
  }
}

HalveWork Layout(const Slab& slab, int64_t pairs, void* scratch, float** mean, float** triangle) {
  HalveWork w{};
  w.pairs = pairs;
  w.columns = PadColumns(pairs);
  auto* at = static_cast<float*>(scratch);
  const auto take = [&](int64_t floats) {
    float* taken = at;
    at += (floats + 15) / 16 * 16;  // 64-byte alignment
    return taken;
  };
  w.key = take(slab.key_dim * 2 * w.columns);
  w.value = take(slab.value_dim * 2 * w.columns);
  w.norm = take(2 * w.columns);
  w.sign = take(w.columns);
  *mean = take(slab.key_dim);
  *triangle = take(kPairs * kColumns);
  return w;
}

}  // namespace

size_t HalveScratchBytes(int64_t count, int32_t key_dim, int32_t value_dim) {
  const int64_t columns = PadColumns((count + 1) / 2);
  const int64_t floats = columns * (2 * (int64_t{key_dim} + value_dim) + 3) + key_dim + 16 + kPairs * kColumns;
  return static_cast<size_t>((floats + 15) / 16 * 16) * sizeof(float);
}

void Halve(const Slab& slab, const int32_t* slots, int64_t count, const HalveParams& params, const StreamKey& key,
           uint64_t number, void* scratch) {
  float *mean = nullptr, *triangle = nullptr;
  HalveWork w = Layout(slab, count / 2, scratch, &mean, &triangle);
  if (params.coin) {
    DecideByCoins(key, number, w);
  } else {
    const float b =
        WithType(slab.dtype, [&](auto type) { return LoadList<decltype(type)>(slab, slots, params, w, mean); });
    Decide(slab, params, key, number, b > 0 ? b * b : 1.0f, w, triangle);
  }
  const bool complement = UniformFromBits(DrawBits(key, RandomPurpose::kComplement, number, 0)) < 0.5f;
  for (int64_t a = 0; a < w.pairs; ++a)
    if ((w.sign[a] < 0) != complement) CopyEntry(slab, slots[2 * a + 1], slots[2 * a]);
}

}  // namespace express::cpu
#endif  // HWY_ONCE
