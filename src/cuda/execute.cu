// Steps: the records of a ring executed on slabs, one block per head, operations in order.
#include <algorithm>
#include <limits>

#include "src/cuda/device.cuh"
#include "src/cuda/halve.cuh"
#include "src/cuda/kernels.h"
#include "src/cuda/ring.h"

namespace express::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
static_assert(kShortList == kWarpList);
constexpr int32_t kMostDim = 256;  // of keys and of values
constexpr int64_t kRun = 256;      // departures that a mean is taken over, as on the CPU
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

__device__ int64_t Long(const int32_t* words) {
  return static_cast<int64_t>(static_cast<uint32_t>(words[0]) |
                              (static_cast<uint64_t>(static_cast<uint32_t>(words[1])) << 32));
}

// What of a record each operation belongs to.
__device__ Part PartOf(int32_t kind) {
  return kind == kRingWrite ? Part::kWrites : kind == kRingHalve ? Part::kHalvings : Part::kAdmissions;
}

// Words of an operation.
__device__ int32_t Words(int32_t kind, int32_t count) {
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

// The record with this sequence number, from `offset` on, or null.
__device__ const int32_t* FindRecord(const Ring& ring, int32_t sequence, int32_t& offset) {
  const int32_t* record = ring.words + offset;
  if (record[0] == RecordTag(sequence) && record[1] == kJump) {
    offset = 0;
    record = ring.words;
  }
  return record[0] == RecordTag(sequence) && record[1] != kJump ? record : nullptr;
}

// All heads of the plan are done: the ring moves on. Nothing has to come before the host sees it: what it does then, it does on the
// stream, behind this kernel.
template <Part kPart>
__device__ void Arrive(Ring& ring, int32_t offset, int32_t sequence, bool complete) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(&ring.arrived, 1) != ring.heads - 1) return;
  ring.arrived = 0;
  volatile int32_t* progress = ring.progress;
  if (!complete) {
    progress[1] = 1;
    return;
  }
  ring.cursor = offset;
  ring.sequence = sequence;
  if (kPart == Part::kAll) progress[0] = sequence;
}

// What a step reads one after the other lies far away, if the other layers' entries have pushed it out of the L2 since the last
// token. It is asked for while the kernel before is at work. A cursor that is out of date asks for the wrong lines, no more; it is
// read past the L1, which must not have it when it is read for good.
__device__ void AskFor(const Head& head, const Ring& ring, int32_t key_dim) {
  constexpr int32_t kLine = 128, kRecordBytes = 1024;
  const auto ask = [](const void* from, int32_t bytes) {
    for (int32_t at = static_cast<int32_t>(threadIdx.x) * kLine; at < bytes; at += kThreads * kLine)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + at));
  };
  const int32_t cursor = __ldcg(&ring.cursor), left = __ldcg(&ring.capacity) - cursor;
  const auto words = reinterpret_cast<const int32_t*>(__ldcg(reinterpret_cast<const unsigned long long*>(&ring.words)));
  ask(words + cursor, min(kRecordBytes, left * static_cast<int32_t>(sizeof(int32_t))));
  if (head.protect == 0) return;
  const auto floats = static_cast<int32_t>(sizeof(float));
  ask(head.mean, key_dim * floats);
  ask(head.sum, key_dim * floats);
  ask(head.protected_count, 2 * floats);
  ask(head.score, head.protect * floats);
  ask(head.protected_slot, head.protect * floats);
}

