// A prompt on the GPU: many tokens of one layer at once, with or without attention.
//
// The plan of the prompt is known before any arithmetic. The prompt is taken in spans; of each, the host records the plan as a
// graph of nodes (src/plan/span.h) and the device computes which token every node is: scores and protected entries, then
// samples and halvings by depth, over all KV heads. Keys and values stay where the caller has them; a query block reads
// them through a list. The slabs are written once, at the end.
//
// Three streams work side by side: on one, the protected entries of a span are chosen; on one, the graph of the span before runs;
// on the caller's, the queries of the span before that attend. Queries that see all tokens before them, because the cache
// has room for all or the prompt is short (exact_prompt.h), wait for no selection: it is what they run beside.
#ifndef EXPRESS_SRC_CACHE_CUDA_PROMPT_H_
#define EXPRESS_SRC_CACHE_CUDA_PROMPT_H_

#include <memory>
#include <vector>

#include "src/cache/cuda_cache.h"
#include "src/core/arena.h"
#include "src/plan/span.h"

namespace express::cache {

// The entries of a plan after a prompt: what they are, where they belong, and what slots weigh.
struct EntryLists {
  std::vector<int32_t> code, to;  // nodes of the coreset first, then protected entries, then rows
  std::vector<float> weights;
  int32_t nodes = 0;
  void Reserve(int64_t budget) {
    code.reserve(static_cast<size_t>(budget));
    to.reserve(static_cast<size_t>(budget));
    weights.reserve(static_cast<size_t>(budget));
  }
};

// What the host keeps from prompt to prompt of a cache. Few settings differ from layer to layer of a model, and plans of one setting do
// the same in a prompt: what was recorded for one serves the next.
struct PromptHost {
  struct Recording {
    plan::Setting setting;
    bool complete = false;
    std::vector<char> before, after;  // the plan's states
    std::vector<plan::Span> spans;    // of this plan alone
    bool listed = false;
    EntryLists lists;  // of the end
    int64_t used = 0;  // the last call that has used it
  };
  int64_t tokens = 0, block = 0;  // of the prompts that are recorded
  int64_t calls = 0;
  std::vector<std::unique_ptr<Recording>> recordings;
  std::vector<plan::Span> alone;  // of each plan of the layer, in work
  plan::Span joined;
};

class PromptRun {
 public:
  static constexpr int64_t kSpan = 32768;  // tokens
  // Up to so many plans are recorded, or as many as a layer has: of prompts of up to so many tokens, or of up to twice as many, if these
  // do not take more memory.
  static constexpr int64_t kRecordings = 16, kRecorded = 16384;

  // Of 8-bit storage, what a prompt brings is quantised first; longer ones are taken as several prompts.
  static constexpr int64_t kQuantised = kSpan;
  // Tokens that a prompt of `tokens` tokens, of which the first has this position, is taken up to.
  static int64_t PartOf(const Config& config, int64_t position, int64_t tokens, bool attention);

  // Of what a workspace for prompts up to `tokens` tokens is made. `block` 0: no attention.
  struct Shape {
    int64_t quantised;                              // rows
    int64_t span, blocks;                           // of one span
    int64_t parities;                               // spans whose graphs are there at once
    int64_t nodes, samples, halves, list, members;  // of a plan, of a span
  };
  static Shape ShapeOf(const Config& config, int64_t most_budget, int64_t tokens, int64_t block);
  // Bytes of workspace for one layer.
  static int64_t Bytes(const CudaCache& cache, int64_t tokens, bool attention);

  // `queries` may be null. The workspace has Bytes and is aligned to 256.
  PromptRun(CudaCache& cache, int32_t layer, const Input& input, const CudaCache::Queries* queries, void* workspace);
  // The host's memory, before anything changes; throws std::bad_alloc.
  void Reserve();
  // Rows in 8 bits, and slabs of such as numbers, before all else; nothing for other types.
  void Quantise();
  const cuda::Rows& stored_k() const { return stored_k_; }  // as the slabs will hold them
  Status Run();
  // Instead of slabs: the entries go to the outputs of compress_kv.
  void SetOutput(const OneShotOutput* output) { output_ = output; }

 private:
  // Device memory. Of what one span reads while the next is prepared there are two, by the parity of the span.
  struct GraphMemory {
    cuda::SpanPlan* plans;  // (plan_count)
    cuda::SpanSample* samples;
    cuda::SpanHalve* halves;
    int32_t* list;
    cuda::SpanItem* items;
    cuda::SpanMember* members;
  };
  struct Memory {
    GraphMemory graph[2];
    cuda::SpanHead* span_heads;        // (2, kv_heads): by the parity of the span
    cuda::AdmitHead* admit_heads;      // (2, kv_heads): by parity, by plan
    cuda::PrefillHead* prefill_heads;  // (2, kv_heads): by parity
    cuda::GatherHead* gather_heads;    // (kv_heads)
    cuda::GatherHead* stage_heads;     // (kv_heads)
    int32_t* ticket;
    cuda::SpanDepartures* departures;  // (plan_count)
    cuda::SpanStorePlan* store_plans;  // (plan_count)
    cuda::SpanStoreHead* store_heads;  // (kv_heads)
    // Of 8-bit storage.
    int8_t *key_codes, *value_codes;  // (kv_heads, rows, dim)
    cuda::RowScales* scales;          // (kv_heads, rows)
    char *slab_keys, *slab_values;    // (kv_heads, most budget, dim) of the prompt's type: what attention reads
    int64_t slab_rows;                // most budget
  };
  struct PlanMemory {
    int32_t *heads, *sink_index, *old_tail, *source, *slot_nodes, *snapshot_at, *code, *to;
    float* weights;
    cuda::SpanBlock* blocks[2];
  };
  struct HeadMemory {
    int32_t *values[2], *snapshots[2], *far_index[2], *far_count[2], *protected_index, *index, *to;
    float *far_bias[2], *scores, *run_means;
    int32_t* stage_index;
    uint8_t* keep;
    char *halve_scratch, *stage_key, *stage_value;
    int64_t* stage_position;
    cuda::RowScales* stage_scale;
  };
  static void Layout(const CudaCache& cache, const Shape& shape, bool attention, Arena& arena, Memory* memory,
                     std::vector<PlanMemory>* plans, std::vector<HeadMemory>* heads);

