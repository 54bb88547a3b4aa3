// Weighted decode attention, split over keys.
//
// The slab is read once, from global memory straight into tensor-core fragments: the order of a contraction does not
// matter, so thread (g, t) = (lane / 4, lane % 4) takes 16-byte pieces t, t + 4, .. of keys g and g + 8 as the A of
// S^T = K Q^T, and of values the piece of dims [8g, 8g + 8) of keys 2t, 2t + 1, 2t + 8, 2t + 9 as the A of O^T = V^T P^T,
// where row g of row tile j stands for dim 8g + 2j and row g + 8 for the one after it. Queries are the 8 columns; a
// transposition of P between the two products (movmatrix) is all that ever moves between threads.
//
// A warp takes 16 keys at a time with all their bytes in flight. Warps of a block merge through shared memory, blocks
// (splits) through Head::partial: the last one to finish merges them in order, so equal calls give equal bits.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTile = 16;    // keys of a warp at a time
constexpr int kQueries = 8;  // columns of a product
constexpr int kSplitUnit = kTile * kWarps;
// Blocks of a multiprocessor, and whether the registers of so many take two tiles per warp.
constexpr int kResident = 2;
template <int kKeyDim, int kTiles>
inline constexpr bool kAhead = kKeyDim <= 128 && kTiles == 1;
constexpr int64_t kMostSplits = 64;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Logits beyond this count as this, as on the CPU: differences must not overflow.
constexpr float kLargestLogit = 1e38f;

struct Launch {
  AttendArgs args;
  int32_t first_row, rows;  // of tokens * group
  int32_t split;            // keys of one block
};

__device__ __forceinline__ uint4 LoadStream(const void* from) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(from));
  return x;
}

__device__ __forceinline__ uint32_t TransposeMatrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Elements [at, at + 8) of a query row, in the slab's type.
template <class T, class From>
__device__ uint4 ConvertQuery(const From* from) {
  float x[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = ToFloat(from[i]);
  return make_uint4(Pack<T>(x[0], x[1]), Pack<T>(x[2], x[3]), Pack<T>(x[4], x[5]), Pack<T>(x[6], x[7]));
}
template <class T>
__device__ uint4 LoadQuery(const void* row, DType dtype, int32_t at) {
  if (dtype == DType::kF32) {
    const auto* from = reinterpret_cast<const float4*>(static_cast<const float*>(row) + at);
    const float4 pieces[2] = {from[0], from[1]};
    return ConvertQuery<T>(reinterpret_cast<const float*>(pieces));
  }
  const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const Half*>(row) + at);
  if (dtype == (std::is_same_v<T, Half> ? DType::kF16 : DType::kBF16)) return raw;
  if (dtype == DType::kF16) return ConvertQuery<T>(reinterpret_cast<const Half*>(&raw));
  return ConvertQuery<T>(reinterpret_cast<const BFloat16*>(&raw));
}

__device__ const void* QueryRow(const Launch& launch, int32_t row, int64_t cache, int32_t kv_head) {
  const AttendArgs& a = launch.args;
  const int64_t r = launch.first_row + row;
  const int64_t at = cache * a.q_cache_stride + r / a.group * a.q.row_stride +
                     (int64_t{kv_head} * a.group + r % a.group) * a.q.head_stride;
  return static_cast<const char*>(a.q.data) + at * SizeOf(a.q.dtype);
}

__device__ void StoreOut(const Launch& launch, int32_t row, int64_t cache, int32_t kv_head, int32_t dim, float x) {
  const AttendArgs& a = launch.args;
  const int64_t r = launch.first_row + row;
  const int64_t at = cache * a.out_cache_stride + r / a.group * a.out.row_stride +
                     (int64_t{kv_head} * a.group + r % a.group) * a.out.head_stride + dim;
  if (a.out.dtype == DType::kF32)
    static_cast<float*>(a.out.data)[at] = x;
  else if (a.out.dtype == DType::kF16)
    FromFloat(x, static_cast<Half*>(a.out.data) + at);
  else
    FromFloat(x, static_cast<BFloat16*>(a.out.data) + at);
}

__device__ void StoreLse(const Launch& launch, int32_t row, int64_t cache, int32_t kv_head, float lse) {
  const AttendArgs& a = launch.args;
  if (a.lse == nullptr) return;
  const int64_t r = launch.first_row + row;
  a.lse[cache * a.lse_cache_stride + r / a.group * a.lse_row_stride +
        (int64_t{kv_head} * a.group + r % a.group) * a.lse_head_stride] = lse;
}

