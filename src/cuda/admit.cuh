// What the two kernels that choose protected entries share: admit.cu scores, admit_select.cu chooses.
#ifndef EXPRESS_SRC_CUDA_ADMIT_CUH_
#define EXPRESS_SRC_CUDA_ADMIT_CUH_

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {

// The entry that departs i departures after the call's first one.
__device__ __forceinline__ int32_t DepartureIndex(const AdmitArgs& args, const AdmitHead& head, int64_t i) {
  return i < args.source_count ? head.source[args.source_begin + i]
                               : static_cast<int32_t>(args.first_row + i - args.source_count);
}

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_ADMIT_CUH_
