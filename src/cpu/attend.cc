// Decode attention over a slab: bounded by the bandwidth of memory, so every key and value is read once for all query
// rows of its KV head.
#include "src/cpu/kernels.h"
#include "src/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/attend.cc"
#include "hwy/cache_control.h"
#include "hwy/foreach_target.h"
#include "src/cpu/simd-inl.h"

#ifndef EXPRESS_SRC_CPU_ATTEND_SHARED_
#define EXPRESS_SRC_CPU_ATTEND_SHARED_
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

namespace express::cpu {
inline constexpr int64_t kTile = 32;  // live slots whose logits are formed before their values are read
}
#endif  // EXPRESS_SRC_CPU_ATTEND_SHARED_

HWY_BEFORE_NAMESPACE();
namespace express::cpu::HWY_NAMESPACE {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Rows that are worked on together, and sums in registers: 16 with 32 registers, else 8.
constexpr bool kManyRegisters = HWY_TARGET <= HWY_AVX3 || HWY_ARCH_ARM_A64;
constexpr int kMostRows = 4;
constexpr int kSums = kManyRegisters ? 16 : 8;
constexpr int kMostKeys = 8;

// f(0), ..., f(kCount - 1) with constants, so that arrays of vectors stay in registers.
template <int kCount, class F>
HWY_INLINE void Unroll(const F& f) {
  [&]<int... kI>(std::integer_sequence<int, kI...>) EXPRESS_INLINE_LAMBDA {
    (f(std::integral_constant<int, kI>()), ...);
  }
  (std::make_integer_sequence<int, kCount>());
}

// A row of `dim` elements as vectors. The last one, if dim is no multiple of a vector, ends where the row ends: the
// elements that it shares with the one before are masked, and nothing past the row is read.
struct RowVectors {
  explicit RowVectors(int64_t dim)
      : lanes(static_cast<int64_t>(hn::Lanes(F32()))), whole(dim / lanes * lanes), tail(dim - lanes) {}
  int64_t lanes;
  int64_t whole;                                        // elements in whole vectors
  int64_t tail;                                         // where the last vector begins
  HWY_INLINE hn::Vec<F32> Mask(hn::Vec<F32> x) const {  // of the last vector
    return hn::IfThenZeroElse(hn::FirstN(F32(), static_cast<size_t>(whole - tail)), x);
  }
};

#if HWY_TARGET != HWY_SCALAR
// The sum of a vector's blocks of four lanes.
template <class D>
HWY_INLINE hn::Vec<hn::FixedTag<float, 4>> SumBlocks(D d, hn::Vec<D> v) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    (void)d;
    return v;
  } else {
    const hn::Half<D> half;
    return SumBlocks(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
  }
}
#endif

// The sums of the lanes of four vectors, to to[0, 4).
HWY_INLINE void StoreSums(hn::Vec<F32> a, hn::Vec<F32> b, hn::Vec<F32> c, hn::Vec<F32> e, float* HWY_RESTRICT to) {
#if HWY_TARGET == HWY_SCALAR
  to[0] = hn::GetLane(a), to[1] = hn::GetLane(b), to[2] = hn::GetLane(c), to[3] = hn::GetLane(e);
#else
  const F32 d;
  const hn::Repartition<uint64_t, F32> d64;
  const auto ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));  // a02 b02 a13 b13
  const auto ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  const auto ab64 = hn::BitCast(d64, ab), ce64 = hn::BitCast(d64, ce);
  const auto sums = hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, ab64, ce64)),
                            hn::BitCast(d, hn::InterleaveUpper(d64, ab64, ce64)));  // of each block of four lanes
  hn::StoreU(SumBlocks(d, sums), hn::FixedTag<float, 4>(), to);
#endif
}

// Rows that will be needed next: the tile's values while its keys are read, the next tile's keys while its values are.
// Memory is then busy throughout; without this it waits for arithmetic, and arithmetic for it.
template <class T>
struct Ahead {
  const T* data;         // null: nothing to fetch
  const int32_t* slots;  // (kTile)
  int64_t dim;
  int64_t skip, step;  // elements from a row's begin to the first line to fetch, and from one to the next
  // Of elements [begin, begin + count) of row j, those that exist.
  HWY_INLINE void Fetch(int64_t j, int64_t begin, int64_t count) const {
    if (data == nullptr) return;
    const int64_t end = std::min(begin + count, dim);
    const T* row = data + slots[j] * dim;
    for (int64_t i = begin + skip; i < end; i += step) hwy::Prefetch(row + i);
  }
};