// Softmax states of `count` parts of a row, merged in order: weight of part i is exp2(max_i - max) / sum. state: max and sum
// of part i at state[i * stride] and one behind. Everything in base 2.
struct Merged {
  float max = kMinusInfinity, sum = 0;
  __device__ void Add(float m, float s) {
    if (m == kMinusInfinity) return;
    const float top = fmaxf(max, m);
    sum = sum * Exp2(max - top) + s * Exp2(m - top);
    max = top;
  }
  __device__ float Inverse() const { return sum > 0 ? 1.0f / sum : 0.0f; }
  __device__ float Lse() const { return sum > 0 ? (max + log2f(sum)) / kLog2E : kMinusInfinity; }
};

// What the warps of a block have: out (warps, rows, value_dim), not normalised, and state (warps, rows, 2) in shared memory.
// Writes the block's partial result, or, with one split, the result; the last block merges all splits, with (rows, splits)
// floats of scratch, which may be the memory of `out`.
__device__ void Finish(const Launch& launch, const Head& head, const float* out, const float* state, int32_t splits,
                       float* scratch) {
  const int32_t rows = launch.rows, dim = launch.args.value_dim, thread = static_cast<int32_t>(threadIdx.x);
  const auto kv_head = static_cast<int32_t>(blockIdx.y);
  const int64_t cache = blockIdx.z;
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
      StoreOut(launch, row, cache, kv_head, i - row * dim, sum * merged[row].Inverse());
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
    StoreOut(launch, row, cache, kv_head, i - row * dim, sum);
  }
  if (thread == 0) *head.ticket = 0;
}

// ---- 16-bit slabs ----

// One warp's share: kTiles column tiles of 8 queries.
template <class T, int kKeyDim, int kValueDim, int kTiles>
struct WarpState {
  static constexpr int kPieces = (kKeyDim / 8 + 3) / 4;  // 16-byte pieces of a key per thread
  static constexpr int kGroups = (kValueDim + 63) / 64;  // of 64 dims of a value
  uint4 q[kTiles][kPieces];                              // of query g
  float out[kTiles][kGroups][4][4];                      // O^T: row tile j of the group
  float max[kTiles][2], sum[kTiles][2];                  // of queries 2t, 2t + 1; base 2
  int g, t;

  static __device__ bool HasPiece(int piece) { return kKeyDim % 32 == 0 || piece < kKeyDim / 8; }
  __device__ bool HasGroup(int group) const { return kValueDim % 64 == 0 || 64 * group + 8 * g < kValueDim; }

