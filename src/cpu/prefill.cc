// Causal attention of a block of new tokens: first the weighted cache, then the block's own keys under the causal mask,
// in one online softmax.
//
// Bounded by arithmetic: tiles of kTile keys and values are unpacked once (keys transposed) and met by kQueries query
// rows at a time.
#include "src/cpu/kernels.h"
#include "src/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/prefill.cc"
#include "hwy/foreach_target.h"
#include "src/cpu/simd-inl.h"

#ifndef EXPRESS_SRC_CPU_PREFILL_SHARED_
#define EXPRESS_SRC_CPU_PREFILL_SHARED_
#include <algorithm>
#include <cmath>
#include <limits>

namespace express::cpu {

inline constexpr int64_t kKeys = 64;     // of a tile
inline constexpr int64_t kQueries = 96;  // query rows at a time; a multiple of kStrip
inline constexpr int64_t kStrip = 6;     // query rows whose sums are in registers

inline int64_t Padded(int64_t n) { return (n + 15) / 16 * 16; }  // to whole vectors of the widest target

// Scratch. Rows are padded to `dk` and `dv`, multiples of 16, with zeros.
struct BlockWork {
  int64_t dk, dv;
  float* keys;    // (dk, kKeys): a tile, transposed
  float* staged;  // (4, dk): keys on their way into the tile
  float* values;  // (kKeys, dv)
  float* bias;    // (kKeys): exponent * log_weight
  float* q;       // (kQueries, dk), times the softmax scale
  float* out;     // (kQueries, dv), not normalised
  float* logits;  // (kStrip, kKeys)
  float* max;     // (kQueries)
  float* sum;     // (kQueries)
};

}  // namespace express::cpu
#endif  // EXPRESS_SRC_CPU_PREFILL_SHARED_

HWY_BEFORE_NAMESPACE();
namespace express::cpu::HWY_NAMESPACE {

static_assert(kStrip == kSix);
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Multiply over `width` columns, a multiple of 16.
template <bool kAdd>
HWY_INLINE void MultiplyStrip(const float* a, int64_t a_row, const float* b, int64_t b_row, int64_t depth, float* c,
                              int64_t c_row, int64_t width) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(F32()));
  int64_t at = 0;
  for (; at + kWide * lanes <= width; at += kWide * lanes)
    Multiply<kWide, kAdd>(a, a_row, 1, b + at, b_row, depth, c + at, c_row);
  for (; at < width; at += lanes) Multiply<1, kAdd>(a, a_row, 1, b + at, b_row, depth, c + at, c_row);
}

// Turns one row of products <q, k_j> into exp(logit_j - max), logit_j = product + bias_j, after bringing the row's state
// to the new maximum. The first `visible` columns count; the others become 0.
HWY_INLINE void SoftmaxRow(float* HWY_RESTRICT logits, const float* HWY_RESTRICT bias, int64_t visible, int64_t dv,
                           float* max, float* sum, float* HWY_RESTRICT out) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto low = hn::Set(d, -kLargestLogit), high = hn::Set(d, kLargestLogit);
  auto top = hn::Set(d, kMinusInfinity);
  for (int64_t j = 0; j < kKeys; j += lanes) {
    // In this order NaN, the sum of opposite overflows, becomes a number too.
    const auto product = hn::Min(hn::Max(hn::Load(d, logits + j), low), high);
    hn::Store(hn::Add(product, hn::Load(d, bias + j)), d, logits + j);
  }
  for (int64_t j = visible; j < kKeys; ++j) logits[j] = kMinusInfinity;
  for (int64_t j = 0; j < kKeys; j += lanes) top = hn::Max(top, hn::Load(d, logits + j));
  const float tile_max = hn::GetLane(hn::MaxOfLanes(d, top));
  if (tile_max > *max) {
    const float factor = *max == kMinusInfinity ? 0.0f : std::exp(*max - tile_max);
    *sum *= factor;
    for (int64_t i = 0; i < dv; i += lanes) hn::Store(hn::Mul(hn::Load(d, out + i), hn::Set(d, factor)), d, out + i);
    *max = tile_max;
  }
  auto total = hn::Zero(d);
  const auto shift = hn::Set(d, *max), log2e = hn::Set(d, kLog2E);
  for (int64_t j = 0; j < kKeys; j += lanes) {
    const auto e = Exp2(hn::Mul(hn::Sub(hn::Load(d, logits + j), shift), log2e));
    total = hn::Add(total, e);
    hn::Store(e, d, logits + j);
  }
  *sum += hn::GetLane(hn::SumOfLanes(d, total));
}

