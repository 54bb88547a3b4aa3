// The prefill for Hopper: one warpgroup gathers keys and values into a ring of tiles, two multiply (wgmma), as in
// FlashAttention-3 (Shah et al., arXiv:2407.08608): products of one tile run beside the softmax of the next. The two are
// left to themselves: made to take turns, as there, they are no faster (bench/results/cuda.md).
#include <algorithm>

#include "src/cuda/hopper.cuh"
#include "src/cuda/prefill.cuh"

namespace express::cuda {
namespace {

constexpr int kConsumers = 2;  // warpgroups of 64 query rows
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kRows = kConsumers * 64;
constexpr int kKeys = 128;  // of a tile
constexpr int kStages = 2;
constexpr int kProducerRegisters = 88, kConsumerRegisters = 208;
static_assert(kWarpgroup * (kProducerRegisters + kConsumers * kConsumerRegisters) <= 64 * 1024);

// A tile of `kCount` rows of kDim elements: panels of 64 elements, each (kCount, 128 bytes), swizzled as SharedMatrix says.
template <int kDim, int kCount>
struct Tile {
  static constexpr int kPieces = kDim / 8;  // of 16 bytes, of a row
  static constexpr uint32_t kPanel = kCount * 128, kBytes = kDim / 64 * kPanel;
  static __device__ __forceinline__ uint32_t At(int row, int piece) {
    return static_cast<uint32_t>(piece / 8) * kPanel + static_cast<uint32_t>(row * 128 + ((piece ^ row) & 7) * 16);
  }
};

// What the warpgroups that multiply do with the queries of one buffer.
struct __align__(16) Work {
  int32_t tiles;      // 0: no more work
  int32_t far_count;  // keys with a bias are the first
  int32_t away;       // key j is seen by query row r if j <= r + away
  int32_t rows;
  int64_t first;  // row of the prompt
  int32_t query_head, unused;
};

template <int kDim>
struct Memory {
  using Queries = Tile<kDim, kRows>;
  using Keys = Tile<kDim, kKeys>;
  static constexpr uint32_t kQuery = 0;  // (2): one job's queries are fetched while the last one's are in use
  static constexpr uint32_t kKey = kQuery + 2 * Queries::kBytes;
  static constexpr uint32_t kValue = kKey + kStages * Keys::kBytes;
  static constexpr uint32_t kBias = kValue + kStages * Keys::kBytes;  // (kStages, kKeys), over the softmax scale
  static constexpr uint32_t kWork = kBias + kStages * kKeys * sizeof(float);  // (2): of the queries in each buffer
  static constexpr uint32_t kBarriers = kWork + 2 * sizeof(Work);
  static constexpr uint32_t kBytes = kBarriers + 12 * sizeof(uint64_t);
  static constexpr uint32_t kAligned = 1024;  // and so many bytes more, to begin at a multiple of this
  static_assert(kStages == 2);

  uint32_t base;  // shared address
  __device__ uint32_t Query(uint32_t buffer) const { return base + kQuery + buffer * Queries::kBytes; }
  __device__ uint32_t Key(uint32_t stage) const { return base + kKey + stage * Keys::kBytes; }
  __device__ uint32_t Value(uint32_t stage) const { return base + kValue + stage * Keys::kBytes; }
  __device__ uint32_t Bias(uint32_t stage) const { return base + kBias + stage * kKeys * 4; }
  __device__ uint32_t WorkOf(uint32_t buffer) const { return base + kWork + buffer * sizeof(Work); }
  __device__ uint32_t Barrier(int which, uint32_t i) const { return base + kBarriers + (which * 2 + i) * 8; }
  __device__ uint32_t QueryFull(uint32_t i) const { return Barrier(0, i); }
  __device__ uint32_t QueryEmpty(uint32_t i) const { return Barrier(1, i); }
  __device__ uint32_t KeyFull(uint32_t i) const { return Barrier(2, i); }
  __device__ uint32_t KeyEmpty(uint32_t i) const { return Barrier(3, i); }
  __device__ uint32_t ValueFull(uint32_t i) const { return Barrier(4, i); }
  __device__ uint32_t ValueEmpty(uint32_t i) const { return Barrier(5, i); }

