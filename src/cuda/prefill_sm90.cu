// The prefill for Hopper: one warpgroup gathers keys and values into a ring of tiles, two multiply (wgmma), as in
// FlashAttention-3 (Shah et al., arXiv:2407.08608): products of one tile run beside the softmax of the next.
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
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;
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

template <int kDim>
struct Memory {
  using Queries = Tile<kDim, kRows>;
  using Keys = Tile<kDim, kKeys>;
  static constexpr uint32_t kQuery = 0;  // (2): one job's queries are fetched while the last one's are in use
  static constexpr uint32_t kKey = kQuery + 2 * Queries::kBytes;
  static constexpr uint32_t kValue = kKey + kStages * Keys::kBytes;
  static constexpr uint32_t kBias = kValue + kStages * Keys::kBytes;  // (kStages, kKeys), over the softmax scale
  static constexpr uint32_t kBarriers = kBias + kStages * kKeys * sizeof(float);
  static constexpr uint32_t kBytes = kBarriers + 12 * sizeof(uint64_t);
  static constexpr uint32_t kAligned = 1024;  // and so many bytes more, to begin at a multiple of this
  static_assert(kStages == 2);

  uint32_t base;  // shared address
  __device__ uint32_t Query(uint32_t buffer) const { return base + kQuery + buffer * Queries::kBytes; }
  __device__ uint32_t Key(uint32_t stage) const { return base + kKey + stage * Keys::kBytes; }
  __device__ uint32_t Value(uint32_t stage) const { return base + kValue + stage * Keys::kBytes; }
  __device__ uint32_t Bias(uint32_t stage) const { return base + kBias + stage * kKeys * 4; }
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
      BarrierInit(QueryFull(i), kWarpgroup);
      BarrierInit(QueryEmpty(i), kReaders);
      BarrierInit(KeyFull(i), 2 * kWarpgroup);  // copies and biases
      BarrierInit(KeyEmpty(i), kReaders);
      BarrierInit(ValueFull(i), kWarpgroup);
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

// The tiles of a job: its far list, then its rows, without a gap.
struct Keys {
  int32_t far_count;
  int64_t count;
  __device__ Keys(const PrefillArgs& args, const PrefillJob& job)
      : far_count(args.heads[job.kv_head].far_count[job.block]), count(far_count + job.last - job.begin) {}
  __device__ int32_t tiles() const { return static_cast<int32_t>(CeilDiv(count, kKeys)); }
};

// ---- the warpgroup that gathers ----

template <int kDim>
class Producer {
 public:
  __device__ Producer(const PrefillArgs& args, const Memory<kDim>& memory) : args_(args), memory_(memory) {}

  __device__ void Run(const PrefillJob& job) {
    LoadQueries(job);
    const PrefillHead& head = args_.heads[job.kv_head];
    const Keys keys(args_, job);
    const char *key_rows = RowAt(args_.k, 0, job.kv_head) + piece_ * 16, *value_rows = RowAt(args_.v, 0, job.kv_head) + piece_ * 16;
    const char *slab_key = static_cast<const char*>(head.slab_key) + piece_ * 16,
               *slab_value = static_cast<const char*>(head.slab_value) + piece_ * 16;
    const int64_t key_bytes = args_.k.row_stride * 2, value_bytes = args_.v.row_stride * 2;
    const int32_t* list = head.far_index + int64_t{job.block} * head.far_capacity;
    const float* weights = head.far_bias + int64_t{job.block} * head.far_capacity;
    const auto count = static_cast<int32_t>(keys.count);
    const auto away = static_cast<int32_t>(job.begin) - keys.far_count;  // from a key's number to its row
    for (int32_t first = 0; first < count; first += kKeys, ++tiles_) {
      int32_t index[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int32_t j = first + row_ + i * kApart;
        index[i] = j < keys.far_count ? list[j] : j < count ? j + away : kSkip;
      }
      const int32_t own = first + thread_;
      const float bias = own < keys.far_count ? weights[own] / args_.scale : 0;
      const uint32_t stage = tiles_ % kStages, free = tiles_ / kStages % 2 ^ 1;
      BarrierWait(memory_.KeyEmpty(stage), free);
      Copy(index, memory_.Key(stage), key_rows, key_bytes, slab_key);
      StoreShared(memory_.Bias(stage) + thread_ * 4, bias);
      BarrierArriveAfterCopies(memory_.KeyFull(stage));
      BarrierArrive(memory_.KeyFull(stage));
      BarrierWait(memory_.ValueEmpty(stage), free);
      Copy(index, memory_.Value(stage), value_rows, value_bytes, slab_value);
      BarrierArriveAfterCopies(memory_.ValueFull(stage));
    }
  }