  int32_t plan_count() const { return cache_.end_plan(layer_) - cache_.first_plan(layer_); }
  PlanState& plan(int32_t i) const { return cache_.plans_.plans[cache_.first_plan(layer_) + i]; }
  int32_t PlanOf(int32_t kv_head) const;
  const cuda::Head& head(int32_t kv_head) const;
  // The plans.
  void StartRecording();
  bool Records() const;
  PromptHost::Recording* FindRecording(plan::Plan& plan);
  void MakeRecording(int32_t i);
  void RecordSpan(int64_t tokens);
  const plan::Span* RecordAlone(int32_t i, int64_t tokens);
  void FinishPlans();
  int64_t SpanEnd(int64_t first) const;

  // Descriptions to the device.
  void Describe();
  void DescribePlan(int32_t plan, int64_t parities);
  void DescribeHeads(int32_t parity);
  void DescribeSpan(int64_t first);
  void DescribeStore();
  void ListEntries(int32_t plan, EntryLists* lists);
  void DescribeEntries(int32_t plan);
  void DescribeCopies(int32_t kv_head, int32_t listed, int32_t rows);

  void CountEarly();
  bool IsExact(int32_t plan) const;
  bool Selects() const;
  void Fork(bool spans);
  void ChooseProtected(cudaStream_t scores);
  void BeginGraph();
  void RunGraph(bool more);
  cuda::AdmitArgs AdmitArguments(int32_t plan) const;
  bool scaled() const { return cache_.config_.dtype == DType::kI8; }
  cuda::PrefillArgs PrefillArguments(int64_t first, int64_t tokens, int64_t first_block, int64_t blocks) const;
  void Attend(const cuda::PrefillArgs& args) const;
  void AttendEarly(int32_t spare);
  void AttendSpan(int64_t first, int64_t tokens, bool more);
  cuda::SpanArgs Arguments() const;
  void Follow(cudaStream_t earlier, cudaEvent_t event, cudaStream_t later) const;
  int64_t FirstRow(int32_t plan) const;
  bool fresh() const { return first_position_ == 0; }
  cuda::GatherArgs Copies(const cuda::GatherHead* heads, int32_t most, bool rows) const;
  void StoreRows(cudaStream_t stream);
  void Store();

  CudaCache& cache_;
  int32_t layer_;
  Input input_;
  const CudaCache::Queries* queries_;
  const OneShotOutput* output_ = nullptr;
  void* workspace_;
  cuda::Rows k_, v_;                // as they came
  cuda::Rows stored_k_, stored_v_;  // as they are stored: the same, or in 8 bits
  int64_t first_position_;          // of row 0
  int64_t block_;                   // 0: no attention
  Shape shape_;
  Memory memory_{};
  std::vector<PlanMemory> plan_memory_;
  std::vector<HeadMemory> head_memory_;
  cudaStream_t side_;   // where descriptions go, and protected entries are chosen
  cudaStream_t graph_;  // where graphs run
  cuda::Uploader uploader_;
  PromptHost* host_ = nullptr;
  const plan::Span* span_ = nullptr;               // in work
  std::vector<PromptHost::Recording*> recording_;  // per plan: where the prompt is recorded, or is to be; or null
  std::vector<const plan::Span*> alone_;           // per plan
  int64_t spans_ = 0;                              // done
  int32_t early_ = 0;                              // blocks of the first span that see all before them
  bool exact_ = false;                             // all queries of all heads do, of all spans
  // Per plan: what the call began with, and departures so far.
  struct Begin {
    std::vector<int32_t> old_tail;  // slots, oldest first
    int64_t departures = 0, first_departures = 0, protected_count = 0;
  };
  std::vector<Begin> begin_;
  std::vector<std::vector<int32_t>> joined_;  // per plan: slots of the protected entries, in order
  std::vector<cuda::AdmitHead> admit_;        // (kv_heads), by plan
  std::vector<cuda::SpanHead> span_heads_;    // (kv_heads)
  std::vector<cuda::PrefillHead> prefill_heads_;
  std::vector<cuda::SpanStoreHead> store_heads_;
  std::vector<cuda::GatherHead> stage_heads_, gather_heads_;
  int32_t most_listed_ = 0,
          most_rows_ = 0;  // entries of one plan that the selection decides upon, and rows known before
  std::vector<cuda::SpanBlock> blocks_;
  std::vector<int32_t> ints_, ranks_;
  EntryLists lists_;
};

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_CUDA_PROMPT_H_
