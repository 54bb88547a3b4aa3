// Weighted decode attention over f32 slabs, on CUDA cores: one key of a warp at a time. Heads are split over keys; warps of a
// block merge through shared memory, blocks (splits) through Head::partial: the last one to finish merges them in order.
#include <algorithm>

#include "src/cuda/attend.cuh"

namespace express::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kSplitUnit = kTile * kWarps;
constexpr int kResident = 2;  // blocks of a multiprocessor

__device__ void StoreOne(const AttendLaunch& launch, int32_t row, int32_t cache, int32_t kv_head, int32_t dim,
                         float x) {
  const AttendArgs& a = launch.args;
  const int64_t at =
      RowOffset(launch, row, cache, kv_head, a.out_cache_stride, a.out.row_stride, a.out.head_stride) + dim;
  if (a.out.dtype == DType::kF32)
    static_cast<float*>(a.out.data)[at] = x;
  else if (a.out.dtype == DType::kF16)
    FromFloat(x, static_cast<Half*>(a.out.data) + at);
  else
    FromFloat(x, static_cast<BFloat16*>(a.out.data) + at);
}

// What the warps of a block have: out (warps, rows, value_dim), not normalised, and state (warps, rows, 2) in shared memory.
// Writes the block's partial result, or, with one split, the result; the last block merges all splits, with (rows, splits)
// floats of scratch, which may be the memory of `out`.
__device__ void Finish(const AttendLaunch& launch, const Head& head, const float* out, const float* state,
                       int32_t splits, float* scratch) {
  const int32_t rows = launch.rows, dim = launch.args.value_dim, thread = static_cast<int32_t>(threadIdx.x);
  const auto kv_head = static_cast<int32_t>(blockIdx.y);
  const auto cache = static_cast<int32_t>(blockIdx.z);
  __shared__ float weight[kWarps][kPartialRows];
  __shared__ Merged merged[kPartialRows];
  __shared__ bool last;
  if (thread < rows) {
    Merged m;
    for (int w = 0; w < kWarps; ++w) m.Add(state[(w * rows + thread) * 2], state[(w * rows + thread) * 2 + 1]);
    for (int w = 0; w < kWarps; ++w) {
      const float max = state[(w * rows + thread) * 2];
      weight[w][thread] = max == kMinusInfinity ? 0 : Exp2(max - m.max);
    }
    merged[thread] = m;
    if (splits == 1) StoreLse(launch, thread, cache, kv_head, m.Lse());
  }
  __syncthreads();
  float* partial = head.partial + int64_t{blockIdx.x} * kPartialRows * (dim + 2);
  for (int32_t i = thread; i < rows * dim; i += kThreads) {
    const int32_t row = i / dim;
    float sum = 0;
    for (int w = 0; w < kWarps; ++w)
      if (weight[w][row] != 0) sum += weight[w][row] * out[w * rows * dim + i];
    if (splits == 1)
      StoreOne(launch, row, cache, kv_head, i - row * dim, sum * merged[row].Inverse());
    else
      partial[row * (dim + 2) + i - row * dim] = sum;
  }
  if (splits == 1) return;
  if (thread < rows) {
    partial[thread * (dim + 2) + dim] = merged[thread].max;
    partial[thread * (dim + 2) + dim + 1] = merged[thread].sum;
  }
  __threadfence();
  __syncthreads();
  if (thread == 0) last = atomicAdd(head.ticket, 1) == splits - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  const auto at = [&](int32_t split, int32_t row) {
    return head.partial + (int64_t{split} * kPartialRows + row) * (dim + 2);
  };
  // A warp per row: its splits' states, and what each split counts in the row's result.
  float* share = scratch;  // (rows, splits)
  for (int32_t row = thread / kWarp; row < rows; row += kWarps) {
    Merged m;
    for (int32_t s = thread % kWarp; s < splits; s += kWarp)
      m.Add(__ldcg(at(s, row) + dim), __ldcg(at(s, row) + dim + 1));
    const float top = WarpReduce(m.max, [](float x, float y) { return fmaxf(x, y); });
    float sum = m.max == kMinusInfinity ? 0 : m.sum * Exp2(m.max - top);
    sum = WarpReduce(sum, [](float x, float y) { return x + y; });
    const Merged all{top, sum};
    for (int32_t s = thread % kWarp; s < splits; s += kWarp) {
      const float max = __ldcg(at(s, row) + dim);
      share[row * splits + s] = max == kMinusInfinity ? 0 : Exp2(max - top) * all.Inverse();
    }
    if (thread % kWarp == 0) StoreLse(launch, row, cache, kv_head, all.Lse());
  }
  __syncthreads();
  for (int32_t i = thread; i < rows * dim; i += kThreads) {
    const int32_t row = i / dim;
    const float* from = head.partial + row * (dim + 2) + i - row * dim;
    float sum = 0;
    for (int32_t s = 0; s < splits; s += 8) {
      float x[8];
#pragma unroll
      for (int32_t j = 0; j < 8; ++j)
        x[j] = s + j < splits ? __ldcg(from + int64_t{s + j} * kPartialRows * (dim + 2)) : 0;
#pragma unroll
      for (int32_t j = 0; j < 8; ++j)
        if (s + j < splits && share[row * splits + s + j] != 0) sum += share[row * splits + s + j] * x[j];
    }
    StoreOne(launch, row, cache, kv_head, i - row * dim, sum);
  }
  if (thread == 0) *head.ticket = 0;
}

