// Kernel halving (DESIGN 3.1; the formula stands beside the scalar code in reference.cc).
//
// Pairs are decided in order, in blocks. For a block, D_ab against all earlier pairs b is formed tile by tile and summed
// with the signs already chosen into S_a at once, so no h x h matrix exists; then the block's own triangle of D is
// scanned pair by pair. Of a long list only a span of columns is unpacked at a time, anew for every group of blocks, so that
// scratch hardly grows with the list.
#include "src/cpu/kernels.h"
#include "src/cpu/targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "src/cpu/halve.cc"
#include "hwy/foreach_target.h"
#include "src/cpu/simd-inl.h"

#ifndef EXPRESS_SRC_CPU_HALVE_SHARED_
#define EXPRESS_SRC_CPU_HALVE_SHARED_
#include <algorithm>
#include <cmath>
#include <utility>

namespace express::cpu {

inline constexpr int64_t kPairs = 24;          // pairs of a block
inline constexpr int64_t kStrip = 3;           // pairs whose products are in registers at a time
inline constexpr int64_t kMostPanel = 32;      // pairs of a panel at the widest target; columns are padded to these
inline constexpr int64_t kMostLanes = 16;      // of a vector, there
inline constexpr int64_t kTriangle = 64;       // columns of the panels that a block touches, at most
inline constexpr int64_t kGroup = 2 * kPairs;  // pairs of the blocks that share a walk over the columns
inline constexpr int64_t kSpan = 64;           // columns that are unpacked at a time, and that a group touches at most
inline constexpr int64_t kStaged = 4;          // pairs that are transposed at a time
inline constexpr float kLargestCoordinate = 1e17f;  // of a key; squared norms stay finite up to 1024 of these

inline int64_t PadColumns(int64_t pairs) { return (pairs + kMostPanel - 1) / kMostPanel * kMostPanel; }

// Scratch of one halving. A panel is as many pairs as fill half of kWide vectors: the list is taken apart so that a
// vector of columns is a vector of pairs.
struct HalveWork {
  int64_t pairs;    // h
  int64_t columns;  // h, padded
  int64_t span;     // the first of the columns that are unpacked
  int64_t group;    // the first of the pairs whose rows are packed
  int32_t key_dim, value_dim;
  float*
      key;  // kSpan columns in panels of (key_dim, panel / lanes, 2, lanes), x then y: centred, times sqrt(beta log2 e)
  float* value;               // the same of (value_dim, panel / lanes, 2, lanes): over b
  float* norm;                // (2, columns): c_i log2 e
  float* root;                // (columns): sqrt(D_aa)
  float* sign;                // (columns): +1 when x was kept, -1 when y was, 0 for the padding and what is not decided
  float* mean;                // (key_dim)
  float* staged;              // (2, kStaged, larger dim): rows on their way into a panel
  float* key_rows = nullptr;  // (kGroup, 2, key_dim): the group's pairs
  float* value_rows = nullptr;  // (kGroup, 2, value_dim)
  float* partial = nullptr;     // (kGroup, lanes): sums over the columns so far, by lane
  float* triangle = nullptr;    // (kPairs, kTriangle): D of the block's pairs with the columns of its panels
};

// What a list is read from, and what is made of its rows.
struct HalveList {
  const Slab& slab;
  const int32_t* slots;  // (2 * pairs)
  float beta;
  float largest_value;  // b
};

// What D_aa is made of. In the memory of rows, sums and triangle, which come later.
struct PairStats {
  float* distance;        // (columns): ||x - y||^2 of the keys
  float* value_x;         // (columns): ||v_x||^2
  float* value_y;         // (columns): ||v_y||^2
  float* value_distance;  // (columns): ||v_x - v_y||^2
};

}  // namespace express::cpu
#endif  // EXPRESS_SRC_CPU_HALVE_SHARED_

