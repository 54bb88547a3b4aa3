// Far mass: how much of their attention the query rows of a token pay to entries of tokens that lie far back. What src/cache/observe.cc
// says, on the device; rounding may differ.
//
// One block per (KV head, token, chunk of query rows). Eight threads take a key together, so that a warp has four at a time; each
// then keeps the softmax states of one or two rows. Values are not read.
#include <limits>

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kLanes = 8;  // threads of a key
constexpr int kGroups = kThreads / kLanes;
constexpr int kMostRows = 16;
constexpr int kRowsOfLane = kMostRows / kLanes;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr float kLargestLogit = 1e38f;  // as in attention
constexpr double kFarUnit = 4294967296.0;

// max is of all, base e.
struct Mass {
  float max = kMinusInfinity, all = 0, far = 0;
  __device__ void Add(float logit, bool is_far) {
    const float top = fmaxf(max, logit), before = max == kMinusInfinity ? 0 : expf(max - top), now = expf(logit - top);
    all = all * before + now;
    far = far * before + (is_far ? now : 0);
    max = top;
  }
  __device__ void Merge(float other_max, float other_all, float other_far) {
    if (other_max == kMinusInfinity) return;
    const float top = fmaxf(max, other_max), before = max == kMinusInfinity ? 0 : expf(max - top),
                now = expf(other_max - top);
    all = all * before + other_all * now;
    far = far * before + other_far * now;
    max = top;
  }
};

// One block at work.
template <class T>
struct Watcher {
  const ObserveArgs& args;
  const float* q;  // (rows, key_dim), scaled; shared memory
  int32_t rows;
  Mass mass[kRowsOfLane];  // of rows lane, lane + 8
  const int lane = static_cast<int>(threadIdx.x % kLanes);

