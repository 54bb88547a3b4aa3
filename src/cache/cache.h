// The cache of one sequence: plans that say what happens to slots, and a backend that does it.
//
// Cache holds the plans and all that depends on counts only; it checks every argument before anything changes. CpuCache
// and CudaCache hold the entries and execute the operations. Public operations are those of express.h.
#ifndef EXPRESS_SRC_CACHE_CACHE_H_
#define EXPRESS_SRC_CACHE_CACHE_H_

#include <cstdint>

#include "express/cache.h"
#include "src/cache/budgets.h"
#include "src/cache/check.h"
#include "src/cache/plans.h"
#include "src/cache/resolve.h"
#include "src/core/archive.h"

namespace express::cache {

// Keys and values to ingest, of layers [first_layer, first_layer + layers).
struct Input {
  Array k, v;  // (n, kv_heads, dim), or (layers, n, kv_heads, dim)
  int32_t first_layer, layers;
  int64_t first_token, tokens;  // rows [first_token, first_token + tokens) of n

  // Element strides, and where the rows of a head begin.
  static int64_t RowStride(const Array& array) { return array.stride[array.rank - 3]; }
  static int64_t HeadStride(const Array& array) { return array.stride[array.rank - 2]; }
  void* Rows(const Array& array, int32_t layer, int32_t kv_head) const {
    if (array.rank == 3) return array.At(first_token, kv_head);
    return array.At(layer - first_layer, first_token, kv_head);
  }
};

// Outputs of compress_kv, checked: (kv_heads, capacity, ...).
struct OneShotOutput {
  const Array& k;
  const Array& v;
  const Array& log_weight;
  const Array* position;  // or null
};
// The part of an output that is KV head g's.
Array OfHead(const Array& array, int64_t g);

class Cache {
 public:
  static Status Size(const Config& config, int64_t* bytes, int64_t* mean_entries);
  static Status Create(const Config& config, Cache** cache);
  static void Destroy(Cache* cache);
  static Status CompressKvWorkspace(const Config& config, size_t* bytes);
  static Status CompressKv(const Config& config, const Tensor& k, const Tensor& v, const Tensor& out_k,
                           const Tensor& out_v, const Tensor& log_weight, const Tensor* position, int64_t* count,
                           const Workspace& workspace);

  Status SetStream(void* stream);
  Status Append(int32_t layer, const Tensor& k, const Tensor& v);
  Status AppendAll(const Tensor& k, const Tensor& v);
  Status Attend(int32_t layer, const Tensor& q, const Tensor& out, const Tensor* lse) const;
  Status WorkspaceSize(int64_t n, size_t* bytes) const;
  Status Prefill(int32_t layer, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor* lse,
                 const Workspace* workspace);
  Status Compress(int32_t layer, int64_t tokens, int64_t* achieved);
  Status Rollback(int64_t tokens);
  Status RollbackAvailable(int64_t* tokens) const;
  Status StepPrepare(int64_t n);
  Status StepCancel();
  Status Entries(int32_t layer, int32_t kv_head, int64_t* count) const;
  Status Export(int32_t layer, int32_t kv_head, const Tensor& k, const Tensor& v, const Tensor* log_weight,
                const Tensor* position, int64_t* count) const;
  Status Reset();
  Status GetStats(int32_t layer, Stats* stats) const;
  Status Bytes(int64_t* bytes) const;
  Status SaveSize(size_t* bytes) const;
  Status Save(void* data, size_t bytes) const;
  Status Load(const void* data, size_t bytes);
  Status Copy(const Cache& from);

  // One more token of one layer in each of `count` caches, and their attention: k and v (count, kv_heads, dim), q and out
  // (count, query_heads, dim), lse (count, query_heads).
  static Status AppendBatch(Cache* const* caches, int64_t count, int32_t layer, const Tensor& k, const Tensor& v);
  static Status AttendBatch(const Cache* const* caches, int64_t count, int32_t layer, const Tensor& q,
                            const Tensor& out, const Tensor* lse);

  const Config& config() const { return config_; }

 protected:
  // Attention outputs and queries that have passed their checks.
  struct Queries {
    Array q, out, lse;
    bool has_lse;
    const Array* lse_or_null() const { return has_lse ? &lse : nullptr; }
  };

  // What one head holds, in the host's memory.
  struct HeadArrays {
    char *key, *value;          // (capacity, dim) of the storage type
    char* scale;                // (capacity, cpu::ScaleBytes); nothing where those are 0
    int64_t* position;          // (capacity)
    float *mean, *sum, *score;  // (key_dim) twice, (protect); nothing where nothing is protected
    int32_t* protected_slot;    // (protect)
    int64_t protected_count, weakest;
  };

  Cache(const Resolved& resolved, const KeptScoring* scoring, const Plans& plans, const Budgets& budgets, int64_t bytes,
        TensorCheck check);
  virtual ~Cache() = default;

