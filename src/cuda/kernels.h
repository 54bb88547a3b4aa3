// The CUDA kernels' launchers: what a cache on a GPU calls to execute a plan's operations and to attend.
//
// Raw device pointers and counts only: nothing here knows a plan, a cache or a status. Every launcher takes the stream,
// enqueues and returns: no synchronisation, no allocation, capturable. Callers have checked every argument and read
// cudaGetLastError afterwards. Storage is f32, f16, bf16 or 8 bits (codes and scales, as src/cpu/kernels.h says); sums and softmax
// are f32.
#ifndef EXPRESS_SRC_CUDA_KERNELS_H_
#define EXPRESS_SRC_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "express/types.h"
#include "src/core/random.h"
#include "src/core/rotary.h"

namespace express::cuda {

// Of an entry in 8 bits, two bfloat16, as on the CPU: an element is scale * code.
struct RowScales {
  uint16_t key, value;
};

// What has been observed of one head (observe.cu): as Observed on the host, and where its stream stands.
struct Seen {
  unsigned long long far, tokens;
  int64_t newest;  // position of the last token that was appended
  int64_t unused;
};

// One head stream, described in device memory, at an address that stays: where budgets are observed, what stands there changes, and
// kernels in captured graphs read it anew. Pointers are device pointers.
struct Head {
  void* key;                 // (capacity, key_dim) of the storage type, rows without gaps, 256-byte aligned
  void* value;               // (capacity, value_dim)
  RowScales* scale;          // (capacity): of 8-bit storage only, behind the values: value + capacity * value_dim
  int64_t* position;         // (capacity)
  float* log_weight;         // (capacity): -inf = free slot, whose key and value may be anything, NaN included
  float* mean;               // (key_dim): mu, the centre of the scores
  float* sum;                // (key_dim): sum of the keys of the running run of departures
  float* score;              // (protect): that of the departure, for good
  int32_t* protected_slot;   // (protect)
  int32_t* protected_count;  // (2): protected so far; index of the weakest once full
  float* partial;            // (partial_splits, kPartialRows, value_dim + 2): for split attention, shared by layers
  int32_t* ticket;           // (1): zero between launches
  int32_t capacity;          // slots
  int32_t protect;           // P
  int32_t leader;            // 1: the head that writes the log_weight that all heads of its plan share
  int32_t plan;              // index into the cache's rings
  char* halve_scratch;       // HalveScratchBytes(longest list)
  StreamKey stream;
  Seen* seen;       // null where budgets are fixed
  Scoring scoring;  // as on the CPU; turns: device memory
};

// Rows of a caller's tensor: row i of KV head (or query head) h begins at element i * row_stride + h * head_stride.
struct Rows {
  void* data;
  int64_t row_stride, head_stride;  // elements
  DType dtype;
  const RowScales* scale = nullptr;  // of rows in 8 bits: that of row i of KV head h is scale[h * scale_stride + i]
  int64_t scale_stride = 0;
};

struct HalveParams {  // as on the CPU
  float scale, gamma, tau, delta;
  bool coin;
};

// ---- steps (execute.cu, execute.cuh) ----

struct Ring;                               // ring.h
inline constexpr int32_t kMaxBatch = 256;  // caches of one launch

// kAll does all of a record. kHalvings, kAdmissions and kWrites, one after the other, do what kAll does for records of one token,
// in which no halving reads what the same record admits: the first two of all layers at once, as a step begins, since they touch
// nothing that its token brings.
enum class Part : int32_t { kAll, kHalvings, kAdmissions, kWrites };

// Executes the next `steps` records of the rings of heads [0, head_count) of every cache, in order. After kAll and
// kAdmissions rings move on. Step s, cache c, layer l from the first: the row of KV head g begins at
// data + s * row_stride + row[c] * cache_stride + l * layer_stride + g * head_stride of k and v.
struct ExecuteArgs {
  const Head* heads[kMaxBatch];  // per cache: (layers, kv_heads) from the first layer on, device memory
  Ring* rings[kMaxBatch];        // per cache: of all its plans
  int32_t row[kMaxBatch];        // per cache: its row of k and v
  int32_t caches, layers, kv_heads, steps;
  Part part;
  bool launch_early;  // AttendMachine::dependent_launches
  int32_t multiprocessors;
  int32_t key_dim, value_dim;
  DType dtype;
  Rows k, v;
  int64_t k_cache_stride, v_cache_stride, k_layer_stride, v_layer_stride;
  HalveParams halve;
};
void Execute(const ExecuteArgs& args, cudaStream_t stream);
size_t HalveScratch(int32_t longest_list);
// Heads [0, head_count) and rings [0, ring_count) as they are before the first token.
void ResetHeads(const Head* heads, int32_t head_count, Ring* rings, int32_t ring_count, int32_t key_dim,
                cudaStream_t stream);

// ---- far mass (observe.cu) ----

// Heads of one layer of one cache, and which of its tokens asks.
struct ObserveCache {
  const Head* heads;  // (kv_heads), device memory
  int64_t position;   // of the token; negative: the newest (Head::seen)
  int64_t mean;       // mean budget: positions [mean / 2, end) count, entries at least mean / 2 back are far
  int64_t end;
  int64_t row;  // its row of q
};
// Adds to Head::seen, per chunk of at most `rows_at_once` query rows of a KV head, the largest share of attention that one of them
// pays to far entries. Decode: `items` caches, each with `tokens` * group query rows as in AttendArgs, over what its slabs hold.
// Prompt: cache 0 alone, and tokens at position, position + every, .. with one row of `group` query heads each: over the slabs, and
// rows of k from first_position up to the token itself.
struct ObserveArgs {
  ObserveCache caches[kMaxBatch];
  int32_t items, kv_heads, group, tokens;
  int32_t key_dim, rows_at_once;
  DType dtype;  // of slabs and k
  bool launch_early;
  Rows q;
  int64_t q_cache_stride;
  bool prompt;
  Rows k;
  int64_t first_position;
  float scale, exponent;
};
inline constexpr int32_t kObserveEvery = 16;     // tokens
inline constexpr int32_t kObserveFloats = 2048;  // of query rows at once
void Observe(const ObserveArgs& args, cudaStream_t stream);
// seen (heads) to `to` (heads, 2), the host's memory: far and tokens.
void CopySeen(const Seen* seen, int32_t heads, uint64_t* to, cudaStream_t stream);

// ---- other budgets (resize.cu) ----

// Moves pieces of memory, each up or down, through a buffer: in this order none lands on what has still to move. Addresses and
// sizes are multiples of 16 bytes.
class Mover {
 public:
  Mover(void* buffer, size_t bytes, cudaStream_t stream)
      : buffer_(static_cast<char*>(buffer)), capacity_(bytes / 16 * 16), stream_(stream) {}
  void Down(const void* from, void* to, size_t bytes);  // to < from: the lowest piece first
  void Up(const void* from, void* to, size_t bytes);    // to > from: the highest piece first
  void Flush();