  __device__ void Init() const {
    constexpr int kReaders = kConsumers * kWarpgroup / kWarp;  // warps
    for (uint32_t i = 0; i < 2; ++i) {
      BarrierInit(QueryFull(i), kWarpgroup + 1);  // copies and what work it is
      BarrierInit(QueryEmpty(i), kReaders);
      BarrierInit(KeyFull(i), kWarpgroup / 2 * 2);  // copies and biases
      BarrierInit(KeyEmpty(i), kReaders);
      BarrierInit(ValueFull(i), kWarpgroup / 2);
      BarrierInit(ValueEmpty(i), kReaders);
    }
  }
};

__device__ __forceinline__ void StoreShared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
__device__ __forceinline__ void StoreShared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void StoreShared16(uint32_t address, const uint4& x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}
__device__ __forceinline__ float2 LoadShared2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ __forceinline__ uint4 LoadShared16(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// ---- the warpgroup that gathers ----

// Jobs [begin, end) of one KV head, tile after tile. A job's keys are its far list, then its rows, without a gap.
class Cursor {
 public:
  __device__ Cursor(const PrefillArgs& args, const PrefillHead& head, int32_t kv_head, int32_t begin, int32_t end)
      : args_(args), head_(head), kv_head_(kv_head), next_(begin), end_(end) {
    far_ahead_ = FarCount(begin);
    NextJob();
  }
  __device__ bool valid() const { return first < count; }
  __device__ void Advance() {
    first += kKeys;
    if (first >= count) NextJob();
  }

  PrefillJob job;
  int32_t first = 0, count = 0, far_count = 0;  // of the job's keys, [first, first + kKeys) is the tile

 private:
  __device__ void NextJob() {
    first = count = 0;
    while (next_ < end_) {
      const bool any = FindJob(args_, kRows, kv_head_, next_, job);
      far_count = far_ahead_;
      far_ahead_ = FarCount(++next_);  // is there by the next job's time
      if (!any) continue;
      count = far_count + static_cast<int32_t>(job.last - job.begin);
      return;
    }
  }
  __device__ int32_t FarCount(int32_t index) const {
    return index < end_ ? head_.far_count[PrefillBlockOf(args_, kRows, index)] : 0;
  }

  const PrefillArgs& args_;
  const PrefillHead& head_;
  const int32_t kv_head_;
  int32_t next_, far_ahead_;
  const int32_t end_;
};

// Each warp for itself: two fetch keys, two fetch values, half the rows of a tile each.
template <int kDim>
class Producer {
 public:
  __device__ Producer(const PrefillArgs& args, const PrefillHead& head, int32_t kv_head, const Memory<kDim>& memory)
      : memory_(memory),
        args_(args),
        head_(head),
        rows_(RowAt(keys_ ? args.k : args.v, 0, kv_head)),
        slab_(static_cast<const char*>(keys_ ? head.slab_key : head.slab_value)),
        row_bytes_((keys_ ? args.k : args.v).row_stride * 2) {}

  __device__ void Run(Cursor cursor) {
    int32_t index[kOwn];
    float bias[kOwn];
    LookUp(cursor, index, bias);
    while (cursor.valid()) {
      if (cursor.first == 0) LoadQueries(cursor);
      const int32_t left = cursor.count - cursor.first - half_ * kHalf;  // rows of the tile's half
      const char* from[kOwn];
      float own_bias[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        from[i] = index[i] < 0 ? slab_ + int64_t{-1 - index[i]} * (kDim * 2) : rows_ + index[i] * row_bytes_;
        own_bias[i] = bias[i];
      }
      cursor.Advance();
      LookUp(cursor, index, bias);  // on its way while this tile is copied
      Copy(from, own_bias, left);
      ++tiles_;
    }
    EndWork();
  }

 private:
  using Layout = typename Memory<kDim>::Keys;
  using QueryLayout = typename Memory<kDim>::Queries;
  static constexpr int kHalf = kKeys / 2, kOwn = kHalf / kWarp;               // rows of a warp, and of a lane
  static constexpr int kPieces = Layout::kPieces, kAtOnce = kWarp / kPieces;  // lanes to a row, rows at once
  static_assert(kAtOnce == 2 || kAtOnce == 4);

  // Lane l has rows l, l + 32 of the half.
  __device__ __forceinline__ void LookUp(const Cursor& cursor, int32_t (&index)[kOwn], float (&bias)[kOwn]) const {
    const int64_t list = int64_t{cursor.job.block} * head_.far_capacity;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int32_t j = cursor.first + half_ * kHalf + i * kWarp + lane_;
      index[i] = 0;
      bias[i] = 0;
      if (j < cursor.far_count && j < cursor.count) {
        index[i] = head_.far_index[list + j];
        if (keys_) bias[i] = head_.far_bias[list + j];
      } else if (j < cursor.count) {
        index[i] = static_cast<int32_t>(cursor.job.begin) + j - cursor.far_count;
      }
    }
  }

  __device__ __forceinline__ void Copy(const char* const (&from)[kOwn], const float (&bias)[kOwn], int32_t left) const {
    const uint32_t stage = tiles_ % kStages, free = tiles_ / kStages % 2 ^ 1;
    BarrierWait(keys_ ? memory_.KeyEmpty(stage) : memory_.ValueEmpty(stage), free);
    const uint32_t tile =
        (keys_ ? memory_.Key(stage) : memory_.Value(stage)) + static_cast<uint32_t>(half_) * kHalf * 128;
    const int32_t row = lane_ / kPieces, piece = lane_ % kPieces;
    constexpr int kTogether = 8;  // their addresses are on their way together
#pragma unroll
    for (int first = 0; first < kHalf / kAtOnce; first += kTogether) {
      const char* at[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int begin = (first + i) * kAtOnce;
        const auto source = reinterpret_cast<uint64_t>(from[begin / kWarp]);
        at[i] = reinterpret_cast<const char*>(__shfl_sync(0xFFFFFFFFu, source, begin % kWarp + row)) + piece * 16;
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int begin = (first + i) * kAtOnce;
        CopyAsync16(tile + Layout::At(begin + row, piece), at[i], begin + row < left);
      }
    }
    if (!keys_) return BarrierArriveAfterCopies(memory_.ValueFull(stage));
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
      StoreShared(memory_.Bias(stage) + (half_ * kHalf + i * kWarp + lane_) * 4, bias[i] / args_.scale);
    BarrierArriveAfterCopies(memory_.KeyFull(stage));
    BarrierArrive(memory_.KeyFull(stage));
  }

  // A quarter of the job's queries, and what is to be done with them.
  __device__ void LoadQueries(const Cursor& cursor) {
    const PrefillJob& job = cursor.job;
    const auto rows = static_cast<int32_t>(job.last - job.first);
    const uint32_t buffer = BeginBuffer();
    const int32_t first = warp_ * (kRows / 4) + lane_ / kPieces, piece = lane_ % kPieces;
    const char* from = RowAt(args_.q, job.first, job.query_head) + piece * 16;
#pragma unroll 4
    for (int i = 0; i < kRows / 4 / kAtOnce; ++i) {
      const int32_t row = first + i * kAtOnce;
      CopyAsync16(memory_.Query(buffer) + QueryLayout::At(row, piece),
                  from + (row < rows ? row : 0) * args_.q.row_stride * 2, row < rows);
    }
    const auto away = static_cast<int32_t>(job.first - job.begin) + cursor.far_count;
    EndBuffer(buffer, {static_cast<int32_t>(CeilDiv(cursor.count, kKeys)), cursor.far_count, away, rows, job.first,
                       job.query_head, 0});
  }
  __device__ void EndWork() {
    const uint32_t buffer = BeginBuffer();
    EndBuffer(buffer, {});
  }
  __device__ uint32_t BeginBuffer() const {
    BarrierWait(memory_.QueryEmpty(jobs_ % 2), jobs_ / 2 % 2 ^ 1);
    return jobs_ % 2;
  }
  __device__ void EndBuffer(uint32_t buffer, const Work& work) {
    if (warp_ == 0 && lane_ == 0) {
      StoreShared16(memory_.WorkOf(buffer), *reinterpret_cast<const uint4*>(&work));
      StoreShared16(memory_.WorkOf(buffer) + 16, *(reinterpret_cast<const uint4*>(&work) + 1));
      BarrierArrive(memory_.QueryFull(buffer));
    }
    BarrierArriveAfterCopies(memory_.QueryFull(buffer));
    ++jobs_;
  }

  const Memory<kDim> memory_;
  const PrefillArgs& args_;
  const PrefillHead& head_;
  uint32_t jobs_ = 0, tiles_ = 0;
  const int32_t warp_ = static_cast<int32_t>(threadIdx.x) % kWarpgroup / kWarp,
                lane_ = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int32_t half_ = warp_ % 2;
  const bool keys_ = warp_ < 2;
  const char* rows_;
  const char* slab_;
  const int64_t row_bytes_;
};

// ---- the warpgroups that multiply ----

template <class T, int kDim>
class Consumer {
 public:
  __device__ Consumer(const PrefillArgs& args, const Memory<kDim>& memory, int group)
      : args_(args), memory_(memory), group_(group), scale2_(args.scale * kLog2E) {}

