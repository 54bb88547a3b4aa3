// Spans of a prompt: which tokens are where, without moving any (src/plan/span.h), and the copies at the end.
#include <limits>

#include "src/cuda/device.cuh"
#include "src/cuda/halve.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {

__host__ __device__ size_t SpanScratch(int64_t list) { return static_cast<size_t>(list) / 2 * sizeof(halve::Pair); }

namespace {

constexpr int kThreads = 128;
static_assert(kSpanClasses[1] == kWarpList && kSpanClasses[2] == 2 * halve::kMostPairs);

// The head that block (.., y) works for, or null: plans have different numbers of heads.
__device__ const SpanHead* HeadOf(const SpanArgs& args, int32_t plan, int32_t y) {
  const SpanPlan& p = args.plans[plan];
  return y < p.head_count ? &args.heads[p.heads[y]] : nullptr;
}

// grid: (pieces, KV heads)
__global__ void BeginKernel(const __grid_constant__ SpanArgs args, const SpanDepartures* departures) {
  const SpanHead& head = args.heads[blockIdx.y];
  const SpanPlan& plan = args.plans[head.plan];
  const SpanDepartures& leaving = departures[head.plan];
  const int64_t count = plan.budget + (head.protect == 0 ? leaving.count : 0);
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t j = i - plan.budget;
    int32_t value = kSkip;
    if (j >= 0)
      value = j < leaving.sources ? head.source[leaving.source_begin + j]
                                  : static_cast<int32_t>(leaving.first_row + j - leaving.sources);
    else if (args.first_span)
      value = static_cast<int32_t>(-1 - i);
    else if (plan.slot_nodes[i] != kNoNode)
      value = head.previous[plan.slot_nodes[i]];
    head.values[i] = value;
  }
}

