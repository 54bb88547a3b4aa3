// Decode attention alone, without the library around it: microseconds and share of the read bandwidth by batch and entries, for
// the ways in which a launch can share out its work. The floor, how fast memory is only read, is measured in the same run.
// Calls follow each other in a graph, over slabs that together are far larger than the L2.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "bench/cuda_fill.cuh"
#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {
namespace {

constexpr int32_t kKvHeads = 8, kGroup = 4, kDim = 128;
constexpr int kReplays = 20;

void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

void Fill(void* data, size_t bytes) {
  FillKernel<<<2048, 256>>>(static_cast<BFloat16*>(data), static_cast<int64_t>(bytes / sizeof(BFloat16)));
}

// Memory that all measurements share.
class Pool {
 public:
  explicit Pool(size_t bytes) : bytes_(bytes) { Check(cudaMalloc(&data_, bytes)); }
  ~Pool() { cudaFree(data_); }
  // `apart`: what is taken next lies in allocations of its own, one per Apart.
  void Clear() {
    used_ = 0;
    for (void* piece : pieces_) cudaFree(piece);
    pieces_.clear();
    piece_ = nullptr;
  }
  void Apart(size_t bytes) {
    void* piece = nullptr;
    Check(cudaMalloc(&piece, bytes));
    Fill(piece, bytes);
    pieces_.push_back(piece);
    piece_ = static_cast<char*>(piece);
  }
  template <class T>
  T* Take(int64_t count) {
    const size_t size = (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    if (piece_ != nullptr) {
      T* in_piece = reinterpret_cast<T*>(piece_);
      piece_ += size;
      return in_piece;
    }
    T* at = reinterpret_cast<T*>(static_cast<char*>(data_) + used_);
    used_ += size;
    if (used_ > bytes_) Check(cudaErrorMemoryAllocation);
    return at;
  }
  void* data() { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_, used_ = 0;
  std::vector<void*> pieces_;
  char* piece_ = nullptr;
};

constexpr int kReadThreads = 256, kReadUnroll = 8;
__global__ __launch_bounds__(kReadThreads) void ReadKernel(const uint4* x, int64_t count, uint32_t* out) {
  uint32_t sum = 0;
  const int64_t step = int64_t{gridDim.x} * kReadThreads;
  for (int64_t i = int64_t{blockIdx.x} * kReadThreads + threadIdx.x; i < count; i += step * kReadUnroll) {
    uint4 y[kReadUnroll];
#pragma unroll
    for (int j = 0; j < kReadUnroll; ++j)
      y[j] = i + j * step < count ? __ldcs(x + i + j * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int j = 0; j < kReadUnroll; ++j) sum ^= y[j].x ^ y[j].y ^ y[j].z ^ y[j].w;
  }
  if (sum == 12345) *out = sum;
}

template <class Launch>
double Microseconds(cudaStream_t stream, const Launch& launch) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  Check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  launch();
  Check(cudaStreamEndCapture(stream, &graph));
  Check(cudaGraphInstantiate(&exec, graph, 0));
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin));
  Check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = 0; run < kReplays + 3; ++run) {
    Check(cudaEventRecord(begin, stream));
    Check(cudaGraphLaunch(exec, stream));
    Check(cudaEventRecord(end, stream));
    Check(cudaEventSynchronize(end));
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, begin, end));
    if (run >= 3) times.push_back(ms);
  }
  Check(cudaEventDestroy(begin));
  Check(cudaEventDestroy(end));
  Check(cudaGraphExecDestroy(exec));
  Check(cudaGraphDestroy(graph));
  std::nth_element(times.begin(), times.begin() + kReplays / 2, times.end());
  return 1e3 * static_cast<double>(times[kReplays / 2]);
}

double ReadFloor(Pool& pool, cudaStream_t stream, int32_t multiprocessors) {
  double best = 0;
  uint32_t* out = pool.Take<uint32_t>(1);
  for (const int blocks : {2, 4, 8, 16, 32}) {
    const double us = Microseconds(stream, [&] {
      ReadKernel<<<static_cast<uint32_t>(blocks * multiprocessors), kReadThreads, 0, stream>>>(
          static_cast<const uint4*>(pool.data()), static_cast<int64_t>(pool.bytes() / 16), out);
    });
    best = std::max(best, static_cast<double>(pool.bytes()) / us / 1e3);
  }
  return best;
}