// logits[r][j] = <q_r, k_j> for kRows query rows and the tile's keys. Slots are readable up to a multiple of kMostKeys.
template <int kRows, class T>
HWY_INLINE void TileLogits(const T* HWY_RESTRICT key, int64_t dim, const int32_t* slots, int64_t count,
                           const float* HWY_RESTRICT q, const Ahead<T>& ahead, float* HWY_RESTRICT logits) {
  const F32 d;
  constexpr int kKeysAtOnce = std::min(kMostKeys, kSums / kRows);
  static_assert(kKeysAtOnce % 2 == 0);
  const RowVectors row(dim);
  for (int64_t j = 0; j < count; j += kKeysAtOnce) {
    const T* keys[kKeysAtOnce];
    Unroll<kKeysAtOnce>([&](auto k) EXPRESS_INLINE_LAMBDA {
      keys[k] = key + slots[j + k] * dim;
      ahead.Fetch(j + k, 0, ahead.dim);
    });
    hn::Vec<F32> sums[kRows * kKeysAtOnce];
    Unroll<kRows * kKeysAtOnce>([&](auto i) EXPRESS_INLINE_LAMBDA { sums[i] = hn::Zero(d); });
    const auto add = [&](int64_t at, auto masked) EXPRESS_INLINE_LAMBDA {
      hn::Vec<F32> x[kKeysAtOnce];
      Unroll<kKeysAtOnce>([&](auto k) EXPRESS_INLINE_LAMBDA {
        x[k] = LoadF32(d, keys[k] + at);
        if constexpr (masked.value) x[k] = row.Mask(x[k]);
      });
      Unroll<kRows>([&](auto r) EXPRESS_INLINE_LAMBDA {
        const auto y = hn::LoadU(d, q + r * dim + at);
        Unroll<kKeysAtOnce>([&](auto k) EXPRESS_INLINE_LAMBDA {
          sums[r * kKeysAtOnce + k] = hn::MulAdd(x[k], y, sums[r * kKeysAtOnce + k]);
        });
      });
    };
    for (int64_t at = 0; at < row.whole; at += row.lanes) add(at, std::false_type());
    if (row.whole < dim) add(row.tail, std::true_type());
    Unroll<kRows * kKeysAtOnce / 4>([&](auto group) EXPRESS_INLINE_LAMBDA {
      constexpr int kFirst = group.value * 4;
      float four[4];
      StoreSums(sums[kFirst], sums[kFirst + 1], sums[kFirst + 2], sums[kFirst + 3], four);
      Unroll<4>([&](auto i) EXPRESS_INLINE_LAMBDA {
        constexpr int kSum = kFirst + i.value;
        logits[kSum / kKeysAtOnce * kTile + j + kSum % kKeysAtOnce] = four[i];
      });
    });
  }
}

// out[r] += sum_j p[r][j] v_j for kRows rows and kWidth vectors of the dimension, from `at` on.
template <int kRows, int kWidth, bool kMasked, class T>
HWY_INLINE void AddValues(const T* HWY_RESTRICT value, int64_t dim, const int32_t* slots, int64_t count,
                          const float* HWY_RESTRICT p, int64_t at, const RowVectors& row, const Ahead<T>& ahead,
                          float* HWY_RESTRICT out) {
  const F32 d;
  hn::Vec<F32> sums[kRows * kWidth];
  Unroll<kRows * kWidth>([&](auto i) EXPRESS_INLINE_LAMBDA {
    sums[i] = hn::LoadU(d, out + i / kWidth * dim + at + i % kWidth * row.lanes);
  });
  for (int64_t j = 0; j < count; ++j) {
    const T* v = value + slots[j] * dim + at;
    ahead.Fetch(j, at, kWidth * row.lanes);
    hn::Vec<F32> x[kWidth];
    Unroll<kWidth>([&](auto w) EXPRESS_INLINE_LAMBDA {
      x[w] = LoadF32(d, v + w * row.lanes);
      if constexpr (kMasked) x[w] = row.Mask(x[w]);
    });
    Unroll<kRows>([&](auto r) EXPRESS_INLINE_LAMBDA {
      const auto weight = hn::Set(d, p[r * kTile + j]);
      Unroll<kWidth>(
          [&](auto w) EXPRESS_INLINE_LAMBDA { sums[r * kWidth + w] = hn::MulAdd(weight, x[w], sums[r * kWidth + w]); });
    });
  }
  Unroll<kRows * kWidth>([&](auto i) EXPRESS_INLINE_LAMBDA {
    hn::StoreU(sums[i], d, out + i / kWidth * dim + at + i % kWidth * row.lanes);
  });
}

