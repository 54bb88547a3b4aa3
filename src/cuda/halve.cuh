// Kernel halving of one list by one thread block (DESIGN 3.1; the formula stands beside src/cpu/reference.cc).
//
// Pairs are decided in order, in blocks of up to 32. The block's D_ab against all earlier pairs b is formed on tensor
// cores tile by tile and summed with the signs already chosen at once, so no h x h matrix exists; then the block's own
// triangle of D, in shared memory, is scanned by one warp.
//
// The exponent of kappa(i, j) is, with N the squared norms of the centred keys and M the largest of them,
//   beta <k~_i, k~_j> - c_i - c_j = -beta / 2 (|k_i - k_j|^2 + (1 - gamma) ((M - N_i) + (M - N_j))),
// a sum of parts of one sign, and the distance does not depend on where the origin is. It is n_i + n_j - 2 <k_i, k_j>
// from products of stored keys, which tensor cores form exactly and sum in f32. Its absolute error is 2^-24 of the norms
// n, times a small factor: where these are large, the origin is moved. A coordinate whose values in the list have one
// sign and lie within a factor of two of each other is replaced by its difference from that of row 0: such a difference
// of two numbers of the storage type is itself one, so that nothing is rounded. Any other coordinate spreads over at
// least half its largest value, where a common mean costs nothing. (Left alone too: a mean that one outlier hides.)
//
// Lists are the same whatever the number of threads: no sum depends on it.
#ifndef EXPRESS_SRC_CUDA_HALVE_CUH_
#define EXPRESS_SRC_CUDA_HALVE_CUH_

#include <algorithm>
#include <type_traits>

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {

namespace halve {

constexpr int kPairsOfTile = 8;      // pairs of a tile: 16 rows of a product's A, two times 8 columns of its B
constexpr int kMostTiles = 4;        // of a block
constexpr int kMostPairs = kMostTiles * kPairsOfTile;
constexpr int kParts = 8;            // parts of the sum over earlier tiles
constexpr int kChunk = 32;           // dimensions of two products
constexpr int kElements = 8;         // of them in one lane
constexpr int kStageBytes = 32 * 1024;
constexpr int kSharedPairs = 64;     // lists of no more pairs keep their state in shared memory
constexpr int kRowLanes = 8;         // lanes that read a pair
constexpr int kTriangleStride = kMostPairs + 1;
constexpr float kPlainExponent = 32;  // norms beyond this (as exponents of 2) move the origin
constexpr float kLargestKey = 1e15f, kLargestValue = 1e15f, kSmallestValue = 1e-12f;  // beyond: scaled by a power of 2
constexpr float kLargestExponent = 1e36f;
constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// First what PairStats holds on the CPU, with the norms of the keys; when the norms are finished, what follows "then".
struct __align__(16) Pair {
  float norm_x, norm_y;          // n_i; then c_i + the norm's share of the distance, as exponents of 2
  float centred_x, centred_y;    // N_i; then sign (+1: x kept), sqrt(D_aa)
  float distance;                // |k_x - k_y|^2; then the draw
  float value_x, value_y, value_distance;
};

struct Adjust {  // y = (x - shift) scale, exact in the storage type
  const float* shift;  // (dim), or null: 0
  float scale;
  bool active;
};

// Shared memory, from `shared` on.
struct Layout {
  Pair* pairs;      // (kSharedPairs)
  float* parts;     // (kParts, kMostPairs)
  float* triangle;  // (kMostPairs, kTriangleStride): D_ab at (a, b) of the block
  float2* own;      // (kMostPairs): norms of the block's pairs
  float* reduced;   // (3, kWarp)
  float* shift;     // (key_dim)
  float* mean;      // (key_dim): of the adjusted keys
  uint4* stage;     // fragments of the block's keys, then values
};

constexpr int64_t Chunks(int32_t dim) { return (dim + kChunk - 1) / kChunk; }
constexpr int64_t TileBytes(int32_t key_dim, int32_t value_dim, int64_t element) {
  return 2 * kPairsOfTile * kChunk * element * (Chunks(key_dim) + Chunks(value_dim));
}
// Tiles of a block: as many as can be staged; 0 if none.
template <class T>
__host__ __device__ constexpr int StagedTiles(int32_t key_dim, int32_t value_dim) {
  const int64_t fit = kStageBytes / TileBytes(key_dim, value_dim, sizeof(T));
  return fit >= 4 && sizeof(T) == 2 ? 4 : fit >= 2 ? 2 : fit >= 1 ? 1 : 0;
}
__host__ __device__ constexpr int32_t PadDim(int32_t dim) { return (dim + kElements - 1) / kElements * kElements; }
__host__ __device__ constexpr size_t FixedBytes(int32_t key_dim) {
  return kSharedPairs * sizeof(Pair) +
         sizeof(float) * (kParts * kMostPairs + kMostPairs * kTriangleStride + 2 * kMostPairs + 3 * kWarp +
                          2 * static_cast<size_t>(PadDim(key_dim)));
}

__device__ inline Layout LayOut(char* shared, int32_t key_dim) {
  Layout s;
  s.pairs = reinterpret_cast<Pair*>(shared);
  s.parts = reinterpret_cast<float*>(s.pairs + kSharedPairs);
  s.triangle = s.parts + kParts * kMostPairs;
  s.own = reinterpret_cast<float2*>(s.triangle + kMostPairs * kTriangleStride);
  s.reduced = reinterpret_cast<float*>(s.own + kMostPairs);
  s.shift = s.reduced + 3 * kWarp;
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

template <class T>
__device__ __forceinline__ void MmaChunk(float (&c)[4], const uint4& x, const uint4& y, const uint4& b) {
  // Lane t holds dimensions 8 t .. 8 t + 7 of the chunk, in A as in B: products sum over a permutation of them.
  Mma<T>(c, {x.x, y.x, x.y, y.y}, b.x, b.y);
  Mma<T>(c, {x.z, y.z, x.w, y.w}, b.z, b.w);
}
template <class T>
__device__ __forceinline__ void MmaChunk(float (&c)[4], const Fragment<T>& x, const Fragment<T>& y,
                                         const Fragment<T>& b) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int order = 2; order >= 0; --order)  // small terms first
#pragma unroll
      for (int i = 0; i <= order; ++i) MmaChunk<BFloat16>(c, x.part[i], y.part[i], b.part[order - i]);
  } else {
    MmaChunk<T>(c, x.part[0], y.part[0], b.part[0]);
  }
}

