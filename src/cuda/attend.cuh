// What the kernels of decode attention share: how a launch is described, rows of queries and results, softmax states, and
// Hopper's instructions for clusters.
#ifndef EXPRESS_SRC_CUDA_ATTEND_CUH_
#define EXPRESS_SRC_CUDA_ATTEND_CUH_

#include <limits>
#include <type_traits>

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {

inline constexpr int kTile = 16;         // keys of a warp at a time
inline constexpr int kQueries = 8;       // columns of a product
inline constexpr int kMergeRows = 4;     // rows that are merged at a time
inline constexpr int kMostWarps = 8;     // of a block
inline constexpr int kMostCluster = 16;  // blocks
inline constexpr int kMostShares = 288;
inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Logits beyond this count as this, as on the CPU: differences must not overflow.
inline constexpr float kLargestLogit = 1e38f;

// Where a share begins; it ends where the next one begins. The first head is described here, so that nothing must be read
// before its tiles are.
struct Share {
  const void* key;
  const void* value;
  const float* log_weight;
  int32_t capacity;
  int32_t head;           // cache * kv_heads + KV head
  int32_t tile;           // of the head
  int16_t split, splits;  // this share's part of the head is number `split` of so many
};

inline constexpr int32_t kShareTiles = 4;  // shares begin at multiples of so many tiles
inline constexpr int32_t kShareKeys = kShareTiles * kTile;
inline constexpr int64_t kMostSplits = 64;

struct AttendLaunch {
  AttendArgs args;
  int32_t first_row, rows;  // of tokens * group
  int32_t stages;           // of a warp's ring
  int32_t split;            // keys of one block (of the plain kernel)
  int32_t cut;              // > 0: so many shares, which the device cuts itself
  int32_t heads;            // > 0: a share is so many heads, which the device looks up itself
  Share shares[kMostShares + 1];
};

// attend_plain.cu: slabs of f32, up to so many rows at once.
inline constexpr int32_t kPlainRows = 4;
void AttendPlain(AttendLaunch& launch, int32_t multiprocessors, cudaStream_t stream);

// Element of row `row` of those at hand, in a tensor of these strides.
__device__ __forceinline__ int64_t RowOffset(const AttendLaunch& launch, int32_t row, int32_t cache, int32_t kv_head,
                                             int64_t cache_stride, int64_t row_stride, int64_t head_stride) {
  const int32_t r = launch.first_row + row, group = launch.args.group;
  return cache * cache_stride + r / group * row_stride + (kv_head * group + r % group) * head_stride;
}
__device__ __forceinline__ const void* QueryRow(const AttendLaunch& launch, int32_t row, int32_t cache,
                                                int32_t kv_head) {
  const AttendArgs& a = launch.args;
  const int64_t at = RowOffset(launch, row, cache, kv_head, a.q_cache_stride, a.q.row_stride, a.q.head_stride);
  return static_cast<const char*>(a.q.data) + at * SizeOf(a.q.dtype);
}

// Elements dim and dim + 1; rows are aligned to 16 bytes.
__device__ __forceinline__ void StoreOut(const AttendLaunch& launch, int32_t row, int32_t cache, int32_t kv_head,
                                         int32_t dim, float2 x) {
  const AttendArgs& a = launch.args;
  const int64_t at =
      RowOffset(launch, row, cache, kv_head, a.out_cache_stride, a.out.row_stride, a.out.head_stride) + dim;
  if (a.out.dtype == DType::kF32)
    *reinterpret_cast<float2*>(static_cast<float*>(a.out.data) + at) = x;
  else
    *reinterpret_cast<uint32_t*>(static_cast<Half*>(a.out.data) + at) =
        a.out.dtype == DType::kF16 ? Pack<Half>(x.x, x.y) : Pack<BFloat16>(x.x, x.y);
}

__device__ __forceinline__ void StoreLse(const AttendLaunch& launch, int32_t row, int32_t cache, int32_t kv_head,
                                         float lse) {
  const AttendArgs& a = launch.args;
  if (a.lse == nullptr) return;
  a.lse[RowOffset(launch, row, cache, kv_head, a.lse_cache_stride, a.lse_row_stride, a.lse_head_stride)] = lse;
}

// Softmax states, merged in order. Everything in base 2.
struct Merged {
  float max = kMinusInfinity, sum = 0;
  __device__ void Add(float m, float s) {
    if (m == kMinusInfinity) return;
    const float top = fmaxf(max, m);
    sum = sum * Exp2(max - top) + s * Exp2(m - top);
    max = top;
  }
  // Of part i of `parts`: states[i * stride] has max and sum.
  template <int kMost>
  __device__ __forceinline__ void AddAll(const float2* states, int stride, int parts) {
    float2 part[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) part[i] = i < parts ? states[i * stride] : make_float2(kMinusInfinity, 0);
#pragma unroll
    for (int i = 0; i < kMost; ++i) max = fmaxf(max, part[i].x);
#pragma unroll
    for (int i = 0; i < kMost; ++i) sum += part[i].y * Weight(part[i].x);
  }
  __device__ float Weight(float m) const { return m == kMinusInfinity ? 0 : Exp2(m - max); }
  __device__ float Inverse() const { return sum > 0 ? 1.0f / sum : 0.0f; }
  __device__ float Lse() const { return sum > 0 ? (max + log2f(sum)) / kLog2E : kMinusInfinity; }
};

// ---- copies, clusters and dependent launches: Hopper's where there are some ----

__device__ __forceinline__ uint32_t ClusterSize() {
  uint32_t x = 1;
  if constexpr (kHopper) asm("mov.u32 %0, %%cluster_nctaid.x;" : "=r"(x));
  return x;
}
__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t x = 0;
  if constexpr (kHopper) asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(x));
  return x;
}
__device__ __forceinline__ void ClusterArrive() {
  if constexpr (kHopper) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  if constexpr (kHopper) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// To this address of the shared memory of block `rank` of the cluster.
__device__ __forceinline__ void StoreRemote(const float2* to, uint32_t rank, float2 x) {
  if constexpr (kHopper)
    asm volatile(
        "{\n.reg .b32 a;\nmapa.shared::cluster.u32 a, %0, %1;\nst.shared::cluster.v2.f32 [a], {%2, %3};\n}" ::"r"(
            SharedAddress(to)),
        "r"(rank), "f"(x.x), "f"(x.y)
        : "memory");
}
__device__ __forceinline__ void CopyAsync4(uint32_t shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared), "l"(global) : "memory");
}
inline constexpr int kMostStages = 6;

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_ATTEND_CUH_
