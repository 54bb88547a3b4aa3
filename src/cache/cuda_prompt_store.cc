// The end of a prompt: its entries go to their slots, or to the outputs of compress_kv.
#include <algorithm>
#include <limits>

#include "src/cache/cuda_prompt.h"

namespace express::cache {

// The entries of plan i that are not where they belong, and their places: slots, or ranks of slots in the output's order.
void PromptRun::ListEntries(int32_t i) {
  const plan::Plan& p = plan(i).plan;
  const PlanMemory& m = plan_memory_[static_cast<size_t>(i)];
  const std::vector<int32_t>& nodes = span_->slot_nodes(i);
  const std::vector<int32_t>& joined = joined_[static_cast<size_t>(i)];
  const int64_t budget = p.setting().budget;
  std::vector<int32_t>& rank = ranks_;
  rank.clear();
  int32_t live = 0;
  floats_.clear();
  for (int64_t slot = 0; slot < budget; ++slot) {
    const int64_t weight = p.weight(slot);
    rank.push_back(output_ != nullptr ? live : static_cast<int32_t>(slot));
    live += weight > 0;
    if (output_ == nullptr || weight > 0)
      floats_.push_back(weight > 0 ? LogWeight(weight) : -std::numeric_limits<float>::infinity());
  }
  ints_.clear();
  more_ints_.clear();
  const auto put = [&](int32_t code, plan::Slot slot) {
    ints_.push_back(code);
    more_ints_.push_back(slot < 0 ? 0 : rank[static_cast<size_t>(slot)]);
  };
  for (int64_t slot = 0; slot < budget; ++slot)
    if (nodes[static_cast<size_t>(slot)] != plan::Span::kNoNode)
      put(nodes[static_cast<size_t>(slot)], static_cast<plan::Slot>(slot));
  const auto node_count = static_cast<int32_t>(ints_.size());
  // Slots of protected entries from before this call are known to the device.
  const int64_t before = begin_[static_cast<size_t>(i)].protected_count;
  for (int64_t j = 0; j < p.protected_count(); ++j)
    put(static_cast<int32_t>(j), j < before ? plan::kNoSlot : joined[static_cast<size_t>(j - before)]);
  for (int64_t j = 0; j < p.sink_count(); ++j)
    if (j >= first_position_) put(static_cast<int32_t>(j - first_position_), p.sink_slot(j));
  for (int64_t j = 0; j < p.tail_count(); ++j) {
    const int64_t row = p.tokens() - p.tail_count() + j - first_position_;
    if (row >= 0) put(static_cast<int32_t>(row), p.tail_slot(j));
  }
  uploader_.Add(m.code, ints_.data(), ints_.size() * sizeof(int32_t));
  uploader_.Add(m.to, more_ints_.data(), more_ints_.size() * sizeof(int32_t));
  uploader_.Add(m.weights, floats_.data(), floats_.size() * sizeof(float));
  const cuda::SpanStorePlan store{.code = m.code,
                                  .to = m.to,
                                  .nodes = node_count,
                                  .protects = static_cast<int32_t>(p.protected_count()),
                                  .count = static_cast<int32_t>(ints_.size()),
                                  .protected_before = static_cast<int32_t>(before)};
  uploader_.Add(memory_.store_plans + i, &store, sizeof(store));
  // Without nodes and protected entries a fresh cache holds rows alone, and it is known here which.
  const bool plain = fresh() && node_count == 0 && store.protects == 0;
  store_lists_ |= !plain;
  const PlanState& state = plan(i);
  for (int32_t h = 0; h < state.head_count; ++h) {
    const int32_t kv_head = cache_.plans_.plan_heads[state.first_head + h] % cache_.config_.kv_heads;
    const cuda::Head& device = head(kv_head);
    if (output_ == nullptr && device.leader != 0)
      uploader_.Add(device.log_weight, floats_.data(), floats_.size() * sizeof(float));
    DescribeCopies(kv_head, store.count, plain);
  }
}

void PromptRun::DescribeCopies(int32_t g, int32_t count, bool plain) {
  const HeadMemory& m = head_memory_[static_cast<size_t>(g)];
  const PlanMemory& of_plan = plan_memory_[static_cast<size_t>(PlanOf(g))];
  const cuda::Head& device = head(g);
  const bool in_place = output_ == nullptr;
  store_heads_[static_cast<size_t>(g)] = {.values = m.values[spans_ % 2],
                                          .protected_index = m.protected_index,
                                          .protected_slot = in_place ? device.protected_slot : nullptr,
                                          .index = m.index,
                                          .stage_index = in_place && !fresh() ? m.stage_index : nullptr,
                                          .to = m.to,
                                          .plan = PlanOf(g)};
  cuda::GatherHead& stage = stage_heads_[static_cast<size_t>(g)];
  stage = {.slab_key = device.key,
           .slab_value = device.value,
           .slab_position = device.position,
           .key = m.stage_key,
           .value = m.stage_value,
           .position = m.stage_position,
           .log_weight = nullptr,
           .index = m.stage_index,
           .to = nullptr,
           .weights = nullptr,
           .count = count,
           .kv_head = g};
  cuda::GatherHead& gather = gather_heads_[static_cast<size_t>(g)];
  gather = stage;
  gather.slab_key = m.stage_key;
  gather.slab_value = m.stage_value;
  gather.slab_position = m.stage_position;
  gather.index = plain ? of_plan.code : m.index;
  gather.to = plain ? of_plan.to : m.to;
  gather.key = device.key;
  gather.value = device.value;
  gather.position = device.position;
  if (in_place) return;
  gather.key = output_->k.At(g);
  gather.value = output_->v.At(g);
  gather.position = output_->position != nullptr ? static_cast<int64_t*>(output_->position->At(g)) : nullptr;
  gather.log_weight = static_cast<float*>(output_->log_weight.At(g));
  gather.weights = of_plan.weights;
}

// Every entry to its slot, or to the caller's output: the lists.
void PromptRun::DescribeStore() {
  for (int32_t i = 0; i < plan_count(); ++i) {
    ListEntries(i);
    most_entries_ = std::max(most_entries_, static_cast<int32_t>(ints_.size()));
  }
  const auto send = [&](auto* to, const auto& from) { uploader_.Add(to, from.data(), from.size() * sizeof(from[0])); };
  if (store_lists_) send(memory_.store_heads, store_heads_);
  if (output_ == nullptr && !fresh()) send(memory_.stage_heads, stage_heads_);
  send(memory_.gather_heads, gather_heads_);
}

// And the copies.
void PromptRun::Store() {
  const Config& c = cache_.config_;
  if (most_entries_ == 0) return;
  if (store_lists_) cuda::SpanStore(memory_.store_plans, memory_.store_heads, c.kv_heads, most_entries_, graph_);
  cuda::GatherArgs args{.heads = memory_.stage_heads,
                        .head_count = c.kv_heads,
                        .most_count = most_entries_,
                        .key_dim = c.key_dim,
                        .value_dim = c.value_dim,
                        .dtype = c.dtype,
                        .key_dtype = c.dtype,
                        .value_dtype = c.dtype,
                        .key_stride = c.key_dim,
                        .value_stride = c.value_dim,
                        .position_stride = 1,
                        .log_weight_stride = 1,
                        .k = k_,
                        .v = v_,
                        .first_position = first_position_};
  if (output_ == nullptr && !fresh()) cuda::Gather(args, graph_);
  args.heads = memory_.gather_heads;
  if (output_ != nullptr) {
    args.key_dtype = output_->k.dtype;
    args.value_dtype = output_->v.dtype;
    args.key_stride = output_->k.stride[1];
    args.value_stride = output_->v.stride[1];
    args.position_stride = output_->position != nullptr ? output_->position->stride[1] : 0;
    args.log_weight_stride = output_->log_weight.stride[1];
  }
  cuda::Gather(args, graph_);
}

}  // namespace express::cache
