// Host data to the device inside kernel arguments.
#include <algorithm>
#include <cstring>

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {
namespace {

template <int32_t kMost, int32_t kPieces>
struct Payload {
  UploadSegment segment[kPieces];
  int32_t words[kMost];
};

// One block per segment.
template <int32_t kMost, int32_t kPieces>
__global__ void UploadKernel(const __grid_constant__ Payload<kMost, kPieces> payload) {
  const UploadSegment& segment = payload.segment[blockIdx.x];
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < segment.words; i += static_cast<int32_t>(blockDim.x))
    segment.to[i] = payload.words[segment.begin + i];
}

}  // namespace

template <int32_t kMost, int32_t kPieces>
void Uploader::Send() {
  Payload<kMost, kPieces> payload;
  std::copy_n(segment_, segments_, payload.segment);
  std::copy_n(payload_, words_, payload.words);
  UploadKernel<<<static_cast<uint32_t>(segments_), 128, 0, stream_>>>(payload);
  segments_ = words_ = 0;
}

void Uploader::Add(void* to, const void* from, size_t bytes) {
  constexpr int32_t kPiece = 512;  // words of a segment: constant memory is read slowly, so many blocks share
  auto* destination = static_cast<int32_t*>(to);
  const auto* source = static_cast<const char*>(from);
  for (auto words = static_cast<int64_t>(bytes / 4); words > 0;) {
    if (segments_ == kSegments || words_ == kWords) Flush();
    const auto piece = static_cast<int32_t>(std::min<int64_t>({words, kPiece, kWords - words_}));
    segment_[segments_++] = {destination, words_, piece};
    std::memcpy(payload_ + words_, source, static_cast<size_t>(piece) * 4);
    words_ += piece;
    destination += piece;
    source += static_cast<size_t>(piece) * 4;
    words -= piece;
  }
}

void Uploader::Flush() {
  if (segments_ == 0) return;
  // Short arguments launch faster: most steps need few, and prompts often half of the most.
  if (segments_ <= 32 && words_ <= 768)
    Send<768, 32>();
  else if (segments_ <= 64 && words_ <= 2560)
    Send<2560, 64>();
  else
    Send<kWords, kSegments>();
}

}  // namespace express::cuda
