// Causal attention of a prompt over the weighted cache and itself, for sm_80 and above: FlashAttention-2's loop (Dao,
// arXiv:2307.08691) over keys that come from two places, a far list of single rows with log weights and then a range of rows.
#include <algorithm>

#include "src/cuda/prefill.cuh"

namespace express::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
// Shared memory of one tile: rows of kDim elements of 16 bits, padded to whole 128 bytes, 16-byte pieces swizzled so that
// eight rows of one column of pieces lie in eight different banks.
template <int kDim>
struct TileLayout {
  static constexpr int kPieces = kDim / 8;
  static constexpr int kStride = (kDim + 63) / 64 * 128;  // bytes
  static __device__ __forceinline__ uint32_t At(int row, int piece) {
    return static_cast<uint32_t>(row * kStride + ((piece & ~7) | ((piece ^ row) & 7)) * 16);
  }
};

template <class T, int kKeyDim, int kValueDim, int kMTiles, int kKeys, int kWarps>
struct Flash {
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarps * kMTiles * 16;
  using KeyLayout = TileLayout<kKeyDim>;
  using ValueLayout = TileLayout<kValueDim>;
  static constexpr int kStages = 2;
  static constexpr size_t kQueryBytes = size_t{kRows} * KeyLayout::kStride;
  static constexpr size_t kStageBytes = size_t{kKeys} * (KeyLayout::kStride + ValueLayout::kStride);
  static constexpr size_t kShared = kQueryBytes + kStages * (kStageBytes + kKeys * sizeof(float));

  const PrefillArgs& args;
  const PrefillJob& job;
  const PrefillHead& head;
  uint32_t query, stages;  // shared addresses
  float* bias;             // shared (kStages, kKeys), over the softmax scale
  int32_t far_count, far_tiles;
  const char *key_rows, *value_rows;  // row 0 of the KV head
  int64_t key_bytes, value_bytes;     // from row to row
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;

  float out[kMTiles][kValueDim / 8][4];
  float max[kMTiles][2], sum[kMTiles][2];

  __device__ uint32_t KeyStage(int stage) const { return stages + static_cast<uint32_t>(stage * kStageBytes); }
  __device__ uint32_t ValueStage(int stage) const { return KeyStage(stage) + kKeys * KeyLayout::kStride; }

  __device__ void LoadQueries() const {
    for (int i = thread; i < kRows * KeyLayout::kPieces; i += kThreads) {
      const int row = i / KeyLayout::kPieces, piece = i % KeyLayout::kPieces;
      const bool valid = job.first + row < job.last;
      CopyAsync16(query + KeyLayout::At(row, piece),
                  RowAt(args.q, valid ? job.first + row : job.first, job.query_head) + piece * 16, valid);
    }
  }

  // A row is copied by kTogether threads; this thread's rows of a tile are kApart apart, which keeps its place in the swizzle.
  static constexpr int kWide = KeyLayout::kPieces > ValueLayout::kPieces ? KeyLayout::kPieces : ValueLayout::kPieces;
  static constexpr int kTogether = kWide <= 8 ? 8 : kWide <= 16 ? 16 : 32;
  static constexpr int kApart = kThreads / kTogether, kEach = kKeys / kApart;
  static_assert(kApart % 8 == 0 || kApart == 4);

  __device__ __forceinline__ void CopyRow(int i, int stage, const char* key, const char* value, bool valid) const {
    const int j = thread / kTogether + i * kApart, piece = thread % kTogether;
    if (piece < KeyLayout::kPieces) CopyAsync16(KeyStage(stage) + KeyLayout::At(j, piece), key + piece * 16, valid);
    if (piece < ValueLayout::kPieces)
      CopyAsync16(ValueStage(stage) + ValueLayout::At(j, piece), value + piece * 16, valid);
  }