// Where A comes from: staged fragments, or, if null, this lane's rows of one tile.
template <class T>
struct Source {
  const uint4* staged;  // of the first tile, this lane's
  const T* x;
  const T* y;
};

template <class T>
__device__ __forceinline__ int64_t StageIndex(int64_t group, int64_t chunks, int64_t chunk, int part) {
  return ((group * chunks + chunk) * static_cast<int64_t>(sizeof(T) / 2) + part) * kWarp;
}

// c[tile][n] += A of `tile` times B of columns 8 n .. 8 n + 7, whose rows in this lane begin at b[n].
template <class T, int kTiles>
__device__ __forceinline__ void Multiply(const Source<T>& a, const T* const (&b)[2], int32_t dim, const Adjust& adjust,
                                         float (&c)[kTiles][2][4]) {
  const int32_t offset = static_cast<int32_t>(threadIdx.x) % 4 * kElements;
  const auto chunks = static_cast<int32_t>(Chunks(dim));
  Raw<T> next[2] = {LoadRaw(b[0], offset, dim), LoadRaw(b[1], offset, dim)};
#pragma unroll 1
  for (int32_t chunk = 0; chunk < chunks; ++chunk) {
    const int32_t at = chunk * kChunk + offset;
    Raw<T> now[2] = {next[0], next[1]};
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      next[n] = LoadRaw(b[n], at + kChunk, dim);
      AdjustRaw(adjust, at, dim, now[n]);
    }
    const Fragment<T> columns[2] = {Split(now[0]), Split(now[1])};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      Raw<T> x, y;
      if (a.staged != nullptr) {
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) {
          x.part[i] = a.staged[StageIndex<T>(2 * tile, chunks, chunk, i)];
          y.part[i] = a.staged[StageIndex<T>(2 * tile + 1, chunks, chunk, i)];
        }
      } else {
        x = LoadRaw(a.x, at, dim), y = LoadRaw(a.y, at, dim);
        AdjustRaw(adjust, at, dim, x);
        AdjustRaw(adjust, at, dim, y);
      }
      const Fragment<T> fx = Split(x), fy = Split(y);
