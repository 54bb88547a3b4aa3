#include "src/cache/plans.h"

#include <algorithm>
#include <new>

namespace express::cache {
namespace {

// KV heads of a layer that have the same setting, and always had, share a plan: head h belongs to the first head of its kind.
int64_t Leader(const Shape& shape, int64_t h) {
  if (shape.leader != nullptr) return shape.leader[h];
  int64_t first = h / shape.config.kv_heads * shape.config.kv_heads;
  while (!(shape.settings[first] == shape.settings[h])) ++first;
  return first;
}

// What `plan` needs beside its own arrays. A rollback lists tokens of sinks and tail, another division of budgets slots of all kinds.
void TakeBounds(const Shape& shape, const plan::Plan& plan, Plans* out) {
  const plan::Setting& setting = plan.setting();
  const int64_t listed = shape.largest != nullptr ? setting.budget : setting.sinks + setting.tail();
  out->max_ops = std::max(out->max_ops, plan.MaxOps());
  out->max_slots = std::max({out->max_slots, plan.MaxSlots(), listed});
  out->max_list = std::max(out->max_list, plan.MaxList());
}

// Plans that are there already go to their new indices, those of leaders; a plan that is split goes to each of its parts.
void SplitStates(const Shape& shape, const Plans& plans) {
  int32_t index = plans.plan_count;
  for (int64_t h = int64_t{shape.config.layers} * shape.config.kv_heads - 1; h >= 0; --h)
    if (Leader(shape, h) == h) plans.plans[--index] = plans.plans[plans.head_plan[h]];
}

// The plan of a leader with this setting, in the memory that comes next; `there`: what was there, null if it is new.
PlanState TakePlan(const plan::Setting& setting, PlanSource source, const PlanState* there, bool host_weights,
                   Arena& arena) {
  PlanState state{.plan = source == PlanSource::kResized ? there->plan : plan::Plan(setting, arena),
                  .log_weight = nullptr,
                  .layer = 0,
                  .first_head = 0,
                  .head_count = 0,
                  .call_begin = 0};
  if (source == PlanSource::kResized) state.plan.Resize(setting, arena);
  if (host_weights) state.log_weight = arena.Take<float>(setting.budget);
  if (source != PlanSource::kSplit) return state;
  state.plan.Assume(there->plan);
  if (host_weights && state.log_weight != there->log_weight)
    std::copy_n(there->log_weight, setting.budget, state.log_weight);
  return state;
}

}  // namespace

Plans LayoutPlans(const Shape& r, bool host_weights, PlanSource source, Arena& arena) {
  const Config& c = r.config;
  const int64_t heads = int64_t{c.layers} * c.kv_heads;
  Plans out{};
  out.plan_heads = arena.Take<int32_t>(heads);
  out.head_plan = arena.Take<int32_t>(heads);
  out.layer_plans = arena.Take<int32_t>(int64_t{c.layers} + 1);
  out.layer_entries = arena.Take<int64_t>(c.layers);
  out.layer_peak = arena.Take<int64_t>(c.layers);
  const bool counting = out.plan_heads == nullptr;
  for (int64_t h = 0; h < heads; ++h) out.plan_count += Leader(r, h) == h;
  out.plan_capacity = r.largest != nullptr ? static_cast<int32_t>(heads) : out.plan_count;
  out.plans = arena.Take<PlanState>(out.plan_capacity);
  if (source == PlanSource::kSplit) SplitStates(r, out);

  out.max_list = 2;
  int32_t plan = 0, grouped = 0;
  for (int64_t h = 0; h < heads; ++h) {
    const auto layer = static_cast<int32_t>(h / c.kv_heads);
    if (!counting && h % c.kv_heads == 0) out.layer_plans[layer] = plan;
    if (Leader(r, h) != h) {
      if (r.largest != nullptr) TakePlan(r.settings[h], PlanSource::kNew, nullptr, host_weights, arena);
      continue;
    }
    PlanState state = TakePlan(r.settings[h], source, counting ? nullptr : out.plans + plan, host_weights, arena);
    state.layer = layer;
    state.first_head = grouped;
    for (int64_t other = h; other < (int64_t{layer} + 1) * c.kv_heads; ++other) {
      if (Leader(r, other) != h) continue;
      if (!counting) {
        out.head_plan[other] = plan;
        out.plan_heads[grouped] = static_cast<int32_t>(other);
      }
      ++grouped;
      ++state.head_count;
    }
    TakeBounds(r, state.plan, &out);
    if (!counting) new (&out.plans[plan]) PlanState(state);
    ++plan;
  }
  if (!counting) out.layer_plans[c.layers] = out.plan_count;
  if (r.largest != nullptr) {
    Arena none;
    TakeBounds(r, plan::Plan(*r.largest, none), &out);
  }
  out.operations = plan::Operations(arena, 4 * out.max_ops + 256, out.max_slots + 1024);
  return out;
}

KeptScoring* LayoutScoring(const Config& c, Arena& arena) {
  if (!WithoutPosition(c)) return nullptr;
  const auto pairs = static_cast<int64_t>(c.rope_frequencies.size());
  auto* scoring = arena.Take<KeptScoring>(1);
  auto* frequencies = arena.Take<float>(pairs);
  auto* turns = arena.Take<uint64_t>(pairs);
  if (scoring == nullptr) return nullptr;
  for (int64_t i = 0; i < pairs; ++i) {
    frequencies[i] = c.rope_frequencies[static_cast<size_t>(i)];
    turns[i] = TurnsOf(frequencies[i]);
  }
  *scoring = {.scoring = {.rotation = {turns, static_cast<int32_t>(pairs), static_cast<int32_t>(c.rope_layout)},
                          .without_position = true,
                          .value_norm = c.protection_score == ProtectionScore::kEnergyValue},
              .frequencies = frequencies};
  return scoring;
}

}  // namespace express::cache
