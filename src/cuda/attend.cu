// Weighted decode attention over slabs of 16 and of 8 bits: the kernel, who takes which keys, and the launches.
//
// Work is cut into shares of about as many keys each, one after the other over all heads of all caches; a cluster of blocks
// takes a share (one block where there are no clusters, and where heads are many). Each warp has its own way through the
// share's tiles of 16 keys, and a ring of stages in shared memory that the keys, values and log weights of its coming tiles
// travel to, asynchronously and across the border from head to head: descriptions of heads, queries and tiles are all asked
// for before they are needed, the first tiles before anything else is known. Free slots are left out once their weights are
// there.
//
// At the end of a head warps merge through shared memory, the blocks of a cluster through each other's, and shares through
// Head::partial: the last one to finish merges them.
#include <algorithm>

#include "src/cuda/attend.cuh"
#include "src/cuda/attend_codes.cuh"
#include "src/cuda/attend_merge.cuh"
#include "src/cuda/attend_tile.cuh"

namespace express::cuda {
namespace {

// ---- the kernel ----

template <class Layout>
constexpr int64_t StageBytes() {
  return Layout::kBytes + 2 * kTile * static_cast<int64_t>(sizeof(float));
}

__device__ __forceinline__ Share WholeHead(const AttendLaunch& launch, int32_t index) {
  const Head& head = launch.args.heads[index / launch.args.kv_heads][index % launch.args.kv_heads];
  return {head.key, head.value, head.log_weight, head.capacity, index, 0, 0, 1};
}

// Share `index` of launch.cut equal ones, and where the next one begins, by what the heads' descriptions say now. Called by whole
// warps; with up to 32 heads they are read once.
__device__ __forceinline__ void CutShare(const AttendLaunch& launch, int32_t index, Share& share, Share& next) {
  const AttendArgs& a = launch.args;
  const int32_t heads = a.caches * a.kv_heads, lane = static_cast<int32_t>(threadIdx.x % kWarp);
  const auto read = [&](int32_t i) {
    return i < heads ? static_cast<int32_t>(CeilDiv(a.heads[i / a.kv_heads][i % a.kv_heads].capacity, kShareKeys)) : 0;
  };
  const int32_t first_units = read(lane);
  const auto units_of = [&](int32_t i) { return i < kWarp ? first_units : read(i); };
  int32_t total = 0, most = 0;
  for (int32_t i = lane; i - lane < heads; i += kWarp) {
    const int32_t units = units_of(i);
    total += units;
    most = max(most, units);
  }
  total = WarpReduce(total, [](int32_t x, int32_t y) { return x + y; });
  most = WarpReduce(most, [](int32_t x, int32_t y) { return max(x, y); });
  const auto each =
      static_cast<int32_t>(max(int64_t{1}, max(CeilDiv(total, launch.cut), CeilDiv(most, kMostSplits - 4))));
  share = next = Share{nullptr, nullptr, nullptr, 0, heads, 0, 0, 1};
  for (int32_t i = lane, before = 0; i - lane < heads; i += kWarp) {
    const int32_t units = units_of(i);
    int32_t end = units;  // of the heads up to this one
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const int32_t x = __shfl_up_sync(0xFFFFFFFFu, end, offset);
      if (lane >= offset) end += x;
    }
    end += before;
    before = __shfl_sync(0xFFFFFFFFu, end, kWarp - 1);
#pragma unroll
    for (int32_t which = 0; which < 2; ++which) {
      const int32_t unit = (index + which) * each;
      const uint32_t found = __ballot_sync(0xFFFFFFFFu, unit >= end - units && unit < end);
      if (found == 0) continue;
      const int from = __ffs(static_cast<int>(found)) - 1;
      const int32_t last = __shfl_sync(0xFFFFFFFFu, end, from) - 1,
                    first = last + 1 - __shfl_sync(0xFFFFFFFFu, units, from);
      Share& to = which == 0 ? share : next;
      to.head = i - lane + from;
      to.tile = (unit - first) * kShareTiles;
      to.split = static_cast<int16_t>(index + which - first / each);
      to.splits = static_cast<int16_t>(last / each - first / each + 1);
    }
  }
  if (share.head == heads) return;
  const Share whole = WholeHead(launch, share.head);
  share.key = whole.key;
  share.value = whole.value;
  share.log_weight = whole.log_weight;
  share.capacity = whole.capacity;
}

// grid: shares clusters of any size.
template <class T, int kKeyDim, int kValueDim, int kTiles>
__global__ __launch_bounds__(kMostWarps* kWarp, 1) void AttendKernel(const __grid_constant__ AttendLaunch launch) {
  using Layout = typename Parts<T, kKeyDim, kValueDim, kTiles>::Layout;
  extern __shared__ __align__(
      128) char shared[];  // MergeMemory; (warps, stages) tiles; (warps, 2, stages, 16) log weights
  auto& memory = *reinterpret_cast<MergeMemory<kValueDim>*>(shared);
  const int warp = static_cast<int>(threadIdx.x / kWarp), lane = static_cast<int>(threadIdx.x % kWarp);
  const int warps = static_cast<int>(blockDim.x / kWarp), stages = launch.stages;
  const auto blocks = static_cast<int32_t>(ClusterSize()), rank = static_cast<int32_t>(ClusterRank());
  char* tiles = shared + MergeMemory<kValueDim>::Bytes(warps);
  float* weights = reinterpret_cast<float*>(tiles + warps * stages * Layout::kBytes) + warp * 2 * stages * kTile;
  const uint32_t ring = SharedAddress(tiles + warp * stages * Layout::kBytes);
  const int32_t index = static_cast<int32_t>(blockIdx.x) / blocks, first_tile = warp * blocks + rank,
                step = warps * blocks;
  Share share, next;
  if (launch.heads > 0) {
    share = WholeHead(launch, index * launch.heads);
    const int32_t end = min((index + 1) * launch.heads, launch.args.caches * launch.args.kv_heads);
    next = {nullptr, nullptr, nullptr, 0, end, 0, 0, 1};
  } else if (launch.cut > 0) {
    CutShare(launch, index, share, next);
  } else {
    share = launch.shares[index], next = launch.shares[index + 1];
  }
  Walk<T, kKeyDim, kValueDim> walk(launch, share, next, first_tile, step);
  DependentsMayStart();
  if (blocks > 1) ClusterArrive();
  WaitForKernelBefore();

  // Asks for the walk's tile, unless it is known to be free, and for the log weights of the tile that comes a ring later: to know that.
  // Places of weights are twice as many: those of the tile of stage s are at s, or, every second time round, at stages + s.
  int stage = 0, half = 0;
  const auto fetch = [&](int weights_half) {
    if (walk.valid) {
      float* here = weights + (weights_half * stages + stage) * kTile;
      const bool known = walk.taken >= stages;
      if (!known) walk.CopyWeights(here, 0);
      if (!known || __any_sync(0xFFFFFFFFu, here[lane % kTile] != kMinusInfinity)) {
        const uint32_t to = ring + static_cast<uint32_t>(stage * Layout::kBytes);
        const int keys = walk.Keys();
        Layout::Keys::Copy(to, walk.Key(), keys);
        Layout::Values::Copy(to + Layout::Keys::kBytes, walk.Value(), keys);
        if constexpr (kScaled<T>) Layout::CopyScales(to, walk.Scales(), keys);
      }
      walk.CopyWeights(weights + ((1 - weights_half) * stages + stage) * kTile, stages);
      walk.Advance();
    }
    CopyAsyncCommit();
  };
  for (; stage < stages; ++stage) fetch(0);
  stage = 0;
  typename Parts<T, kKeyDim, kValueDim, kTiles>::State state;
  int32_t capacity = share.capacity;
  if (!walk.Has(share.head)) {  // more shares than there is to share
    if (blocks > 1) ClusterWait();
    return;
  }
  state.LoadQueries(launch, share.head, state.q);
  typename decltype(state)::Queries next_queries = {};
  const float scale = launch.args.scale * kLog2E, exponent = launch.args.exponent * kLog2E;
  uint32_t turn = 0;
  for (int32_t head = share.head; walk.Has(head); ++head) {
    state.Clear();
    const bool first = head == share.head, last = head == next.head;
    const int32_t end = last ? next.tile : static_cast<int32_t>(CeilDiv(capacity, kTile));
    if (walk.Has(head + 1))
      capacity = launch.args.heads[(head + 1) / launch.args.kv_heads][(head + 1) % launch.args.kv_heads].capacity;
    // They may come from far: under load that takes longer than the end of a head.
    if (state.kAhead && walk.Has(head + 1)) state.LoadQueries(launch, head + 1, next_queries);
    for (int32_t tile = (first ? share.tile : 0) + first_tile; tile < end; tile += step) {
      if (stages == 3)
        CopyAsyncWait<2>();
      else
        CopyAsyncWaitFor(stages - 1);
      __syncwarp();
      state.Compute(ring + static_cast<uint32_t>(stage * Layout::kBytes), weights + (half * stages + stage) * kTile,
                    scale, exponent);
      __syncwarp();
      fetch(1 - half);
      if (++stage == stages) stage = 0, half = 1 - half;
    }
    if (walk.Has(head + 1)) {
      if constexpr (state.kAhead)
        state.Take(next_queries);
      else
        state.LoadQueries(launch, head + 1, state.q);
    }
    Finish(launch, state, memory, head, first ? share.split : 0, first ? share.splits : last ? next.splits : 1, turn);
  }
  FinishSplits(launch, memory, share, next);
}

// ---- who takes which keys ----

// What decides between ways to share the work, in microseconds and bytes, measured. A multiprocessor alone reads little more
// than its part of the memory's bandwidth: all must have something to do.
constexpr double kReadRate = 37e3, kMemoryRate = 30e3;  // per multiprocessor
constexpr double kFilled = 0.85;                        // a smaller part of places taken is worth smaller blocks
constexpr double kClusterTime = 0.6, kClusterBlockTime = 0.03, kSplitTime = 5.0;

int32_t Units(int32_t capacity) { return static_cast<int32_t>(CeilDiv(capacity, kShareKeys)); }

struct Work {
  int64_t units = 0;
  int32_t heads = 0, most_units = 0;
};
Work Measure(const AttendArgs& args, const Head* const* described) {
  Work work{.units = 0, .heads = args.caches * args.kv_heads, .most_units = 0};
  for (int32_t c = 0; c < args.caches; ++c)
    for (int32_t g = 0; g < args.kv_heads; ++g) {
      const int32_t units = Units(described[c][g].capacity);
      work.units += units;
      work.most_units = std::max(work.most_units, units);
    }
  return work;
}

struct Choice {
  int cluster = 0;     // of 2^cluster blocks
  bool whole = false;  // a head each
};
// What costs least.
Choice Choose(const AttendArgs& args, const Work& work, const AttendMachine& machine) {
  const double unit_bytes = static_cast<double>(kShareKeys) * (args.key_dim + args.value_dim) * SizeOf(args.dtype);
  const double total = static_cast<double>(work.units) * unit_bytes;
  const double memory = total / (kMemoryRate * machine.multiprocessors);
  Choice best;
  double best_cost = 0;
  for (int i = 0; i < AttendMachine::kClusterSizes; ++i) {
    const int32_t clusters = machine.clusters[i];
    if (clusters == 0) continue;
    const double overhead = i == 0 ? 0 : kClusterTime + kClusterBlockTime * (1 << i);
    const auto consider = [&](bool whole, int32_t shares, double bytes, double cost) {
      const double rate = kReadRate * std::min<double>(1 << i, static_cast<double>(machine.multiprocessors) / shares);
      cost += overhead + std::max(memory, bytes / rate);
      if (best_cost == 0 || cost < best_cost) best = {i, whole}, best_cost = cost;
    };
    if (work.heads <= clusters) consider(true, work.heads, work.most_units * unit_bytes, 0);
    consider(false, clusters, total / clusters, kSplitTime);
  }
  return best;
}

// Cuts the keys of all heads, one head after the other, into at most `most` shares of about as many each; where a head's end
// is near, there. Returns how many.
int32_t CutShares(const AttendArgs& args, const Head* const* described, const Work& work, bool whole, int32_t most,
                  Share* shares) {
  const auto head_at = [&](int32_t i) -> const Head& { return described[i / args.kv_heads][i % args.kv_heads]; };
  const int64_t least = CeilDiv(work.most_units, kMostSplits - 4);  // so that splits of a head are not too many
  int64_t left = work.units;
  int32_t count = 0, head = 0, unit = 0;
  while (head < work.heads) {
    const Head& h = head_at(head);
    shares[count++] = {h.key, h.value, h.log_weight, h.capacity, head, unit * kShareTiles, 0, 1};
    if (whole) {
      ++head;
      continue;
    }
    const int64_t target = std::max(least, CeilDiv(left, std::max(1, most - count + 1)));
    const int64_t near = std::max<int64_t>(1, target / 10);
    int64_t taken = 0;
    while (head < work.heads && taken < target) {
      const int32_t rest = Units(head_at(head).capacity) - unit;
      if (taken + rest <= target + near || count == most) {
        taken += rest;
        ++head, unit = 0;
      } else if (taken > 0 && target - taken <= near) {
        break;
      } else {
        unit += static_cast<int32_t>(target - taken);
        taken = target;
      }
    }
    left -= taken;
  }
  shares[count] = {nullptr, nullptr, nullptr, 0, work.heads, 0, 0, 1};
  for (int32_t first = 1; first < count; ++first) {
    if (shares[first].tile == 0) continue;
    // Its head began in the share before.
    int32_t end = first + 1;
    while (end < count && shares[end].tile > 0 && shares[end].head == shares[first].head) ++end;
    const int32_t begin = first - 1;
    for (int32_t s = shares[begin].head == shares[first].head ? begin : first; s < end; ++s) {
      shares[s].split = static_cast<int16_t>(s - begin);
      shares[s].splits = static_cast<int16_t>(end - begin);
    }
    first = end - 1;
  }
  return count;
}

// Heads of a block, of as many blocks as there are at once; and the part of these blocks that have some.
int32_t HeadsOfBlock(int32_t heads, const AttendMachine& machine) {
  return static_cast<int32_t>(CeilDiv(heads, machine.multiprocessors * machine.blocks));
}
double Fill(int32_t heads, const AttendMachine& machine) {
  const int32_t places = machine.multiprocessors * machine.blocks;
  return static_cast<double>(heads) / (static_cast<double>(HeadsOfBlock(heads, machine)) * places);
}

// With more heads than multiprocessors, all alike, blocks that take as many whole heads each are best: nothing must be merged
// between blocks, which takes up to 7 us at a launch's end. With very many, even shares are, and where heads differ in length.
bool WholeHeads(const AttendArgs& args, const Work& work, const AttendMachine& machine) {
  const bool alike = !args.sizes_change && int64_t{work.most_units} * work.heads <= work.units * 9 / 8;
  return alike && machine.blocks > 1 && work.heads > machine.multiprocessors &&
         work.heads < 12 * machine.multiprocessors;
}

// Measured on an H200. Two blocks to a multiprocessor are best for a few long heads, which are spread wider, and for many, where the
// end of one passes under the keys of another block's. Long rows need the memory of one.
int32_t BestBlocks(const AttendArgs& args, const Work& work, const AttendMachine* machines) {
  const AttendMachine &one = machines[0], &two = machines[1], &three = machines[2];
  if (args.dtype == DType::kF32 || args.key_dim + args.value_dim > 256) return 1;
  if (work.heads <= one.multiprocessors) {
    const bool few = 16 * work.heads <= one.multiprocessors && args.max_capacity >= 2048;
    return few ? 2 : 1;
  }
  if (WholeHeads(args, work, two)) return Fill(work.heads, two) < kFilled && three.compute_capability >= 90 ? 3 : 2;
  return work.heads >= 4 * one.multiprocessors ? 2 : 1;
}

// Warps of a block, if there can be so many blocks of a multiprocessor.
int32_t MostWarps(int32_t blocks) { return blocks == 1 ? kMostWarps : kMostWarps / 2; }

// Warps of a block and stages of a warp that fit into its shared memory: three stages at least, if there can be four warps,
// and then as many warps as there can be.
struct Ring {
  int32_t warps, stages;
};
template <int kValueDim>
Ring ChooseRing(int64_t bytes, int64_t stage_bytes, int32_t most_warps) {
  const auto fit = [&](int32_t warps) {
    const int64_t stages = (bytes - MergeMemory<kValueDim>::Bytes(warps)) / stage_bytes / warps;
    return static_cast<int32_t>(std::clamp<int64_t>(stages, 0, kMostStages));
  };
  for (int32_t warps = most_warps; warps >= 4; --warps)
    if (fit(warps) >= 3) return {warps, fit(warps)};
  for (int32_t warps = std::min(4, most_warps); warps > 1; --warps)
    if (fit(warps) >= 2) return {warps, fit(warps)};
  return {1, std::max(1, fit(1))};
}

// ---- launches ----

template <class T, int kKeyDim, int kValueDim, int kTiles>
struct Kernel {
  static constexpr auto* kFunction = AttendKernel<T, kKeyDim, kValueDim, kTiles>;
  using Merge = MergeMemory<kValueDim>;
  static constexpr int64_t kStage = StageBytes<typename Parts<T, kKeyDim, kValueDim, kTiles>::Layout>();

