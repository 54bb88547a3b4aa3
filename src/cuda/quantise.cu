// Rows in 8 bits: a prompt's, before anything is chosen from it, and slabs as numbers, for the attention of a prompt.
#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

constexpr int kElements = 8;  // of a lane: rows are of up to 256

// This lane's elements of a row, zeros where it has none.
struct Piece {
  float x[kElements] = {};
};
template <class T>
__device__ __forceinline__ void LoadPiece(const Rows& rows, int64_t at, Piece& piece) {
  constexpr int kEach = 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < kElements / kEach; ++i) {
    const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const T*>(rows.data) + at + i * kEach);
#pragma unroll
    for (int j = 0; j < kEach; ++j) piece.x[i * kEach + j] = ToFloat(reinterpret_cast<const T*>(&raw)[j]);
  }
}
__device__ __forceinline__ Piece LoadRow(const Rows& rows, int64_t row, int32_t head, int32_t dim) {
  const auto first = static_cast<int32_t>(threadIdx.x % kWarp) * kElements;
  const int64_t at = row * rows.row_stride + head * rows.head_stride + first;
  Piece piece;
  if (first >= dim) return piece;
  if (rows.dtype == DType::kF16)
    LoadPiece<Half>(rows, at, piece);
  else if (rows.dtype == DType::kBF16)
    LoadPiece<BFloat16>(rows, at, piece);
  else
    LoadPiece<float>(rows, at, piece);
  return piece;
}

// One warp, one row. Returns its scale.
__device__ __forceinline__ uint16_t StoreCodes(const Piece& piece, int32_t dim, int8_t* to) {
  float largest = 0;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    largest = fmaxf(largest, fabsf(piece.x[i]));
    finite = finite && isfinite(piece.x[i]);
  }
  largest = WarpReduce(largest, [](float a, float b) { return fmaxf(a, b); });
  const uint16_t scale = ScaleFor(largest, __all_sync(0xFFFFFFFFu, finite));
  const auto first = static_cast<int32_t>(threadIdx.x % kWarp) * kElements;
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < kElements; ++i)
    words[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(CodeFor(piece.x[i], scale))) << (i % 4 * 8);
  if (first < dim) *reinterpret_cast<uint2*>(to + first) = make_uint2(words[0], words[1]);
  return scale;
}

// grid: (rows of kWarps, heads)
__global__ __launch_bounds__(kThreads) void QuantiseKernel(const __grid_constant__ QuantiseArgs args) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (row >= args.rows) return;
  const auto head = static_cast<int32_t>(blockIdx.y);
  const int64_t at = head * args.rows + row;
  const Piece k = LoadRow(args.k, row, head, args.key_dim), v = LoadRow(args.v, row, head, args.value_dim);
  const uint16_t key = StoreCodes(k, args.key_dim, args.key + at * args.key_dim),
                 value = StoreCodes(v, args.value_dim, args.value + at * args.value_dim);
  if (threadIdx.x % kWarp == 0) args.scale[at] = {key, value};
}

// grid: (slots of kWarps, heads). Free slots give what they hold, whatever that is: nobody reads it.
__global__ __launch_bounds__(kThreads) void DequantiseKernel(const __grid_constant__ DequantiseArgs args) {
  const Head& head = args.heads[blockIdx.y];
  const int64_t slot = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (slot >= head.capacity) return;
  const RowScales scale = head.scale[slot];
  const auto convert = [&](const void* slab, int32_t dim, uint16_t bits, char* to) {
    const CodeRow row{static_cast<const int8_t*>(slab) + slot * dim, FromScale(bits)};
    for (auto i = static_cast<int32_t>(threadIdx.x % kWarp); i < dim; i += kWarp)
      StoreAs(row[i], to, args.dtype, slot * dim + i);
  };
  convert(head.key, args.key_dim, scale.key, args.key + blockIdx.y * args.key_stride);
  convert(head.value, args.value_dim, scale.value, args.value + blockIdx.y * args.value_stride);
}

}  // namespace

void QuantiseRows(const QuantiseArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<uint32_t>(CeilDiv(args.rows, kWarps)), static_cast<uint32_t>(args.kv_heads));
  QuantiseKernel<<<grid, kThreads, 0, stream>>>(args);
}

void DequantiseSlabs(const DequantiseArgs& args, cudaStream_t stream) {
  const dim3 grid(static_cast<uint32_t>(CeilDiv(args.most_capacity, kWarps)), static_cast<uint32_t>(args.kv_heads));
  DequantiseKernel<<<grid, kThreads, 0, stream>>>(args);
}

}  // namespace express::cuda
