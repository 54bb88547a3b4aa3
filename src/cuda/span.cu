// Spans of a prompt: which tokens are where, without moving any (src/plan/span.h), and the copies at the end.
#include <algorithm>
#include <limits>

#include "src/cuda/device.cuh"
#include "src/cuda/halve.cuh"
#include "src/cuda/halve_fours.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {

__host__ __device__ size_t SpanScratch(int64_t list) { return static_cast<size_t>(list) / 2 * sizeof(halve::Pair); }

namespace {

constexpr int kThreads = 128;
static_assert(kSpanClasses[1] == kFourEntries && kSpanClasses[2] == kWarpList &&
              kSpanClasses[3] == 2 * halve::kMostPairs);

// The y-th head of a plan, or null: plans have different numbers of heads. One that is alone has them all.
__device__ __forceinline__ const SpanHead* HeadOf(const SpanArgs& args, int32_t plan, int32_t y) {
  if (args.plan_count == 1) return &args.heads[y];
  const SpanPlan& p = args.plans[plan];
  return y < p.head_count ? &args.heads[p.heads[y]] : nullptr;
}

// Values that other blocks of the same launch write: read and written past the L1. A value is all that is passed on, what it
// refers to is there since before the launch; so no order between accesses to different addresses is needed.
__device__ __forceinline__ int32_t LoadValue(const int32_t* value) {
  int32_t x;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(value) : "memory");
  return x;
}
__device__ __forceinline__ void StoreValue(int32_t* value, int32_t x) {
  asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(value), "r"(x) : "memory");
}
__device__ __forceinline__ int32_t AwaitValue(const int32_t* value) {
  int32_t x = LoadValue(value);
  while (x == kUnknown) {
    __nanosleep(20);
    x = LoadValue(value);
  }
  return x;
}

// grid: (pieces, KV heads)
__global__ void BeginKernel(const __grid_constant__ SpanArgs args, const SpanDepartures* departures, int32_t* ticket) {
  const SpanHead& head = args.heads[blockIdx.y];
  const SpanPlan& plan = args.plans[head.plan];
  const SpanDepartures& leaving = departures[head.plan];
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *ticket = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < leaving.nodes; i += step) {
    const int64_t j = i - plan.budget;
    int32_t value = j >= 0 ? kUnknown : kSkip;
    if (j >= 0 && j < leaving.count) {
      if (head.protect > 0) continue;  // those who compete for a place there say who it is
      value = j < leaving.sources ? plan.source[leaving.source_begin + j]
                                  : static_cast<int32_t>(leaving.first_row + j - leaving.sources);
    } else if (j < 0 && args.first_span) {
      value = static_cast<int32_t>(-1 - i);
    } else if (j < 0 && plan.slot_nodes[i] != kNoNode) {
      value = head.previous[plan.slot_nodes[i]];
    }
    head.values[i] = value;
  }
}

// The scales of entry `index` of a head.
__device__ __forceinline__ RowScales EntryScales(const Rows& rows, int32_t kv_head, const RowScales* slab,
                                                 int32_t index) {
  return index < 0 ? slab[-1 - index] : rows.scale[kv_head * rows.scale_stride + index];
}

// Entry `index` of a head, wherever it lies: its key, or its value.
template <class T, bool kKey>
__device__ __forceinline__ RowOf<T> EntryRow(const Rows& rows, int32_t kv_head, const void* slab,
                                             const RowScales* slab_scale, int32_t dim, int32_t index) {
  const T* row = index < 0 ? static_cast<const T*>(slab) + static_cast<int64_t>(-1 - index) * dim
                           : static_cast<const T*>(rows.data) + index * rows.row_stride + kv_head * rows.head_stride;
  if constexpr (kScaled<T>) {
    const RowScales scale = EntryScales(rows, kv_head, slab_scale, index);
    return {&row->code, FromScale(kKey ? scale.key : scale.value)};
  } else {
    return row;
  }
}