HWY_BEFORE_NAMESPACE();
namespace express::cpu::HWY_NAMESPACE {

static_assert(kSix == 2 * kStrip);
constexpr int64_t kMaxPanel = kWide / 2 * static_cast<int64_t>(hn::MaxLanes(F32()));
HWY_INLINE int64_t Panel() { return kWide / 2 * static_cast<int64_t>(hn::Lanes(F32())); }
// Where pair a begins in the panels of rows of `dim` elements; its y is one vector behind its x, and its next element
// 2 Panel() on. A row of a panel is a vector of x, one of y, and so on.
HWY_INLINE int64_t PairAt(int64_t a, int64_t dim) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(F32())), panel = Panel();
  return a / panel * panel * 2 * dim + a % panel / lanes * 2 * lanes + a % lanes;
}

// The mean of the keys, and b = max |entry of v|, or 1 if all are 0. Every key is divided before it is added, so that
// the sum cannot overflow.
template <class T>
float MeanAndLargest(const Slab& slab, const int32_t* slots, const HalveWork& w) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const int64_t dk = slab.key_dim, dv = slab.value_dim;
  const float inverse = 1.0f / static_cast<float>(2 * w.pairs);
  std::fill_n(w.mean, dk, 0.0f);
  auto top = hn::Zero(d);
  float largest = 0;
  for (int64_t i = 0; i < 2 * w.pairs; ++i) {
    const StoredRow<T> key = KeyRow<T>(slab, slots[i]), value = ValueRow<T>(slab, slots[i]);
    int64_t j = 0;
    for (; j + lanes <= dk; j += lanes)
      hn::StoreU(hn::MulAdd(LoadF32(d, key, j), hn::Set(d, inverse), hn::LoadU(d, w.mean + j)), d, w.mean + j);
    for (; j < dk; ++j) w.mean[j] += key[j] * inverse;
    for (j = 0; j + lanes <= dv; j += lanes) top = hn::Max(top, hn::Abs(LoadF32(d, value, j)));
    for (; j < dv; ++j) largest = std::max(largest, std::abs(value[j]));
  }
  largest = std::max(largest, hn::GetLane(hn::MaxOfLanes(d, top)));
  return largest > 0 ? largest : 1;
}

float ReadMean(const HalveList& list, const HalveWork& w) {
  return WithStorage(list.slab.dtype,
                     [&](auto type) { return MeanAndLargest<decltype(type)>(list.slab, list.slots, w); });
}

// to[j] = f(row[j]) for j < dim, vector by vector; the rest goes through a padded vector.
template <class T, class F>
HWY_INLINE void StageRow(const StoredRow<T>& row, int64_t dim, const F& f, float* HWY_RESTRICT to) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t j = 0;
  for (; j + lanes <= dim; j += lanes) hn::StoreU(f(LoadF32(d, row, j), j, lanes), d, to + j);
  if (j == dim) return;
  HWY_ALIGN float rest[hn::MaxLanes(F32())] = {};
  for (int64_t i = j; i < dim; ++i) rest[i - j] = row[i];
  hn::Store(f(hn::Load(d, rest), j, dim - j), d, rest);
  for (int64_t i = j; i < dim; ++i) to[i] = rest[i - j];
}

// ||x||^2, ||y||^2, ||x - y||^2
HWY_INLINE void Norms(const float* HWY_RESTRICT x, const float* HWY_RESTRICT y, int64_t dim, float* xx, float* yy,
                      float* distance) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  auto sum_x = hn::Zero(d), sum_y = sum_x, sum = sum_x;
  int64_t j = 0;
  for (; j + lanes <= dim; j += lanes) {
    const auto vx = hn::LoadU(d, x + j), vy = hn::LoadU(d, y + j), difference = hn::Sub(vx, vy);
    sum_x = hn::MulAdd(vx, vx, sum_x);
    sum_y = hn::MulAdd(vy, vy, sum_y);
    sum = hn::MulAdd(difference, difference, sum);
  }
  *xx = hn::GetLane(hn::SumOfLanes(d, sum_x));
  *yy = hn::GetLane(hn::SumOfLanes(d, sum_y));
  *distance = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; j < dim; ++j) {
    *xx += x[j] * x[j];
    *yy += y[j] * y[j];
    *distance += (x[j] - y[j]) * (x[j] - y[j]);
  }
}