 private:
  static constexpr int32_t kSegments = 64;
  void Add(const char* from, char* to, size_t bytes);
  struct Segment {
    const char* from;
    char* to;
    size_t at, bytes;  // in the buffer
  };
  char* buffer_;
  size_t capacity_, used_ = 0;
  cudaStream_t stream_;
  int32_t count_ = 0;
  Segment segment_[kSegments];
};
// Slots [known[h], capacity) of head h are free.
void FreeSlots(const Head* heads, const int32_t* known, int32_t head_count, cudaStream_t stream);
// Kernels that are launched early read descriptions of heads before the kernel before is done: behind this one, they are as they
// were written.
void Fence(cudaStream_t stream);

// ---- words to the device (upload.cu) ----

struct UploadSegment {
  int32_t* to;
  int32_t begin, words;  // of the payload
};

// Collects pieces of host data and sends them to device memory. They travel in the launches themselves: no staging memory,
// no bound on what is in flight. Addresses and sizes are multiples of 4 bytes.
class Uploader {
 public:
  explicit Uploader(cudaStream_t stream) : stream_(stream) {}
  void SetStream(cudaStream_t stream) { stream_ = stream; }  // after Flush
  void Add(void* to, const void* from, size_t bytes);
  void Flush();

 private:
  static constexpr int32_t kSegments = 128;
  static constexpr int32_t kWords = 7600;  // with the segments, what arguments of a kernel can be
  template <int32_t kMost, int32_t kPieces>
  void Send();