 private:
  using Layout = typename Memory<kDim>::Keys;
  using QueryLayout = typename Memory<kDim>::Queries;
  // A row is copied by kPieces threads; this thread's rows are kApart apart, which keeps its place in the swizzle.
  static constexpr int kPieces = Layout::kPieces, kApart = kWarpgroup / kPieces, kEach = kKeys / kApart;
  static_assert(kApart % 8 == 0);

  __device__ __forceinline__ void Copy(const int32_t (&index)[kEach], uint32_t tile, const char* rows, int64_t row_bytes,
                                       const char* slab) const {
    const uint32_t to = tile + Layout::At(row_, piece_);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool valid = index[i] != kSkip;
      const char* from = index[i] < 0 ? slab + int64_t{-1 - index[i]} * (kDim * 2) : rows + (valid ? index[i] : 0) * row_bytes;
      CopyAsync16(to + static_cast<uint32_t>(i) * kApart * 128, from, valid);
    }
  }

  __device__ void LoadQueries(const PrefillJob& job) {
    const uint32_t buffer = jobs_ % 2;
    BarrierWait(memory_.QueryEmpty(buffer), jobs_ / 2 % 2 ^ 1);
    const uint32_t to = memory_.Query(buffer) + QueryLayout::At(row_, piece_);
    const char* from = RowAt(args_.q, job.first, job.query_head) + piece_ * 16;
    const auto rows = static_cast<int32_t>(job.last - job.first);
#pragma unroll 4
    for (int i = 0; i < kRows / kApart; ++i) {
      const int32_t row = row_ + i * kApart;
      CopyAsync16(to + static_cast<uint32_t>(i) * kApart * 128, from + (row < rows ? row : 0) * args_.q.row_stride * 2, row < rows);
    }
    BarrierArriveAfterCopies(memory_.QueryFull(buffer));
    ++jobs_;
  }

  const PrefillArgs& args_;
  const Memory<kDim> memory_;
  uint32_t jobs_ = 0, tiles_ = 0;
  const int32_t thread_ = static_cast<int32_t>(threadIdx.x) % kWarpgroup;
  const int32_t row_ = thread_ / kPieces, piece_ = thread_ % kPieces;
};

// ---- the warpgroups that multiply ----

template <class T, int kDim, bool kTurns>
class Consumer {
 public:
  __device__ Consumer(const PrefillArgs& args, const Memory<kDim>& memory, int group)
      : args_(args), memory_(memory), group_(group), scale2_(args.scale * kLog2E) {}

