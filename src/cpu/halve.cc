// Kernel halving (DESIGN 3.1; the formula stands beside the scalar code in reference.cc).
//
// Pairs are decided in order, in blocks. For a block, D_ab against all earlier pairs b is formed tile by tile and summed
// with the signs already chosen into S_a at once, so no h x h matrix exists; then the block's own triangle of D is
// scanned pair by pair.
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

namespace express::cpu {

inline constexpr int64_t kPairs = 24;      // pairs of a block
inline constexpr int64_t kStrip = 3;       // pairs whose products are in registers at a time
inline constexpr int64_t kMostPanel = 32;  // pairs of a panel at the widest target; columns are padded to these
inline constexpr int64_t kTriangle = 64;   // columns of the panels that a block touches, at most
inline constexpr int64_t kStaged = 4;      // pairs that are transposed at a time
inline constexpr float kLargestCoordinate = 1e17f;  // of a key; squared norms stay finite up to 1024 of these

inline int64_t PadColumns(int64_t pairs) { return (pairs + kMostPanel - 1) / kMostPanel * kMostPanel; }

// Scratch of one halving. A panel is as many pairs as fill half of kWide vectors: the list is taken apart so that a
// vector of columns is a vector of pairs.
struct HalveWork {
  int64_t pairs;    // h
  int64_t columns;  // h, padded
  int32_t key_dim, value_dim;
  float* key;         // panels of (key_dim, panel / lanes, 2, lanes), x then y: centred, times sqrt(beta log2 e)
  float* value;       // panels of (value_dim, panel / lanes, 2, lanes): over b
  float* norm;        // (2, columns): c_i log2 e
  float* root;        // (columns): sqrt(D_aa)
  float* sign;        // (columns): +1 when x was kept, -1 when y was, 0 for the padding and what is not decided
  float* mean;        // (key_dim)
  float* staged;      // (2, kStaged, larger dim): rows on their way into a panel
  float* key_rows;    // (kPairs, 2, key_dim): the block's pairs
  float* value_rows;  // (kPairs, 2, value_dim)
  float* triangle;    // (kPairs, kTriangle): D of the block's pairs with the columns of its panels
};

// What D_aa is made of.
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
    const T* key = static_cast<const T*>(slab.key) + slots[i] * dk;
    const T* value = static_cast<const T*>(slab.value) + slots[i] * dv;
    int64_t j = 0;
    for (; j + lanes <= dk; j += lanes)
      hn::StoreU(hn::MulAdd(LoadF32(d, key + j), hn::Set(d, inverse), hn::LoadU(d, w.mean + j)), d, w.mean + j);
    for (; j < dk; ++j) w.mean[j] += ToFloat(key[j]) * inverse;
    for (j = 0; j + lanes <= dv; j += lanes) top = hn::Max(top, hn::Abs(LoadF32(d, value + j)));
    for (; j < dv; ++j) largest = std::max(largest, std::abs(ToFloat(value[j])));
  }
  largest = std::max(largest, hn::GetLane(hn::MaxOfLanes(d, top)));
  return largest > 0 ? largest : 1;
}

// to[j] = f(row[j]) for j < dim, vector by vector; the rest goes through a padded vector.
template <class T, class F>
HWY_INLINE void StageRow(const T* HWY_RESTRICT row, int64_t dim, const F& f, float* HWY_RESTRICT to) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t j = 0;
  for (; j + lanes <= dim; j += lanes) hn::StoreU(f(LoadF32(d, row + j), j, lanes), d, to + j);
  if (j == dim) return;
  HWY_ALIGN float rest[hn::MaxLanes(F32())] = {};
  for (int64_t i = j; i < dim; ++i) rest[i - j] = ToFloat(row[i]);
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