// One warp per (sample, head): the last candidate that is taken stays.
__global__ void SampleKernel(const __grid_constant__ SpanArgs args, int64_t begin, int64_t end) {
  const int64_t index = begin + (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
  if (index >= end) return;
  const SpanSample& op = args.samples[index];
  const SpanHead* head = HeadOf(args, op.plan, static_cast<int32_t>(blockIdx.y));
  if (head == nullptr) return;
  const auto lane = static_cast<int32_t>(threadIdx.x % kWarp);
  int32_t last = -1;
  for (int32_t j = lane; j < op.count; j += kWarp)
    if (DrawChance(head->stream, RandomPurpose::kSample, static_cast<uint64_t>(op.number + j),
                   static_cast<uint64_t>(op.weight), static_cast<uint64_t>(op.total + j * op.weight)))
      last = j;
  last = WarpReduce(last, [](int32_t a, int32_t b) { return a > b ? a : b; });
  if (lane == 0) head->values[op.out] = head->values[last < 0 ? op.first : op.candidate + last];
}

// Entry `index` of a head, wherever it lies.
template <class T>
__device__ __forceinline__ const T* EntryRow(const Rows& rows, int32_t kv_head, const void* slab, int32_t dim,
                                             int32_t index) {
  if (index < 0) return static_cast<const T*>(slab) + static_cast<int64_t>(-1 - index) * dim;
  return static_cast<const T*>(rows.data) + index * rows.row_stride + kv_head * rows.head_stride;
}

template <class T>
struct NodeRows {
  const SpanArgs& args;
  const SpanHead& head;
  const int32_t* nodes;
  int32_t kv_head;
  __device__ const T* Key(int32_t i) const {
    return EntryRow<T>(args.k, kv_head, head.slab_key, args.key_dim, head.values[nodes[i]]);
  }
  __device__ const T* Value(int32_t i) const {
    return EntryRow<T>(args.v, kv_head, head.slab_value, args.value_dim, head.values[nodes[i]]);
  }
};

// Lists of two are coins: one thread per (halving, head).
__global__ void CoinKernel(const __grid_constant__ SpanArgs args, int64_t begin, int64_t end) {
  const int64_t index = begin + int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (index >= end) return;
  const SpanHalve& op = args.halves[index];
  const SpanHead* head = HeadOf(args, op.plan, static_cast<int32_t>(blockIdx.y));
  if (head == nullptr) return;
  const auto number = static_cast<uint64_t>(op.number);
  const bool y = UniformFromBits(DrawBits(head->stream, RandomPurpose::kHalve, number, 0)) < 0.5f;
  const bool complement = UniformFromBits(DrawBits(head->stream, RandomPurpose::kComplement, number, 0)) < 0.5f;
  head->values[op.out] = head->values[args.list[op.begin + (y != complement ? 1 : 0)]];
}

// One warp per (halving, head): most lists are short, and there are very many of them.
constexpr int kSmallWarps = 4;
template <class T>
constexpr int kSmallResident = sizeof(T) == 4 ? 4 : 5;
template <class T>
struct EntryRows {
  const SpanArgs& args;
  const SpanHead& head;
  const int32_t* entries;
  int32_t kv_head;
  __device__ const T* Key(int32_t i) const {
    return EntryRow<T>(args.k, kv_head, head.slab_key, args.key_dim, entries[i]);
  }
  __device__ const T* Value(int32_t i) const {
    return EntryRow<T>(args.v, kv_head, head.slab_value, args.value_dim, entries[i]);
  }
};
template <class T>
__global__ __launch_bounds__(kSmallWarps* kWarp,
                             kSmallResident<T>) void SmallHalveKernel(const __grid_constant__ SpanArgs args,
                                                                      int64_t begin, int64_t end) {
  extern __shared__ __align__(16) char shared[];
  __shared__ int32_t entries_of[kSmallWarps][kWarpList];
  __shared__ uint8_t keep_of[kSmallWarps][kWarpList / 2];
  const auto warp = static_cast<int32_t>(threadIdx.x) / kWarp, lane = static_cast<int32_t>(threadIdx.x) % kWarp;
  const int64_t index = begin + int64_t{blockIdx.x} * kSmallWarps + warp;
  if (index >= end) return;
  const SpanHalve& op = args.halves[index];
  const SpanHead* head = HeadOf(args, op.plan, static_cast<int32_t>(blockIdx.y));
  if (head == nullptr) return;
  int32_t* entries = entries_of[warp];
  uint8_t* keep = keep_of[warp];
  if (lane < op.count) entries[lane] = head->values[args.list[op.begin + lane]];
  __syncwarp();
  const EntryRows<T> rows{args, *head, entries, static_cast<int32_t>(head - args.heads)};
  HalveList<T, kWarp, kWarpList>(rows, op.count, args.key_dim, args.value_dim, args.halve, head->stream,
                                 static_cast<uint64_t>(op.number), nullptr,
                                 shared + static_cast<size_t>(warp) * HalveWarpBytes(args.key_dim), keep);
  if (lane < op.count / 2) head->values[op.out + lane] = entries[2 * lane + (keep[lane] != 0 ? 1 : 0)];
}

// One block per (halving, head).
template <class T, int kBlock, int kResident, int32_t kMostCount>
__global__ __launch_bounds__(kBlock, kResident) void HalveKernel(const __grid_constant__ SpanArgs args, int64_t begin) {
  extern __shared__ __align__(16) char shared[];
  const SpanHalve& op = args.halves[begin + blockIdx.x];
  const SpanHead* head = HeadOf(args, op.plan, static_cast<int32_t>(blockIdx.y));
  if (head == nullptr) return;
  const int32_t* nodes = args.list + op.begin;
  const NodeRows<T> rows{args, *head, nodes, static_cast<int32_t>(head - args.heads)};
  uint8_t* keep = head->keep + op.begin / 2;
  HalveList<T, kBlock, kMostCount>(rows, op.count, args.key_dim, args.value_dim, args.halve, head->stream,
                                   static_cast<uint64_t>(op.number), head->halve_scratch + SpanScratch(op.begin),
                                   shared, keep);
  for (int32_t a = static_cast<int32_t>(threadIdx.x); a < op.count / 2; a += kBlock)
    head->values[op.out + a] = head->values[nodes[2 * a + (keep[a] != 0 ? 1 : 0)]];
}

// One block per (prompt block, KV head).
__global__ void FarKernel(const __grid_constant__ SpanArgs args) {
  const auto g = static_cast<int32_t>(blockIdx.y);
  const SpanHead& head = args.heads[g];
  const SpanPlan& plan = args.plans[head.plan];
  const SpanBlock& block = plan.blocks[blockIdx.x];
  int32_t* index = head.far_index + int64_t{blockIdx.x} * head.far_capacity;
  float* bias = head.far_bias + int64_t{blockIdx.x} * head.far_capacity;
  const auto put = [&](int32_t from, int32_t count, const auto& entry) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < count; i += static_cast<int32_t>(blockDim.x))
      entry(i, index[from + i], bias[from + i]);
    return from + count;
  };
  int32_t at = put(0, block.sinks, [&](int32_t i, int32_t& x, float& b) { x = plan.sink_index[i], b = 0; });
  at = put(at, block.old_tail,
           [&](int32_t i, int32_t& x, float& b) { x = -1 - plan.old_tail[block.old_tail_begin + i], b = 0; });
  const int32_t* snapshot = head.snapshots + int64_t{blockIdx.x} * head.protect;
  at = put(at, block.protected_count, [&](int32_t i, int32_t& x, float& b) { x = snapshot[i], b = 0; });
  const SpanMember* members = args.members + block.member_begin;
  at = put(at, block.members, [&](int32_t i, int32_t& x, float& b) {
    x = head.values[members[i].node];
    b = args.exponent * members[i].log_weight;
  });
  if (threadIdx.x == 0) head.far_count[blockIdx.x] = at;
}

