// Kernel halving: what a list takes of shared memory, rows of keys and values as tensor cores take them, and products of tiles.
#ifndef EXPRESS_SRC_CUDA_HALVE_TILES_CUH_
#define EXPRESS_SRC_CUDA_HALVE_TILES_CUH_

#include <algorithm>
#include <type_traits>

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {

namespace halve {

constexpr int kPairsOfTile = 8;  // pairs of a tile: 16 rows of a product's A, two times 8 columns of its B
constexpr int kMostTiles = 4;    // of a block
constexpr int kMostPairs = kMostTiles * kPairsOfTile;
constexpr int kParts = 8;                // parts of the sum over earlier tiles
constexpr int kChunk = 32;               // dimensions of two products
constexpr int kElements = 8;             // of them in one lane
constexpr int64_t kSharedBytes = 44800;  // at most: leaves a kernel 4 KiB of the 48 that need no attribute
constexpr int kSharedPairs = 64;         // lists of no more pairs keep their state in shared memory
constexpr int kRowLanes = 8;             // lanes that read a pair
constexpr float kPlainExponent = 32;     // norms beyond this (as exponents of 2) move the origin
constexpr float kLargestKey = 1e15f, kLargestValue = 1e15f, kSmallestValue = 1e-12f;  // beyond: scaled by a power of 2
constexpr float kLargestExponent = 1e36f;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// First what PairStats holds on the CPU, with the norms of the keys; when the norms are finished, what follows "then".
struct __align__(16) Pair {
  float norm_x, norm_y;        // n_i; then c_i + the norm's share of the distance, as exponents of 2
  float centred_x, centred_y;  // N_i; then the sign (+1: x kept) and sqrt(D_aa)
  float distance;              // |k_x - k_y|^2
  float value_x, value_y, value_distance;
};

struct Adjust {        // y = (x - shift) scale, exact in the storage type
  const float* shift;  // (dim), or null: 0
  float scale;
  bool active;
};

// What lists of at most so many entries need. One tile is a warp's work, and there is nothing earlier to sum.
template <int32_t kMostCount>
struct Sizes {
  static constexpr bool kOneTile = kMostCount <= 2 * kPairsOfTile;
  static constexpr int kPairs = kOneTile ? kPairsOfTile : kSharedPairs;  // whose state is in shared memory
  static constexpr int kBlock = kOneTile ? kPairsOfTile : kMostPairs;    // pairs decided together
  static constexpr int kTriangleStride = kBlock + 1;
  static constexpr int kPartsOf = kOneTile ? 0 : kParts * kMostPairs;
  static constexpr int kOwn = kOneTile ? 0 : 2 * kMostPairs, kReduced = kOneTile ? 0 : 3 * kWarp;
};

// Shared memory, from `shared` on.
struct Layout {
  Pair* pairs;      // (Sizes::kPairs)
  float* parts;     // (kParts, kMostPairs)
  float* triangle;  // (Sizes::kBlock, Sizes::kTriangleStride): D_ab at (a, b) of the block
  float2* own;      // (kMostPairs): norms of the block's pairs
  float* reduced;   // (3, kWarp)
  float* shift;     // (key_dim)
  float* mean;      // (key_dim): of the adjusted keys
  uint4* stage;     // the block's keys, then its values
};

__host__ __device__ constexpr int32_t Chunks(int32_t dim) { return (dim + kChunk - 1) / kChunk; }
__host__ __device__ constexpr int64_t TileBytes(int32_t key_dim, int32_t value_dim, int64_t element) {
  return 2 * kPairsOfTile * kChunk * element * (Chunks(key_dim) + Chunks(value_dim));
}
__host__ __device__ constexpr int32_t PadDim(int32_t dim) { return (dim + kElements - 1) / kElements * kElements; }
template <int32_t kMostCount = INT32_MAX>
__host__ __device__ constexpr size_t FixedBytes(int32_t key_dim) {
  using Size = Sizes<kMostCount>;
  const size_t bytes = Size::kPairs * sizeof(Pair) +
                       sizeof(float) * (Size::kPartsOf + Size::kBlock * Size::kTriangleStride + Size::kOwn +
                                        Size::kReduced + 2 * static_cast<size_t>(PadDim(key_dim)));
  return (bytes + 15) / 16 * 16;
}
// Tiles of a block: as many as can be staged; 0 if none.
template <class T>
__host__ __device__ constexpr int StagedTiles(int32_t key_dim, int32_t value_dim) {
  const int64_t left = kSharedBytes - static_cast<int64_t>(FixedBytes(key_dim));
  const int64_t fit = left / TileBytes(key_dim, value_dim, sizeof(T));
  return fit >= 4 && sizeof(T) == 2 ? 4 : fit >= 2 ? 2 : fit >= 1 ? 1 : 0;
}

template <int32_t kMostCount>
__device__ inline Layout LayOut(char* shared, int32_t key_dim) {
  using Size = Sizes<kMostCount>;
  Layout s;
  s.pairs = reinterpret_cast<Pair*>(shared);
  s.parts = reinterpret_cast<float*>(s.pairs + Size::kPairs);
  s.triangle = s.parts + Size::kPartsOf;
  s.own = reinterpret_cast<float2*>(s.triangle + Size::kBlock * Size::kTriangleStride);
  s.reduced = reinterpret_cast<float*>(s.own) + Size::kOwn;
  s.shift = s.reduced + Size::kReduced;
  s.mean = s.shift + PadDim(key_dim);
  s.stage = reinterpret_cast<uint4*>(s.mean + PadDim(key_dim));
  return s;
}

// ---- eight elements of a row ----

template <class T>
struct Raw {
  uint4 part[sizeof(T) / 2];
};
// Elements [at, at + 8) of a row, zeros beyond its end.
template <class T>
__device__ __forceinline__ Raw<T> LoadRaw(const T* row, int32_t at, int32_t dim) {
  Raw<T> raw;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
    const int32_t from = at + i * static_cast<int32_t>(16 / sizeof(T));
    raw.part[i] = make_uint4(0, 0, 0, 0);
    if (from < dim) raw.part[i] = *reinterpret_cast<const uint4*>(row + from);
  }
  return raw;
}

// The numbers of a row of codes.
__device__ __forceinline__ Raw<float> LoadRaw(const CodeRow& row, int32_t at, int32_t dim) {
  Raw<float> raw{};
  if (at >= dim) return raw;
  const uint2 codes = *reinterpret_cast<const uint2*>(row.code + at);
  const auto number = [&](uint32_t word, int i) {
    return __float_as_uint(row.scale * static_cast<float>(static_cast<int8_t>(word >> (8 * i))));
  };
  raw.part[0] = make_uint4(number(codes.x, 0), number(codes.x, 1), number(codes.x, 2), number(codes.x, 3));
  raw.part[1] = make_uint4(number(codes.y, 0), number(codes.y, 1), number(codes.y, 2), number(codes.y, 3));
  return raw;
}

// Their codes, as numbers of type bf16.
__device__ __forceinline__ Raw<BFloat16> LoadCodes(const CodeRow& row, int32_t at, int32_t dim) {
  uint2 codes = make_uint2(0, 0);
  if (at < dim) codes = *reinterpret_cast<const uint2*>(row.code + at);
  return {{make_uint4(CodesToBFloat16<kFirstTwo>(codes.x), CodesToBFloat16<kLastTwo>(codes.x),
                      CodesToBFloat16<kFirstTwo>(codes.y), CodesToBFloat16<kLastTwo>(codes.y))}};
}

template <class T>
__device__ __forceinline__ void Unpack(uint32_t word, float& low, float& high) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xFFFF0000u);
  } else {
    const float2 both = __half22float2(*reinterpret_cast<const __half2*>(&word));
    low = both.x, high = both.y;
  }
}
template <class T>
__device__ __forceinline__ void ToFloats(const Raw<T>& raw, float (&x)[kElements]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      x[4 * i] = __uint_as_float(raw.part[i].x), x[4 * i + 1] = __uint_as_float(raw.part[i].y);
      x[4 * i + 2] = __uint_as_float(raw.part[i].z), x[4 * i + 3] = __uint_as_float(raw.part[i].w);
    }
  } else {
    Unpack<T>(raw.part[0].x, x[0], x[1]);
    Unpack<T>(raw.part[0].y, x[2], x[3]);
    Unpack<T>(raw.part[0].z, x[4], x[5]);
    Unpack<T>(raw.part[0].w, x[6], x[7]);
  }
}
template <class T>
__device__ __forceinline__ uint4 PackEight(const float (&x)[kElements]) {
  return make_uint4(Pack<T>(x[0], x[1]), Pack<T>(x[2], x[3]), Pack<T>(x[4], x[5]), Pack<T>(x[6], x[7]));
}
template <class T>
__device__ __forceinline__ void FromFloats(const float (&x)[kElements], Raw<T>& raw) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 2; ++i)
      raw.part[i] = make_uint4(__float_as_uint(x[4 * i]), __float_as_uint(x[4 * i + 1]), __float_as_uint(x[4 * i + 2]),
                               __float_as_uint(x[4 * i + 3]));
  } else {
    raw.part[0] = PackEight<T>(x);
  }
}
__device__ __forceinline__ void AdjustFloats(const Adjust& adjust, int32_t at, int32_t dim, float (&x)[kElements]) {
  if (!adjust.active) return;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    const float shift = adjust.shift != nullptr && at + i < dim ? adjust.shift[at + i] : 0.0f;
    x[i] = (x[i] - shift) * adjust.scale;
  }
}
template <class T>
__device__ __forceinline__ void AdjustRaw(const Adjust& adjust, int32_t at, int32_t dim, Raw<T>& raw) {
  if (!adjust.active) return;
  float x[kElements];
  ToFloats(raw, x);
  AdjustFloats(adjust, at, dim, x);
  FromFloats(x, raw);
}