template <class T>
struct NodeRows {
  const SpanArgs& args;
  const SpanHead& head;
  const int32_t* nodes;
  int32_t kv_head;
  __device__ RowOf<T> Key(int32_t i) const {
    return EntryRow<T, true>(args.k, kv_head, head.slab_key, head.slab_scale, args.key_dim, head.values[nodes[i]]);
  }
  __device__ RowOf<T> Value(int32_t i) const {
    return EntryRow<T, false>(args.v, kv_head, head.slab_value, head.slab_scale, args.value_dim, head.values[nodes[i]]);
  }
};

template <class T>
struct EntryRows {
  const SpanArgs& args;
  const SpanHead& head;
  const int32_t* entries;
  int32_t kv_head;
  __device__ RowOf<T> Key(int32_t i) const {
    return EntryRow<T, true>(args.k, kv_head, head.slab_key, head.slab_scale, args.key_dim, entries[i]);
  }
  __device__ RowOf<T> Value(int32_t i) const {
    return EntryRow<T, false>(args.v, kv_head, head.slab_value, head.slab_scale, args.value_dim, entries[i]);
  }
};

// What one block of threads does, item after item. Item kinds in which an operation is a warp's or a thread's have nothing that
// concerns the whole block.
constexpr int kGraphWarps = kThreads / kWarp;
static_assert(kSpanTogether[0] == kThreads && kSpanTogether[1] == kGraphWarps * kFours &&
              kSpanTogether[2] == kGraphWarps && kSpanTogether[5] == kGraphWarps);
struct GraphMemory {  // shared
  int32_t ticket;
  int32_t entries[kSpanClasses[3]];  // of the list, or kWarpList of every warp's
  uint8_t keep[kSpanClasses[3] / 2];
};
static_assert(kSpanClasses[3] == kGraphWarps * kWarpList);

template <class T, bool kLong>
struct GraphWorker {
  const SpanArgs& args;
  const SpanGraph& graph;
  GraphMemory& memory;
  char* const shared;
  const int32_t thread = static_cast<int32_t>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;

  // One warp: the last candidate that is taken stays.
  __device__ void Sample(const SpanSample& op, const SpanHead& head) const {
    int32_t last = -1;
    for (int32_t j = lane; j < op.count; j += kWarp)
      if (DrawChance(head.stream, RandomPurpose::kSample, static_cast<uint64_t>(op.number + j),
                     static_cast<uint64_t>(op.weight), static_cast<uint64_t>(op.total + j * op.weight)))
        last = j;
    last = WarpReduce(last, [](int32_t a, int32_t b) { return a > b ? a : b; });
    if (lane == 0)
      StoreValue(head.values + op.out, AwaitValue(head.values + (last < 0 ? op.first : op.candidate + last)));
  }

  // One thread: lists of two are coins.
  __device__ void Coin(const SpanHalve& op, const SpanHead& head) const {
    const auto number = static_cast<uint64_t>(op.number);
    const bool y = UniformFromBits(DrawBits(head.stream, RandomPurpose::kHalve, number, 0)) < 0.5f;
    const bool complement = UniformFromBits(DrawBits(head.stream, RandomPurpose::kComplement, number, 0)) < 0.5f;
    StoreValue(head.values + op.out, AwaitValue(head.values + args.list[op.begin + (y != complement ? 1 : 0)]));
  }