// Moves the staged pairs into columns [pair, pair + kStaged) of the panels at `to`.
HWY_INLINE void Unstage(const float* staged, int64_t dim, int64_t pair, float* to) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(F32())), step = 2 * Panel();
  for (int64_t half = 0; half < 2; ++half) {
    const float* rows = staged + half * kStaged * dim;
    if (lanes % kStaged == 0) {
      TransposeFour(rows, dim, dim, to + PairAt(pair, dim) + half * lanes, step);
      continue;
    }
    for (int64_t i = 0; i < kStaged; ++i) {
      float* column = to + PairAt(pair + i, dim) + half * lanes;
      for (int64_t j = 0; j < dim; ++j) column[j * step] = rows[i * dim + j];
    }
  }
}

// How rows of keys and values are read: keys centred and scaled, values over b.
template <class T>
struct Rows {
  Rows(const HalveList& list, const HalveWork& w)
      : slab(list.slab),
        slots(list.slots),
        mean(w.mean),
        key_dim(w.key_dim),
        value_dim(w.value_dim),
        scale(std::sqrt(std::max(0.0f, list.beta) * kLog2E)),
        power(list.largest_value < 0x1p-64f  ? 0x1p64f
              : list.largest_value > 0x1p64f ? 0x1p-64f
                                             : 1.0f),
        inverse(1 / (list.largest_value * power)) {}

  // The key of entry i of the list.
  HWY_INLINE void Key(int64_t i, float* to) const {
    const F32 d;
    const auto factor = hn::Set(d, scale), limit = hn::Set(d, kLargestCoordinate);
    const auto centre = [&](auto x, int64_t j, int64_t count) HWY_ATTR {
      HWY_ALIGN float rest[hn::MaxLanes(F32())] = {};
      const bool whole = count == static_cast<int64_t>(hn::Lanes(d));
      if (!whole) std::copy_n(mean + j, count, rest);
      const auto centred = hn::Mul(hn::Sub(x, whole ? hn::LoadU(d, mean + j) : hn::Load(d, rest)), factor);
      return hn::Min(hn::Max(centred, hn::Neg(limit)), limit);
    };
    StageRow(KeyRow<T>(slab, slots[i]), slab.key_dim, centre, to);
  }
  HWY_INLINE void Value(int64_t i, float* to) const {
    const auto first = hn::Set(F32(), power), second = hn::Set(F32(), inverse);
    const auto divide = [&](auto x, int64_t, int64_t) HWY_ATTR { return hn::Mul(hn::Mul(x, first), second); };
    StageRow(ValueRow<T>(slab, slots[i]), slab.value_dim, divide, to);
  }

  const Slab& slab;
  const int32_t* slots;
  const float* mean;
  int64_t key_dim, value_dim;
  float scale;
  float power, inverse;  // 1 / b is their product: it may itself be too large or too small for a float
};

// body(rows) with the Rows of the list's type.
template <class Body>
HWY_INLINE void WithRows(const HalveList& list, const HalveWork& w, const Body& body) {
  WithStorage(list.slab.dtype, [&](auto type) { body(Rows<decltype(type)>(list, w)); });
}

// The squared norms of all pairs, and what else D_aa is made of.
void Measure(const HalveList& list, const HalveWork& w, const PairStats& s) {
  WithRows(list, w, [&](const auto& rows) {
    const int64_t dk = w.key_dim, dv = w.value_dim;
    for (int64_t a = 0; a < w.pairs; ++a) {
      for (int64_t half = 0; half < 2; ++half) rows.Key(2 * a + half, w.staged + half * dk);
      Norms(w.staged, w.staged + dk, dk, w.norm + a, w.norm + w.columns + a, s.distance + a);
      for (int64_t half = 0; half < 2; ++half) rows.Value(2 * a + half, w.staged + half * dv);
      Norms(w.staged, w.staged + dv, dv, s.value_x + a, s.value_y + a, s.value_distance + a);
    }
  });
  for (int64_t half = 0; half < 2; ++half)
    std::fill(w.norm + half * w.columns + w.pairs, w.norm + (half + 1) * w.columns, 0.0f);
}

