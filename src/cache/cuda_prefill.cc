// The calls that take a prompt on the GPU: prefill, compress_kv, and how much memory they need.
#include <limits>
#include <utility>

#include "src/cache/cuda_prompt.h"
#include "src/cache/message.h"

namespace express::cache {

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
  ObservePrompt(layer, queries, input);
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