  __device__ __forceinline__ void LoadFar(int tile, int stage) const {
    const int32_t* list = head.far_index + int64_t{job.block} * head.far_capacity;
    const int first = tile * kKeys + thread / kTogether;
    int32_t index[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) index[i] = first + i * kApart < far_count ? list[first + i * kApart] : 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool row = index[i] >= 0;
      const int64_t at = row ? index[i] : -1 - index[i];
      CopyRow(i, stage,
              (row ? key_rows : static_cast<const char*>(head.slab_key)) + at * (row ? key_bytes : kKeyDim * 2),
              (row ? value_rows : static_cast<const char*>(head.slab_value)) + at * (row ? value_bytes : kValueDim * 2),
              first + i * kApart < far_count);
    }
    if (thread < kKeys) {
      const int i = tile * kKeys + thread;
      bias[stage * kKeys + thread] =
          i < far_count ? head.far_bias[int64_t{job.block} * head.far_capacity + i] / args.scale : kMinusInfinity;
    }
  }

  __device__ __forceinline__ void LoadTile(int tile, int stage) const {
    if (tile < far_tiles) return LoadFar(tile, stage);
    const int64_t first = job.begin + int64_t{tile - far_tiles} * kKeys;
    const auto left = static_cast<int>(min(job.last - first, int64_t{kKeys})) - thread / kTogether;
    const int64_t row = first + thread / kTogether;
    const char *key = key_rows + row * key_bytes, *value = value_rows + row * value_bytes;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool valid = i * kApart < left;
      CopyRow(i, stage, valid ? key : key_rows, valid ? value : value_rows, valid);
      key += kApart * key_bytes;
      value += kApart * value_bytes;
    }
  }

  __device__ void Begin() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      max[m][0] = max[m][1] = kMinusInfinity;
      sum[m][0] = sum[m][1] = 0;
#pragma unroll
      for (int n = 0; n < kValueDim / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[m][n][i] = 0;
    }
  }

  __device__ __forceinline__ void Logits(int stage, float (&s)[kMTiles][kKeys / 8][4]) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) s[m][n][i] = 0;
#pragma unroll
    for (int k = 0; k < kKeyDim / 16; ++k) {
      uint32_t a[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
        LoadMatrices(a[m], query + KeyLayout::At((warp * kMTiles + m) * 16 + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        LoadMatrices(b, KeyStage(stage) + KeyLayout::At(n * 16 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          Mma<T>(s[m][2 * n], a[m], b[0], b[1]);
          Mma<T>(s[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Adds log weights, and takes out keys after the query or beyond the far list.
  __device__ __forceinline__ void Mask(int tile, int stage, float (&s)[kMTiles][kKeys / 8][4]) const {
    if (tile < far_tiles) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float b = bias[stage * kKeys + n * 8 + lane % 4 * 2 + i];
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            s[m][n][i] = b == kMinusInfinity ? b : s[m][n][i] + b;
            s[m][n][2 + i] = b == kMinusInfinity ? b : s[m][n][2 + i] + b;
          }
        }
      return;
    }
    const int64_t first_key = job.begin + int64_t{tile - far_tiles} * kKeys,
                  first_row = job.first + warp * kMTiles * 16;
    if (first_key + kKeys - 1 <= first_row) return;
    const auto away = static_cast<int>(first_row - first_key);  // key j is seen by row r if j <= r + away
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (n * 8 + lane % 4 * 2 + i % 2 > m * 16 + lane / 4 + i / 2 * 8 + away) s[m][n][i] = kMinusInfinity;
  }

  // From logits to probabilities, relative to the row's maximum so far.
  __device__ __forceinline__ void Softmax(float scale2, float (&s)[kMTiles][kKeys / 8][4]) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float top = max[m][r];
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
        top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
        const float zero = top == kMinusInfinity ? 0 : top * scale2;
        const float factor = Exp2(max[m][r] * scale2 - zero);
        max[m][r] = top;
        float total = 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float& x = s[m][n][2 * r + i];
            x = Exp2(fmaf(x, scale2, -zero));
            total += x;
          }
        sum[m][r] = sum[m][r] * factor + total;
#pragma unroll
        for (int n = 0; n < kValueDim / 8; ++n) {
          out[m][n][2 * r] *= factor;
          out[m][n][2 * r + 1] *= factor;
        }
      }
  }

  __device__ __forceinline__ void Accumulate(int stage, const float (&s)[kMTiles][kKeys / 8][4]) {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k) {
      uint32_t p[kMTiles][4];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          p[m][i] = Pack<T>(s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]);
#pragma unroll
      for (int n = 0; n < kValueDim / 16; ++n) {
        uint32_t b[4];
        LoadMatricesTransposed(b, ValueStage(stage) + ValueLayout::At(k * 16 + lane % 16, 2 * n + lane / 16));
#pragma unroll
        for (int m = 0; m < kMTiles; ++m) {
          Mma<T>(out[m][2 * n], p[m], b[0], b[1]);
          Mma<T>(out[m][2 * n + 1], p[m], b[2], b[3]);
        }
      }
    }
  }

  __device__ void Store() const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float total = sum[m][r];
        total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
        total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
        const int64_t row = job.first + (warp * kMTiles + m) * 16 + r * 8 + lane / 4;
        if (row >= job.last) continue;
        const float inverse = 1.0f / total;
        auto* to = reinterpret_cast<uint32_t*>(const_cast<char*>(RowAt(args.out, row, job.query_head)));