  static cudaError_t Prepare(const AttendMachine& machine) {
    int device = 0, bytes = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kFunction, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess && machine.compute_capability >= 90)
      error = cudaFuncSetAttribute(kFunction, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    return error;
  }
  static void Run(AttendLaunch& launch, int32_t shares, int cluster, const AttendMachine& machine,
                  cudaStream_t stream) {
    const Ring ring = ChooseRing<kValueDim>(machine.shared_bytes, kStage, MostWarps(machine.blocks));
    launch.stages = ring.stages;
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<uint32_t>(shares) << cluster);
    config.blockDim = dim3(static_cast<uint32_t>(ring.warps * kWarp));
    config.dynamicSmemBytes = static_cast<size_t>(Merge::Bytes(ring.warps) + ring.warps * ring.stages * kStage);
    config.stream = stream;
    config.attrs = attributes;
    if (cluster > 0) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs++].val.clusterDim = {1u << cluster, 1, 1};
    }
    if (machine.dependent_launches) attributes[config.numAttrs++] = LaunchEarly();
    cudaLaunchKernelEx(&config, kFunction, launch);
  }
};

// body(kernel) with the kernel for these types, dims and rows.
template <class T, int kKeyDim, int kValueDim, class Body>
auto WithRows(int32_t rows, const Body& body) {
  if constexpr (kScaled<T>) {  // more rows are taken one after the other: fewer kernels
    return body(Kernel<T, kKeyDim, kValueDim, 1>());
  } else {
    if (rows <= kQueries) return body(Kernel<T, kKeyDim, kValueDim, 1>());
    return body(Kernel<T, kKeyDim, kValueDim, 2>());
  }
}
template <class T, class Body>
auto WithDims(int32_t key_dim, int32_t value_dim, int32_t rows, const Body& body) {
  switch (key_dim) {
    case 64:
      return WithRows<T, 64, 64>(rows, body);
    case 80:
      return WithRows<T, 80, 80>(rows, body);
    case 96:
      return WithRows<T, 96, 96>(rows, body);
    case 128:
      return WithRows<T, 128, 128>(rows, body);
    case 192:
      if (value_dim == 128) return WithRows<T, 192, 128>(rows, body);
      return WithRows<T, 192, 192>(rows, body);
    default:
      return WithRows<T, 256, 256>(rows, body);
  }
}
template <class Body>
auto WithKernel(DType dtype, int32_t key_dim, int32_t value_dim, int32_t rows, const Body& body) {
  if (dtype == DType::kI8) return WithDims<Int8>(key_dim, value_dim, rows, body);
  if (dtype == DType::kF16) return WithDims<Half>(key_dim, value_dim, rows, body);
  return WithDims<BFloat16>(key_dim, value_dim, rows, body);
}

}  // namespace

