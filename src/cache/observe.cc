// How much attention goes to far entries: what observed budgets are settled by.
//
// Far are the entries of tokens that lie at least half a mean budget back. With the lse over them and the lse of the whole attention, a
// query's far mass is exp(far - all); a token's is the largest of its query heads. Only the first tokens are looked at, as many as an
// equal share holds: later a head that was given little would seem to look at little. Cheap: the keys of far entries are read once
// more, for one token in 16 of those.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "src/cache/cpu_cache.h"

namespace express::cache {
namespace {

constexpr int64_t kRows = 16;           // query rows at once
constexpr int64_t kQueryFloats = 2048;  // of those rows
constexpr int64_t kSlots = 64;          // at once
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Calls body(slots, biases, count) for all far entries.
template <class Body>
void ForEachFar(const cpu::Slab& slab, const float* log_weight, float exponent, int64_t last, const Body& body) {
  plan::Slot slots[kSlots];
  float bias[kSlots];
  int64_t count = 0;
  for (int64_t slot = 0; slot < slab.capacity; ++slot) {
    if (log_weight[slot] == kMinusInfinity || slab.position[slot] > last) continue;
    slots[count] = static_cast<plan::Slot>(slot);
    bias[count++] = exponent * log_weight[slot];
    if (count < kSlots) continue;
    body(slots, bias, count);
    count = 0;
  }
  if (count > 0) body(slots, bias, count);
}

}  // namespace

// The token at `position`: some of its query rows, q (rows, key_dim), scaled, and the lse of their attention.
void CpuCache::Observe(const HeadState& head, int64_t position, const float* q, int64_t rows, const float* lse,
                       int64_t lse_stride) const {
  float max[kRows], sum[kRows];
  std::fill_n(max, rows, kMinusInfinity);
  std::fill_n(sum, rows, 0.0f);
  ForEachFar(head.slab, plans_.plans[head.plan].log_weight, static_cast<float>(config_.weight_exponent),
             position - FarDistance(), [&](const plan::Slot* slots, const float* bias, int64_t count) {
               cpu::AttendSlots(head.slab, slots, bias, count, q, rows, max, sum);
             });
  uint64_t far = 0;
  for (int64_t r = 0; r < rows; ++r) {
    if (sum[r] == 0) continue;
    const double share = sum[r] * std::exp(static_cast<double>(max[r]) - static_cast<double>(lse[r * lse_stride]));
    if (share > 0) far = std::max(far, static_cast<uint64_t>(std::min(share, 1.0) * kFarUnit));  // not NaN
  }
  Observed& seen = budgets_.observed[&head - parts_.heads];
  std::atomic_ref<uint64_t>(seen.far).fetch_add(far, std::memory_order_relaxed);
  std::atomic_ref<uint64_t>(seen.tokens).fetch_add(1, std::memory_order_relaxed);
}

// The softmax states of the last token's rows.
void CpuCache::ObserveDecode(const HeadState& head, const float* q, int64_t rows, const float* max,
                             const float* sum) const {
  float lse[kRows];
  for (int64_t r = 0; r < rows; ++r) lse[r] = max[r] + std::log(sum[r]);
  Observe(head, LayerTokens(head.layer) - 1, q, rows, lse, 1);
}

// Token `token` of the input's block, which has not been ingested; lse: of its query heads.
void CpuCache::ObserveBlock(const HeadState& head, const Array& q, int64_t row, int64_t position, const float* lse,
                            int64_t lse_stride) const {
  const int64_t group = config_.query_heads / config_.kv_heads, dim = config_.key_dim;
  const int64_t at_once = std::clamp<int64_t>(kQueryFloats / dim, 1, kRows);
  float scaled[kQueryFloats];  // (rows, key_dim)
  for (int64_t first = 0; first < group; first += at_once) {
    const int64_t rows = std::min(at_once, group - first);
    for (int64_t r = 0; r < rows; ++r)
      cpu::Convert(q.At(row, head.kv_head * group + first + r), q.dtype, scaled + r * dim, DType::kF32, dim);
    for (int64_t i = 0; i < rows * dim; ++i) scaled[i] *= static_cast<float>(config_.scale);
    Observe(head, position, scaled, rows, lse + first * lse_stride, lse_stride);
  }
}

}  // namespace express::cache