  cudaStream_t stream_;
  int32_t segments_ = 0, words_ = 0;
  UploadSegment segment_[kSegments];
  int32_t payload_[kWords];
};

// ---- decode attention (attend.cu) ----

inline constexpr int32_t kPartialRows = 16;  // query rows of one KV head that are taken at once

// Weighted attention of `rows` = tokens * group query rows per KV head over the live slots:
// logit = scale <q, k> + exponent * log_weight. Token t of cache c, query head h = g * group + j:
// q begins at q.data + c * q_cache_stride + t * q.row_stride + h * q.head_stride, likewise out; lse (may be null) at
// c * lse_cache_stride + t * lse_row_stride + h * lse_head_stride.
struct AttendArgs {
  const Head* heads[kMaxBatch];  // per cache: its (kv_heads) heads of the layer, device memory
  int32_t caches, kv_heads, group, tokens;
  int32_t max_capacity;  // of all those heads
  int32_t key_dim, value_dim;
  DType dtype;        // of the slabs
  bool sizes_change;  // the launch is captured, and heads may be others, of up to max_capacity, when it is replayed
  Rows q, out;
  int64_t q_cache_stride, out_cache_stride;
  float* lse;
  int64_t lse_cache_stride, lse_row_stride, lse_head_stride;
  float scale, exponent;
};
bool AttendSupported(int32_t key_dim, int32_t value_dim);
// Splits of a head of `capacity` slots at most, and so the size of Head::partial.
int32_t AttendMaxSplits(int32_t capacity);

// A device, as far as attention is planned by it.
struct AttendMachine {
  static constexpr int kClusterSizes = 5;
  int32_t multiprocessors, compute_capability;
  int32_t blocks;                   // of a multiprocessor at once
  int32_t shared_bytes;             // that a block may take
  bool dependent_launches;          // kernels may be launched before the one before them is done, and wait themselves
  int32_t clusters[kClusterSizes];  // of 2^i blocks that run at once; 0: such clusters are not to be used
};
cudaError_t DescribeAttend(int32_t device, int32_t blocks, AttendMachine* machine);
inline constexpr int32_t kMostBlocks = 3;
// On every device, before Attend with these types and dims. The device is the current one.
cudaError_t PrepareAttend(DType dtype, int32_t key_dim, int32_t value_dim, const AttendMachine& machine);
// described: what args.heads points to, on the host. machines: as described for 1, 2, .. kMostBlocks blocks of a multiprocessor, of which
// the best is chosen; or one machine, to be as it says.
void Attend(const AttendArgs& args, const Head* const* described, const AttendMachine* machines, int32_t count,
            cudaStream_t stream);

// ---- spans of a prompt (span.cu): values of nodes, see src/plan/span.h; an entry's index as in PrefillHead ----

struct SpanSample {
  int64_t number, weight, total;
  int32_t first, candidate, count, out;
  int32_t plan, depth;
};
struct SpanHalve {
  int64_t number;
  int32_t begin, count, out;
  int32_t plan, depth;
};
struct SpanMember {
  int32_t node;
  float log_weight;
};
// What the far list of one block of one plan is made of.
struct SpanBlock {
  int32_t member_begin, members;
  int32_t protected_count;
  int32_t sinks;                     // of them in the list
  int32_t old_tail_begin, old_tail;  // of SpanPlan::old_tail
};
struct SpanPlan {             // device memory
  const int32_t* heads;       // (head_count): KV heads of the layer
  const int32_t* sink_index;  // (sinks): entries
  const int32_t* old_tail;    // slots of the exact tail when the call began, oldest first
  const int32_t* source;      // (old tail): the same as entries
  const SpanBlock* blocks;    // (blocks)
  const int32_t* slot_nodes;  // (budget): at the end of the span before, or of this one; kNoNode: none
  int32_t head_count, budget;
};
inline constexpr int32_t kNoNode = -1;
inline constexpr int32_t kUnknown = INT32_MIN;  // the value of a node before it is computed
struct SpanHead {                               // device memory
  const void* slab_key;                         // as in PrefillHead, of the storage type
  const void* slab_value;
  const RowScales* slab_scale;
  int32_t* values;           // (nodes): of this span
  const int32_t* previous;   // (nodes): of the span before
  const int32_t* snapshots;  // (blocks, protect), as in AdmitHead
  int32_t* far_index;        // as in PrefillHead
  float* far_bias;
  int32_t* far_count;
  uint8_t* keep;        // (list)
  char* halve_scratch;  // SpanScratch(list)
  int32_t far_capacity, protect, plan;
  StreamKey stream;
};
struct SpanArgs {
  const SpanPlan* plans;
  const SpanHead* heads;  // (kv_heads)
  const SpanSample* samples;
  const SpanHalve* halves;
  const int32_t* list;
  const SpanMember* members;
  int32_t plan_count, kv_heads, most_heads;  // most_heads: of one plan
  bool first_span;                           // slots hold what the slabs hold
  int32_t key_dim, value_dim;
  DType dtype;
  Rows k, v;
  HalveParams halve;
  float exponent;
};
// Bytes of scratch for lists of `list` entries in all.
__host__ __device__ size_t SpanScratch(int64_t list);
// Departure j of a span, of one plan: source[source_begin + j] while j < sources, then row first_row + j - sources.
// `nodes`: of the span, departures and slots among them.
struct SpanDepartures {
  int64_t count, source_begin, sources, first_row, nodes;
};
// Values of the slots, and of the departures where nothing is protected; all later nodes are unknown from then on.
// departures: (plan_count), device memory; at most `most_nodes` for any plan. ticket: SpanGraph's, made zero.
void SpanBegin(const SpanArgs& args, const SpanDepartures* departures, int32_t* ticket, int64_t most_nodes,
               cudaStream_t stream);

// Work of one block of threads, for one head: operations [begin, begin + count) of one kind, none of which depends on another
// of them. Kinds below kSpanSample are classes of halvings: lists of up to kSpanClasses[kind] entries, 4: more.
struct SpanItem {
  int32_t begin;
  int16_t kind, count;
};
inline constexpr int32_t kSpanClasses[4] = {2, 4, 16, 64};
inline constexpr int16_t kSpanSample = 5;
inline constexpr int16_t kSpanTogether[6] = {128, 16, 4, 1, 1, 4};  // of each kind at most, in one item
// All operations of a span, and then the far lists of prompt blocks [first_block, blocks), the first of them as list 0; in one
// launch: whoever needs a value waits for it. An operation stands behind those that it depends on.
struct SpanGraph {
  const SpanItem* items;  // (item_count), device memory
  int32_t item_count;
  int32_t first_block, blocks;
  bool long_lists;  // there are some of class 4
  int32_t* ticket;  // device memory
};
void SpanRun(const SpanArgs& args, const SpanGraph& graph, int32_t multiprocessors, cudaStream_t stream);

// What becomes of the span's end: task i of a plan is node code[i] (i < nodes), protected entry code[i] (i < nodes +
// protects), or entry code[i]; it goes to row to[i], and a protected one from before the call (code below protected_before)
// to its slot. index: the entries, for GatherHead; where slabs are written in place,
// entries that stay become kSkip, and those that move from slot to slot go by stage_index to row i of a staging slab, which
// index then refers to.
struct SpanStorePlan {  // device memory
  const int32_t* code;
  const int32_t* to;
  int32_t nodes, protects, count, protected_before;
};
struct SpanStoreHead {  // device memory
  const int32_t* values;
  const int32_t* protected_index;
  int32_t* protected_slot;  // of the cache's head, brought up to date; null: copies go elsewhere, all of them to to[i]
  int32_t* index;
  int32_t* stage_index;
  int32_t* to;
  int32_t plan;
};
void SpanStore(const SpanStorePlan* plans, const SpanStoreHead* heads, int32_t kv_heads, int32_t most_count,
               cudaStream_t stream);
struct GatherArgs;
// The same and the copies, where no entry is overwritten before it is copied: no list is made of them.
void SpanStoreCopies(const SpanStorePlan* plans, const SpanStoreHead* heads, const GatherArgs& copies,
                     cudaStream_t stream);

// Copies of entries: row to[i] of head h takes entry index[i] (as in PrefillHead); kSkip leaves the row as it is.
struct GatherHead {  // device memory
  const void* slab_key;
  const void* slab_value;
  const RowScales* slab_scale;
  const int64_t* slab_position;
  void* key;  // where the copies go
  void* value;
  RowScales* scale;      // where codes go, from rows of codes
  int64_t* position;     // or null
  float* log_weight;     // or null
  const int32_t* index;  // (count)
  const int32_t* to;     // (count), or null: row i
  const float* weights;  // (rows): log weights of the copies, or null
  int32_t count;
  int32_t kv_head;                     // of k and v
  const int32_t* row_index = nullptr;  // (rows): copies of rows, known before the others
  const int32_t* row_to = nullptr;     // (rows)
  int32_t rows = 0;
};
inline constexpr int32_t kSkip = INT32_MAX;
struct GatherArgs {
  const GatherHead* heads;  // (head_count)
  int32_t head_count, most_count, key_dim, value_dim;
  DType dtype;                       // of the slabs, and of k and v
  DType key_dtype, value_dtype;      // of the copies
  int64_t key_stride, value_stride;  // of the copies' rows, elements
  int64_t position_stride, log_weight_stride;
  Rows k, v;  // where index >= 0 points
  int64_t first_position;
  bool rows = false;  // those of row_index, not of index
};
void Gather(const GatherArgs& args, cudaStream_t stream);
// The same for one head, described here: args.heads is not used.
void GatherOne(const GatherHead& head, const GatherArgs& args, cudaStream_t stream);

// ---- 8 bits (quantise.cu) ----

// Rows [0, rows) of kv_heads heads of k and v, of any floating type, into codes: key (kv_heads, rows, key_dim) and value
// (kv_heads, rows, value_dim), scale (kv_heads, rows). The codes and scales of the CPU, to the bit.
struct QuantiseArgs {
  Rows k, v;
  int64_t rows;
  int32_t kv_heads, key_dim, value_dim;
  int8_t* key;
  int8_t* value;
  RowScales* scale;
};
void QuantiseRows(const QuantiseArgs& args, cudaStream_t stream);
// The slabs of codes of heads [0, kv_heads), into copies of a floating type: head h's key at key + h * key_stride bytes, rows
// without gaps, likewise value.
struct DequantiseArgs {
  const Head* heads;  // device memory
  int32_t kv_heads, most_capacity, key_dim, value_dim;
  DType dtype;  // of the copies
  char* key;
  char* value;
  int64_t key_stride, value_stride;  // bytes
};
void DequantiseSlabs(const DequantiseArgs& args, cudaStream_t stream);

// ---- causal attention of a prompt (prefill.cu for sm_80 and above, prefill_sm90.cu for Hopper) ----

// Row t of the prompt is the token at position first_position + t. Positions are cut into blocks at multiples of
// `block` (a multiple of 64); the queries of a block see, besides the block's own rows up to themselves, what the cache
// held when the block began: a far list, and rows [begin, block start) exactly, begin = clamp(max(sinks, P - tail) -
// first_position, 0, block start), P being the block's first position. One launch covers blocks
// [first_block, first_block + blocks) counted from the block that holds row 0 (it may begin before row 0).
struct PrefillHead {     // one KV head; device memory
  const void* slab_key;  // (capacity, key_dim), of PrefillArgs::dtype: what far indices below zero refer to
  const void* slab_value;
  const int32_t* far_index;  // (blocks, far_capacity): j >= 0: row j of k and v; j < 0: slot -1 - j of the slab
  const float* far_bias;     // (blocks, far_capacity): exponent * log weight
  const int32_t* far_count;  // (blocks), or null: nothing is far
  int32_t far_capacity;
  int32_t sinks, tail;
};
struct PrefillArgs {
  // (kv_heads), or null: nothing is far, and all rows are of one block, which begins at position 0.
  const PrefillHead* heads;
  int32_t kv_heads, group;
  int32_t key_dim, value_dim;
  DType dtype;  // of slab, q, k, v and out alike
  Rows q, k, v, out;
  float* lse;  // or null
  int64_t lse_row_stride, lse_head_stride;
  int64_t tokens;               // rows of the prompt
  int64_t first_position;       // of row 0
  int32_t block, block_offset;  // block_offset: first_position % block
  int64_t first_block, blocks;
  float scale;
  // If `heads` is null: multiprocessors to leave to others; or blocks of threads take a job each, between which others' come in.
  static constexpr int32_t kJobByJob = -1;
  int32_t spare = 0;
};
bool PrefillSupported(int32_t key_dim, int32_t value_dim);
void Prefill(const PrefillArgs& args, int32_t compute_capability, int32_t multiprocessors, cudaStream_t stream);

// ---- protected entries of a prompt (admit.cu) ----

// Departure i (counted from the beginning of the stream) is an entry that leaves the exact tail; the entry of
// departures first + i is source[source_begin + i] while i < source_count, then row first_row + i - source_count.
// Indices mean what they mean in PrefillHead. What src/cpu/protect.cc does one by one, the same floats to the bit.
struct AdmitHead {  // one KV head; device memory
  const void* slab_key;
  const void* slab_value;
  const RowScales* slab_scale;
  const int64_t* slab_position;
  float* mean;  // state as in Head, brought up to date
  float* sum;
  float* score;
  int32_t* protected_count;
  int32_t* protected_index;  // (protect): which entry each protected slot holds
  const int32_t* source;     // (source_begin + source_count)
  float* scores;             // (count): scratch
  float* run_means;          // (count / 256 + 4, key_dim): scratch
  int32_t* loser;  // (count): the entry that goes on to the coreset after departure first + i; kSkip: none, it joined
  int32_t* snapshots;  // (snapshots, protect): protected entries after `snapshot_at[s]` departures of this call
  int32_t protect;
  int32_t kv_head;  // of k
};
struct AdmitArgs {
  const AdmitHead* heads;  // (head_count), alike in `protect`
  int32_t head_count, key_dim, protect;
  DType dtype;
  Rows k;                      // the prompt's keys, of the storage type
  Rows v;                      // and values: only for their norms
  int64_t first, count;        // departures
  int64_t source_count;        // departures from `first` on that `source` knows, more than `count` perhaps
  int64_t centre;              // > 0: departure 0 is among them, and so many entries of the exact tail are its centre
  int64_t first_row;           // row of departure first + source_count
  int64_t first_position;      // of row 0
  const int32_t* snapshot_at;  // (snapshots), ascending, 0 .. count; device memory
  int32_t snapshots;
  int64_t source_begin = 0;
  int32_t value_dim = 0;
  Scoring scoring = {};
  int32_t multiprocessors = 1, shared_bytes = 96 * 1024;  // of the device; of a block, at most
};
// At a prompt's beginning: protected_index from the slots of the layer's heads.
void AdmitBegin(const AdmitHead* heads, int32_t head_count, const Head* layer_heads, cudaStream_t stream);
// Scores of the call's departures; and, once these are there, who is protected in the end, who loses after every departure, and the
// snapshots.
void AdmitScore(const AdmitArgs& args, cudaStream_t stream);
void AdmitSelect(const AdmitArgs& args, cudaStream_t stream);

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_KERNELS_H_
