// One-shot compression: a cache in the caller's workspace, one append, one export.
#include "src/cache/cache.h"
#include "src/cache/cpu_cache.h"
#include "src/cache/message.h"
#ifdef EXPRESS_WITH_CUDA
#include "src/cache/cuda_cache.h"
#endif

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
  Config fixed = config;  // nothing is attended to
  fixed.head_budgets = HeadBudgets::kFixed;
  EXPRESS_RETURN_IF_ERROR(Resolve(fixed, resolved, bytes));
#ifdef EXPRESS_WITH_CUDA
  if (config.device_type == DeviceType::kCuda) return CudaCache::OneShotBytes(*resolved, bytes);
#endif
  return Status();
}

TensorCheck CheckFor(const Config& config) {
#ifdef EXPRESS_WITH_CUDA
  if (config.device_type == DeviceType::kCuda) return CudaTensorCheck(config.device_id);
#endif
  return {.device_type = config.device_type, .device_id = config.device_id};
}

}  // namespace

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
  const TensorCheck check = CheckFor(config);
  Array out_k_array, out_v_array, weight_array, position_array;
  EXPRESS_RETURN_IF_ERROR(
      CheckTensor(check, "out_k", out_k, Types::kFloat, {heads, kAnySize, config.key_dim}, &out_k_array));
  const int64_t capacity = out_k_array.shape[1];
  EXPRESS_RETURN_IF_ERROR(
      CheckTensor(check, "out_v", out_v, Types::kFloat, {heads, capacity, config.value_dim}, &out_v_array));
  EXPRESS_RETURN_IF_ERROR(CheckTensor(check, "log_weight", log_weight, Types::kF32, {heads, capacity}, &weight_array));
  if (position != nullptr)
    EXPRESS_RETURN_IF_ERROR(CheckTensor(check, "position", *position, Types::kI64, {heads, capacity}, &position_array));
  if (capacity < resolved.mean_entries)
    return Error(StatusCode::kBufferTooSmall, "out_k.shape: expected room for ", resolved.mean_entries,
                 " entries, got ", capacity);
  if (workspace.data == nullptr)
    return Error(StatusCode::kInvalidArgument, "workspace.data: expected a pointer, got NULL");
  if (reinterpret_cast<uintptr_t>(workspace.data) % Arena::kAlignment != 0)
    return Error(StatusCode::kInvalidArgument, "workspace.data: expected an address aligned to ", Arena::kAlignment);
  if (workspace.bytes < static_cast<size_t>(bytes))
    return Error(StatusCode::kBufferTooSmall, "workspace.bytes: expected at least ", bytes, ", got ", workspace.bytes);

  const OneShotOutput output{out_k_array, out_v_array, weight_array, position != nullptr ? &position_array : nullptr};
#ifdef EXPRESS_WITH_CUDA
  if (config.device_type == DeviceType::kCuda)
    return CudaCache::CompressOnce(resolved, workspace.data, bytes, k, v, output, count);
#endif
  return CpuCache::CompressOnce(resolved, workspace.data, bytes, k, v, output, count);
}

}  // namespace express::cache
