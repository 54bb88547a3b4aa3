// The prefill for Hopper: one warpgroup gathers keys and values into a ring of tiles (prefill_sm90.cuh), two multiply (wgmma)
// and take turns, as in FlashAttention-3 (Shah et al., arXiv:2407.08608): products of one run beside the softmax of the other.
#include <algorithm>

#include "src/cuda/prefill_sm90.cuh"

namespace express::cuda {
namespace sm90 {
namespace {

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
    MyTurn();
    Logits(query, s);
    YourTurn();
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
      MyTurn();
      Logits(query, sums);
      BarrierWait(memory_.ValueFull(before), before_parity);
      FenceForProducts();
      Accumulate<kKeys>(p, before, out);
      YourTurn();
      ProductsWait<1>();
      ProductsHold(sums);
      Release(memory_.KeyEmpty(tiles_ % 2));
      Mask(tile, away, sums);
      const bool raised = Raise(sums, zero, sum, factor);
      // Over by now, or nearly; the values' stage is free before the softmax.
      ProductsWait<0>();
      ProductsHold(out);
      Release(memory_.ValueEmpty(before));
      if (raised) {
#pragma unroll
        for (int i = 0; i < kDim / 2; ++i) out[i] *= factor[i / 2 % 2];
      }
      Softmax(sums, zero, sum);
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
      MyTurn();
      YourTurn();
      BarrierWait(memory_.KeyFull(tiles_ % 2), tiles_ / 2 % 2);
      Release(memory_.KeyEmpty(tiles_ % 2));
      BarrierWait(memory_.ValueFull(tiles_ % 2), tiles_ / 2 % 2);
      Release(memory_.ValueEmpty(tiles_ % 2));
    }
    MeetThreads(kStore + group_, kWarpgroup);  // products are the warpgroup's: no warp reads queries any more
    Store(out, zero, sum, (jobs_ + 1) % 2);
    Release(memory_.QueryEmpty((jobs_ + 1) % 2));
    return true;
  }

  // One warpgroup issues its products of a tile after the other, both as many times a job.
  __device__ __forceinline__ void MyTurn() const { MeetThreads(kTurn + group_, kConsumers * kWarpgroup); }
  __device__ __forceinline__ void YourTurn() const { ArriveForThreads(kTurn + 1 - group_, kConsumers * kWarpgroup); }

 private:
  using Layout = typename Memory<kDim>::Keys;
  using QueryLayout = typename Memory<kDim>::Queries;

  // The phase of tile number tiles_.
  __device__ __forceinline__ void WaitFor(uint32_t barrier) const {
    BarrierWait(barrier, tiles_ / 2 % 2);
    FenceForProducts();
  }
  // All lanes come by themselves: one for the warp is no faster, and racecheck does not follow it.
  __device__ __forceinline__ void Release(uint32_t barrier) const { BarrierArrive(barrier); }

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
      for (int n = 0; n < kDim / 8; n += 4) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          x[i] = Pack<T>(out[4 * (n + i) + 2 * r] * inverse, out[4 * (n + i) + 2 * r + 1] * inverse);
        StoreMatrices(queries + QueryLayout::At(first + r * 8 + lane % 8, n + lane / 8), x);
      }
      if (args_.lse != nullptr && lane % 4 == 0 && row < rows)
        args_.lse[(first_row + row) * args_.lse_row_stride + query_head * args_.lse_head_stride] =
            zero[r] * kLn2 + logf(total);
    }
    __syncwarp();
    constexpr int kAtOnce = kWarp / QueryLayout::kPieces;  // rows
    const int32_t row = first + lane / QueryLayout::kPieces, piece = lane % QueryLayout::kPieces;
    const int64_t row_bytes = args_.out.row_stride * 2;
    char* to = const_cast<char*>(RowAt(args_.out, first_row, query_head)) + row * row_bytes + piece * 16;
    uint4 x[16 / kAtOnce];
#pragma unroll
    for (int i = 0; i < 16; i += kAtOnce) x[i / kAtOnce] = LoadShared16(queries + QueryLayout::At(row + i, piece));