#pragma unroll
        for (int n = 0; n < kValueDim / 8; ++n)
          to[n * 4 + lane % 4] = Pack<T>(out[m][n][2 * r] * inverse, out[m][n][2 * r + 1] * inverse);
        if (args.lse != nullptr && lane % 4 == 0)
          args.lse[row * args.lse_row_stride + job.query_head * args.lse_head_stride] =
              max[m][r] * args.scale + logf(total);
      }
  }

  __device__ void Run() {
    const auto tiles = static_cast<int>(far_tiles + CeilDiv(job.last - job.begin, kKeys));
    Begin();
    LoadQueries();
    LoadTile(0, 0);
    CopyAsyncCommit();
    for (int tile = 0; tile < tiles; ++tile) {
      const int stage = tile % kStages;
      CopyAsyncWait<0>();
      __syncthreads();
      if (tile + 1 < tiles) LoadTile(tile + 1, 1 - stage);
      CopyAsyncCommit();
      float s[kMTiles][kKeys / 8][4];
      Logits(stage, s);
      Mask(tile, stage, s);
      Softmax(args.scale * kLog2E, s);
      Accumulate(stage, s);
    }
    Store();
  }
};

template <class T, int kKeyDim, int kValueDim, int kMTiles, int kKeys, int kWarps>
__global__ __launch_bounds__(kWarps* kWarp, kMTiles* kWarps == 8
                                                ? 2
                                                : 1) void PrefillKernel(const __grid_constant__ PrefillArgs args) {
  using F = Flash<T, kKeyDim, kValueDim, kMTiles, kKeys, kWarps>;
  extern __shared__ __align__(128) char shared[];
  PrefillJob job;
  if (!FindJob(args, F::kRows, static_cast<int32_t>(blockIdx.y), static_cast<int32_t>(blockIdx.x), job)) return;
  const PrefillHead head = HeadOf(args, job.kv_head);
  const int32_t far_count = FarCount(head, job.block);
  const uint32_t base = SharedAddress(shared);
  F flash{args,
          job,
          head,
          base,
          base + static_cast<uint32_t>(F::kQueryBytes),
          reinterpret_cast<float*>(shared + F::kQueryBytes + F::kStages * F::kStageBytes),
          far_count,
          static_cast<int32_t>(CeilDiv(far_count, kKeys)),
          RowAt(args.k, 0, job.kv_head),
          RowAt(args.v, 0, job.kv_head),
          args.k.row_stride * 2,
          args.v.row_stride * 2};
  flash.Run();
}

// ---- f32: one block per query, a key of a warp at a time, on CUDA cores ----

constexpr int kMostDim = 256;
constexpr int kEach = kMostDim / kWarp;