__global__ void EmptyKernel() {}

// What a launch costs: empty kernels one after the other, as attention is launched.
double LaunchFloor(cudaStream_t stream, int32_t blocks, bool dependent) {
  constexpr int kLaunches = 100;
  return Microseconds(stream,
                      [&] {
                        for (int i = 0; i < kLaunches; ++i) {
                          cudaLaunchAttribute attribute = LaunchEarly();
                          cudaLaunchConfig_t config{};
                          config.gridDim = dim3(static_cast<uint32_t>(blocks));
                          config.blockDim = dim3(256);
                          config.stream = stream;
                          config.attrs = &attribute;
                          config.numAttrs = dependent ? 1 : 0;
                          Check(cudaLaunchKernelEx(&config, EmptyKernel));
                        }
                      }) /
         kLaunches;
}

struct Layers {
  std::vector<AttendArgs> args;
  std::vector<std::vector<Head>> described;
};

// `apart`: every sequence has its memory to itself, as caches have.
Layers MakeLayers(Pool& pool, int32_t batch, int32_t entries, int32_t layers, bool apart) {
  pool.Clear();
  Layers made;
  const int32_t heads = batch * kKvHeads;
  const int64_t partial = int64_t{AttendMaxSplits(entries)} * kPartialRows * (kDim + 2);
  std::vector<float*> partials;
  int32_t* tickets = pool.Take<int32_t>(heads);
  Check(cudaMemset(tickets, 0, static_cast<size_t>(heads) * sizeof(int32_t)));
  for (int32_t i = 0; i < heads; ++i) partials.push_back(pool.Take<float>(partial));
  for (int32_t l = 0; l < layers; ++l) {
    std::vector<Head> described;
    for (int32_t i = 0; i < heads; ++i) {
      if (apart && i % kKvHeads == 0)
        pool.Apart(static_cast<size_t>(kKvHeads) * (static_cast<size_t>(entries) * (4 * kDim + 4) + 4096));
      Head head{};
      head.key = pool.Take<BFloat16>(int64_t{entries} * kDim);
      head.value = pool.Take<BFloat16>(int64_t{entries} * kDim);
      head.log_weight = pool.Take<float>(entries);
      head.partial = partials[static_cast<size_t>(i)];
      head.ticket = tickets + i;
      head.capacity = entries;
      Check(cudaMemset(head.log_weight, 0, static_cast<size_t>(entries) * sizeof(float)));
      described.push_back(head);
    }
    AttendArgs args{};
    for (int32_t c = 0; c < batch; ++c) {
      if (apart) pool.Apart(kKvHeads * sizeof(Head));
      Head* device = pool.Take<Head>(kKvHeads);
      Check(cudaMemcpy(device, described.data() + c * kKvHeads, kKvHeads * sizeof(Head), cudaMemcpyHostToDevice));
      args.heads[c] = device;
    }
    if (apart) pool.Apart(static_cast<size_t>(batch) * kKvHeads * kGroup * kDim * 8);
    args.caches = batch, args.kv_heads = kKvHeads, args.group = kGroup, args.tokens = 1;
    args.max_capacity = entries;
    args.key_dim = args.value_dim = kDim;
    args.dtype = DType::kBF16;
    const int64_t row = kKvHeads * kGroup * kDim;
    args.q = {pool.Take<BFloat16>(batch * row), row, kDim, DType::kBF16};
    args.out = {pool.Take<BFloat16>(batch * row), row, kDim, DType::kBF16};
    args.q_cache_stride = args.out_cache_stride = row;
    args.scale = 0.0883883f, args.exponent = 0.5f;
    made.args.push_back(args);
    made.described.push_back(described);
  }
  return made;
}

struct Way {
  std::string name;
  std::vector<AttendMachine> machines;  // to choose from
};

std::vector<AttendMachine> Machines() {
  std::vector<AttendMachine> machines(kMostBlocks);
  for (int32_t blocks = 1; blocks <= kMostBlocks; ++blocks)
    Check(DescribeAttend(0, blocks, &machines[static_cast<size_t>(blocks - 1)]));
  return machines;
}