bool AttendSupported(int32_t key_dim, int32_t value_dim) {
  const bool known =
      key_dim == 64 || key_dim == 80 || key_dim == 96 || key_dim == 128 || key_dim == 192 || key_dim == 256;
  return known && (key_dim == value_dim || (key_dim == 192 && value_dim == 128));
}

int32_t AttendMaxSplits(int32_t capacity) {
  return static_cast<int32_t>(std::min(CeilDiv(capacity, kShareKeys), kMostSplits));
}

cudaError_t DescribeAttend(int32_t device, int32_t blocks, AttendMachine* machine) {
  int multiprocessors = 0, major = 0, minor = 0, shared = 0, all_shared = 0, driver = 0;
  cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&all_shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  if (error == cudaSuccess) error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return error;
  *machine = {.multiprocessors = multiprocessors,
              .compute_capability = 10 * major + minor,
              .blocks = blocks,
              .shared_bytes = std::min(shared, all_shared / blocks - 1024),  // a block takes 1 KB by itself
              .dependent_launches = major >= 9 && driver >= 12030,           // capturable from then on
              .clusters = {std::min(multiprocessors * blocks, kMostShares)}};
  if (major < 9) return cudaSuccess;
  using Typical = Kernel<BFloat16, 128, 128, 1>;
  error = Typical::Prepare(*machine);
  for (int i = 1; i < AttendMachine::kClusterSizes && error == cudaSuccess; ++i) {
    cudaLaunchAttribute size{};
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim = {1u << i, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<uint32_t>(multiprocessors * blocks) << i);
    config.blockDim = dim3(static_cast<uint32_t>(MostWarps(blocks) * kWarp));
    config.dynamicSmemBytes = static_cast<size_t>(machine->shared_bytes);
    config.attrs = &size;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, Typical::kFunction, &config) != cudaSuccess) {
      cudaGetLastError();  // such clusters are not to be had
      clusters = 0;
    }
    machine->clusters[i] = std::min(clusters, kMostShares);
  }
  return error;
}