// The halvings of one record of every head: few heads have one, and many blocks that find nothing to do would take long, one to a
// multiprocessor. So each thread looks at a head, and the block then works on those that it found: a warp has a head whose lists
// are short, as most are, all of the block one with a long list.
// grid: blocks, which take heads in turns; (layers * kv_heads) heads of every cache, caches side by side.
template <class T>
__global__ __launch_bounds__(kThreads) void HalvingsKernel(const __grid_constant__ ExecuteArgs args) {
  extern __shared__ __align__(16) char shared[];
  __shared__ const int32_t* records[kThreads];  // those with short lists from the front, the others from the back
  __shared__ const Head* heads[kThreads];
  __shared__ int32_t found[2];
  __shared__ uint8_t keep[kWarps][kShortList / 2];
  using HeadWorker = Worker<T, Part::kHalvings>;
  const int32_t each = args.layers * args.kv_heads, total = args.caches * each;
  const auto blocks = static_cast<int32_t>(gridDim.x), thread = static_cast<int32_t>(threadIdx.x),
             warp = thread / kWarp;
  DependentsMayStart();
  WaitForKernelBefore();
  for (int32_t first = static_cast<int32_t>(blockIdx.x); first < total; first += blocks * kThreads) {
    if (thread < 2) found[thread] = 0;
    __syncthreads();
    if (const int32_t index = first + thread * blocks; index < total) {
      const Head& head = args.heads[index / each][index % each];
      const Ring& ring = args.rings[index / each][head.plan];
      int32_t offset = ring.cursor;
      const int32_t* record = FindRecord(ring, ring.sequence + 1, offset);
      if (record != nullptr && (record[2] & (kHalves | kHalvesLong)) != 0) {
        const int longs = (record[2] & kHalvesLong) != 0 ? 1 : 0;
        const int32_t at = atomicAdd(&found[longs], 1), place = longs != 0 ? kThreads - 1 - at : at;
        records[place] = record;
        heads[place] = &head;
      }
    }
    __syncthreads();
    const int32_t shorts = found[0], longs = found[1];
    for (int32_t i = warp; i < shorts; i += kWarps) {
      const HeadWorker worker{args, *heads[i], nullptr, nullptr, nullptr, nullptr};
      const int32_t* at = records[i] + kRecordHeader;
      for (const int32_t* end = at + records[i][1]; at < end; at += Words(at[0] & 15, at[0] >> 4))
        if ((at[0] & 15) == kRingHalve)
          worker.HalveShort(Long(at + 1), __int_as_float(at[3]), at + 4, at[0] >> 4,
                            shared + static_cast<size_t>(warp) * HalveWarpBytes(args.key_dim), keep[warp]);
    }
    __syncthreads();
    for (int32_t i = kThreads - longs; i < kThreads; ++i) {
      const HeadWorker worker{args, *heads[i], shared, nullptr, nullptr, nullptr};
      const int32_t* body = records[i] + kRecordHeader;
      worker.Run(body, body + records[i][1], nullptr, nullptr);
    }
    __syncthreads();
  }
}

// This block's row of k or v, of one step.
__device__ const char* RowAt(const ExecuteArgs& args, const Rows& rows, int64_t cache_stride, int64_t layer_stride,
                             int64_t step) {
  const auto layer = static_cast<int64_t>(blockIdx.x) / args.kv_heads,
             kv_head = static_cast<int64_t>(blockIdx.x) % args.kv_heads;
  const int64_t element =
      args.row[blockIdx.y] * cache_stride + layer * layer_stride + kv_head * rows.head_stride + step * rows.row_stride;
  return static_cast<const char*>(rows.data) + element * SizeOf(rows.dtype);
}

// grid: (layers * kv_heads, caches); kAll or kAdmissions.
template <class T, Part kPart>
__global__ __launch_bounds__(kThreads) void ExecuteKernel(const __grid_constant__ ExecuteArgs args) {
  extern __shared__ __align__(16) char shared[];
  __shared__ float row[2 * kMostDim];
  __shared__ float reduced[kWarps];
  __shared__ int32_t found[kWarps];
  // Descriptions of heads change behind a Fence only: they may be read before the kernel before is done.
  const Head& head = args.heads[blockIdx.y][blockIdx.x];
  Ring& ring = args.rings[blockIdx.y][head.plan];
  DependentsMayStart();
  if (args.launch_early) AskFor(head, ring, args.key_dim);
  WaitForKernelBefore();
  const Worker<T, kPart> worker{args, head, shared, row, reduced, found};
  int32_t offset = ring.cursor, sequence = ring.sequence;
  __syncthreads();
  bool complete = true;
  for (int32_t step = 0; step < args.steps && complete; ++step) {
    const int32_t* record = FindRecord(ring, sequence + 1, offset);
    complete = record != nullptr;
    if (!complete) break;
    ++sequence;
    const int32_t *body = record + kRecordHeader, *end = body + record[1];
    if constexpr (kPart == Part::kAll)
      if ((record[2] & kRefresh) != 0 && head.protect > 0) worker.Refresh(head.protected_count[0]);
    worker.Run(body, end, RowAt(args, args.k, args.k_cache_stride, args.k_layer_stride, step),
               RowAt(args, args.v, args.v_cache_stride, args.v_layer_stride, step));
    offset += kRecordHeader + record[1];
    if (kPart == Part::kAdmissions && head.leader && threadIdx.x == 0) {  // for the kernel of the writes
      const int32_t* write = end - kWriteWords;
      ring.position = Long(write + 1);
      ring.slot = write[3];
      ring.written = sequence;
    }
  }
  if (kPart == Part::kAdmissions && !complete && head.leader && threadIdx.x == 0) ring.slot = -1;
  Arrive<kPart>(ring, offset, sequence, complete);
}

