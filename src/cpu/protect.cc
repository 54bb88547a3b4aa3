// The protected set of one head stream (DESIGN 3.5): the P entries with the largest scores of all that left the exact tail. A
// departure costs one row of arithmetic, or two, so this is plain code; the compiler vectorises the loops over the dimension.
#include <algorithm>
#include <cmath>

#include "src/cpu/kernels.h"
#include "src/cpu/rows.h"

namespace express::cpu {
namespace {

// Scores are taken against the mean of a recent run of departed keys: keys that carry rotary positions drift, and a mean over
// all of the past would let every newer key seem to lie far out.
constexpr uint64_t kRun = 256;

// The lowest score; among equals the youngest, since ties go to the older.
int64_t Weakest(const Protection& p, const int64_t* position) {
  int64_t weakest = 0;
  for (int64_t i = 1; i < p.count; ++i) {
    const bool younger = position[p.slot[i]] > position[p.slot[weakest]];
    if (p.score[i] < p.score[weakest] || (p.score[i] == p.score[weakest] && younger)) weakest = i;
  }
  return weakest;
}

// Adds the key to the sum and returns its energy.
template <class T>
float Energy(Protection& p, const StoredRow<T>& key, int64_t dim) {
  float score = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const float x = key[d], centred = x - p.mean[d];
    p.sum[d] += x;
    score += centred * centred;
  }
  return score;
}

// ---- without positions ----

constexpr int64_t kMostDim = 1024;

struct PlainOps {
  static constexpr float Sum(float a, float b) { return a + b; }
  static constexpr float Product(float a, float b) { return a * b; }
};

void Undo(float& x, float& y, float cos, float sin) {
  const float a = x * cos + y * sin, b = y * cos - x * sin;
  x = a;
  y = b;
}

// key: (key_dim), turned back.
template <class T>
void ReadWithoutPosition(const Slab& slab, int64_t slot, const Rotation& r, float* key) {
  const StoredRow<T> row = KeyRow<T>(slab, slot);
  for (int64_t d = 0; d < slab.key_dim; ++d) key[d] = row[d];
  float cos[kMostDim / 2], sin[kMostDim / 2];
  const int64_t position = slab.position[slot];
  for (int32_t i = 0; i < r.pairs; ++i) {
    const Angle angle = CosSin<PlainOps>(Phase(r.turns[i], position));
    cos[i] = angle.cos;
    sin[i] = angle.sin;
  }
  if (r.interleaved != 0) {
    for (int32_t i = 0; i < r.pairs; ++i) Undo(key[2 * i], key[2 * i + 1], cos[i], sin[i]);
  } else {
    for (int32_t i = 0; i < r.pairs; ++i) Undo(key[i], key[r.pairs + i], cos[i], sin[i]);
  }
}

// Sum of the squares of element(d), d < dim.
template <class Element>
float SquaredNorm(int64_t dim, const Element& element) {
  float lane[kScoreLanes] = {};
  int64_t d = 0;
  for (; d + kScoreLanes <= dim; d += kScoreLanes)
    for (int64_t j = 0; j < kScoreLanes; ++j) lane[j] += element(d + j) * element(d + j);
  for (; d < dim; ++d) lane[d % kScoreLanes] += element(d) * element(d);
  for (int32_t half = kScoreLanes / 2; half > 0; half /= 2)
    for (int32_t j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0];
}

// Adds the key to the sum and returns its score.
template <class T>
float ScoreWithoutPosition(Protection& p, const Slab& slab, int64_t slot, const Scoring& scoring) {
  float key[kMostDim];
  ReadWithoutPosition<T>(slab, slot, scoring.rotation, key);
  const float* mean = p.mean;
  const float energy = SquaredNorm(slab.key_dim, [&](int64_t d) { return key[d] - mean[d]; });
  for (int64_t d = 0; d < slab.key_dim; ++d) p.sum[d] += key[d];
  if (!(energy > 0)) return 0;  // never NaN
  if (!scoring.value_norm) return energy;
  const StoredRow<T> value = ValueRow<T>(slab, slot);
  const float norm = SquaredNorm(slab.value_dim, [&](int64_t d) { return value[d]; });
  return norm > 0 ? energy * std::sqrt(norm) : 0;
}

template <class T>
void Centre(Protection& p, const Slab& slab, const int32_t* slots, int64_t count) {
  for (int64_t d = 0; d < slab.key_dim; ++d) {
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += KeyRow<T>(slab, slots[i])[d];
    p.mean[d] = sum / static_cast<float>(count);
  }
}

template <class T>
void CentreWithoutPosition(Protection& p, const Slab& slab, const int32_t* slots, int64_t count, const Rotation& r) {
  float key[kMostDim];
  std::fill_n(p.mean, slab.key_dim, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    ReadWithoutPosition<T>(slab, slots[i], r, key);
    for (int64_t d = 0; d < slab.key_dim; ++d) p.mean[d] += key[d];
  }
  for (int64_t d = 0; d < slab.key_dim; ++d) p.mean[d] /= static_cast<float>(count);
}

}  // namespace

void CentreOn(Protection& p, const Slab& slab, const int32_t* slots, int64_t count, const Scoring& scoring) {
  WithStorage(slab.dtype, [&](auto type) {
    using T = decltype(type);
    if (scoring.without_position)
      CentreWithoutPosition<T>(p, slab, slots, count, scoring.rotation);
    else
      Centre<T>(p, slab, slots, count);
  });
}

void Admit(Protection& p, const Slab& slab, int32_t slot, uint64_t ordinal, const Scoring& scoring) {
  if (ordinal > 0 && ordinal % kRun == 0) {
    for (int64_t d = 0; d < slab.key_dim; ++d) {
      p.mean[d] = p.sum[d] / static_cast<float>(kRun);
      p.sum[d] = 0;
    }
  }
  const float score = WithStorage(slab.dtype, [&](auto type) {
    using T = decltype(type);
    return scoring.without_position ? ScoreWithoutPosition<T>(p, slab, slot, scoring)
                                    : Energy(p, KeyRow<T>(slab, slot), slab.key_dim);
  });
  if (p.count < p.capacity) {
    p.slot[p.count] = slot;
    p.score[p.count++] = score;
    if (p.count == p.capacity) p.weakest = Weakest(p, slab.position);
  } else if (score > p.score[p.weakest]) {
    SwapEntries(slab, slot, p.slot[p.weakest]);
    p.score[p.weakest] = score;
    p.weakest = Weakest(p, slab.position);
  }
}

void Evict(Protection& p, const Slab& slab) {
  const int64_t weakest = Weakest(p, slab.position), last = --p.count;
  if (weakest != last) {
    SwapEntries(slab, p.slot[weakest], p.slot[last]);
    p.score[weakest] = p.score[last];
  }
  FindWeakest(p, slab);
}

void FindWeakest(Protection& p, const Slab& slab) { p.weakest = p.count > 0 ? Weakest(p, slab.position) : 0; }

}  // namespace express::cpu
