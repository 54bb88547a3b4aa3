// One head at work on the operations of a step's records (ring.h): writes, admissions, halvings, by one thread block.
#ifndef EXPRESS_SRC_CUDA_EXECUTE_CUH_
#define EXPRESS_SRC_CUDA_EXECUTE_CUH_

#include <limits>

#include "src/cuda/device.cuh"
#include "src/cuda/halve.cuh"
#include "src/cuda/kernels.h"
#include "src/cuda/ring.h"

namespace express::cuda {
namespace execute {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / kWarp;
static_assert(kShortList == kWarpList);
inline constexpr int32_t kMostDim = 256;  // of keys and of values
inline constexpr int64_t kRun = 256;      // departures that a mean is taken over, as on the CPU
inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

__device__ inline int64_t Long(const int32_t* words) {
  return static_cast<int64_t>(static_cast<uint32_t>(words[0]) |
                              (static_cast<uint64_t>(static_cast<uint32_t>(words[1])) << 32));
}

// What of a record each operation belongs to.
__device__ inline Part PartOf(int32_t kind) {
  return kind == kRingWrite ? Part::kWrites : kind == kRingHalve ? Part::kHalvings : Part::kAdmissions;
}

// Words of an operation.
__device__ inline int32_t Words(int32_t kind, int32_t count) {
  switch (kind) {
    case kRingWrite:
    case kRingAdmit:
      return 4;
    case kRingSample:
      return 10;
    case kRingHalve:
      return 4 + count;
    default:
      return 1 + count;
  }
}

// One head at work. Every function is called by all threads of the block and ends with a barrier. kPart: of the records; what has
// no halving in it needs fewer registers and no shared memory for them.
template <class T, Part kPart>
struct Worker {
  const ExecuteArgs& args;
  const Head& head;
  char* shared;    // of HalveList
  float* row;      // (2 kMostDim), shared: of a key, and of a value behind it
  float* reduced;  // (kWarps), shared
  int32_t* found;  // (kWarps), shared
  const int thread = static_cast<int>(threadIdx.x);

  __device__ T* Key(int32_t slot) const { return static_cast<T*>(head.key) + int64_t{slot} * args.key_dim; }
  __device__ T* Value(int32_t slot) const { return static_cast<T*>(head.value) + int64_t{slot} * args.value_dim; }
  // The same to be read, as numbers.
  __device__ RowOf<T> KeyRow(int32_t slot) const {
    if constexpr (kScaled<T>)
      return {&Key(slot)->code, FromScale(head.scale[slot].key)};
    else
      return Key(slot);
  }
  __device__ RowOf<T> ValueRow(int32_t slot) const {
    if constexpr (kScaled<T>)
      return {&Value(slot)->code, FromScale(head.scale[slot].value)};
    else
      return Value(slot);
  }
  __device__ static float At(const RowOf<T>& row, int32_t i) {
    if constexpr (kScaled<T>)
      return row[i];
    else
      return ToFloat(row[i]);
  }

  // Rows are whole 16-byte pieces; `lane` of `lanes` threads.
  template <bool kSwap>
  __device__ void MoveRow(T* from, T* to, int32_t dim, int lane, int lanes) const {
    auto* a = reinterpret_cast<uint4*>(from);
    auto* b = reinterpret_cast<uint4*>(to);
    for (int32_t i = lane; i < dim * static_cast<int32_t>(sizeof(T)) / 16; i += lanes) {
      const uint4 x = a[i];
      if (kSwap) a[i] = b[i];
      b[i] = x;
    }
  }
  template <bool kSwap>
  __device__ void MoveEntry(int32_t from, int32_t to, int lane, int lanes) const {
    MoveRow<kSwap>(Key(from), Key(to), args.key_dim, lane, lanes);
    MoveRow<kSwap>(Value(from), Value(to), args.value_dim, lane, lanes);
    if (lane == 0) {
      const int64_t position = head.position[from];
      if (kSwap) head.position[from] = head.position[to];
      head.position[to] = position;
      if constexpr (kScaled<T>) {
        const RowScales scale = head.scale[from];
        if (kSwap) head.scale[from] = head.scale[to];
        head.scale[to] = scale;
      }
    }
  }

