#include "src/cache/cuda_prompt.h"

#include <algorithm>
#include <cstddef>
#include <limits>

#include "src/cache/exact_prompt.h"

namespace express::cache {
namespace {

static_assert(sizeof(plan::SpanSample) == sizeof(cuda::SpanSample) &&
              sizeof(plan::SpanHalve) == sizeof(cuda::SpanHalve) &&
              sizeof(plan::SpanMember) == sizeof(cuda::SpanMember));
static_assert(offsetof(plan::SpanSample, out) == offsetof(cuda::SpanSample, out) &&
              offsetof(plan::SpanHalve, out) == offsetof(cuda::SpanHalve, out) &&
              offsetof(plan::SpanMember, log_weight) == offsetof(cuda::SpanMember, log_weight));
static_assert(sizeof(plan::SpanItem) == sizeof(cuda::SpanItem) &&
              offsetof(plan::SpanItem, kind) == offsetof(cuda::SpanItem, kind));
static_assert(plan::Span::kNoNode == cuda::kNoNode && plan::Span::kClasses == cuda::kSpanSample);

}  // namespace

// The memory grows with the prompt. Short prompts are taken in a few spans too, so that there is something to overlap.
PromptRun::Shape PromptRun::ShapeOf(const Config& c, int64_t most_budget, int64_t tokens, int64_t block) {
  constexpr int64_t kShort = 2048;
  const auto whole_blocks = [&](int64_t n) {
    return std::min({tokens, kSpan, (std::max(n, block) + block - 1) / block * block});
  };
  const int64_t quarter = std::max<int64_t>(kShort, (tokens / 4 + kShort - 1) / kShort * kShort);
  const int64_t span = block > 0 ? whole_blocks(quarter) : std::min(tokens, kSpan),
                blocks = block > 0 ? span / block + 2 : 1, parities = block > 0 && tokens > kShort ? 2 : 1;
  const plan::Span::Bounds bound = plan::Span::Bound(most_budget, span, blocks);
  return {.quantised = c.dtype == DType::kI8 ? tokens : 0,
          .span = span,
          .blocks = blocks,
          .parities = parities,
          .nodes = bound.nodes,
          .samples = bound.samples,
          .halves = bound.halves,
          .list = bound.list,
          .members = bound.members};
}

// Every head counts with the largest setting, so that layers need the same.
void PromptRun::Layout(const CudaCache& cache, const Shape& s, bool attention, Arena& arena, Memory* memory,
                       std::vector<PlanMemory>* plans, std::vector<HeadMemory>* heads) {
  const Config& c = cache.config_;
  const int64_t element = SizeOf(c.dtype), kv = c.kv_heads;
  int64_t most_plans = cache.largest() != nullptr ? kv : 0;  // of one layer, ever
  for (int32_t layer = 0; layer < c.layers; ++layer)
    most_plans = std::max<int64_t>(most_plans, cache.end_plan(layer) - cache.first_plan(layer));
  int64_t budget = 0, protect = 0, sinks = 0, tail = 0;
  for (int32_t i = 0; i <= cache.plans_.plan_count; ++i) {
    const bool of_plan = i < cache.plans_.plan_count;
    if (!of_plan && cache.largest() == nullptr) break;
    const plan::Setting& setting = of_plan ? cache.plans_.plans[i].plan.setting() : *cache.largest();
    budget = std::max(budget, setting.budget);
    protect = std::max(protect, setting.protect);
    sinks = std::max(sinks, setting.sinks);
    tail = std::max(tail, setting.tail());
  }
  memory->span_heads = arena.Take<cuda::SpanHead>(2 * kv);
  memory->admit_heads = arena.Take<cuda::AdmitHead>(2 * kv);
  memory->prefill_heads = arena.Take<cuda::PrefillHead>(2 * kv);
  memory->gather_heads = arena.Take<cuda::GatherHead>(kv);
  memory->stage_heads = arena.Take<cuda::GatherHead>(kv);
  for (int64_t parity = 0; parity < s.parities; ++parity) {
    GraphMemory& graph = memory->graph[parity];
    graph.plans = arena.Take<cuda::SpanPlan>(most_plans);
    graph.samples = arena.Take<cuda::SpanSample>(most_plans * s.samples);
    graph.halves = arena.Take<cuda::SpanHalve>(most_plans * s.halves);
    graph.list = arena.Take<int32_t>(most_plans * s.list);
    graph.items = arena.Take<cuda::SpanItem>(most_plans * (s.samples + s.halves));
    graph.members = arena.Take<cuda::SpanMember>(most_plans * s.members);
  }
  memory->key_codes = arena.Take<int8_t>(kv * s.quantised * c.key_dim);
  memory->value_codes = arena.Take<int8_t>(kv * s.quantised * c.value_dim);
  memory->scales = arena.Take<cuda::RowScales>(kv * s.quantised);
  memory->slab_rows = attention && s.quantised > 0 ? budget : 0;
  constexpr int64_t kMostElement = 4;  // the prompt's type is not known yet
  memory->slab_keys = arena.Take<char>(kv * memory->slab_rows * c.key_dim * kMostElement);
  memory->slab_values = arena.Take<char>(kv * memory->slab_rows * c.value_dim * kMostElement);
  memory->ticket = arena.Take<int32_t>(1);
  memory->departures = arena.Take<cuda::SpanDepartures>(most_plans);
  memory->store_plans = arena.Take<cuda::SpanStorePlan>(most_plans);
  memory->store_heads = arena.Take<cuda::SpanStoreHead>(kv);
  for (int64_t i = 0; i < most_plans; ++i) {
    PlanMemory p{};
    p.heads = arena.Take<int32_t>(kv);
    p.sink_index = arena.Take<int32_t>(sinks);
    p.old_tail = arena.Take<int32_t>(tail);
    p.source = arena.Take<int32_t>(tail);
    p.slot_nodes = arena.Take<int32_t>(budget);
    p.snapshot_at = arena.Take<int32_t>(s.blocks);
    for (int64_t parity = 0; parity < s.parities; ++parity) p.blocks[parity] = arena.Take<cuda::SpanBlock>(s.blocks);
    p.code = arena.Take<int32_t>(budget);
    p.to = arena.Take<int32_t>(budget);
    p.weights = arena.Take<float>(budget);
    if (plans != nullptr) plans->push_back(p);
  }
  for (int64_t i = 0; i < kv; ++i) {
    HeadMemory h{};
    for (int32_t*& values : h.values) values = arena.Take<int32_t>(s.nodes);
    for (int64_t parity = 0; parity < s.parities; ++parity)
      h.snapshots[parity] = arena.Take<int32_t>(s.blocks * protect);
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
    h.keep = arena.Take<uint8_t>(most_plans * s.list);
    h.halve_scratch = arena.Take<char>(static_cast<int64_t>(cuda::SpanScratch(most_plans * s.list)));
    h.index = arena.Take<int32_t>(budget);
    h.to = arena.Take<int32_t>(budget);
    h.stage_index = arena.Take<int32_t>(budget);
    h.stage_key = arena.Take<char>(budget * c.key_dim * element);
    h.stage_value = arena.Take<char>(budget * c.value_dim * element);
    h.stage_position = arena.Take<int64_t>(budget);
    h.stage_scale = arena.Take<cuda::RowScales>(s.quantised > 0 ? budget : 0);
    if (heads != nullptr) heads->push_back(h);
  }
}

int64_t PromptRun::Bytes(const CudaCache& cache, int64_t tokens, bool attention) {
  Arena arena;
  Memory memory;
  const int64_t block = attention ? cache.config_.prefill_block : 0;
  if (cache.config_.dtype == DType::kI8) tokens = std::min(tokens, kQuantised);
  Layout(cache, ShapeOf(cache.config_, cache.MostBudget(), tokens, block), attention, arena, &memory, nullptr, nullptr);
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
      stored_k_(k_),
      stored_v_(v_),
      first_position_(cache.LayerTokens(layer)),
      block_(queries != nullptr ? cache.config_.prefill_block : 0),
      shape_(ShapeOf(cache.config_, cache.MostBudget(), input.tokens, block_)),
      side_(cache.stream_),
      graph_(cache.stream_),
      uploader_(cache.stream_) {}

int32_t PromptRun::PlanOf(int32_t kv_head) const { return head(kv_head).plan - cache_.first_plan(layer_); }
const cuda::Head& PromptRun::head(int32_t kv_head) const {
  return cache_.parts_.head_copies[layer_ * cache_.config_.kv_heads + kv_head];
}

void PromptRun::Reserve() {
  Arena arena(workspace_);
  Layout(cache_, shape_, block_ > 0, arena, &memory_, &plan_memory_, &head_memory_);
  begin_.resize(static_cast<size_t>(plan_count()));
  joined_.resize(static_cast<size_t>(plan_count()));
  for (int32_t i = 0; i < plan_count(); ++i) {
    const plan::Plan& p = plan(i).plan;
    Begin& begin = begin_[static_cast<size_t>(i)];
    for (int64_t j = 0; j < p.tail_count(); ++j) begin.old_tail.push_back(p.tail_slot(j));
    begin.first_departures = p.departures();
    begin.protected_count = p.protected_count();
    joined_[static_cast<size_t>(i)].reserve(static_cast<size_t>(p.setting().protect));
  }
  if (cache_.prompt_host_ == nullptr) cache_.prompt_host_ = std::make_unique<PromptHost>();
  host_ = cache_.prompt_host_.get();
  StartRecording();
  blocks_.reserve(static_cast<size_t>(shape_.blocks));
  const int64_t most = cache_.MostBudget();
  ints_.reserve(static_cast<size_t>(std::max({most, shape_.blocks, int64_t{cache_.config_.kv_heads}})));
  ranks_.reserve(static_cast<size_t>(most));
  lists_.Reserve(most);
  const auto heads = static_cast<size_t>(cache_.config_.kv_heads);
  admit_.reserve(heads);
  span_heads_.reserve(heads);
  prefill_heads_.reserve(heads);
  store_heads_.resize(heads);
  stage_heads_.resize(heads);
  gather_heads_.resize(heads);
}

int64_t PromptRun::PartOf(const Config& config, int64_t position, int64_t tokens, bool attention) {
  if (config.dtype != DType::kI8 || tokens <= kQuantised) return tokens;
  const int64_t block = attention ? config.prefill_block : 1;  // parts end where blocks end
  return (position + kQuantised) / block * block - position;
}

void PromptRun::Quantise() {
  if (!scaled()) return;
  const Config& c = cache_.config_;
  const int64_t rows = input_.tokens;
  cuda::QuantiseRows({.k = k_,
                      .v = v_,
                      .rows = rows,
                      .kv_heads = c.kv_heads,
                      .key_dim = c.key_dim,
                      .value_dim = c.value_dim,
                      .key = memory_.key_codes,
                      .value = memory_.value_codes,
                      .scale = memory_.scales},
                     cache_.stream_);
  stored_k_ = {memory_.key_codes, c.key_dim, rows * c.key_dim, DType::kI8, memory_.scales, rows};
  stored_v_ = {memory_.value_codes, c.value_dim, rows * c.value_dim, DType::kI8, memory_.scales, rows};
  if (block_ == 0 || fresh()) return;
  cuda::DequantiseSlabs({.heads = cache_.parts_.heads + layer_ * c.kv_heads,
                         .kv_heads = c.kv_heads,
                         .most_capacity = static_cast<int32_t>(memory_.slab_rows),
                         .key_dim = c.key_dim,
                         .value_dim = c.value_dim,
                         .dtype = k_.dtype,
                         .key = memory_.slab_keys,
                         .value = memory_.slab_values,
                         .key_stride = memory_.slab_rows * c.key_dim * SizeOf(k_.dtype),
                         .value_stride = memory_.slab_rows * c.value_dim * SizeOf(k_.dtype)},
                        cache_.stream_);
}

// Spans end where blocks end.
int64_t PromptRun::SpanEnd(int64_t first) const {
  int64_t last = std::min(first + shape_.span, input_.tokens);
  if (block_ > 0 && last < input_.tokens) last = (first_position_ + last) / block_ * block_ - first_position_;
  return last > first ? last : std::min(first + shape_.span, input_.tokens);
}

// ---- what is launched ----

bool PromptRun::IsExact(int32_t i) const {
  return block_ > 0 && IsExactPrompt(cache_.config_, plan(i).plan.setting(), first_position_, input_.tokens);
}

// Blocks at the beginning of a cache's first prompt, as long as it holds all tokens before them; all of a short one.
void PromptRun::CountEarly() {
  early_ = 0;
  if (block_ == 0 || !fresh()) return;
  exact_ = true;
  for (int32_t i = 0; i < plan_count(); ++i) exact_ = exact_ && IsExact(i);
  const auto holds_all = [&](int32_t block) {
    for (int32_t i = 0; i < plan_count(); ++i) {
      const plan::SpanSnapshot& snapshot = span_->snapshots(i)[static_cast<size_t>(block)];
      if (!exact_ && snapshot.protected_count + snapshot.count < snapshot.departures) return false;
    }
    return true;
  };
  const auto blocks = static_cast<int32_t>(span_->snapshots(0).size());
  while (early_ < blocks && holds_all(early_)) ++early_;
}

cuda::SpanArgs PromptRun::Arguments() const {
  const Config& c = cache_.config_;
  int32_t most_heads = 0;
  for (int32_t i = 0; i < plan_count(); ++i) most_heads = std::max(most_heads, plan(i).head_count);
  const GraphMemory& graph = memory_.graph[spans_ % shape_.parities];
  return {.plans = graph.plans,
          .heads = memory_.span_heads + spans_ % 2 * c.kv_heads,
          .samples = graph.samples,
          .halves = graph.halves,
          .list = graph.list,
          .members = graph.members,
          .plan_count = plan_count(),
          .kv_heads = c.kv_heads,
          .most_heads = most_heads,
          .first_span = spans_ == 0,
          .key_dim = c.key_dim,
          .value_dim = c.value_dim,
          .dtype = c.dtype,
          .k = stored_k_,
          .v = stored_v_,
          .halve = cache_.Halve(),
          .exponent = static_cast<float>(c.weight_exponent)};
}

// Whether there is anything to choose in the span: not where a fresh cache has room for all.
bool PromptRun::Selects() const {
  if (!fresh() || spans_ > 0) return true;
  for (int32_t i = 0; i < plan_count(); ++i)
    if (span_->departures(i) > 0) return true;
  return false;
}

// Streams of the cache's own, behind what has been described; one is enough for one span.
void PromptRun::Fork(bool spans) {
  side_ = graph_ = cache_.side_.stream;
  uploader_.SetStream(side_);
  Follow(cache_.stream_, cache_.side_.begun, side_);
  if (!spans) return;
  graph_ = cache_.side_.graph;
  cudaStreamWaitEvent(graph_, cache_.side_.begun, 0);
}

// The protected entries of the span; `scores`: the stream that scores them.
void PromptRun::ChooseProtected(cudaStream_t scores) {
  int64_t held = 0;
  for (const Begin& begin : begin_) held += begin.protected_count;
  if (spans_ == 0 && held > 0)
    cuda::AdmitBegin(memory_.admit_heads, cache_.config_.kv_heads,
                     cache_.parts_.heads + layer_ * cache_.config_.kv_heads, side_);
  for (int32_t i = 0; i < plan_count(); ++i)
    if (plan(i).plan.setting().protect > 0) cuda::AdmitScore(AdmitArguments(i), scores);
  Follow(scores, cache_.side_.scored, side_);
  for (int32_t i = 0; i < plan_count(); ++i)
    if (plan(i).plan.setting().protect > 0) cuda::AdmitSelect(AdmitArguments(i), side_);
}

void PromptRun::BeginGraph() {
  int64_t most_nodes = 0;
  for (int32_t i = 0; i < plan_count(); ++i) most_nodes = std::max(most_nodes, span_->nodes(i));
  cuda::SpanBegin(Arguments(), memory_.departures, memory_.ticket, most_nodes, graph_);
}

// Values of all nodes of the span, and its far lists. `more`: spans follow.
void PromptRun::RunGraph(bool more) {
  const auto blocks = block_ > 0 ? static_cast<int32_t>(span_->snapshots(0).size()) : 0;
  Follow(side_, cache_.side_.admitted, graph_);
  if (spans_ > 0) BeginGraph();
  // What is described next takes the place of the span before, whose graph has run, and of what has been read by now.
  if (more) Follow(graph_, cache_.side_.begun, side_);
  // The attention of two spans ago has read the lists that are written now.
  if (blocks > 0 && spans_ >= 2) cudaStreamWaitEvent(graph_, cache_.side_.attended[spans_ % 2], 0);
  cuda::SpanRun(Arguments(),
                {.items = memory_.graph[spans_ % shape_.parities].items,
                 .item_count = static_cast<int32_t>(span_->items().size()),
                 .first_block = exact_        ? blocks
                                : spans_ == 0 ? early_
                                              : 0,
                 .blocks = blocks,
                 .long_lists = span_->has_class(plan::Span::kClasses - 1),
                 .ticket = memory_.ticket},
                cache_.traits_.multiprocessors, graph_);
}

cuda::AdmitArgs PromptRun::AdmitArguments(int32_t i) const {
  const Config& c = cache_.config_;
  const PlanState& state = plan(i);
  const int64_t protect = state.plan.setting().protect;
  const Begin& begin = begin_[static_cast<size_t>(i)];
  const int64_t begun = begin.first_departures + begin.departures, departures = span_->departures(i);
  const auto old = static_cast<int64_t>(begin.old_tail.size());
  const int32_t first_admit = state.first_head - plan(0).first_head;
  return {.heads = memory_.admit_heads + spans_ % 2 * c.kv_heads + first_admit,
          .head_count = state.head_count,
          .key_dim = c.key_dim,
          .protect = static_cast<int32_t>(protect),
          .dtype = c.dtype,
          .k = stored_k_,
          .v = stored_v_,
          .first = begun,
          .count = departures,
          .source_count = std::max<int64_t>(0, old - begin.departures),
          .centre = begun == 0 && departures > 0 ? state.plan.setting().tail() : 0,
          .first_row = FirstRow(i),
          .first_position = first_position_,
          .snapshot_at = plan_memory_[static_cast<size_t>(i)].snapshot_at,
          .snapshots = exact_ ? 0 : static_cast<int32_t>(span_->snapshots(i).size()),
          .source_begin = std::min(old, begin.departures),
          .value_dim = c.value_dim,
          .scoring = cache_.DeviceScoring(),
          .multiprocessors = cache_.traits_.multiprocessors,
          .shared_bytes = cache_.traits_.shared_bytes};
}

// The row of the first departure that no old tail entry is, from the span's first departure on.
int64_t PromptRun::FirstRow(int32_t i) const {
  const Begin& begin = begin_[static_cast<size_t>(i)];
  const auto old = static_cast<int64_t>(begin.old_tail.size());
  // Rows depart in order behind the old tail; rows that are sinks never do.
  const int64_t sinks = std::max<int64_t>(0, plan(i).plan.setting().sinks - first_position_);
  return sinks + std::max<int64_t>(0, begin.departures - old);
}

// Rows [0, first + tokens), blocks [first_block, first_block + blocks), counted from the one that holds row `first`. Without heads:
// nothing is far.
cuda::PrefillArgs PromptRun::PrefillArguments(int64_t first, int64_t tokens, int64_t first_block,
                                              int64_t blocks) const {
  const Config& c = cache_.config_;
  const auto rows = [](const Array& a) { return cuda::Rows{a.data, a.stride[0], a.stride[1], a.dtype}; };
  const int64_t base = first_position_ / block_, position = first_position_ + first;
  return {.heads = nullptr,
          .kv_heads = c.kv_heads,
          .group = c.query_heads / c.kv_heads,
          .key_dim = c.key_dim,
          .value_dim = c.value_dim,
          .dtype = k_.dtype,
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
          .first_block = position / block_ - base + first_block,
          .blocks = blocks,
          .scale = static_cast<float>(c.scale)};
}
void PromptRun::Attend(const cuda::PrefillArgs& args) const {
  cuda::Prefill(args, cache_.traits_.compute_capability, cache_.traits_.multiprocessors, cache_.stream_);
}

// Queries that see all rows before them: of the whole prompt, or of the first span. `spare`: see PrefillArgs.
void PromptRun::AttendEarly(int32_t spare) {
  const int64_t rows = exact_ ? input_.tokens : std::min(input_.tokens, early_ * block_);
  if (rows == 0) return;
  cuda::PrefillArgs args = PrefillArguments(0, rows, 0, 1);
  args.block = static_cast<int32_t>(rows);
  args.spare = spare;
  Attend(args);
}

// What is left of the span's blocks, once its far lists are there.
void PromptRun::AttendSpan(int64_t first, int64_t tokens, bool more) {
  const auto blocks = static_cast<int64_t>(span_->snapshots(0).size());
  const int64_t done = exact_ ? blocks : spans_ == 0 ? early_ : 0;
  if (done < blocks) {
    Follow(graph_, cache_.side_.selected[spans_ % 2], cache_.stream_);
    cuda::PrefillArgs args = PrefillArguments(first, tokens, done, blocks - done);
    args.heads = memory_.prefill_heads + spans_ % 2 * cache_.config_.kv_heads;
    Attend(args);
  }
  if (more) cudaEventRecord(cache_.side_.attended[spans_ % 2], cache_.stream_);
}

// `later` goes on only after all that `earlier` has now.
void PromptRun::Follow(cudaStream_t earlier, cudaEvent_t event, cudaStream_t later) const {
  if (earlier == later) return;
  cudaEventRecord(event, earlier);
  cudaStreamWaitEvent(later, event, 0);
}

Status PromptRun::Run() {
  for (int64_t first = 0, last = 0; first < input_.tokens; first = last, ++spans_) {
    last = SpanEnd(first);
    const int64_t tokens = last - first;
    RecordSpan(tokens);
    if (first == 0) {
      CountEarly();
      Describe();
    }
    const bool selects = Selects(), ends = last == input_.tokens;
    if (selects) DescribeSpan(first);
    if (ends) FinishPlans(), DescribeStore();
    uploader_.Flush();
    if (first == 0 && block_ > 0) Fork(!ends);
    // First what takes longest, one kernel after the other, most of which do not fill the device. Where all else waits for the
    // halvings of one span, its scores have the device to themselves. What follows then finds room beside the attention: some
    // multiprocessors, if these are enough for the halvings (four blocks each), or whatever its jobs leave.
    const bool alone = first == 0 && graph_ == side_, scores_first = alone && !span_->items().empty();
    const int32_t spare = cache_.traits_.multiprocessors / 8;
    const bool fits = static_cast<int64_t>(span_->items().size()) * cache_.config_.kv_heads <= 4 * spare;
    const bool rows_first = scores_first && !fits;
    if (selects && alone) BeginGraph();
    if (selects) ChooseProtected(scores_first ? cache_.stream_ : side_);
    if (selects && first == 0 && !alone) BeginGraph();
    if (ends && fresh() && rows_first) StoreRows(cache_.stream_);
    if (first == 0 && block_ > 0)
      AttendEarly(!selects && ends ? 0 : scores_first && fits ? spare : cuda::PrefillArgs::kJobByJob);
    if (selects) RunGraph(!ends);
    if (ends && fresh() && !rows_first) StoreRows(spans_ == 0 && selects ? cache_.stream_ : side_);
    if (block_ > 0) AttendSpan(first, tokens, !ends);
    for (int32_t i = 0; i < plan_count(); ++i) begin_[static_cast<size_t>(i)].departures += span_->departures(i);
    if (last < input_.tokens) {  // where the next span begins
      for (int32_t i = 0; i < plan_count(); ++i) {
        const std::vector<int32_t>& nodes = span_->slot_nodes(i);
        uploader_.Add(plan_memory_[static_cast<size_t>(i)].slot_nodes, nodes.data(), nodes.size() * sizeof(int32_t));
      }
    }
  }
  // Where the slabs hold what attention reads, they are written after it.
  if (!fresh()) {
    Follow(graph_, cache_.side_.begun, cache_.stream_);
    graph_ = cache_.stream_;
  }
  Store();
  Follow(graph_, cache_.side_.begun, cache_.stream_);
  if (side_ != graph_) Follow(side_, cache_.side_.admitted, cache_.stream_);
  return cache_.Launched("prefill");
}

}  // namespace express::cache