// ---- products ----

// What tensor cores take: f32 as the sum of three numbers of type bf16, which is exact.
template <class T>
struct Fragment {
  uint4 part[sizeof(T) == 4 ? 3 : 1];
};
template <class T>
__device__ __forceinline__ Fragment<T> Split(const Raw<T>& raw) {
  Fragment<T> out;
  if constexpr (sizeof(T) == 4) {
    float x[kElements], rounded[kElements];
    ToFloats(raw, x);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      out.part[i] = PackEight<BFloat16>(x);
      const Raw<BFloat16> packed{{out.part[i]}};
      ToFloats(packed, rounded);
#pragma unroll
      for (int e = 0; e < kElements; ++e) x[e] -= rounded[e];
    }
  } else {
    out.part[0] = raw.part[0];
  }
  return out;
}

// One half of a chunk. Lane t holds dimensions 8 t .. 8 t + 7 of the chunk, in A as in B: products sum over a
// permutation of them.
template <class T, int kHalf>
__device__ __forceinline__ void MmaHalf(float (&c)[4], const uint4& x, const uint4& y, const uint4& b) {
  if constexpr (kHalf == 0) {
    Mma<T>(c, {x.x, y.x, x.y, y.y}, b.x, b.y);
  } else {
    Mma<T>(c, {x.z, y.z, x.w, y.w}, b.z, b.w);
  }
}