  // Half of the threads have the key, half the value, a few elements each: rows are of up to 256.
  __device__ void Write(const char* k, const char* v, int64_t position, int32_t slot) const {
    constexpr int kHalf = kThreads / 2, kEach = 256 / kHalf;
    const bool is_key = thread < kHalf;
    const char* from = is_key ? k : v;
    const DType dtype = is_key ? args.k.dtype : args.v.dtype;
    const int32_t dim = is_key ? args.key_dim : args.value_dim, first = thread % kHalf;
    float x[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) x[i] = first + i * kHalf < dim ? LoadAs(from, dtype, first + i * kHalf) : 0.0f;
    T* to = is_key ? Key(slot) : Value(slot);
    uint16_t scale = 0;
    if constexpr (kScaled<T>) {
      scale = ScaleOfHalf(x);
      if (first == 0) (is_key ? head.scale[slot].key : head.scale[slot].value) = scale;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (first + i * kHalf >= dim) break;
      if constexpr (kScaled<T>)
        to[first + i * kHalf].code = CodeFor(x[i], scale);
      else
        FromFloat(x[i], to + first + i * kHalf);
    }
    if (thread == 0) {
      head.position[slot] = position;
      if (head.leader) head.log_weight[slot] = 0;
      if (head.seen != nullptr) head.seen->newest = position;
    }
    __syncthreads();
  }
  // Of the row that this half of the threads has.
  template <int kEach>
  __device__ uint16_t ScaleOfHalf(const float (&x)[kEach]) const {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      largest = fmaxf(largest, isfinite(x[i]) ? fabsf(x[i]) : std::numeric_limits<float>::infinity());
    largest = WarpReduce(largest, [](float a, float b) { return fmaxf(a, b); });
    if (thread % kWarp == 0) reduced[thread / kWarp] = largest;
    __syncthreads();
    const int w0 = thread / (kThreads / 2) * (kWarps / 2);
#pragma unroll
    for (int w = 0; w < kWarps / 2; ++w) largest = fmaxf(largest, reduced[w0 + w]);
    return ScaleFor(largest, isfinite(largest));
  }

  // Element d of a key, as scores see it.
  __device__ float Scored(int32_t slot, int32_t d) const {
    const RowOf<T> key = KeyRow(slot);
    const Rotation& r = head.scoring.rotation;
    if (!head.scoring.without_position || d >= 2 * r.pairs) return At(key, d);
    const bool interleaved = r.interleaved != 0, first = interleaved ? d % 2 == 0 : d < r.pairs;
    const int32_t pair = interleaved ? d / 2 : first ? d : d - r.pairs, step = interleaved ? 1 : r.pairs;
    const Angle angle = AngleAt(r, pair, head.position[slot]);
    return first ? FirstUndone(At(key, d), At(key, d + step), angle)
                 : SecondUndone(At(key, d - step), At(key, d), angle);
  }

  // The sum goes slot by slot, as on the CPU.
  __device__ void Centre(const int32_t* slots, int32_t count) const {
    for (int32_t d = thread; d < args.key_dim; d += kThreads) {
      float sum = 0;
      for (int32_t i = 0; i < count; ++i) sum = __fadd_rn(sum, Scored(slots[i], d));
      head.mean[d] = __fdiv_rn(sum, static_cast<float>(count));
    }
    __syncthreads();
  }

  // From the squares in `row`. The energy ||k - mu||^2 is summed in the order of the dimensions.
  __device__ float Score() const {
    if (head.scoring.without_position)
      return JoinScore(SumOf(row, args.key_dim), head.scoring.value_norm ? SumOf(row + kMostDim, args.value_dim) : 1);
    float score = 0;
    for (int32_t d = 0; d < args.key_dim; ++d) score = __fadd_rn(score, row[d]);
    return score;
  }

  __device__ static float SumOf(const float* squares, int32_t dim) {
    float lane[kScoreLanes] = {};
    for (int32_t d = 0; d < dim; d += kScoreLanes)
#pragma unroll
      for (int j = 0; j < kScoreLanes; ++j) lane[j] = __fadd_rn(lane[j], squares[d + j]);
    return SumLanes(lane);
  }

