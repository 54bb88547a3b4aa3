// Data of benchmarks on a GPU.
#ifndef EXPRESS_BENCH_CUDA_FILL_CUH_
#define EXPRESS_BENCH_CUDA_FILL_CUH_

#include <cstdint>

#include "src/cuda/device.cuh"

namespace express::cuda {

// Numbers of about unit variance, all of whose bits vary as those of keys do: constant bits cost a GPU less power.
static __global__ void FillKernel(BFloat16* x, int64_t count) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t z = static_cast<uint64_t>(i) * 0x9E3779B97F4A7C15u + 0x1234567u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    int32_t sum = 0;
    for (int part = 0; part < 4; ++part) sum += static_cast<int32_t>((z >> (16 * part)) & 0xFFFF) - 0x8000;
    x[i] = __float2bfloat16_rn(static_cast<float>(sum) * (1.0f / 37837.0f));
  }
}

}  // namespace express::cuda

#endif  // EXPRESS_BENCH_CUDA_FILL_CUH_
