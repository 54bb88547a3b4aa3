// The protected entries of a prompt: many departures at once, with the floats and the choices of src/cpu/protect.cc.
//
// Means of runs and scores are independent of all choices. What is left, who beats the weakest, goes in order; but once
// the set is full few departures beat it, so a block looks at many scores at a time and stops only at those.
#include <limits>

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {
namespace {

constexpr int64_t kRun = 256;  // departures that a mean is taken over
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <class T>
__device__ const T* DepartureKey(const AdmitArgs& args, const AdmitHead& head, int64_t i) {
  const int64_t index = i < args.source_count ? head.source[i] : args.first_row + i - args.source_count;
  if (index < 0) return static_cast<const T*>(head.slab_key) + (-1 - index) * args.key_dim;
  return static_cast<const T*>(args.k.data) + index * args.k.row_stride + head.kv_head * args.k.head_stride;
}

// The centre of the first departure: the mean of the exact tail, which is what departs first.
template <class T>
__global__ void CentreKernel(const __grid_constant__ AdmitArgs args) {
  const AdmitHead& head = args.heads[blockIdx.x];
  for (int32_t d = static_cast<int32_t>(threadIdx.x); d < args.key_dim; d += static_cast<int32_t>(blockDim.x)) {
    float sum = 0;
    for (int64_t i = 0; i < args.centre; ++i) sum = __fadd_rn(sum, ToFloat(DepartureKey<T>(args, head, i)[d]));
    head.mean[d] = __fdiv_rn(sum, static_cast<float>(args.centre));
  }
}

// Row r of run_means is the mean in force for departures of run first / kRun + r: one block per (run, head), a thread per
// dimension; run 0 has the mean of before. Run r's sum gives row r + 1; the last, unfinished, sum goes to row runs + 1.
template <class T>
__global__ void MeansKernel(const __grid_constant__ AdmitArgs args) {
  const AdmitHead& head = args.heads[blockIdx.y];
  const int64_t run = args.first / kRun + blockIdx.x, end = args.first + args.count;
  const int64_t begin = max(run * kRun, args.first), stop = min((run + 1) * kRun, end);
  for (int32_t d = static_cast<int32_t>(threadIdx.x); d < args.key_dim; d += static_cast<int32_t>(blockDim.x)) {
    // A run that begins with this call begins with an empty sum; the old mean then takes what `sum` holds.
    const bool fresh = args.first > 0 && args.first % kRun == 0;
    float sum = blockIdx.x == 0 && !fresh ? head.sum[d] : 0.0f;
    if (blockIdx.x == 0)
      head.run_means[d] = fresh ? __fdiv_rn(head.sum[d], static_cast<float>(kRun)) : head.mean[d];
    for (int64_t i = begin; i < stop; ++i) sum = __fadd_rn(sum, ToFloat(DepartureKey<T>(args, head, i - args.first)[d]));
    const bool whole = stop == (run + 1) * kRun;
    float* next = head.run_means + (int64_t{blockIdx.x} + 1) * args.key_dim;
    if (stop == end) next[args.key_dim + d] = sum;  // whether or not the run is whole: its mean comes with the next departure
    if (whole) next[d] = __fdiv_rn(sum, static_cast<float>(kRun));
  }
}

// One thread per departure: ||k - mu||^2, summed in the order of the dimensions. A block stays within one run.
template <class T>
__global__ void ScoresKernel(const __grid_constant__ AdmitArgs args) {
  extern __shared__ float mean[];  // (key_dim)
  const AdmitHead& head = args.heads[blockIdx.y];
  const int64_t run = args.first / kRun + blockIdx.x;
  for (int32_t d = static_cast<int32_t>(threadIdx.x); d < args.key_dim; d += static_cast<int32_t>(blockDim.x))
    mean[d] = head.run_means[int64_t{blockIdx.x} * args.key_dim + d];
  __syncthreads();
  const int64_t i = run * kRun + threadIdx.x - args.first;
  if (i < 0 || i >= args.count) return;
  const T* key = DepartureKey<T>(args, head, i);
  float score = 0;
  constexpr int kPiece = 16 / sizeof(T);
  for (int32_t at = 0; at < args.key_dim; at += kPiece) {
    const uint4 raw = *reinterpret_cast<const uint4*>(key + at);
    const T* x = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      const float centred = __fsub_rn(ToFloat(x[j]), mean[at + j]);
      score = __fadd_rn(score, __fmul_rn(centred, centred));
    }
  }
  head.scores[i] = score;
}

// After the scores: the state of the sums.
__global__ void StateKernel(const __grid_constant__ AdmitArgs args, int64_t runs) {
  const AdmitHead& head = args.heads[blockIdx.x];
  for (int32_t d = static_cast<int32_t>(threadIdx.x); d < args.key_dim; d += static_cast<int32_t>(blockDim.x)) {
    head.mean[d] = head.run_means[(runs - 1) * args.key_dim + d];
    head.sum[d] = head.run_means[(runs + 1) * args.key_dim + d];
  }
}

// A protected entry's rank: the lowest is the weakest.
struct Rank {
  float score;
  int64_t position;
  int32_t index;  // -1: none
  __device__ bool WeakerThan(const Rank& other) const {
    if (index < 0 || other.index < 0) return index >= 0;
    return score < other.score || (score == other.score && position > other.position);
  }
};

// The protected set of one head, with all threads of the block.
struct Selection {
  const AdmitArgs& args;
  const AdmitHead& head;
  int64_t* position;  // (protect), shared
  float* score;       // (protect), shared
  int32_t* entry;     // (protect), shared
  const int thread = static_cast<int>(threadIdx.x);

  __device__ int64_t Position(int32_t index) const {
    return index < 0 ? head.slab_position[-1 - index] : args.first_position + index;
  }
  __device__ void Load(int32_t count) const {
    for (int32_t i = thread; i < count; i += kThreads) {
      entry[i] = head.protected_index[i];
      score[i] = head.score[i];
      position[i] = Position(entry[i]);
    }
    __syncthreads();
  }
  __device__ void Store(int32_t count, int32_t weakest) const {
    for (int32_t i = thread; i < count; i += kThreads) {
      head.protected_index[i] = entry[i];
      head.score[i] = score[i];
    }
    if (thread == 0) {
      head.protected_count[0] = count;
      head.protected_count[1] = weakest;
    }
  }
  // By warp 0 alone.
  __device__ Rank Weakest() const {
    Rank weakest{0, 0, -1};
    for (int32_t i = thread; i < args.protect; i += kWarp) {
      const Rank rank{score[i], position[i], i};
      if (rank.WeakerThan(weakest)) weakest = rank;
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      const Rank rank{__shfl_xor_sync(0xFFFFFFFFu, weakest.score, offset),
                      __shfl_xor_sync(0xFFFFFFFFu, weakest.position, offset),
                      __shfl_xor_sync(0xFFFFFFFFu, weakest.index, offset)};
      if (rank.WeakerThan(weakest)) weakest = rank;
    }
    return weakest;
  }
};

// One block per head. Departures go by in chunks of one per thread, cut where a snapshot is due.
__global__ __launch_bounds__(kThreads) void SelectKernel(const __grid_constant__ AdmitArgs args) {
  extern __shared__ __align__(16) char memory[];
  __shared__ uint32_t above[kWarps];
  __shared__ float chunk_score[kThreads];
  __shared__ Rank current;
  const AdmitHead& head = args.heads[blockIdx.x];
  auto* position = reinterpret_cast<int64_t*>(memory);
  auto* score = reinterpret_cast<float*>(position + args.protect);
  auto* entry = reinterpret_cast<int32_t*>(score + args.protect);
  const Selection set{args, head, position, score, entry};
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  int32_t count = head.protected_count[0];
  set.Load(count);
  if (warp == 0 && count == args.protect) {
    const Rank weakest = set.Weakest();
    if (lane == 0) current = weakest;
  }
  __syncthreads();
  int32_t snapshot = 0;
  for (int64_t begin = 0;;) {
    while (snapshot < args.snapshots && args.snapshot_at[snapshot] == begin) {
      for (int32_t i = thread; i < count; i += kThreads) head.snapshots[int64_t{snapshot} * args.protect + i] = entry[i];
      ++snapshot;
    }
    if (begin == args.count) break;
    int64_t end = min(begin + kThreads, args.count);
    if (snapshot < args.snapshots) end = min(end, static_cast<int64_t>(args.snapshot_at[snapshot]));
    if (count < args.protect) end = min(end, begin + args.protect - count);
    const int64_t i = begin + thread;
    const int32_t own = i < end ? (i < args.source_count ? head.source[i]
                                                         : static_cast<int32_t>(args.first_row + i - args.source_count))
                                : 0;
    const float own_score = i < end ? head.scores[i] : 0;
    if (count < args.protect) {  // these join
      if (i < end) {
        entry[count + thread] = own;
        score[count + thread] = own_score;
        position[count + thread] = set.Position(own);
        head.loser[i] = kSkip;
      }
      count += static_cast<int32_t>(end - begin);
      __syncthreads();
      if (count == args.protect && warp == 0) {
        const Rank weakest = set.Weakest();
        if (lane == 0) current = weakest;
      }
    } else {
      // The threshold only rises, so those that do not beat it now never will.
      const uint32_t beats = __ballot_sync(0xFFFFFFFFu, i < end && own_score > current.score);
      if (i < end) head.loser[i] = own;
      chunk_score[thread] = own_score;
      if (lane == 0) above[warp] = beats;
      __syncthreads();
      if (warp == 0) {
        Rank weakest = current;
        for (int w = 0; w < kWarps; ++w)
          for (uint32_t left = above[w]; left != 0; left &= left - 1) {
            const int j = w * kWarp + __ffs(static_cast<int>(left)) - 1;
            const float challenger = chunk_score[j];
            if (!(challenger > weakest.score)) continue;
            if (lane == weakest.index % kWarp) {
              const int64_t at = begin + j;
              const int32_t index =
                  at < args.source_count ? head.source[at] : static_cast<int32_t>(args.first_row + at - args.source_count);
              head.loser[at] = entry[weakest.index];
              entry[weakest.index] = index;
              score[weakest.index] = challenger;
              position[weakest.index] = set.Position(index);
            }
            __syncwarp();
            weakest = set.Weakest();
          }
        if (lane == 0) current = weakest;
      }
    }
    __syncthreads();
    begin = end;
  }
  set.Store(count, count == args.protect ? current.index : 0);
}

__global__ void BeginKernel(const AdmitHead* heads, const Head* layer_heads) {
  const AdmitHead& admit = heads[blockIdx.x];
  if (admit.protect == 0) return;
  const Head& head = layer_heads[admit.kv_head];
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < admit.protected_count[0]; i += static_cast<int32_t>(blockDim.x))
    admit.protected_index[i] = -1 - head.protected_slot[i];
}

}  // namespace

