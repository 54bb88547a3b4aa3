// What the prefill kernels share: which queries a block of threads has, and the keys they see.
#ifndef EXPRESS_SRC_CUDA_PREFILL_CUH_
#define EXPRESS_SRC_CUDA_PREFILL_CUH_

#include <limits>

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Query rows [first, last) of one head. They see the far list of their block, then rows [begin, own row].
struct PrefillJob {
  int32_t kv_head, query_head;
  int32_t block;  // of the launch
  int64_t first, last, begin;
};

// Blocks of the prompt, in the coordinates of the launch: block 0 holds row 0.
__device__ inline int64_t BlockStart(const PrefillArgs& args, int64_t block) {
  return max(block * args.block - args.block_offset, int64_t{0});
}

// The first row that the queries of the block which begins at row `start` see exactly.
__device__ inline int64_t FirstKeptRow(const PrefillArgs& args, int32_t sinks, int32_t tail, int64_t start) {
  const int64_t exact = max(static_cast<int64_t>(sinks), args.first_position + start - tail) - args.first_position;
  return min(max(exact, int64_t{0}), start);
}

__device__ inline PrefillHead HeadOf(const PrefillArgs& args, int32_t kv_head) {
  return args.heads != nullptr ? args.heads[kv_head] : PrefillHead{};
}
__device__ inline int32_t FarCount(const PrefillHead& head, int32_t block) {
  return head.far_count != nullptr ? head.far_count[block] : 0;
}

// A KV head has so many jobs of up to `rows` queries, some of them without queries.
__host__ __device__ inline int64_t PrefillJobs(const PrefillArgs& args, int32_t rows) {
  return args.blocks * args.group * CeilDiv(args.block, rows);
}
__device__ inline int32_t PrefillBlockOf(const PrefillArgs& args, int32_t rows, int32_t index) {
  return index / ((args.block + rows - 1) / rows) / args.group;
}
// Job `index` of a KV head. False if it has no queries.
__device__ inline bool FindJob(const PrefillArgs& args, int32_t rows, int32_t kv_head, int32_t index, PrefillJob& job) {
  const int32_t tiles = (args.block + rows - 1) / rows, head_tile = index / tiles;
  job.kv_head = kv_head;
  job.query_head = kv_head * args.group + head_tile % args.group;
  job.block = head_tile / args.group;
  const int64_t block = args.first_block + job.block;
  const int64_t start = BlockStart(args, block), end = min(BlockStart(args, block + 1), args.tokens);
  job.first = start + index % tiles * rows;
  job.last = min(job.first + rows, end);
  const PrefillHead head = HeadOf(args, kv_head);
  job.begin = FirstKeptRow(args, head.sinks, head.tail, start);
  return job.first < job.last;
}

__device__ inline const char* RowAt(const Rows& rows, int64_t row, int32_t head) {
  return static_cast<const char*>(rows.data) + (row * rows.row_stride + head * rows.head_stride) * SizeOf(rows.dtype);
}

// The prefill for Hopper (prefill_sm90.cu): false if it does not know these dims or this type.
bool PrefillHopper(const PrefillArgs& args, int32_t multiprocessors, cudaStream_t stream);

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_PREFILL_CUH_
