// ExpressCache: the weighted KV cache of one sequence, in C++. The operations are those of the C ABI (express.h), where
// shapes, errors, threads and the state after a failure are documented; this header only wraps them in types.
#ifndef EXPRESS_CACHE_H_
#define EXPRESS_CACHE_H_

#include <cstddef>
#include <span>
#include <utility>

#include "express/config.h"
#include "express/status.h"
#include "express/tensor.h"

namespace express {

namespace cache {
class Cache;
}

struct Stats {
  int64_t tokens = 0;
  int64_t entries = 0;
  int64_t entries_peak = 0;
  int64_t entries_budget = 0;
  int64_t min_weight = 0;
  int64_t max_weight = 0;
  int64_t halvings = 0;
  int64_t bytes = 0;
  int64_t bytes_peak = 0;
  double compress_seconds = 0;
  HeadBudgets head_budgets = HeadBudgets::kFixed;
};

struct Workspace {
  void* data = nullptr;
  size_t bytes = 0;
};

inline constexpr int32_t kAllLayers = -1;

// A handle: movable, not copyable. An empty one (default constructed, moved from) answers every call with
// kInvalidArgument.
class EXPRESS_EXPORT ExpressCache {
 public:
  ExpressCache() = default;
  ~ExpressCache();
  ExpressCache(ExpressCache&& other) noexcept : cache_(std::exchange(other.cache_, nullptr)) {}
  ExpressCache& operator=(ExpressCache&& other) noexcept {
    std::swap(cache_, other.cache_);
    return *this;
  }

  // express_size, express_create: on failure *cache is left as it was.
  static Status Size(const Config& config, int64_t* bytes, int64_t* mean_entries);
  static Status Create(const Config& config, ExpressCache* cache);

  Status Append(int32_t layer, const Tensor& k, const Tensor& v);
  Status AppendAll(const Tensor& k, const Tensor& v);
  Status Attend(int32_t layer, const Tensor& q, const Tensor& out, const Tensor* lse = nullptr) const;
  Status WorkspaceSize(int64_t n, size_t* bytes) const;
  Status Prefill(int32_t layer, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                 const Tensor* lse = nullptr, const Workspace* workspace = nullptr);
  Status SetStream(void* stream);
  Status StepPrepare(int64_t n);
  Status StepCancel();
  Status Compress(int32_t layer, int64_t tokens, int64_t* achieved = nullptr);
  Status Rollback(int64_t tokens);
  Status RollbackAvailable(int64_t* tokens) const;
  Status Entries(int32_t layer, int32_t kv_head, int64_t* count) const;
  Status Export(int32_t layer, int32_t kv_head, const Tensor& k, const Tensor& v, const Tensor* log_weight,
                const Tensor* position, int64_t* count) const;
  Status Reset();
  Status GetStats(int32_t layer, Stats* stats) const;
  Status Bytes(int64_t* bytes) const;
  Status SaveSize(size_t* bytes) const;
  Status Save(void* data, size_t bytes) const;
  Status Load(const void* data, size_t bytes);
  Status Copy(const ExpressCache& from);

  // express_append_batch, express_attend_batch.
  static Status AppendBatch(std::span<ExpressCache* const> caches, int32_t layer, const Tensor& k, const Tensor& v);
  static Status AttendBatch(std::span<const ExpressCache* const> caches, int32_t layer, const Tensor& q,
                            const Tensor& out, const Tensor* lse = nullptr);

  // express_compress_kv.
  static Status CompressKvWorkspace(const Config& config, size_t* bytes);
  static Status CompressKv(const Config& config, const Tensor& k, const Tensor& v, const Tensor& out_k,
                           const Tensor& out_v, const Tensor& log_weight, const Tensor* position, int64_t* count,
                           const Workspace& workspace);

 private:
  cache::Cache* cache_ = nullptr;
};

}  // namespace express

#endif  // EXPRESS_CACHE_H_