  // The next work; false if there is none.
  __device__ __forceinline__ bool Run() {
    const uint32_t buffer = jobs_ % 2;
    BarrierWait(memory_.QueryFull(buffer), jobs_ / 2 % 2);
    const uint4 work = LoadShared16(memory_.WorkOf(buffer));
    const auto tiles = static_cast<int32_t>(work.x);
    if (tiles == 0) return false;
    const int32_t away = static_cast<int32_t>(work.z) + group_ * 64;  // of this warpgroup's rows
    const int32_t mine = min(tiles, (away + 63) / kKeys + 1);
    // Of the last tile maybe only the first half is seen. Alike in all threads, and the compiler is told so.
    const bool half = __shfl_sync(0xFFFFFFFFu, mine > 1 && away + 63 - (mine - 1) * kKeys < kKeys / 2, 0);
    const uint32_t query = SharedMatrix(memory_.Query(buffer) + static_cast<uint32_t>(group_) * 64 * 128, 0);
    ++jobs_;
    float out[kDim / 2], s[kKeys / 2], zero[2] = {kLowest, kLowest}, sum[2] = {0, 0}, factor[2];
    uint32_t p[kKeys / 16][4];
#pragma unroll
    for (float& x : out) x = 0;

    WaitFor(memory_.KeyFull(tiles_ % 2));
    Logits(query, s);
    ProductsWait<0>();
    ProductsHold(s);
    Release(memory_.KeyEmpty(tiles_ % 2));
    Mask(0, away, s);
    Raise(s, zero, sum, factor);
    Softmax(s, zero, sum);
    Convert(s, p);
    // The products of `tile`, as many keys as sums has room for, beside those of the tile before with its values.
    const auto step = [&](int32_t tile, auto& sums) {
      const uint32_t before = tiles_ % 2, before_parity = tiles_ / 2 % 2;
      ++tiles_;
      WaitFor(memory_.KeyFull(tiles_ % 2));
      Logits(query, sums);
      BarrierWait(memory_.ValueFull(before), before_parity);
      FenceForProducts();
      Accumulate<kKeys>(p, before, out);
      ProductsWait<1>();
      ProductsHold(sums);
      Release(memory_.KeyEmpty(tiles_ % 2));
      Mask(tile, away, sums);
      const bool raised = Raise(sums, zero, sum, factor);
      Softmax(sums, zero, sum);
      Here(sum);
      ProductsWait<0>();
      ProductsHold(out);
      Release(memory_.ValueEmpty(before));
      if (raised) {
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) out[i] *= factor[i / 2 % 2];
      }
      Convert(sums, p);
    };
    const int32_t whole = half ? mine - 1 : mine;
    for (int32_t tile = 1; tile < whole; ++tile) step(tile, s);
    if (half) {
      step(whole, reinterpret_cast<float(&)[kKeys / 4]>(s));
      LastValues<kKeys / 2>(p, out);
    } else {
      LastValues<kKeys>(p, out);
    }
    Release(memory_.ValueEmpty(tiles_ % 2));
    ++tiles_;
    for (int32_t tile = mine; tile < tiles; ++tile, ++tiles_) {  // what only later queries see
      BarrierWait(memory_.KeyFull(tiles_ % 2), tiles_ / 2 % 2);
      Release(memory_.KeyEmpty(tiles_ % 2));
      BarrierWait(memory_.ValueFull(tiles_ % 2), tiles_ / 2 % 2);
      Release(memory_.ValueEmpty(tiles_ % 2));
    }
    Store(out, zero, sum, (jobs_ + 1) % 2);
    Release(memory_.QueryEmpty((jobs_ + 1) % 2));
    return true;
  }

