#include "src/cache/cuda_prompt.h"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "src/cache/message.h"

namespace express::cache {
namespace {

static_assert(sizeof(plan::SpanSample) == sizeof(cuda::SpanSample) &&
              sizeof(plan::SpanHalve) == sizeof(cuda::SpanHalve) &&
              sizeof(plan::SpanMember) == sizeof(cuda::SpanMember));
static_assert(offsetof(plan::SpanSample, out) == offsetof(cuda::SpanSample, out) &&
              offsetof(plan::SpanHalve, out) == offsetof(cuda::SpanHalve, out) &&
              offsetof(plan::SpanMember, log_weight) == offsetof(cuda::SpanMember, log_weight));
static_assert(plan::Span::kNoNode == cuda::kNoNode);

int64_t MostBudget(const Plans& plans) {
  int64_t most = 0;
  for (int32_t i = 0; i < plans.plan_count; ++i) most = std::max(most, plans.plans[i].plan.setting().budget);
  return most;
}

}  // namespace

PromptRun::Shape PromptRun::ShapeOf(const Config&, int64_t most_budget, int64_t tokens, int64_t block) {
  // Short prompts in a few spans too, so that there is something to overlap.
  const int64_t wanted = std::max<int64_t>(2048, (tokens / 4 + 2047) / 2048 * 2048);
  const int64_t span = block > 0 ? std::min({tokens, kSpan, (std::max(wanted, block) + block - 1) / block * block})
                                 : std::min(tokens, kSpan),
                blocks = block > 0 ? span / block + 2 : 1;
  const plan::Span::Bounds bound = plan::Span::Bound(most_budget, span, blocks);
  return {span, blocks, bound.nodes, bound.samples, bound.halves, bound.list, bound.members};
}

// Every head counts with the largest setting, so that layers need the same.
void PromptRun::Layout(const CudaCache& cache, const Shape& s, bool attention, Arena& arena, Memory* memory,
                       std::vector<PlanMemory>* plans, std::vector<HeadMemory>* heads) {
  const Config& c = cache.config_;
  const int64_t element = SizeOf(c.dtype), kv = c.kv_heads;
  int64_t most_plans = 0;  // of one layer
  for (int32_t layer = 0; layer < c.layers; ++layer)
    most_plans = std::max<int64_t>(most_plans, cache.end_plan(layer) - cache.first_plan(layer));
  int64_t budget = 0, protect = 0, sinks = 0, tail = 0;
  for (int32_t i = 0; i < cache.plans_.plan_count; ++i) {
    const plan::Setting& setting = cache.plans_.plans[i].plan.setting();
    budget = std::max(budget, setting.budget);
    protect = std::max(protect, setting.protect);
    sinks = std::max(sinks, setting.sinks);
    tail = std::max(tail, setting.tail());
  }
  memory->plans = arena.Take<cuda::SpanPlan>(kv);
  memory->span_heads = arena.Take<cuda::SpanHead>(2 * kv);
  memory->admit_heads = arena.Take<cuda::AdmitHead>(kv);
  memory->prefill_heads = arena.Take<cuda::PrefillHead>(2 * kv);
  memory->gather_heads = arena.Take<cuda::GatherHead>(kv);
  memory->stage_heads = arena.Take<cuda::GatherHead>(kv);
  memory->samples = arena.Take<cuda::SpanSample>(most_plans * s.samples);
  memory->halves = arena.Take<cuda::SpanHalve>(most_plans * s.halves);
  memory->list = arena.Take<int32_t>(most_plans * s.list);
  memory->members = arena.Take<cuda::SpanMember>(most_plans * s.members);
  memory->departures = arena.Take<cuda::SpanDepartures>(most_plans);
  memory->store_plans = arena.Take<cuda::SpanStorePlan>(most_plans);
  memory->store_heads = arena.Take<cuda::SpanStoreHead>(kv);
  for (int64_t i = 0; i < most_plans; ++i) {
    PlanMemory p{};
    p.heads = arena.Take<int32_t>(kv);
    p.sink_index = arena.Take<int32_t>(sinks);
    p.old_tail = arena.Take<int32_t>(tail);
    p.slot_nodes = arena.Take<int32_t>(budget);
    p.snapshot_at = arena.Take<int32_t>(s.blocks);
    p.blocks = arena.Take<cuda::SpanBlock>(s.blocks);
    p.code = arena.Take<int32_t>(budget);
    p.to = arena.Take<int32_t>(budget);
    p.weights = arena.Take<float>(budget);
    if (plans != nullptr) plans->push_back(p);
  }
  for (int64_t i = 0; i < kv; ++i) {
    HeadMemory h{};
    for (int32_t*& values : h.values) values = arena.Take<int32_t>(s.nodes);
    h.snapshots = arena.Take<int32_t>(s.blocks * protect);
    if (attention) {
      for (int parity = 0; parity < 2; ++parity) {
        h.far_index[parity] = arena.Take<int32_t>(s.blocks * budget);
        h.far_bias[parity] = arena.Take<float>(s.blocks * budget);
        h.far_count[parity] = arena.Take<int32_t>(s.blocks);
      }
    }
    h.protected_index = arena.Take<int32_t>(protect);
    h.scores = arena.Take<float>(s.span);
    h.run_means = arena.Take<float>((s.span / 256 + 4) * c.key_dim);
    h.source = arena.Take<int32_t>(tail);
    h.keep = arena.Take<uint8_t>(most_plans * s.list);
    h.halve_scratch = arena.Take<char>(static_cast<int64_t>(cuda::SpanScratch(most_plans * s.list)));
    h.index = arena.Take<int32_t>(budget);
    h.to = arena.Take<int32_t>(budget);
    h.stage_index = arena.Take<int32_t>(budget);
    h.stage_key = arena.Take<char>(budget * c.key_dim * element);
    h.stage_value = arena.Take<char>(budget * c.value_dim * element);
    h.stage_position = arena.Take<int64_t>(budget);
    if (heads != nullptr) heads->push_back(h);
  }
}

int64_t PromptRun::Bytes(const CudaCache& cache, int64_t tokens, bool attention) {
  Arena arena;
  Memory memory;
  const int64_t block = attention ? cache.config_.prefill_block : 0;
  Layout(cache, ShapeOf(cache.config_, MostBudget(cache.plans_), tokens, block), attention, arena, &memory, nullptr,
         nullptr);
  return arena.overflow() ? std::numeric_limits<int64_t>::max() : static_cast<int64_t>(arena.used());
}

PromptRun::PromptRun(CudaCache& cache, int32_t layer, const Input& input, const CudaCache::Queries* queries,
                     void* workspace)
    : cache_(cache),
      layer_(layer),
      input_(input),
      queries_(queries),
      workspace_(workspace),
      k_(cache.RowsOf(input, input.k, layer)),
      v_(cache.RowsOf(input, input.v, layer)),
      first_position_(cache.LayerTokens(layer)),
      block_(queries != nullptr ? cache.config_.prefill_block : 0),
      shape_(ShapeOf(cache.config_, MostBudget(cache.plans_), input.tokens, block_)),
      side_(queries != nullptr ? cache.side_.stream : cache.stream_),
      uploader_(side_) {}

int32_t PromptRun::PlanOf(int32_t kv_head) const { return head(kv_head).plan - cache_.first_plan(layer_); }
const cuda::Head& PromptRun::head(int32_t kv_head) const {
  return cache_.parts_.head_copies[layer_ * cache_.config_.kv_heads + kv_head];
}

void PromptRun::Reserve() {
  Arena arena(workspace_);
  Layout(cache_, shape_, block_ > 0, arena, &memory_, &plan_memory_, &head_memory_);
  std::vector<const plan::Plan*> plans;
  begin_.resize(static_cast<size_t>(plan_count()));
  joined_.resize(static_cast<size_t>(plan_count()));
  for (int32_t i = 0; i < plan_count(); ++i) {
    const plan::Plan& p = plan(i).plan;
    plans.push_back(&p);
    Begin& begin = begin_[static_cast<size_t>(i)];
    for (int64_t j = 0; j < p.tail_count(); ++j) begin.old_tail.push_back(p.tail_slot(j));
    begin.first_departures = p.departures();
    begin.protected_count = p.protected_count();
    joined_[static_cast<size_t>(i)].reserve(static_cast<size_t>(p.setting().protect));
  }
  span_.Reset(plans, shape_.span, shape_.blocks);
  blocks_.reserve(static_cast<size_t>(shape_.blocks));
  const int64_t most = MostBudget(cache_.plans_);
  ints_.reserve(static_cast<size_t>(std::max(most, shape_.blocks)));
  more_ints_.reserve(static_cast<size_t>(most));
  admit_.reserve(static_cast<size_t>(cache_.config_.kv_heads));
  floats_.reserve(static_cast<size_t>(most));
}

// The descriptions that hold for the whole call.
void PromptRun::Describe() {
  const Config& c = cache_.config_;
  for (int32_t i = 0; i < plan_count(); ++i) {
    const PlanState& state = plan(i);
    const PlanMemory& m = plan_memory_[static_cast<size_t>(i)];
    const Begin& begin = begin_[static_cast<size_t>(i)];
    const cuda::SpanPlan span_plan{m.heads,
                                   m.sink_index,
                                   m.old_tail,
                                   m.blocks,
                                   m.slot_nodes,
                                   state.head_count,
                                   static_cast<int32_t>(state.plan.setting().budget)};
    uploader_.Add(memory_.plans + i, &span_plan, sizeof(span_plan));
    uploader_.Add(m.old_tail, begin.old_tail.data(), begin.old_tail.size() * sizeof(int32_t));
    ints_.clear();
    for (int64_t j = 0; j < state.plan.setting().sinks; ++j)  // a sink's slot is known once it is written
      ints_.push_back(j < first_position_ ? -1 - state.plan.sink_slot(j) : static_cast<int32_t>(j - first_position_));
    uploader_.Add(m.sink_index, ints_.data(), ints_.size() * sizeof(int32_t));
    ints_.clear();
    for (const int32_t slot : begin.old_tail) ints_.push_back(-1 - slot);
    for (int32_t h = 0; h < state.head_count; ++h) {
      const int32_t kv_head = cache_.plans_.plan_heads[state.first_head + h] % c.kv_heads;
      uploader_.Add(m.heads + h, &kv_head, sizeof(kv_head));
      const HeadMemory& hm = head_memory_[static_cast<size_t>(kv_head)];
      const cuda::Head& device = head(kv_head);
      uploader_.Add(hm.source, ints_.data(), ints_.size() * sizeof(int32_t));
      admit_.push_back({.slab_key = device.key,
                        .slab_position = device.position,
                        .mean = device.mean,
                        .sum = device.sum,
                        .score = device.score,
                        .protected_count = device.protected_count,
                        .protected_index = hm.protected_index,
                        .source = hm.source,
                        .scores = hm.scores,
                        .run_means = hm.run_means,
                        .loser = nullptr,
                        .snapshots = hm.snapshots,
                        .protect = device.protect,
                        .kv_head = kv_head});
    }
  }
  uploader_.Add(memory_.admit_heads, admit_.data(), admit_.size() * sizeof(cuda::AdmitHead));
  for (int32_t parity = 0; parity < 2; ++parity) {
    for (int32_t g = 0; g < c.kv_heads; ++g) {
      const HeadMemory& m = head_memory_[static_cast<size_t>(g)];
      const cuda::Head& device = head(g);
      const cuda::SpanHead span_head{.slab_key = device.key,
                                     .slab_value = device.value,
                                     .values = m.values[parity],
                                     .previous = m.values[1 - parity],
                                     .snapshots = m.snapshots,
                                     .source = m.source,
                                     .far_index = m.far_index[parity],
                                     .far_bias = m.far_bias[parity],
                                     .far_count = m.far_count[parity],
                                     .keep = m.keep,
                                     .halve_scratch = m.halve_scratch,
                                     .far_capacity = device.capacity,
                                     .protect = device.protect,
                                     .plan = PlanOf(g),
                                     .stream = device.stream};
      uploader_.Add(memory_.span_heads + parity * c.kv_heads + g, &span_head, sizeof(span_head));
    }
  }
  for (int32_t i = 0; i < 2 * c.kv_heads && block_ > 0; ++i) {
    const int32_t parity = i / c.kv_heads, g = i % c.kv_heads;
    const HeadMemory& m = head_memory_[static_cast<size_t>(g)];
    const cuda::Head& device = head(g);
    const plan::Setting& setting = plan(PlanOf(g)).plan.setting();
    const cuda::PrefillHead prefill{.slab_key = device.key,
                                    .slab_value = device.value,
                                    .far_index = m.far_index[parity],
                                    .far_bias = m.far_bias[parity],
                                    .far_count = m.far_count[parity],
                                    .far_capacity = device.capacity,
                                    .sinks = static_cast<int32_t>(setting.sinks),
                                    .tail = static_cast<int32_t>(setting.tail())};
    uploader_.Add(memory_.prefill_heads + i, &prefill, sizeof(prefill));
  }
  uploader_.Flush();
  cuda::AdmitBegin(memory_.admit_heads, c.kv_heads, cache_.parts_.heads + layer_ * c.kv_heads, side_);
}

cuda::SpanArgs PromptRun::Arguments() const {
  const Config& c = cache_.config_;
  int32_t most_heads = 0;
  for (int32_t i = 0; i < plan_count(); ++i) most_heads = std::max(most_heads, plan(i).head_count);
  return {.plans = memory_.plans,
          .heads = memory_.span_heads + spans_ % 2 * c.kv_heads,
          .samples = memory_.samples,
          .halves = memory_.halves,
          .list = memory_.list,
          .members = memory_.members,
          .plan_count = plan_count(),
          .kv_heads = c.kv_heads,
          .most_heads = most_heads,
          .first_span = spans_ == 0,
          .key_dim = c.key_dim,
          .value_dim = c.value_dim,
          .dtype = c.dtype,
          .k = k_,
          .v = v_,
          .halve = cache_.Halve(),
          .exponent = static_cast<float>(c.weight_exponent)};
}

// The graph of the span to the device.
void PromptRun::SendSpan(int64_t first, int64_t) {
  const auto send = [&](auto* to, const auto& from) { uploader_.Add(to, from.data(), from.size() * sizeof(from[0])); };
  send(memory_.samples, span_.samples());
  send(memory_.halves, span_.halves());
  send(memory_.list, span_.list());
  send(memory_.members, span_.members());
  for (int32_t i = 0; i < plan_count(); ++i) {
    const PlanMemory& m = plan_memory_[static_cast<size_t>(i)];
    const plan::Setting& setting = plan(i).plan.setting();
    const auto old = static_cast<int64_t>(begin_[static_cast<size_t>(i)].old_tail.size());
    blocks_.clear();
    ints_.clear();
    int64_t position = first_position_ + first;
    for (const plan::SpanSnapshot& snapshot : span_.snapshots(i)) {
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
    send(m.blocks, blocks_);
    send(m.snapshot_at, ints_);
  }
}

void PromptRun::LaunchAdmit(int32_t i, int64_t departures) {
  const Config& c = cache_.config_;
  PlanState& state = plan(i);
  const int64_t protect = state.plan.setting().protect;
  Begin& begin = begin_[static_cast<size_t>(i)];
  if (protect == 0) return;
  const int64_t begun = begin.first_departures + begin.departures;
  const auto old = static_cast<int64_t>(begin.old_tail.size());
  const int32_t first_admit = state.first_head - plan(0).first_head;
  for (int32_t h = 0; h < state.head_count; ++h) {
    cuda::AdmitHead& a = admit_[static_cast<size_t>(first_admit + h)];
    const HeadMemory& m = head_memory_[static_cast<size_t>(a.kv_head)];
    a.loser = m.values[spans_ % 2] + state.plan.setting().budget;
    a.source = m.source + std::min(old, begin.departures);
    uploader_.Add(memory_.admit_heads + first_admit + h, &a, sizeof(a));
  }
  uploader_.Flush();
  const int64_t sources = std::max<int64_t>(0, old - begin.departures);
  cuda::Admit({.heads = memory_.admit_heads + first_admit,
               .head_count = state.head_count,
               .key_dim = c.key_dim,
               .protect = static_cast<int32_t>(protect),
               .dtype = c.dtype,
               .k = k_,
               .first = begun,
               .count = departures,
               .source_count = sources,
               .centre = begun == 0 && departures > 0 ? state.plan.setting().tail() : 0,
               .first_row = FirstRow(i),
               .first_position = first_position_,
               .snapshot_at = plan_memory_[static_cast<size_t>(i)].snapshot_at,
               .snapshots = static_cast<int32_t>(span_.snapshots(i).size())},
              side_);
}

// The row of the first departure that no old tail entry is, from the span's first departure on.
int64_t PromptRun::FirstRow(int32_t i) const {
  const Begin& begin = begin_[static_cast<size_t>(i)];
  const auto old = static_cast<int64_t>(begin.old_tail.size());
  // Rows depart in order behind the old tail; rows that are sinks never do.
  const int64_t sinks = std::max<int64_t>(0, plan(i).plan.setting().sinks - first_position_);
  return sinks + std::max<int64_t>(0, begin.departures - old);
}

void PromptRun::LaunchAttention(int64_t first, int64_t tokens) {
  const Config& c = cache_.config_;
  const auto rows = [](const Array& a) { return cuda::Rows{a.data, a.stride[0], a.stride[1], a.dtype}; };
  const int64_t base = first_position_ / block_, position = first_position_ + first;
  cuda::Prefill({.heads = memory_.prefill_heads + spans_ % 2 * c.kv_heads,
                 .kv_heads = c.kv_heads,
                 .group = c.query_heads / c.kv_heads,
                 .key_dim = c.key_dim,
                 .value_dim = c.value_dim,
                 .dtype = c.dtype,
                 .q = rows(queries_->q),
                 .k = k_,
                 .v = v_,
                 .out = rows(queries_->out),
                 .lse = queries_->has_lse ? reinterpret_cast<float*>(queries_->lse.data) : nullptr,
                 .lse_row_stride = queries_->lse.stride[0],
                 .lse_head_stride = queries_->lse.stride[1],
                 .tokens = first + tokens,
                 .first_position = first_position_,
                 .block = static_cast<int32_t>(block_),
                 .block_offset = static_cast<int32_t>(first_position_ % block_),
                 .first_block = position / block_ - base,
                 .blocks = (position + tokens - 1) / block_ - position / block_ + 1,
                 .scale = static_cast<float>(c.scale)},
                cache_.traits_.compute_capability, cache_.traits_.multiprocessors, cache_.stream_);
}

// Rows [first, first + tokens). Spans end where blocks end.
void PromptRun::RunSpan(int64_t first, int64_t tokens) {
  span_.Begin();
  for (int32_t i = 0; i < plan_count(); ++i) span_.Record(i, plan(i).plan, tokens, block_, cache_.plans_.operations);
  span_.Finish(cuda::kSpanClasses);
  for (const plan::SpanJoin& join : span_.joins()) joined_[static_cast<size_t>(join.plan)].push_back(join.slot);
  SendSpan(first, tokens);
  uploader_.Flush();
  const cuda::SpanArgs args = Arguments();
  int64_t most_budget = 0;
  for (int32_t i = 0; i < plan_count(); ++i) {
    LaunchAdmit(i, span_.departures(i));
    most_budget = std::max(most_budget, plan(i).plan.setting().budget);
  }
  for (int32_t i = 0; i < plan_count(); ++i) {
    const Begin& begin = begin_[static_cast<size_t>(i)];
    const auto old = static_cast<int64_t>(begin.old_tail.size());
    const cuda::SpanDepartures departures{span_.departures(i), std::min(old, begin.departures),
                                          std::max<int64_t>(0, old - begin.departures), FirstRow(i)};
    uploader_.Add(memory_.departures + i, &departures, sizeof(departures));
  }
  uploader_.Flush();
  cuda::SpanBegin(args, memory_.departures, most_budget + tokens, side_);
  for (int32_t depth = 1; depth <= span_.depths(); ++depth) {
    cuda::SpanSamples(args, span_.sample_begin(depth), span_.sample_begin(depth + 1), side_);
    for (int32_t c = 0; c < plan::Span::kClasses; ++c)
      cuda::SpanHalvings(args, span_.halve_begin(depth, c), span_.halve_begin(depth, c + 1), c, side_);
  }
  if (block_ > 0) {
    // The attention of two spans ago has read the lists that are written now.
    if (spans_ >= 2) cudaStreamWaitEvent(side_, cache_.side_.attended[spans_ % 2], 0);
    cuda::SpanFar(args, static_cast<int32_t>(span_.snapshots(0).size()), side_);
    Follow(side_, cache_.side_.selected[spans_ % 2], cache_.stream_);
    LaunchAttention(first, tokens);
    cudaEventRecord(cache_.side_.attended[spans_ % 2], cache_.stream_);
  }
  for (int32_t i = 0; i < plan_count(); ++i) {
    const std::vector<int32_t>& nodes = span_.slot_nodes(i);
    uploader_.Add(plan_memory_[static_cast<size_t>(i)].slot_nodes, nodes.data(), nodes.size() * sizeof(int32_t));
    begin_[static_cast<size_t>(i)].departures += span_.departures(i);
  }
  uploader_.Flush();
  ++spans_;
}

// `later` goes on only after all that `earlier` has now.
void PromptRun::Follow(cudaStream_t earlier, cudaEvent_t event, cudaStream_t later) const {
  if (earlier == later) return;
  cudaEventRecord(event, earlier);
  cudaStreamWaitEvent(later, event, 0);
}

// What is selected for one span is computed beside the attention of the span before.
Status PromptRun::Run() {
  Follow(cache_.stream_, cache_.side_.begun, side_);
  Describe();
  for (int64_t first = 0; first < input_.tokens;) {
    int64_t last = std::min(first + shape_.span, input_.tokens);
    if (block_ > 0 && last < input_.tokens) last = (first_position_ + last) / block_ * block_ - first_position_;
    if (last <= first) last = std::min(first + shape_.span, input_.tokens);
    RunSpan(first, last - first);
    first = last;
  }
  Follow(side_, cache_.side_.begun, cache_.stream_);
  side_ = cache_.stream_;
  uploader_.SetStream(side_);
  return Store();
}

// The entries of plan i that are not where they belong, and their places: slots, or ranks of slots in the output's order.
void PromptRun::ListEntries(int32_t i) {
  const plan::Plan& p = plan(i).plan;
  const PlanMemory& m = plan_memory_[static_cast<size_t>(i)];
  const std::vector<int32_t>& nodes = span_.slot_nodes(i);
  const std::vector<int32_t>& joined = joined_[static_cast<size_t>(i)];
  const int64_t budget = p.setting().budget;
  std::vector<int32_t>& rank = ranks_;
  rank.clear();
  int32_t live = 0;
  floats_.clear();
  for (int64_t slot = 0; slot < budget; ++slot) {
    const int64_t weight = p.weights()[slot];
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
  for (int64_t slot = 0; slot < budget && spans_ > 0; ++slot)
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
  const cuda::SpanStorePlan store{m.code, m.to, node_count, static_cast<int32_t>(p.protected_count()),
                                  static_cast<int32_t>(ints_.size())};
  uploader_.Add(memory_.store_plans + i, &store, sizeof(store));
  const PlanState& state = plan(i);
  for (int32_t h = 0; h < state.head_count; ++h) {
    const int32_t kv_head = cache_.plans_.plan_heads[state.first_head + h] % cache_.config_.kv_heads;
    const cuda::Head& device = head(kv_head);
    if (!joined.empty()) uploader_.Add(device.protected_slot + before, joined.data(), joined.size() * sizeof(int32_t));
    if (output_ == nullptr && device.leader != 0)
      uploader_.Add(device.log_weight, floats_.data(), floats_.size() * sizeof(float));
    DescribeCopies(kv_head, store.count);
  }
}

void PromptRun::DescribeCopies(int32_t g, int32_t count) {
  const HeadMemory& m = head_memory_[static_cast<size_t>(g)];
  const cuda::Head& device = head(g);
  const bool in_place = output_ == nullptr;
  const cuda::SpanStoreHead store{.values = m.values[(spans_ + 1) % 2],
                                  .protected_index = m.protected_index,
                                  .protected_slot = in_place ? device.protected_slot : nullptr,
                                  .index = m.index,
                                  .stage_index = in_place ? m.stage_index : nullptr,
                                  .to = m.to,
                                  .plan = PlanOf(g)};
  uploader_.Add(memory_.store_heads + g, &store, sizeof(store));
  const cuda::GatherHead stage{.slab_key = device.key,
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
  uploader_.Add(memory_.stage_heads + g, &stage, sizeof(stage));
  cuda::GatherHead gather = stage;
  gather.slab_key = m.stage_key;
  gather.slab_value = m.stage_value;
  gather.slab_position = m.stage_position;
  gather.index = m.index;
  gather.to = m.to;
  gather.key = device.key;
  gather.value = device.value;
  gather.position = device.position;
  if (!in_place) {
    gather.key = output_->k.At(g);
    gather.value = output_->v.At(g);
    gather.position = output_->position != nullptr ? static_cast<int64_t*>(output_->position->At(g)) : nullptr;
    gather.log_weight = static_cast<float*>(output_->log_weight.At(g));
    gather.weights = plan_memory_[static_cast<size_t>(PlanOf(g))].weights;
  }
  uploader_.Add(memory_.gather_heads + g, &gather, sizeof(gather));
}

// Every entry to its slot, or to the caller's output.
Status PromptRun::Store() {
  const Config& c = cache_.config_;
  int32_t most = 0;
  for (int32_t i = 0; i < plan_count(); ++i) {
    ListEntries(i);
    most = std::max(most, static_cast<int32_t>(ints_.size()));
  }
  uploader_.Flush();
  if (most > 0) cuda::SpanStore(memory_.store_plans, memory_.store_heads, c.kv_heads, most, cache_.stream_);
  cuda::GatherArgs args{.heads = memory_.stage_heads,
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
                        .k = k_,
                        .v = v_,
                        .first_position = first_position_};
  if (output_ == nullptr && first_position_ > 0) cuda::Gather(args, cache_.stream_);
  args.heads = memory_.gather_heads;
  if (output_ != nullptr) {
    args.key_dtype = output_->k.dtype;
    args.value_dtype = output_->v.dtype;
    args.key_stride = output_->k.stride[1];
    args.value_stride = output_->v.stride[1];
    args.position_stride = output_->position != nullptr ? output_->position->stride[1] : 0;
    args.log_weight_stride = output_->log_weight.stride[1];
  }
  cuda::Gather(args, cache_.stream_);
  return cache_.Launched("prefill");
}

// ---- the cache's calls ----

Status CudaCache::DoWorkspaceSize(int64_t n, size_t* bytes) const {
  *bytes = n == 0 ? 0 : static_cast<size_t>(PromptRun::Bytes(*this, n, true));
  return Status();
}

Status CudaCache::DoPrefill(int32_t layer, const Queries& queries, const Input& input, const Workspace& workspace) {
  if (input.tokens == 0) return Status();
  const DeviceScope scope(config_.device_id);
  EXPRESS_RETURN_IF_ERROR(CudaError("config.device_id", scope.error()));
  if (Capturing()) return Error(StatusCode::kUnsupported, "cache: express_prefill cannot be captured in a graph");
  EXPRESS_RETURN_IF_ERROR(Settle());
  EXPRESS_RETURN_IF_ERROR(CheckSettled());
  const std::pair<const char*, DType> types[] = {
      {"q", queries.q.dtype}, {"out", queries.out.dtype}, {"k", input.k.dtype}, {"v", input.v.dtype}};
  for (const auto& [name, dtype] : types)
    if (dtype != config_.dtype)
      return Error(StatusCode::kDtypeMismatch, name, ".dtype: in prefill on CUDA expected config.dtype (",
                   static_cast<int32_t>(config_.dtype), "), got ", static_cast<int32_t>(dtype));
  if (input.tokens >= std::numeric_limits<int32_t>::max())
    return Error(StatusCode::kSizeOverflow, "k.shape: expected fewer than 2^31 tokens in one call, got ", input.tokens);
  const int64_t bytes = PromptRun::Bytes(*this, input.tokens, true);
  if (workspace.data == nullptr)
    return Error(StatusCode::kInvalidArgument, "workspace: expected ", bytes,
                 " bytes (express_workspace_size), got NULL");
  EXPRESS_RETURN_IF_ERROR(check_.check_pointer("workspace", workspace.data, config_.device_id));
  if (reinterpret_cast<uintptr_t>(workspace.data) % 256 != 0)
    return Error(StatusCode::kInvalidArgument, "workspace.data: expected an address aligned to 256");
  if (workspace.bytes < static_cast<size_t>(bytes))
    return Error(StatusCode::kBufferTooSmall, "workspace.bytes: expected at least ", bytes, ", got ", workspace.bytes);
  PromptRun run(*this, layer, input, &queries, workspace.data);
  run.Reserve();
  broken_ = true;  // until all is enqueued
  EXPRESS_RETURN_IF_ERROR(run.Run());
  broken_ = false;
  CountEntries(layer, 1);
  return Status();
}

Status CudaCache::OneShotBytes(const Resolved& resolved, int64_t* bytes) {
  int64_t device = 0;
  EXPRESS_RETURN_IF_ERROR(Bytes(resolved, &device));
  CudaCache* cache = nullptr;
  EXPRESS_RETURN_IF_ERROR(Place(resolved, device, nullptr, &cache));
  *bytes = AlignedBytes(device) + PromptRun::Bytes(*cache, PromptRun::kSpan, false);
  cache->Delete();
  return Status();
}

Status CudaCache::CompressOnce(const Resolved& resolved, void* memory, int64_t, const Tensor& k, const Tensor& v,
                               const OneShotOutput& out, int64_t* count) {
  const DeviceScope scope(resolved.config.device_id);
  EXPRESS_RETURN_IF_ERROR(CudaError("config.device_id", scope.error()));
  int64_t device = 0;
  EXPRESS_RETURN_IF_ERROR(Bytes(resolved, &device));
  CudaCache* cache = nullptr;
  EXPRESS_RETURN_IF_ERROR(Place(resolved, device, memory, &cache));
  struct End {
    CudaCache* cache;
    ~End() { cache->Delete(); }
  } end{cache};
  Input input{};
  EXPRESS_RETURN_IF_ERROR(cache->CheckInput(k, v, 0, &input));
  for (const auto& [name, dtype] : {std::pair("k", input.k.dtype), std::pair("v", input.v.dtype)})
    if (dtype != resolved.config.dtype)
      return Error(StatusCode::kDtypeMismatch, name, ".dtype: on CUDA expected config.dtype (",
                   static_cast<int32_t>(resolved.config.dtype), "), got ", static_cast<int32_t>(dtype));
  if (input.tokens >= std::numeric_limits<int32_t>::max())
    return Error(StatusCode::kSizeOverflow, "k.shape: expected fewer than 2^31 tokens, got ", input.tokens);
  cache->InitDevice();
  PromptRun run(*cache, 0, input, nullptr, static_cast<char*>(memory) + AlignedBytes(device));
  run.SetOutput(&out);
  run.Reserve();
  if (input.tokens > 0) EXPRESS_RETURN_IF_ERROR(run.Run());
  return cache->Entries(0, 0, count);
}

}  // namespace express::cache
