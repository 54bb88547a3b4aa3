// Other budgets for the heads of a cache: its arrays move within their memory.
#include <algorithm>
#include <limits>

#include "src/cuda/kernels.h"

namespace express::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 16;  // of a segment

template <int32_t kMost>
struct Copies {
  const char* from[kMost];
  char* to[kMost];
  size_t bytes[kMost];
};

// grid: (blocks, segments). No segment is written that another one is read from.
template <int32_t kMost>
__global__ __launch_bounds__(kThreads) void CopyKernel(const __grid_constant__ Copies<kMost> copies) {
  const uint32_t i = blockIdx.y;
  const auto* from = reinterpret_cast<const uint4*>(copies.from[i]);
  auto* to = reinterpret_cast<uint4*>(copies.to[i]);
  const size_t pieces = copies.bytes[i] / 16;
  for (size_t p = blockIdx.x * size_t{kThreads} + threadIdx.x; p < pieces; p += gridDim.x * size_t{kThreads})
    to[p] = from[p];
}

// grid: heads.
__global__ __launch_bounds__(kThreads) void FreeSlotsKernel(const Head* heads, const int32_t* known) {
  const Head& head = heads[blockIdx.x];
  for (int32_t i = known[blockIdx.x] + static_cast<int32_t>(threadIdx.x); i < head.capacity; i += kThreads)
    head.log_weight[i] = -std::numeric_limits<float>::infinity();
}

__global__ void FenceKernel() {}

}  // namespace

// All segments of a buffer's content are read before any is written.
void Mover::Flush() {
  if (count_ == 0) return;
  Copies<kSegments> in, out;
  for (int32_t i = 0; i < count_; ++i) {
    in.from[i] = segment_[i].from;
    in.to[i] = buffer_ + segment_[i].at;
    out.from[i] = in.to[i];
    out.to[i] = segment_[i].to;
    in.bytes[i] = out.bytes[i] = segment_[i].bytes;
  }
  const dim3 grid(kBlocks, static_cast<uint32_t>(count_));
  CopyKernel<kSegments><<<grid, kThreads, 0, stream_>>>(in);
  CopyKernel<kSegments><<<grid, kThreads, 0, stream_>>>(out);
  count_ = 0;
  used_ = 0;
}

void Mover::Add(const char* from, char* to, size_t bytes) {
  segment_[count_++] = {from, to, used_, bytes};
  used_ += bytes;
  if (count_ == kSegments || used_ == capacity_) Flush();
}

void Mover::Down(const void* from, void* to, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const size_t part = std::min(bytes - done, capacity_ - used_);
    Add(static_cast<const char*>(from) + done, static_cast<char*>(to) + done, part);
    done += part;
  }
}

void Mover::Up(const void* from, void* to, size_t bytes) {
  for (size_t left = bytes; left > 0;) {
    const size_t part = std::min(left, capacity_ - used_);
    left -= part;
    Add(static_cast<const char*>(from) + left, static_cast<char*>(to) + left, part);
  }
}

void FreeSlots(const Head* heads, const int32_t* known, int32_t head_count, cudaStream_t stream) {
  FreeSlotsKernel<<<static_cast<uint32_t>(head_count), kThreads, 0, stream>>>(heads, known);
}

void Fence(cudaStream_t stream) { FenceKernel<<<1, 1, 0, stream>>>(); }

}  // namespace express::cuda
