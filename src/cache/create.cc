// Creation: how many bytes a cache takes, the largest budget that fits into given bytes, and the choice of backend.
#include <algorithm>

#include "src/cache/cache.h"
#include "src/cache/cpu_cache.h"
#include "src/cache/message.h"
#ifdef EXPRESS_WITH_CUDA
#include "src/cache/cuda_cache.h"
#endif

namespace express::cache {
namespace {

Status LayoutBytes(const Resolved& resolved, int64_t* bytes) {
#ifdef EXPRESS_WITH_CUDA
  if (resolved.config.device_type == DeviceType::kCuda) return CudaCache::Bytes(resolved, bytes);
#endif
  return CpuCache::Bytes(resolved, bytes);
}

// The largest mean budget at which no head gets more than a head can have.
int64_t MostMean(const Config& config) {
  constexpr int64_t kMostOfAHead = int64_t{1} << 29;
  double sum = 0, largest = 0;
  for (const float share : config.head_share) sum += share, largest = std::max<double>(largest, share);
  if (sum == 0) return kMostOfAHead;
  const double times = largest * static_cast<double>(config.head_share.size()) / sum;  // of the mean
  return static_cast<int64_t>(static_cast<double>(kMostOfAHead) / std::max(1.0, times)) - 1;
}

// The largest mean budget whose layout has at most config.budget bytes. Bytes grow with the budget but for the rounding
// of parts, so a bisection is followed by a look at the next few.
Status SolveBytes(const Config& config, Resolved* resolved, int64_t* bytes) {
  const auto fits = [&](int64_t mean, Status* status) {
    Resolved candidate;
    int64_t size = 0;
    *status = ResolveEntries(config, mean, &candidate);
    if (!status->ok()) return false;
    *status = LayoutBytes(candidate, &size);
    return status->ok() && size <= config.budget;
  };
  const int64_t heads = int64_t{config.layers} * config.kv_heads;
  const int64_t entry =
      (int64_t{config.key_dim} + config.value_dim) * SizeOf(config.dtype) + cpu::ScaleBytes(config.dtype);
  const int64_t most_mean = MostMean(config);
  const int64_t most = std::min(config.budget / heads / entry + 1, most_mean);
  Status status;
  // Below the smallest legal budget nothing resolves: find it first.
  int64_t low = 1, high = most_mean;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    Resolved candidate;
    const Status legal = ResolveEntries(config, middle, &candidate);
    if (!legal.ok() && legal.code() != StatusCode::kBudgetTooSmall) return legal;
    (legal.ok() ? high : low) = legal.ok() ? middle : middle + 1;
  }
  if (!fits(low, &status)) {
    if (!status.ok() && status.code() != StatusCode::kBudgetTooSmall) return status;
    Resolved candidate;
    int64_t size = 0;
    if (status.ok() && ResolveEntries(config, low, &candidate).ok() && LayoutBytes(candidate, &size).ok())
      return Error(StatusCode::kBudgetTooSmall, "config.budget: expected at least ", size, " bytes, got ",
                   config.budget);
    return Error(StatusCode::kBudgetTooSmall, "config.budget: ", config.budget,
                 " bytes do not hold the smallest legal cache");
  }
  high = std::max(low, most);
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (fits(middle, &status))
      low = middle;
    else
      high = middle - 1;
  }
  for (int64_t mean = low + 64; mean > low; --mean) {
    if (fits(mean, &status)) {
      low = mean;
      break;
    }
  }
  EXPRESS_RETURN_IF_ERROR(ResolveEntries(config, low, resolved));
  return LayoutBytes(*resolved, bytes);
}

}  // namespace

Status Resolve(const Config& config, Resolved* resolved, int64_t* bytes) {
  EXPRESS_RETURN_IF_ERROR(CheckConfig(config));
  if (config.budget_unit == BudgetUnit::kBytes) return SolveBytes(config, resolved, bytes);
  EXPRESS_RETURN_IF_ERROR(ResolveEntries(config, config.budget, resolved));
  return LayoutBytes(*resolved, bytes);
}

Status Cache::Size(const Config& config, int64_t* bytes, int64_t* mean_entries) {
  Resolved resolved;
  int64_t size = 0;
  EXPRESS_RETURN_IF_ERROR(Resolve(config, &resolved, &size));
  if (bytes != nullptr) *bytes = size;
  if (mean_entries != nullptr) *mean_entries = resolved.mean_entries;
  return Status();
}

Status Cache::Create(const Config& config, Cache** cache) {
  Resolved resolved;
  int64_t bytes = 0;
  EXPRESS_RETURN_IF_ERROR(Resolve(config, &resolved, &bytes));
#ifdef EXPRESS_WITH_CUDA
  if (config.device_type == DeviceType::kCuda) return CudaCache::Create(resolved, bytes, cache);
#endif
  return CpuCache::Create(resolved, bytes, cache);
}

}  // namespace express::cache
