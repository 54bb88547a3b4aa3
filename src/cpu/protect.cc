// The protected set of one head stream (DESIGN 3.5): the P entries with the largest ||k - mu||^2 of all that left the
// exact tail, mu being the mean key of the last full run of 256 departures. A departure costs one row of arithmetic, so this is plain code; the compiler vectorises the loops over
// the dimension.
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

// Adds the key to the sum and returns its score.
template <class T>
float Score(Protection& p, const StoredRow<T>& key, int64_t dim) {
  float score = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const float x = key[d], centred = x - p.mean[d];
    p.sum[d] += x;
    score += centred * centred;
  }
  return score;
}

}  // namespace

void CentreOn(Protection& p, const Slab& slab, const int32_t* slots, int64_t count) {
  WithStorage(slab.dtype, [&](auto type) {
    for (int64_t d = 0; d < slab.key_dim; ++d) {
      float sum = 0;
      for (int64_t i = 0; i < count; ++i) sum += KeyRow<decltype(type)>(slab, slots[i])[d];
      p.mean[d] = sum / static_cast<float>(count);
    }
  });
}

void Admit(Protection& p, const Slab& slab, int32_t slot, uint64_t ordinal) {
  if (ordinal > 0 && ordinal % kRun == 0) {
    for (int64_t d = 0; d < slab.key_dim; ++d) {
      p.mean[d] = p.sum[d] / static_cast<float>(kRun);
      p.sum[d] = 0;
    }
  }
  const float score =
      WithStorage(slab.dtype, [&](auto type) { return Score(p, KeyRow<decltype(type)>(slab, slot), slab.key_dim); });
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