// out += p * v
HWY_INLINE void AddRow(float p, const float* HWY_RESTRICT v, int64_t dv, float* HWY_RESTRICT out) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < dv; i += lanes)
    hn::Store(hn::MulAdd(hn::Set(d, p), hn::Load(d, v + i), hn::Load(d, out + i)), d, out + i);
}

// All query rows against the `count` keys of the tile in `w`. Row r may see the first `visible(r)` of them; later rows
// see no less.
template <class Visible>
void AttendTile(const BlockWork& w, int64_t rows, int64_t key_dim, int64_t count, const Visible& visible) {
  for (int64_t first = 0; first < rows; first += kStrip) {
    const int64_t strip = std::min(kStrip, rows - first);
    const int64_t most = std::min(visible(first + strip - 1), count);
    if (most <= 0) continue;
    const int64_t least = std::clamp<int64_t>(visible(first), 0, count);
    MultiplyStrip<false>(w.q + first * w.dk, w.dk, w.keys, kKeys, key_dim, w.logits, kKeys, kKeys);
    for (int64_t r = 0; r < kStrip; ++r) {
      float* logits = w.logits + r * kKeys;
      const int64_t seen = r < strip ? std::min(visible(first + r), count) : 0;
      if (seen > 0)
        SoftmaxRow(logits, w.bias, seen, w.dv, w.max + first + r, w.sum + first + r, w.out + (first + r) * w.dv);
      else
        std::fill_n(logits, kKeys, 0.0f);
    }
    // Values that all rows see, then those that the later rows alone do: the others must not even multiply them by 0.
    // Either way a row adds its values one by one in order, so its result does not depend on its neighbours.
    MultiplyStrip<true>(w.logits, kKeys, w.values, w.dv, least, w.out + first * w.dv, w.dv, w.dv);
    for (int64_t j = least; j < most; ++j)
      for (int64_t r = 0; r < strip; ++r)
        if (visible(first + r) > j)
          AddRow(w.logits[r * kKeys + j], w.values + j * w.dv, w.dv, w.out + (first + r) * w.dv);
  }
}

// Unpacks a key as column `at` of the tile, and a value as row `at`. Keys are transposed four at a time.
template <class K, class V>
HWY_INLINE void PackRow(const BlockWork& w, const StoredRow<K>& key, int64_t key_dim, const StoredRow<V>& value,
                        int64_t value_dim, int64_t at) {
  LoadRow(key, key_dim, w.staged + at % 4 * w.dk);
  if (at % 4 == 3) TransposeFour(w.staged, w.dk, key_dim, w.keys + at - 3, kKeys);
  LoadRow(value, value_dim, w.values + at * w.dv);
}

// The tile's columns from `count` on: numbers, which nobody sees.
HWY_INLINE void EndTile(const BlockWork& w, int64_t key_dim, int64_t count) {
  int64_t end = count;
  for (; end % 4 != 0; ++end) std::fill_n(w.staged + end % 4 * w.dk, key_dim, 0.0f);
  if (end != count) TransposeFour(w.staged, w.dk, key_dim, w.keys + end - 4, kKeys);
  for (int64_t i = 0; i < key_dim; ++i) std::fill_n(w.keys + i * kKeys + end, kKeys - end, 0.0f);
  std::fill_n(w.bias + count, kKeys - count, 0.0f);
}

template <class T>
void AttendSlab(const Slab& slab, const float* log_weight, float exponent, const BlockWork& w, int64_t rows) {
  const int64_t dk = slab.key_dim, dv = slab.value_dim;
  for (int64_t next = 0; next < slab.capacity;) {
    int64_t count = 0;
    for (; next < slab.capacity && count < kKeys; ++next) {
      if (log_weight[next] == kMinusInfinity) continue;
      w.bias[count] = exponent * log_weight[next];
      PackRow(w, KeyRow<T>(slab, next), dk, ValueRow<T>(slab, next), dv, count++);
    }
    if (count == 0) return;
    EndTile(w, dk, count);
    AttendTile(w, rows, dk, count, [](int64_t) { return kKeys; });
  }
}

