#include "src/cache/cache.h"

#include <algorithm>
#include <limits>

#include "src/cache/message.h"

namespace express::cache {

Cache::Cache(const Resolved& resolved, const KeptScoring* scoring, const Plans& plans, const Budgets& budgets,
             int64_t bytes, TensorCheck check)
    : config_(resolved.config),
      plans_(plans),
      budgets_(budgets),
      bytes_(bytes),
      check_(check),
      mean_budget_(resolved.mean_entries) {
  if (scoring != nullptr) config_.rope_frequencies = {scoring->frequencies, config_.rope_frequencies.size()};
  for (int32_t i = 0; i < plans_.plan_count; ++i)
    entries_budget_ += plans_.plans[i].plan.setting().budget * plans_.plans[i].head_count;
  ResetCounts();
  save_bytes_ = CountSaveBytes();
}

void Cache::Destroy(Cache* cache) {
  if (cache != nullptr) cache->Delete();
}

void Cache::ResetCounts() {
  for (int32_t i = 0; i < plans_.plan_count; ++i) plans_.plans[i].plan.Reset();
  std::fill_n(plans_.layer_entries, config_.layers, 0);
  std::fill_n(plans_.layer_peak, config_.layers, 0);
  entries_ = entries_peak_ = 0;
  if (budgets_.observed != nullptr) ResetBudgets();
}

Status Cache::Reset() {
  ResetCounts();
  EXPRESS_RETURN_IF_ERROR(ResetData());
  EXPRESS_RETURN_IF_ERROR(EqualHeads());
  broken_ = false;
  return Status();
}

Status Cache::SetStream(void* stream) { return DoSetStream(stream); }

Status Cache::CheckUsable() const {
  if (!broken_) return Status();
  return Error(StatusCode::kBroken, "cache: an earlier call failed on its way; only reset and destroy are allowed");
}

Status Cache::CheckLayer(int32_t layer, bool all_allowed) const {
  if ((layer >= 0 && layer < config_.layers) || (all_allowed && layer == kAllLayers)) return Status();
  return Error(StatusCode::kOutOfRange, "layer: expected 0 .. ", config_.layers - 1,
               all_allowed ? " or EXPRESS_AUTO, got " : ", got ", layer);
}

Status Cache::CheckInput(const Tensor& k, const Tensor& v, int32_t layer, Input* input) const {
  const Config& c = config_;
  if (layer == kAllLayers) {
    EXPRESS_RETURN_IF_ERROR(
        CheckTensor(check_, "k", k, Types::kFloat, {c.layers, kAnySize, c.kv_heads, c.key_dim}, &input->k));
    input->tokens = input->k.shape[1];
    EXPRESS_RETURN_IF_ERROR(
        CheckTensor(check_, "v", v, Types::kFloat, {c.layers, input->tokens, c.kv_heads, c.value_dim}, &input->v));
  } else {
    EXPRESS_RETURN_IF_ERROR(CheckTensor(check_, "k", k, Types::kFloat, {kAnySize, c.kv_heads, c.key_dim}, &input->k));
    input->tokens = input->k.shape[0];
    EXPRESS_RETURN_IF_ERROR(
        CheckTensor(check_, "v", v, Types::kFloat, {input->tokens, c.kv_heads, c.value_dim}, &input->v));
  }
  input->first_layer = layer == kAllLayers ? 0 : layer;
  input->layers = layer == kAllLayers ? c.layers : 1;
  input->first_token = 0;
  // Weights are 64-bit counts of tokens.
  for (int32_t i = 0; i < input->layers; ++i)
    if (input->tokens > (int64_t{1} << 60) - LayerTokens(input->first_layer + i))
      return Error(StatusCode::kSizeOverflow, "k.shape: the stream would have more than 2^60 tokens");
  if (c.validate) {
    EXPRESS_RETURN_IF_ERROR(CheckFinite("k", input->k));
    EXPRESS_RETURN_IF_ERROR(CheckFinite("v", input->v));
  }
  return Status();
}

Status Cache::CheckRoom(const Input& input) const {
  if (config_.auto_compress) return Status();
  for (int32_t i = first_plan(input.first_layer); i < end_plan(input.first_layer + input.layers - 1); ++i) {
    const int64_t room = plans_.plans[i].plan.RoomBeforeHalving();
    if (room < input.tokens)
      return Error(StatusCode::kWouldCompress, "k: ", input.tokens, " tokens need a halving in layer ",
                   plans_.plans[i].layer, ", which takes ", room,
                   " more without; config.auto_compress is off: call compress first");
  }
  return Status();
}

Status Cache::Append(int32_t layer, const Tensor& k, const Tensor& v) {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  EXPRESS_RETURN_IF_ERROR(CheckLayer(layer, false));
  Input input{};
  EXPRESS_RETURN_IF_ERROR(CheckInput(k, v, layer, &input));
  EXPRESS_RETURN_IF_ERROR(CheckRoom(input));
  EXPRESS_RETURN_IF_ERROR(SettleBudgets());
  return Ingest(input);
}

Status Cache::AppendAll(const Tensor& k, const Tensor& v) {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  Input input{};
  EXPRESS_RETURN_IF_ERROR(CheckInput(k, v, kAllLayers, &input));
  EXPRESS_RETURN_IF_ERROR(CheckRoom(input));
  EXPRESS_RETURN_IF_ERROR(SettleBudgets());
  return Ingest(input);
}

Status Cache::CheckQueries(int64_t tokens, const Tensor& q, const Tensor& out, const Tensor* lse,
                           Queries* queries) const {
  const Config& c = config_;
  EXPRESS_RETURN_IF_ERROR(CheckTensor(check_, "q", q, Types::kFloat, {tokens, c.query_heads, c.key_dim}, &queries->q));
  const int64_t n = queries->q.shape[0];
  EXPRESS_RETURN_IF_ERROR(
      CheckTensor(check_, "out", out, Types::kFloat, {n, c.query_heads, c.value_dim}, &queries->out));
  queries->has_lse = lse != nullptr;
  if (lse != nullptr)
    EXPRESS_RETURN_IF_ERROR(CheckTensor(check_, "lse", *lse, Types::kF32, {n, c.query_heads}, &queries->lse));
  return c.validate ? CheckFinite("q", queries->q) : Status();
}

Status Cache::Attend(int32_t layer, const Tensor& q, const Tensor& out, const Tensor* lse) const {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  EXPRESS_RETURN_IF_ERROR(CheckLayer(layer, false));
  Queries queries{};
  EXPRESS_RETURN_IF_ERROR(CheckQueries(kAnySize, q, out, lse, &queries));
  return DoAttend(layer, queries);
}

Status Cache::WorkspaceSize(int64_t n, size_t* bytes) const {
  if (n < 0) return Error(StatusCode::kInvalidArgument, "n: expected >= 0, got ", n);
  return DoWorkspaceSize(n, bytes);
}

Status Cache::Prefill(int32_t layer, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                      const Tensor* lse, const Workspace* workspace) {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  EXPRESS_RETURN_IF_ERROR(CheckLayer(layer, false));
  Input input{};
  EXPRESS_RETURN_IF_ERROR(CheckInput(k, v, layer, &input));
  Queries queries{};
  EXPRESS_RETURN_IF_ERROR(CheckQueries(input.tokens, q, out, lse, &queries));
  EXPRESS_RETURN_IF_ERROR(CheckRoom(input));
  EXPRESS_RETURN_IF_ERROR(SettleBudgets());
  return DoPrefill(layer, queries, input, workspace != nullptr ? *workspace : Workspace{});
}

Status Cache::StepPrepare(int64_t n) {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  if (n < 0) return Error(StatusCode::kInvalidArgument, "n: expected >= 0, got ", n);
  EXPRESS_RETURN_IF_ERROR(SettleBudgets());
  return DoStepPrepare(n);
}

Status Cache::StepCancel() {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  return DoStepCancel();
}

Status Cache::Compress(int32_t layer, int64_t tokens, int64_t* achieved) {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  EXPRESS_RETURN_IF_ERROR(CheckLayer(layer, true));
  if (tokens < 0) return Error(StatusCode::kInvalidArgument, "tokens: expected >= 0, got ", tokens);
  EXPRESS_RETURN_IF_ERROR(CheckSettled());
  const int32_t first = layer == kAllLayers ? 0 : first_plan(layer);
  const int32_t end = layer == kAllLayers ? plans_.plan_count : end_plan(layer);
  int64_t room = std::numeric_limits<int64_t>::max();
  broken_ = true;
  for (int32_t i = first; i < end; ++i) {
    plan::Plan& plan = plans_.plans[i].plan;
    while (plan.RoomBeforeHalving() < tokens) {
      plans_.operations.Clear();
      if (!plan.HalveAhead(plans_.operations)) break;
      EXPRESS_RETURN_IF_ERROR(ExecuteOperations(i));
    }
    room = std::min(room, plan.RoomBeforeHalving());
  }
  CountEntries(0, config_.layers);
  broken_ = false;
  if (achieved != nullptr) *achieved = room;
  return Status();
}

Status Cache::RollbackAvailable(int64_t* tokens) const {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  EXPRESS_RETURN_IF_ERROR(CheckSettled());
  *tokens = std::numeric_limits<int64_t>::max();
  for (int32_t i = 0; i < plans_.plan_count; ++i) *tokens = std::min(*tokens, plans_.plans[i].plan.RollbackAvailable());
  return Status();
}

Status Cache::Rollback(int64_t tokens) {
  int64_t available = 0;
  EXPRESS_RETURN_IF_ERROR(RollbackAvailable(&available));
  if (tokens < 0) return Error(StatusCode::kInvalidArgument, "tokens: expected >= 0, got ", tokens);
  if (tokens > available)
    return Error(StatusCode::kRollbackUnavailable, "tokens: expected at most ", available,
                 " (express_rollback_available), got ", tokens);
  for (int32_t i = 0; i < plans_.plan_count && tokens > 0; ++i) {
    plans_.operations.Clear();
    plans_.plans[i].plan.Rollback(tokens, plans_.operations);
    EXPRESS_RETURN_IF_ERROR(ExecuteOperations(i));
  }
  CountEntries(0, config_.layers);
  return Status();
}

Status Cache::Entries(int32_t layer, int32_t kv_head, int64_t* count) const {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  EXPRESS_RETURN_IF_ERROR(CheckLayer(layer, false));
  if (kv_head < 0 || kv_head >= config_.kv_heads)
    return Error(StatusCode::kOutOfRange, "kv_head: expected 0 .. ", config_.kv_heads - 1, ", got ", kv_head);
  EXPRESS_RETURN_IF_ERROR(CheckSettled());
  *count = plans_.plans[plans_.head_plan[layer * config_.kv_heads + kv_head]].plan.live();
  return Status();
}

Status Cache::Export(int32_t layer, int32_t kv_head, const Tensor& k, const Tensor& v, const Tensor* log_weight,
                     const Tensor* position, int64_t* count) const {
  int64_t entries = 0;
  EXPRESS_RETURN_IF_ERROR(Entries(layer, kv_head, &entries));
  Array k_array, v_array, weight_array, position_array;
  EXPRESS_RETURN_IF_ERROR(CheckTensor(check_, "k", k, Types::kFloat, {kAnySize, config_.key_dim}, &k_array));
  const int64_t capacity = k_array.shape[0];
  EXPRESS_RETURN_IF_ERROR(CheckTensor(check_, "v", v, Types::kFloat, {capacity, config_.value_dim}, &v_array));
  if (log_weight != nullptr)
    EXPRESS_RETURN_IF_ERROR(CheckTensor(check_, "log_weight", *log_weight, Types::kF32, {capacity}, &weight_array));
  if (position != nullptr)
    EXPRESS_RETURN_IF_ERROR(CheckTensor(check_, "position", *position, Types::kI64, {capacity}, &position_array));
  if (capacity < entries)
    return Error(StatusCode::kBufferTooSmall, "k.shape: expected room for ", entries,
                 " entries (express_entries), got ", capacity);
  EXPRESS_RETURN_IF_ERROR(ExportHead(layer * config_.kv_heads + kv_head, k_array, v_array,
                                     log_weight != nullptr ? &weight_array : nullptr,
                                     position != nullptr ? &position_array : nullptr));
  *count = entries;
  return Status();
}

Status Cache::GetStats(int32_t layer, Stats* stats) const {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  EXPRESS_RETURN_IF_ERROR(CheckLayer(layer, true));
  const int32_t first = layer == kAllLayers ? 0 : first_plan(layer);
  const int32_t end = layer == kAllLayers ? plans_.plan_count : end_plan(layer);
  Stats s;
  s.tokens = std::numeric_limits<int64_t>::max();
  s.min_weight = std::numeric_limits<int64_t>::max();
  for (int32_t i = first; i < end; ++i) {
    const PlanState& state = plans_.plans[i];
    const int64_t budget = state.plan.setting().budget;
    s.tokens = std::min(s.tokens, LayerTokens(state.layer));
    s.entries += state.plan.live() * state.head_count;
    s.entries_budget += budget * state.head_count;
    s.halvings += state.plan.halvings();
    for (int64_t slot = 0; slot < budget; ++slot) {
      const int64_t weight = state.plan.weight(slot);
      if (weight == 0) continue;
      s.min_weight = std::min(s.min_weight, weight);
      s.max_weight = std::max(s.max_weight, weight);
    }
  }
  if (s.max_weight == 0) s.min_weight = 0;
  s.entries_peak = layer == kAllLayers ? entries_peak_ : plans_.layer_peak[layer];
  s.bytes = s.bytes_peak = bytes_;
  s.compress_seconds = CompressSeconds();
  s.head_budgets = config_.head_budgets;
  *stats = s;
  return Status();
}

void Cache::CountEntries(int32_t first_layer, int32_t layers) {
  for (int32_t layer = first_layer; layer < first_layer + layers; ++layer) {
    int64_t entries = 0;
    for (int32_t i = first_plan(layer); i < end_plan(layer); ++i)
      entries += plans_.plans[i].plan.live() * plans_.plans[i].head_count;
    entries_ += entries - plans_.layer_entries[layer];
    plans_.layer_entries[layer] = entries;
    plans_.layer_peak[layer] = std::max(plans_.layer_peak[layer], entries);
  }
  entries_peak_ = std::max(entries_peak_, entries_);
}

Status Cache::Bytes(int64_t* bytes) const {
  *bytes = bytes_;
  return Status();
}

}  // namespace express::cache