  // Job `index` of a KV head, which has queries.
  __device__ __forceinline__ void Run(int32_t kv_head, int32_t index, const PrefillJob& job) {
    const Keys keys(args_, job);
    const int32_t tiles = keys.tiles();
    // Key j is seen by query row r of this warpgroup if j <= r + away.
    const auto away = static_cast<int32_t>(job.first - job.begin) + keys.far_count + group_ * 64;
    const int32_t mine = min(tiles, (away + 63) / kKeys + 1);
    BarrierWait(memory_.QueryFull(jobs_ % 2), jobs_ / 2 % 2);
    const uint64_t query = SharedMatrix(memory_.Query(jobs_ % 2) + static_cast<uint32_t>(group_) * 64 * 128, 0);
    ++jobs_;
    float out[kDim / 2], s[kKeys / 2], max[2] = {kMinusInfinity, kMinusInfinity}, sum[2] = {0, 0}, factor[2];
    uint32_t p[kKeys / 16][4];
#pragma unroll
    for (float& x : out) x = 0;

    BeginTurn();
    WaitFor(memory_.KeyFull(tiles_ % 2));
    ProductsBegin();
    Logits(query, s);
    ProductsCommit();
    EndTurn();
    ProductsWait<0>();
    ProductsHold(s);
    Mask(0, keys.far_count, away, s);
    Release(memory_.KeyEmpty(tiles_ % 2));
    Softmax(s, max, sum, factor);
    Convert(s, p);
    for (int32_t tile = 1; tile < mine; ++tile) {
      const uint32_t before = tiles_ % 2, before_parity = tiles_ / 2 % 2;
      ++tiles_;
      BeginTurn();
      WaitFor(memory_.KeyFull(tiles_ % 2));
      ProductsBegin();
      Logits(query, s);
      ProductsCommit();
      BarrierWait(memory_.ValueFull(before), before_parity);
      FenceForProducts();
      Accumulate(p, before, out);
      ProductsCommit();
      EndTurn();
      ProductsWait<1>();
      ProductsHold(s);
      Mask(tile, keys.far_count, away, s);
      Release(memory_.KeyEmpty(tiles_ % 2));
      Softmax(s, max, sum, factor);
      ProductsWait<0>();
      ProductsHold(out);
      Release(memory_.ValueEmpty(before));
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) out[i] *= factor[i / 2 % 2];
      Convert(s, p);
    }
    WaitFor(memory_.ValueFull(tiles_ % 2));
    ProductsBegin();
    Accumulate(p, tiles_ % 2, out);
    ProductsCommit();
    ProductsWait<0>();
    ProductsHold(out);
    Release(memory_.ValueEmpty(tiles_ % 2));
    ++tiles_;
    for (int32_t tile = mine; tile < tiles; ++tile, ++tiles_) {  // what only later queries see
      BeginTurn();
      EndTurn();
      BarrierWait(memory_.KeyFull(tiles_ % 2), tiles_ / 2 % 2);
      Release(memory_.KeyEmpty(tiles_ % 2));
      BarrierWait(memory_.ValueFull(tiles_ % 2), tiles_ / 2 % 2);
      Release(memory_.ValueEmpty(tiles_ % 2));
    }
    PrefillJob again;  // rather than registers held all the while
    FindJob(args_, kRows, kv_head, index, again);
    Store(again, out, max, sum, memory_.Query((jobs_ + 1) % 2));
    Release(memory_.QueryEmpty((jobs_ + 1) % 2));
  }

  // Warpgroups take turns in beginning their products, so that one's softmax runs beside the other's products.
  __device__ void Begin() const {
    if (kTurns && group_ == 1) NamedArrive(1, kConsumers * kWarpgroup);
  }
  __device__ void End() const {
    if (kTurns && group_ == 0) NamedSync(1, kConsumers * kWarpgroup);
  }

 private:
  using Layout = typename Memory<kDim>::Keys;
  using QueryLayout = typename Memory<kDim>::Queries;

  __device__ __forceinline__ void BeginTurn() const {
    if (kTurns) NamedSync(1 + group_, kConsumers * kWarpgroup);
  }
  __device__ __forceinline__ void EndTurn() const {
    if (kTurns) NamedArrive(2 - group_, kConsumers * kWarpgroup);
  }
  // The phase of tile number tiles_.
  __device__ __forceinline__ void WaitFor(uint32_t barrier) const {
    BarrierWait(barrier, tiles_ / 2 % 2);
    FenceForProducts();
  }
  __device__ __forceinline__ void Release(uint32_t barrier) const {
    __syncwarp();
    if (lane_ == 0) BarrierArrive(barrier);
  }

  __device__ __forceinline__ void Logits(uint64_t query, float (&s)[kKeys / 2]) const {
    const uint64_t key = SharedMatrix(memory_.Key(tiles_ % 2), 0);
    ProductOfRows<T, false>(s, query, key);
#pragma unroll
    for (uint32_t k = 1; k < kDim / 16; ++k)
      ProductOfRows<T, true>(s, Advance(query, k / 4 * QueryLayout::kPanel + k % 4 * 32),
                             Advance(key, k / 4 * Layout::kPanel + k % 4 * 32));
  }
  __device__ __forceinline__ void Accumulate(const uint32_t (&p)[kKeys / 16][4], uint32_t stage, float (&out)[kDim / 2]) const {
    const uint64_t value = SharedMatrix(memory_.Value(stage), Layout::kPanel);
#pragma unroll
    for (uint32_t k = 0; k < kKeys / 16; ++k) Product<T>(out, p[k], Advance(value, k * 16 * 128));
  }

  // Adds log weights, and takes out keys after the query.
  __device__ __forceinline__ void Mask(int32_t tile, int32_t far_count, int32_t away, float (&s)[kKeys / 2]) const {
    const int32_t first = tile * kKeys;
    if (first < far_count) {
      const uint32_t bias = memory_.Bias(tiles_ % 2) + lane_ % 4 * 8;
#pragma unroll
      for (uint32_t n = 0; n < kKeys / 8; ++n) {
        const float2 b = LoadShared2(bias + n * 32);
        s[4 * n] += b.x;
        s[4 * n + 1] += b.y;
        s[4 * n + 2] += b.x;
        s[4 * n + 3] += b.y;
      }
    }
    const int32_t row = warp_ * 16 + lane_ / 4 + away - first - lane_ % 4 * 2;  // of which keys 8 n + i % 2 are seen
    if (kKeys - 1 > away - first) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (8 * n + i % 2 > row + i / 2 * 8) s[4 * n + i] = kMinusInfinity;
    }
  }

  // From logits to probabilities, relative to the row's maximum so far; earlier ones count `factor`.
  __device__ __forceinline__ void Softmax(float (&s)[kKeys / 2], float (&max)[2], float (&sum)[2], float (&factor)[2]) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = max[r];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(s[4 * n + 2 * r], s[4 * n + 2 * r + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, 2));
      const float zero = top == kMinusInfinity ? 0 : top * scale2_;
      factor[r] = Exp2(max[r] * scale2_ - zero);
      max[r] = top;
      float total[2] = {0, 0};
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[4 * n + 2 * r + i];
          x = Exp2(fmaf(x, scale2_, -zero));
          total[i] += x;
        }
      sum[r] = sum[r] * factor[r] + (total[0] + total[1]);
    }
  }
  __device__ __forceinline__ void Convert(const float (&s)[kKeys / 2], uint32_t (&p)[kKeys / 16][4]) const {
#pragma unroll
    for (int k = 0; k < kKeys / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) p[k][i] = Pack<T>(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
  }

  // Through the shared memory of this warp's own queries, which have been used, so that rows are written whole.
  __device__ __forceinline__ void Store(const PrefillJob& job, const float (&out)[kDim / 2], const float (&max)[2],
                                        const float (&sum)[2], uint32_t queries) const {
    const int32_t first = group_ * 64 + warp_ * 16, rows = static_cast<int32_t>(job.last - job.first);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sum[r];
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);
      total += __shfl_xor_sync(0xFFFFFFFFu, total, 2);
      const float inverse = 1.0f / total;
      const int32_t row = first + r * 8 + lane_ / 4;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        StoreShared(queries + QueryLayout::At(row, n) + lane_ % 4 * 4,
                    Pack<T>(out[4 * n + 2 * r] * inverse, out[4 * n + 2 * r + 1] * inverse));
      if (args_.lse != nullptr && lane_ % 4 == 0 && row < rows)
        args_.lse[(job.first + row) * args_.lse_row_stride + job.query_head * args_.lse_head_stride] =
            max[r] * args_.scale + logf(total);
    }
    __syncwarp();
    char* to = const_cast<char*>(RowAt(args_.out, job.first, job.query_head));
