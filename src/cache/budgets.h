// Budgets that follow what heads are seen to look at (DESIGN 3.5, config.head_budgets).
//
// Attention notes how much of it goes to far entries; at rare moments the total of entries is shared out anew by that mass. This is
// the one decision that depends on data; it is a change of settings, and the plans go on from there as plans.
#ifndef EXPRESS_SRC_CACHE_BUDGETS_H_
#define EXPRESS_SRC_CACHE_BUDGETS_H_

#include <cstdint>

#include "src/cache/resolve.h"
#include "src/core/arena.h"
#include "src/plan/setting.h"

namespace express::cache {

// Every 16th token's queries are observed.
inline constexpr int64_t kObserveEvery = 16;

// What attention has noted of one head. Integers, so that the order in which threads add does not matter.
struct Observed {
  uint64_t far;     // sum over tokens of the share of attention that goes to far entries, in units of 2^-32
  uint64_t tokens;  // (or groups of up to 16 query rows)
};
inline constexpr double kFarUnit = 4294967296.0;

// Where the mean budget is `mean`: tokens at positions [mean / 2, ObservationEnd) are observed. It ends a little before budgets are
// settled: on a GPU what was observed is then on its way to the host for a while.
constexpr int64_t ObservationEnd(int64_t mean) { return mean - mean / 8; }

struct Budgets {
  Observed* observed;       // (layers, kv_heads); null where budgets are fixed
  double* share;            // (layers, kv_heads)
  int64_t* budget;          // (layers, kv_heads)
  plan::Setting* settings;  // (layers, kv_heads): the next ones
  plan::Setting* current;   // (layers, kv_heads)
  int32_t* leader;          // (layers, kv_heads): Shape::leader of the next plans
  Arena::Piece* pieces;     // (2, piece_capacity): where the parts of the cache are, and where they go
  int64_t piece_capacity;
};
Budgets LayoutBudgets(const Shape& shape, Arena& arena);

// budget[h] = base + a part of `total` - heads * base in proportion to share[h] >= 0, at most `most`. Equal shares get equal budgets,
// to the entry, so the sum can be a little less than `total`: by fewer entries than there are heads of one share. `total` is between
// heads * base and heads * most. All shares zero: equal parts. Overwrites the shares.
void ShareOut(int64_t total, int64_t base, int64_t most, int64_t heads, double* share, int64_t* budget);

// Heads that would get about as much, budget[h] in proportion to share[h], get the same share, their mean. So few plans are needed:
// those of heads of one layer that always have the same setting are one. Overwrites the budgets.
void JoinShares(int64_t base, int64_t heads, int64_t* budget, double* share);

// Moves pieces of memory, whose order is the same before and after, each up to the smaller of its sizes.
void MovePieces(char* memory, const Arena::Piece* from, const Arena::Piece* to, int64_t count);

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_BUDGETS_H_
