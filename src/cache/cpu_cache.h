// The cache on the CPU: heads that hold the slabs, and the kernels of src/cpu.
//
// Everything lies in one piece of memory, this object first (see Layout).
#ifndef EXPRESS_SRC_CACHE_CPU_CACHE_H_
#define EXPRESS_SRC_CACHE_CPU_CACHE_H_

#include <atomic>
#include <cstdint>

#include "src/cache/cache.h"
#include "src/cache/parallel.h"
#include "src/core/arena.h"
#include "src/core/random.h"
#include "src/cpu/kernels.h"

namespace express::cache {

// Attention takes a head's slots in runs of this many, whose softmax states are merged in order.
inline constexpr int64_t kSplit = 2048;
constexpr int64_t SplitCount(int64_t capacity) { return (capacity + kSplit - 1) / kSplit; }

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
struct CpuParts {
  KeptScoring* scoring;  // null where scores are energies of keys as they come
  Budgets budgets;
  Plans plans;
  HeadState* heads;  // (layers, kv_heads)
  BatchItem* batch;  // (plan_capacity)
  char* scratch;     // (threads, scratch_bytes)
  int64_t scratch_bytes;
  int64_t lse_offset;  // in a thread's scratch: (prefill_block, group) floats, where budgets are observed
  float* partials;     // (partial_floats): softmax states of one decode attention that is split over threads
  int64_t partial_floats;
};

class CpuCache final : public Cache {
 public:
  static Status Create(const Resolved& resolved, int64_t bytes, Cache** cache);
  static Status Bytes(const Resolved& resolved, int64_t* bytes);
  // compress_kv: everything in the caller's memory, which is aligned and has the bytes of the layout.
  static Status CompressOnce(const Resolved& resolved, void* memory, int64_t bytes, const Tensor& k, const Tensor& v,
                             const OneShotOutput& out, int64_t* count);

 private:
  CpuCache(const Resolved& resolved, const CpuParts& parts, int64_t bytes);
  ~CpuCache() override = default;
  // The layout of a resolved configuration; over a counting arena nothing but its counts is of use. If plans are not new, the parts
  // are in the arena's memory already, moved there from those of other settings.
  static CpuParts Layout(const Shape& shape, PlanSource source, Arena& arena);
  static CpuCache* Place(const Resolved& resolved, void* memory, int64_t bytes);

  void Delete() override;
  Status DoSetStream(void* stream) override;
  Status Ingest(const Input& input) override;
  Status DoAttend(int32_t layer, const Queries& queries) const override;
  Status DoWorkspaceSize(int64_t n, size_t* bytes) const override;
  Status DoPrefill(int32_t layer, const Queries& queries, const Input& input, const Workspace& workspace) override;
  Status ExecuteOperations(int32_t plan) override;
  Status ExportHead(int32_t head, const Array& k, const Array& v, const Array* log_weight,
                    const Array* position) const override;
  Status OpenHead(int32_t head, bool read, void* staging, HeadArrays* arrays) const override;
  Status StoreHead(int32_t head, const HeadArrays& arrays) override;
  Status FinishLoad() override;
  Status CopyHeads(const Cache& from) override;
  Status ResetData() override;
  void ResetHeads();
  bool ResizeFits() const override;
  void BeginResize(int32_t head, const plan::Setting& next) override;
  Status SplitPlans() override;
  Status FinishResize() override;
  // With the leaders that come next.
  Shape ShapeOf(const plan::Setting* settings) const;
  double CompressSeconds() const override { return static_cast<double>(compress_nanoseconds_.load()) * 1e-9; }

  const HeadState& head(int32_t layer, int32_t kv_head) const {
    return parts_.heads[layer * config_.kv_heads + kv_head];
  }
  void* scratch(int32_t worker) const { return parts_.scratch + worker * parts_.scratch_bytes; }

  // ingest.cc
  bool ExecuteBatch(int64_t items, const Input* input);
  void ApplyWeights(PlanState& state, int64_t op_begin, int64_t op_end);
  void ExecuteHead(HeadState& head, const BatchItem& item, const Input* input, int32_t worker);
  Status Broken();

  // observe.cc
  void ObserveDecode(const HeadState& head, const float* q, int64_t rows, const float* max, const float* sum) const;
  void ObserveBlock(const HeadState& head, const Array& q, int64_t row, int64_t position, const float* lse,
                    int64_t lse_stride) const;
  void Observe(const HeadState& head, int64_t position, const float* q, int64_t rows, const float* lse,
               int64_t lse_stride) const;

  // attend.cc
  bool AttendInParallel(int32_t layer, const Array& q, const Array& out, const Array* lse, Status* status) const;
  template <class Takes>
  Status PrefillBlock(int32_t layer, const Queries& queries, const Input& input, const Takes& takes);

  CpuParts parts_;
  Threads threads_;
  cpu::HalveParams halve_;
  plan::Setting largest_;  // where budgets are observed
  std::atomic<int64_t> compress_nanoseconds_{0};
  mutable std::atomic_flag partials_busy_;  // clear, as all are since C++20
};

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_CPU_CACHE_H_