  // ---- the backend's part; arguments have been checked ----
  virtual void Delete() = 0;
  virtual Status DoSetStream(void* stream) = 0;
  virtual Status Ingest(const Input& input) = 0;
  virtual Status DoAttend(int32_t layer, const Queries& queries) const = 0;
  virtual Status DoWorkspaceSize(int64_t n, size_t* bytes) const = 0;
  virtual Status DoPrefill(int32_t layer, const Queries& queries, const Input& input, const Workspace& workspace) = 0;
  // Executes all of plans_.operations on the heads of one plan; none of them is a kWrite.
  virtual Status ExecuteOperations(int32_t plan) = 0;
  virtual Status ExportHead(int32_t head, const Array& k, const Array& v, const Array* log_weight,
                            const Array* position) const = 0;
  virtual Status ResetData() = 0;
  // Save and load: a head's arrays, in place or in `staging` (StagingBytes, aligned); what they hold is read from the device first
  // if `read`, and goes there by StoreHead.
  virtual size_t StagingBytes() const { return 0; }
  virtual Status OpenHead(int32_t head, bool read, void* staging, HeadArrays* arrays) const = 0;
  virtual Status StoreHead(int32_t head, const HeadArrays& arrays) = 0;
  virtual Status FinishLoad() { return Status(); }
  // Everything that heads hold, from a cache of the same backend and shape. Before that, where budgets are observed, BeginCopy: what
  // this cache holds is of no use any more.
  virtual Status BeginCopy() { return ResetData(); }
  virtual Status CopyHeads(const Cache& from) = 0;
  // Observed budgets. What was observed: is on its way to budgets_.observed from now on; is there, waiting if it must; is there,
  // for a cache to be saved; has been set there.
  virtual Status CloseObservation() { return Status(); }
  virtual Status AwaitObservation() { return Status(); }
  virtual Status FetchObserved() const { return Status(); }
  virtual Status StoreObserved() { return Status(); }
  virtual bool ObservationKnown() const { return true; }  // it has been closed, and is there; or it has not
  // Whether plans may change now; whether budgets_.settings fit into the cache's memory; heads that share a plan no longer
  // (budgets_.leader) get their own; all heads give up what the settings have no room for, and live slots move below the new budgets
  // (each head begins by BeginResize on the CPU); everything goes to where those settings have it. A cache that holds nothing has
  // new plans then.
  virtual bool CanResize() const { return true; }
  virtual bool ResizeFits() const { return false; }
  virtual Status SplitPlans() { return Status(); }
  virtual Status GiveUpAndCompact();
  virtual void BeginResize(int32_t, const plan::Setting&) {}
  virtual Status FinishResize() { return Status(); }
  virtual double CompressSeconds() const { return 0; }
  virtual Status DoStepPrepare(int64_t) { return Status(); }
  virtual Status DoStepCancel() { return Status(); }
  // Whether the plans are those of the tokens appended: nothing has been planned ahead.
  virtual Status CheckSettled() const { return Status(); }
  virtual int64_t LayerTokens(int32_t layer) const { return plans_.plans[first_plan(layer)].plan.tokens(); }
  virtual Status DoAppendBatch(Cache* const* caches, int64_t count, const Input& input);
  virtual Status DoAttendBatch(const Cache* const* caches, int64_t count, int32_t layer, const Queries& queries) const;

  // budgets.cc
  void ResetBudgets();
  int64_t FarDistance() const { return mean_budget_ / 2; }
  bool Observes(int64_t position) const {
    return budgets_.observed != nullptr && observation_closed_ == 0 && position % kObserveEvery == 0 &&
           position >= FarDistance() && position < ObservationEnd(mean_budget_);
  }
  bool AtStepBoundary() const;
  bool TakeShares();
  bool HoldsNothing() const;
  int32_t LeaderOf(int32_t head) const { return plans_.plan_heads[plans_.plans[plans_.head_plan[head]].first_head]; }
  const plan::Setting& NextSetting(int32_t plan) const {
    return budgets_.settings[plans_.plan_heads[plans_.plans[plan].first_head]];
  }
  Status SettleBudgets();
  Status ResizeHeads();
  Status EqualHeads();
  size_t CountSaveBytes() const;

  uint64_t Fingerprint() const;
  void TransferObservation(Archive& archive);
  void FindLeaders(const char* saved);
  void TransferPlans(Archive& archive);
  void TransferHead(Archive& archive, int32_t head, HeadArrays& arrays) const;
  int32_t HeadCount() const { return config_.layers * config_.kv_heads; }
  const plan::Setting& HeadSettingOf(int32_t head) const { return plans_.plans[plans_.head_plan[head]].plan.setting(); }

  int32_t first_plan(int32_t layer) const { return plans_.layer_plans[layer]; }
  int32_t end_plan(int32_t layer) const { return plans_.layer_plans[layer + 1]; }
  Status CheckUsable() const;
  Status CheckLayer(int32_t layer, bool all_allowed) const;
  // Keys and values of one layer, or of all in tensors of one more dimension.
  Status CheckInput(const Tensor& k, const Tensor& v, int32_t layer, Input* input) const;
  Status CheckRoom(const Input& input) const;
  Status CheckQueries(int64_t tokens, const Tensor& q, const Tensor& out, const Tensor* lse, Queries* queries) const;
  void ResetCounts();
  // After a mutating call on these layers: the entries held, and their peaks.
  void CountEntries(int32_t first_layer, int32_t layers);

  Config config_;  // resolved; its one span is the cache's own memory
  Plans plans_;
  Budgets budgets_;
  int64_t bytes_;
  TensorCheck check_;
  int64_t mean_budget_;
  int64_t next_settling_ = 0;       // tokens
  int64_t observation_closed_ = 0;  // 1: nothing is observed any more
  size_t save_bytes_;               // of a saved cache, its header included
  int64_t entries_ = 0;
  int64_t entries_peak_ = 0;
  int64_t entries_budget_ = 0;
  bool broken_ = false;
  bool in_batch_ = false;  // while AppendBatch looks for repetitions
};

// Checks `config` and solves for a budget in bytes; bytes are those of the cache on its device and on the host.
Status Resolve(const Config& config, Resolved* resolved, int64_t* bytes);

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_CACHE_H_
