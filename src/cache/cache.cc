#include "src/cache/cache.h"

#include <algorithm>
#include <limits>

#include "src/cache/message.h"

namespace express::cache {

Cache::Cache(const Resolved& resolved, const Parts& parts, int64_t bytes)
    : config_(resolved.config),
      parts_(parts),
      bytes_(bytes),
      threads_(resolved.threads, resolved.config.parallel_for, resolved.config.parallel_for_context),
      halve_{.scale = static_cast<float>(config_.scale),
             .gamma = static_cast<float>(config_.gamma),
             .tau = static_cast<float>(config_.tau),
             .delta = static_cast<float>(config_.delta),
             .coin = config_.halving == Halving::kCoin} {
  for (int32_t i = 0; i < parts_.plan_count; ++i)
    entries_budget_ += parts_.plans[i].plan.setting().budget * parts_.plans[i].head_count;
  ResetState();
}

void Cache::ResetState() {
  for (int32_t i = 0; i < parts_.plan_count; ++i) {
    PlanState& state = parts_.plans[i];
    state.plan.Reset();
    std::fill_n(state.log_weight, state.plan.setting().budget, -std::numeric_limits<float>::infinity());
  }
  for (int64_t h = 0; h < int64_t{config_.layers} * config_.kv_heads; ++h) {
    cpu::Protection& protection = parts_.heads[h].protection;
    protection.count = protection.weakest = 0;
    if (protection.capacity > 0) {
      std::fill_n(protection.mean, config_.key_dim, 0.0f);
      std::fill_n(protection.sum, config_.key_dim, 0.0f);
    }
  }
  std::fill_n(parts_.layer_entries, config_.layers, 0);
  std::fill_n(parts_.layer_peak, config_.layers, 0);
  entries_ = entries_peak_ = 0;
  compress_nanoseconds_ = 0;
  broken_ = false;
}

Status Cache::Reset() {
  ResetState();
  return Status();
}

Status Cache::CheckUsable() const {
  if (!broken_) return Status();
  return Error(StatusCode::kBroken,
               "cache: parallel_for did not run every task of an earlier call; only reset and destroy are allowed");
}

Status Cache::CheckLayer(int32_t layer, bool all_allowed) const {
  if ((layer >= 0 && layer < config_.layers) || (all_allowed && layer == kAllLayers)) return Status();
  return Error(StatusCode::kOutOfRange, "layer: expected 0 .. ", config_.layers - 1,
               all_allowed ? " or EXPRESS_AUTO, got " : ", got ", layer);
}

Status Cache::CheckInput(const Tensor& k, const Tensor& v, int32_t layer, Input* input) const {
  const Config& c = config_;
  if (layer == kAllLayers) {
    EXPRESS_RETURN_IF_ERROR(CheckTensor("k", k, Types::kFloat, {c.layers, kAnySize, c.kv_heads, c.key_dim}, &input->k));
    input->tokens = input->k.shape[1];
    EXPRESS_RETURN_IF_ERROR(
        CheckTensor("v", v, Types::kFloat, {c.layers, input->tokens, c.kv_heads, c.value_dim}, &input->v));
  } else {
    EXPRESS_RETURN_IF_ERROR(CheckTensor("k", k, Types::kFloat, {kAnySize, c.kv_heads, c.key_dim}, &input->k));
    input->tokens = input->k.shape[0];
    EXPRESS_RETURN_IF_ERROR(CheckTensor("v", v, Types::kFloat, {input->tokens, c.kv_heads, c.value_dim}, &input->v));
  }
  input->first_layer = layer == kAllLayers ? 0 : layer;
  input->layers = layer == kAllLayers ? c.layers : 1;
  input->first_token = 0;
  // Weights are 64-bit counts of tokens.
  for (int32_t i = 0; i < input->layers; ++i)
    if (input->tokens > (int64_t{1} << 60) - layer_tokens(input->first_layer + i))
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
    const int64_t room = parts_.plans[i].plan.RoomBeforeHalving();
    if (room < input.tokens)
      return Error(StatusCode::kWouldCompress, "k: ", input.tokens, " tokens need a halving in layer ",
                   parts_.plans[i].layer, ", which takes ", room,
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
  return Ingest(input);
}

Status Cache::AppendAll(const Tensor& k, const Tensor& v) {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  Input input{};
  EXPRESS_RETURN_IF_ERROR(CheckInput(k, v, kAllLayers, &input));
  EXPRESS_RETURN_IF_ERROR(CheckRoom(input));
  return Ingest(input);
}

Status Cache::WorkspaceSize(int64_t n, size_t* bytes) const {
  if (n < 0) return Error(StatusCode::kInvalidArgument, "n: expected >= 0, got ", n);
  *bytes = 0;  // prefill on the CPU works block by block, in the cache's own scratch
  return Status();
}

Status Cache::Compress(int32_t layer, int64_t tokens, int64_t* achieved) {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  EXPRESS_RETURN_IF_ERROR(CheckLayer(layer, true));
  if (tokens < 0) return Error(StatusCode::kInvalidArgument, "tokens: expected >= 0, got ", tokens);
  const int32_t first = layer == kAllLayers ? 0 : first_plan(layer);
  const int32_t end = layer == kAllLayers ? parts_.plan_count : end_plan(layer);
  int64_t room = std::numeric_limits<int64_t>::max();
  broken_ = true;
  for (int32_t i = first; i < end; ++i) {
    plan::Plan& plan = parts_.plans[i].plan;
    while (plan.RoomBeforeHalving() < tokens) {
      parts_.operations.Clear();
      if (!plan.HalveAhead(parts_.operations)) break;
      if (!ExecuteOperations(i)) return Broken();
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
  *tokens = std::numeric_limits<int64_t>::max();
  for (int32_t i = 0; i < parts_.plan_count; ++i) *tokens = std::min(*tokens, parts_.plans[i].plan.RollbackAvailable());
  return Status();
}

Status Cache::Rollback(int64_t tokens) {
  int64_t available = 0;
  EXPRESS_RETURN_IF_ERROR(RollbackAvailable(&available));
  if (tokens < 0) return Error(StatusCode::kInvalidArgument, "tokens: expected >= 0, got ", tokens);
  if (tokens > available)
    return Error(StatusCode::kRollbackUnavailable, "tokens: expected at most ", available,
                 " (express_rollback_available), got ", tokens);
  for (int32_t i = 0; i < parts_.plan_count && tokens > 0; ++i) {
    parts_.operations.Clear();
    parts_.plans[i].plan.Rollback(tokens, parts_.operations);
    ApplyWeights(parts_.plans[i], 0, parts_.operations.size());
  }
  CountEntries(0, config_.layers);
  return Status();
}

Status Cache::Entries(int32_t layer, int32_t kv_head, int64_t* count) const {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  EXPRESS_RETURN_IF_ERROR(CheckLayer(layer, false));
  if (kv_head < 0 || kv_head >= config_.kv_heads)
    return Error(StatusCode::kOutOfRange, "kv_head: expected 0 .. ", config_.kv_heads - 1, ", got ", kv_head);
  *count = parts_.plans[head(layer, kv_head).plan].plan.live();
  return Status();
}

Status Cache::Export(int32_t layer, int32_t kv_head, const Tensor& k, const Tensor& v, const Tensor* log_weight,
                     const Tensor* position, int64_t* count) const {
  int64_t entries = 0;
  EXPRESS_RETURN_IF_ERROR(Entries(layer, kv_head, &entries));
  Array k_array, v_array, weight_array, position_array;
  EXPRESS_RETURN_IF_ERROR(CheckTensor("k", k, Types::kFloat, {kAnySize, config_.key_dim}, &k_array));
  const int64_t capacity = k_array.shape[0];
  EXPRESS_RETURN_IF_ERROR(CheckTensor("v", v, Types::kFloat, {capacity, config_.value_dim}, &v_array));
  if (log_weight != nullptr)
    EXPRESS_RETURN_IF_ERROR(CheckTensor("log_weight", *log_weight, Types::kF32, {capacity}, &weight_array));
  if (position != nullptr)
    EXPRESS_RETURN_IF_ERROR(CheckTensor("position", *position, Types::kI64, {capacity}, &position_array));
  if (capacity < entries)
    return Error(StatusCode::kBufferTooSmall, "k.shape: expected room for ", entries,
                 " entries (express_entries), got ", capacity);
  ExportHead(head(layer, kv_head), k_array, v_array, log_weight != nullptr ? &weight_array : nullptr,
             position != nullptr ? &position_array : nullptr);
  *count = entries;
  return Status();
}

// Rank-2 k and v, rank-1 weights and positions.
void Cache::ExportHead(const HeadState& head, const Array& k, const Array& v, const Array* log_weight,
                       const Array* position) const {
  const PlanState& state = parts_.plans[head.plan];
  const cpu::Slab& slab = head.slab;
  const int64_t element = SizeOf(slab.dtype);
  int64_t row = 0;
  for (int64_t slot = 0; slot < slab.capacity; ++slot) {
    if (state.plan.weights()[slot] == 0) continue;
    cpu::Convert(static_cast<const char*>(slab.key) + slot * slab.key_dim * element, slab.dtype, k.At(row), k.dtype,
                 slab.key_dim);
    cpu::Convert(static_cast<const char*>(slab.value) + slot * slab.value_dim * element, slab.dtype, v.At(row), v.dtype,
                 slab.value_dim);
    if (log_weight != nullptr) *static_cast<float*>(log_weight->At(row)) = state.log_weight[slot];
    if (position != nullptr) *static_cast<int64_t*>(position->At(row)) = slab.position[slot];
    ++row;
  }
}

Status Cache::GetStats(int32_t layer, Stats* stats) const {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  EXPRESS_RETURN_IF_ERROR(CheckLayer(layer, true));
  const int32_t first = layer == kAllLayers ? 0 : first_plan(layer);
  const int32_t end = layer == kAllLayers ? parts_.plan_count : end_plan(layer);
  Stats s;
  s.tokens = std::numeric_limits<int64_t>::max();
  s.min_weight = std::numeric_limits<int64_t>::max();
  for (int32_t i = first; i < end; ++i) {
    const PlanState& state = parts_.plans[i];
    const int64_t budget = state.plan.setting().budget;
    s.tokens = std::min(s.tokens, state.plan.tokens());
    s.entries += state.plan.live() * state.head_count;
    s.entries_budget += budget * state.head_count;
    s.halvings += state.plan.halvings();
    for (int64_t slot = 0; slot < budget; ++slot) {
      const int64_t weight = state.plan.weights()[slot];
      if (weight == 0) continue;
      s.min_weight = std::min(s.min_weight, weight);
      s.max_weight = std::max(s.max_weight, weight);
    }
  }
  if (s.max_weight == 0) s.min_weight = 0;
  s.entries_peak = layer == kAllLayers ? entries_peak_ : parts_.layer_peak[layer];
  s.bytes = s.bytes_peak = bytes_;
  s.compress_seconds = static_cast<double>(compress_nanoseconds_.load()) * 1e-9;
  *stats = s;
  return Status();
}

Status Cache::Bytes(int64_t* bytes) const {
  *bytes = bytes_;
  return Status();
}

}  // namespace express::cache