cudaError_t PrepareAttend(DType dtype, int32_t key_dim, int32_t value_dim, const AttendMachine& machine) {
  cudaError_t error = cudaSuccess;
  if (dtype == DType::kF32) return error;
  for (const int32_t rows : {1, kPartialRows})
    if (error == cudaSuccess)
      error = WithKernel(dtype, key_dim, value_dim, rows, [&](auto kernel) { return kernel.Prepare(machine); });
  return error;
}

void Attend(const AttendArgs& args, const Head* const* described, const AttendMachine* machines, int32_t count,
            cudaStream_t stream) {
  AttendLaunch launch;
  launch.args = args;
  const Work work = Measure(args, described);
  const AttendMachine& machine = machines[count == 1 ? 0 : BestBlocks(args, work, machines) - 1];
  const int32_t rows = args.tokens * args.group;
  const bool plain = args.dtype == DType::kF32;
  const int32_t at_once = plain ? kPlainRows : args.dtype == DType::kI8 ? kQueries : kPartialRows;
  int32_t shares = 0;
  Choice choice;
  if (!plain) {
    const bool each = WholeHeads(args, work, machine);
    choice = each ? Choice{.cluster = 0, .whole = true} : Choose(args, work, machine);
    const int32_t most = machine.clusters[choice.cluster];
    launch.heads = each ? HeadsOfBlock(work.heads, machine) : choice.whole && args.sizes_change ? 1 : 0;
    launch.cut = args.sizes_change && launch.heads == 0 ? most : 0;
    shares = launch.heads > 0 ? static_cast<int32_t>(CeilDiv(work.heads, launch.heads))
             : launch.cut > 0 ? launch.cut
                              : CutShares(args, described, work, choice.whole, most, launch.shares);
  }
  for (launch.first_row = 0; launch.first_row < rows; launch.first_row += at_once) {
    launch.rows = std::min(at_once, rows - launch.first_row);
    if (plain)
      AttendPlain(launch, machine.multiprocessors, stream);
    else
      WithKernel(args.dtype, args.key_dim, args.value_dim, launch.rows,
                 [&](auto kernel) { kernel.Run(launch, shares, choice.cluster, machine, stream); });
  }
}

}  // namespace express::cuda