// The same grid: the write of the record whose admissions are done.
template <class T>
__global__ __launch_bounds__(kThreads) void WriteKernel(const __grid_constant__ ExecuteArgs args) {
  __shared__ float reduced[kWarps];
  const Head& head = args.heads[blockIdx.y][blockIdx.x];
  const Ring& ring = args.rings[blockIdx.y][head.plan];
  DependentsMayStart();
  WaitForKernelBefore();
  const int32_t slot = ring.slot;
  if (slot < 0) return;
  const Worker<T, Part::kWrites> worker{args, head, nullptr, nullptr, reduced, nullptr};
  worker.Write(RowAt(args, args.k, args.k_cache_stride, args.k_layer_stride, 0),
               RowAt(args, args.v, args.v_cache_stride, args.v_layer_stride, 0), ring.position, slot);
  if (head.leader && threadIdx.x == 0) static_cast<volatile int32_t*>(ring.progress)[0] = ring.written;
}

__global__ void ResetKernel(const Head* heads, int32_t head_count, Ring* rings, int32_t key_dim) {
  const auto index = static_cast<int32_t>(blockIdx.x), thread = static_cast<int32_t>(threadIdx.x);
  if (index >= head_count) {
    Ring& ring = rings[index - head_count];
    if (thread == 0) ring.cursor = ring.sequence = ring.arrived = ring.words[0] = 0, ring.slot = -1;
    return;
  }
  const Head& head = heads[index];
  if (head.leader)
    for (int32_t i = thread; i < head.capacity; i += kThreads) head.log_weight[i] = kMinusInfinity;
  if (head.protect > 0)
    for (int32_t d = thread; d < key_dim; d += kThreads) head.mean[d] = head.sum[d] = 0;
  if (thread < 2) head.protected_count[thread] = 0;
  if (thread == 0) *head.ticket = 0;
  if (thread == 0 && head.seen != nullptr) *head.seen = {};
}

}  // namespace

void ResetHeads(const Head* heads, int32_t head_count, Ring* rings, int32_t ring_count, int32_t key_dim,
                cudaStream_t stream) {
  ResetKernel<<<static_cast<uint32_t>(head_count + ring_count), kThreads, 0, stream>>>(heads, head_count, rings,
                                                                                       key_dim);
}

size_t HalveScratch(int32_t longest_list) {
  return static_cast<size_t>((longest_list / 2 + 255) / 256 * 256) +
         (HalveScratchBytes(longest_list) + 255) / 256 * 256;
}

void Execute(const ExecuteArgs& args, cudaStream_t stream) {
  const auto heads = static_cast<uint32_t>(args.layers * args.kv_heads), caches = static_cast<uint32_t>(args.caches);
  dim3 grid(heads, caches);
  if (args.part == Part::kHalvings) grid = std::min(heads * caches, static_cast<uint32_t>(args.multiprocessors));
  WithStorage(args.dtype, [&](auto type) {
    using T = decltype(type);
    const size_t shared =
        std::max(HalveSharedBytes<NumberOf<T>>(args.key_dim, args.value_dim), kWarps * HalveWarpBytes(args.key_dim));
    cudaLaunchAttribute early = LaunchEarly();
    const cudaLaunchConfig_t config{
        .gridDim = grid,
        .blockDim = dim3(kThreads),
        .dynamicSmemBytes = args.part == Part::kAll || args.part == Part::kHalvings ? shared : 0,
        .stream = stream,
        .attrs = &early,
        .numAttrs = args.launch_early ? 1u : 0u};
    if (args.part == Part::kAll)
      cudaLaunchKernelEx(&config, ExecuteKernel<T, Part::kAll>, args);
    else if (args.part == Part::kHalvings)
      cudaLaunchKernelEx(&config, HalvingsKernel<T>, args);
    else if (args.part == Part::kAdmissions)
      cudaLaunchKernelEx(&config, ExecuteKernel<T, Part::kAdmissions>, args);
    else
      cudaLaunchKernelEx(&config, WriteKernel<T>, args);
  });
}

}  // namespace express::cuda
