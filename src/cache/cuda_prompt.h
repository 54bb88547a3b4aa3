// A prompt on the GPU: many tokens of one layer at once, with or without attention.
//
// The plan of the prompt is known before any arithmetic. The prompt is taken in spans; of each, the host records the plan as a
// graph of nodes (src/plan/span.h) and the device computes which token every node is: scores and protected entries, then
// samples and halvings by depth, over all KV heads. Keys and values stay where the caller has them; a query block reads
// them through a list. The slabs are written once, at the end.
#ifndef EXPRESS_SRC_CACHE_CUDA_PROMPT_H_
#define EXPRESS_SRC_CACHE_CUDA_PROMPT_H_

#include <vector>

#include "src/cache/cuda_cache.h"
#include "src/core/arena.h"
#include "src/plan/span.h"

namespace express::cache {

class PromptRun {
 public:
  static constexpr int64_t kSpan = 32768;  // tokens

  // Of what a workspace for prompts up to `tokens` tokens is made. `block` 0: no attention.
  struct Shape {
    int64_t span, blocks;                           // of one span
    int64_t nodes, samples, halves, list, members;  // of a plan, of a span
  };
  static Shape ShapeOf(const Config& config, int64_t most_budget, int64_t tokens, int64_t block);
  // Bytes of workspace for one layer.
  static int64_t Bytes(const CudaCache& cache, int64_t tokens, bool attention);

  // `queries` may be null. The workspace has Bytes and is aligned to 256.
  PromptRun(CudaCache& cache, int32_t layer, const Input& input, const CudaCache::Queries* queries, void* workspace);
  // The host's memory, before anything changes; throws std::bad_alloc.
  void Reserve();
  Status Run();
  // Instead of slabs: the entries go to the outputs of compress_kv.
  void SetOutput(const OneShotOutput* output) { output_ = output; }

 private:
  // Device memory.
  struct Memory {
    cuda::SpanPlan* plans;             // (plan_count)
    cuda::SpanHead* span_heads;        // (2, kv_heads): by the parity of the span
    cuda::AdmitHead* admit_heads;      // (kv_heads), by plan
    cuda::PrefillHead* prefill_heads;  // (2, kv_heads): by parity
    cuda::GatherHead* gather_heads;    // (kv_heads)
    cuda::GatherHead* stage_heads;     // (kv_heads)
    cuda::SpanSample* samples;
    cuda::SpanHalve* halves;
    int32_t* list;
    cuda::SpanMember* members;
    cuda::SpanDepartures* departures;  // (plan_count)
    cuda::SpanStorePlan* store_plans;  // (plan_count)
    cuda::SpanStoreHead* store_heads;  // (kv_heads)
  };
  struct PlanMemory {
    int32_t *heads, *sink_index, *old_tail, *slot_nodes, *snapshot_at, *code, *to;
    float* weights;
    cuda::SpanBlock* blocks;
  };
  struct HeadMemory {
    int32_t *values[2], *snapshots, *far_index[2], *far_count[2], *protected_index, *index, *to;
    float *far_bias[2], *scores, *run_means;
    int32_t *source, *stage_index;
    uint8_t* keep;
    char *halve_scratch, *stage_key, *stage_value;
    int64_t* stage_position;
  };
  static void Layout(const CudaCache& cache, const Shape& shape, bool attention, Arena& arena, Memory* memory,
                     std::vector<PlanMemory>* plans, std::vector<HeadMemory>* heads);

  int32_t plan_count() const { return cache_.end_plan(layer_) - cache_.first_plan(layer_); }
  PlanState& plan(int32_t i) const { return cache_.plans_.plans[cache_.first_plan(layer_) + i]; }
  int32_t PlanOf(int32_t kv_head) const;
  const cuda::Head& head(int32_t kv_head) const;
  void Describe();
  void RunSpan(int64_t first, int64_t tokens);
  void SendSpan(int64_t first, int64_t tokens);
  void LaunchAdmit(int32_t plan, int64_t departures);
  void LaunchAttention(int64_t first, int64_t tokens);
  cuda::SpanArgs Arguments() const;
  void Follow(cudaStream_t earlier, cudaEvent_t event, cudaStream_t later) const;
  int64_t FirstRow(int32_t plan) const;
  Status Store();
  void ListEntries(int32_t plan);
  void DescribeCopies(int32_t kv_head, int32_t count);

  CudaCache& cache_;
  int32_t layer_;
  Input input_;
  const CudaCache::Queries* queries_;
  const OneShotOutput* output_ = nullptr;
  void* workspace_;
  cuda::Rows k_, v_;
  int64_t first_position_;  // of row 0
  int64_t block_;           // 0: no attention
  Shape shape_;
  Memory memory_{};
  std::vector<PlanMemory> plan_memory_;
  std::vector<HeadMemory> head_memory_;
  cudaStream_t side_;  // where entries are selected
  cuda::Uploader uploader_;
  plan::Span span_;
  int64_t spans_ = 0;  // done
  // Per plan: what the call began with, and departures so far.
  struct Begin {
    std::vector<int32_t> old_tail;  // slots, oldest first
    int64_t departures = 0, first_departures = 0, protected_count = 0;
  };
  std::vector<Begin> begin_;
  std::vector<std::vector<int32_t>> joined_;  // per plan: slots of the protected entries, in order
  std::vector<cuda::AdmitHead> admit_;        // (kv_heads), by plan
  std::vector<cuda::SpanBlock> blocks_;
  std::vector<int32_t> ints_, more_ints_, ranks_;
  std::vector<float> floats_;
};

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_CUDA_PROMPT_H_