// Unpacks columns [begin, end), whole panels and at most kSpan, into the panels of the span.
void Unpack(const HalveList& list, int64_t begin, int64_t end, HalveWork& w) {
  // A list that fits one vector of columns is met by no other (see BlockProducts): short lists are many, and most of their
  // time would be padding.
  const auto lanes = static_cast<int64_t>(hn::Lanes(F32()));
  const bool one_vector = (w.pairs - 1) / kStrip * kStrip + kStrip - 1 < lanes;
  if (one_vector) end = (lanes + kStaged - 1) / kStaged * kStaged;
  w.span = begin;
  WithRows(list, w, [&](const auto& rows) {
    const auto unpack = [&](int64_t first, int64_t dim, float* panels, const auto& read) {
      const int64_t count = std::clamp<int64_t>(w.pairs - first, 0, kStaged);
      if (count < kStaged) std::fill_n(w.staged, 2 * kStaged * dim, 0.0f);
      for (int64_t i = 0; i < 2 * count; ++i) read(2 * first + i, w.staged + (i % 2 * kStaged + i / 2) * dim);
      Unstage(w.staged, dim, first - begin, panels);
    };
    for (int64_t first = begin; first < end; first += kStaged) {
      unpack(first, w.key_dim, w.key, [&](int64_t i, float* to) { rows.Key(i, to); });
      unpack(first, w.value_dim, w.value, [&](int64_t i, float* to) { rows.Value(i, to); });
    }
  });
}

// D_ab of the strip's pairs a (from `pair` on, its rows at key_rows and value_rows) and the first kWidth / 2 vectors
// of pairs b of the panel that begins at `column`, to out (kStrip, kTriangle):
//   kappa(x_a, x_b) - kappa(x_a, y_b) - kappa(y_a, x_b) + kappa(y_a, y_b),
//   kappa(i, j) = 2^(<k_i, k_j> - c_i - c_j) (<v_i, v_j> + 1)
template <int64_t kWidth>
HWY_INLINE void StripProducts(const HalveWork& w, const float* key_rows, const float* value_rows, int64_t pair,
                              int64_t column, float* HWY_RESTRICT out) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d)), row = kWidth * lanes, step = 2 * Panel();
  HWY_ALIGN float keys[kSix * 2 * kMaxPanel];    // (kStrip, 2, kWidth / 2, 2, lanes)
  HWY_ALIGN float values[kSix * 2 * kMaxPanel];  // (kStrip, 2, kWidth / 2, 2, lanes)
  const int64_t panel = 2 * (column - w.span);
  Multiply<kWidth, false>(key_rows, w.key_dim, 1, w.key + panel * w.key_dim, step, w.key_dim, keys, row);
  Multiply<kWidth, false>(value_rows, w.value_dim, 1, w.value + panel * w.value_dim, step, w.value_dim, values, row);
  const auto zero = hn::Zero(d), one = hn::Set(d, 1.0f);
  for (int64_t a = 0; a < kStrip; ++a)
    for (int64_t v = 0; v < kWidth / 2; ++v) {
      const int64_t from = std::min(pair + a, w.pairs - 1), to = column + v * lanes;
      const auto kappa = [&](int64_t i, int64_t j) HWY_ATTR {
        const auto ci = hn::Set(d, w.norm[i * w.columns + from]);
        const auto cj = hn::Load(d, w.norm + j * w.columns + to);
        const int64_t entry = (2 * a + i) * row + (2 * v + j) * lanes;
        // No exponent is positive but for rounding.
        const auto exponent = hn::Min(hn::Sub(hn::Load(d, keys + entry), hn::Add(ci, cj)), zero);
        return hn::Mul(Exp2(exponent), hn::Add(hn::Load(d, values + entry), one));
      };
      const auto same = hn::Add(kappa(0, 0), kappa(1, 1)), other = hn::Add(kappa(0, 1), kappa(1, 0));
      hn::Store(hn::Sub(same, other), d, out + a * kTriangle + v * lanes);
    }
}

