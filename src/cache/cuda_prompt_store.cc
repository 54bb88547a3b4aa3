// The end of a prompt: its entries go to their slots, or to the outputs of compress_kv.
#include <algorithm>
#include <limits>

#include "src/cache/cuda_prompt.h"

namespace express::cache {

// The entries of plan i that are not where they belong, and their places: slots, or ranks of slots in the output's order.
void PromptRun::ListEntries(int32_t i, EntryLists* lists) {
  const plan::Plan& p = plan(i).plan;
  const std::vector<int32_t>& nodes = span_->slot_nodes(i);
  const std::vector<int32_t>& joined = joined_[static_cast<size_t>(i)];
  const int64_t budget = p.setting().budget;
  ranks_.clear();
  int32_t live = 0;
  lists->weights.clear();
  for (int64_t slot = 0; slot < budget; ++slot) {
    const int64_t weight = p.weight(slot);
    if (output_ != nullptr) ranks_.push_back(live);
    live += weight > 0;
    if (output_ == nullptr || weight > 0)
      lists->weights.push_back(weight > 0 ? LogWeight(weight) : -std::numeric_limits<float>::infinity());
  }
  lists->code.clear();
  lists->to.clear();
  const auto put = [&](int32_t code, plan::Slot slot) {
    lists->code.push_back(code);
    lists->to.push_back(slot < 0 ? 0 : output_ != nullptr ? ranks_[static_cast<size_t>(slot)] : slot);
  };
  for (int64_t slot = 0; slot < budget; ++slot)
    if (nodes[static_cast<size_t>(slot)] != plan::Span::kNoNode)
      put(nodes[static_cast<size_t>(slot)], static_cast<plan::Slot>(slot));
  lists->nodes = static_cast<int32_t>(lists->code.size());
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
}

// The lists of plan i to the device; what has been listed for a plan that did the same is listed already.
void PromptRun::DescribeEntries(int32_t i) {
  const plan::Plan& p = plan(i).plan;
  const PlanMemory& m = plan_memory_[static_cast<size_t>(i)];
  PromptHost::Recording* recording = recording_[static_cast<size_t>(i)];
  EntryLists& lists = recording != nullptr ? recording->lists : lists_;
  if (recording == nullptr || !recording->listed) ListEntries(i, &lists);
  if (recording != nullptr) recording->listed = true;
  uploader_.Add(m.code, lists.code.data(), lists.code.size() * sizeof(int32_t));
  uploader_.Add(m.to, lists.to.data(), lists.to.size() * sizeof(int32_t));
  const auto weight_bytes = lists.weights.size() * sizeof(float);
  if (output_ != nullptr) uploader_.Add(m.weights, lists.weights.data(), weight_bytes);
  // A fresh cache's rows go where they go whatever is selected: their copies are not listed.
  const auto count = static_cast<int32_t>(lists.code.size()), protects = static_cast<int32_t>(p.protected_count());
  const int32_t listed = fresh() ? lists.nodes + protects : count;
  const cuda::SpanStorePlan store{
      .code = m.code,
      .to = m.to,
      .nodes = lists.nodes,
      .protects = protects,
      .count = listed,
      .protected_before = static_cast<int32_t>(begin_[static_cast<size_t>(i)].protected_count)};
  uploader_.Add(memory_.store_plans + i, &store, sizeof(store));
  most_listed_ = std::max(most_listed_, listed);
  most_rows_ = std::max(most_rows_, count - listed);
  const PlanState& state = plan(i);
  for (int32_t h = 0; h < state.head_count; ++h) {
    const int32_t kv_head = cache_.plans_.plan_heads[state.first_head + h] % cache_.config_.kv_heads;
    const cuda::Head& device = head(kv_head);
    if (output_ == nullptr && device.leader != 0) uploader_.Add(device.log_weight, lists.weights.data(), weight_bytes);
    DescribeCopies(kv_head, listed, count - listed);
  }
}

void PromptRun::DescribeCopies(int32_t g, int32_t listed, int32_t rows) {
  const HeadMemory& m = head_memory_[static_cast<size_t>(g)];
  const PlanMemory& of_plan = plan_memory_[static_cast<size_t>(PlanOf(g))];
  const cuda::Head& device = head(g);
  const bool in_place = output_ == nullptr;
  store_heads_[static_cast<size_t>(g)] = {.values = m.values[spans_ % 2],
                                          .protected_index = m.protected_index,
                                          .protected_slot = in_place ? device.protected_slot : nullptr,
                                          .index = m.index,
                                          .stage_index = m.stage_index,
                                          .to = m.to,
                                          .plan = PlanOf(g)};
  cuda::GatherHead& stage = stage_heads_[static_cast<size_t>(g)];
  stage = {.slab_key = device.key,
           .slab_value = device.value,
           .slab_scale = device.scale,
           .slab_position = device.position,
           .key = m.stage_key,
           .value = m.stage_value,
           .scale = m.stage_scale,
           .position = m.stage_position,
           .log_weight = nullptr,
           .index = m.stage_index,
           .to = nullptr,
           .weights = nullptr,
           .count = listed,
           .kv_head = g};
  cuda::GatherHead& gather = gather_heads_[static_cast<size_t>(g)];
  gather = stage;
  gather.slab_key = m.stage_key;
  gather.slab_value = m.stage_value;
  gather.slab_scale = m.stage_scale;
  gather.slab_position = m.stage_position;
  gather.index = m.index;
  gather.to = m.to;
  gather.row_index = of_plan.code + listed;
  gather.row_to = of_plan.to + listed;
  gather.rows = rows;
  gather.key = device.key;
  gather.value = device.value;
  gather.scale = device.scale;
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
  for (int32_t i = 0; i < plan_count(); ++i) DescribeEntries(i);
  const auto send = [&](auto* to, const auto& from) { uploader_.Add(to, from.data(), from.size() * sizeof(from[0])); };
  if (most_listed_ > 0) send(memory_.store_heads, store_heads_);
  if (output_ == nullptr && !fresh()) send(memory_.stage_heads, stage_heads_);
  send(memory_.gather_heads, gather_heads_);
}

// Of the listed entries, or of rows.
cuda::GatherArgs PromptRun::Copies(const cuda::GatherHead* heads, int32_t most, bool rows) const {
  const Config& c = cache_.config_;
  cuda::GatherArgs args{.heads = heads,
                        .head_count = c.kv_heads,
                        .most_count = most,
                        .key_dim = c.key_dim,
                        .value_dim = c.value_dim,
                        .dtype = c.dtype,
                        .key_dtype = c.dtype,
                        .value_dtype = c.dtype,
                        .key_stride = c.key_dim,
                        .value_stride = c.value_dim,
                        .position_stride = 1,
                        .log_weight_stride = 1,
                        .k = stored_k_,
                        .v = stored_v_,
                        .first_position = first_position_,
                        .rows = rows};
  if (output_ == nullptr || heads == memory_.stage_heads) return args;
  args.key_dtype = output_->k.dtype;
  args.value_dtype = output_->v.dtype;
  args.key_stride = output_->k.stride[1];
  args.value_stride = output_->v.stride[1];
  args.position_stride = output_->position != nullptr ? output_->position->stride[1] : 0;
  args.log_weight_stride = output_->log_weight.stride[1];
  return args;
}

// The copies that wait for nothing.
void PromptRun::StoreRows(cudaStream_t stream) { cuda::Gather(Copies(memory_.gather_heads, most_rows_, true), stream); }

// And those that the selection decides upon.
void PromptRun::Store() {
  if (most_listed_ == 0) return;
  const cuda::GatherArgs copies = Copies(memory_.gather_heads, most_listed_, false);
  if (output_ != nullptr || fresh())
    return cuda::SpanStoreCopies(memory_.store_plans, memory_.store_heads, copies, graph_);
  cuda::SpanStore(memory_.store_plans, memory_.store_heads, cache_.config_.kv_heads, most_listed_, graph_);
  cuda::Gather(Copies(memory_.stage_heads, most_listed_, false), graph_);
  cuda::Gather(copies, graph_);
}

}  // namespace express::cache