 private:
  using Layout = typename Memory<kDim>::Keys;
  using QueryLayout = typename Memory<kDim>::Queries;

  // The phase of tile number tiles_.
  __device__ __forceinline__ void WaitFor(uint32_t barrier) const {
    BarrierWait(barrier, tiles_ / 2 % 2);
    FenceForProducts();
  }
  __device__ __forceinline__ void Release(uint32_t barrier) const {
    __syncwarp();
    if (lane_ == 0) BarrierArrive(barrier);
  }

  // Where products begin: log weights.
  template <int kCount>
  __device__ __forceinline__ void Bias(float (&s)[kCount]) const {
    const uint32_t bias = memory_.Bias(tiles_ % 2) + lane_ % 4 * 8;
#pragma unroll
    for (uint32_t n = 0; n < kCount / 4; ++n) {
      const float2 b = LoadShared2(bias + n * 32);
      s[4 * n] = s[4 * n + 2] = b.x;
      s[4 * n + 1] = s[4 * n + 3] = b.y;
    }
  }
  // Logits of the first 2 kCount keys of the tile, and what is given out with values of the first kOf: each a batch of products.
  template <int kCount>
  __device__ __forceinline__ void Logits(uint32_t query, float (&s)[kCount]) const {
    Bias(s);
    ProductsBegin();
    const uint32_t key = SharedMatrix(memory_.Key(tiles_ % 2), 0);
#pragma unroll
    for (uint32_t k = 0; k < kDim / 16; ++k)
      ProductOfRows<T>(s, Advance(query, k / 4 * QueryLayout::kPanel + k % 4 * 32),
                       Advance(key, k / 4 * Layout::kPanel + k % 4 * 32));
    ProductsCommit();
  }
  template <int kOf>
  __device__ __forceinline__ void Accumulate(const uint32_t (&p)[kKeys / 16][4], uint32_t stage,
                                             float (&out)[kDim / 2]) const {
    ProductsBegin();
    const uint32_t value = SharedMatrix(memory_.Value(stage), Layout::kPanel);
#pragma unroll
    for (uint32_t k = 0; k < kOf / 16; ++k) Product<T>(out, p[k], Advance(value, k * 16 * 128));
    ProductsCommit();
  }
  // Each branch of an `if` waits for its own products: the compiler would else give up their overlap everywhere.
  template <int kOf>
  __device__ __forceinline__ void LastValues(const uint32_t (&p)[kKeys / 16][4], float (&out)[kDim / 2]) const {
    WaitFor(memory_.ValueFull(tiles_ % 2));
    Accumulate<kOf>(p, tiles_ % 2, out);
    ProductsWait<0>();
    ProductsHold(out);
  }

