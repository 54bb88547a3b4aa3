// The CPU kernels: what the cache calls to execute a plan's operations and to attend.
//
// Raw pointers and counts only: nothing here knows a plan, a cache or a status. Callers have checked every argument.
// Kernels allocate nothing; scratch is handed in. Storage is f32, f16, bf16 or 8 bits, arithmetic is f32. SIMD targets are
// chosen at run time (Highway); the scalar references of reference.h say what each function computes.
//
// 8-bit storage: x = scale * code with |code| <= 127 and one scale for each key and each value, the smallest bfloat16 that is
// not below max |x| / 127, so that no code is clipped; at least the smallest normal number, and 0 for a row of zeros. A code
// is x / scale, rounded to the nearest, ties to even: |scale * code - x| <= scale / 2. A row that holds anything that is not
// finite has the scale NaN: all of it is NaN. Entries move with their scales and are never rounded a second time.
#ifndef EXPRESS_SRC_CPU_KERNELS_H_
#define EXPRESS_SRC_CPU_KERNELS_H_

#include <cstddef>
#include <cstdint>

#include "express/types.h"
#include "src/core/random.h"
#include "src/core/rotary.h"

namespace express::cpu {

// The scales of an entry's key and value, two bfloat16.
struct RowScales {
  uint16_t key, value;
};
// Bytes of an entry that are not elements.
constexpr int64_t ScaleBytes(DType dtype) { return dtype == DType::kI8 ? static_cast<int64_t>(sizeof(RowScales)) : 0; }

// The entries of one head stream: an unordered set of slots.
struct Slab {
  void* key;          // (capacity, key_dim) of dtype
  void* value;        // (capacity, value_dim) of dtype
  int64_t* position;  // (capacity)
  int64_t capacity;
  int32_t key_dim;
  int32_t value_dim;
  DType dtype;
  RowScales* scale = nullptr;  // (capacity): of 8-bit storage only
};

// Rows of a caller's tensor: row i begins at data + i * stride elements, its elements are contiguous.
struct ConstRows {
  const void* data;
  int64_t stride;  // elements
  DType dtype;
};
struct Rows {
  void* data;
  int64_t stride;  // elements
  DType dtype;
};

// ---- entries (entries.cc) ----

// Stores rows [0, count) of key and value into slots[i], with positions first_position + i.
void WriteEntries(const Slab& slab, const int32_t* slots, int64_t count, int64_t first_position, ConstRows key,
                  ConstRows value);
// The entry in `slot`, as the one row of key and of value.
void ReadEntry(const Slab& slab, int64_t slot, Rows key, Rows value);
void CopyEntry(const Slab& slab, int32_t from, int32_t to);
void SwapEntries(const Slab& slab, int32_t a, int32_t b);
// Converts count elements; any pair of floating types.
void Convert(const void* from, DType from_type, void* to, DType to_type, int64_t count);
// True if all of count elements are finite.
bool AllFinite(const void* data, DType dtype, int64_t count);

// ---- protected entries (protect.cc) ----

// The protected set of one head stream and the running mean it scores against. Arrays are the caller's.
struct Protection {
  float* mean;       // (key_dim): mu, the centre of the scores
  float* sum;        // (key_dim): sum of the keys of the running run of departures
  float* score;      // (capacity): that of the departure, for good
  int32_t* slot;     // (capacity)
  int64_t capacity;  // P
  int64_t count;     // protected so far
  int64_t weakest;   // index of the weakest when count == capacity: lowest score, among equals the youngest (largest
                     // position)
};
inline constexpr int32_t kScoreLanes = 8;

// Scores. Of keys as they come: the energy ||k - mu||^2, summed in the order of the dimensions. Without positions: ||k' - mu||^2, or
// ||k' - mu||^2 * ||v||, 0 unless it is positive; k' is the key without its rotary position, R(position)^-1 k, mu a mean of such keys,
// and squared norms are summed in kScoreLanes lanes, element d in lane d % kScoreLanes, which are then added up in halves.

// Sets the centre to the mean of the keys in slots[0, count): the exact tail at the first departure.
void CentreOn(Protection& protection, const Slab& slab, const int32_t* slots, int64_t count,
              const Scoring& scoring = {});
// The entry in `slot` leaves the tail as departure number `ordinal` (0-based). After every 256th
// departure the mean becomes that of the run. The entry is scored and added to the sum. While the set is not full, the entry
// joins where it is (the plan knows and leaves the slot alone from then on); afterwards, if its score is strictly
// larger than the weakest's, the two entries swap contents, so that `slot` always ends up with the loser.
void Admit(Protection& protection, const Slab& slab, int32_t slot, uint64_t ordinal, const Scoring& scoring = {});
// The weakest entry leaves the set, of which slot[count - 1] is given up: the two entries swap contents if they are not one. May
// follow a change of `capacity` to fewer than `count`, until there are no more than that.
void Evict(Protection& protection, const Slab& slab);
// After a change of `capacity` that was not followed by Evict.
void FindWeakest(Protection& protection, const Slab& slab);

// ---- halving (halve.cc) ----

struct HalveParams {
  float scale;  // beta
  float gamma;
  float tau;
  float delta;
  bool coin;  // fair coins instead of kernel halving (the final complement is drawn all the same)
};

// Bytes of scratch (64-byte aligned) for lists of up to `count` entries.
size_t HalveScratchBytes(int64_t count, int32_t key_dim, int32_t value_dim);
// Halves the entries in slots[0, count) (count even, oldest first; DESIGN 3.1): pair a is (slots[2a], slots[2a+1]). The
// survivor of pair a ends up in slots[2a]; slots[2a+1] is free afterwards. Draws are those of RandomPurpose::kHalve,
// operation `number`, pair a, and the complement's is of RandomPurpose::kComplement, pair 0. Finite entries of any
// magnitude are decided without overflow.
void Halve(const Slab& slab, const int32_t* slots, int64_t count, const HalveParams& params, const StreamKey& key,
           uint64_t number, void* scratch);

// ---- attention (attend.cc, prefill.cc) ----

inline constexpr int64_t kMaxQueryRows = 16;  // rows of one AttendPartial call

// Softmax state of `rows` query rows over some entries; merge by MergePartial. `out` is not normalised.
struct Partial {
  float* out;  // (rows, value_dim): sum_j exp(logit_j - max) v_j
  float* max;  // (rows): -inf when no entry
  float* sum;  // (rows): sum_j exp(logit_j - max)
};

// Attention of q (rows, key_dim) f32, already multiplied by the softmax scale, over the live slots in [begin, end).
// log_weight: (capacity), -inf = free slot, never read otherwise (its memory may be anything). logit = <q, k> +
// exponent * log_weight. rows <= kMaxQueryRows. Overwrites `partial`. The slab is read once, whatever the number of
// rows. Finite queries and keys give a finite softmax, whatever their products (beyond 1e38 they count as 1e38; of keys in 8
// bits, that of the codes is the one that must not be beyond it); values must leave room for their sum over the slab.
void AttendPartial(const Slab& slab, const float* log_weight, float exponent, int64_t begin, int64_t end,
                   const float* q, int64_t rows, const Partial& partial);
// Takes the entries in slots[0, count) into the softmax state of q's rows, (rows) max and sum; logit = <q, k> + bias[i].
void AttendSlots(const Slab& slab, const int32_t* slots, const float* bias, int64_t count, const float* q, int64_t rows,
                 float* max, float* sum);
// into = into merged with from.
void MergePartial(const Partial& into, const Partial& from, int64_t rows, int32_t value_dim);
// out row r = partial.out / partial.sum (0 when empty), lse[r * lse_stride] = max + log(sum) (-inf when empty; lse may
// be null).
void FinishPartial(const Partial& partial, int64_t rows, int32_t value_dim, Rows out, float* lse, int64_t lse_stride);

// Causal attention of one block of new tokens for one KV head: query (t, g), t < tokens, g < group, sees the live slots
// of the slab and the block's own keys 0 .. t exactly. Query row (t, g) begins at element t * q_token_stride + g *
// q_head_stride, likewise out and lse (lse may be null). Handles tokens [first, last) of the block only, so that
// callers can share out a block between threads: a query's result is the same to the bit however they do. What later
// tokens hold never reaches a query, not even as NaN.
struct BlockArgs {
  ConstRows key;    // (tokens, key_dim): the block's keys
  ConstRows value;  // (tokens, value_dim)
  const void* q;
  int64_t q_token_stride, q_head_stride;
  DType q_dtype;
  void* out;
  int64_t out_token_stride, out_head_stride;
  DType out_dtype;
  float* lse;
  int64_t lse_token_stride, lse_head_stride;
  int32_t group;  // query heads of the KV head
  float scale;
  float exponent;
  int64_t first, last;
};
size_t BlockScratchBytes(int32_t group, int32_t key_dim, int32_t value_dim);
void AttendBlock(const Slab& slab, const float* log_weight, const BlockArgs& args, void* scratch);

// Names of the SIMD targets compiled in and supported here, and a way for tests to force one for the whole process.
int SimdTargetCount();
const char* SimdTargetName(int i);
void ForceSimdTarget(int i);  // -1: the best

}  // namespace express::cpu

#endif  // EXPRESS_SRC_CPU_KERNELS_H_
