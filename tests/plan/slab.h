// Slots that hold tokens: executes a plan's operations one by one, with hashes for decisions.
#ifndef EXPRESS_TESTS_PLAN_SLAB_H_
#define EXPRESS_TESTS_PLAN_SLAB_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

#include "src/plan/operations.h"
#include "src/plan/setting.h"

namespace express::plan {

using Token = int64_t;
inline constexpr Token kNothing = -1;
using Tokens = std::vector<Token>;
using Entries = std::vector<std::pair<Token, float>>;  // tokens with log weights, sorted

template <class Vector, class Index>
auto& At(Vector& v, Index i) {
  return v.at(static_cast<size_t>(i));
}
template <class Vector>
int64_t Size(const Vector& v) {
  return static_cast<int64_t>(v.size());
}

// Decisions are hashes of all that they may depend on.
inline int64_t Hash(std::initializer_list<int64_t> words) {
  uint64_t hash = 0;
  for (const int64_t word : words) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 29;
  }
  return static_cast<int64_t>(hash >> 1);
}
inline bool Takes(int64_t seed, int64_t number, int64_t weight, int64_t total) {
  return Hash({seed, 1, number, weight, total}) % total < weight;
}
inline Tokens Survivors(int64_t seed, int64_t number, const Tokens& list) {
  int64_t content = 0;
  for (const Token token : list) content = Hash({content, token});
  Tokens kept;
  for (int64_t a = 0; a < Size(list) / 2; ++a)
    kept.push_back(At(list, 2 * a + Hash({seed, 2, number, a, content}) % 2));
  return kept;
}
// Of `protect` entries the one that a departure drives out; `protect` or more: none.
inline int64_t DrivesOut(int64_t seed, int64_t departure, Token token, int64_t protect) {
  return Hash({seed, 3, departure, token}) % (2 * protect + 1);
}

// What the slots of a plan hold.
struct Slab {
  Slab(const Setting& setting, int64_t s) : seed(s), protect(setting.protect) {
    token.assign(static_cast<size_t>(setting.budget), kNothing);
    weight.assign(token.size(), 0);
  }
  void Set(Slot slot, Token t, int64_t w) { At(token, slot) = t, At(weight, slot) = w; }

  void Apply(const Operations& out) {
    for (int64_t i = 0; i < out.size(); ++i) ApplyOne(out[i], out.slots(out[i]));
  }
  void ApplyOne(const Op& op, const Slot* slots) {
    Tokens held;
    for (int32_t i = 0; i < op.count; ++i) held.push_back(At(token, slots[i]));
    if (op.kind == OpKind::kAdmit) {
      const int64_t out = DrivesOut(seed, op.number, held[0], protect);
      if (Size(protected_slots) < protect)
        protected_slots.push_back(slots[0]);
      else if (out < protect)
        std::swap(At(token, slots[0]), At(token, At(protected_slots, out)));
    }
    if (op.kind == OpKind::kAdmit || op.kind == OpKind::kCentre) return;
    for (int32_t i = 0; i < op.count; ++i) Set(slots[i], kNothing, 0);
    if (op.kind == OpKind::kWrite)
      for (int32_t i = 0; i < op.count; ++i) Set(slots[i], op.number + i, 1);
    if (op.kind == OpKind::kSample) Set(slots[0], held[Takes(seed, op.number, op.weight, op.total)], op.total);
    if (op.kind == OpKind::kHalve)
      for (const Token t : Survivors(seed, op.number, held)) Set(*slots, t, op.weight), slots += 2;
  }

  Entries All() const {
    Entries entries;
    for (int64_t slot = 0; slot < Size(token); ++slot)
      if (const int64_t w = At(weight, slot); w > 0)
        entries.emplace_back(At(token, slot), static_cast<float>(std::log(static_cast<double>(w))));
    std::sort(entries.begin(), entries.end());
    return entries;
  }

  int64_t seed, protect;
  Tokens token;
  std::vector<int64_t> weight;
  std::vector<Slot> protected_slots;
};

}  // namespace express::plan

#endif  // EXPRESS_TESTS_PLAN_SLAB_H_