  // Takes out keys after the query.
  template <int kCount>
  __device__ __forceinline__ void Mask(int32_t tile, int32_t away, float (&s)[kCount]) const {
    const int32_t seen = away - tile * kKeys;  // by the first row
    if (seen >= kKeys - 1) return;
    const int32_t row = warp_ * 16 + lane_ / 4 + seen - lane_ % 4 * 2;  // of which keys 8 n + i % 2 are seen
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * n + i % 2 > row + i / 2 * 8) s[4 * n + i] = kMinusInfinity;
  }

  // Probabilities are relative to 2^zero, at most 2^kSlack of it: a logit beyond that raises the row's zero, and what there
  // is of the row counts `factor` from then on. False if no row of the warp is raised.
  template <int kCount>
  __device__ __forceinline__ bool Raise(const float (&s)[kCount], float (&zero)[2], float (&sum)[2],
                                        float (&factor)[2]) const {
    float top[2] = {kMinusInfinity, kMinusInfinity};
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) top[r] = fmaxf(top[r], fmaxf(s[4 * n + 2 * r], s[4 * n + 2 * r + 1]));
    const bool above = fmaf(top[0], scale2_, -zero[0]) > kSlack || fmaf(top[1], scale2_, -zero[1]) > kSlack;
    if (!__any_sync(0xFFFFFFFFu, above)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xFFFFFFFFu, top[r], 1));
      top[r] = fmaxf(top[r], __shfl_xor_sync(0xFFFFFFFFu, top[r], 2));
      const float next = fmaxf(zero[r], top[r] * scale2_);
      factor[r] = Exp2(zero[r] - next);
      zero[r] = next;
      sum[r] *= factor[r];
    }
    return true;
  }
  // From logits to probabilities.
  template <int kCount>
  __device__ __forceinline__ void Softmax(float (&s)[kCount], const float (&zero)[2], float (&sum)[2]) const {
    float total[2][2] = {};
#pragma unroll
    for (int n = 0; n < kCount / 4; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& x = s[4 * n + i];
        x = Exp2(fmaf(x, scale2_, -zero[i / 2]));
        total[i / 2][i % 2] += x;
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] += total[r][0] + total[r][1];
  }
  // Nothing is done, but not before the sums are there: or else the compiler moves the softmax behind the wait for the
  // products beside which it should run.
  __device__ __forceinline__ void Here(const float (&sum)[2]) const {
    if (sum[0] + sum[1] < 0) asm volatile("nanosleep.u32 0;" ::: "memory");
  }
  template <int kCount>
  __device__ __forceinline__ void Convert(const float (&s)[kCount], uint32_t (&p)[kKeys / 16][4]) const {
#pragma unroll
    for (int k = 0; k < kCount / 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) p[k][i] = Pack<T>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
  }

  // Through the shared memory of this warp's own queries, which have been used, so that rows are written whole.
  __device__ __forceinline__ void Store(const float (&out)[kDim / 2], const float (&zero)[2], const float (&sum)[2],
                                        uint32_t buffer) const {
    const uint4 work[2] = {LoadShared16(memory_.WorkOf(buffer)), LoadShared16(memory_.WorkOf(buffer) + 16)};
    const auto rows = static_cast<int32_t>(work[0].w), query_head = static_cast<int32_t>(work[1].z);
    const auto first_row = static_cast<int64_t>(uint64_t{work[1].y} << 32 | work[1].x);
    const uint32_t queries = memory_.Query(buffer);
    // Read anew: addresses made of it are not kept in registers while tiles are multiplied.
    uint32_t thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    const auto lane = static_cast<int32_t>(thread % kWarp);
    const int32_t first = static_cast<int32_t>(thread) / kWarp * 16;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
      const float inverse = __fdividef(1.0f, total);
      const int32_t row = first + r * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        StoreShared(queries + QueryLayout::At(row, n) + lane % 4 * 4,
                    Pack<T>(out[4 * n + 2 * r] * inverse, out[4 * n + 2 * r + 1] * inverse));
      if (args_.lse != nullptr && lane % 4 == 0 && row < rows)
        args_.lse[(first_row + row) * args_.lse_row_stride + query_head * args_.lse_head_stride] =
            zero[r] * kLn2 + logf(total);
    }
    __syncwarp();
    char* to = const_cast<char*>(RowAt(args_.out, first_row, query_head));