  // Index of the lowest of `count` scores; among equals the youngest.
  __device__ int32_t FindWeakest(int32_t count) const {
    float lowest = std::numeric_limits<float>::infinity();
    int32_t best = -1;
    int64_t age = -1;
    const auto better = [](float s, int64_t p, float than, int64_t than_p) {
      return s < than || (s == than && p > than_p);
    };
    for (int32_t i = thread; i < count; i += kThreads) {
      const float s = head.score[i];
      const int64_t p = head.position[head.protected_slot[i]];
      if (best < 0 || better(s, p, lowest, age)) lowest = s, age = p, best = i;
    }
    __shared__ int64_t ages[kWarps];
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const float s = __shfl_xor_sync(0xFFFFFFFFu, lowest, offset);
      const int64_t p = __shfl_xor_sync(0xFFFFFFFFu, age, offset);
      const int32_t b = __shfl_xor_sync(0xFFFFFFFFu, best, offset);
      if (b >= 0 && (best < 0 || better(s, p, lowest, age))) lowest = s, age = p, best = b;
    }
    if (thread % kWarp == 0) reduced[thread / kWarp] = lowest, found[thread / kWarp] = best, ages[thread / kWarp] = age;
    __syncthreads();
    best = found[0], lowest = reduced[0], age = ages[0];
    for (int w = 1; w < kWarps; ++w)
      if (found[w] >= 0 && (best < 0 || better(reduced[w], ages[w], lowest, age)))
        best = found[w], lowest = reduced[w], age = ages[w];
    __syncthreads();
    return best;
  }

  __device__ void Admit(int32_t slot, int64_t ordinal) const {
    const bool new_run = ordinal > 0 && ordinal % kRun == 0;
    for (int32_t d = thread; d < args.key_dim; d += kThreads) {
      if (new_run) {
        head.mean[d] = __fdiv_rn(head.sum[d], static_cast<float>(kRun));
        head.sum[d] = 0;
      }
      const float x = Scored(slot, d), centred = __fsub_rn(x, head.mean[d]);
      head.sum[d] = __fadd_rn(head.sum[d], x);
      row[d] = __fmul_rn(centred, centred);
    }
    if (head.scoring.value_norm)
      for (int32_t d = thread; d < args.value_dim; d += kThreads) {
        const float x = At(ValueRow(slot), d);
        row[kMostDim + d] = __fmul_rn(x, x);
      }
    __syncthreads();
    const float score = Score();
    const int32_t count = head.protected_count[0], weakest = head.protected_count[1];
    __syncthreads();
    if (count < head.protect) {
      if (thread == 0) {
        head.protected_slot[count] = slot;
        head.score[count] = score;
        head.protected_count[0] = count + 1;
      }
      __syncthreads();
      if (count + 1 < head.protect) return;
    } else {
      if (!(score > head.score[weakest])) return;
      MoveEntry<true>(slot, head.protected_slot[weakest], thread, kThreads);
      __syncthreads();
      if (thread == 0) head.score[weakest] = score;
      __syncthreads();
    }
    Refresh(head.protect);
  }

  __device__ void Refresh(int32_t count) const {
    const int32_t weakest = FindWeakest(count);
    if (thread == 0) head.protected_count[1] = count > 0 ? weakest : 0;
    __syncthreads();
  }

  // The weakest changes places with the one protected last, and leaves.
  __device__ void Evict() const {
    const int32_t last = head.protected_count[0] - 1, weakest = FindWeakest(last + 1);
    if (weakest != last) {
      MoveEntry<true>(head.protected_slot[weakest], head.protected_slot[last], thread, kThreads);
      __syncthreads();
      if (thread == 0) head.score[weakest] = head.score[last];
    }
    if (thread == 0) head.protected_count[0] = last;
    __syncthreads();
    Refresh(last);
  }
  __device__ void Move(const int32_t* slots, int32_t count) const {
    for (int32_t i = thread / kWarp; i < count / 2; i += kWarps)
      MoveEntry<false>(slots[2 * i], slots[2 * i + 1], thread % kWarp, kWarp);
    if (head.leader)
      for (int32_t i = thread; i < count / 2; i += kThreads) {
        head.log_weight[slots[2 * i + 1]] = head.log_weight[slots[2 * i]];
        head.log_weight[slots[2 * i]] = kMinusInfinity;
      }
    __syncthreads();
  }

