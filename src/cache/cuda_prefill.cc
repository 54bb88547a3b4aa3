// The calls that take a prompt on the GPU: prefill, compress_kv, and how much memory they need.
#include <initializer_list>
#include <limits>
#include <utility>

#include "src/cache/cuda_prompt.h"
#include "src/cache/message.h"

namespace express::cache {
namespace {

// Attention over a prompt takes its tensors as they are: all of the storage type, or, where that is in 8 bits, all of one type.
Status CheckTypes(const char* where, DType stored, std::initializer_list<std::pair<const char*, DType>> tensors) {
  const bool scaled = stored == DType::kI8;
  const DType expected = scaled ? tensors.begin()->second : stored;
  for (const auto& [name, dtype] : tensors)
    if (dtype != expected)
      return Error(StatusCode::kDtypeMismatch, name, ".dtype: ", where, " expected ",
                   scaled ? "the type of the other tensors (" : "config.dtype (", static_cast<int32_t>(expected),
                   "), got ", static_cast<int32_t>(dtype));
  return Status();
}

}  // namespace

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
  EXPRESS_RETURN_IF_ERROR(
      CheckTypes("in prefill on CUDA", config_.dtype,
                 {{"q", queries.q.dtype}, {"out", queries.out.dtype}, {"k", input.k.dtype}, {"v", input.v.dtype}}));
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
  Input part = input;
  Queries part_queries = queries;
  for (int64_t done = 0; done < input.tokens; done += part.tokens) {
    part.first_token = input.first_token + done;
    part.tokens = PromptRun::PartOf(config_, LayerTokens(layer), input.tokens - done, true);
    part_queries.q.data = static_cast<char*>(queries.q.At(done));
    part_queries.out.data = static_cast<char*>(queries.out.At(done));
    if (queries.has_lse) part_queries.lse.data = static_cast<char*>(queries.lse.At(done));
    EXPRESS_RETURN_IF_ERROR(PrefillPart(layer, part_queries, part, workspace.data));
  }
  CountEntries(layer, 1);
  return Status();
}

// Breaks the cache if it throws when a part before it has been enqueued, or if it fails.
Status CudaCache::PrefillPart(int32_t layer, const Queries& queries, const Input& input, void* workspace) {
  PromptRun run(*this, layer, input, &queries, workspace);
  broken_ = input.first_token > 0;
  run.Reserve();
  broken_ = true;  // until all is enqueued
  run.Quantise();
  ObservePrompt(layer, queries, input, run.stored_k());
  EXPRESS_RETURN_IF_ERROR(run.Run());
  broken_ = false;
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
  EXPRESS_RETURN_IF_ERROR(CheckTypes("on CUDA", resolved.config.dtype, {{"k", input.k.dtype}, {"v", input.v.dtype}}));
  if (input.tokens >= std::numeric_limits<int32_t>::max())
    return Error(StatusCode::kSizeOverflow, "k.shape: expected fewer than 2^31 tokens, got ", input.tokens);
  cache->InitDevice();
  char* workspace = static_cast<char*>(memory) + AlignedBytes(device);
  if (resolved.config.dtype == DType::kI8) {
    EXPRESS_RETURN_IF_ERROR(CompressCodes(cache, input, workspace, out));
    return cache->Entries(0, 0, count);
  }
  PromptRun run(*cache, 0, input, nullptr, workspace);
  run.SetOutput(&out);
  run.Reserve();
  if (input.tokens > 0) EXPRESS_RETURN_IF_ERROR(run.Run());
  return cache->Entries(0, 0, count);
}

// In 8 bits: part after part into the slabs, and those to the outputs.
Status CudaCache::CompressCodes(CudaCache* cache, Input input, void* workspace, const OneShotOutput& out) {
  for (int64_t end = input.first_token + input.tokens; input.first_token < end; input.first_token += input.tokens) {
    input.tokens = PromptRun::PartOf(cache->config_, cache->LayerTokens(0), end - input.first_token, false);
    PromptRun run(*cache, 0, input, nullptr, workspace);
    run.Reserve();
    run.Quantise();
    EXPRESS_RETURN_IF_ERROR(run.Run());
  }
  for (int32_t g = 0; g < cache->config_.kv_heads; ++g) {
    const Array k = OfHead(out.k, g), v = OfHead(out.v, g), log_weight = OfHead(out.log_weight, g);
    const Array position = out.position != nullptr ? OfHead(*out.position, g) : Array();
    EXPRESS_RETURN_IF_ERROR(cache->ExportHead(g, k, v, &log_weight, out.position != nullptr ? &position : nullptr));
  }
  return Status();
}

}  // namespace express::cache