constexpr int kMostDim = 256;

__global__ __launch_bounds__(kThreads) void AttendPlainKernel(const __grid_constant__ AttendLaunch launch) {
  extern __shared__ __align__(16) float shared[];
  const AttendArgs& args = launch.args;
  const Head& head = args.heads[blockIdx.z][blockIdx.y];
  const int32_t splits = max(1, static_cast<int32_t>(CeilDiv(head.capacity, launch.split)));
  if (static_cast<int32_t>(blockIdx.x) >= splits) return;
  const int warp = static_cast<int>(threadIdx.x / kWarp), lane = static_cast<int>(threadIdx.x % kWarp);
  constexpr int kEach = kMostDim / kWarp;
  float q[kPlainRows][kEach], out[kPlainRows][kEach] = {}, max[kPlainRows], sum[kPlainRows] = {};
#pragma unroll
  for (int r = 0; r < kPlainRows; ++r) {
    max[r] = kMinusInfinity;
    const void* row =
        QueryRow(launch, min(r, launch.rows - 1), static_cast<int32_t>(blockIdx.z), static_cast<int32_t>(blockIdx.y));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int d = lane + kWarp * i;
      q[r][i] = 0;
      if (d < args.key_dim)
        q[r][i] = args.q.dtype == DType::kF32   ? static_cast<const float*>(row)[d]
                  : args.q.dtype == DType::kF16 ? ToFloat(static_cast<const Half*>(row)[d])
                                                : ToFloat(static_cast<const BFloat16*>(row)[d]);
    }
  }
  const int64_t begin = int64_t{blockIdx.x} * launch.split,
                end = min(static_cast<int64_t>(head.capacity), begin + launch.split);
  for (int64_t j = begin + warp; j < end; j += kWarps) {
    const float weight = head.log_weight[j];
    if (weight == kMinusInfinity) continue;
    const float* key = static_cast<const float*>(head.key) + j * args.key_dim;
    const float* value = static_cast<const float*>(head.value) + j * args.value_dim;
    float k[kEach], v[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int d = lane + kWarp * i;
      k[i] = d < args.key_dim ? key[d] : 0;
      v[i] = d < args.value_dim ? value[d] : 0;
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      float dot = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) dot = fmaf(q[r][i], k[i], dot);
      dot = WarpReduce(dot, [](float a, float b) { return a + b; });
      const float logit =
          fminf(fmaxf(dot * args.scale, -kLargestLogit), kLargestLogit) * kLog2E + args.exponent * weight * kLog2E;
      const float top = fmaxf(max[r], logit), factor = Exp2(max[r] - top), p = Exp2(logit - top);
      max[r] = top;
      sum[r] = sum[r] * factor + p;
#pragma unroll
      for (int i = 0; i < kEach; ++i) out[r][i] = out[r][i] * factor + p * v[i];
    }
  }
  float* states = shared + kWarps * launch.rows * args.value_dim;
#pragma unroll
  for (int r = 0; r < kPlainRows; ++r) {
    if (r >= launch.rows) continue;
    const int row = warp * launch.rows + r;
    if (lane == 0) {
      states[2 * row] = max[r];
      states[2 * row + 1] = sum[r];
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (lane + kWarp * i < args.value_dim) shared[row * args.value_dim + lane + kWarp * i] = out[r][i];
  }
  __syncthreads();
  Finish(launch, head, shared, states, splits, shared);
}

// As many splits of every head as fill whole rounds of resident blocks best, few rather than many: a split costs its start
// and a partial result.
int32_t SplitLength(const AttendArgs& args, int32_t multiprocessors) {
  const int64_t heads = int64_t{args.caches} * args.kv_heads,
                resident = int64_t{kResident} * std::max(1, multiprocessors);
  const int64_t units = CeilDiv(args.max_capacity, kSplitUnit);
  int64_t best = 1;
  double best_cost = 0;
  for (int64_t splits = 1; splits <= std::min(units, kMostSplits); ++splits) {
    const auto rounds = static_cast<double>(CeilDiv(heads * splits, resident));
    // In units of keys of one warp group: a block's own work, and what its beginning and end take.
    const double cost =
        rounds * (static_cast<double>(CeilDiv(units, splits)) + 2.0) + 0.05 * static_cast<double>(splits);
    if (splits == 1 || cost < best_cost) best = splits, best_cost = cost;
  }
  return static_cast<int32_t>(CeilDiv(units, best) * kSplitUnit);
}

}  // namespace

void AttendPlain(AttendLaunch& launch, int32_t multiprocessors, cudaStream_t stream) {
  const AttendArgs& args = launch.args;
  launch.split = SplitLength(args, multiprocessors);
  const dim3 grid(static_cast<uint32_t>(std::max<int64_t>(1, CeilDiv(args.max_capacity, launch.split))),
                  static_cast<uint32_t>(args.kv_heads), static_cast<uint32_t>(args.caches));
  const auto splits = static_cast<int32_t>(grid.x);
  const size_t shared =
      static_cast<size_t>(launch.rows * std::max(kWarps * (args.value_dim + 2), splits)) * sizeof(float);
  AttendPlainKernel<<<grid, kThreads, shared, stream>>>(launch);
}

}  // namespace express::cuda