template <int kRows, class T>
HWY_INLINE void TileValues(const T* HWY_RESTRICT value, int64_t dim, const int32_t* slots, int64_t count,
                           const float* HWY_RESTRICT p, const Ahead<T>& ahead, float* HWY_RESTRICT out) {
  constexpr int kWidth = std::min(8, kSums / kRows);
  const RowVectors row(dim);
  int64_t at = 0;
  for (; at + kWidth * row.lanes <= dim; at += kWidth * row.lanes)
    AddValues<kRows, kWidth, false>(value, dim, slots, count, p, at, row, ahead, out);
  if constexpr (kWidth > 2)
    for (; at + 2 * row.lanes <= dim; at += 2 * row.lanes)
      AddValues<kRows, 2, false>(value, dim, slots, count, p, at, row, ahead, out);
  for (; at < row.whole; at += row.lanes) AddValues<kRows, 1, false>(value, dim, slots, count, p, at, row, ahead, out);
  if (at < dim) AddValues<kRows, 1, true>(value, dim, slots, count, p, row.tail, row, ahead, out);
}

// The same two products for rows shorter than a vector.
template <class T>
void ShortLogits(const T* key, int64_t dim, const int32_t* slots, int64_t count, const float* q, float* logits) {
  for (int64_t j = 0; j < count; ++j) {
    float sum = 0;
    for (int64_t i = 0; i < dim; ++i) sum += q[i] * ToFloat(key[slots[j] * dim + i]);
    logits[j] = sum;
  }
}
template <class T>
void ShortValues(const T* value, int64_t dim, const int32_t* slots, int64_t count, const float* p, float* out) {
  for (int64_t j = 0; j < count; ++j)
    for (int64_t i = 0; i < dim; ++i) out[i] += p[j] * ToFloat(value[slots[j] * dim + i]);
}

// Live slots and their biases; behind the last one it is repeated, with bias -inf.
struct Tile {
  int64_t count;
  int32_t slots[kTile];
  HWY_ALIGN float bias[kTile];
  HWY_ALIGN float key_scale[kTile];  // of 8-bit storage only
  HWY_ALIGN float value_scale[kTile];
};

// The next live slots from `next` on, at most kTile.
HWY_INLINE void NextTile(const float* HWY_RESTRICT log_weight, float exponent, int64_t end, int64_t* next, Tile* tile) {
  int64_t count = 0;
  for (; *next < end && count < kTile; ++*next) {
    const float log_w = log_weight[*next];
    if (log_w == kMinusInfinity) continue;
    tile->bias[count] = exponent * log_w;
    tile->slots[count++] = static_cast<int32_t>(*next);
  }
  tile->count = count;
  if (count == 0) return;
  std::fill_n(tile->bias + count, kTile - count, kMinusInfinity);
  std::fill_n(tile->slots + count, kTile - count, tile->slots[count - 1]);
}

// The scales of the tile's slots.
HWY_INLINE void LoadScales(const RowScales* HWY_RESTRICT scale, Tile* tile) {
  const F32 d;
  const hn::RebindToUnsigned<F32> du;
  HWY_ALIGN uint32_t both[kTile];
  static_assert(sizeof(both[0]) == sizeof(RowScales) && std::endian::native == std::endian::little);
  for (int64_t j = 0; j < kTile; ++j) std::memcpy(&both[j], &scale[tile->slots[j]], sizeof(both[j]));
  for (int64_t j = 0; j < kTile; j += static_cast<int64_t>(hn::Lanes(d))) {
    const auto bits = hn::Load(du, both + j);
    hn::Store(hn::BitCast(d, hn::ShiftLeft<16>(bits)), d, tile->key_scale + j);
    hn::Store(hn::BitCast(d, hn::And(bits, hn::Set(du, 0xFFFF0000u))), d, tile->value_scale + j);
  }
}

