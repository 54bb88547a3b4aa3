// Decode attention over 16-bit slabs, what one warp does: its way through the tiles of its share, their bytes on the way to
// shared memory, and their products.
//
// From shared memory tiles go into tensor-core fragments: the order of a contraction does not matter, so thread (g, t) =
// (lane / 4, lane % 4) takes 16-byte pieces t, t + 4, .. of keys g and g + 8 as the A of S^T = K Q^T, and of values the piece
// of dims [8g, 8g + 8) of keys 2t, 2t + 1, 2t + 8, 2t + 9 as the A of O^T = V^T P^T, where row g of row tile j stands for dim
// 8g + 2j and row g + 8 for the one after it. Queries are the 8 columns; a transposition of P between the two products
// (movmatrix) is all that ever moves between threads.
#ifndef EXPRESS_SRC_CUDA_ATTEND_TILE_CUH_
#define EXPRESS_SRC_CUDA_ATTEND_TILE_CUH_

#include "src/cuda/attend.cuh"

namespace express::cuda {

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

__device__ __forceinline__ uint32_t TransposeMatrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// ---- a tile in shared memory: 16 keys, then 16 values, rows without gaps; then, elsewhere, 16 log weights ----

template <class T, int kKeyDim, int kValueDim>
struct Tile {
  static constexpr int kKeyPieces = kKeyDim / 8, kValuePieces = kValueDim / 8;  // of 16 bytes, in a row
  static constexpr int kKeyBytes = kTile * kKeyDim * 2, kValueBytes = kTile * kValueDim * 2;
  static constexpr int kBytes = kKeyBytes + kValueBytes;
  // Pieces change places within a row, so that what the threads of a fragment read together lies in different banks.
  static __device__ int KeyPiece(int row, int piece) {
    if constexpr (kKeyPieces % 8 == 0) return piece ^ ((row & 1) << 2);
    return piece;
  }
  static __device__ int ValuePiece(int row, int piece) {
    if constexpr (kValuePieces % 8 == 0) return piece ^ (((row >> 1) & 3) << 1);
    return piece;
  }
  // Begins to copy the first `valid` keys at `key` and their values.
  static __device__ __forceinline__ void Copy(uint32_t to, const T* key, const T* value, int valid) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
#pragma unroll
    for (int i = 0; i < kTile * kKeyPieces / kWarp; ++i) {
      const int at = i * kWarp + lane, row = at / kKeyPieces, piece = at % kKeyPieces;
      if (row < valid) CopyAsync16(to + (row * kKeyPieces + KeyPiece(row, piece)) * 16, key + at * 8);
    }
#pragma unroll
    for (int i = 0; i < kTile * kValuePieces / kWarp; ++i) {
      const int at = i * kWarp + lane, row = at / kValuePieces, piece = at % kValuePieces;
      if (row < valid) CopyAsync16(to + kKeyBytes + (row * kValuePieces + ValuePiece(row, piece)) * 16, value + at * 8);
    }
  }
};

// ---- a warp's way through the tiles of its share ----

template <class T, int kKeyDim, int kValueDim>
struct Walk {
  struct View {
    const T* key;
    const T* value;
    const float* log_weight;
    int32_t capacity;
  };
  const AttendLaunch& launch;
  const Share share, next;
  int32_t rank, ranks;  // this warp, of all warps of the cluster
  View now, ahead;      // the head it is in, and the one after it, whose description is on its way
  int32_t head, tile, end;
  bool valid = true;