void AdmitBegin(const AdmitHead* heads, int32_t head_count, const Head* layer_heads, cudaStream_t stream) {
  BeginKernel<<<static_cast<uint32_t>(head_count), 128, 0, stream>>>(heads, layer_heads);
}

void Admit(const AdmitArgs& args, cudaStream_t stream) {
  const auto heads = static_cast<uint32_t>(args.head_count);
  if (args.count > 0) {
    const int64_t runs = (args.first + args.count - 1) / kRun - args.first / kRun + 1;
    const dim3 grid(static_cast<uint32_t>(runs), heads);
    WithType(args.dtype, [&](auto type) {
      using T = decltype(type);
      if (args.centre > 0) CentreKernel<T><<<heads, 128, 0, stream>>>(args);
      MeansKernel<T><<<grid, 128, 0, stream>>>(args);
      ScoresKernel<T><<<grid, kRun, static_cast<size_t>(args.key_dim) * sizeof(float), stream>>>(args);
    });
    StateKernel<<<heads, 128, 0, stream>>>(args, runs);
  }
  const size_t shared = static_cast<size_t>(args.protect) * (sizeof(int64_t) + sizeof(float) + sizeof(int32_t));
  if (shared > 40 * 1024)
    cudaFuncSetAttribute(SelectKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  SelectKernel<<<heads, kThreads, shared, stream>>>(args);
}

}  // namespace express::cuda