// c[i][n] += x and y of tile i times b[n], neighbours independent of each other.
template <class T, int kTiles>
__device__ __forceinline__ void MmaTiles(const Fragment<T> (&x)[kTiles], const Fragment<T> (&y)[kTiles],
                                         const Fragment<T> (&b)[2], float (*c)[2][4]) {
  using Product = std::conditional_t<sizeof(T) == 4, BFloat16, T>;
  constexpr int kTerms = sizeof(T) == 4 ? 6 : 1;
#pragma unroll
  for (int term = 0; term < kTerms; ++term) {
    // Parts (2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0): small terms first.
    const int p = kTerms == 1 ? 0 : term < 3 ? 2 - term : term == 3 ? 1 : 0;
    const int q = kTerms == 1 ? 0 : term < 3 ? term : term == 4 ? 1 : 0;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
      MmaHalf<Product, 0>(c[i / 2][i % 2], x[i / 2].part[p], y[i / 2].part[p], b[i % 2].part[q]);
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
      MmaHalf<Product, 1>(c[i / 2][i % 2], x[i / 2].part[p], y[i / 2].part[p], b[i % 2].part[q]);
  }
}

// This lane's part of two rows of B, or of x and y of A, and of kChunks chunks of them.
template <class Row>
struct TwoRows {
  Row row[2];
};
template <class Row>
__device__ __forceinline__ TwoRows<Row> Choose(bool first, const TwoRows<Row>& a, const TwoRows<Row>& b) {
  return {{first ? a.row[0] : b.row[0], first ? a.row[1] : b.row[1]}};
}
template <class T, int kChunks>
struct Group {
  static constexpr int32_t kDims = kChunks * kChunk;
  Raw<T> raw[2][kChunks];
};
template <class T, class Row, int kChunks>
__device__ __forceinline__ void LoadGroup(const TwoRows<Row>& rows, int32_t at, int32_t dim, Group<T, kChunks>& group) {
  const int32_t offset = at + static_cast<int32_t>(threadIdx.x) % 4 * kElements;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
    for (int i = 0; i < 2; ++i) group.raw[i][chunk] = LoadRaw(rows.row[i], offset + chunk * kChunk, dim);
}
template <int kChunks>
__device__ __forceinline__ void LoadCodeGroup(const TwoRows<CodeRow>& rows, int32_t at, int32_t dim,
                                              Group<BFloat16, kChunks>& group) {
  const int32_t offset = at + static_cast<int32_t>(threadIdx.x) % 4 * kElements;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
    for (int i = 0; i < 2; ++i) group.raw[i][chunk] = LoadCodes(rows.row[i], offset + chunk * kChunk, dim);
}
template <class T, int kChunks>
__device__ __forceinline__ void AdjustGroup(const Adjust& adjust, int32_t at, int32_t dim, Group<T, kChunks>& group) {
  if (!adjust.active) return;
  const int32_t offset = at + static_cast<int32_t>(threadIdx.x) % 4 * kElements;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
    for (int i = 0; i < 2; ++i) AdjustRaw(adjust, offset + chunk * kChunk, dim, group.raw[i][chunk]);
}