  __device__ __forceinline__ Walk(const AttendLaunch& l, const Share& first, const Share& behind, int32_t rank_,
                                  int32_t ranks_)
      : launch(l), share(first), next(behind), rank(rank_), ranks(ranks_) {
    now = {static_cast<const T*>(share.key), static_cast<const T*>(share.value), share.log_weight, share.capacity};
    head = share.head;
    tile = share.tile + rank;
    end = End();
    LookAhead();
    Skip();
  }
  __device__ bool Has(int32_t h) const { return h < next.head || (h == next.head && next.tile > 0); }
  // Tiles of this head that belong to the share.
  __device__ int32_t End() const {
    return head == next.head ? next.tile : static_cast<int32_t>(CeilDiv(now.capacity, kTile));
  }
  __device__ __forceinline__ void LookAhead() {
    if (!Has(head + 1)) return;
    const Head& h = launch.args.heads[(head + 1) / launch.args.kv_heads][(head + 1) % launch.args.kv_heads];
    ahead = {static_cast<const T*>(h.key), static_cast<const T*>(h.value), h.log_weight, h.capacity};
  }
  // To the next head, until there is a tile for this warp.
  __device__ __forceinline__ void Skip() {
    while (tile >= end) {
      if (!Has(++head)) {
        valid = false;
        return;
      }
      now = ahead;
      tile = rank;
      end = End();
      LookAhead();
    }
  }
  __device__ __forceinline__ void Advance() {
    tile += ranks;
    Skip();
  }
  // Asks the L2 for this head's next tiles.
  __device__ void Prefetch(int tiles) const {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const auto fetch = [&](const T* from, int bytes) {
      for (int at = 128 * lane; at < bytes; at += 128 * kWarp)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(reinterpret_cast<const char*>(from) + at));
    };
    if (!valid) return;
    for (int i = 0, at = tile; i < tiles && at < end; ++i, at += ranks) {
      const int keys = min(kTile, now.capacity - at * kTile);
      fetch(now.key + static_cast<int64_t>(at) * kTile * kKeyDim, keys * kKeyDim * 2);
      fetch(now.value + static_cast<int64_t>(at) * kTile * kValueDim, keys * kValueDim * 2);
    }
  }
  __device__ int Keys() const { return min(kTile, now.capacity - tile * kTile); }
  __device__ const T* Key() const { return now.key + static_cast<int64_t>(tile) * kTile * kKeyDim; }
  __device__ const T* Value() const { return now.value + static_cast<int64_t>(tile) * kTile * kValueDim; }
  __device__ const float* Weights() const { return now.log_weight + tile * kTile; }
  // Of key `lane` of the tile.
  __device__ float Weight(int lane) const { return valid && lane < Keys() ? Weights()[lane] : kMinusInfinity; }
};

// ---- one warp's share of the products: kTiles column tiles of 8 queries ----

template <class T, int kKeyDim, int kValueDim, int kTiles>
struct WarpState {
  using Layout = Tile<T, kKeyDim, kValueDim>;
  static constexpr int kPieces = (kKeyDim / 8 + 3) / 4;  // 16-byte pieces of a key per thread
  static constexpr int kGroups = (kValueDim + 63) / 64;  // of 64 dims of a value
  using Queries = uint4[kTiles][kPieces];                // of query g
  Queries q;
  float out[kTiles][kGroups][4][4];      // O^T: row tile j of the group
  float max[kTiles][2], sum[kTiles][2];  // of queries 2t, 2t + 1; base 2
  const int g = static_cast<int>(threadIdx.x % kWarp / 4), t = static_cast<int>(threadIdx.x % 4);

  static __device__ bool HasPiece(int piece) { return kKeyDim % 32 == 0 || piece < kKeyDim / 8; }
  __device__ bool HasGroup(int group) const { return kValueDim % 64 == 0 || 64 * group + 8 * g < kValueDim; }