// Reads the rows of the group's pairs [first, first + count) and begins their sums. Rows of a strip that ends behind the list keep
// what they hold; nobody uses their products.
void BeginGroup(const HalveList& list, int64_t first, int64_t count, HalveWork& w) {
  w.group = first;
  WithRows(list, w, [&](const auto& rows) {
    for (int64_t i = 0; i < 2 * count; ++i) {
      rows.Key(2 * first + i, w.key_rows + i * w.key_dim);
      rows.Value(2 * first + i, w.value_rows + i * w.value_dim);
    }
  });
  std::fill_n(w.partial, kGroup * static_cast<int64_t>(hn::Lanes(F32())), 0.0f);
}

// For the block's pairs a, first <= a < first + count: adds sign_b D_ab of the decided pairs b among columns [begin, end), panels of
// the span, to the sums of a, and writes D_ab of the panels from that of `first` on into the triangle.
void BlockProducts(const HalveWork& w, int64_t first, int64_t count, int64_t begin, int64_t end) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d)), panel = Panel();
  const int64_t own = first / panel * panel;  // where the panels of the block itself begin
  HWY_ALIGN float products[kStrip * kTriangle];
  for (int64_t column = begin; column < end; column += panel)
    for (int64_t a = 0; a < count; a += kStrip) {
      if (column > first + a + kStrip - 1) continue;  // all later than a
      float* out = column < own ? products : w.triangle + a * kTriangle + (column - own);
      const int64_t row = first - w.group + a;
      const float* key_rows = w.key_rows + row * 2 * w.key_dim;
      const float* value_rows = w.value_rows + row * 2 * w.value_dim;
      // Where the panel crosses the diagonal, its first vectors may be all that is needed.
      const bool whole = column + lanes <= first + a + kStrip - 1;
      if (whole)
        StripProducts<kWide>(w, key_rows, value_rows, first + a, column, out);
      else
        StripProducts<2>(w, key_rows, value_rows, first + a, column, out);
      const int64_t width = whole ? panel : lanes;
      for (int64_t i = 0; i < kStrip; ++i) {
        float* to = w.partial + (row + i) * lanes;
        auto sum = hn::Load(d, to);
        for (int64_t at = 0; at < width; at += lanes)
          sum = hn::MulAdd(hn::Load(d, w.sign + column + at), hn::Load(d, out + i * kTriangle + at), sum);
        hn::Store(sum, d, to);
      }
    }
}

// sum of sign_b D_ab over all b so far, of pair a
float PairSum(const HalveWork& w, int64_t a) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  return hn::GetLane(hn::SumOfLanes(d, hn::Load(d, w.partial + (a - w.group) * lanes)));
}

// The first column of the triangle of the block that begins at `first`.
int64_t TriangleBegin(int64_t first) { return first / Panel() * Panel(); }

}  // namespace express::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace express::cpu {

HWY_EXPORT(ReadMean);
HWY_EXPORT(Measure);
HWY_EXPORT(Unpack);
HWY_EXPORT(BeginGroup);
HWY_EXPORT(BlockProducts);
HWY_EXPORT(PairSum);
HWY_EXPORT(TriangleBegin);

