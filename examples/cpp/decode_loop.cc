// A prompt of 1000 tokens, then 3000 decoded ones, in a cache of 256 entries per KV head, on average.
#include <express/cache.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int64_t kQueryHeads = 4, kKvHeads = 2, kDim = 64, kBudget = 256, kPrompt = 1000, kDecode = 3000;

void Check(const express::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

// Stands in for a model: numbers in [-1, 1).
std::vector<float> Random(int64_t count) {
  static uint32_t state = 1;
  std::vector<float> x(count);
  for (float& value : x) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(state >> 8) * 0x1p-23f - 1.0f;
  }
  return x;
}

// The weights of the entries of one KV head always add up to the number of tokens seen.
int64_t SumOfWeights(const express::ExpressCache& cache, int32_t kv_head, int64_t* entries) {
  Check(cache.Entries(0, kv_head, entries));
  std::vector<float> k(*entries * kDim), v(*entries * kDim), log_weight(*entries);
  const express::View weight_view(log_weight.data(), {*entries});
  const express::Tensor weights = weight_view;
  Check(cache.Export(0, kv_head, express::View(k.data(), {*entries, kDim}), express::View(v.data(), {*entries, kDim}),
                     &weights, nullptr, entries));
  int64_t sum = 0;
  for (int64_t i = 0; i < *entries; ++i) sum += std::llround(std::exp(log_weight[i]));
  return sum;
}

}  // namespace

int main() {
  using express::View;
  express::Config config;
  config.query_heads = kQueryHeads;
  config.kv_heads = kKvHeads;
  config.key_dim = config.value_dim = kDim;
  config.budget = kBudget;
  express::ExpressCache cache;
  Check(express::ExpressCache::Create(config, &cache));

  {
    const auto q = Random(kPrompt * kQueryHeads * kDim);
    const auto k = Random(kPrompt * kKvHeads * kDim), v = Random(kPrompt * kKvHeads * kDim);
    std::vector<float> out(kPrompt * kQueryHeads * kDim);
    Check(cache.Prefill(0, View(q.data(), {kPrompt, kQueryHeads, kDim}), View(k.data(), {kPrompt, kKvHeads, kDim}),
                        View(v.data(), {kPrompt, kKvHeads, kDim}), View(out.data(), {kPrompt, kQueryHeads, kDim})));
  }

  std::vector<float> out(kQueryHeads * kDim);
  for (int64_t token = 0; token < kDecode; ++token) {
    const auto q = Random(kQueryHeads * kDim), k = Random(kKvHeads * kDim), v = Random(kKvHeads * kDim);
    Check(cache.Append(0, View(k.data(), {1, kKvHeads, kDim}), View(v.data(), {1, kKvHeads, kDim})));
    Check(cache.Attend(0, View(q.data(), {1, kQueryHeads, kDim}), View(out.data(), {1, kQueryHeads, kDim})));
  }

  bool right = true;
  int64_t all = 0;
  for (int32_t head = 0; head < kKvHeads; ++head) {
    int64_t entries = 0;
    const int64_t weight = SumOfWeights(cache, head, &entries);
    std::printf("KV head %d: %lld tokens in %lld entries, weights add up to %lld\n", head,
                static_cast<long long>(kPrompt + kDecode), static_cast<long long>(entries),
                static_cast<long long>(weight));
    right = right && weight == kPrompt + kDecode;
    all += entries;
  }
  right = right && all <= kKvHeads * kBudget;
  express::Stats stats;
  Check(cache.GetStats(express::kAllLayers, &stats));
  std::printf("%lld bytes, %lld halvings, largest weight %lld\n", static_cast<long long>(stats.bytes),
              static_cast<long long>(stats.halvings), static_cast<long long>(stats.max_weight));
  return right ? 0 : 1;
}
