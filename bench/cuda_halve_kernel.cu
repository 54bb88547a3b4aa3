// Time of HalveList on the GPU by length and number of lists, beside the arithmetic floor: (2h)^2 (d_k + d_v) / 2
// multiply-adds at the matrix rate of the multiprocessors that have a list. Rows are those of one slab, as many as 132
// of the longest lists need; further lists share them.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "src/cuda/halve.cuh"

namespace express::cuda {
namespace {

constexpr double kMatrixRate = 790e12;  // bf16, measured by a large product on an H200
constexpr int kLongest = 4000;
constexpr int64_t kApart = 132;  // lists that share no row
constexpr int kRuns = 5;

void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("%s\n", cudaGetErrorString(error));
  std::exit(1);
}

struct Inputs {
  char* key;
  char* value;
  char* scratch;
  uint8_t* keep;
  long long* clocks;
  int32_t count, key_dim, value_dim;
  HalveParams params;
};

template <class T>
struct SlabRows {
  const T* key;
  const T* value;
  int64_t first;
  int32_t key_dim, value_dim;
  __device__ const T* Key(int32_t i) const { return key + (first + i) * key_dim; }
  __device__ const T* Value(int32_t i) const { return value + (first + i) * value_dim; }
};

template <class T, int kThreads, int32_t kMostCount, int kBlocks>
__global__ __launch_bounds__(kThreads, kBlocks) void HalveKernel(const Inputs in) {
  extern __shared__ __align__(16) char shared[];
  const long long begin = clock64();
  const auto list = static_cast<int64_t>(blockIdx.x);
  const SlabRows<T> rows{reinterpret_cast<const T*>(in.key), reinterpret_cast<const T*>(in.value),
                         list % kApart * in.count, in.key_dim, in.value_dim};
  HalveList<T, kThreads, kMostCount>(rows, in.count, in.key_dim, in.value_dim, in.params, StreamKey{7, 11},
                                     static_cast<uint64_t>(list), in.scratch + list * HalveScratchBytes(in.count),
                                     shared, in.keep + list * (in.count / 2));
  if (threadIdx.x == 0) in.clocks[blockIdx.x] = clock64() - begin;
}

template <class T, int kThreads, int32_t kMostCount = INT32_MAX, int kBlocks = 1>
void Measure(const char* type, Inputs in, int32_t count, int lists) {
  in.count = count;
  const size_t shared = HalveSharedBytes<T>(in.key_dim, in.value_dim, count);
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin));
  Check(cudaEventCreate(&end));
  const int launches = count * lists > 1000000 ? 1 : 20;
  std::vector<double> times;
  for (int run = 0; run < kRuns; ++run) {
    Check(cudaEventRecord(begin));
    for (int i = 0; i < launches; ++i)
      HalveKernel<T, kThreads, kMostCount, kBlocks><<<static_cast<uint32_t>(lists), kThreads, shared>>>(in);
    Check(cudaEventRecord(end));
    Check(cudaEventSynchronize(end));
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, begin, end));
    times.push_back(static_cast<double>(ms) * 1e3 / launches);
  }
  Check(cudaGetLastError());
  std::sort(times.begin(), times.end());
  std::vector<long long> clocks(static_cast<size_t>(lists));
  Check(cudaMemcpy(clocks.data(), in.clocks, clocks.size() * sizeof(long long), cudaMemcpyDeviceToHost));
  std::sort(clocks.begin(), clocks.end());
  const double flops = static_cast<double>(lists) * count * count * (in.key_dim + in.value_dim);
  const double floor = flops / (kMatrixRate * std::min(1.0, lists / 132.0)) * 1e6;
  std::printf("%s, %d threads, count %4d lists %4d: %10.2f us, %8.3f per list, block %8lld clocks, floor %9.2f us\n",
              type, kThreads, count, lists, times[kRuns / 2], times[kRuns / 2] / lists, clocks[clocks.size() / 2],
              floor);
}

template <class T>
void MeasureType(const char* type, Inputs in, bool all) {
  const auto elements = static_cast<size_t>(kApart) * kLongest * 128;
  std::vector<T> host(elements);
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < elements; ++i) {
    if (i >= 1 << 20) {
      host[i] = host[i - 1000003];
    } else if constexpr (sizeof(T) == 4) {
      host[i] = normal(rng);
    } else {
      host[i] = __float2bfloat16_rn(normal(rng));
    }
  }
  for (char* to : {in.key, in.value}) Check(cudaMemcpy(to, host.data(), elements * sizeof(T), cudaMemcpyHostToDevice));
  for (const int32_t count : {2, 32, 64, 200, 400, 1226, 4000})
    for (const int lists : {1, 132, 2048}) {
      if (all) Measure<T, 128>(type, in, count, lists);
      if (count <= 64) {
        const std::string name = std::string(type) + ", short only";
        Measure<T, 128, 64, 3>((name + " x 3").c_str(), in, count, lists);
        Measure<T, 128, 64, 4>((name + " x 4").c_str(), in, count, lists);
        Measure<T, 128, 64, 6>((name + " x 6").c_str(), in, count, lists);
      }
      if (count > 2) Measure<T, 256>(type, in, count, lists);
    }
}

}  // namespace
}  // namespace express::cuda

int main() {
  using namespace express::cuda;
  Inputs in{};
  const size_t elements = static_cast<size_t>(kApart) * kLongest * 128;
  Check(cudaMalloc(&in.key, elements * 4));
  Check(cudaMalloc(&in.value, elements * 4));
  Check(cudaMalloc(&in.scratch, 2048 * HalveScratchBytes(kLongest)));
  Check(cudaMalloc(&in.keep, 2048 * kLongest / 2));
  Check(cudaMalloc(&in.clocks, 2048 * sizeof(long long)));
  in.key_dim = in.value_dim = 128;
  in.params = {0.088388f, 1, 0.1f, 0.5f, false};
  MeasureType<BFloat16>("bf16", in, true);
  in.params.gamma = 0.5f;  // moves the origin
  Measure<BFloat16, 128>("bf16 centred", in, 32, 2048);
  Measure<BFloat16, 256>("bf16 centred", in, 1226, 132);
  in.params.gamma = 1;
  MeasureType<float>("f32", in, false);
  return 0;
}
