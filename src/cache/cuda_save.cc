// Saving, loading and copying caches on the GPU. Saving and loading go head by head through the host's memory, and wait.
#include <algorithm>
#include <limits>
#include <vector>

#include "src/cache/cuda_cache.h"
#include "src/cache/message.h"
#include "src/core/arena.h"
#include "src/cpu/kernels.h"

namespace express::cache {

static_assert(sizeof(cuda::RowScales) == sizeof(cpu::RowScales));

// body(on the host, on the device, bytes) for each array of a head; counts apart.
template <class Body>
Status CudaCache::ForEachArray(int32_t index, const HeadArrays& arrays, const Body& body) const {
  const cuda::Head& head = parts_.head_copies[index];
  const auto element = static_cast<size_t>(SizeOf(config_.dtype)), capacity = static_cast<size_t>(head.capacity);
  const auto key_dim = static_cast<size_t>(config_.key_dim), value_dim = static_cast<size_t>(config_.value_dim);
  EXPRESS_RETURN_IF_ERROR(body(arrays.key, head.key, capacity * key_dim * element));
  EXPRESS_RETURN_IF_ERROR(body(arrays.value, head.value, capacity * value_dim * element));
  if (head.scale != nullptr)
    EXPRESS_RETURN_IF_ERROR(body(arrays.scale, head.scale, capacity * sizeof(cuda::RowScales)));
  EXPRESS_RETURN_IF_ERROR(body(arrays.position, head.position, capacity * sizeof(int64_t)));
  if (head.protect == 0) return Status();
  const auto protect = static_cast<size_t>(head.protect);
  EXPRESS_RETURN_IF_ERROR(body(arrays.mean, head.mean, key_dim * sizeof(float)));
  EXPRESS_RETURN_IF_ERROR(body(arrays.sum, head.sum, key_dim * sizeof(float)));
  EXPRESS_RETURN_IF_ERROR(body(arrays.score, head.score, protect * sizeof(float)));
  return body(arrays.protected_slot, head.protected_slot, protect * sizeof(int32_t));
}

namespace {

// Where a head's arrays lie in staging memory; over a counting arena, how much that takes.
template <class Arrays>
void LayoutStaging(const Config& c, int64_t capacity, int64_t protect, Arena& arena, Arrays* arrays) {
  const int64_t element = SizeOf(c.dtype);
  arrays->key = arena.Take<char>(capacity * c.key_dim * element);
  arrays->value = arena.Take<char>(capacity * c.value_dim * element);
  arrays->scale = arena.Take<char>(capacity * cpu::ScaleBytes(c.dtype));
  arrays->position = arena.Take<int64_t>(capacity);
  arrays->mean = arena.Take<float>(c.key_dim);
  arrays->sum = arena.Take<float>(c.key_dim);
  arrays->score = arena.Take<float>(protect);
  arrays->protected_slot = arena.Take<int32_t>(protect);
}

}  // namespace

size_t CudaCache::StagingBytes() const {
  size_t most = 0;
  for (int32_t h = 0; h < HeadCount(); ++h) {
    Arena arena;
    HeadArrays arrays{};
    LayoutStaging(config_, parts_.head_copies[h].capacity, parts_.head_copies[h].protect, arena, &arrays);
    most = std::max(most, arena.used());
  }
  return most + Arena::kAlignment;
}

Status CudaCache::OpenHead(int32_t index, bool read, void* staging, HeadArrays* arrays) const {
  const cuda::Head& head = parts_.head_copies[index];
  const auto begin =
      (reinterpret_cast<uintptr_t>(staging) + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
  Arena arena(reinterpret_cast<void*>(begin));
  *arrays = HeadArrays{};
  LayoutStaging(config_, head.capacity, head.protect, arena, arrays);
  if (!read) return Status();
  if (Capturing()) return Error(StatusCode::kUnsupported, "cache: express_save cannot be captured in a graph");
  const DeviceScope scope(config_.device_id);
  EXPRESS_RETURN_IF_ERROR(ForEachArray(index, *arrays, [&](void* host, const void* device, size_t bytes) {
    return CudaError("cache", cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, stream_));
  }));
  int32_t counts[2] = {};
  EXPRESS_RETURN_IF_ERROR(CudaError(
      "cache", cudaMemcpyAsync(counts, head.protected_count, sizeof(counts), cudaMemcpyDeviceToHost, stream_)));
  EXPRESS_RETURN_IF_ERROR(CudaError("cache", cudaStreamSynchronize(stream_)));
  arrays->protected_count = counts[0];
  arrays->weakest = counts[1];
  return Status();
}

Status CudaCache::StoreHead(int32_t index, const HeadArrays& arrays) {
  const DeviceScope scope(config_.device_id);
  EXPRESS_RETURN_IF_ERROR(ForEachArray(index, arrays, [&](const void* host, void* device, size_t bytes) {
    return CudaError("cache", cudaMemcpyAsync(device, host, bytes, cudaMemcpyHostToDevice, stream_));
  }));
  const int32_t counts[2] = {static_cast<int32_t>(arrays.protected_count), static_cast<int32_t>(arrays.weakest)};
  EXPRESS_RETURN_IF_ERROR(CudaError("cache", cudaMemcpyAsync(parts_.head_copies[index].protected_count, counts,
                                                             sizeof(counts), cudaMemcpyHostToDevice, stream_)));
  return CudaError("cache", cudaStreamSynchronize(stream_));  // the staging memory is used again
}

// Log weights, from the plans.
Status CudaCache::FinishLoad() {
  const DeviceScope scope(config_.device_id);
  std::vector<float> weights;
  for (int32_t h = 0; h < HeadCount(); ++h) {
    const cuda::Head& head = parts_.head_copies[h];
    if (head.leader == 0) continue;
    const plan::Plan& plan = plans_.plans[head.plan].plan;
    weights.clear();
    for (int32_t slot = 0; slot < head.capacity; ++slot)
      weights.push_back(plan.weight(slot) > 0 ? LogWeight(plan.weight(slot)) : -std::numeric_limits<float>::infinity());
    EXPRESS_RETURN_IF_ERROR(
        CudaError("cache", cudaMemcpyAsync(head.log_weight, weights.data(), weights.size() * sizeof(float),
                                           cudaMemcpyHostToDevice, stream_)));
    EXPRESS_RETURN_IF_ERROR(CudaError("cache", cudaStreamSynchronize(stream_)));
  }
  return Status();
}

// Two caches of one configuration, and of the same budgets of heads, have them at the same places.
Status CudaCache::CopyHeads(const Cache& other) {
  const auto& from = static_cast<const CudaCache&>(other);
  if (Capturing() || from.Capturing())
    return Error(StatusCode::kUnsupported, "cache: express_copy cannot be captured in a graph");
  EXPRESS_RETURN_IF_ERROR(Settle());
  if (parts_.state_bytes != from.parts_.state_bytes) return Error(StatusCode::kInternal, "from: laid out otherwise");
  const DeviceScope scope(config_.device_id);
  const auto follow = [&](cudaStream_t earlier, cudaEvent_t event, cudaStream_t later) {
    if (earlier == later) return Status();
    EXPRESS_RETURN_IF_ERROR(CudaError("stream", cudaEventRecord(event, earlier)));
    return CudaError("stream", cudaStreamWaitEvent(later, event, 0));
  };
  EXPRESS_RETURN_IF_ERROR(follow(from.stream_, side_.begun, stream_));
  EXPRESS_RETURN_IF_ERROR(CudaError("cache", cudaMemcpyAsync(parts_.state, from.parts_.state, parts_.state_bytes,
                                                             cudaMemcpyDeviceToDevice, stream_)));
  return follow(stream_, side_.selected[0], from.stream_);
}

}  // namespace express::cache