#pragma unroll
    for (int i = 0; i < 16 * QueryLayout::kPieces / kWarp; ++i) {
      const int at = i * kWarp + lane_, row = first + at / QueryLayout::kPieces, piece = at % QueryLayout::kPieces;
      if (row < rows)
        *reinterpret_cast<uint4*>(to + row * args_.out.row_stride * 2 + piece * 16) = LoadShared16(queries + QueryLayout::At(row, piece));
    }
  }

  const PrefillArgs& args_;
  const Memory<kDim> memory_;
  const int group_;
  const float scale2_;
  uint32_t jobs_ = 0, tiles_ = 0;
  const int warp_ = static_cast<int>(threadIdx.x) % kWarpgroup / kWarp, lane_ = static_cast<int>(threadIdx.x) % kWarp;
};

// Block b has jobs [b * each, (b + 1) * each) of KV head y.
template <class T, int kDim, bool kTurns>
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
  const auto kv_head = static_cast<int32_t>(blockIdx.y);
  const auto begin = static_cast<int32_t>(blockIdx.x) * each;
  const int32_t end = min(begin + each, static_cast<int32_t>(PrefillJobs(args, kRows)));
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
  PrefillJob job;
  if (group == kConsumers) {
    GiveRegisters<kProducerRegisters>();
    Producer<kDim> producer(args, memory);
    for (int32_t i = begin; i < end; ++i)
      if (FindJob(args, kRows, kv_head, i, job)) producer.Run(job);
  } else {
    TakeRegisters<kConsumerRegisters>();
    Consumer<T, kDim, kTurns> consumer(args, memory, group);
    consumer.Begin();
    for (int32_t i = begin; i < end; ++i)
      if (FindJob(args, kRows, kv_head, i, job)) consumer.Run(kv_head, i, job);
    consumer.End();
  }
}

