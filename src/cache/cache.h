// The cache of one sequence: plans that say what happens to slots, heads that hold the slabs, and the CPU kernels
// between them.
//
// Everything lies in one piece of memory, this object first (see Layout). Public operations are those of express.h;
// they check all their arguments before they change anything.
#ifndef EXPRESS_SRC_CACHE_CACHE_H_
#define EXPRESS_SRC_CACHE_CACHE_H_

#include <atomic>
#include <cstdint>

#include "express/cache.h"
#include "src/cache/check.h"
#include "src/cache/parallel.h"
#include "src/cache/resolve.h"
#include "src/core/arena.h"
#include "src/core/random.h"
#include "src/cpu/kernels.h"
#include "src/plan/plan.h"

namespace express::cache {

// Attention takes a head's slots in runs of this many, whose softmax states are merged in order.
inline constexpr int64_t kSplit = 2048;
constexpr int64_t SplitCount(int64_t capacity) { return (capacity + kSplit - 1) / kSplit; }

// One (layer, setting): the plan and what its KV heads share.
struct PlanState {
  plan::Plan plan;
  float* log_weight;  // (budget): -inf = free
  int32_t layer;
  int32_t first_head;  // its heads are plan_heads[first_head, first_head + head_count)
  int32_t head_count;
  int64_t call_begin;  // tokens before the append in progress
};

// One (layer, KV head).
struct HeadState {
  cpu::Slab slab;
  cpu::Protection protection;
  StreamKey key;
  int32_t layer;
  int32_t kv_head;  // within the layer
  int32_t plan;     // index into plans
};

// The operations of one plan for its next tokens.
struct BatchItem {
  int32_t plan;
  int64_t op_begin, op_end;
  int64_t first_task;  // tasks of the items before: a task is one item on one head
};

// The parts of a cache, all in one arena.
struct Parts {
  PlanState* plans;        // (plan_count), by layer
  HeadState* heads;        // (layers, kv_heads)
  int32_t* plan_heads;     // (layers, kv_heads): head indices grouped by plan
  int32_t* layer_plans;    // (layers + 1): plans of layer l are [layer_plans[l], layer_plans[l + 1])
  int64_t* layer_entries;  // (layers): entries held now
  int64_t* layer_peak;     // (layers): most entries held after a call
  int32_t plan_count;
  plan::Operations operations;
  BatchItem* batch;  // (plan_count)
  char* scratch;     // (threads, scratch_bytes)
  int64_t scratch_bytes;
  float* partials;  // (partial_floats): softmax states of one decode attention that is split over threads
  int64_t partial_floats;
};

// Keys and values to ingest, of layers [first_layer, first_layer + layers).
struct Input {
  Array k, v;  // (n, kv_heads, dim), or (layers, n, kv_heads, dim)
  int32_t first_layer, layers;
  int64_t first_token, tokens;  // rows [first_token, first_token + tokens) of n

  cpu::ConstRows Rows(const Array& array, int32_t layer, int32_t kv_head) const {
    if (array.rank == 3) return {array.At(first_token, kv_head), array.stride[0], array.dtype};
    return {array.At(layer - first_layer, first_token, kv_head), array.stride[1], array.dtype};
  }
};

class Cache {
 public:
  static Status Size(const Config& config, int64_t* bytes, int64_t* mean_entries);
  static Status Create(const Config& config, Cache** cache);
  static void Destroy(Cache* cache);
  static Status CompressKvWorkspace(const Config& config, size_t* bytes);
  static Status CompressKv(const Config& config, const Tensor& k, const Tensor& v, const Tensor& out_k,
                           const Tensor& out_v, const Tensor& log_weight, const Tensor* position, int64_t* count,
                           const Workspace& workspace);

  Status Append(int32_t layer, const Tensor& k, const Tensor& v);
  Status AppendAll(const Tensor& k, const Tensor& v);
  Status Attend(int32_t layer, const Tensor& q, const Tensor& out, const Tensor* lse) const;
  Status WorkspaceSize(int64_t n, size_t* bytes) const;
  Status Prefill(int32_t layer, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor* lse,
                 const Workspace* workspace);
  Status Compress(int32_t layer, int64_t tokens, int64_t* achieved);
  Status Rollback(int64_t tokens);
  Status RollbackAvailable(int64_t* tokens) const;
  Status Entries(int32_t layer, int32_t kv_head, int64_t* count) const;
  Status Export(int32_t layer, int32_t kv_head, const Tensor& k, const Tensor& v, const Tensor* log_weight,
                const Tensor* position, int64_t* count) const;
  Status Reset();
  Status GetStats(int32_t layer, Stats* stats) const;
  Status Bytes(int64_t* bytes) const;

  // layout.cc. The layout of a resolved configuration; over a counting arena nothing but arena.used() is of use.
  static Parts Layout(const Resolved& resolved, Arena& arena);
  // A cache in `memory`, which is aligned and has the bytes of the layout.
  static Cache* Place(const Resolved& resolved, void* memory, int64_t bytes);
  // Checks `config` and solves for a budget in bytes.
  static Status Resolve(const Config& config, Resolved* resolved, int64_t* bytes);

 private:
  Cache(const Resolved& resolved, const Parts& parts, int64_t bytes);
  ~Cache() = default;

  int32_t first_plan(int32_t layer) const { return parts_.layer_plans[layer]; }
  int32_t end_plan(int32_t layer) const { return parts_.layer_plans[layer + 1]; }
  const HeadState& head(int32_t layer, int32_t kv_head) const {
    return parts_.heads[layer * config_.kv_heads + kv_head];
  }
  int64_t layer_tokens(int32_t layer) const { return parts_.plans[first_plan(layer)].plan.tokens(); }
  void* scratch(int32_t worker) const { return parts_.scratch + worker * parts_.scratch_bytes; }
  void ResetState();
  void ExportHead(const HeadState& head, const Array& k, const Array& v, const Array* log_weight,
                  const Array* position) const;

  Status CheckUsable() const;
  Status CheckLayer(int32_t layer, bool all_allowed) const;
  // Keys and values of one layer, or of all in tensors of one more dimension.
  Status CheckInput(const Tensor& k, const Tensor& v, int32_t layer, Input* input) const;
  Status CheckRoom(const Input& input) const;

  // ingest.cc
  Status Ingest(const Input& input);
  bool ExecuteBatch(int64_t items, const Input* input);
  bool ExecuteOperations(int32_t plan);  // all of parts_.operations, on one plan
  void ApplyWeights(PlanState& state, int64_t op_begin, int64_t op_end);
  void ExecuteHead(HeadState& head, const BatchItem& item, const Input* input, int32_t worker);
  void CountEntries(int32_t first_layer, int32_t layers);
  Status Broken();

  // attend.cc
  bool AttendInParallel(int32_t layer, const Array& q, const Array& out, const Array* lse, Status* status) const;
  Status PrefillBlock(int32_t layer, const Array& q, const Input& input, const Array& out, const Array* lse);

  Config config_;  // resolved; no spans
  Parts parts_;
  int64_t bytes_;
  Threads threads_;
  cpu::HalveParams halve_;
  int64_t entries_ = 0;
  int64_t entries_peak_ = 0;
  int64_t entries_budget_ = 0;
  bool broken_ = false;
  std::atomic<int64_t> compress_nanoseconds_{0};
  mutable std::atomic_flag partials_busy_;  // clear, as all are since C++20
};

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_CACHE_H_