// As the library does, and with so many blocks of a multiprocessor; with `all`, with one thing changed at a time.
std::vector<Way> Ways(bool all, bool clusters) {
  const std::vector<AttendMachine> machines = Machines();
  std::vector<Way> ways = {{"library", machines}};
  for (const AttendMachine& machine : machines) {
    const int32_t blocks = machine.blocks;
    const auto add = [&](const char* format, int number, const AttendMachine& way) {
      char name[32];
      std::snprintf(name, sizeof(name), format, blocks, number);
      ways.push_back({name, {way}});
    };
    add("%d to an SM", 0, machine);
    if (!all) continue;
    AttendMachine way = machine;
    way.dependent_launches = false;
    add("%d, no PDL", 0, way);
    for (int i = 0; i < AttendMachine::kClusterSizes && clusters; ++i) {
      way = machine;
      std::fill_n(way.clusters, AttendMachine::kClusterSizes, 0);
      way.clusters[i] = machine.clusters[i];
      if (way.clusters[i] > 0) add("%d, of %d", 1 << i, way);
    }
  }
  return ways;
}

void Measure(Pool& pool, cudaStream_t stream, const std::vector<Way>& ways, double read, int32_t batch, int32_t entries,
             bool apart) {
  const int64_t bytes = int64_t{batch} * kKvHeads * entries * (4 * kDim + 4);
  if (bytes > int64_t{5} << 30) return;
  const auto layers = static_cast<int32_t>(std::clamp<int64_t>((int64_t{600} << 20) / bytes, 2, 64));
  Layers made = MakeLayers(pool, batch, entries, layers, apart);
  std::printf("%5d %6d %7.1f", batch, entries, static_cast<double>(bytes) / 1e6);
  for (const Way& way : ways) {
    const double us = Microseconds(stream,
                                   [&] {
                                     for (size_t l = 0; l < made.args.size(); ++l) {
                                       std::vector<const Head*> rows;
                                       for (int32_t c = 0; c < batch; ++c)
                                         rows.push_back(made.described[l].data() + c * kKvHeads);
                                       Attend(made.args[l], rows.data(), way.machines.data(),
                                              static_cast<int32_t>(way.machines.size()), stream);
                                     }
                                   }) /
                      layers;
    std::printf(" %6.1f %4.1f", us, 100 * static_cast<double>(bytes) / us / 1e3 / read);
  }
  std::printf("\n");
}

}  // namespace
}  // namespace express::cuda

// --ways: with every way to share out the work. --apart: every sequence in allocations of its own.
int main(int count, char** arguments) {
  using namespace express::cuda;
  const bool all = count > 1 && std::strcmp(arguments[1], "--ways") == 0;
  const bool apart = count > 1 && std::strcmp(arguments[1], "--apart") == 0;
  AttendMachine machine;
  cudaDeviceProp device;
  Check(cudaGetDeviceProperties(&device, 0));
  Check(DescribeAttend(0, 1, &machine));
  Check(PrepareAttend(express::DType::kBF16, kDim, kDim, machine));
  cudaStream_t stream;
  Check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  Pool pool(size_t{11} << 30);
  Fill(pool.data(), pool.bytes());
  Check(cudaDeviceSynchronize());
  const double read = ReadFloor(pool, stream, machine.multiprocessors);
  std::printf("%s: read %.0f GB/s; clusters of 1, 2, 4, 8, 16 blocks at once:", device.name, read);
  for (const int32_t clusters : machine.clusters) std::printf(" %d", clusters);
  std::printf("\nan empty kernel: %.1f us a launch", LaunchFloor(stream, machine.multiprocessors, false));
  if (machine.dependent_launches)
    std::printf(", %.1f us if launched before the one before is done",
                LaunchFloor(stream, machine.multiprocessors, true));
  std::printf("\n32 query heads, 8 KV heads, d 128, bf16: us a call, %% of the read bandwidth\n");
  for (const int32_t batch : {1, 16, 24, 32, 48, 64, 128, 256}) {
    const std::vector<Way> ways = Ways(all, batch == 1);
    std::printf("batch entries   MB");
    for (const Way& way : ways) std::printf(" %11s", way.name.c_str());
    std::printf("\n");
    for (const int32_t entries : {512, 1024, 2048, 4096, 8192})
      Measure(pool, stream, ways, read, batch, entries, apart);
  }
  return 0;
}