namespace {

// From squared norms to c_i = gamma ||k_i||^2 / 2 + (1 - gamma) max_j ||k_j||^2 / 2, and to sqrt(D_aa). With A^2 and
// B^2 the exponentials of kappa(x, x) and kappa(y, y), and A B G that of kappa(x, y), G = 2^(-||x - y||^2 / 2),
//   D_aa = A^2 (||v_x||^2 + 1) + B^2 (||v_y||^2 + 1) - 2 A B G (<v_x, v_y> + 1)
//        = A B ||v_x - v_y||^2 + (A - B) (A ||v_x||^2 - B ||v_y||^2) + (A - B)^2 + 2 A B (1 - G) (<v_x, v_y> + 1),
// where nothing cancels: exactly 0 for x = y.
void FinishNorms(float gamma, const HalveWork& w, const PairStats& s) {
  float largest = 0;
  for (int64_t half = 0; half < 2; ++half)
    for (int64_t a = 0; a < w.pairs; ++a) largest = std::max(largest, w.norm[half * w.columns + a]);
  for (int64_t a = 0; a < w.pairs; ++a) {
    float &norm_x = w.norm[a], &norm_y = w.norm[w.columns + a];
    const float x = std::exp2(0.5f * (1 - gamma) * (norm_x - largest));
    const float y = std::exp2(0.5f * (1 - gamma) * (norm_y - largest));
    const float apart = -std::expm1(-0.5f * s.distance[a] / kLog2E);
    const float product = 0.5f * (s.value_x[a] + s.value_y[a] - s.value_distance[a]);
    const float square = x * y * s.value_distance[a] + (x - y) * (x * s.value_x[a] - y * s.value_y[a]) +
                         (x - y) * (x - y) + 2 * x * y * apart * (product + 1);
    w.root[a] = std::sqrt(std::max(0.0f, square));
    norm_x = 0.5f * (gamma * norm_x + (1 - gamma) * largest);
    norm_y = 0.5f * (gamma * norm_y + (1 - gamma) * largest);
  }
}

float Uniform(const StreamKey& key, RandomPurpose purpose, uint64_t number, int64_t index) {
  return UniformFromBits(DrawBits(key, purpose, number, static_cast<uint32_t>(index)));
}

// Decides the block's pairs in order, once their sums over the pairs before the block are known; sign[a] = +1 keeps x_a.
// largest: max_{b <= a} sqrt(D_bb)
void DecideBlock(const HalveWork& w, int64_t first, int64_t count, float factor, const StreamKey& key, uint64_t number,
                 float* largest) {
  const int64_t own = first - HWY_DYNAMIC_DISPATCH(TriangleBegin)(first);
  float sums[kPairs];  // before the block's own signs are set
  for (int64_t i = 0; i < count; ++i) sums[i] = HWY_DYNAMIC_DISPATCH(PairSum)(w, first + i);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t a = first + i;
    const float* row = w.triangle + i * kTriangle + own;
    float sum = sums[i];
    for (int64_t j = 0; j < i; ++j) sum += w.sign[first + j] * row[j];
    *largest = std::max(*largest, w.root[a]);
    const float threshold = factor * w.root[a] * *largest;
    const float r = Uniform(key, RandomPurpose::kHalve, number, a);
    const bool keep_y = threshold > 0 && a > 0 ? (2 * r - 1) * threshold < sum : r < 0.5f;
    w.sign[a] = keep_y ? -1.0f : 1.0f;
  }
}

// Decides all pairs of the list, whose norms and roots are in `w`.
void Decide(const HalveList& list, const HalveParams& params, const StreamKey& key, uint64_t number, HalveWork& w) {
  const float factor =
      params.tau *
      static_cast<float>(0.5 + std::log(2.0 * static_cast<double>(2 * w.pairs) / static_cast<double>(params.delta)));
  const bool whole = w.columns <= kSpan;  // the list is unpacked once and for all
  if (whole) HWY_DYNAMIC_DISPATCH(Unpack)(list, 0, w.columns, w);
  std::fill_n(w.sign, w.columns, 0.0f);
  float largest = 0;
  for (int64_t group = 0; group < w.pairs; group += kGroup) {
    const int64_t group_end = std::min(group + kGroup, w.pairs);
    const int64_t own = whole ? 0 : HWY_DYNAMIC_DISPATCH(TriangleBegin)(group);
    const auto for_each_block = [&](const auto& body) {
      for (int64_t first = group; first < group_end; first += kPairs) body(first, std::min(kPairs, group_end - first));
    };
    HWY_DYNAMIC_DISPATCH(BeginGroup)(list, group, group_end - group, w);
    for (int64_t begin = 0; begin < own; begin += kSpan) {
      const int64_t end = std::min(begin + kSpan, own);
      HWY_DYNAMIC_DISPATCH(Unpack)(list, begin, end, w);
      for_each_block([&](int64_t first, int64_t count) {
        HWY_DYNAMIC_DISPATCH(BlockProducts)(w, first, count, begin, end);
      });
    }
    if (!whole) HWY_DYNAMIC_DISPATCH(Unpack)(list, own, std::min(own + kSpan, w.columns), w);
    for_each_block([&](int64_t first, int64_t count) {
      HWY_DYNAMIC_DISPATCH(BlockProducts)(w, first, count, own, first + count);
      DecideBlock(w, first, count, factor, key, number, &largest);
    });
  }
}

