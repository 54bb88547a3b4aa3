// The public C++ handle: a pointer to the cache, checked for emptiness.
#include <vector>

#include "express/cache.h"
#include "src/cache/cache.h"

namespace express {
namespace {

Status Empty() { return Status(StatusCode::kInvalidArgument, "cache: empty handle"); }

}  // namespace

ExpressCache::~ExpressCache() { cache::Cache::Destroy(cache_); }

Status ExpressCache::Size(const Config& config, int64_t* bytes, int64_t* mean_entries) {
  return cache::Cache::Size(config, bytes, mean_entries);
}

Status ExpressCache::Create(const Config& config, ExpressCache* cache) {
  ExpressCache created;
  Status status = cache::Cache::Create(config, &created.cache_);
  if (status.ok()) *cache = std::move(created);
  return status;
}

Status ExpressCache::Append(int32_t layer, const Tensor& k, const Tensor& v) {
  return cache_ == nullptr ? Empty() : cache_->Append(layer, k, v);
}
Status ExpressCache::AppendAll(const Tensor& k, const Tensor& v) {
  return cache_ == nullptr ? Empty() : cache_->AppendAll(k, v);
}
Status ExpressCache::Attend(int32_t layer, const Tensor& q, const Tensor& out, const Tensor* lse) const {
  return cache_ == nullptr ? Empty() : cache_->Attend(layer, q, out, lse);
}
Status ExpressCache::WorkspaceSize(int64_t n, size_t* bytes) const {
  return cache_ == nullptr ? Empty() : cache_->WorkspaceSize(n, bytes);
}
Status ExpressCache::Prefill(int32_t layer, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                             const Tensor* lse, const Workspace* workspace) {
  return cache_ == nullptr ? Empty() : cache_->Prefill(layer, q, k, v, out, lse, workspace);
}
Status ExpressCache::SetStream(void* stream) { return cache_ == nullptr ? Empty() : cache_->SetStream(stream); }
Status ExpressCache::StepPrepare(int64_t n) { return cache_ == nullptr ? Empty() : cache_->StepPrepare(n); }
Status ExpressCache::StepCancel() { return cache_ == nullptr ? Empty() : cache_->StepCancel(); }
Status ExpressCache::SaveSize(size_t* bytes) const { return cache_ == nullptr ? Empty() : cache_->SaveSize(bytes); }
Status ExpressCache::Save(void* data, size_t bytes) const {
  return cache_ == nullptr ? Empty() : cache_->Save(data, bytes);
}
Status ExpressCache::Load(const void* data, size_t bytes) {
  return cache_ == nullptr ? Empty() : cache_->Load(data, bytes);
}
Status ExpressCache::Copy(const ExpressCache& from) {
  return cache_ == nullptr || from.cache_ == nullptr ? Empty() : cache_->Copy(*from.cache_);
}
Status ExpressCache::AppendBatch(std::span<ExpressCache* const> caches, int32_t layer, const Tensor& k,
                                 const Tensor& v) {
  std::vector<cache::Cache*> inner(caches.size());
  for (size_t i = 0; i < caches.size(); ++i) inner[i] = caches[i] != nullptr ? caches[i]->cache_ : nullptr;
  return cache::Cache::AppendBatch(inner.data(), static_cast<int64_t>(inner.size()), layer, k, v);
}
Status ExpressCache::AttendBatch(std::span<const ExpressCache* const> caches, int32_t layer, const Tensor& q,
                                 const Tensor& out, const Tensor* lse) {
  std::vector<const cache::Cache*> inner(caches.size());
  for (size_t i = 0; i < caches.size(); ++i) inner[i] = caches[i] != nullptr ? caches[i]->cache_ : nullptr;
  return cache::Cache::AttendBatch(inner.data(), static_cast<int64_t>(inner.size()), layer, q, out, lse);
}
Status ExpressCache::Compress(int32_t layer, int64_t tokens, int64_t* achieved) {
  return cache_ == nullptr ? Empty() : cache_->Compress(layer, tokens, achieved);
}
Status ExpressCache::Rollback(int64_t tokens) { return cache_ == nullptr ? Empty() : cache_->Rollback(tokens); }
Status ExpressCache::RollbackAvailable(int64_t* tokens) const {
  return cache_ == nullptr ? Empty() : cache_->RollbackAvailable(tokens);
}
Status ExpressCache::Entries(int32_t layer, int32_t kv_head, int64_t* count) const {
  return cache_ == nullptr ? Empty() : cache_->Entries(layer, kv_head, count);
}
Status ExpressCache::Export(int32_t layer, int32_t kv_head, const Tensor& k, const Tensor& v, const Tensor* log_weight,
                            const Tensor* position, int64_t* count) const {
  return cache_ == nullptr ? Empty() : cache_->Export(layer, kv_head, k, v, log_weight, position, count);
}
Status ExpressCache::Reset() { return cache_ == nullptr ? Empty() : cache_->Reset(); }
Status ExpressCache::GetStats(int32_t layer, Stats* stats) const {
  return cache_ == nullptr ? Empty() : cache_->GetStats(layer, stats);
}
Status ExpressCache::Bytes(int64_t* bytes) const { return cache_ == nullptr ? Empty() : cache_->Bytes(bytes); }

Status ExpressCache::CompressKvWorkspace(const Config& config, size_t* bytes) {
  return cache::Cache::CompressKvWorkspace(config, bytes);
}
Status ExpressCache::CompressKv(const Config& config, const Tensor& k, const Tensor& v, const Tensor& out_k,
                                const Tensor& out_v, const Tensor& log_weight, const Tensor* position, int64_t* count,
                                const Workspace& workspace) {
  return cache::Cache::CompressKv(config, k, v, out_k, out_v, log_weight, position, count, workspace);
}

}  // namespace express
