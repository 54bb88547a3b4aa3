// Kernel halving of one list by one thread block (DESIGN 3.1).
#ifndef EXPRESS_SRC_CUDA_HALVE_CUH_
#define EXPRESS_SRC_CUDA_HALVE_CUH_

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {

// PLACEHOLDER INTERFACE, filled by its implementer:
// rows.Key(i) and rows.Value(i): const T* to row i of the list, i < count, 16-byte aligned.
// keep: (count / 2) bytes in shared or global memory: 1 where y = row 2a + 1 survives, the final complement included.
// scratch: global memory of this block's own, HalveScratchBytes(max count). shared: HalveSharedBytes(key_dim, value_dim).
// All threads of the block call it, and a barrier stands at its end.
template <class T, int kThreads, class RowsOf>
__device__ void HalveList(const RowsOf& rows, int32_t count, int32_t key_dim, int32_t value_dim,
                          const HalveParams& params, const StreamKey& key, uint64_t number, char* scratch,
                          char* shared, uint8_t* keep);

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_HALVE_CUH_