// Lays the scratch out from `at` (null: only counts); returns its floats.
int64_t Layout(int64_t pairs, int32_t key_dim, int32_t value_dim, float* at, HalveWork* w, PairStats* s) {
  int64_t used = 0;
  const auto take = [&](int64_t floats) {
    float* taken = at != nullptr ? at + used : nullptr;
    used += (floats + 15) / 16 * 16;  // 64-byte alignment
    return taken;
  };
  const int64_t columns = PadColumns(pairs), span = std::min(columns, kSpan), rows = std::min(pairs + kStrip, kGroup);
  *w = {.pairs = pairs,
        .columns = columns,
        .span = 0,
        .group = 0,
        .key_dim = key_dim,
        .value_dim = value_dim,
        .key = take(span * 2 * key_dim),
        .value = take(span * 2 * value_dim),
        .norm = take(2 * columns),
        .root = take(columns),
        .sign = take(columns),
        .mean = take(key_dim),
        .staged = take(2 * kStaged * std::max(key_dim, value_dim))};
  const int64_t begin = used;
  *s = {.distance = take(columns), .value_x = take(columns), .value_y = take(columns), .value_distance = take(columns)};
  const int64_t end = std::exchange(used, begin);
  w->key_rows = take(rows * 2 * key_dim);
  w->value_rows = take(rows * 2 * value_dim);
  w->partial = take(kGroup * kMostLanes);
  w->triangle = take(kPairs * kTriangle);
  used = std::max(used, end);
  return used;
}

}  // namespace

size_t HalveScratchBytes(int64_t count, int32_t key_dim, int32_t value_dim) {
  HalveWork w;
  PairStats s;
  return static_cast<size_t>(Layout((count + 1) / 2, key_dim, value_dim, nullptr, &w, &s)) * sizeof(float);
}

void Halve(const Slab& slab, const int32_t* slots, int64_t count, const HalveParams& params, const StreamKey& key,
           uint64_t number, void* scratch) {
  HalveWork w;
  PairStats stats;
  Layout(count / 2, slab.key_dim, slab.value_dim, static_cast<float*>(scratch), &w, &stats);
  // The first pair of a list is a fair coin, and short lists are many: a list of one pair needs no products.
  const bool coins = params.coin || w.pairs == 1;
  if (!coins) {
    HalveList list{.slab = slab, .slots = slots, .beta = params.scale, .largest_value = 1};
    list.largest_value = HWY_DYNAMIC_DISPATCH(ReadMean)(list, w);
    HWY_DYNAMIC_DISPATCH(Measure)(list, w, stats);
    FinishNorms(params.gamma, w, stats);
    Decide(list, params, key, number, w);
  }
  const bool complement = Uniform(key, RandomPurpose::kComplement, number, 0) < 0.5f;
  for (int64_t a = 0; a < w.pairs; ++a) {
    const bool keep_y = coins ? Uniform(key, RandomPurpose::kHalve, number, a) < 0.5f : w.sign[a] < 0;
    if (keep_y != complement) CopyEntry(slab, slots[2 * a + 1], slots[2 * a]);
  }
}

}  // namespace express::cpu
#endif  // HWY_ONCE