  // One warp: nearly all lists have four entries, and there are very many of them.
  __device__ void HalveFour(const SpanHalve* ops, int32_t count, int32_t y) const {
    const SpanHead* head = HeadOf(args, ops->plan, y);
    if (ops->plan == ops[count - 1].plan && (head == nullptr || HalveTogether(ops, count, *head))) return;
    for (int32_t i = 0; i < count; ++i) {  // of several plans, or in need of care
      if (const SpanHead* own = HeadOf(args, ops[i].plan, y)) HalveSmall(ops[i], *own);
      __syncwarp();
    }
  }
  __device__ __forceinline__ bool HalveTogether(const SpanHalve* ops, int32_t count, const SpanHead& head) const {
    int32_t* entries = memory.entries + warp * kWarpList;
    const int32_t of = min(lane % kWarpList / kFourEntries, count - 1);
    if (lane < kWarpList) entries[lane] = AwaitValue(head.values + args.list[ops[of].begin + lane % kFourEntries]);
    __syncwarp();
    const EntryRows<T> rows{args, head, entries, static_cast<int32_t>(&head - args.heads)};
    const int32_t list = lane % 8 / 2;
    const SpanHalve& op = ops[min(list, count - 1)];
    bool done = false;
    const bool keep_y = HalveFours<NumberOf<T>>(
        rows, args.key_dim, args.value_dim, args.halve, head.stream, static_cast<uint64_t>(op.number),
        shared + static_cast<size_t>(warp) * HalveWarpBytes(args.key_dim), done);
    if (done && lane < 2 * count)
      StoreValue(head.values + op.out + lane % 2, entries[list * kFourEntries + lane % 2 * 2 + (keep_y ? 1 : 0)]);
    __syncwarp();
    return done;
  }

  // One warp.
  __device__ void HalveSmall(const SpanHalve& op, const SpanHead& head) const {
    int32_t* entries = memory.entries + warp * kWarpList;
    uint8_t* keep = memory.keep + warp * (kWarpList / 2);
    if (lane < op.count) entries[lane] = AwaitValue(head.values + args.list[op.begin + lane]);
    __syncwarp();
    const EntryRows<T> rows{args, head, entries, static_cast<int32_t>(&head - args.heads)};
    HalveList<NumberOf<T>, kWarp, kWarpList>(rows, op.count, args.key_dim, args.value_dim, args.halve, head.stream,
                                             static_cast<uint64_t>(op.number), nullptr,
                                             shared + static_cast<size_t>(warp) * HalveWarpBytes(args.key_dim), keep);
    if (lane < op.count / 2) StoreValue(head.values + op.out + lane, entries[2 * lane + (keep[lane] != 0 ? 1 : 0)]);
  }

  // The block.
  __device__ void Halve(const SpanHalve& op, const SpanHead& head) const {
    for (int32_t i = thread; i < op.count; i += kThreads)
      memory.entries[i] = AwaitValue(head.values + args.list[op.begin + i]);
    __syncthreads();
    const EntryRows<T> rows{args, head, memory.entries, static_cast<int32_t>(&head - args.heads)};
    HalveList<NumberOf<T>, kThreads, kSpanClasses[3]>(rows, op.count, args.key_dim, args.value_dim, args.halve,
                                                      head.stream, static_cast<uint64_t>(op.number), nullptr, shared,
                                                      memory.keep);
    for (int32_t a = thread; a < op.count / 2; a += kThreads)
      StoreValue(head.values + op.out + a, memory.entries[2 * a + (memory.keep[a] != 0 ? 1 : 0)]);
  }
  __device__ void HalveLong(const SpanHalve& op, const SpanHead& head) const {
    const int32_t* nodes = args.list + op.begin;
    for (int32_t i = thread; i < op.count; i += kThreads) AwaitValue(head.values + nodes[i]);
    __threadfence();  // all threads read them now, from the L1 if they are there
    __syncthreads();
    const NodeRows<T> rows{args, head, nodes, static_cast<int32_t>(&head - args.heads)};
    uint8_t* keep = head.keep + op.begin / 2;
    HalveList<NumberOf<T>, kThreads>(rows, op.count, args.key_dim, args.value_dim, args.halve, head.stream,
                                     static_cast<uint64_t>(op.number), head.halve_scratch + SpanScratch(op.begin),
                                     shared, keep);
    for (int32_t a = thread; a < op.count / 2; a += kThreads)
      StoreValue(head.values + op.out + a, head.values[nodes[2 * a + (keep[a] != 0 ? 1 : 0)]]);
  }

