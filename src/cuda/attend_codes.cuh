// Decode attention over slabs in 8 bits: a tile of codes and scales, and its products.
//
// Codes go to tensor cores as bf16, which they are exactly: in registers, so that half the bytes of 16 bits are all that is read.
// The scale of a key is a factor of its logits, and that of a value one of its column of P^T. ldmatrix moves pairs of codes:
// thread (g, t) = (lane / 4, lane % 4) gets dims 4t .. 4t + 3 of a piece of 16 of keys g and g + 8, which as columns of K are
// 2t, 2t + 1, 2t + 8 and 2t + 9, in the queries' fragments likewise; of values, transposed, dims 2g and 2g + 1 of keys 2t,
// 2t + 1, 2t + 8 and 2t + 9, which as rows of V^T are g and g + 8.
#ifndef EXPRESS_SRC_CUDA_ATTEND_CODES_CUH_
#define EXPRESS_SRC_CUDA_ATTEND_CODES_CUH_

#include "src/cuda/attend_tile.cuh"

namespace express::cuda {

// 16 rows of kPieces pieces of 16 codes.
template <int kPieces>
struct CodeRows : TileRows<kPieces> {
  static __device__ __forceinline__ void Copy(uint32_t to, const void* rows, int valid) {
    using Base = TileRows<kPieces>;
    Base::Copy(to, rows, valid);
    constexpr int kRest = kTile * kPieces % kWarp, kFirst = kTile * kPieces - kRest;
    if constexpr (kRest > 0) {  // that no whole warp copies
      const int at = kFirst + static_cast<int>(threadIdx.x % kWarp);
      if (valid == kTile && at < kTile * kPieces)
        CopyAsync16(to + Base::Place(at / kPieces, at % kPieces), static_cast<const char*>(rows) + at * 16);
    }
  }
};

// In shared memory: 16 keys, 16 values, 16 pairs of scales.
template <int kKeyDim, int kValueDim>
struct CodeTile {
  using Keys = CodeRows<kKeyDim / 16>;
  using Values = CodeRows<kValueDim / 16>;
  static constexpr int kScales = Keys::kBytes + Values::kBytes;
  static constexpr int kBytes = kScales + 128;  // tiles begin at multiples of 128
  // Begins to copy the scales of the first `valid` entries.
  static __device__ __forceinline__ void CopyScales(uint32_t to, const RowScales* scales, int valid) {
    const auto lane = static_cast<int>(threadIdx.x % kWarp);
    if (lane < valid) CopyAsync4(to + static_cast<uint32_t>(kScales + 4 * lane), scales + lane);
  }
};

// One column tile of 8 queries, which are rounded to bf16.
template <int kKeyDim, int kValueDim>
struct CodeState : WarpState<BFloat16, kKeyDim, kValueDim, 1> {
  using Base = WarpState<BFloat16, kKeyDim, kValueDim, 1>;
  using Layout = CodeTile<kKeyDim, kValueDim>;
  using Base::g;
  using Base::kRowTiles;
  using Base::kSteps;
  using Base::t;
  using typename Base::Queries;

  __device__ __forceinline__ void LoadQueries(const AttendLaunch& launch, int32_t head, Queries& to) const {
    Base::template LoadQueries<4, 2>(launch, head, to);
  }