#pragma unroll
    for (int i = 0; i < 16 * QueryLayout::kPieces / kWarp; ++i) {
      const int at = i * kWarp + lane, row = first + at / QueryLayout::kPieces, piece = at % QueryLayout::kPieces;
      if (row < rows)
        *reinterpret_cast<uint4*>(to + row * args_.out.row_stride * 2 + piece * 16) =
            LoadShared16(queries + QueryLayout::At(row, piece));
    }
  }

  static constexpr float kLn2 = 0.693147181f, kLowest = -3e38f, kSlack = 8;

  const PrefillArgs& args_;
  const Memory<kDim> memory_;
  const int group_;
  const float scale2_;
  uint32_t jobs_ = 0, tiles_ = 0;
  const int warp_ = static_cast<int>(threadIdx.x) % kWarpgroup / kWarp, lane_ = static_cast<int>(threadIdx.x) % kWarp;
};

// Block b has jobs [b * each, (b + 1) * each) of KV head y; or all heads' last jobs come first.
template <class T, int kDim>
__global__ __launch_bounds__(kThreads, 1) void PrefillKernel(const __grid_constant__ PrefillArgs args, int32_t each) {
  extern __shared__ char shared[];
  const uint32_t address = SharedAddress(shared);
  constexpr uint32_t kAligned = Memory<kDim>::kAligned;
  const Memory<kDim> memory{(address + kAligned - 1) / kAligned * kAligned};
  if (threadIdx.x == 0) {
    memory.Init();
    FenceForProducts();
  }
  __syncthreads();
  auto kv_head = static_cast<int32_t>(blockIdx.y), piece = static_cast<int32_t>(blockIdx.x);
  if (args.last_first) {
    const int32_t at = kv_head * static_cast<int32_t>(gridDim.x) + piece;
    kv_head = at % args.kv_heads;
    piece = static_cast<int32_t>(gridDim.x) - 1 - at / args.kv_heads;
  }
  const int32_t begin = piece * each;
  const int32_t end = min(begin + each, static_cast<int32_t>(PrefillJobs(args, kRows)));
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (group == kConsumers) {
    GiveRegisters<kProducerRegisters>();
    const PrefillHead head = args.heads[kv_head];
    Producer<kDim>(args, head, kv_head, memory).Run(Cursor(args, head, kv_head, begin, end));
  } else {
    TakeRegisters<kConsumerRegisters>();
    Consumer<T, kDim> consumer(args, memory, group);
    while (consumer.Run()) {
    }
  }
}