// The block's own keys, up to those that the last of the rows may see. Row r belongs to token first_token + r / group.
template <class K, class V>
void AttendOwn(const BlockArgs& args, int64_t key_dim, int64_t value_dim, const BlockWork& w, int64_t first_row,
               int64_t rows) {
  const int64_t group = args.group;
  const auto token = [&](int64_t r) { return args.first + (first_row + r) / group; };
  const int64_t end = token(rows - 1) + 1;
  for (int64_t base = 0; base < end; base += kKeys) {
    const int64_t count = std::min(kKeys, end - base);
    for (int64_t j = 0; j < count; ++j) {
      w.bias[j] = 0;
      const StoredRow<K> key{static_cast<const K*>(args.key.data) + (base + j) * args.key.stride};
      const StoredRow<V> value{static_cast<const V*>(args.value.data) + (base + j) * args.value.stride};
      PackRow(w, key, key_dim, value, value_dim, j);
    }
    EndTile(w, key_dim, count);
    AttendTile(w, rows, key_dim, count, [&](int64_t r) { return token(r) + 1 - base; });
  }
}

void AttendRows(const Slab& slab, const float* log_weight, const BlockArgs& args, const BlockWork& w, int64_t first_row,
                int64_t rows) {
  WithStorage(slab.dtype, [&](auto type) { AttendSlab<decltype(type)>(slab, log_weight, args.exponent, w, rows); });
  WithType(args.key.dtype, [&](auto k) {
    WithType(args.value.dtype, [&](auto v) {
      AttendOwn<decltype(k), decltype(v)>(args, slab.key_dim, slab.value_dim, w, first_row, rows);
    });
  });
}

}  // namespace express::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace express::cpu {

HWY_EXPORT(AttendRows);

namespace {

int64_t Layout(int32_t key_dim, int32_t value_dim, float* at, BlockWork* w) {
  w->dk = Padded(key_dim);
  w->dv = Padded(value_dim);
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* taken = at != nullptr ? at + used : nullptr;
    used += Padded(floats);
    return taken;
  };
  w->keys = take(w->dk * kKeys);
  w->staged = take(4 * w->dk);
  w->values = take(kKeys * w->dv);
  w->bias = take(kKeys);
  w->q = take(kQueries * w->dk);
  w->out = take(kQueries * w->dv);
  w->logits = take(kStrip * kKeys);
  w->max = take(kQueries);
  w->sum = take(kQueries);
  return used;
}

}  // namespace

size_t BlockScratchBytes(int32_t, int32_t key_dim, int32_t value_dim) {
  BlockWork w;
  return static_cast<size_t>(Layout(key_dim, value_dim, nullptr, &w)) * sizeof(float);
}

void AttendBlock(const Slab& slab, const float* log_weight, const BlockArgs& args, void* scratch) {
  BlockWork w;
  Layout(slab.key_dim, slab.value_dim, static_cast<float*>(scratch), &w);
  std::fill_n(w.values, kKeys * w.dv, 0.0f);  // the padding stays zero
  std::fill_n(w.q, kQueries * w.dk, 0.0f);
  const int64_t all_rows = (args.last - args.first) * args.group;
  for (int64_t first = 0; first < all_rows; first += kQueries) {
    const int64_t rows = std::min(kQueries, all_rows - first);
    const auto at = [&](int64_t r, int64_t token_stride, int64_t head_stride) {
      return (args.first + (first + r) / args.group) * token_stride + (first + r) % args.group * head_stride;
    };
    for (int64_t r = 0; r < rows; ++r) {
      float* q = w.q + r * w.dk;
      Convert(static_cast<const char*>(args.q) + at(r, args.q_token_stride, args.q_head_stride) * SizeOf(args.q_dtype),
              args.q_dtype, q, DType::kF32, slab.key_dim);
      for (int64_t i = 0; i < slab.key_dim; ++i) q[i] *= args.scale;
    }
    std::fill_n(w.out, kQueries * w.dv, 0.0f);
    std::fill_n(w.max, kQueries, -std::numeric_limits<float>::infinity());
    std::fill_n(w.sum, kQueries, 0.0f);
    HWY_DYNAMIC_DISPATCH(AttendRows)(slab, log_weight, args, w, first, rows);
    for (int64_t r = 0; r < rows; ++r) {
      const Rows out{
          static_cast<char*>(args.out) + at(r, args.out_token_stride, args.out_head_stride) * SizeOf(args.out_dtype), 0,
          args.out_dtype};
      float* lse = args.lse != nullptr ? args.lse + at(r, args.lse_token_stride, args.lse_head_stride) : nullptr;
      FinishPartial({w.out + r * w.dv, w.max + r, w.sum + r}, 1, slab.value_dim, out, lse, 0);
    }
  }
}

}  // namespace express::cpu
#endif  // HWY_ONCE
