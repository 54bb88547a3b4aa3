// Decode attention over 16-bit slabs, what one warp does: its way through the tiles of its share, their bytes on the way to
// shared memory, and their products.
//
// From shared memory tiles go into tensor-core fragments, by ldmatrix: keys as the A of S^T = K Q^T, values, transposed on the way,
// as the A of O^T = V^T P^T. Queries are the 8 columns of both; a transposition of P between the two products (movmatrix) is all
// that ever moves between threads while no logit is larger than those before.
#ifndef EXPRESS_SRC_CUDA_ATTEND_TILE_CUH_
#define EXPRESS_SRC_CUDA_ATTEND_TILE_CUH_

#include "src/cuda/attend.cuh"

namespace express::cuda {

// Elements at from[0] and from[1] of a query row, in the slab's type.
template <class T, class From>
__device__ __forceinline__ uint32_t LoadPair(const From* from) {
  if constexpr (std::is_same_v<From, float>) {
    const float2 x = *reinterpret_cast<const float2*>(from);
    return Pack<T>(x.x, x.y);
  } else {
    const uint32_t raw = *reinterpret_cast<const uint32_t*>(from);
    if constexpr (std::is_same_v<From, T>) return raw;
    const auto* x = reinterpret_cast<const From*>(&raw);
    return Pack<T>(ToFloat(x[0]), ToFloat(x[1]));
  }
}

__device__ __forceinline__ uint32_t TransposeMatrix(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// ---- a tile in shared memory: 16 keys, then 16 values; then, elsewhere, 16 log weights ----

// Where the 16-byte pieces of 16 rows of kPieces lie, so that the same piece of 8 consecutive rows lies in different banks: the
// pieces of a row change places among eight where that can be, else rows are an odd number of pieces apart.
template <int kPieces>
struct TileRows {
  static constexpr bool kSwizzled = kPieces % 8 == 0;
  static constexpr int kPitch = kSwizzled ? kPieces : kPieces | 1;
  static constexpr int kBytes = kTile * kPitch * 16;

  static __device__ __forceinline__ uint32_t Place(int row, int piece) {
    return static_cast<uint32_t>((row * kPitch + (kSwizzled ? piece ^ (row & 7) : piece)) * 16);
  }
  // The address of piece 2 step + p of a row, if that of its piece p, 0 or 1, is `base`. Tiles begin at multiples of 128 bytes.
  static __device__ __forceinline__ uint32_t At(uint32_t base, int step) {
    const auto pieces = static_cast<uint32_t>(2 * step);
    if constexpr (kSwizzled) return (base ^ ((pieces & 7) << 4)) + ((pieces & ~7u) << 4);
    return base + (pieces << 4);
  }
  // Begins to copy the first `valid` rows. A warp copies 32 pieces at a time; after kPeriod times it is at the same pieces again,
  // kPeriodRows on.
  static __device__ __forceinline__ void Copy(uint32_t to, const void* rows, int valid) {
    const int lane = static_cast<int>(threadIdx.x % kWarp);
    const char* from = static_cast<const char*>(rows) + lane * 16;
    if (valid < kTile) {
#pragma unroll 1
      for (int at = lane; at < valid * kPieces; at += kWarp, from += kWarp * 16)
        CopyAsync16(to + Place(at / kPieces, at % kPieces), from);
      return;
    }
#pragma unroll
    for (int i = 0; i < kTile * kPieces / kWarp; ++i) {
      const int at = i % kPeriod * kWarp + lane, first = i / kPeriod * kPeriodRows;
      uint32_t place = to + Place(at / kPieces, at % kPieces);
      if constexpr (kSwizzled) place ^= static_cast<uint32_t>((first & 7) << 4);
      CopyAsync16(place + static_cast<uint32_t>(first * kPitch * 16), from + i * kWarp * 16);
    }
  }

 private:
  static constexpr int Gcd(int a, int b) { return b == 0 ? a : Gcd(b, a % b); }
  static constexpr int kPeriod = kPieces / Gcd(kPieces, kWarp), kPeriodRows = kPeriod * kWarp / kPieces;
  static_assert(!kSwizzled || (kPeriodRows & (kPeriodRows - 1)) == 0 && kPeriodRows <= 8, "see Copy");
};

template <int kKeyDim, int kValueDim>
struct Tile {
  using Keys = TileRows<kKeyDim / 8>;
  using Values = TileRows<kValueDim / 8>;
  static constexpr int kBytes = Keys::kBytes + Values::kBytes;
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
  int32_t taken = 0;  // tiles of this head so far
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
      taken = 0;
      end = End();
      LookAhead();
    }
  }
  __device__ __forceinline__ void Advance() {
    tile += ranks;
    ++taken;
    Skip();
  }
  __device__ int Keys() const { return min(kTile, now.capacity - tile * kTile); }
  // Begins to copy the log weights of the tile `ahead_by` tiles on, if this head has such: -inf for what is no key.
  __device__ __forceinline__ void CopyWeights(float* to, int ahead_by) const {
    const int32_t at = tile + ahead_by * ranks, lane = static_cast<int32_t>(threadIdx.x % kWarp);
    if (at >= end || lane >= kTile) return;
    if (at * kTile + lane < now.capacity)
      CopyAsync4(SharedAddress(to + lane), now.log_weight + at * kTile + lane);
    else
      to[lane] = kMinusInfinity;
  }
  __device__ const T* Key() const { return now.key + static_cast<int64_t>(tile) * kTile * kKeyDim; }
  // Of 8-bit storage: behind the values.
  __device__ const RowScales* Scales() const {
    return reinterpret_cast<const RowScales*>(now.value + static_cast<int64_t>(now.capacity) * kValueDim) +
           tile * kTile;
  }
  __device__ const T* Value() const { return now.value + static_cast<int64_t>(tile) * kTile * kValueDim; }
};