  // As WarpState's. What free slots hold may be anything, as codes a number; their scales are not looked at.
  __device__ __forceinline__ void Compute(uint32_t tile, const float* weights, float scale, float exponent) {
    const auto lane = static_cast<int>(threadIdx.x % kWarp);
    const float weight[2] = {weights[g], weights[g + 8]};
    if (!__any_sync(0xFFFFFFFFu, weights[lane % kTile] != kMinusInfinity)) return;
    float key_scale[2], value_scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t scales;
      asm volatile("ld.shared.u32 %0, [%1];"
                   : "=r"(scales)
                   : "r"(tile + static_cast<uint32_t>(Layout::kScales + 4 * (g + 8 * i)))
                   : "memory");
      key_scale[i] = __uint_as_float(scales << 16);
      value_scale[i] = weight[i] == kMinusInfinity ? 0.0f : __uint_as_float(scales & 0xFFFF0000u);
    }
    float s[2][4] = {};  // keys g, g, g + 8, g + 8 of queries 2t, 2t + 1, 2t, 2t + 1; in two sums
    Products(tile, s);
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      x[i] = weight[i / 2] == kMinusInfinity
                 ? kMinusInfinity
                 : fminf(fmaxf((s[0][i] + s[1][i]) * (key_scale[i / 2] * scale), -kLargestLogit), kLargestLogit) +
                       exponent * weight[i / 2];
    this->Softmax(0, x);
    const uint32_t p[2] = {TransposeMatrix(Pack<BFloat16>(x[0] * value_scale[0], x[1] * value_scale[0])),
                           TransposeMatrix(Pack<BFloat16>(x[2] * value_scale[1], x[3] * value_scale[1]))};
    Accumulate(tile + Layout::Keys::kBytes, p);
  }
  // Two steps to a matrix load; an odd last one reads past the row, and leaves that.
  __device__ __forceinline__ void Products(uint32_t keys, float (&s)[2][4]) const {
    const auto lane = static_cast<int>(threadIdx.x % kWarp);
    const uint32_t key = keys + Layout::Keys::Place(lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < kSteps; i += 2) {
      uint32_t word[4];  // keys g and g + 8 of piece i, then of the next
      LoadMatrices(word, Layout::Keys::At(key, i / 2));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (i + j >= kSteps) break;
        const uint32_t a[4] = {CodesToBFloat16<kFirstTwo>(word[2 * j]), CodesToBFloat16<kFirstTwo>(word[2 * j + 1]),
                               CodesToBFloat16<kLastTwo>(word[2 * j]), CodesToBFloat16<kLastTwo>(word[2 * j + 1])};
        Mma<BFloat16>(s[j], a, this->q[0][i + j][0], this->q[0][i + j][1]);
      }
    }
  }
  __device__ __forceinline__ void Accumulate(uint32_t values, const uint32_t (&p)[2]) {
    const auto lane = static_cast<int>(threadIdx.x % kWarp);
    const uint32_t value = values + Layout::Values::Place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int i = 0; i < kRowTiles; i += 2) {
      uint32_t word[4];  // pieces i and i + 1 of the first 8 keys, then of the others
      LoadMatricesTransposed(word, Layout::Values::At(value, i / 2));
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (i + j >= kRowTiles) break;
        const uint32_t a[4] = {CodesToBFloat16<kEven>(word[j]), CodesToBFloat16<kOdd>(word[j]),
                               CodesToBFloat16<kEven>(word[j + 2]), CodesToBFloat16<kOdd>(word[j + 2])};
        Mma<BFloat16>(this->out[0][i + j], a, p[0], p[1]);
      }
    }
  }

  // As WarpState's; dims 2g and 2g + 1 of a piece are in rows g and g + 8.
  template <int kPitch>
  __device__ __forceinline__ void StoreRows(int32_t first, float* to, float2* states) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float total = this->sum[0][i];
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, offset);
      const int row = 2 * t + i - first;
      if (row < 0 || row >= kMergeRows) continue;
      if (g == 0) states[row] = make_float2(this->max[0][i], total);
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j)
        *reinterpret_cast<float2*>(to + row * kPitch + 16 * j + 2 * g) =
            make_float2(this->out[0][j][i], this->out[0][j][2 + i]);
    }
  }
};

// What the kernel takes for slabs of T.
template <class T, int kKeyDim, int kValueDim, int kTiles>
struct Parts {
  using Layout = Tile<kKeyDim, kValueDim>;
  using State = WarpState<T, kKeyDim, kValueDim, kTiles>;
};
template <int kKeyDim, int kValueDim>
struct Parts<Int8, kKeyDim, kValueDim, 1> {
  using Layout = CodeTile<kKeyDim, kValueDim>;
  using State = CodeState<kKeyDim, kValueDim>;
};

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_ATTEND_CODES_CUH_