constexpr int64_t kRounds = 4;  // of blocks, at least, if there are enough jobs: others' kernels come in between

template <class T, int kDim, bool kTurns>
void Run(const PrefillArgs& args, int32_t multiprocessors, cudaStream_t stream) {
  const int64_t jobs = PrefillJobs(args, kRows), at_once = std::max(1, multiprocessors);
  const int64_t rounds = std::max<int64_t>(1, jobs * args.kv_heads / (at_once * kRounds));
  const int64_t each = std::min<int64_t>(8, CeilDiv(jobs * args.kv_heads, at_once * rounds));
  const auto bytes = static_cast<int>(Memory<kDim>::kBytes + Memory<kDim>::kAligned);
  cudaFuncSetAttribute(PrefillKernel<T, kDim, kTurns>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const dim3 grid(static_cast<uint32_t>(CeilDiv(jobs, each)), static_cast<uint32_t>(args.kv_heads));
  PrefillKernel<T, kDim, kTurns><<<grid, kThreads, bytes, stream>>>(args, static_cast<int32_t>(each));
}

}  // namespace

bool PrefillHopper(const PrefillArgs& args, int32_t multiprocessors, cudaStream_t stream) {
  const bool half = args.dtype == DType::kF16;
  if ((!half && args.dtype != DType::kBF16) || args.key_dim != args.value_dim) return false;
  if (args.key_dim == 64)
    half ? Run<Half, 64, true>(args, multiprocessors, stream) : Run<BFloat16, 64, true>(args, multiprocessors, stream);
  else if (args.key_dim == 128)
    half ? Run<Half, 128, true>(args, multiprocessors, stream) : Run<BFloat16, 128, true>(args, multiprocessors, stream);
  else
    return false;
  return true;
}

}  // namespace express::cuda