#pragma unroll
    for (int i = 0; i < 16; i += kAtOnce, to += kAtOnce * row_bytes)
      if (row + i < rows) *reinterpret_cast<uint4*>(to) = x[i / kAtOnce];
  }

  static constexpr float kLn2 = 0.693147181f, kLowest = -3e38f, kSlack = 8;
  static constexpr int kTurn = 1, kStore = 3;  // named barriers, of each warpgroup: its turn, its outputs

  const PrefillArgs& args_;
  const Memory<kDim> memory_;
  const int group_;
  const float scale2_;
  uint32_t jobs_ = 0, tiles_ = 0;
  const int warp_ = static_cast<int>(threadIdx.x) % kWarpgroup / kWarp, lane_ = static_cast<int>(threadIdx.x) % kWarp;
};

// Block b has jobs [b * each, (b + 1) * each) of KV head y; kPlain: what PlainCursor gives it.
template <class T, int kDim, bool kPlain>
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
  const int group = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (group == kConsumers) {
    GiveRegisters<kProducerRegisters>();
    if constexpr (kPlain) {
      constexpr PrefillHead kNothingFar{};
      Producer<kDim>(args, kNothingFar, memory).Run(PlainCursor(args));
    } else {
      const auto kv_head = static_cast<int32_t>(blockIdx.y), begin = static_cast<int32_t>(blockIdx.x) * each;
      const int32_t end = min(begin + each, static_cast<int32_t>(PrefillJobs(args, kRows)));
      const PrefillHead head = args.heads[kv_head];
      Producer<kDim>(args, head, memory).Run(Cursor(args, head, kv_head, begin, end));
    }
  } else {
    TakeRegisters<kConsumerRegisters>();
    Consumer<T, kDim> consumer(args, memory, group);
    if (group == 1) consumer.YourTurn();  // the first one's is the first
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

template <class T, int kDim, bool kPlain>
void Launch(const PrefillArgs& args, dim3 grid, int32_t each, cudaStream_t stream) {
  const auto bytes = static_cast<int>(Memory<kDim>::kBytes + Memory<kDim>::kAligned);
  const auto kernel = &PrefillKernel<T, kDim, kPlain>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<grid, kThreads, static_cast<size_t>(bytes), stream>>>(args, each);
}
template <class T, int kDim>
void Run(const PrefillArgs& args, int32_t multiprocessors, cudaStream_t stream) {
  if (args.heads == nullptr) {
    const int64_t jobs = CeilDiv(args.tokens, kRows) * args.kv_heads * args.group;
    const int64_t most = args.spare == PrefillArgs::kJobByJob ? jobs : std::max(1, multiprocessors - args.spare),
                  blocks = std::min(jobs, most);
    return Launch<T, kDim, true>(args, static_cast<uint32_t>(blocks), 0, stream);
  }
  const int64_t jobs = PrefillJobs(args, kRows);
  const int32_t each = JobsOfBlock(jobs, args.kv_heads, std::max(1, multiprocessors));
  const dim3 grid(static_cast<uint32_t>(CeilDiv(jobs, each)), static_cast<uint32_t>(args.kv_heads));
  Launch<T, kDim, false>(args, grid, each, stream);
}

}  // namespace
}  // namespace sm90

bool PrefillHopper(const PrefillArgs& args, int32_t multiprocessors, cudaStream_t stream) {
  const bool half = args.dtype == DType::kF16;
  if ((!half && args.dtype != DType::kBF16) || args.key_dim != args.value_dim) return false;
  if (args.key_dim == 64)
    half ? sm90::Run<Half, 64>(args, multiprocessors, stream) : sm90::Run<BFloat16, 64>(args, multiprocessors, stream);
  else if (args.key_dim == 128)
    half ? sm90::Run<Half, 128>(args, multiprocessors, stream)
         : sm90::Run<BFloat16, 128>(args, multiprocessors, stream);
  else
    return false;
  return true;
}

}  // namespace express::cuda