  // Called by the eight threads of a key, all 32 of a warp at once; the key is none where valid is false. scale: of codes.
  __device__ void Take(const T* key, float scale, bool valid, float bias, bool is_far) {
    using Load = std::conditional_t<kScaled<T>, uint2, uint4>;  // of codes all lanes have some
    constexpr int kPiece = static_cast<int>(sizeof(Load) / sizeof(T));
    float dot[kMostRows] = {};
    for (int32_t piece = lane; valid && piece < args.key_dim / kPiece; piece += kLanes) {
      const Load raw = reinterpret_cast<const Load*>(key)[piece];
      const T* x = reinterpret_cast<const T*>(&raw);
#pragma unroll
      for (int r = 0; r < kMostRows; ++r) {
        if (r >= rows) break;
        const float* row = q + r * args.key_dim + piece * kPiece;
#pragma unroll
        for (int i = 0; i < kPiece; ++i) dot[r] = fmaf(row[i], ToFloat(x[i]), dot[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kMostRows; ++r) {
      if (r >= rows) break;
#pragma unroll
      for (int offset = 1; offset < kLanes; offset *= 2) dot[r] += __shfl_xor_sync(0xFFFFFFFFu, dot[r], offset);
      if (valid && r % kLanes == lane)
        mass[r / kLanes].Add(fminf(fmaxf(dot[r] * scale, -kLargestLogit), kLargestLogit) + bias, is_far);
    }
  }

  // All live slots, then rows [0, rows_of_k) of k.
  __device__ void TakeAll(const Head& head, int64_t last_far, int64_t rows_of_k) {
    const int group = static_cast<int>(threadIdx.x) / kLanes;
    for (int32_t begin = 0; begin < head.capacity; begin += kGroups) {
      const int32_t slot = begin + group;
      const float weight = slot < head.capacity ? head.log_weight[slot] : kMinusInfinity;
      const bool live = weight != kMinusInfinity;
      float scale = 1;
      if constexpr (kScaled<T>) scale = live ? FromScale(head.scale[slot].key) : 1.0f;
      Take(static_cast<const T*>(head.key) + int64_t{slot} * args.key_dim, scale, live, args.exponent * weight,
           live && head.position[slot] <= last_far);
    }
    const T* k = static_cast<const T*>(args.k.data) + blockIdx.x * args.k.head_stride;
    for (int64_t begin = 0; begin < rows_of_k; begin += kGroups) {
      const int64_t row = begin + group;
      float scale = 1;
      if constexpr (kScaled<T>)
        if (row < rows_of_k) scale = FromScale(args.k.scale[blockIdx.x * args.k.scale_stride + row].key);
      Take(k + row * args.k.row_stride, scale, row < rows_of_k, 0, args.first_position + row <= last_far);
    }
  }
};

template <class T>
__global__ __launch_bounds__(kThreads) void ObserveKernel(const __grid_constant__ ObserveArgs args) {
  __shared__ float q[kObserveFloats];
  __shared__ float states[kMostRows][kGroups][3];
  __shared__ double share[kMostRows];
  DependentsMayStart();
  WaitForKernelBefore();
  const auto item = static_cast<int64_t>(blockIdx.y);
  const ObserveCache& cache = args.caches[args.prompt ? 0 : item];
  const Head& head = cache.heads[blockIdx.x];
  const int64_t position = args.prompt           ? cache.position + item * kObserveEvery
                           : cache.position >= 0 ? cache.position
                                                 : head.seen->newest;
  const int64_t distance = cache.mean / 2;
  if (position % kObserveEvery != 0 || position < distance || position >= cache.end) return;

  const int32_t first = static_cast<int32_t>(blockIdx.z) * args.rows_at_once;
  const int32_t rows = min(args.rows_at_once, (args.prompt ? 1 : args.tokens) * args.group - first);
  const int64_t token = args.prompt ? position - args.first_position : 0;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < rows * args.key_dim; i += kThreads) {
    const int32_t row = first + i / args.key_dim;
    const int64_t at = cache.row * args.q_cache_stride + (token + row / args.group) * args.q.row_stride +
                       (blockIdx.x * args.group + row % args.group) * args.q.head_stride + i % args.key_dim;
    q[i] = LoadAs(args.q.data, args.q.dtype, at) * args.scale;
  }
  __syncthreads();
  Watcher<T> watcher{args, q, rows, {}};
  watcher.TakeAll(head, position - distance, args.prompt ? token + 1 : 0);
  for (int i = 0; i < kRowsOfLane; ++i) {
    float* state = states[watcher.lane + kLanes * i][threadIdx.x / kLanes];
    state[0] = watcher.mass[i].max;
    state[1] = watcher.mass[i].all;
    state[2] = watcher.mass[i].far;
  }
  __syncthreads();
  if (static_cast<int32_t>(threadIdx.x) < rows) {
    Mass m;
    for (int g = 0; g < kGroups; ++g)
      m.Merge(states[threadIdx.x][g][0], states[threadIdx.x][g][1], states[threadIdx.x][g][2]);
    share[threadIdx.x] = static_cast<double>(m.far) / static_cast<double>(m.all);
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  unsigned long long far = 0;
  for (int32_t r = 0; r < rows; ++r)
    if (share[r] > 0) {  // not NaN
      const auto x = static_cast<unsigned long long>(fmin(share[r], 1.0) * kFarUnit);
      if (x > far) far = x;
    }
  atomicAdd(&head.seen->far, far);
  atomicAdd(&head.seen->tokens, 1ull);
}

__global__ void CopySeenKernel(const Seen* seen, int32_t heads, uint64_t* to) {
  for (int32_t h = static_cast<int32_t>(threadIdx.x); h < heads; h += static_cast<int32_t>(blockDim.x)) {
    to[2 * h] = seen[h].far;
    to[2 * h + 1] = seen[h].tokens;
  }
}

}  // namespace

void Observe(const ObserveArgs& args, cudaStream_t stream) {
  const int32_t rows = (args.prompt ? 1 : args.tokens) * args.group;
  const dim3 grid(static_cast<uint32_t>(args.kv_heads), static_cast<uint32_t>(args.items),
                  static_cast<uint32_t>(CeilDiv(rows, args.rows_at_once)));
  WithStorage(args.dtype, [&](auto type) {
    cudaLaunchAttribute early = LaunchEarly();
    const cudaLaunchConfig_t config{.gridDim = grid,
                                    .blockDim = dim3(kThreads),
                                    .dynamicSmemBytes = 0,
                                    .stream = stream,
                                    .attrs = &early,
                                    .numAttrs = args.launch_early ? 1u : 0u};
    cudaLaunchKernelEx(&config, ObserveKernel<decltype(type)>, args);
  });
}

void CopySeen(const Seen* seen, int32_t heads, uint64_t* to, cudaStream_t stream) {
  CopySeenKernel<<<1, 256, 0, stream>>>(seen, heads, to);
}

}  // namespace express::cuda