  // Item `item` for the y-th head of the operations' plans, of which there may be none.
  __device__ void Run(const SpanItem& item, int32_t y) const {
    if (item.kind == kSpanSample) {
      if (warp >= item.count) return;
      const SpanSample& op = args.samples[item.begin + warp];
      if (const SpanHead* head = HeadOf(args, op.plan, y)) Sample(op, *head);
      return;
    }
    const int32_t own = item.kind == 0 ? thread : item.kind == 1 ? warp * kFours : item.kind == 2 ? warp : 0;
    if (own >= item.count) return;
    const SpanHalve& op = args.halves[item.begin + own];
    if (item.kind == 1) return HalveFour(&op, min(kFours, item.count - own), y);
    const SpanHead* head = HeadOf(args, op.plan, y);
    if (head == nullptr) return;
    if (item.kind == 0)
      Coin(op, *head);
    else if (item.kind == 2)
      HalveSmall(op, *head);
    else if (item.kind == 3)
      Halve(op, *head);
    else if constexpr (kLong)
      HalveLong(op, *head);
  }

  // The far list of a prompt block.
  __device__ void Far(int32_t at_block, int32_t g) const {
    const SpanHead& head = args.heads[g];
    const SpanPlan& plan = args.plans[head.plan];
    const SpanBlock& block = plan.blocks[at_block];
    const int64_t row = at_block - graph.first_block;
    int32_t* index = head.far_index + row * head.far_capacity;
    float* bias = head.far_bias + row * head.far_capacity;
    const auto put = [&](int32_t from, int32_t count, const auto& entry) {
      for (int32_t i = thread; i < count; i += kThreads) entry(i, index[from + i], bias[from + i]);
      return from + count;
    };
    int32_t at = put(0, block.sinks, [&](int32_t i, int32_t& x, float& b) { x = plan.sink_index[i], b = 0; });
    at = put(at, block.old_tail,
             [&](int32_t i, int32_t& x, float& b) { x = -1 - plan.old_tail[block.old_tail_begin + i], b = 0; });
    const int32_t* snapshot = head.snapshots + int64_t{at_block} * head.protect;
    at = put(at, block.protected_count, [&](int32_t i, int32_t& x, float& b) { x = snapshot[i], b = 0; });
    const SpanMember* members = args.members + block.member_begin;
    at = put(at, block.members, [&](int32_t i, int32_t& x, float& b) {
      x = AwaitValue(head.values + members[i].node);
      b = args.exponent * members[i].log_weight;
    });
    if (thread == 0) head.far_count[row] = at;
  }
};

// Blocks draw tickets: whoever waits for a value holds a later ticket than who computes it, and the earliest ticket that is not
// done waits for nobody. So it ends, however many blocks there is room for.
template <class T, bool kLong>
__global__ __launch_bounds__(kThreads, kLong ? 2 : 4) void GraphKernel(const __grid_constant__ SpanArgs args,
                                                                       const __grid_constant__ SpanGraph graph) {
  extern __shared__ __align__(16) char shared[];
  __shared__ GraphMemory memory;
  const GraphWorker<T, kLong> worker{args, graph, memory, shared};
  const int32_t operations = graph.item_count * args.most_heads;
  const int32_t all = operations + (graph.blocks - graph.first_block) * args.kv_heads;
  int32_t next = threadIdx.x == 0 ? atomicAdd(graph.ticket, 1) : 0;
  while (true) {
    __syncthreads();  // nobody needs the last item's memory any more
    if (threadIdx.x == 0) memory.ticket = next;
    __syncthreads();
    const int32_t ticket = memory.ticket;
    if (ticket >= all) return;
    if (threadIdx.x == 0) next = atomicAdd(graph.ticket, 1);  // is there by the time that this one is done
    if (ticket < operations)
      worker.Run(graph.items[ticket / args.most_heads], ticket % args.most_heads);
    else
      worker.Far(graph.first_block + (ticket - operations) / args.kv_heads, (ticket - operations) % args.kv_heads);
  }
}

