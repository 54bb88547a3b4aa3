// What a prompt on the GPU tells the device: where things are, and the graphs of its spans.
#include <algorithm>

#include "src/cache/cuda_prompt.h"

namespace express::cache {

// What holds for the whole call, if there is anything to select.
void PromptRun::Describe() {
  const bool one_span = SpanEnd(0) == input_.tokens;
  if (one_span && !Selects()) return;
  const int64_t parities = one_span ? 1 : shape_.parities;
  for (int32_t i = 0; i < plan_count(); ++i) DescribePlan(i, parities);
  for (int32_t parity = 0; parity < (one_span ? 1 : 2); ++parity) DescribeHeads(parity);
}

void PromptRun::DescribePlan(int32_t i, int64_t parities) {
  const PlanState& state = plan(i);
  const PlanMemory& m = plan_memory_[static_cast<size_t>(i)];
  const Begin& begin = begin_[static_cast<size_t>(i)];
  for (int64_t parity = 0; parity < parities; ++parity) {
    const cuda::SpanPlan span_plan{.heads = m.heads,
                                   .sink_index = m.sink_index,
                                   .old_tail = m.old_tail,
                                   .source = m.source,
                                   .blocks = m.blocks[parity],
                                   .slot_nodes = m.slot_nodes,
                                   .head_count = state.head_count,
                                   .budget = static_cast<int32_t>(state.plan.setting().budget)};
    uploader_.Add(memory_.graph[parity].plans + i, &span_plan, sizeof(span_plan));
  }
  const auto send = [&](int32_t* to, const std::vector<int32_t>& from) {
    uploader_.Add(to, from.data(), from.size() * sizeof(int32_t));
  };
  send(m.old_tail, begin.old_tail);
  ints_.clear();
  for (const int32_t slot : begin.old_tail) ints_.push_back(-1 - slot);
  send(m.source, ints_);
  ints_.clear();
  for (int64_t j = 0; j < state.plan.setting().sinks; ++j)  // a sink's slot is known once it is written
    ints_.push_back(j < first_position_ ? -1 - state.plan.sink_slot(j) : static_cast<int32_t>(j - first_position_));
  send(m.sink_index, ints_);
  ints_.clear();
  for (int32_t h = 0; h < state.head_count; ++h)
    ints_.push_back(cache_.plans_.plan_heads[state.first_head + h] % cache_.config_.kv_heads);
  send(m.heads, ints_);
}

// For spans of this parity.
void PromptRun::DescribeHeads(int32_t parity) {
  const int32_t kv_heads = cache_.config_.kv_heads;
  admit_.clear();
  span_heads_.clear();
  prefill_heads_.clear();
  for (int32_t i = 0; i < plan_count(); ++i)
    for (int32_t h = 0; h < plan(i).head_count; ++h) {
      const int32_t kv_head = cache_.plans_.plan_heads[plan(i).first_head + h] % kv_heads;
      const HeadMemory& m = head_memory_[static_cast<size_t>(kv_head)];
      const cuda::Head& device = head(kv_head);
      admit_.push_back({.slab_key = device.key,
                        .slab_value = device.value,
                        .slab_scale = device.scale,
                        .slab_position = device.position,
                        .mean = device.mean,
                        .sum = device.sum,
                        .score = device.score,
                        .protected_count = device.protected_count,
                        .protected_index = m.protected_index,
                        .source = plan_memory_[static_cast<size_t>(i)].source,
                        .scores = m.scores,
                        .run_means = m.run_means,
                        .loser = m.values[parity] + plan(i).plan.setting().budget,
                        .snapshots = m.snapshots[parity % shape_.parities],
                        .protect = device.protect,
                        .kv_head = kv_head});
    }
  for (int32_t g = 0; g < kv_heads; ++g) {
    const HeadMemory& m = head_memory_[static_cast<size_t>(g)];
    const cuda::Head& device = head(g);
    const plan::Setting& setting = plan(PlanOf(g)).plan.setting();
    span_heads_.push_back({.slab_key = device.key,
                           .slab_value = device.value,
                           .slab_scale = device.scale,
                           .values = m.values[parity],
                           .previous = m.values[1 - parity],
                           .snapshots = m.snapshots[parity % shape_.parities],
                           .far_index = m.far_index[parity],
                           .far_bias = m.far_bias[parity],
                           .far_count = m.far_count[parity],
                           .keep = m.keep,
                           .halve_scratch = m.halve_scratch,
                           .far_capacity = device.capacity,
                           .protect = device.protect,
                           .plan = PlanOf(g),
                           .stream = device.stream});
    if (IsExact(PlanOf(g))) {  // beside heads that are not: nothing is far, and the exact tail begins at row 0
      cuda::PrefillHead& head_of_all = prefill_heads_.emplace_back();
      head_of_all.tail = static_cast<int32_t>(input_.tokens);
      continue;
    }
    const int64_t copied = g * memory_.slab_rows * SizeOf(k_.dtype);
    prefill_heads_.push_back(
        {.slab_key = scaled() ? memory_.slab_keys + copied * cache_.config_.key_dim : device.key,
         .slab_value = scaled() ? memory_.slab_values + copied * cache_.config_.value_dim : device.value,
         .far_index = m.far_index[parity],
         .far_bias = m.far_bias[parity],
         .far_count = m.far_count[parity],
         .far_capacity = device.capacity,
         .sinks = static_cast<int32_t>(setting.sinks),
         .tail = static_cast<int32_t>(setting.tail())});
  }
  const auto send = [&](auto* to, const auto& from) {
    uploader_.Add(to + parity * kv_heads, from.data(), from.size() * sizeof(from[0]));
  };
  send(memory_.admit_heads, admit_);
  send(memory_.span_heads, span_heads_);
  const bool all_early = exact_ || (spans_ == 0 && early_ == static_cast<int32_t>(span_->snapshots(0).size()) &&
                                    SpanEnd(0) == input_.tokens);
  if (block_ > 0 && !all_early) send(memory_.prefill_heads, prefill_heads_);
}

// The graph of the span that begins at row `first`.
void PromptRun::DescribeSpan(int64_t first) {
  const auto send = [&](auto* to, const auto& from) { uploader_.Add(to, from.data(), from.size() * sizeof(from[0])); };
  const int64_t parity = spans_ % shape_.parities;
  const GraphMemory& graph = memory_.graph[parity];
  send(graph.samples, span_->samples());
  send(graph.halves, span_->halves());
  send(graph.list, span_->list());
  send(graph.items, span_->items());
  if (!exact_) send(graph.members, span_->members());
  for (int32_t i = 0; i < plan_count(); ++i) {
    const PlanMemory& m = plan_memory_[static_cast<size_t>(i)];
    const plan::Setting& setting = plan(i).plan.setting();
    const Begin& begin = begin_[static_cast<size_t>(i)];
    const auto old = static_cast<int64_t>(begin.old_tail.size());
    blocks_.clear();
    ints_.clear();
    int64_t position = first_position_ + first;
    for (const plan::SpanSnapshot& snapshot : span_->snapshots(i)) {
      // The old tail holds positions [first_position - old, first_position); of them the exact tail still has the last.
      const int64_t exact = std::max(setting.sinks, position - setting.tail());
      const int64_t left = std::clamp<int64_t>(first_position_ - exact, 0, old);
      blocks_.push_back({.member_begin = snapshot.begin,
                         .members = snapshot.count,
                         .protected_count = snapshot.protected_count,
                         .sinks = static_cast<int32_t>(std::min(setting.sinks, position)),
                         .old_tail_begin = static_cast<int32_t>(old - left),
                         .old_tail = static_cast<int32_t>(left)});
      ints_.push_back(snapshot.departures);
      position = block_ > 0 ? (position / block_ + 1) * block_ : position;
    }
    if (!exact_) send(m.blocks[parity], blocks_), send(m.snapshot_at, ints_);
    const cuda::SpanDepartures departures{.count = span_->departures(i),
                                          .source_begin = std::min(old, begin.departures),
                                          .sources = std::max<int64_t>(0, old - begin.departures),
                                          .first_row = FirstRow(i),
                                          .nodes = span_->nodes(i)};
    uploader_.Add(memory_.departures + i, &departures, sizeof(departures));
  }
}

}  // namespace express::cache