  __device__ void Sample(int64_t number, int64_t weight, int64_t total, float log_weight, int32_t kept,
                         int32_t freed) const {
    if (DrawChance(head.stream, RandomPurpose::kSample, static_cast<uint64_t>(number), static_cast<uint64_t>(weight),
                   static_cast<uint64_t>(total)))
      MoveEntry<false>(freed, kept, thread, kThreads);
    if (thread == 0 && head.leader) {
      head.log_weight[kept] = log_weight;
      head.log_weight[freed] = kMinusInfinity;
    }
    __syncthreads();
  }

  struct RowsOf {
    const Worker& worker;
    const int32_t* slots;
    __device__ RowOf<T> Key(int32_t i) const { return worker.KeyRow(slots[i]); }
    __device__ RowOf<T> Value(int32_t i) const { return worker.ValueRow(slots[i]); }
  };

  __device__ void Halve(int64_t number, float log_weight, const int32_t* slots, int32_t count) const {
    auto* keep = reinterpret_cast<uint8_t*>(head.halve_scratch);
    char* scratch = head.halve_scratch + (count / 2 + 255) / 256 * 256;
    HalveList<NumberOf<T>, kThreads>(RowsOf{*this, slots}, count, args.key_dim, args.value_dim, args.halve, head.stream,
                                     static_cast<uint64_t>(number), scratch, shared, keep);
    for (int32_t a = thread / kWarp; a < count / 2; a += kWarps)
      if (keep[a] != 0) MoveEntry<false>(slots[2 * a + 1], slots[2 * a], thread % kWarp, kWarp);
    if (head.leader)
      for (int32_t i = thread; i < count; i += kThreads)
        head.log_weight[slots[i]] = i % 2 == 0 ? log_weight : kMinusInfinity;
    __syncthreads();
  }

  __device__ void Free(const int32_t* slots, int32_t count) const {
    if (head.leader)
      for (int32_t i = thread; i < count; i += kThreads) head.log_weight[slots[i]] = kMinusInfinity;
    __syncthreads();
  }

  // One warp has a list of at most kShortList entries; `warp_shared`: HalveWarpBytes.
  __device__ void HalveShort(int64_t number, float log_weight, const int32_t* slots, int32_t count, char* warp_shared,
                             uint8_t* keep) const {
    const int lane = thread % kWarp;
    HalveList<NumberOf<T>, kWarp, kWarpList>(RowsOf{*this, slots}, count, args.key_dim, args.value_dim, args.halve,
                                             head.stream, static_cast<uint64_t>(number), nullptr, warp_shared, keep);
    for (int32_t a = 0; a < count / 2; ++a)
      if (keep[a] != 0) MoveEntry<false>(slots[2 * a + 1], slots[2 * a], lane, kWarp);
    if (head.leader)
      for (int32_t i = lane; i < count; i += kWarp)
        head.log_weight[slots[i]] = i % 2 == 0 ? log_weight : kMinusInfinity;
    __syncwarp();
  }

  // The body of one record: what kPart is of it.
  __device__ void Run(const int32_t* at, const int32_t* end, const char* k, const char* v) const {
    while (at < end) {
      const int32_t kind = at[0] & 15, count = at[0] >> 4;
      if (kPart == Part::kAll || kPart == PartOf(kind)) RunOne(at, kind, count, k, v);
      at += Words(kind, count);
    }
  }
  __device__ __forceinline__ void RunOne(const int32_t* at, int32_t kind, int32_t count, const char* k,
                                         const char* v) const {
    if constexpr (kPart == Part::kAll || kPart == Part::kHalvings)
      if (kind == kRingHalve) return Halve(Long(at + 1), __int_as_float(at[3]), at + 4, count);
    if constexpr (kPart == Part::kAll || kPart == Part::kAdmissions) {
      if (kind == kRingCentre) return Centre(at + 1, count);
      if (kind == kRingAdmit) return Admit(at[3], Long(at + 1));
      if (kind == kRingSample)
        return Sample(Long(at + 1), Long(at + 3), Long(at + 5), __int_as_float(at[7]), at[8], at[9]);
      if (kind == kRingFree) return Free(at + 1, count);
    }
    if constexpr (kPart == Part::kAll) {  // the last two stand alone in records of their own
      if (kind == kRingWrite) return Write(k, v, Long(at + 1), at[3]);
      if (kind == kRingEvict) return Evict();
      if (kind == kRingMove) return Move(at + 1, count);
    }
  }
};

}  // namespace execute
}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_EXECUTE_CUH_
