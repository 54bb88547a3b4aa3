// What every cache keeps on the host, whatever its device: the plans of its heads, and counts.
#ifndef EXPRESS_SRC_CACHE_PLANS_H_
#define EXPRESS_SRC_CACHE_PLANS_H_

#include <cmath>
#include <cstdint>

#include "src/cache/resolve.h"
#include "src/core/arena.h"
#include "src/core/rotary.h"
#include "src/plan/plan.h"

namespace express::cache {

// One (layer, setting): the plan that its KV heads share.
struct PlanState {
  plan::Plan plan;
  float* log_weight;  // (budget): -inf = free; null where the backend keeps it elsewhere
  int32_t layer;
  int32_t first_head;  // its heads are plan_heads[first_head, first_head + head_count)
  int32_t head_count;
  int64_t call_begin;  // tokens before the append in progress
};

struct Plans {
  PlanState* plans;        // (plan_count), by layer
  int32_t* plan_heads;     // (layers, kv_heads): head indices grouped by plan
  int32_t* head_plan;      // (layers, kv_heads): index into plans
  int32_t* layer_plans;    // (layers + 1): plans of layer l are [layer_plans[l], layer_plans[l + 1])
  int64_t* layer_entries;  // (layers): entries held now
  int64_t* layer_peak;     // (layers): most entries held after a call
  int32_t plan_count;
  int32_t plan_capacity;        // where budgets are observed every head may come to have a plan of its own
  plan::Operations operations;  // room for a few tokens of every plan of a layer, or for one with a large halving
  int64_t max_ops, max_slots;   // of one token, over all plans
  int64_t max_list;             // the longest list that is ever halved
};

inline float LogWeight(int64_t weight) {
  return weight == 1 ? 0.0f : static_cast<float>(std::log(static_cast<double>(weight)));  // most are 1
}

// Where plans of a layout come from: they are new; or they are in the arena's memory already and are resized to the settings of
// `shape` (Plan::Resize); or they are there with these settings, and heads that shared one are given plans of their own.
enum class PlanSource : uint8_t { kNew, kResized, kSplit };

// Over a counting arena only the counts are of use. `host_weights`: PlanState::log_weight is laid out too. Where budgets are
// observed all heads take the room of a plan, so that arrays lie at the same places however heads share plans.
Plans LayoutPlans(const Shape& shape, bool host_weights, PlanSource source, Arena& arena);

// Rotary positions, as scores of protection need them. The frequencies are kept: a saved cache must have been of the same.
struct KeptScoring {
  Scoring scoring;
  const float* frequencies;  // (pairs)
};
// Null where scores are energies of keys as they come, which need none of this, and while counting.
KeptScoring* LayoutScoring(const Config& config, Arena& arena);

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_PLANS_H_
