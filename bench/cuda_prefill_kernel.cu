// The arithmetic of the prefill kernels alone: TFLOP/s of (query, key) pairs that are seen, 4 d operations each, by block of
// the prompt and queries per KV head; the kernel of this GPU, and the one for compute capability 8.0 on it. The floor, the rate
// of a large bf16 matrix product, is what bench/cuda_table.py prints first.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {
namespace {

constexpr int32_t kQueryHeads = 32, kDim = 128, kFar = 1056, kTail = 128, kSinks = 4;
constexpr int64_t kTokens = 32768;
constexpr int kRuns = 7;

void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
T* Device(const std::vector<T>& x, std::vector<void*>& taken) {
  void* data = nullptr;
  Check(cudaMalloc(&data, x.size() * sizeof(T)));
  Check(cudaMemcpy(data, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice));
  taken.push_back(data);
  return static_cast<T*>(data);
}

__global__ void FillKernel(BFloat16* x, int64_t count, uint32_t seed) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    uint32_t hash = static_cast<uint32_t>(i) * 2654435761u + seed * 97u;
    hash = (hash ^ hash >> 16) * 0x85EBCA6Bu;
    hash = (hash ^ hash >> 13) * 0xC2B2AE35u;
    hash ^= hash >> 16;  // the sum of two uniform numbers, of variance 1
    x[i] = __float2bfloat16(2.45f * (static_cast<float>((hash & 0xFFFF) + (hash >> 16)) / 65536.0f - 1));
  }
}
Rows Fill(int32_t heads, uint32_t seed, std::vector<void*>& taken) {
  const int64_t count = kTokens * heads * kDim;
  void* data = nullptr;
  Check(cudaMalloc(&data, static_cast<size_t>(count) * sizeof(BFloat16)));
  taken.push_back(data);
  FillKernel<<<1024, 256>>>(static_cast<BFloat16*>(data), count, seed);
  return {data, int64_t{heads} * kDim, kDim, DType::kBF16};
}

// Median of some runs, in ms.
double Time(const PrefillArgs& args, int32_t capability, int32_t multiprocessors) {
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin));
  Check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int run = 0; run <= kRuns; ++run) {
    Check(cudaEventRecord(begin));
    Prefill(args, capability, multiprocessors, nullptr);
    Check(cudaEventRecord(end));
    Check(cudaEventSynchronize(end));
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, begin, end));
    if (run > 0) times.push_back(ms);
  }
  Check(cudaGetLastError());
  Check(cudaEventDestroy(begin));
  Check(cudaEventDestroy(end));
  std::sort(times.begin(), times.end());
  return static_cast<double>(times[kRuns / 2]);
}

void Measure(int32_t group, int32_t block, const cudaDeviceProp& device) {
  const int32_t kv_heads = kQueryHeads / group;
  const int64_t blocks = kTokens / block;
  std::vector<void*> taken;
  std::mt19937 rng(7);
  std::vector<PrefillHead> heads;
  double pairs = 0;
  for (int32_t g = 0; g < kv_heads; ++g) {
    const auto size = static_cast<size_t>(blocks * kFar);
    std::vector<int32_t> index(size), count(static_cast<size_t>(blocks));
    std::vector<float> bias(size);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t start = b * block;
      count[static_cast<size_t>(b)] = b == 0 ? 0 : kFar;
      for (int64_t i = 0; i < kFar && b > 0; ++i) {
        const auto at = static_cast<size_t>(b * kFar + i);
        const bool stays = b > 1 && rng() % 16 != 0;  // blocks in a row have most of their far lists in common
        index[at] = stays ? index[at - kFar] : static_cast<int32_t>(rng() % static_cast<uint64_t>(start));
        bias[at] = stays ? bias[at - kFar] : static_cast<float>(rng() % 1000) / 250.0f;
      }
      const int64_t begin = std::max<int64_t>(std::min<int64_t>(kSinks, start), start - kTail);
      pairs +=
          group * (static_cast<double>(block) * static_cast<double>(count[static_cast<size_t>(b)] + start - begin) +
                   0.5 * block * (block + 1.0));
    }
    heads.push_back({.slab_key = nullptr,
                     .slab_value = nullptr,
                     .far_index = Device(index, taken),
                     .far_bias = Device(bias, taken),
                     .far_count = Device(count, taken),
                     .far_capacity = kFar,
                     .sinks = kSinks,
                     .tail = kTail});
  }
  const PrefillArgs args{.heads = Device(heads, taken),
                         .kv_heads = kv_heads,
                         .group = group,
                         .key_dim = kDim,
                         .value_dim = kDim,
                         .dtype = DType::kBF16,
                         .q = Fill(kQueryHeads, 1, taken),
                         .k = Fill(kv_heads, 2, taken),
                         .v = Fill(kv_heads, 3, taken),
                         .out = Fill(kQueryHeads, 4, taken),
                         .lse = nullptr,
                         .lse_row_stride = 0,
                         .lse_head_stride = 0,
                         .tokens = kTokens,
                         .first_position = 0,
                         .block = block,
                         .block_offset = 0,
                         .first_block = 0,
                         .blocks = blocks,
                         .scale = 0.0883883f};
  const double own = Time(args, device.major * 10 + device.minor, device.multiProcessorCount);
  const double older = Time(args, 80, device.multiProcessorCount);
  const auto rate = [&](double ms) { return pairs * 4 * kDim / ms / 1e9; };
  std::printf("%5d %6d  %8.3f ms %6.1f TFLOP/s   8.0: %8.3f ms %6.1f TFLOP/s\n", group, block, own, rate(own), older,
              rate(older));
  for (void* data : taken) Check(cudaFree(data));
}

}  // namespace
}  // namespace express::cuda

int main() {
  using namespace express::cuda;
  cudaDeviceProp device;
  Check(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, %lld tokens, %d query heads, d %d, bf16, far lists of %d\ngroup  block\n", device.name,
              static_cast<long long>(kTokens), kQueryHeads, kDim, kFar);
  for (const int32_t group : {1, 4})
    for (const int32_t block : {128, 256, 512, 1024}) Measure(group, block, device);
  return 0;
}