// Fills the panels, w.norm with squared norms, and the statistics of the pairs.
template <class T>
void LoadPairs(const Slab& slab, const int32_t* slots, float beta, float b, const HalveWork& w, const PairStats& s) {
  const F32 d;
  const int64_t dk = slab.key_dim, dv = slab.value_dim;
  const auto scale = hn::Set(d, std::sqrt(std::max(0.0f, beta) * kLog2E)), divisor = hn::Set(d, b);
  const auto limit = hn::Set(d, kLargestCoordinate), minus_limit = hn::Set(d, -kLargestCoordinate);
  const auto centre = [&](auto x, int64_t j, int64_t count) HWY_ATTR {
    HWY_ALIGN float rest[hn::MaxLanes(F32())] = {};
    const bool whole = count == static_cast<int64_t>(hn::Lanes(d));
    if (!whole) std::copy_n(w.mean + j, count, rest);
    const auto centred = hn::Mul(hn::Sub(x, whole ? hn::LoadU(d, w.mean + j) : hn::Load(d, rest)), scale);
    return hn::Min(hn::Max(centred, minus_limit), limit);
  };
  const auto divide = [&](auto x, int64_t, int64_t) HWY_ATTR { return hn::Div(x, divisor); };
  // A list that fits one vector of columns is met by no other (see BlockProducts): short lists are many, and most of their
  // time would be padding.
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const bool one_vector = (w.pairs - 1) / kStrip * kStrip + kStrip - 1 < lanes;
  const int64_t columns = one_vector ? (lanes + kStaged - 1) / kStaged * kStaged : w.columns;
  for (int64_t first = 0; first < columns; first += kStaged) {
    const int64_t count = std::clamp<int64_t>(w.pairs - first, 0, kStaged);
    if (count < kStaged) std::fill_n(w.staged, 2 * kStaged * dk, 0.0f);
    for (int64_t i = 0; i < 2 * count; ++i)
      StageRow(static_cast<const T*>(slab.key) + slots[2 * first + i] * dk, dk, centre,
               w.staged + (i % 2 * kStaged + i / 2) * dk);
    for (int64_t i = 0; i < kStaged; ++i) {
      const int64_t a = first + i;
      const float* x = w.staged + i * dk;
      Norms(x, x + kStaged * dk, dk, w.norm + a, w.norm + w.columns + a, s.distance + a);
    }
    Unstage(w.staged, dk, first, w.key);
    if (count < kStaged) std::fill_n(w.staged, 2 * kStaged * dv, 0.0f);
    for (int64_t i = 0; i < 2 * count; ++i)
      StageRow(static_cast<const T*>(slab.value) + slots[2 * first + i] * dv, dv, divide,
               w.staged + (i % 2 * kStaged + i / 2) * dv);
    for (int64_t i = 0; i < kStaged; ++i) {
      const int64_t a = first + i;
      const float* x = w.staged + i * dv;
      Norms(x, x + kStaged * dv, dv, s.value_x + a, s.value_y + a, s.value_distance + a);
    }
    Unstage(w.staged, dv, first, w.value);
  }
}

void LoadList(const Slab& slab, const int32_t* slots, float beta, const HalveWork& w, const PairStats& stats) {
  WithType(slab.dtype, [&](auto type) {
    const float b = MeanAndLargest<decltype(type)>(slab, slots, w);
    LoadPairs<decltype(type)>(slab, slots, beta, b, w, stats);
  });
}

// Copies the block's pairs out of the panels, to be read row by row: rows (count, 2, dim). Rows of a strip that ends
// behind the list keep what they hold; nobody uses their products.
HWY_INLINE void PackRows(const float* panels, int64_t dim, int64_t columns, int64_t first, int64_t count, float* rows) {
  const auto lanes = static_cast<int64_t>(hn::Lanes(F32())), step = 2 * Panel();
  for (int64_t i = 0; i < count && first + i < columns; i += kStaged)
    for (int64_t half = 0; half < 2; ++half) {
      float* to = rows + (2 * i + half) * dim;
      int64_t j = 0;
      if (lanes % kStaged == 0) {
        const float* from = panels + PairAt(first + i, dim) + half * lanes;
        for (; j + 4 <= dim; j += 4) TransposeFour(from + j * step, step, kStaged, to + j, 2 * dim);
      }
      for (int64_t pair = 0; pair < kStaged; ++pair) {
        const float* from = panels + PairAt(first + i + pair, dim) + half * lanes;
        for (int64_t rest = j; rest < dim; ++rest) to[pair * 2 * dim + rest] = from[rest * step];
      }
    }
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
  Multiply<kWidth, false>(key_rows, w.key_dim, 1, w.key + column * 2 * w.key_dim, step, w.key_dim, keys, row);
  Multiply<kWidth, false>(value_rows, w.value_dim, 1, w.value + column * 2 * w.value_dim, step, w.value_dim, values,
                          row);
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

// For the block's pairs a, first <= a < first + count: sums[a - first] = sum of sign_b D_ab over all pairs b decided so
// far, and D_ab of the panels from that of `first` on in the triangle.
void BlockProducts(const HalveWork& w, int64_t first, int64_t count, float* sums) {
  const F32 d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d)), panel = Panel();
  const int64_t own = first / panel * panel;                   // where the panels of the block itself begin
  HWY_ALIGN float partial[kPairs * hn::MaxLanes(F32())] = {};  // (kPairs, lanes)
  HWY_ALIGN float products[kStrip * kTriangle];
  PackRows(w.key, w.key_dim, w.columns, first, count, w.key_rows);
  PackRows(w.value, w.value_dim, w.columns, first, count, w.value_rows);
  for (int64_t column = 0; column < first + count; column += panel)
    for (int64_t a = 0; a < count; a += kStrip) {
      if (column > first + a + kStrip - 1) continue;  // all later than a
      float* out = column < own ? products : w.triangle + a * kTriangle + (column - own);
      const float* key_rows = w.key_rows + a * 2 * w.key_dim;
      const float* value_rows = w.value_rows + a * 2 * w.value_dim;
      // Where the panel crosses the diagonal, its first vectors may be all that is needed.
      const bool whole = column + lanes <= first + a + kStrip - 1;
      if (whole)
        StripProducts<kWide>(w, key_rows, value_rows, first + a, column, out);
      else
        StripProducts<2>(w, key_rows, value_rows, first + a, column, out);
      const int64_t width = whole ? panel : lanes;
      for (int64_t i = 0; i < kStrip; ++i) {
        float* to = partial + (a + i) * lanes;
        auto sum = hn::Load(d, to);
        for (int64_t at = 0; at < width; at += lanes)
          sum = hn::MulAdd(hn::Load(d, w.sign + column + at), hn::Load(d, out + i * kTriangle + at), sum);
        hn::Store(sum, d, to);
      }
    }
  for (int64_t a = 0; a < count; ++a) sums[a] = hn::GetLane(hn::SumOfLanes(d, hn::Load(d, partial + a * lanes)));
}