// ---- one warp's share of the products: kTiles column tiles of 8 queries ----

template <class T, int kKeyDim, int kValueDim, int kTiles>
struct WarpState {
  using Layout = Tile<kKeyDim, kValueDim>;
  static constexpr int kSteps = kKeyDim / 16;       // of a contraction over a key
  static constexpr int kRowTiles = kValueDim / 16;  // of O^T
  using Queries = uint32_t[kTiles][kSteps][2];      // elements 2t, 2t + 1 of the two pieces of a step, of query g
  Queries q;
  float out[kTiles][kRowTiles][4];       // O^T: dims g and g + 8 of a row tile, queries 2t and 2t + 1
  float max[kTiles][2], sum[kTiles][2];  // of queries 2t, 2t + 1; base 2
  const int g = static_cast<int>(threadIdx.x % kWarp / 4), t = static_cast<int>(threadIdx.x % 4);

  // Whether there are registers for the queries of the head to come.
  static constexpr bool kAhead = kTiles * (4 * kSteps + 4 * kRowTiles) <= 128;
  // Elements kThread t + kPiece j, and the next, of piece j of a step.
  template <int kThread = 2, int kPiece = 8>
  __device__ __forceinline__ void LoadQueries(const AttendLaunch& launch, int32_t head, Queries& to) const {
    switch (launch.args.q.dtype) {
      case DType::kF32:
        return LoadQueriesOf<float, kThread, kPiece>(launch, head, to);
      case DType::kF16:
        return LoadQueriesOf<Half, kThread, kPiece>(launch, head, to);
      default:
        return LoadQueriesOf<BFloat16, kThread, kPiece>(launch, head, to);
    }
  }
  template <class From, int kThread, int kPiece>
  __device__ __forceinline__ void LoadQueriesOf(const AttendLaunch& launch, int32_t head, Queries& to) const {
    const int32_t cache = head / launch.args.kv_heads, kv_head = head % launch.args.kv_heads;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const int row = n * kQueries + g;
      const auto* from =
          static_cast<const From*>(QueryRow(launch, min(row, launch.rows - 1), cache, kv_head)) + kThread * t;
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j) to[n][i][j] = row < launch.rows ? LoadPair<T>(from + 16 * i + kPiece * j) : 0;
    }
  }
  __device__ __forceinline__ void Take(const Queries& from) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int i = 0; i < kSteps; ++i) q[n][i][0] = from[n][i][0], q[n][i][1] = from[n][i][1];
  }
  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      max[n][0] = max[n][1] = kMinusInfinity;
      sum[n][0] = sum[n][1] = 0;
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
        for (int x = 0; x < 4; ++x) out[n][j][x] = 0;
    }
  }

  // The tile at `tile` of shared memory, whose log weights are at `weights`: -inf for what is no key. `scale` and `exponent` are for
  // base 2.
  __device__ __forceinline__ void Compute(uint32_t tile, const float* weights, float scale, float exponent) {
    const auto lane = static_cast<int>(threadIdx.x % kWarp);
    const float weight[2] = {weights[g], weights[g + 8]};
    const uint32_t free = __ballot_sync(0xFFFFFFFFu, weights[lane % kTile] == kMinusInfinity) & 0xFFFFu;
    if (free == 0xFFFFu) return;
    const uint32_t values = tile + Layout::Keys::kBytes;
    if (free != 0) ClearValues(values, free);
    float s[kTiles][2][4] = {};  // keys g, g, g + 8, g + 8 of queries 2t, 2t + 1, 2t, 2t + 1; in two sums
    const uint32_t key = tile + Layout::Keys::Place(lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t a[4];
      LoadMatrices(a, Layout::Keys::At(key, i));
#pragma unroll
      for (int n = 0; n < kTiles; ++n) Mma<T>(s[n][i % 2], a, q[n][i][0], q[n][i][1]);
    }
    uint32_t p[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        x[i] = weight[i / 2] == kMinusInfinity
                   ? kMinusInfinity
                   : fminf(fmaxf((s[n][0][i] + s[n][1][i]) * scale, -kLargestLogit), kLargestLogit) +
                         exponent * weight[i / 2];
      Softmax(n, x);
      p[n][0] = TransposeMatrix(Pack<T>(x[0], x[1]));
      p[n][1] = TransposeMatrix(Pack<T>(x[2], x[3]));
    }
    const uint32_t value = values + Layout::Values::Place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      uint32_t a[4];
      LoadMatricesTransposed(a, Layout::Values::At(value, j));
#pragma unroll
      for (int n = 0; n < kTiles; ++n) Mma<T>(out[n][j], a, p[n][0], p[n][1]);
    }
  }

  // What free slots hold may be NaN: 0 times it would be, too.
  static __device__ __forceinline__ void ClearValues(uint32_t values, uint32_t free) {
    const auto lane = static_cast<int>(threadIdx.x % kWarp);
    for (; free != 0; free &= free - 1)
      if (lane < Layout::Values::kPitch)
        asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                         values + static_cast<uint32_t>(
                                      ((__ffs(static_cast<int>(free)) - 1) * Layout::Values::kPitch + lane) * 16)),
                     "r"(0)
                     : "memory");
    __syncwarp();
  }

  // Logits become what they count relative to the largest so far.
  __device__ __forceinline__ void Softmax(int n, float (&s)[4]) {
    const float top[2] = {fmaxf(s[0], s[2]), fmaxf(s[1], s[3])};
    if (__any_sync(0xFFFFFFFFu, top[0] > max[n][0] || top[1] > max[n][1])) Rescale(n, top);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = max[n][i % 2] == kMinusInfinity ? 0 : Exp2(s[i] - max[n][i % 2]);
      sum[n][i % 2] += s[i];
    }
  }

  // `top`: the largest logits of this thread.
  __device__ __forceinline__ void Rescale(int n, const float (&top)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float next = fmaxf(max[n][i], top[i]);
#pragma unroll
      for (int offset = 4; offset < kWarp; offset *= 2) next = fmaxf(next, __shfl_xor_sync(0xFFFFFFFFu, next, offset));
      const float factor = max[n][i] == kMinusInfinity ? 0 : Exp2(max[n][i] - next);
      max[n][i] = next;
      sum[n][i] *= factor;
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) out[n][j][i] *= factor, out[n][j][2 + i] *= factor;
    }
  }

  // Rows [first, first + kMergeRows), not normalised: to (kMergeRows) rows of kPitch, states (kMergeRows).
  template <int kPitch>
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
        for (int j = 0; j < kRowTiles; ++j)
#pragma unroll
          for (int x = 0; x < 2; ++x) to[row * kPitch + 16 * j + 8 * x + g] = out[n][j][2 * x + i];
      }
  }
};

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_ATTEND_TILE_CUH_
