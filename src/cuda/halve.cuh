// Kernel halving of one list by one thread block (DESIGN 3.1; the formula stands beside src/cpu/reference.cc).
//
// Pairs are decided in order, in blocks of up to 32. The block's D_ab against all earlier pairs b is formed on tensor
// cores tile by tile and summed with the signs already chosen at once, so no h x h matrix exists; then the block's own
// triangle of D, in shared memory, is scanned by one warp.
//
// The exponent of kappa(i, j) is, with N the squared norms of the centred keys and M the largest of them,
//   beta <k~_i, k~_j> - c_i - c_j = -beta / 2 (|k_i - k_j|^2 + (1 - gamma) ((M - N_i) + (M - N_j))),
// a sum of parts of one sign, and the distance does not depend on where the origin is. It is n_i + n_j - 2 <k_i, k_j>
// from products of stored keys, which tensor cores form exactly and sum in f32. Its absolute error is 2^-24 of the
// norms n, times a small factor: where these are large, the origin is moved. A coordinate whose values in the list have
// one sign and lie within a factor of two of each other is replaced by its difference from that of row 0: such a
// difference of two numbers of the storage type is itself one, so that nothing is rounded. Any other coordinate spreads
// over at least half its largest value, where a common mean costs nothing. (Left alone too: a mean that one outlier
// hides.)
//
// Decisions are the same whatever the number of threads: no sum depends on it.
#ifndef EXPRESS_SRC_CUDA_HALVE_CUH_
#define EXPRESS_SRC_CUDA_HALVE_CUH_

#include <utility>

#include "src/cuda/halve_tiles.cuh"

namespace express::cuda {

namespace halve {

// ---- one list at work; every function is called by all its threads: the block, or one warp of it ----

template <int kThreads>
__device__ __forceinline__ int32_t Thread() {
  return static_cast<int32_t>(threadIdx.x) % kThreads;
}
template <int kThreads>
__device__ __forceinline__ void Barrier() {
  if constexpr (kThreads == kWarp)
    __syncwarp();
  else
    __syncthreads();
}

template <class T, int kThreads, int32_t kMostCount, class RowsOf>
struct List {
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kTriangleStride = Sizes<kMostCount>::kTriangleStride;
  using Row = decltype(std::declval<const RowsOf&>().Key(0));  // const T*, or what T is loaded from
  static constexpr bool kCodes = std::is_same_v<Row, CodeRow>;

  const RowsOf& rows;
  const int32_t count, pairs, key_dim, value_dim;
  const HalveParams& params;
  const StreamKey& stream;
  const uint64_t number;
  const Layout& s;
  Pair* const pair;  // (pairs): in shared memory or in scratch
  uint8_t* const keep;
  const bool complement;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = Thread<kThreads>() / kWarp;
  Adjust key_adjust{nullptr, 1, false}, value_adjust{nullptr, 1, false};
  float exponent = 0;        // beta / 2 log2 e, of adjusted keys
  float inverse_square = 1;  // 1 / b^2, of adjusted values

  __device__ __forceinline__ float Draw(int32_t a) const {
    return UniformFromBits(DrawBits(stream, RandomPurpose::kHalve, number, static_cast<uint32_t>(a)));
  }