// Task i of a plan, for one head: which entry goes to which row.
struct StoreTask {
  int32_t entry, to;
};
__device__ __forceinline__ StoreTask FindTask(const SpanStorePlan& plan, const SpanStoreHead& head, int32_t i,
                                              bool writes) {
  const int32_t code = plan.code[i];
  const bool is_protected = i >= plan.nodes && i < plan.nodes + plan.protects;
  const int32_t entry = i < plan.nodes ? head.values[code] : is_protected ? head.protected_index[code] : code;
  const bool in_place = head.protected_slot != nullptr;
  const bool known = is_protected && in_place && code < plan.protected_before;
  const int32_t to = known ? head.protected_slot[code] : plan.to[i];
  if (writes && is_protected && in_place && !known) head.protected_slot[code] = to;
  return {entry, to};
}

__global__ void StoreKernel(const SpanStorePlan* plans, const SpanStoreHead* heads) {
  const SpanStoreHead& head = heads[blockIdx.y];
  const SpanStorePlan& plan = plans[head.plan];
  const auto i = static_cast<int32_t>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= plan.count) return;
  const StoreTask task = FindTask(plan, head, i, true);
  const bool stays = task.entry == -1 - task.to, moves = task.entry < 0 && !stays;
  head.stage_index[i] = moves ? task.entry : kSkip;
  head.index[i] = stays ? kSkip : moves ? -1 - i : task.entry;
  head.to[i] = task.to;
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