// Turns a row of products <q, k_j> into exp(logit_j - max), logit_j = product + bias_j, after bringing the row's state to
// the new maximum. bias (kTile) is -inf where the tile ends. If kScales, products are those of the codes of keys, and what is
// left in `logits` are the factors of the codes of values; their sum is that of the exponentials all the same.
template <bool kScales>
HWY_INLINE void SoftmaxRow(float* HWY_RESTRICT logits, const Tile& tile, int64_t dim, float* max, float* sum,
                           float* HWY_RESTRICT out) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto low = hn::Set(d, -kLargestLogit), high = hn::Set(d, kLargestLogit);
  auto top = hn::Set(d, kMinusInfinity);
  for (int64_t j = 0; j < kTile; j += lanes) {
    // In this order NaN, the sum of opposite overflows, becomes a number too.
    auto product = hn::Load(d, logits + j);
    if constexpr (kScales) product = hn::Mul(product, hn::Load(d, tile.key_scale + j));
    product = hn::Min(hn::Max(product, low), high);
    const auto logit = hn::Add(product, hn::Load(d, tile.bias + j));
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
    hn::Store(kScales ? hn::Mul(e, hn::Load(d, tile.value_scale + j)) : e, d, logits + j);
  }
  *sum += hn::GetLane(hn::SumOfLanes(d, total));
}

// Calls f(std::integral_constant<int, rows>(), first row) for groups of at most kMostRows rows.
template <class F>
HWY_INLINE void ByRows(int64_t rows, const F& f) {
  int64_t r = 0;
  for (; r + kMostRows <= rows; r += kMostRows) f(std::integral_constant<int, kMostRows>(), r);
  if constexpr (kMostRows > 4)
    for (; r + 4 <= rows; r += 4) f(std::integral_constant<int, 4>(), r);
  for (; r + 2 <= rows; r += 2) f(std::integral_constant<int, 2>(), r);
  if (r < rows) f(std::integral_constant<int, 1>(), r);
}

template <class T>
void AttendTyped(const Slab& slab, const float* HWY_RESTRICT log_weight, float exponent, int64_t begin, int64_t end,
                 const float* q, int64_t rows, const Partial& partial) {
  const auto* key = static_cast<const T*>(slab.key);
  const auto* value = static_cast<const T*>(slab.value);
  const int64_t dk = slab.key_dim, dv = slab.value_dim, lanes = static_cast<int64_t>(hn::Lanes(F32()));
  // The first group of rows fetches. With f32 that is too much at once while the other groups fetch nothing, so whole
  // groups share the lines of a row; 16-bit rows are short enough, and work on them is bound by arithmetic.
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  const int64_t groups = sizeof(T) < sizeof(float) ? 1 : std::max<int64_t>(1, rows / kMostRows);
  const auto fetch = [&](int64_t r, const T* data, const Tile& tile, int64_t dim) EXPRESS_INLINE_LAMBDA {
    const bool mine = tile.count > 0 && r <= (groups - 1) * kMostRows;
    return Ahead<T>{mine ? data : nullptr, tile.slots, dim, r / kMostRows * kLine, groups * kLine};
  };
  HWY_ALIGN float logits[kMaxQueryRows][kTile] = {};
  Tile tiles[2];
  std::fill_n(partial.max, rows, kMinusInfinity);
  std::fill_n(partial.sum, rows, 0.0f);
  std::fill_n(partial.out, rows * dv, 0.0f);
  int64_t next = begin;
  NextTile(log_weight, exponent, end, &next, &tiles[0]);
  for (int turn = 0; tiles[turn].count > 0; turn = 1 - turn) {
    Tile& tile = tiles[turn];
    if constexpr (kScaled<T>) LoadScales(slab.scale, &tile);
    Tile& later = tiles[1 - turn];
    NextTile(log_weight, exponent, end, &next, &later);
    ByRows(rows, [&](auto n, int64_t r) EXPRESS_INLINE_LAMBDA {
      const Ahead<T> ahead = fetch(r, value, tile, dv);
      if (dk >= lanes) return TileLogits<n.value>(key, dk, tile.slots, tile.count, q + r * dk, ahead, logits[r]);
      for (int64_t i = r; i < r + n.value; ++i) ShortLogits(key, dk, tile.slots, tile.count, q + i * dk, logits[i]);
    });
    for (int64_t r = 0; r < rows; ++r)
      SoftmaxRow<kScaled<T>>(logits[r], tile, dv, partial.max + r, partial.sum + r, partial.out + r * dv);
    ByRows(rows, [&](auto n, int64_t r) EXPRESS_INLINE_LAMBDA {
      float* out = partial.out + r * dv;
      const Ahead<T> ahead = fetch(r, key, later, dk);
      if (dv >= lanes) return TileValues<n.value>(value, dv, tile.slots, tile.count, logits[r], ahead, out);
      for (int64_t i = 0; i < n.value; ++i) ShortValues(value, dv, tile.slots, tile.count, logits[r + i], out + i * dv);
    });
  }
}