  // Whether there are registers for the queries of the head to come.
  static constexpr bool kAhead = kTiles * (2 * kPieces * 4 + kGroups * 16) <= 128;
  __device__ __forceinline__ void LoadQueries(const AttendLaunch& launch, int32_t head, Queries& to) const {
    const int32_t cache = head / launch.args.kv_heads, kv_head = head % launch.args.kv_heads;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int row = n * kQueries + g;
      const auto* from = static_cast<const char*>(QueryRow(launch, min(row, launch.rows - 1), cache, kv_head));
#pragma unroll
      for (int i = 0; i < kPieces; ++i) to[n][i] = make_uint4(0, 0, 0, 0);
      if (row >= launch.rows) continue;
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (HasPiece(t + 4 * i)) to[n][i] = LoadQuery<T>(from, launch.args.q.dtype, 8 * (t + 4 * i));
    }
  }
  __device__ __forceinline__ void Take(const Queries& from) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < kPieces; ++i) q[n][i] = from[n][i];
  }
  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
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

  // The tile at `tile`, whose log weights are at `weights`: -inf for what is no key.
  __device__ __forceinline__ void Compute(char* tile, const float* weights, float scale, float exponent) {
    const auto lane = static_cast<int>(threadIdx.x % kWarp);
    const uint32_t free = __ballot_sync(0xFFFFFFFFu, weights[lane % kTile] == kMinusInfinity) & 0xFFFFu;
    if (free == 0xFFFFu) return;
    auto* value = tile + Layout::kKeyBytes;
    if (free != 0) {  // what free slots hold may be NaN: 0 times it would be, too
      for (int r = 0; r < kTile; ++r)
        if ((free >> r & 1) != 0)
          for (int i = lane; i < Layout::kValuePieces; i += kWarp)
            reinterpret_cast<uint4*>(value)[r * Layout::kValuePieces + i] = make_uint4(0, 0, 0, 0);
      __syncwarp();
    }
    float s[kTiles][4] = {}, s1[kTiles][4] = {};  // keys g, g, g + 8, g + 8 of queries 2t, 2t + 1, 2t, 2t + 1
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      uint4 k[2] = {};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = g + 8 * i;
        if (HasPiece(t + 4 * p))
          k[i] = reinterpret_cast<const uint4*>(tile)[row * Layout::kKeyPieces + Layout::KeyPiece(row, t + 4 * p)];
      }
      const uint32_t a0[4] = {k[0].x, k[1].x, k[0].y, k[1].y};
      const uint32_t a1[4] = {k[0].z, k[1].z, k[0].w, k[1].w};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        Mma<T>(s[n], a0, q[n][p].x, q[n][p].y);
        Mma<T>(s1[n], a1, q[n][p].z, q[n][p].w);
      }
    }
    const float weight[2] = {weights[g], weights[g + 8]};
    uint32_t p[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[n][i] = weight[i / 2] == kMinusInfinity
                      ? kMinusInfinity
                      : fminf(fmaxf((s[n][i] + s1[n][i]) * scale, -kLargestLogit), kLargestLogit) * kLog2E +
                            exponent * weight[i / 2] * kLog2E;
      Softmax(n, s[n]);
      p[n][0] = TransposeMatrix(Pack<T>(s[n][0], s[n][1]));
      p[n][1] = TransposeMatrix(Pack<T>(s[n][2], s[n][3]));
    }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      uint4 v[4] = {};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int row = 2 * t + r % 2 + r / 2 * 8;
        if (HasGroup(i))
          v[r] = reinterpret_cast<const uint4*>(value)[row * Layout::kValuePieces + Layout::ValuePiece(row, 8 * i + g)];
      }
      const uint32_t* rows[4] = {&v[0].x, &v[1].x, &v[2].x, &v[3].x};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t a[4] = {__byte_perm(rows[0][j], rows[1][j], 0x5410), __byte_perm(rows[0][j], rows[1][j], 0x7632),
                               __byte_perm(rows[2][j], rows[3][j], 0x5410),
                               __byte_perm(rows[2][j], rows[3][j], 0x7632)};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) Mma<T>(out[n][i][j], a, p[n][0], p[n][1]);
      }
    }
  }

  // Logits become what they count relative to the largest so far.
  __device__ __forceinline__ void Softmax(int n, float (&s)[4]) {
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
  }

  __device__ __forceinline__ void Rescale(int n, const float (&top)[2]) {
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

  // Rows [first, first + kMergeRows), not normalised: to (kMergeRows, kValueDim), states (kMergeRows).
  __device__ __forceinline__ void StoreRows(int32_t first, float* to, float2* states) const {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float total = sum[n][i];
#pragma unroll
        for (int offset = 4; offset < kWarp; offset *= 2) total += __shfl_xor_sync(0xFFFFFFFFu, total, offset);
        const int row = n * kQueries + 2 * t + i - first;
        if (row < 0 || row >= kMergeRows) continue;
        if (g == 0) states[row] = make_float2(max[n][i], total);
#pragma unroll
        for (int v = 0; v < kGroups; ++v)
          if (HasGroup(v)) {
            auto* at = reinterpret_cast<float4*>(to + row * kValueDim + 64 * v + 8 * g);
            const auto& o = out[n][v];
            at[0] = make_float4(o[0][i], o[0][2 + i], o[1][i], o[1][2 + i]);
            at[1] = make_float4(o[2][i], o[2][2 + i], o[3][i], o[3][2 + i]);
          }
      }
  }
};

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_ATTEND_TILE_CUH_