__global__ void StoreKernel(const SpanStorePlan* plans, const SpanStoreHead* heads) {
  const SpanStoreHead& head = heads[blockIdx.y];
  const SpanStorePlan& plan = plans[head.plan];
  const auto i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= plan.count) return;
  const int32_t code = plan.code[i];
  const bool is_protected = i >= plan.nodes && i < plan.nodes + plan.protects;
  const int32_t entry = i < plan.nodes ? head.values[code] : is_protected ? head.protected_index[code] : code;
  const int32_t to = is_protected && head.protected_slot != nullptr ? head.protected_slot[code] : plan.to[i];
  const bool stays = head.stage_index != nullptr && entry == -1 - to;
  const bool moves = head.stage_index != nullptr && entry < 0 && !stays;
  if (head.stage_index != nullptr) head.stage_index[i] = moves ? entry : kSkip;
  head.index[i] = stays ? kSkip : moves ? -1 - i : entry;
  head.to[i] = to;
}

template <class From, class To>
__device__ void CopyRow(const From* from, To* to, int32_t dim, int lane) {
  if constexpr (sizeof(From) == sizeof(To) && std::is_same_v<From, To>) {
    constexpr int32_t kPiece = 16 / sizeof(From);
    for (int32_t i = lane; i < dim / kPiece; i += kWarp)
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  } else {
    for (int32_t i = lane; i < dim; i += kWarp) FromFloat(ToFloat(from[i]), to + i);
  }
}

template <class From>
__device__ void CopyRowTo(const From* from, void* to, DType dtype, int64_t element, int32_t dim, int lane) {
  switch (dtype) {
    case DType::kF16:
      return CopyRow(from, static_cast<Half*>(to) + element, dim, lane);
    case DType::kBF16:
      return CopyRow(from, static_cast<BFloat16*>(to) + element, dim, lane);
    default:
      return CopyRow(from, static_cast<float*>(to) + element, dim, lane);
  }
}

// One warp per (entry, head).
template <class T>
__device__ __forceinline__ void GatherEntry(const GatherArgs& args, const GatherHead& head) {
  const int64_t i = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
  if (i >= head.count) return;
  const int32_t index = head.index[i];
  if (index == kSkip) return;
  const int64_t to = head.to != nullptr ? head.to[i] : i;
  const auto lane = static_cast<int>(threadIdx.x % kWarp);
  CopyRowTo(EntryRow<T>(args.k, head.kv_head, head.slab_key, args.key_dim, index), head.key, args.key_dtype,
            to * args.key_stride, args.key_dim, lane);
  CopyRowTo(EntryRow<T>(args.v, head.kv_head, head.slab_value, args.value_dim, index), head.value, args.value_dtype,
            to * args.value_stride, args.value_dim, lane);
  if (lane != 0) return;
  if (head.position != nullptr)
    head.position[to * args.position_stride] = index < 0 ? head.slab_position[-1 - index] : args.first_position + index;
  if (head.log_weight != nullptr) head.log_weight[to * args.log_weight_stride] = head.weights[to];
}
template <class T>
__global__ void GatherKernel(const __grid_constant__ GatherArgs args) {
  GatherEntry<T>(args, args.heads[blockIdx.y]);
}
template <class T>
__global__ void GatherOneKernel(const __grid_constant__ GatherArgs args, const __grid_constant__ GatherHead head) {
  GatherEntry<T>(args, head);
}

}  // namespace