template <class T>
void AttendSlotsTyped(const Slab& slab, const int32_t* slots, const float* bias, int64_t count, const float* q,
                      int64_t rows, float* max, float* sum) {
  const auto* key = static_cast<const T*>(slab.key);
  const int64_t dim = slab.key_dim;
  HWY_ALIGN float logits[kMaxQueryRows][kTile] = {};
  Tile tile;
  for (int64_t begin = 0; begin < count; begin += kTile) {
    tile.count = std::min(kTile, count - begin);
    for (int64_t j = 0; j < kTile; ++j) {
      tile.slots[j] = slots[begin + std::min(j, tile.count - 1)];
      tile.bias[j] = j < tile.count ? bias[begin + j] : kMinusInfinity;
    }
    if constexpr (kScaled<T>) LoadScales(slab.scale, &tile);
    ByRows(rows, [&](auto n, int64_t r) EXPRESS_INLINE_LAMBDA {
      if (dim >= static_cast<int64_t>(hn::Lanes(F32())))
        return TileLogits<n.value>(key, dim, tile.slots, tile.count, q + r * dim, Ahead<T>{}, logits[r]);
      for (int64_t i = r; i < r + n.value; ++i) ShortLogits(key, dim, tile.slots, tile.count, q + i * dim, logits[i]);
    });
    for (int64_t r = 0; r < rows; ++r) SoftmaxRow<kScaled<T>>(logits[r], tile, 0, max + r, sum + r, nullptr);
  }
}

void AttendSlots(const Slab& slab, const int32_t* slots, const float* bias, int64_t count, const float* q, int64_t rows,
                 float* max, float* sum) {
  WithStorage(slab.dtype,
              [&](auto type) { AttendSlotsTyped<decltype(type)>(slab, slots, bias, count, q, rows, max, sum); });
}

void AttendPartial(const Slab& slab, const float* log_weight, float exponent, int64_t begin, int64_t end,
                   const float* q, int64_t rows, const Partial& partial) {
  WithStorage(slab.dtype, [&](auto type) {
    AttendTyped<decltype(type)>(slab, log_weight, exponent, begin, end, q, rows, partial);
  });
}

}  // namespace express::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace express::cpu {

HWY_EXPORT(AttendPartial);
HWY_EXPORT(AttendSlots);

void AttendPartial(const Slab& slab, const float* log_weight, float exponent, int64_t begin, int64_t end,
                   const float* q, int64_t rows, const Partial& partial) {
  HWY_DYNAMIC_DISPATCH(AttendPartial)(slab, log_weight, exponent, begin, end, q, rows, partial);
}

void AttendSlots(const Slab& slab, const int32_t* slots, const float* bias, int64_t count, const float* q, int64_t rows,
                 float* max, float* sum) {
  HWY_DYNAMIC_DISPATCH(AttendSlots)(slab, slots, bias, count, q, rows, max, sum);
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