  // The largest of all threads, of three numbers that are not negative. A barrier.
  __device__ __forceinline__ void Largest(float (&x)[3]) const {
    Barrier<kThreads>();  // whoever read the last ones is done
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      // Order of floats that are not negative is order of their bits.
      x[i] = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(x[i])));
      if (kWarps > 1 && lane == 0) s.reduced[i * kWarp + warp] = x[i];
    }
    if (kWarps == 1) return;
    Barrier<kThreads>();
#pragma unroll
    for (int i = 0; i < 3; ++i)
      for (int w = 0; w < kWarps; ++w) x[i] = fmaxf(x[i], s.reduced[i * kWarp + w]);
  }

  // |x|^2, |y|^2, |x - y|^2 and the largest |element| of this lane's pieces of two rows.
  struct RowSums {
    float x, y, distance, largest;
    float centred_x, centred_y;
  };
  struct Piece {
    Raw<T> x, y;
  };
  __device__ __forceinline__ static Piece LoadPiece(const Row& row_x, const Row& row_y, int32_t at, int32_t dim) {
    return {LoadRaw(row_x, at, dim), LoadRaw(row_y, at, dim)};
  }
  __device__ __forceinline__ static void SumPiece(const Piece& piece, int32_t at, int32_t dim, const Adjust& adjust,
                                                  const float* mean, RowSums& sums) {
    float x[kElements], y[kElements];
    ToFloats(piece.x, x);
    ToFloats(piece.y, y);
    if (adjust.active && at < dim) {
      AdjustFloats(adjust, at, dim, x);
      AdjustFloats(adjust, at, dim, y);
    }
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float apart = x[i] - y[i];
      sums.x = fmaf(x[i], x[i], sums.x);
      sums.y = fmaf(y[i], y[i], sums.y);
      sums.distance = fmaf(apart, apart, sums.distance);
      sums.largest = fmaxf(sums.largest, fmaxf(fabsf(x[i]), fabsf(y[i])));
    }
    if (mean == nullptr) return;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float centre = at + i < dim ? mean[at + i] : 0.0f;
      sums.centred_x = fmaf(x[i] - centre, x[i] - centre, sums.centred_x);
      sums.centred_y = fmaf(y[i] - centre, y[i] - centre, sums.centred_y);
    }
  }
  __device__ __forceinline__ static float SumLanes(float x) {
#pragma unroll
    for (int offset = kRowLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
  }

  // Fills `pair`; returns the largest |element| of key and value, and the largest norm (centred, if there is a mean).
  __device__ __forceinline__ void Measure(const float* mean, float (&largest)[3]) const {
    constexpr int kGroups = kThreads / kRowLanes;
    largest[0] = largest[1] = largest[2] = 0;
    for (int32_t first = 0; first < pairs; first += kGroups) {
      const int32_t a = first + Thread<kThreads>() / kRowLanes, from = min(a, pairs - 1);
      const Row key_x = rows.Key(2 * from), key_y = rows.Key(2 * from + 1);
      const Row value_x = rows.Value(2 * from), value_y = rows.Value(2 * from + 1);
      RowSums k{}, v{};
      const int32_t step = kRowLanes * kElements;
      for (int32_t at = lane % kRowLanes * kElements; at < max(key_dim, value_dim); at += 2 * step) {
        Piece keys[2], values[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // all loads are on their way before the first is used
          keys[i] = LoadPiece(key_x, key_y, at + i * step, key_dim);
          values[i] = LoadPiece(value_x, value_y, at + i * step, value_dim);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) SumPiece(keys[i], at + i * step, key_dim, key_adjust, mean, k);
#pragma unroll
        for (int i = 0; i < 2; ++i) SumPiece(values[i], at + i * step, value_dim, value_adjust, nullptr, v);
      }
      const Pair out{SumLanes(k.x),        SumLanes(k.y), SumLanes(k.centred_x), SumLanes(k.centred_y),
                     SumLanes(k.distance), SumLanes(v.x), SumLanes(v.y),         SumLanes(v.distance)};
      if (a < pairs && lane % kRowLanes == 0) pair[a] = out;
      largest[0] = fmaxf(largest[0], k.largest);
      largest[1] = fmaxf(largest[1], v.largest);
      largest[2] =
          fmaxf(largest[2], mean == nullptr ? fmaxf(out.norm_x, out.norm_y) : fmaxf(out.centred_x, out.centred_y));
    }
    Largest(largest);
  }

  // Shift and mean of all coordinates. A group of 8 lanes takes 8 coordinates, every lane each 8th row.
  __device__ __forceinline__ void Centre() const {
    const float part = 0.25f / static_cast<float>(count);  // of the mean: no sum overflows
    const int32_t pieces = PadDim(key_dim) / kElements, group = Thread<kThreads>() / kRowLanes;
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
    Barrier<kThreads>();
  }

  // Norms, origin and scales: everything that the products need.
  __device__ __forceinline__ void Prepare() {
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
    exponent =
        fminf(exponent, kLargestExponent / fmaxf(4 * static_cast<float>(key_dim) * largest[0] * largest[0], 1.0f));
    inverse_square = largest_value > 0 ? 1 / (largest_value * largest_value) : 1;
    Finish(longest);
  }

  // See FinishNorms in src/cpu/halve.cc.
  __device__ __forceinline__ void Finish(float longest) const {
    const float rest = 1 - params.gamma;
    for (int32_t a = Thread<kThreads>(); a < pairs; a += kThreads) {
      Pair p = pair[a];
      const float below_x = rest * (longest - p.centred_x) * (rest != 0),
                  below_y = rest * (longest - p.centred_y) * (rest != 0);
      const float x = exp2f(-exponent * below_x), y = exp2f(-exponent * below_y);
      const float apart = -expm1f(-exponent * p.distance / kLog2E);
      const float vx = p.value_x * inverse_square, vy = p.value_y * inverse_square;
      const float distance = p.value_distance * inverse_square, product = 0.5f * (vx + vy - distance);
      const float square =
          x * y * distance + (x - y) * (x * vx - y * vy) + (x - y) * (x - y) + 2 * x * y * apart * (product + 1);
      p.norm_x = exponent * (p.norm_x + below_x);
      p.norm_y = exponent * (p.norm_y + below_y);
      p.centred_x = 0;
      p.centred_y = sqrtf(fmaxf(0.0f, square));
      pair[a] = p;
    }
    Barrier<kThreads>();
  }

  // ---- products of a block ----

  __device__ __forceinline__ Row KeyRow(int32_t i) const { return rows.Key(min(i, count - 1)); }
  __device__ __forceinline__ Row ValueRow(int32_t i) const { return rows.Value(min(i, count - 1)); }

  // Brings the block that begins at pair `first` into shared memory; `at` of `warps` warps. Group 2 tile + i: rows i of
  // 8 pairs.
  __device__ __forceinline__ void Stage(int32_t first, int tiles, int at, int warps) const {
    const int32_t key_chunks = Chunks(key_dim), value_chunks = Chunks(value_dim);
    uint4* values = s.stage + StageIndex<T>(2 * tiles, key_chunks, 0, 0);
    const int32_t offset = lane % 4 * kElements;
    for (int group = at; group < 2 * tiles; group += warps) {
      const int32_t row = 2 * (first + group / 2 * kPairsOfTile + lane / 4) + group % 2;
      StageRow(KeyRow(row), key_dim, key_adjust, offset, s.stage + StageIndex<T>(group, key_chunks, 0, 0) + lane);
      StageRow(ValueRow(row), value_dim, value_adjust, offset,
               values + StageIndex<T>(group, value_chunks, 0, 0) + lane);
    }
    if (at != 0 || lane >= tiles * kPairsOfTile) return;
    const Pair& p = pair[min(first + lane, pairs - 1)];
    s.own[lane] = {p.norm_x, p.norm_y};
  }
  __device__ __forceinline__ void StageRow(const Row& row, int32_t dim, const Adjust& adjust, int32_t offset,
                                           uint4* to) const {
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

  // This lane's rows of the tile of pairs that begins at pair `first`, as B: rows g and g + 8. As A: x and y of a pair.
  __device__ __forceinline__ TwoRows<Row> KeysOf(int32_t first) const {
    return {{KeyRow(2 * first + lane / 4), KeyRow(2 * first + kPairsOfTile + lane / 4)}};
  }
  __device__ __forceinline__ TwoRows<Row> ValuesOf(int32_t first) const {
    return {{ValueRow(2 * first + lane / 4), ValueRow(2 * first + kPairsOfTile + lane / 4)}};
  }
  __device__ __forceinline__ TwoRows<Row> KeyPair(int32_t a) const { return {{KeyRow(2 * a), KeyRow(2 * a + 1)}}; }
  __device__ __forceinline__ TwoRows<Row> ValuePair(int32_t a) const {
    return {{ValueRow(2 * a), ValueRow(2 * a + 1)}};
  }

  // parts[p][a]: the sum of sign_b D_ab over the earlier tiles p, p + kParts, ...
  template <int kTiles>
  __device__ __forceinline__ void SumEarlier(int32_t first) const {
    const uint4* keys = s.stage + lane;
    const uint4* values = keys + StageIndex<T>(2 * kTiles, Chunks(key_dim), 0, 0);
    using Columns = Group<T, 2>;
    constexpr int32_t kDims = Columns::kDims;
    constexpr int32_t kStride = kParts * kPairsOfTile;
    for (int part = warp; part < kParts; part += kWarps) {
      float sums[kTiles] = {};
      int32_t column = part * kPairsOfTile;
      TwoRows<Row> key_rows = KeysOf(column);
      Columns next;
      if (column < first) LoadGroup(key_rows, 0, key_dim, next);
      for (; column < first; column += kStride) {
        float k[kTiles][2][4] = {}, v[kTiles][2][4] = {};
        const TwoRows<Row> value_rows = ValuesOf(column);
        for (int32_t at = 0; at < key_dim; at += kDims) {
          Columns now = next;
          const bool more = at + kDims < key_dim;
          LoadGroup(Choose(more, key_rows, value_rows), more ? at + kDims : 0, more ? key_dim : value_dim, next);
          AdjustGroup(key_adjust, at, key_dim, now);
          Multiply(keys, now, at, key_dim, k);
        }
        key_rows = KeysOf(column + kStride < first ? column + kStride : column);
        const float4 other[2] = {*reinterpret_cast<const float4*>(pair + column + lane % 4),
                                 *reinterpret_cast<const float4*>(pair + column + 4 + lane % 4)};
        for (int32_t at = 0; at < value_dim; at += kDims) {
          Columns now = next;
          const bool more = at + kDims < value_dim;
          LoadGroup(Choose(more, value_rows, key_rows), more ? at + kDims : 0, more ? value_dim : key_dim, next);
          AdjustGroup(value_adjust, at, value_dim, now);
          Multiply(values, now, at, value_dim, v);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const float d =
                Combine(k[tile][n], v[tile][n], s.own[tile * kPairsOfTile + lane / 4], {other[n].x, other[n].y});
            sums[tile] = fmaf(other[n].z, d, sums[tile]);
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

  // The same of codes, which are numbers of type bf16: their products are sums of integers, exact, until the scales come to them.
  __device__ __forceinline__ static void CodeProducts(const TwoRows<Row>& a, const TwoRows<Row>& b, int32_t dim,
                                                      float (&c)[1][2][4]) {
    using Loaded = Group<BFloat16, kWarps == 1 ? 2 : 4>;
    for (int32_t at = 0; at < dim; at += Loaded::kDims) {
      Loaded rows, columns;
      LoadCodeGroup(a, at, dim, rows);
      LoadCodeGroup(b, at, dim, columns);
      Multiply(rows, columns, at, dim, c);
    }
    const auto lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)  // column 2t + i % 2 is lane 8t + 4 (i % 2)'s
        c[0][n][i] *= a.row[i / 2].scale * __shfl_sync(kAllLanes, b.row[n].scale, lane % 4 * 8 + i % 2 * 4);
  }

  // c += products of one tile with another, from the rows themselves.
  __device__ __forceinline__ static void RowProducts(const TwoRows<Row>& a, const TwoRows<Row>& b, int32_t dim,
                                                     const Adjust& adjust, float (&c)[1][2][4]) {
    if constexpr (kCodes)
      if (!adjust.active) return CodeProducts(a, b, dim, c);
    // All at once: here it is latency that counts. Where other warps have other lists, it is registers.
    using Loaded = Group<T, sizeof(T) == 4 || kWarps == 1 ? 2 : 4>;
    for (int32_t at = 0; at < dim; at += Loaded::kDims) {
      Loaded rows, columns;
      LoadGroup(a, at, dim, rows);
      LoadGroup(b, at, dim, columns);
      AdjustGroup(adjust, at, dim, rows);
      AdjustGroup(adjust, at, dim, columns);
      Multiply(rows, columns, at, dim, c);
    }
  }

  // D_ab, n = 0, 1: a = row + lane / 4, b = column + 4 n + lane % 4.
  __device__ __forceinline__ void TileFromRows(int32_t row, int32_t column, float (&d)[2]) const {
    float k[1][2][4] = {}, v[1][2][4] = {};
    RowProducts(KeyPair(row + lane / 4), KeysOf(column), key_dim, key_adjust, k);
    RowProducts(ValuePair(row + lane / 4), ValuesOf(column), value_dim, value_adjust, v);
    const Pair& own = pair[min(row + lane / 4, pairs - 1)];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const Pair& other = pair[min(column + 4 * n + lane % 4, pairs - 1)];
      d[n] = Combine(k[0][n], v[0][n], {own.norm_x, own.norm_y}, {other.norm_x, other.norm_y});
    }
  }

  // As SumEarlier, where rows are too long to be staged; one tile.
  __device__ __forceinline__ void SumEarlierFromRows(int32_t first) const {
    for (int part = warp; part < kParts; part += kWarps) {
      float sum = 0;
      for (int32_t column = part * kPairsOfTile; column < first; column += kParts * kPairsOfTile) {
        float d[2];
        TileFromRows(first, column, d);
#pragma unroll
        for (int n = 0; n < 2; ++n) sum = fmaf(pair[column + 4 * n + lane % 4].centred_x, d[n], sum);
      }
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (lane % 4 == 0) s.parts[part * kMostPairs + lane / 4] = sum;
    }
  }

  // The block's own triangle, tile by tile.
  __device__ __forceinline__ void FillTriangle(int32_t first, int tiles) const {
    const int used = min(tiles, (pairs - first + kPairsOfTile - 1) / kPairsOfTile);
    // From the last warp on: the first one has the scan to prepare.
    for (int item = kWarps - 1 - warp; item < used * (used + 1) / 2; item += kWarps) {
      int row = 0, column = item;
      while (column > row) column -= ++row;
      float d[2];
      TileFromRows(first + row * kPairsOfTile, first + column * kPairsOfTile, d);
#pragma unroll
      for (int n = 0; n < 2; ++n)
        s.triangle[(row * kPairsOfTile + lane / 4) * kTriangleStride + column * kPairsOfTile + 4 * n + lane % 4] = d[n];
    }
  }

  // For lane j of one warp and pair a = first + j: y is kept if this is less than S_a. `largest` is that of sqrt(D_bb).
  __device__ __forceinline__ float DrawThreshold(int32_t first, int32_t block, float factor, float& largest) const {
    const int32_t a = min(first + lane, pairs - 1);
    const float root = lane < block ? pair[a].centred_y : 0.0f, r = Draw(a);
    float most = fmaxf(root, largest);
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const float before = __shfl_up_sync(kAllLanes, most, offset);
      if (lane >= offset) most = fmaxf(most, before);
    }
    largest = __shfl_sync(kAllLanes, most, kWarp - 1);
    const float threshold = factor * root * most, infinity = __int_as_float(0x7F800000);
    if (threshold > 0 && a > 0) return (2 * r - 1) * threshold;
    return r < 0.5f ? -infinity : infinity;
  }

  // Decides the block's pairs; one warp, lane j has pair first + j.
  __device__ __forceinline__ void Scan(int32_t first, int32_t block, float u) const {
    float sum = 0;
    if (first > 0)
#pragma unroll
      for (int part = 0; part < kParts; ++part) sum += s.parts[part * kMostPairs + lane];
    const float* row = s.triangle + min(lane, Sizes<kMostCount>::kBlock - 1) * kTriangleStride;
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
    if (lane >= block) return;
    const bool keep_y = (kept >> lane & 1) != 0;
    pair[first + lane].centred_x = keep_y ? -1.0f : 1.0f;
    keep[first + lane] = keep_y != complement;
  }

  __device__ __forceinline__ float Factor(int32_t of_pairs) const {
    return params.tau * (0.5f + logf(4.0f * static_cast<float>(of_pairs) / params.delta));  // ln(2 (2 h) / delta)
  }

  // A list of one block.
  __device__ __forceinline__ void DecideShort() const {
    float largest = 0;
    const float u = warp == 0 ? DrawThreshold(0, pairs, Factor(pairs), largest) : 0.0f;
    FillTriangle(0, Sizes<kMostCount>::kBlock / kPairsOfTile);
    Barrier<kThreads>();
    if (warp == 0) Scan(0, pairs, u);
    Barrier<kThreads>();
  }

  // Blocks of kTiles tiles, staged; kTiles = 0: of one tile, which is not.
  template <int kTiles>
  __device__ __forceinline__ void Decide() const {
    constexpr int kBlockTiles = kTiles == 0 ? 1 : kTiles;
    constexpr int32_t kBlock = kBlockTiles * kPairsOfTile;
    const float factor = Factor(pairs);
    float largest = 0;
    for (int32_t first = 0; first < pairs; first += kBlock) {
      const int32_t block = min(kBlock, pairs - first);
      const float u = warp == 0 ? DrawThreshold(first, block, factor, largest) : 0.0f;
      FillTriangle(first, kBlockTiles);
      if (first > 0) {
        if constexpr (kTiles == 0) {
          SumEarlierFromRows(first);
        } else {
          SumEarlier<kTiles>(first);
        }
      }
      Barrier<kThreads>();
      if (warp == 0) Scan(first, block, u);
      if (warp != 0 && kTiles != 0 && first + kBlock < pairs) Stage(first + kBlock, kTiles, warp - 1, kWarps - 1);
      Barrier<kThreads>();
    }
  }

  __device__ __forceinline__ void DecideLong() const {
    switch (StagedTiles<T>(key_dim, value_dim)) {
      case 4:
        if constexpr (sizeof(T) == 2) Decide<4>();
        break;
      case 2:
        Decide<2>();
        break;
      case 1:
        Decide<1>();
        break;
      default:
        Decide<0>();
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
  const bool staged = max_count > 2 * halve::kMostPairs;
  return halve::FixedBytes(key_dim) +
         (staged ? static_cast<size_t>(tiles * halve::TileBytes(key_dim, value_dim, sizeof(T))) : 0);
}

// Lists that one warp can have, and its shared memory.
inline constexpr int32_t kWarpList = 2 * halve::kPairsOfTile;
__host__ __device__ constexpr size_t HalveWarpBytes(int32_t key_dim) { return halve::FixedBytes<kWarpList>(key_dim); }

// rows.Key(i) and rows.Value(i): const T* to row i of the list, i < count, 16-byte aligned; or, where T is float, a CodeRow.
// keep: (count / 2) bytes in shared or global memory: 1 where y = row 2a + 1 survives, the final complement included.
// scratch: global memory of this block's own, HalveScratchBytes(max count), 16-byte aligned.
// shared: HalveSharedBytes<T>(key_dim, value_dim, max count), 16-byte aligned.
// kMostCount >= count, where it is known: kernels for short lists need fewer registers and less shared memory.
// All threads of the block call it, and a barrier stands at its end. Or a warp has a list of its own, kThreads = 32 and
// kMostCount = kWarpList: all of the warp call it, the barrier is the warp's, and `shared` has HalveWarpBytes.
template <class T, int kThreads, int32_t kMostCount = INT32_MAX, class RowsOf>
__device__ __forceinline__ void HalveList(const RowsOf& rows, int32_t count, int32_t key_dim, int32_t value_dim,
                                          const HalveParams& params, const StreamKey& key, uint64_t number,
                                          char* scratch, char* shared, uint8_t* keep) {
  static_assert(kThreads % kWarp == 0 && (kThreads > kWarp || halve::Sizes<kMostCount>::kOneTile));
  const int32_t pairs = count / 2;
  const bool complement = UniformFromBits(DrawBits(key, RandomPurpose::kComplement, number, 0)) < 0.5f;
  if (params.coin || pairs <= 1) {  // the first pair is a fair coin
    for (int32_t a = halve::Thread<kThreads>(); a < pairs; a += kThreads) {
      const uint32_t bits = DrawBits(key, RandomPurpose::kHalve, number, static_cast<uint32_t>(a));
      keep[a] = (UniformFromBits(bits) < 0.5f) != complement;
    }
    halve::Barrier<kThreads>();
    return;
  }
  const halve::Layout layout = halve::LayOut<kMostCount>(shared, key_dim);
  halve::Pair* pair =
      pairs <= halve::Sizes<kMostCount>::kPairs ? layout.pairs : reinterpret_cast<halve::Pair*>(scratch);
  halve::List<T, kThreads, kMostCount, RowsOf> list{rows, count,  pairs,  key_dim, value_dim, params,
                                                    key,  number, layout, pair,    keep,      complement};
  list.Prepare();
  if (pairs <= halve::kMostPairs) {
    list.DecideShort();
    return;
  }
  if constexpr (kMostCount > 2 * halve::kMostPairs) list.DecideLong();
}

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_HALVE_CUH_
