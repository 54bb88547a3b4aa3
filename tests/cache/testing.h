// Random streams, and what a cache holds, for the tests of the cache.
#ifndef EXPRESS_TESTS_CACHE_TESTING_H_
#define EXPRESS_TESTS_CACHE_TESTING_H_

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "tests/testing.h"

namespace express {

inline Config SmallConfig() {
  Config c;
  c.layers = 2;
  c.query_heads = 6;
  c.kv_heads = 2;
  c.key_dim = 16;
  c.value_dim = 8;
  c.budget = 64;
  c.threads = 1;
  c.prefill_block = 16;
  c.seed = 5;
  c.head_budgets = HeadBudgets::kFixed;  // most tests are about what depends on counts alone
  c.weight_exponent = 0.5;
  return c;
}

// Queries, keys and values of n tokens, the same for every layer.
struct Stream {
  Stream(const Config& c, int64_t tokens, uint32_t seed = 1) : n(tokens) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    q.resize(static_cast<size_t>(n * c.query_heads * c.key_dim));
    k.resize(static_cast<size_t>(n * c.kv_heads * c.key_dim));
    v.resize(static_cast<size_t>(n * c.kv_heads * c.value_dim));
    for (auto* array : {&q, &k, &v})
      for (float& x : *array) x = normal(rng);
  }
  int64_t n;
  std::vector<float> q;  // (n, query_heads, key_dim)
  std::vector<float> k;  // (n, kv_heads, key_dim)
  std::vector<float> v;  // (n, kv_heads, value_dim)
};

// Rows [begin, end) of the stream.
inline Status Append(ExpressCache& cache, const Config& c, int32_t layer, const Stream& s, int64_t begin, int64_t end) {
  return cache.Append(layer, View(s.k.data() + begin * c.kv_heads * c.key_dim, {end - begin, c.kv_heads, c.key_dim}),
                      View(s.v.data() + begin * c.kv_heads * c.value_dim, {end - begin, c.kv_heads, c.value_dim}));
}

struct Output {
  std::vector<float> out;  // (n, query_heads, value_dim)
  std::vector<float> lse;  // (n, query_heads)
  bool operator==(const Output&) const = default;
};

inline Output Prefill(ExpressCache& cache, const Config& c, int32_t layer, const Stream& s, int64_t begin,
                      int64_t end) {
  const int64_t n = end - begin;
  Output o{std::vector<float>(static_cast<size_t>(n * c.query_heads * c.value_dim), NAN),
           std::vector<float>(static_cast<size_t>(n * c.query_heads), NAN)};
  const View<2> lse(o.lse.data(), {n, c.query_heads});
  const Tensor lse_tensor = lse;
  EXPECT_OK(cache.Prefill(layer, View(s.q.data() + begin * c.query_heads * c.key_dim, {n, c.query_heads, c.key_dim}),
                          View(s.k.data() + begin * c.kv_heads * c.key_dim, {n, c.kv_heads, c.key_dim}),
                          View(s.v.data() + begin * c.kv_heads * c.value_dim, {n, c.kv_heads, c.value_dim}),
                          View(o.out.data(), {n, c.query_heads, c.value_dim}), &lse_tensor));
  return o;
}

inline Output Attend(const ExpressCache& cache, const Config& c, int32_t layer, const Stream& s, int64_t begin,
                     int64_t end) {
  const int64_t n = end - begin;
  Output o{std::vector<float>(static_cast<size_t>(n * c.query_heads * c.value_dim), NAN),
           std::vector<float>(static_cast<size_t>(n * c.query_heads), NAN)};
  const View<2> lse(o.lse.data(), {n, c.query_heads});
  const Tensor lse_tensor = lse;
  EXPECT_OK(cache.Attend(layer, View(s.q.data() + begin * c.query_heads * c.key_dim, {n, c.query_heads, c.key_dim}),
                         View(o.out.data(), {n, c.query_heads, c.value_dim}), &lse_tensor));
  return o;
}

// What one KV head holds.
struct Held {
  std::vector<float> k, v, log_weight;
  std::vector<int64_t> position;
  bool operator==(const Held&) const = default;

  int64_t total_weight() const {
    int64_t total = 0;
    for (const float w : log_weight) total += std::llround(std::exp(static_cast<double>(w)));
    return total;
  }
};

inline Held Export(const ExpressCache& cache, const Config& c, int32_t layer, int32_t kv_head) {
  int64_t count = 0;
  EXPECT_OK(cache.Entries(layer, kv_head, &count));
  const auto rows = static_cast<size_t>(count);
  Held held{std::vector<float>(rows * static_cast<size_t>(c.key_dim)),
            std::vector<float>(rows * static_cast<size_t>(c.value_dim)), std::vector<float>(rows),
            std::vector<int64_t>(rows)};
  const View<1> weight(held.log_weight.data(), {count}), position(held.position.data(), {count}, DType::kI64);
  const Tensor weight_tensor = weight, position_tensor = position;
  EXPECT_OK(cache.Export(layer, kv_head, View(held.k.data(), {count, c.key_dim}),
                         View(held.v.data(), {count, c.value_dim}), &weight_tensor, &position_tensor, &count));
  return held;
}

// Everything a cache holds: what must not change when a call fails.
inline std::vector<Held> ExportAll(const ExpressCache& cache, const Config& c) {
  std::vector<Held> all;
  for (int32_t layer = 0; layer < c.layers; ++layer)
    for (int32_t g = 0; g < c.kv_heads; ++g) all.push_back(Export(cache, c, layer, g));
  return all;
}

}  // namespace express

#endif  // EXPRESS_TESTS_CACHE_TESTING_H_