#pragma unroll
      for (int n = 0; n < 2; ++n) MmaChunk(c[tile][n], fx, fy, columns[n]);
    }
  }
}

// ---- one list at work; every function is called by all threads of the block ----

template <class T, int kThreads, class RowsOf>
struct List {
  static constexpr int kWarps = kThreads / kWarp;

  const RowsOf& rows;
  const int32_t count, pairs, key_dim, value_dim;
  const HalveParams& params;
  const StreamKey& stream;
  const uint64_t number;
  const Layout& s;
  Pair* const pair;  // (pairs): in shared memory or in scratch
  uint8_t* const keep;
  const bool complement;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  Adjust key_adjust{nullptr, 1, false}, value_adjust{nullptr, 1, false};
  float exponent = 0;        // beta / 2 log2 e, of adjusted keys
  float inverse_square = 1;  // 1 / b^2, of adjusted values

  __device__ float Draw(int32_t a) const {
    return UniformFromBits(DrawBits(stream, RandomPurpose::kHalve, number, static_cast<uint32_t>(a)));
  }

  // The block's maximum of three numbers that are not negative.
  __device__ void Largest(float (&x)[3]) const {
    __syncthreads();  // whoever read the last ones is done
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      // Order of floats that are not negative is order of their bits.
      x[i] = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(x[i])));
      if (lane == 0) s.reduced[i * kWarp + warp] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 3; ++i)
      for (int w = 0; w < kWarps; ++w) x[i] = fmaxf(x[i], s.reduced[i * kWarp + w]);
  }

  // |x|^2, |y|^2, |x - y|^2 and the largest |element| of this lane's pieces of two rows.
  struct RowSums {
    float x, y, distance, largest;
    float centred_x, centred_y;
  };
  __device__ __forceinline__ RowSums SumRows(const T* row_x, const T* row_y, int32_t dim, const Adjust& adjust,
                                             const float* mean) const {
    RowSums sums{};
#pragma unroll 2
    for (int32_t at = lane % kRowLanes * kElements; at < dim; at += kRowLanes * kElements) {
      float x[kElements], y[kElements];
      const Raw<T> raw_x = LoadRaw(row_x, at, dim), raw_y = LoadRaw(row_y, at, dim);
      ToFloats(raw_x, x);
      ToFloats(raw_y, y);
      AdjustFloats(adjust, at, dim, x);
      AdjustFloats(adjust, at, dim, y);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const float apart = x[i] - y[i];
        sums.x = fmaf(x[i], x[i], sums.x);
        sums.y = fmaf(y[i], y[i], sums.y);
        sums.distance = fmaf(apart, apart, sums.distance);
        sums.largest = fmaxf(sums.largest, fmaxf(fabsf(x[i]), fabsf(y[i])));
      }
      if (mean == nullptr) continue;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const float centre = at + i < dim ? mean[at + i] : 0.0f;
        sums.centred_x = fmaf(x[i] - centre, x[i] - centre, sums.centred_x);
        sums.centred_y = fmaf(y[i] - centre, y[i] - centre, sums.centred_y);
      }
    }
    return sums;
  }
  __device__ __forceinline__ static float SumLanes(float x) {
#pragma unroll
    for (int offset = kRowLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
  }

  // Fills `pair`; returns the largest |element| of key and value, and the largest norm (centred, if there is a mean).
  __device__ void Measure(const float* mean, float (&largest)[3]) const {
    constexpr int kGroups = kThreads / kRowLanes;
    largest[0] = largest[1] = largest[2] = 0;
    for (int32_t first = 0; first < pairs; first += kGroups) {
      const int32_t a = first + static_cast<int32_t>(threadIdx.x) / kRowLanes, from = min(a, pairs - 1);
      const RowSums k = SumRows(rows.Key(2 * from), rows.Key(2 * from + 1), key_dim, key_adjust, mean);
      const RowSums v = SumRows(rows.Value(2 * from), rows.Value(2 * from + 1), value_dim, value_adjust, nullptr);
      const Pair out{SumLanes(k.x),        SumLanes(k.y), SumLanes(k.centred_x), SumLanes(k.centred_y),
                     SumLanes(k.distance), SumLanes(v.x), SumLanes(v.y),         SumLanes(v.distance)};
      if (a < pairs && lane % kRowLanes == 0) pair[a] = out;
      largest[0] = fmaxf(largest[0], k.largest);
      largest[1] = fmaxf(largest[1], v.largest);
      largest[2] = fmaxf(largest[2], mean == nullptr ? fmaxf(out.norm_x, out.norm_y) : fmaxf(out.centred_x, out.centred_y));
    }
    Largest(largest);
  }

  // Shift and mean of all coordinates. A group of 8 lanes takes 8 coordinates, every lane each 8th row.
  __device__ void Centre() const {
    const float part = 0.25f / static_cast<float>(count);  // of the mean: no sum overflows
    const int32_t pieces = PadDim(key_dim) / kElements, group = static_cast<int32_t>(threadIdx.x) / kRowLanes;
    for (int32_t first = 0; first < pieces; first += kThreads / kRowLanes) {
      const int32_t at = (first + group) * kElements;
      float origin[kElements], low[kElements], high[kElements], sum[kElements] = {};
      ToFloats(LoadRaw(rows.Key(0), at, key_dim), origin);
#pragma unroll
      for (int e = 0; e < kElements; ++e) low[e] = high[e] = origin[e];
#pragma unroll 4
      for (int32_t i = lane % kRowLanes; i < count; i += kRowLanes) {
        float x[kElements];
        ToFloats(LoadRaw(rows.Key(i), at, key_dim), x);
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
          low[e] = fminf(low[e], x[e]);
          high[e] = fmaxf(high[e], x[e]);
          sum[e] += fmaf(x[e], part, -origin[e] * part);
        }
      }
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
#pragma unroll
        for (int offset = kRowLanes / 2; offset > 0; offset /= 2) {
          low[e] = fminf(low[e], __shfl_xor_sync(kAllLanes, low[e], offset));
          high[e] = fmaxf(high[e], __shfl_xor_sync(kAllLanes, high[e], offset));
          sum[e] += __shfl_xor_sync(kAllLanes, sum[e], offset);
        }
        const bool close = (low[e] > 0 && 0.5f * high[e] <= low[e]) || (high[e] < 0 && 0.5f * low[e] >= high[e]);
        const float shift = close ? origin[e] : 0.0f;
        if (at >= PadDim(key_dim) || lane % kRowLanes != 0) continue;
        s.shift[at + e] = shift;
        s.mean[at + e] = 4 * (sum[e] * key_adjust.scale) + (origin[e] - shift) * key_adjust.scale;
      }
    }
    __syncthreads();
  }

  // Norms, origin and scales: everything that the products need.
  __device__ void Prepare() {
    float largest[3];  // |key|, |value|, norm
    Measure(nullptr, largest);
    exponent = 0.5f * kLog2E * fmaxf(0.0f, params.scale);
    const bool large_key = largest[0] > kLargestKey;
    const bool odd_value = largest[1] > 0 && (largest[1] > kLargestValue || largest[1] < kSmallestValue);
    float largest_value = largest[1], longest = 0;
    if (params.gamma != 1 || large_key || odd_value || !(exponent * largest[2] <= kPlainExponent)) {
      int shift = 0;
      if (large_key) shift = min(126, ilogbf(largest[0]) - 40);
      key_adjust = {s.shift, ldexpf(1.0f, -shift), true};
      exponent = ldexpf(exponent, 2 * shift);
      if (odd_value) {
        const int up = max(-126, min(126, -ilogbf(largest[1])));
        value_adjust = {nullptr, ldexpf(1.0f, up), true};
        largest_value *= value_adjust.scale;
      }
      Centre();
      Measure(s.mean, largest);
      longest = largest[2];
    }
    // All distances are at most four times this, and exponents of 2 below it are as good as any.
    exponent = fminf(exponent, kLargestExponent / fmaxf(4 * static_cast<float>(key_dim) * largest[0] * largest[0], 1.0f));
    inverse_square = largest_value > 0 ? 1 / (largest_value * largest_value) : 1;
    Finish(longest);
  }

  // See FinishNorms in src/cpu/halve.cc.
  __device__ void Finish(float longest) const {
    const float rest = 1 - params.gamma;
    for (int32_t a = static_cast<int32_t>(threadIdx.x); a < pairs; a += kThreads) {
      Pair p = pair[a];
      const float below_x = rest * (longest - p.centred_x) * (rest != 0), below_y = rest * (longest - p.centred_y) * (rest != 0);
      const float x = exp2f(-exponent * below_x), y = exp2f(-exponent * below_y);
      const float apart = -expm1f(-exponent * p.distance / kLog2E);
      const float vx = p.value_x * inverse_square, vy = p.value_y * inverse_square;
      const float distance = p.value_distance * inverse_square, product = 0.5f * (vx + vy - distance);
      const float square = x * y * distance + (x - y) * (x * vx - y * vy) + (x - y) * (x - y) +
                           2 * x * y * apart * (product + 1);
      p.norm_x = exponent * (p.norm_x + below_x);
      p.norm_y = exponent * (p.norm_y + below_y);
      p.centred_x = 0;
      p.centred_y = sqrtf(fmaxf(0.0f, square));
      p.distance = Draw(a);
      pair[a] = p;
    }
    __syncthreads();
  }

  // ---- products of a block ----

  __device__ const T* KeyRow(int32_t i) const { return rows.Key(min(i, count - 1)); }
  __device__ const T* ValueRow(int32_t i) const { return rows.Value(min(i, count - 1)); }

  // Brings the block that begins at pair `first` into shared memory; `at` of `warps` warps.
  __device__ void Fetch(int32_t first, int tiles, bool staged, int at, int warps) const {
    if (staged) Stage(first, tiles, at, warps);
    if (at != 0 || lane >= tiles * kPairsOfTile) return;
    const Pair& p = pair[min(first + lane, pairs - 1)];
    s.own[lane] = {p.norm_x, p.norm_y};
  }
  // Group 2 tile + i: rows i of 8 pairs.
  __device__ void Stage(int32_t first, int tiles, int at, int warps) const {
    const int64_t key_chunks = Chunks(key_dim), value_chunks = Chunks(value_dim);
    uint4* values = s.stage + StageIndex<T>(2 * tiles, key_chunks, 0, 0);
    const int32_t offset = lane % 4 * kElements;
    for (int group = at; group < 2 * tiles; group += warps) {
      const int32_t row = 2 * (first + group / 2 * kPairsOfTile + lane / 4) + group % 2;
      StageRow(KeyRow(row), key_dim, key_adjust, offset, s.stage + StageIndex<T>(group, key_chunks, 0, 0) + lane);
      StageRow(ValueRow(row), value_dim, value_adjust, offset, values + StageIndex<T>(group, value_chunks, 0, 0) + lane);
    }
  }
  __device__ void StageRow(const T* row, int32_t dim, const Adjust& adjust, int32_t offset, uint4* to) const {
#pragma unroll 4
    for (int32_t chunk = 0; chunk < Chunks(dim); ++chunk) {
      Raw<T> raw = LoadRaw(row, chunk * kChunk + offset, dim);
      AdjustRaw(adjust, chunk * kChunk + offset, dim, raw);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) to[StageIndex<T>(0, 0, chunk, i)] = raw.part[i];
    }
  }

  // D_ab from the products of keys and values of x_a, y_a with x_b, y_b.
  __device__ __forceinline__ float Combine(const float (&k)[4], const float (&v)[4], const float2& a,
                                           const float2& b) const {
    const auto kappa = [&](int i, float norms) {
      const float power = fminf(fmaf(2 * exponent, k[i], -norms), 0.0f);  // positive only by rounding
      return Exp2(power) * fmaf(v[i], inverse_square, 1.0f);
    };
    return (kappa(0, a.x + b.x) + kappa(3, a.y + b.y)) - (kappa(1, a.x + b.y) + kappa(2, a.y + b.x));
  }

  // The products of kTiles tiles, from tile `tile` of the block on, with the tile of pairs that begins at `column`.
  template <int kTiles>
  __device__ __forceinline__ void Products(int32_t first, int tile, int tiles, bool staged, int32_t column,
                                           float (&k)[kTiles][2][4], float (&v)[kTiles][2][4]) const {
    const int32_t row = 2 * (first + tile * kPairsOfTile + lane / 4), other = 2 * column + lane / 4;
    const int64_t key_chunks = Chunks(key_dim), value_chunks = Chunks(value_dim);
    const uint4* values = s.stage + StageIndex<T>(2 * tiles, key_chunks, 0, 0);
    Source<T> a{s.stage + StageIndex<T>(2 * tile, key_chunks, 0, 0) + lane, nullptr, nullptr};
    if (!staged) a = {nullptr, KeyRow(row), KeyRow(row + 1)};
    const T* const keys[2] = {KeyRow(other), KeyRow(other + 8)};
    Multiply<T, kTiles>(a, keys, key_dim, key_adjust, k);
    a = {values + StageIndex<T>(2 * tile, value_chunks, 0, 0) + lane, nullptr, nullptr};
    if (!staged) a = {nullptr, ValueRow(row), ValueRow(row + 1)};
    const T* const other_values[2] = {ValueRow(other), ValueRow(other + 8)};
    Multiply<T, kTiles>(a, other_values, value_dim, value_adjust, v);
  }

  // parts[p][a]: the sum of sign_b D_ab over the earlier tiles p, p + kParts, ...
  template <int kTiles>
  __device__ void SumEarlier(int32_t first, bool staged) const {
    for (int part = warp; part < kParts; part += kWarps) {
      float sums[kTiles] = {};
      for (int32_t column = part * kPairsOfTile; column < first; column += kParts * kPairsOfTile) {
        float k[kTiles][2][4] = {}, v[kTiles][2][4] = {};
        Products<kTiles>(first, 0, kTiles, staged, column, k, v);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float4 other = *reinterpret_cast<const float4*>(pair + column + 4 * n + lane % 4);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const float2 own = s.own[tile * kPairsOfTile + lane / 4];
            sums[tile] = fmaf(other.z, Combine(k[tile][n], v[tile][n], own, {other.x, other.y}), sums[tile]);
          }
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        sums[tile] += __shfl_xor_sync(kAllLanes, sums[tile], 1);
        sums[tile] += __shfl_xor_sync(kAllLanes, sums[tile], 2);
        if (lane % 4 == 0) s.parts[part * kMostPairs + tile * kPairsOfTile + lane / 4] = sums[tile];
      }
    }
  }

  // The block's own triangle, tile by tile.
  __device__ void FillTriangle(int32_t first, int tiles, bool staged) const {
    const int used = min(tiles, (pairs - first + kPairsOfTile - 1) / kPairsOfTile);
    // From the last warp on: the first ones have one tile more of the earlier pairs.
    for (int item = kWarps - 1 - warp; item < used * (used + 1) / 2; item += kWarps) {
      int row = 0, column = item;
      while (column > row) column -= ++row;
      float k[1][2][4] = {}, v[1][2][4] = {};
      Products<1>(first, row, tiles, staged, first + column * kPairsOfTile, k, v);
      const int a = row * kPairsOfTile + lane / 4;
      const Pair& own = pair[min(first + a, pairs - 1)];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int b = column * kPairsOfTile + 4 * n + lane % 4;
        const Pair& other = pair[min(first + b, pairs - 1)];
        s.triangle[a * kTriangleStride + b] =
            Combine(k[0][n], v[0][n], {own.norm_x, own.norm_y}, {other.norm_x, other.norm_y});
      }
    }
  }

  // Decides the block's pairs; one warp, lane j has pair first + j. `largest` is that of sqrt(D_bb) so far.
  __device__ void Scan(int32_t first, int32_t block, float factor, float& largest) const {
    const int32_t a = min(first + lane, pairs - 1);
    const bool mine = lane < block;
    const float root = mine ? pair[a].centred_y : 0.0f, r = pair[a].distance;
    float sum = 0, most = fmaxf(root, largest);
    if (first > 0)
#pragma unroll
      for (int part = 0; part < kParts; ++part) sum += s.parts[part * kMostPairs + lane];
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const float before = __shfl_up_sync(kAllLanes, most, offset);
      if (lane >= offset) most = fmaxf(most, before);
    }
    largest = __shfl_sync(kAllLanes, most, kWarp - 1);
    const float threshold = factor * root * most;
    const float infinity = __int_as_float(0x7F800000);
    const bool fair = !(threshold > 0 && a > 0);
    const float u = fair ? (r < 0.5f ? -infinity : infinity) : (2 * r - 1) * threshold;
    const float* row = s.triangle + lane * kTriangleStride;
    uint32_t kept = 0;  // bit j: y of pair first + j
    for (int32_t j = 0; j < block; j += 8) {
      float d[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) d[i] = row[j + i];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        // Lanes up to j + i are decided: whatever they add here is used no more.
        const uint32_t decided = __ballot_sync(kAllLanes, u < sum) & (1u << (j + i));
        kept |= decided;
        sum += decided != 0 ? -d[i] : d[i];
      }
    }
    if (!mine) return;
    const bool keep_y = (kept >> lane & 1) != 0;
    pair[a].centred_x = keep_y ? -1.0f : 1.0f;
    keep[a] = keep_y != complement;
  }

  template <int kTiles>
  __device__ void Decide(bool can_stage) const {
    constexpr int32_t kBlock = kTiles * kPairsOfTile;
    const float factor =
        params.tau * (0.5f + logf(4.0f * static_cast<float>(pairs) / params.delta));  // ln(2 (2 h) / delta)
    const bool staged = can_stage && pairs > kBlock;
    if (staged) {
      Fetch(0, kTiles, staged, warp, kWarps);
      __syncthreads();
    }
    float largest = 0;
    for (int32_t first = 0; first < pairs; first += kBlock) {
      FillTriangle(first, kTiles, staged);
      if (first > 0) SumEarlier<kTiles>(first, staged);
      __syncthreads();
      const bool more = first + kBlock < pairs;
      if (warp == 0) Scan(first, min(kBlock, pairs - first), factor, largest);
      if (warp != 0 && more) Fetch(first + kBlock, kTiles, staged, warp - 1, kWarps - 1);
      __syncthreads();
    }
  }
};

}  // namespace halve

