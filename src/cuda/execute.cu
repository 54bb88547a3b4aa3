// Steps: the records of a ring executed on slabs, one block per head, operations in order.
#include <algorithm>

#include "src/cuda/device.cuh"
#include "src/cuda/execute.cuh"
#include "src/cuda/kernels.h"
#include "src/cuda/ring.h"

namespace express::cuda {
namespace {

using execute::kMinusInfinity;
using execute::kMostDim;
using execute::kThreads;
using execute::kWarps;
using execute::Long;
using execute::Words;
using execute::Worker;

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
