// One-shot compression: a cache in the caller's workspace, one append, one export.
#include "src/cache/cache.h"
#include "src/cache/message.h"

namespace express::cache {
namespace {

Status ResolveOneShot(const Config& config, Resolved* resolved, int64_t* bytes) {
  if (config.layers != 1) return Error(StatusCode::kInvalidArgument, "config.layers: expected 1, got ", config.layers);
  if (config.budget_unit != BudgetUnit::kEntries)
    return Error(StatusCode::kInvalidArgument, "config.budget_unit: expected ENTRIES, got ",
                 static_cast<int32_t>(config.budget_unit));
  if (!config.head_share.empty() || !config.head_settings.empty())
    return Error(StatusCode::kInvalidArgument,
                 "config: head_share and head_settings must be empty, all heads keep the same number");
  if (!config.auto_compress) return Error(StatusCode::kInvalidArgument, "config.auto_compress: expected on");
  return Cache::Resolve(config, resolved, bytes);
}

// The part of an output that is KV head g's.
Array OfHead(const Array& array, int64_t g) {
  Array part = array;
  part.data = static_cast<char*>(array.At(g));
  --part.rank;
  for (int32_t i = 0; i < part.rank; ++i) {
    part.shape[i] = array.shape[i + 1];
    part.stride[i] = array.stride[i + 1];
  }
  return part;
}

}  // namespace

Status Cache::CompressKvWorkspace(const Config& config, size_t* bytes) {
  Resolved resolved;
  int64_t size = 0;
  EXPRESS_RETURN_IF_ERROR(ResolveOneShot(config, &resolved, &size));
  *bytes = static_cast<size_t>(size);
  return Status();
}

Status Cache::CompressKv(const Config& config, const Tensor& k, const Tensor& v, const Tensor& out_k,
                         const Tensor& out_v, const Tensor& log_weight, const Tensor* position, int64_t* count,
                         const Workspace& workspace) {
  Resolved resolved;
  int64_t bytes = 0;
  EXPRESS_RETURN_IF_ERROR(ResolveOneShot(config, &resolved, &bytes));
  const int64_t heads = config.kv_heads;
  Array out_k_array, out_v_array, weight_array, position_array;
  EXPRESS_RETURN_IF_ERROR(CheckTensor("out_k", out_k, Types::kFloat, {heads, kAnySize, config.key_dim}, &out_k_array));
  const int64_t capacity = out_k_array.shape[1];
  EXPRESS_RETURN_IF_ERROR(
      CheckTensor("out_v", out_v, Types::kFloat, {heads, capacity, config.value_dim}, &out_v_array));
  EXPRESS_RETURN_IF_ERROR(CheckTensor("log_weight", log_weight, Types::kF32, {heads, capacity}, &weight_array));
  if (position != nullptr)
    EXPRESS_RETURN_IF_ERROR(CheckTensor("position", *position, Types::kI64, {heads, capacity}, &position_array));
  if (capacity < resolved.mean_entries)
    return Error(StatusCode::kBufferTooSmall, "out_k.shape: expected room for ", resolved.mean_entries,
                 " entries, got ", capacity);
  if (workspace.data == nullptr)
    return Error(StatusCode::kInvalidArgument, "workspace.data: expected a pointer, got NULL");
  if (reinterpret_cast<uintptr_t>(workspace.data) % Arena::kAlignment != 0)
    return Error(StatusCode::kInvalidArgument, "workspace.data: expected an address aligned to ", Arena::kAlignment);
  if (workspace.bytes < static_cast<size_t>(bytes))
    return Error(StatusCode::kBufferTooSmall, "workspace.bytes: expected at least ", bytes, ", got ", workspace.bytes);

  Cache* cache = Place(resolved, workspace.data, bytes);
  struct End {
    Cache* cache;
    ~End() { cache->~Cache(); }
  } end{cache};
  EXPRESS_RETURN_IF_ERROR(cache->Append(0, k, v));
  for (int32_t g = 0; g < config.kv_heads; ++g) {
    const Array head_weight = OfHead(weight_array, g),
                head_position = position != nullptr ? OfHead(position_array, g) : Array{};
    cache->ExportHead(cache->head(0, g), OfHead(out_k_array, g), OfHead(out_v_array, g), &head_weight,
                      position != nullptr ? &head_position : nullptr);
  }
  return cache->Entries(0, 0, count);
}

}  // namespace express::cache