__host__ __device__ inline size_t HalveScratchBytes(int32_t max_count) {
  return (static_cast<size_t>(max_count) + 1) / 2 * sizeof(halve::Pair);
}

// Of lists of at most max_count entries: short ones stage nothing.
template <class T>
__host__ __device__ constexpr size_t HalveSharedBytes(int32_t key_dim, int32_t value_dim,
                                                      int32_t max_count = INT32_MAX) {
  const int tiles = halve::StagedTiles<T>(key_dim, value_dim);
  const bool staged = max_count > 2 * tiles * halve::kPairsOfTile;
  return halve::FixedBytes(key_dim) +
         (staged ? static_cast<size_t>(tiles * halve::TileBytes(key_dim, value_dim, sizeof(T))) : 0);
}

// rows.Key(i) and rows.Value(i): const T* to row i of the list, i < count, 16-byte aligned.
// keep: (count / 2) bytes in shared or global memory: 1 where y = row 2a + 1 survives, the final complement included.
// scratch: global memory of this block's own, HalveScratchBytes(max count), 16-byte aligned. shared: HalveSharedBytes<T>
// (key_dim, value_dim, max count), 16-byte aligned. At least 64 threads.
// All threads of the block call it, and a barrier stands at its end.
template <class T, int kThreads, class RowsOf>
__device__ void HalveList(const RowsOf& rows, int32_t count, int32_t key_dim, int32_t value_dim,
                          const HalveParams& params, const StreamKey& key, uint64_t number, char* scratch,
                          char* shared, uint8_t* keep) {
  static_assert(kThreads % kWarp == 0 && kThreads >= 2 * kWarp);
  const int32_t pairs = count / 2;
  const bool complement = UniformFromBits(DrawBits(key, RandomPurpose::kComplement, number, 0)) < 0.5f;
  if (params.coin || pairs <= 1) {  // the first pair is a fair coin
    for (int32_t a = static_cast<int32_t>(threadIdx.x); a < pairs; a += kThreads) {
      const uint32_t bits = DrawBits(key, RandomPurpose::kHalve, number, static_cast<uint32_t>(a));
      keep[a] = (UniformFromBits(bits) < 0.5f) != complement;
    }
    __syncthreads();
    return;
  }
  const halve::Layout layout = halve::LayOut(shared, key_dim);
  halve::Pair* pair = pairs <= halve::kSharedPairs ? layout.pairs : reinterpret_cast<halve::Pair*>(scratch);
  halve::List<T, kThreads, RowsOf> list{rows, count, pairs, key_dim, value_dim, params, key, number, layout, pair, keep,
                                        complement};
  list.Prepare();
  const int tiles = halve::StagedTiles<T>(key_dim, value_dim);
  if (tiles == 4) {
    list.template Decide<4>(true);
  } else if (tiles == 2) {
    list.template Decide<2>(true);
  } else {
    list.template Decide<1>(tiles == 1);
  }
}

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_HALVE_CUH_