// Codes go to codes as they are; anything else is converted.
__device__ void CopyRowTo(const CodeRow& from, void* to, DType dtype, int64_t element, int32_t dim, int lane) {
  if (dtype == DType::kI8) return CopyRow(from.code, static_cast<int8_t*>(to) + element, dim, lane);
  for (int32_t i = lane; i < dim; i += kWarp) StoreAs(from[i], to, dtype, element + i);
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
__device__ __forceinline__ int64_t EntryOfWarp() { return (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp; }

template <class T>
__device__ __forceinline__ void CopyEntry(const GatherArgs& args, const GatherHead& head, int32_t index, int64_t to) {
  const auto lane = static_cast<int>(threadIdx.x % kWarp);
  CopyRowTo(EntryRow<T, true>(args.k, head.kv_head, head.slab_key, head.slab_scale, args.key_dim, index), head.key,
            args.key_dtype, to * args.key_stride, args.key_dim, lane);
  CopyRowTo(EntryRow<T, false>(args.v, head.kv_head, head.slab_value, head.slab_scale, args.value_dim, index),
            head.value, args.value_dtype, to * args.value_stride, args.value_dim, lane);
  if (lane != 0) return;
  if constexpr (kScaled<T>)
    if (args.key_dtype == DType::kI8) head.scale[to] = EntryScales(args.k, head.kv_head, head.slab_scale, index);
  if (head.position != nullptr)
    head.position[to * args.position_stride] = index < 0 ? head.slab_position[-1 - index] : args.first_position + index;
  if (head.log_weight != nullptr) head.log_weight[to * args.log_weight_stride] = head.weights[to];
}
template <class T>
__device__ __forceinline__ void GatherEntry(const GatherArgs& args, const GatherHead& head) {
  const int64_t i = EntryOfWarp();
  if (i >= (args.rows ? head.rows : head.count)) return;
  const int32_t index = (args.rows ? head.row_index : head.index)[i];
  if (index == kSkip) return;
  const int32_t* places = args.rows ? head.row_to : head.to;
  CopyEntry<T>(args, head, index, places != nullptr ? places[i] : i);
}
template <class T>
__global__ void StoreCopiesKernel(const SpanStorePlan* plans, const SpanStoreHead* heads,
                                  const __grid_constant__ GatherArgs args) {
  const SpanStoreHead& head = heads[blockIdx.y];
  const SpanStorePlan& plan = plans[head.plan];
  const int64_t i = EntryOfWarp();
  if (i >= plan.count) return;
  const StoreTask task = FindTask(plan, head, static_cast<int32_t>(i), threadIdx.x % kWarp == 0);
  CopyEntry<T>(args, args.heads[blockIdx.y], task.entry, task.to);
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

void SpanBegin(const SpanArgs& args, const SpanDepartures* departures, int32_t* ticket, int64_t most_nodes,
               cudaStream_t stream) {
  // Few blocks: they may have to wait for those of an attention to make room.
  const dim3 grid(static_cast<uint32_t>(std::min<int64_t>(CeilDiv(most_nodes, 1024), 16)),
                  static_cast<uint32_t>(args.kv_heads));
  BeginKernel<<<grid, 256, 0, stream>>>(args, departures, ticket);
}

void SpanStore(const SpanStorePlan* plans, const SpanStoreHead* heads, int32_t kv_heads, int32_t most_count,
               cudaStream_t stream) {
  const dim3 grid(static_cast<uint32_t>(CeilDiv(most_count, 256)), static_cast<uint32_t>(kv_heads));
  StoreKernel<<<grid, 256, 0, stream>>>(plans, heads);
}

namespace {

template <class T, bool kLong>
void RunGraph(const SpanArgs& args, const SpanGraph& graph, int32_t multiprocessors, cudaStream_t stream) {
  const int32_t longest = kLong ? INT32_MAX : kSpanClasses[3];
  const size_t shared = std::max(kGraphWarps * HalveWarpBytes(args.key_dim),
                                 HalveSharedBytes<NumberOf<T>>(args.key_dim, args.value_dim, longest));
  const int64_t tickets =
      int64_t{graph.item_count} * args.most_heads + int64_t{graph.blocks - graph.first_block} * args.kv_heads;
  const int64_t blocks = std::min<int64_t>(tickets, int64_t{std::max(1, multiprocessors)} * (kLong ? 2 : 4));
  if (blocks > 0) GraphKernel<T, kLong><<<static_cast<uint32_t>(blocks), kThreads, shared, stream>>>(args, graph);
}

}  // namespace

void SpanRun(const SpanArgs& args, const SpanGraph& graph, int32_t multiprocessors, cudaStream_t stream) {
  WithStorage(args.dtype, [&](auto type) {
    using T = decltype(type);
    if (graph.long_lists)
      RunGraph<T, true>(args, graph, multiprocessors, stream);
    else
      RunGraph<T, false>(args, graph, multiprocessors, stream);
  });
}

void SpanStoreCopies(const SpanStorePlan* plans, const SpanStoreHead* heads, const GatherArgs& copies,
                     cudaStream_t stream) {
  const dim3 grid(static_cast<uint32_t>(CeilDiv(int64_t{copies.most_count} * kWarp, 256)),
                  static_cast<uint32_t>(copies.head_count));
  WithStorage(copies.dtype,
              [&](auto type) { StoreCopiesKernel<decltype(type)><<<grid, 256, 0, stream>>>(plans, heads, copies); });
}

void Gather(const GatherArgs& args, cudaStream_t stream) {
  if (args.most_count == 0) return;
  const dim3 grid(static_cast<uint32_t>(CeilDiv(int64_t{args.most_count} * kWarp, 256)),
                  static_cast<uint32_t>(args.head_count));
  WithStorage(args.dtype, [&](auto type) { GatherKernel<decltype(type)><<<grid, 256, 0, stream>>>(args); });
}

void GatherOne(const GatherHead& head, const GatherArgs& args, cudaStream_t stream) {
  if (args.most_count == 0) return;
  const auto grid = static_cast<uint32_t>(CeilDiv(int64_t{args.most_count} * kWarp, 256));
  WithStorage(args.dtype, [&](auto type) { GatherOneKernel<decltype(type)><<<grid, 256, 0, stream>>>(args, head); });
}

}  // namespace express::cuda