template <class T>
__device__ __forceinline__ int32_t StageIndex(int32_t group, int32_t chunks, int32_t chunk, int part) {
  return ((group * chunks + chunk) * static_cast<int32_t>(sizeof(T) / 2) + part) * kWarp;
}

// c[tile][n] += A of `tile` times B of columns 8 n .. 8 n + 7, dimensions of one group. A is staged: its fragments from
// the first tile on, this lane's.
template <class T, int kTiles, int kChunks>
__device__ __forceinline__ void Multiply(const uint4* staged, const Group<T, kChunks>& b, int32_t at, int32_t dim,
                                         float (&c)[kTiles][2][4]) {
  constexpr int kStep = kTiles < 2 ? 1 : 2, kSteps = kTiles / kStep;  // tiles of a step, steps of a chunk
  const int32_t chunks = Chunks(dim), first = at / kChunk;
  const auto load = [&](int step, Raw<T>(&raw)[2 * kStep]) {
    // Past the end of the dimensions the last chunk is read once more, and not used.
    const int32_t chunk = min(first + step / kSteps, chunks - 1);
#pragma unroll
    for (int i = 0; i < 2 * kStep; ++i)
#pragma unroll
      for (int part = 0; part < static_cast<int>(sizeof(T) / 2); ++part)
        raw[i].part[part] = staged[StageIndex<T>(2 * kStep * (step % kSteps) + i, chunks, chunk, part)];
  };
  Raw<T> next[2 * kStep];
  load(0, next);
#pragma unroll
  for (int step = 0; step < kChunks * kSteps; ++step) {
    const int chunk = step / kSteps;
    if (first + chunk >= chunks) break;
    Fragment<T> x[kStep], y[kStep];
#pragma unroll
    for (int i = 0; i < kStep; ++i) x[i] = Split(next[2 * i]), y[i] = Split(next[2 * i + 1]);
    if (step + 1 < kChunks * kSteps) load(step + 1, next);
    const Fragment<T> columns[2] = {Split(b.raw[0][chunk]), Split(b.raw[1][chunk])};
    MmaTiles<T, kStep>(x, y, columns, c + step % kSteps * kStep);
  }
}
// A is a group of one tile.
template <class T, int kChunks>
__device__ __forceinline__ void Multiply(const Group<T, kChunks>& a, const Group<T, kChunks>& b, int32_t at,
                                         int32_t dim, float (&c)[1][2][4]) {
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (at + chunk * kChunk >= dim) break;
    const Fragment<T> columns[2] = {Split(b.raw[0][chunk]), Split(b.raw[1][chunk])};
    const Fragment<T> x[1] = {Split(a.raw[0][chunk])}, y[1] = {Split(a.raw[1][chunk])};
    MmaTiles<T, 1>(x, y, columns, c);
  }
}

}  // namespace halve

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_HALVE_TILES_CUH_