void SpanBegin(const SpanArgs& args, const SpanDepartures* departures, int64_t most_values, cudaStream_t stream) {
  const dim3 grid(static_cast<uint32_t>(std::min<int64_t>(CeilDiv(most_values, 256), 64)),
                  static_cast<uint32_t>(args.kv_heads));
  BeginKernel<<<grid, 256, 0, stream>>>(args, departures);
}

void SpanStore(const SpanStorePlan* plans, const SpanStoreHead* heads, int32_t kv_heads, int32_t most_count,
               cudaStream_t stream) {
  const dim3 grid(static_cast<uint32_t>(CeilDiv(most_count, 256)), static_cast<uint32_t>(kv_heads));
  StoreKernel<<<grid, 256, 0, stream>>>(plans, heads);
}

void SpanSamples(const SpanArgs& args, int64_t sample_begin, int64_t sample_end, cudaStream_t stream) {
  if (sample_end == sample_begin) return;
  const dim3 grid(static_cast<uint32_t>(CeilDiv((sample_end - sample_begin) * kWarp, kThreads)),
                  static_cast<uint32_t>(args.most_heads));
  SampleKernel<<<grid, kThreads, 0, stream>>>(args, sample_begin, sample_end);
}

void SpanHalvings(const SpanArgs& args, int64_t begin, int64_t end, int32_t length_class, cudaStream_t stream) {
  if (end == begin) return;
  const auto heads = static_cast<uint32_t>(args.most_heads);
  if (length_class == 0) {
    const dim3 grid(static_cast<uint32_t>(CeilDiv(end - begin, kThreads)), heads);
    CoinKernel<<<grid, kThreads, 0, stream>>>(args, begin, end);
    return;
  }
  WithType(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (length_class == 1) {
      const dim3 grid(static_cast<uint32_t>(CeilDiv(end - begin, kSmallWarps)), heads);
      const size_t shared = kSmallWarps * HalveWarpBytes(args.key_dim);
      SmallHalveKernel<T><<<grid, kSmallWarps * kWarp, shared, stream>>>(args, begin, end);
      return;
    }
    const dim3 grid(static_cast<uint32_t>(end - begin), heads);
    const auto shared = [&](int32_t count) { return HalveSharedBytes<T>(args.key_dim, args.value_dim, count); };
    if (length_class == 2)
      HalveKernel<T, 128, 4, kSpanClasses[2]><<<grid, 128, shared(kSpanClasses[2]), stream>>>(args, begin);
    else
      HalveKernel<T, 128, 1, INT32_MAX><<<grid, 128, shared(INT32_MAX), stream>>>(args, begin);
  });
}

void SpanFar(const SpanArgs& args, int32_t blocks, cudaStream_t stream) {
  const dim3 grid(static_cast<uint32_t>(blocks), static_cast<uint32_t>(args.kv_heads));
  FarKernel<<<grid, 128, 0, stream>>>(args);
}

void Gather(const GatherArgs& args, cudaStream_t stream) {
  if (args.most_count == 0) return;
  const dim3 grid(static_cast<uint32_t>(CeilDiv(int64_t{args.most_count} * kWarp, 256)),
                  static_cast<uint32_t>(args.head_count));
  WithType(args.dtype, [&](auto type) { GatherKernel<decltype(type)><<<grid, 256, 0, stream>>>(args); });
}

void GatherOne(const GatherHead& head, const GatherArgs& args, cudaStream_t stream) {
  if (args.most_count == 0) return;
  const auto grid = static_cast<uint32_t>(CeilDiv(int64_t{args.most_count} * kWarp, 256));
  WithType(args.dtype, [&](auto type) { GatherOneKernel<decltype(type)><<<grid, 256, 0, stream>>>(args, head); });
}

}  // namespace express::cuda