  __device__ void Begin(const Launch& launch, int64_t cache, int32_t kv_head) {
    g = static_cast<int>(threadIdx.x % kWarp / 4), t = static_cast<int>(threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int row = n * kQueries + g;
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        q[n][i] = row < launch.rows && HasPiece(t + 4 * i)
                      ? LoadQuery<T>(QueryRow(launch, row, cache, kv_head), launch.args.q.dtype, 8 * (t + 4 * i))
                      : make_uint4(0, 0, 0, 0);
      max[n][0] = max[n][1] = kMinusInfinity;
      sum[n][0] = sum[n][1] = 0;
#pragma unroll
      for (int v = 0; v < kGroups; ++v)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int x = 0; x < 4; ++x) out[n][v][j][x] = 0;
    }
  }

  // The bytes of 16 keys on their way.
  struct Flight {
    float weight[2];  // log weights of keys g, g + 8
    uint4 k[2][kPieces], v[4][kGroups];
  };

  // 16 keys from `first` on; own_weight: log weight of key first + lane for lanes below 16, -inf for a free slot.
  __device__ __forceinline__ void Load(const T* key, const T* value, int64_t first, float own_weight,
                                       Flight& flight) const {
    auto& [weight, k, v] = flight;
    float value_weight[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) weight[i] = __shfl_sync(0xFFFFFFFFu, own_weight, g + 8 * i);
#pragma unroll
    for (int i = 0; i < 4; ++i) value_weight[i] = __shfl_sync(0xFFFFFFFFu, own_weight, 2 * t + i % 2 + i / 2 * 8);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* row = key + (first + g + 8 * i) * kKeyDim;
#pragma unroll
      for (int p = 0; p < kPieces; ++p)
        k[i][p] = weight[i] != kMinusInfinity && HasPiece(t + 4 * p) ? LoadStream(row + 8 * (t + 4 * p))
                                                                     : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const T* row = value + (first + 2 * t + i % 2 + i / 2 * 8) * kValueDim;
#pragma unroll
      for (int p = 0; p < kGroups; ++p)
        v[i][p] = value_weight[i] != kMinusInfinity && HasGroup(p) ? LoadStream(row + 64 * p + 8 * g)
                                                                   : make_uint4(0, 0, 0, 0);
    }
  }

  __device__ __forceinline__ void Compute(const Flight& flight, float scale, float exponent) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) Column(n, flight.k, flight.v, flight.weight, scale, exponent);
  }

  __device__ __forceinline__ void Column(int n, const uint4 (&k)[2][kPieces], const uint4 (&v)[4][kGroups],
                                         const float (&weight)[2], float scale, float exponent) {
    float s[4] = {0, 0, 0, 0};  // keys g, g, g + 8, g + 8 of queries 2t, 2t + 1, 2t, 2t + 1
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const uint32_t a0[4] = {k[0][p].x, k[1][p].x, k[0][p].y, k[1][p].y};
      const uint32_t a1[4] = {k[0][p].z, k[1][p].z, k[0][p].w, k[1][p].w};
      Mma<T>(s, a0, q[n][p].x, q[n][p].y);
      Mma<T>(s, a1, q[n][p].z, q[n][p].w);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      s[i] = weight[i / 2] == kMinusInfinity ? kMinusInfinity
                                             : fminf(fmaxf(s[i] * scale, -kLargestLogit), kLargestLogit) * kLog2E +
                                                   exponent * weight[i / 2] * kLog2E;
    float top[2] = {fmaxf(s[0], s[2]), fmaxf(s[1], s[3])};
#pragma unroll
    for (int offset = 4; offset < kWarp; offset *= 2)
#pragma unroll
      for (int i = 0; i < 2; ++i) top[i] = fmaxf(top[i], __shfl_xor_sync(0xFFFFFFFFu, top[i], offset));
    if (__any_sync(0xFFFFFFFFu, top[0] > max[n][0] || top[1] > max[n][1])) Rescale(n, top);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = max[n][i % 2] == kMinusInfinity ? 0 : Exp2(s[i] - max[n][i % 2]);
      sum[n][i % 2] += s[i];
    }
    const uint32_t p0 = TransposeMatrix(Pack<T>(s[0], s[1])), p1 = TransposeMatrix(Pack<T>(s[2], s[3]));
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint32_t* rows[4] = {&v[0][i].x, &v[1][i].x, &v[2][i].x, &v[3][i].x};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t a[4] = {__byte_perm(rows[0][j], rows[1][j], 0x5410), __byte_perm(rows[0][j], rows[1][j], 0x7632),
                               __byte_perm(rows[2][j], rows[3][j], 0x5410),
                               __byte_perm(rows[2][j], rows[3][j], 0x7632)};
        Mma<T>(out[n][i][j], a, p0, p1);
      }
    }
  }

  __device__ void Rescale(int n, const float (&top)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float next = fmaxf(max[n][i], top[i]);
      const float factor = max[n][i] == kMinusInfinity ? 0 : Exp2(max[n][i] - next);
      max[n][i] = next;
      sum[n][i] *= factor;
#pragma unroll
      for (int v = 0; v < kGroups; ++v)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          out[n][v][j][i] *= factor;
          out[n][v][j][2 + i] *= factor;
        }
    }
  }

  // Into this warp's part of shared memory: to (rows, kValueDim), state (rows, 2).
  __device__ void Store(int32_t rows, float* to, float* state) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float total = sum[n][i];
        for (int offset = 4; offset < kWarp; offset *= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, offset);
        const int row = n * kQueries + 2 * t + i;
        if (row >= rows) continue;
        if (g == 0) {
          state[2 * row] = max[n][i];
          state[2 * row + 1] = total;
        }
#pragma unroll
        for (int v = 0; v < kGroups; ++v)
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (HasGroup(v)) {
              to[row * kValueDim + 64 * v + 8 * g + 2 * j] = out[n][v][j][i];
              to[row * kValueDim + 64 * v + 8 * g + 2 * j + 1] = out[n][v][j][2 + i];
            }
      }
  }
};