__global__ __launch_bounds__(kThreads) void PrefillPlainKernel(const __grid_constant__ PrefillArgs args) {
  __shared__ float states[kWarps][2];
  __shared__ float outs[kWarps][kMostDim];
  PrefillJob job;
  if (!FindJob(args, 1, static_cast<int32_t>(blockIdx.y), static_cast<int32_t>(blockIdx.x), job)) return;
  const PrefillHead head = HeadOf(args, job.kv_head);
  const int warp = static_cast<int>(threadIdx.x / kWarp), lane = static_cast<int>(threadIdx.x % kWarp);
  const int32_t far_count = FarCount(head, job.block);
  const auto* query = reinterpret_cast<const float*>(RowAt(args.q, job.first, job.query_head));
  float q[kEach], out[kEach] = {}, max = kMinusInfinity, sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) q[i] = lane + kWarp * i < args.key_dim ? query[lane + kWarp * i] : 0;
  const int64_t keys = far_count + job.last - job.begin;
  for (int64_t j = warp; j < keys; j += kWarps) {
    const int64_t row =
        j < far_count ? head.far_index[int64_t{job.block} * head.far_capacity + j] : job.begin + j - far_count;
    const float bias = j < far_count ? head.far_bias[int64_t{job.block} * head.far_capacity + j] : 0;
    const float* key = row < 0 ? static_cast<const float*>(head.slab_key) + (-1 - row) * args.key_dim
                               : reinterpret_cast<const float*>(RowAt(args.k, row, job.kv_head));
    const float* value = row < 0 ? static_cast<const float*>(head.slab_value) + (-1 - row) * args.value_dim
                                 : reinterpret_cast<const float*>(RowAt(args.v, row, job.kv_head));
    float dot = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      if (lane + kWarp * i < args.key_dim) dot = fmaf(q[i], key[lane + kWarp * i], dot);
    dot = WarpReduce(dot, [](float a, float b) { return a + b; });
    const float logit = (dot * args.scale + bias) * kLog2E;
    const float top = fmaxf(max, logit), factor = Exp2(max - top), p = Exp2(logit - top);
    max = top;
    sum = sum * factor + p;
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      out[i] = out[i] * factor + (lane + kWarp * i < args.value_dim ? p * value[lane + kWarp * i] : 0);
  }
  if (lane == 0) states[warp][0] = max, states[warp][1] = sum;
  for (int i = 0; i < kEach; ++i) outs[warp][lane + kWarp * i] = out[i];
  __syncthreads();
  float top = kMinusInfinity, total = 0;
  for (int w = 0; w < kWarps; ++w) top = fmaxf(top, states[w][0]);
  for (int w = 0; w < kWarps; ++w) total += states[w][1] * Exp2(states[w][0] - top);
  auto* to = reinterpret_cast<float*>(const_cast<char*>(RowAt(args.out, job.first, job.query_head)));
  for (int d = static_cast<int>(threadIdx.x); d < args.value_dim; d += kThreads) {
    float x = 0;
    for (int w = 0; w < kWarps; ++w) x += outs[w][d] * Exp2(states[w][0] - top);
    to[d] = x / total;
  }
  if (args.lse != nullptr && threadIdx.x == 0)
    args.lse[job.first * args.lse_row_stride + job.query_head * args.lse_head_stride] = top / kLog2E + logf(total);
}

// ---- launchers ----

template <class T, int kKeyDim, int kValueDim>
void Run(const PrefillArgs& args, cudaStream_t stream) {
  constexpr bool kWide = kKeyDim > 128 || kValueDim > 128;
  constexpr int kMTiles = kWide ? 1 : 2, kKeys = kWide ? 32 : 64, kWarps = 4;
  using F = Flash<T, kKeyDim, kValueDim, kMTiles, kKeys, kWarps>;
  auto* kernel = PrefillKernel<T, kKeyDim, kValueDim, kMTiles, kKeys, kWarps>;
  if (F::kShared > 48 * 1024)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(F::kShared));
  const dim3 grid(static_cast<uint32_t>(PrefillJobs(args, F::kRows)), static_cast<uint32_t>(args.kv_heads));
  kernel<<<grid, F::kThreads, F::kShared, stream>>>(args);
}

template <class T>
void RunDims(const PrefillArgs& args, cudaStream_t stream) {
  switch (args.key_dim) {
    case 64:
      return Run<T, 64, 64>(args, stream);
    case 80:
      return Run<T, 80, 80>(args, stream);
    case 96:
      return Run<T, 96, 96>(args, stream);
    case 128:
      return Run<T, 128, 128>(args, stream);
    case 192:
      if (args.value_dim == 128) return Run<T, 192, 128>(args, stream);
      return Run<T, 192, 192>(args, stream);
    default:
      return Run<T, 256, 256>(args, stream);
  }
}

}  // namespace

bool PrefillSupported(int32_t key_dim, int32_t value_dim) { return AttendSupported(key_dim, value_dim); }

void Prefill(const PrefillArgs& args, int32_t compute_capability, int32_t multiprocessors, cudaStream_t stream) {
#ifdef EXPRESS_CUDA_SM90A
  if (compute_capability == 90 && PrefillHopper(args, multiprocessors, stream)) return;
#endif
  if (args.dtype == DType::kF16) return RunDims<Half>(args, stream);
  if (args.dtype == DType::kBF16) return RunDims<BFloat16>(args, stream);
  const dim3 grid(static_cast<uint32_t>(PrefillJobs(args, 1)), static_cast<uint32_t>(args.kv_heads));
  PrefillPlainKernel<<<grid, kThreads, 0, stream>>>(args);
}

}  // namespace express::cuda