// The first column of the triangle of the block that begins at `first`.
int64_t TriangleBegin(int64_t first) { return first / Panel() * Panel(); }

}  // namespace express::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace express::cpu {

HWY_EXPORT(LoadList);
HWY_EXPORT(BlockProducts);
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

// Decides all pairs; sign[a] = +1 keeps x_a. The list is in `w`.
void Decide(const HalveParams& params, const StreamKey& key, uint64_t number, const HalveWork& w) {
  const float factor =
      params.tau *
      static_cast<float>(0.5 + std::log(2.0 * static_cast<double>(2 * w.pairs) / static_cast<double>(params.delta)));
  std::fill_n(w.sign, w.columns, 0.0f);
  float largest = 0;  // max_{b <= a} sqrt(D_bb)
  for (int64_t first = 0; first < w.pairs; first += kPairs) {
    const int64_t count = std::min(kPairs, w.pairs - first);
    float sums[kPairs];
    HWY_DYNAMIC_DISPATCH(BlockProducts)(w, first, count, sums);
    const int64_t own = first - HWY_DYNAMIC_DISPATCH(TriangleBegin)(first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t a = first + i;
      const float* row = w.triangle + i * kTriangle + own;
      float sum = sums[i];
      for (int64_t j = 0; j < i; ++j) sum += w.sign[first + j] * row[j];
      largest = std::max(largest, w.root[a]);
      const float threshold = factor * w.root[a] * largest;
      const float r = Uniform(key, RandomPurpose::kHalve, number, a);
      const bool keep_y = threshold > 0 && a > 0 ? (2 * r - 1) * threshold < sum : r < 0.5f;
      w.sign[a] = keep_y ? -1.0f : 1.0f;
    }
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
  const int64_t columns = PadColumns(pairs), rows = std::min(pairs + kStrip, kPairs);
  *w = {.pairs = pairs,
        .columns = columns,
        .key_dim = key_dim,
        .value_dim = value_dim,
        .key = take(columns * 2 * key_dim),
        .value = take(columns * 2 * value_dim),
        .norm = take(2 * columns),
        .root = take(columns),
        .sign = take(columns),
        .mean = take(key_dim),
        .staged = take(2 * kStaged * std::max(key_dim, value_dim)),
        .key_rows = take(rows * 2 * key_dim),
        .value_rows = take(rows * 2 * value_dim),
        .triangle = take(kPairs * kTriangle)};
  *s = {.distance = take(columns), .value_x = take(columns), .value_y = take(columns), .value_distance = take(columns)};
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
    HWY_DYNAMIC_DISPATCH(LoadList)(slab, slots, params.scale, w, stats);
    FinishNorms(params.gamma, w, stats);
    Decide(params, key, number, w);
  }
  const bool complement = Uniform(key, RandomPurpose::kComplement, number, 0) < 0.5f;
  for (int64_t a = 0; a < w.pairs; ++a) {
    const bool keep_y = coins ? Uniform(key, RandomPurpose::kHalve, number, a) < 0.5f : w.sign[a] < 0;
    if (keep_y != complement) CopyEntry(slab, slots[2 * a + 1], slots[2 * a]);
  }
}

}  // namespace express::cpu
#endif  // HWY_ONCE