// grid: (splits, KV heads, caches)
template <class T, int kKeyDim, int kValueDim, int kTiles>
__global__ __launch_bounds__(kThreads, kAhead<kKeyDim, kTiles>
                                           ? kResident
                                           : 1) void AttendKernel(const __grid_constant__ Launch launch) {
  extern __shared__ __align__(16) float shared[];  // (warps, rows, value_dim), (warps, rows, 2)
  const AttendArgs& args = launch.args;
  const Head& head = args.heads[blockIdx.z][blockIdx.y];
  const int32_t splits = max(1, static_cast<int32_t>(CeilDiv(head.capacity, launch.split)));
  if (static_cast<int32_t>(blockIdx.x) >= splits) return;
  const int warp = static_cast<int>(threadIdx.x / kWarp), lane = static_cast<int>(threadIdx.x % kWarp);
  const int64_t end = min(static_cast<int64_t>(head.capacity), (int64_t{blockIdx.x} + 1) * launch.split);
  WarpState<T, kKeyDim, kValueDim, kTiles> state;
  state.Begin(launch, blockIdx.z, static_cast<int32_t>(blockIdx.y));
  const auto weight_at = [&](int64_t first) {
    return lane < kTile && first + lane < end ? head.log_weight[first + lane] : kMinusInfinity;
  };
  int64_t first = int64_t{blockIdx.x} * launch.split + warp * kTile;
  float weight = weight_at(first), next = weight_at(first + kSplitUnit);
  using State = WarpState<T, kKeyDim, kValueDim, kTiles>;
  // The next 16 keys are on their way while these are computed; beyond the end nothing is read.
  const auto load = [&](typename State::Flight& flight) {
    state.Load(static_cast<const T*>(head.key), static_cast<const T*>(head.value), first, weight, flight);
    first += kSplitUnit;
    weight = next;
    next = weight_at(first + kSplitUnit);
  };
  if constexpr (kAhead<kKeyDim, kTiles>) {
    typename State::Flight even, odd;
    load(even);
    while (first - kSplitUnit < end) {
      load(odd);
      state.Compute(even, args.scale, args.exponent);
      if (first - kSplitUnit >= end) break;
      load(even);
      state.Compute(odd, args.scale, args.exponent);
    }
  } else {
    typename State::Flight flight;
    while (first < end) {
      load(flight);
      state.Compute(flight, args.scale, args.exponent);
    }
  }
  float* states = shared + kWarps * launch.rows * kValueDim;
  state.Store(launch.rows, shared + warp * launch.rows * kValueDim, states + warp * launch.rows * 2);
  __syncthreads();
  Finish(launch, head, shared, states, splits, shared);
}

// ---- f32 slabs: one key of a warp at a time, on CUDA cores ----

constexpr int kPlainRows = 4;
constexpr int kMostDim = 256;

__global__ __launch_bounds__(kThreads) void AttendPlainKernel(const __grid_constant__ Launch launch) {
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
    const void* row = QueryRow(launch, min(r, launch.rows - 1), blockIdx.z, static_cast<int32_t>(blockIdx.y));
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

// ---- launchers ----

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

template <class Kernel>
void Run(Kernel* kernel, const Launch& launch, cudaStream_t stream) {
  const AttendArgs& args = launch.args;
  const dim3 grid(static_cast<uint32_t>(std::max<int64_t>(1, CeilDiv(args.max_capacity, launch.split))),
                  static_cast<uint32_t>(args.kv_heads), static_cast<uint32_t>(args.caches));
  const int32_t splits = static_cast<int32_t>(grid.x);
  const size_t shared =
      static_cast<size_t>(launch.rows * std::max(kWarps * (args.value_dim + 2), splits)) * sizeof(float);
  if (shared > 44 * 1024)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  kernel<<<grid, kThreads, shared, stream>>>(launch);
}

template <class T, int kKeyDim, int kValueDim>
void RunTiles(const Launch& launch, cudaStream_t stream) {
  if (launch.rows <= kQueries)
    Run(AttendKernel<T, kKeyDim, kValueDim, 1>, launch, stream);
  else
    Run(AttendKernel<T, kKeyDim, kValueDim, 2>, launch, stream);
}

template <class T>
void RunDims(const Launch& launch, cudaStream_t stream) {
  switch (launch.args.key_dim) {
    case 64:
      return RunTiles<T, 64, 64>(launch, stream);
    case 80:
      return RunTiles<T, 80, 80>(launch, stream);
    case 96:
      return RunTiles<T, 96, 96>(launch, stream);
    case 128:
      return RunTiles<T, 128, 128>(launch, stream);
    case 192:
      if (launch.args.value_dim == 128) return RunTiles<T, 192, 128>(launch, stream);
      return RunTiles<T, 192, 192>(launch, stream);
    default:
      return RunTiles<T, 256, 256>(launch, stream);
  }
}

}  // namespace

bool AttendSupported(int32_t key_dim, int32_t value_dim) {
  const bool known =
      key_dim == 64 || key_dim == 80 || key_dim == 96 || key_dim == 128 || key_dim == 192 || key_dim == 256;
  return known && (key_dim == value_dim || (key_dim == 192 && value_dim == 128));
}

int32_t AttendMaxSplits(int32_t capacity) {
  return static_cast<int32_t>(std::min(CeilDiv(capacity, kSplitUnit), kMostSplits));
}

void Attend(const AttendArgs& args, int32_t multiprocessors, cudaStream_t stream) {
  Launch launch{args, 0, 0, SplitLength(args, multiprocessors)};
  const int32_t rows = args.tokens * args.group;
  const int32_t at_once = args.dtype == DType::kF32 ? kPlainRows : kPartialRows;
  for (launch.first_row = 0; launch.first_row < rows; launch.first_row += at_once) {
    launch.rows = std::min(at_once, rows - launch.first_row);
    if (args.dtype == DType::kF32)
      Run(AttendPlainKernel, launch, stream);
    else if (args.dtype == DType::kF16)
      RunDims<Half>(launch, stream);
    else
      RunDims<BFloat16>(launch, stream);
  }
}

}  // namespace express::cuda
