// The CUDA kernels' launchers: what a cache on a GPU calls to execute a plan's operations and to attend.
//
// Raw device pointers and counts only: nothing here knows a plan, a cache or a status. Every launcher takes the stream,
// enqueues and returns: no synchronisation, no allocation, capturable. Callers have checked every argument and read
// cudaGetLastError afterwards. Storage is f32, f16 or bf16; sums and softmax are f32.
#ifndef EXPRESS_SRC_CUDA_KERNELS_H_
#define EXPRESS_SRC_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "express/types.h"
#include "src/core/random.h"

namespace express::cuda {

// One head stream, described in device memory. Pointers are device pointers.
struct Head {
  void* key;              // (capacity, key_dim) of the storage type, rows without gaps, 256-byte aligned
  void* value;            // (capacity, value_dim)
  int64_t* position;      // (capacity)
  float* log_weight;      // (capacity): -inf = free slot, whose key and value may be anything, NaN included
  float* mean;            // (key_dim): mu, the centre of the scores
  float* sum;             // (key_dim): sum of the keys of the running run of departures
  float* score;           // (protect): ||k - mu||^2 at departure, for good
  int32_t* protected_slot;  // (protect)
  int32_t* protected_count;  // (2): protected so far; index of the weakest once full
  float* partial;         // (partial_splits, kPartialRows, value_dim + 2): for split attention, shared by layers
  int32_t* ticket;        // (1): zero between launches
  int32_t capacity;       // slots
  int32_t protect;        // P
  int32_t leader;         // 1: the head that writes the log_weight that all heads of its plan share
  int32_t plan;
  StreamKey stream;
};

// Rows of a caller's tensor: row i of KV head (or query head) h begins at element i * row_stride + h * head_stride.
struct Rows {
  void* data;
  int64_t row_stride, head_stride;  // elements
  DType dtype;
};

struct HalveParams {  // as on the CPU
  float scale, gamma, tau, delta;
  bool coin;
};

// ---- decode attention (attend.cu) ----

inline constexpr int32_t kMaxBatch = 256;    // caches of one launch
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
  DType dtype;  // of the slabs
  Rows q, out;
  int64_t q_cache_stride, out_cache_stride;
  float* lse;
  int64_t lse_cache_stride, lse_row_stride, lse_head_stride;
  float scale, exponent;
};
// Splits of a head of `capacity` slots at most, and so the size of Head::partial.
int32_t AttendMaxSplits(int32_t capacity);
void Attend(const AttendArgs& args, int32_t multiprocessors, cudaStream_t stream);

// ---- causal attention of a prompt (prefill.cu for sm_80 and above, prefill_sm90.cu for Hopper) ----

// Row t of the prompt is the token at position first_position + t. Positions are cut into blocks at multiples of
// `block` (a multiple of 64); the queries of a block see, besides the block's own rows up to themselves, what the cache
// held when the block began: a far list, and rows [begin, block start) exactly, begin = clamp(max(sinks, P - tail) -
// first_position, 0, block start), P being the block's first position. One launch covers blocks
// [first_block, first_block + blocks) counted from the block that holds row 0 (it may begin before row 0).
struct PrefillHead {      // one KV head; device memory
  const void* slab_key;   // (capacity, key_dim): what far indices below zero refer to
  const void* slab_value;
  const int32_t* far_index;  // (blocks, far_capacity): j >= 0: row j of k and v; j < 0: slot -1 - j of the slab
  const float* far_bias;     // (blocks, far_capacity): exponent * log weight
  const int32_t* far_count;  // (blocks)
  int32_t far_capacity;
  int32_t sinks, tail;
};
struct PrefillArgs {
  const PrefillHead* heads;  // (kv_heads)
  int32_t kv_heads, group;
  int32_t key_dim, value_dim;
  DType dtype;  // of slab, q, k, v and out alike
  Rows q, k, v, out;
  float* lse;  // or null
  int64_t lse_row_stride, lse_head_stride;
  int64_t tokens;          // rows of the prompt
  int64_t first_position;  // of row 0
  int32_t block;
  int64_t first_block, blocks;
  float scale;
};
bool PrefillSupported(int32_t key_dim, int32_t value_dim);
void Prefill(const PrefillArgs& args, int32_t compute_capability, cudaStream_t stream);

// ---- protected entries of a prompt (admit.cu) ----

// Departure i (counted from the beginning of the stream) is an entry that leaves the exact tail; the entries of
// departures [first, first + count) are `source[i - first]` where that is given, else row first_row + (i - first).
// Indices mean what they mean in PrefillHead.
struct AdmitHead {  // one KV head; device memory
  const void* slab_key;
  float* mean;   // state as in Head, brought up to date
  float* sum;
  float* score;
  int32_t* protected_count;
  int32_t* protected_index;  // (protect): which entry each protected slot holds
  const int32_t* source;     // (source_count): entries that depart first, ahead of rows from first_row on; may be null
  float* scores;             // (count): scratch
  float* run_means;          // (count / 256 + 2, key_dim): scratch
  int32_t* loser;            // (count): the entry that goes on to the coreset after departure first + i, or kJoined
  int32_t* snapshots;        // (snapshots, protect): protected entries after `snapshot_at[s]` departures of this call
  int32_t protect;
};
inline constexpr int32_t kJoined = INT32_MIN;
struct AdmitArgs {
  const AdmitHead* heads;  // (kv_heads)
  int32_t kv_heads, key_dim;
  Rows k;  // the prompt's keys, of the storage type
  int64_t first, count;    // departures
  int64_t source_count;    // of them come from `source`
  int64_t first_row;
  int64_t first_position;  // of row 0; an entry's age is its position, and slab entries are older than all rows
  const int32_t* snapshot_at;  // (snapshots), ascending, 0 .. count; device memory
  int32_t snapshots;
};
void Admit(const AdmitArgs& args, cudaStream_t stream);

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_KERNELS_H_