constexpr int64_t kRounds = 4;       // of blocks, at least, if there are enough jobs: others' kernels come in between
constexpr int32_t kMostJobs = 8;     // of a block
constexpr double kBlockCost = 0.15;  // what a block costs beyond its jobs, in jobs: its first tiles are waited for

// Jobs of a block: as few as possible at the end of the last round with nothing to do for most multiprocessors.
int32_t JobsOfBlock(int64_t jobs, int64_t kv_heads, int64_t at_once) {
  int32_t best = 1;
  double least = std::numeric_limits<double>::max();
  for (int32_t each = 1; each <= kMostJobs; ++each) {
    const int64_t rounds = CeilDiv(CeilDiv(jobs, each) * kv_heads, at_once);
    const double cost = static_cast<double>(rounds) * (each + kBlockCost);
    if ((each > 1 && rounds < kRounds) || cost >= least) continue;
    best = each;
    least = cost;
  }
  return best;
}

template <class T, int kDim>
void Run(const PrefillArgs& args, int32_t multiprocessors, cudaStream_t stream) {
  const int64_t jobs = PrefillJobs(args, kRows);
  const int32_t each = JobsOfBlock(jobs, args.kv_heads, std::max(1, multiprocessors));
  const auto bytes = static_cast<int>(Memory<kDim>::kBytes + Memory<kDim>::kAligned);
  cudaFuncSetAttribute(PrefillKernel<T, kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const dim3 grid(static_cast<uint32_t>(CeilDiv(jobs, each)), static_cast<uint32_t>(args.kv_heads));
  PrefillKernel<T, kDim><<<grid, kThreads, bytes, stream>>>(args, each);
}

}  // namespace

bool PrefillHopper(const PrefillArgs& args, int32_t multiprocessors, cudaStream_t stream) {
  const bool half = args.dtype == DType::kF16;
  if ((!half && args.dtype != DType::kBF16) || args.key_dim != args.value_dim) return false;
  if (args.key_dim == 64)
    half ? Run<Half, 64>(args, multiprocessors, stream) : Run<BFloat16, 64>(args, multiprocessors, stream);
  else if (args.key_dim == 128)
    half ? Run<Half, 128>(args, multiprocessors, stream) : Run<BFloat16, 128>(args, multiprocessors, stream);
  else
    return false;
  return true;
}

}  // namespace express::cuda
