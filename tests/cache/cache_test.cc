// The cache end to end: what it holds, what it computes, and that neither depends on how it is called.
#include "express/cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <set>
#include <string>
#include <thread>

#include "tests/cache/testing.h"

namespace express {
namespace {

ExpressCache Make(const Config& c) {
  ExpressCache cache;
  EXPECT_OK(ExpressCache::Create(c, &cache));
  return cache;
}

// Weighted attention over what the cache exports, in double.
void ExpectAttendsAsExported(const ExpressCache& cache, const Config& c, int32_t layer, const Stream& s,
                             int64_t token) {
  const Output got = Attend(cache, c, layer, s, token, token + 1);
  const double scale = 1 / std::sqrt(static_cast<double>(c.key_dim));
  for (int32_t h = 0; h < c.query_heads; ++h) {
    const Held held = Export(cache, c, layer, h / (c.query_heads / c.kv_heads));
    const float* q = s.q.data() + (token * c.query_heads + h) * c.key_dim;
    std::vector<double> logit(held.position.size());
    for (size_t j = 0; j < logit.size(); ++j) {
      logit[j] = c.weight_exponent * held.log_weight[j];
      for (int32_t d = 0; d < c.key_dim; ++d)
        logit[j] += scale * q[d] * held.k[j * static_cast<size_t>(c.key_dim) + static_cast<size_t>(d)];
    }
    double sum = 0;
    std::vector<double> out(static_cast<size_t>(c.value_dim), 0.0);
    for (size_t j = 0; j < logit.size(); ++j) {
      sum += std::exp(logit[j]);
      for (size_t d = 0; d < out.size(); ++d) out[d] += std::exp(logit[j]) * held.v[j * out.size() + d];
    }
    ASSERT_NEAR(got.lse[static_cast<size_t>(h)], std::log(sum), 1e-4);
    for (size_t d = 0; d < out.size(); ++d)
      ASSERT_NEAR(got.out[static_cast<size_t>(h) * out.size() + d], out[d] / sum, 1e-4);
  }
}

TEST(Cache, WeightsSumToTokensAndTheWindowIsExactAfterEveryAppend) {
  for (const Schedule schedule : {Schedule::kBudget, Schedule::kRounds}) {
    Config c = SmallConfig();
    c.schedule = schedule;
    c.window = 10;
    c.protected_entries = 6;
    ExpressCache cache = Make(c);
    const Stream s(c, 700);
    for (int64_t n = 0; n < s.n;) {
      const int64_t end = std::min<int64_t>(s.n, n + 1 + n % 7);
      ASSERT_OK(Append(cache, c, 0, s, n, end));
      n = end;
      for (int32_t g = 0; g < c.kv_heads; ++g) {
        const Held held = Export(cache, c, 0, g);
        ASSERT_EQ(held.total_weight(), n);
        ASSERT_LE(static_cast<int64_t>(held.position.size()), c.budget);
        const std::set<int64_t> positions(held.position.begin(), held.position.end());
        ASSERT_EQ(positions.size(), held.position.size()) << "an entry is held twice";
        ASSERT_LT(*positions.rbegin(), n);
        for (int64_t i = 0; i < n; ++i) {
          if (i < std::min(n, c.sinks) || i >= n - 10) {
            ASSERT_EQ(positions.count(i), 1u) << "token " << i << " of " << n;
          }
        }
        for (size_t j = 0; j < held.position.size(); ++j) {  // every entry is the token it says
          const auto row = static_cast<size_t>(held.position[j] * c.kv_heads + g);
          const auto dk = static_cast<size_t>(c.key_dim), dv = static_cast<size_t>(c.value_dim);
          ASSERT_TRUE(std::equal(held.k.begin() + static_cast<int64_t>(j * dk),
                                 held.k.begin() + static_cast<int64_t>((j + 1) * dk),
                                 s.k.begin() + static_cast<int64_t>(row * dk)));
          ASSERT_TRUE(std::equal(held.v.begin() + static_cast<int64_t>(j * dv),
                                 held.v.begin() + static_cast<int64_t>((j + 1) * dv),
                                 s.v.begin() + static_cast<int64_t>(row * dv)));
        }
      }
    }
    ExpectAttendsAsExported(cache, c, 0, s, 3);
  }
}

TEST(Cache, AttendsAsTheExportedWeightsSayForEveryExponent) {
  for (const DType dtype : {DType::kF32, DType::kI8})
    for (const double exponent : {0.0, 0.5, 1.0}) {
      Config c = SmallConfig();
      c.dtype = dtype;
      c.weight_exponent = exponent;
      ExpressCache cache = Make(c);
      const Stream s(c, 1000);
      ASSERT_OK(Append(cache, c, 1, s, 0, s.n));
      for (int64_t token : {0, 500, 999}) ExpectAttendsAsExported(cache, c, 1, s, token);
    }
}

TEST(Cache, AnEmptyCacheAttendsToNothing) {
  const Config c = SmallConfig();
  const ExpressCache cache = Make(c);
  const Output o = Attend(cache, c, 0, Stream(c, 3), 0, 3);
  for (const float x : o.out) EXPECT_EQ(x, 0);
  for (const float x : o.lse) EXPECT_EQ(x, -INFINITY);
}

TEST(Cache, HoldsTheSameHoweverTheStreamIsCut) {
  const Config c = SmallConfig();
  const Stream s(c, 1500);
  ExpressCache whole = Make(c), pieces = Make(c);
  ASSERT_OK(Append(whole, c, 0, s, 0, s.n));
  std::mt19937 rng(2);
  for (int64_t n = 0; n < s.n;) {
    const int64_t end = std::min<int64_t>(s.n, n + static_cast<int64_t>(rng() % 90));
    ASSERT_OK(Append(pieces, c, 0, s, n, end));
    n = end;
  }
  for (int32_t g = 0; g < c.kv_heads; ++g) EXPECT_TRUE(Export(whole, c, 0, g) == Export(pieces, c, 0, g));
}

TEST(Cache, AppendAllIsAppendToEveryLayer) {
  const Config c = SmallConfig();
  ExpressCache together = Make(c), apart = Make(c);
  const int64_t n = 300;
  const Stream a(c, n, 1), b(c, n, 2);
  std::vector<float> k = a.k, v = a.v;  // (layers, n, kv_heads, dim)
  k.insert(k.end(), b.k.begin(), b.k.end());
  v.insert(v.end(), b.v.begin(), b.v.end());
  ASSERT_OK(together.AppendAll(View(k.data(), {c.layers, n, c.kv_heads, c.key_dim}),
                               View(v.data(), {c.layers, n, c.kv_heads, c.value_dim})));
  ASSERT_OK(Append(apart, c, 1, b, 0, n));
  ASSERT_OK(Append(apart, c, 0, a, 0, n));
  EXPECT_TRUE(ExportAll(together, c) == ExportAll(apart, c));
}

TEST(Cache, HeadsSplitOverProcessesHoldWhatTheWholeHolds) {
  Config c = SmallConfig();
  c.kv_heads = 4;
  c.query_heads = 4;
  const Stream s(c, 800);
  ExpressCache whole = Make(c);
  ASSERT_OK(Append(whole, c, 0, s, 0, s.n));
  Config half = c;
  half.kv_heads = half.query_heads = 2;
  for (int32_t first : {0, 2}) {
    half.first_kv_head = first;
    ExpressCache part = Make(half);
    // The part's heads, in place: strides skip the others.
    const int64_t shape_k[] = {s.n, 2, c.key_dim}, stride_k[] = {4 * c.key_dim, c.key_dim, 1};
    const int64_t shape_v[] = {s.n, 2, c.value_dim}, stride_v[] = {4 * c.value_dim, c.value_dim, 1};
    ASSERT_OK(part.Append(
        0, {const_cast<float*>(s.k.data()) + first * c.key_dim, DeviceType::kCpu, 0, DType::kF32, 3, shape_k, stride_k},
        {const_cast<float*>(s.v.data()) + first * c.value_dim, DeviceType::kCpu, 0, DType::kF32, 3, shape_v,
         stride_v}));
    for (int32_t g : {0, 1}) EXPECT_TRUE(Export(part, half, 0, g) == Export(whole, c, 0, first + g));
  }
}

TEST(Cache, SeedLayerAndHeadChangeTheDraws) {
  Config c = SmallConfig();
  const Stream s(c, 900);
  ExpressCache a = Make(c);
  c.seed = 6;
  ExpressCache b = Make(c);
  ASSERT_OK(Append(a, c, 0, s, 0, s.n));
  ASSERT_OK(Append(a, c, 1, s, 0, s.n));
  ASSERT_OK(Append(b, c, 0, s, 0, s.n));
  EXPECT_FALSE(Export(a, c, 0, 0) == Export(b, c, 0, 0));
  EXPECT_FALSE(Export(a, c, 0, 0) == Export(a, c, 1, 0));
}

// Exact causal attention in double.
Output Exact(const Config& c, const Stream& s) {
  Output o{std::vector<float>(static_cast<size_t>(s.n * c.query_heads * c.value_dim)),
           std::vector<float>(static_cast<size_t>(s.n * c.query_heads))};
  const double scale = 1 / std::sqrt(static_cast<double>(c.key_dim));
  for (int64_t t = 0; t < s.n; ++t)
    for (int64_t h = 0; h < c.query_heads; ++h) {
      const int64_t g = h / (c.query_heads / c.kv_heads);
      std::vector<double> out(static_cast<size_t>(c.value_dim), 0.0);
      double sum = 0;
      for (int64_t j = 0; j <= t; ++j) {
        double logit = 0;
        for (int64_t d = 0; d < c.key_dim; ++d)
          logit += scale * s.q[static_cast<size_t>((t * c.query_heads + h) * c.key_dim + d)] *
                   s.k[static_cast<size_t>((j * c.kv_heads + g) * c.key_dim + d)];
        sum += std::exp(logit);
        for (size_t d = 0; d < out.size(); ++d)
          out[d] += std::exp(logit) * s.v[static_cast<size_t>((j * c.kv_heads + g) * c.value_dim) + d];
      }
      o.lse[static_cast<size_t>(t * c.query_heads + h)] = static_cast<float>(std::log(sum));
      for (size_t d = 0; d < out.size(); ++d)
        o.out[static_cast<size_t>((t * c.query_heads + h) * c.value_dim) + d] = static_cast<float>(out[d] / sum);
    }
  return o;
}

void ExpectNear(const Output& a, const Output& b, float tolerance) {
  ASSERT_EQ(a.out.size(), b.out.size());
  for (size_t i = 0; i < a.out.size(); ++i) ASSERT_NEAR(a.out[i], b.out[i], tolerance) << "out " << i;
  for (size_t i = 0; i < a.lse.size(); ++i) ASSERT_NEAR(a.lse[i], b.lse[i], tolerance) << "lse " << i;
}

TEST(Cache, PrefillIsExactWhileTheBudgetIsNotExceeded) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kI8}) {
    Config c = SmallConfig();
    c.dtype = dtype;
    c.budget = 200;
    const Stream s(c, 130);
    ExpressCache cache = Make(c);
    const Output got = Prefill(cache, c, 0, s, 0, s.n);
    ExpectNear(got, Exact(c, s), dtype == DType::kF32 ? 2e-5f : dtype == DType::kF16 ? 5e-3f : 4e-2f);
  }
}

// Of query rows of KV head g: the largest difference.
float Difference(const Config& c, const Output& a, const Output& b, int64_t g) {
  float most = 0;
  const int64_t group = c.query_heads / c.kv_heads;
  for (size_t i = 0; i < a.out.size(); ++i)
    if (static_cast<int64_t>(i) / c.value_dim % c.query_heads / group == g)
      most = std::max(most, std::abs(a.out[i] - b.out[i]));
  return most;
}

TEST(Cache, ShortPromptsGetExactAttentionAndLeaveTheSameCache) {
  Config c = SmallConfig();  // a budget of 64
  for (const int32_t threads : {1, 3})
    for (const int64_t n : {65, 130, 192, 193}) {
      c.threads = threads;
      const Stream s(c, n);
      ExpressCache cache = Make(c), appended = Make(c);
      const Output got = Prefill(cache, c, 0, s, 0, n);
      if (n <= 192)
        ExpectNear(got, Exact(c, s), 2e-5f);
      else
        EXPECT_GT(Difference(c, got, Exact(c, s), 0), 1e-2f);
      ASSERT_OK(Append(appended, c, 0, s, 0, n));
      EXPECT_TRUE(ExportAll(cache, c) == ExportAll(appended, c));
    }
  // Not where the layer holds something, and head by head.
  const Stream s(c, 180);
  ExpressCache cache = Make(c);
  Output got = Prefill(cache, c, 0, s, 0, 16);
  const Output rest = Prefill(cache, c, 0, s, 16, s.n);
  got.out.insert(got.out.end(), rest.out.begin(), rest.out.end());
  EXPECT_GT(Difference(c, got, Exact(c, s), 0), 1e-2f);
  const std::vector<HeadSetting> settings = {{.budget = 64}, {.budget = 40}, {.budget = 64}, {.budget = 64}};
  c.head_settings = settings;
  ExpressCache uneven = Make(c), appended = Make(c);
  got = Prefill(uneven, c, 0, s, 0, s.n);
  EXPECT_LT(Difference(c, got, Exact(c, s), 0), 2e-5f);
  EXPECT_GT(Difference(c, got, Exact(c, s), 1), 1e-2f);
  ASSERT_OK(Append(appended, c, 0, s, 0, s.n));
  EXPECT_TRUE(ExportAll(uneven, c) == ExportAll(appended, c));
}

TEST(Cache, PrefillInChunksOfWholeBlocksEqualsPrefillInOne) {
  for (const DType dtype : {DType::kF32, DType::kI8}) {
    Config c = SmallConfig();  // blocks of 16
    c.dtype = dtype;
    const Stream s(c, 400);
    ExpressCache whole = Make(c), chunks = Make(c);
    const Output all = Prefill(whole, c, 0, s, 0, s.n);
    Output joined;
    for (auto [begin, end] : {std::pair<int64_t, int64_t>{0, 48}, {48, 64}, {64, 320}, {320, 400}}) {
      const Output part = Prefill(chunks, c, 0, s, begin, end);
      joined.out.insert(joined.out.end(), part.out.begin(), part.out.end());
      joined.lse.insert(joined.lse.end(), part.lse.begin(), part.lse.end());
    }
    EXPECT_TRUE(all == joined);
    EXPECT_TRUE(ExportAll(whole, c) == ExportAll(chunks, c));
    // Any cut leaves the same cache, and so does append.
    ExpressCache odd = Make(c), appended = Make(c);
    Prefill(odd, c, 0, s, 0, 37);
    Prefill(odd, c, 0, s, 37, 400);
    ASSERT_OK(Append(appended, c, 0, s, 0, s.n));
    EXPECT_TRUE(ExportAll(whole, c) == ExportAll(odd, c));
    EXPECT_TRUE(ExportAll(whole, c) == ExportAll(appended, c));
  }
}

TEST(Cache, DecodingByPrefillOfOneTokenIsAppendThenAttendWhileExact) {
  const Config c = SmallConfig();
  const Stream s(c, 40);
  ExpressCache prefilled = Make(c), appended = Make(c);
  for (int64_t t = 0; t < s.n; ++t) {
    const Output a = Prefill(prefilled, c, 0, s, t, t + 1);
    ASSERT_OK(Append(appended, c, 0, s, t, t + 1));
    ExpectNear(a, Attend(appended, c, 0, s, t, t + 1), 1e-5f);
  }
}

// An engine's own threads: here one, which runs the tasks backwards on workers in turn.
void BackwardFor(void*, int64_t count, void (*body)(void*, int64_t, int32_t), void* task) {
  for (int64_t i = count - 1; i >= 0; --i) body(task, i, static_cast<int32_t>(i % 3));
}

TEST(Cache, ResultsDoNotDependOnThreads) {
  for (const DType dtype : {DType::kF32, DType::kI8}) {
    Config c = SmallConfig();
    c.dtype = dtype;
    c.kv_heads = 3;
    c.query_heads = 3;
    c.key_dim = c.value_dim = 64;
    c.budget = 5000;
    c.prefill_block = 512;
    const Stream s(c, 8000);
    std::vector<Output> outputs;
    std::vector<std::vector<Held>> held;
    for (int kind = 0; kind < 3; ++kind) {
      c.threads = kind == 0 ? 1 : 3;
      c.parallel_for = kind == 2 ? BackwardFor : nullptr;
      ExpressCache cache = Make(c);
      outputs.push_back(Prefill(cache, c, 0, s, 0, s.n));
      const Output decode = Attend(cache, c, 0, s, 7, 8);  // one token: split over slots
      outputs.back().out.insert(outputs.back().out.end(), decode.out.begin(), decode.out.end());
      held.push_back(ExportAll(cache, c));
    }
    EXPECT_TRUE(outputs[0] == outputs[1]);
    EXPECT_TRUE(outputs[0] == outputs[2]);
    EXPECT_TRUE(held[0] == held[1]);
    EXPECT_TRUE(held[0] == held[2]);
  }
}

// An engine's own threads: as many as the context says, each a worker that takes the next task.
void ThreadsFor(void* context, int64_t count, void (*body)(void*, int64_t, int32_t), void* task) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (int32_t worker = 0; worker < *static_cast<const int32_t*>(context); ++worker)
    threads.emplace_back([&, worker] {
      for (int64_t i = next++; i < count; i = next++) body(task, i, worker);
    });
  for (std::thread& thread : threads) thread.join();
}

TEST(Cache, TheEnginesOwnThreadsComputeTheSame) {
  Config c = SmallConfig();
  c.kv_heads = c.query_heads = 5;
  c.key_dim = c.value_dim = 64;
  c.budget = 600;
  c.prefill_block = 128;
  const Stream s(c, 2500);
  c.threads = 1;
  ExpressCache alone = Make(c);
  int32_t workers = 4;
  c.threads = workers;
  c.parallel_for = ThreadsFor;
  c.parallel_for_context = &workers;
  ExpressCache shared = Make(c);
  EXPECT_TRUE(Prefill(alone, c, 0, s, 0, s.n) == Prefill(shared, c, 0, s, 0, s.n));
  ASSERT_OK(Append(alone, c, 1, s, 0, s.n));
  ASSERT_OK(Append(shared, c, 1, s, 0, s.n));
  EXPECT_TRUE(ExportAll(alone, c) == ExportAll(shared, c));
  EXPECT_TRUE(Attend(alone, c, 0, s, 0, 3) == Attend(shared, c, 0, s, 0, 3));
}

TEST(Cache, ConcurrentAttendsDoNotDisturbEachOther) {
  Config c = SmallConfig();
  c.kv_heads = c.query_heads = 1;
  c.key_dim = c.value_dim = 64;
  c.budget = 9000;  // several runs of slots: one attention at a time may split them over threads
  c.threads = 2;
  const Stream s(c, 9500);
  ExpressCache cache = Make(c);
  ASSERT_OK(Append(cache, c, 0, s, 0, s.n));
  std::vector<Output> expected;
  for (int64_t t = 0; t < 4; ++t) expected.push_back(Attend(cache, c, 0, s, t, t + 1));
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (int i = 0; i < 20; ++i) wrong += !(Attend(cache, c, 0, s, t, t + 1) == expected[static_cast<size_t>(t)]);
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(Cache, RollbackTakesBackWithinTheReserveAndRefusesBeyond) {
  Config c = SmallConfig();
  c.window = 12;
  c.rollback_reserve = 5;
  const Stream s(c, 500), other(c, 500, 9);
  ExpressCache cache = Make(c), plain = Make(c);
  for (int32_t layer : {0, 1}) {
    ASSERT_OK(Append(cache, c, layer, s, 0, 200));
    ASSERT_OK(Append(plain, c, layer, s, 0, 200));
  }
  int64_t available = 0;
  ASSERT_OK(cache.RollbackAvailable(&available));
  EXPECT_EQ(available, 5);
  EXPECT_EQ(cache.Rollback(6).code(), StatusCode::kRollbackUnavailable);
  EXPECT_TRUE(ExportAll(cache, c) == ExportAll(plain, c));
  // Draft tokens, taken back, then the true ones: as if the drafts had never come, while no draft pushed anything out.
  // Tokens that left the tail meanwhile stay compressed, so the entries agree only in what they stand for.
  ASSERT_OK(cache.Rollback(5));
  for (int32_t layer : {0, 1}) ASSERT_OK(Append(cache, c, layer, s, 195, 200));
  for (int32_t g : {0, 1}) {
    Held a = Export(cache, c, 0, g), b = Export(plain, c, 0, g);
    EXPECT_EQ(a.total_weight(), 200);
    std::sort(a.position.begin(), a.position.end());
    std::sort(b.position.begin(), b.position.end());
    EXPECT_EQ(a.position, b.position);
  }
  EXPECT_EQ(cache.Rollback(-1).code(), StatusCode::kInvalidArgument);
}

TEST(Cache, CompressAheadMakesRoomForAppendsThatMayNotHalve) {
  Config c = SmallConfig();
  c.window = 16;
  c.protected_entries = 0;
  c.auto_compress = false;
  const Stream s(c, 400);
  ExpressCache cache = Make(c);
  int64_t n = 0, refused = 0;
  while (n < s.n) {
    const Status status = Append(cache, c, 0, s, n, n + 1);
    if (status.ok()) {
      ++n;
      continue;
    }
    ASSERT_EQ(status.code(), StatusCode::kWouldCompress);
    ++refused;
    int64_t room = 0;
    ASSERT_OK(cache.Compress(0, 8, &room));
    ASSERT_GE(room, 8);
  }
  EXPECT_GT(refused, 10);
  EXPECT_EQ(Export(cache, c, 0, 0).total_weight(), s.n);
  int64_t room = 0;
  ASSERT_OK(cache.Compress(kAllLayers, 1'000'000, &room));  // as far as it goes
  EXPECT_LT(room, 1'000'000);
  EXPECT_EQ(Export(cache, c, 0, 1).total_weight(), s.n);
}

TEST(Cache, ProfilesGiveEveryHeadItsBudget) {
  Config c = SmallConfig();
  c.budget = 200;
  const std::vector<float> share = {0, 1, 1, 2};
  c.head_share = share;
  ExpressCache cache = Make(c);
  const Stream s(c, 3000);
  ASSERT_OK(Append(cache, c, 0, s, 0, s.n));
  ASSERT_OK(Append(cache, c, 1, s, 0, s.n));
  // Base 62, and (200 - 62) * 4 = 552 shared out 0 : 138 : 138 : 276.
  const std::vector<int64_t> budgets = {62, 200, 200, 338};
  int64_t total = 0;
  for (int32_t i = 0; i < 4; ++i) {
    const Held held = Export(cache, c, i / 2, i % 2);
    EXPECT_EQ(held.total_weight(), s.n);
    EXPECT_LE(static_cast<int64_t>(held.position.size()), budgets[static_cast<size_t>(i)]);
    EXPECT_GT(static_cast<int64_t>(held.position.size()), budgets[static_cast<size_t>(i)] * 8 / 10);
    total += static_cast<int64_t>(held.position.size());
  }
  Stats stats;
  ASSERT_OK(cache.GetStats(kAllLayers, &stats));
  EXPECT_EQ(stats.entries, total);
  EXPECT_EQ(stats.entries_budget, 800);
  ExpectAttendsAsExported(cache, c, 1, s, 100);

  // The same budgets given explicitly hold the same.
  const std::vector<HeadSetting> settings = {{.budget = 62}, {.budget = 200}, {.budget = 200}, {.budget = 338}};
  c.head_share = {};
  c.head_settings = settings;
  ExpressCache explicitly = Make(c);
  ASSERT_OK(Append(explicitly, c, 0, s, 0, s.n));
  ASSERT_OK(Append(explicitly, c, 1, s, 0, s.n));
  EXPECT_TRUE(ExportAll(cache, c) == ExportAll(explicitly, c));
}

TEST(Cache, OneShotCompressionIsAppendAndExport) {
  for (const DType dtype : {DType::kF32, DType::kI8}) {
    Config c = SmallConfig();
    c.dtype = dtype;
    c.layers = 1;
    c.window = 0;
    c.protected_entries = 4;
    const Stream s(c, 777);
    ExpressCache cache = Make(c);
    ASSERT_OK(Append(cache, c, 0, s, 0, s.n));
    size_t bytes = 0;
    ASSERT_OK(ExpressCache::CompressKvWorkspace(c, &bytes));
    void* memory = std::aligned_alloc(64, bytes);
    const auto size = static_cast<size_t>(c.kv_heads * c.budget);
    std::vector<float> k(size * 16, NAN), v(size * 8, NAN), w(size, NAN);
    std::vector<int64_t> position(size, -1);
    const View<2> position_view(position.data(), {c.kv_heads, c.budget}, DType::kI64);
    const Tensor position_tensor = position_view;
    int64_t count = 0;
    ASSERT_OK(ExpressCache::CompressKv(
        c, View(s.k.data(), {s.n, c.kv_heads, c.key_dim}), View(s.v.data(), {s.n, c.kv_heads, c.value_dim}),
        View(k.data(), {c.kv_heads, c.budget, c.key_dim}), View(v.data(), {c.kv_heads, c.budget, c.value_dim}),
        View(w.data(), {c.kv_heads, c.budget}), &position_tensor, &count, {memory, bytes}));
    for (int32_t g = 0; g < c.kv_heads; ++g) {
      const Held held = Export(cache, c, 0, g);
      ASSERT_EQ(static_cast<size_t>(count), held.position.size());
      for (size_t j = 0; j < held.position.size(); ++j) {
        const size_t row = static_cast<size_t>(g) * static_cast<size_t>(c.budget) + j;
        EXPECT_EQ(position[row], held.position[j]);
        EXPECT_EQ(w[row], held.log_weight[j]);
        EXPECT_EQ(k[row * 16 + 5], held.k[j * 16 + 5]);
        EXPECT_EQ(v[row * 8 + 5], held.v[j * 8 + 5]);
      }
    }
    std::free(memory);
  }
}

// A token that holds something that is not finite, in one head of one layer: its row is NaN until it leaves, other heads are as
// without it, and config.validate refuses it.
TEST(Cache, WhatIsNotFiniteStaysSo) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8}) {
    Config c = SmallConfig();
    c.dtype = dtype;
    const Stream good(c, 40);
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
      Stream s = good;
      const size_t row = static_cast<size_t>(20 * c.kv_heads);  // of KV head 0
      s.v[row * static_cast<size_t>(c.value_dim) + 3] = bad;
      s.k[(row - 2) * static_cast<size_t>(c.key_dim) + 5] = bad;
      ExpressCache cache = Make(c), clean = Make(c);
      ASSERT_OK(Append(cache, c, 0, s, 0, 40));
      ASSERT_OK(Append(clean, c, 0, good, 0, 40));
      const Held held = Export(cache, c, 0, 0);
      for (size_t j = 0; j < held.position.size(); ++j) {
        EXPECT_EQ(std::isfinite(held.k[j * 16 + 5]), held.position[j] != 19) << held.position[j];
        EXPECT_EQ(std::isfinite(held.v[j * 8 + 3]), held.position[j] != 20) << held.position[j];
      }
      const Output got = Attend(cache, c, 0, s, 39, 40), expected = Attend(clean, c, 0, s, 39, 40);
      for (size_t h = 0; h < 6; ++h) {
        EXPECT_EQ(std::isfinite(got.out[h * 8 + 3]), h >= 3) << h;
        if (h < 3) continue;
        for (size_t d = 0; d < 8; ++d) EXPECT_EQ(got.out[h * 8 + d], expected.out[h * 8 + d]);
      }
      c.validate = true;
      ExpressCache strict = Make(c);
      EXPECT_EQ(Append(strict, c, 0, s, 0, 40).code(), StatusCode::kNotFinite);
      c.validate = false;
    }
  }
}

TEST(Cache, ResetIsAsNew) {
  const Config c = SmallConfig();
  const Stream s(c, 600);
  ExpressCache used = Make(c), fresh = Make(c);
  ASSERT_OK(Append(used, c, 0, Stream(c, 900, 4), 0, 900));
  ASSERT_OK(used.Reset());
  for (ExpressCache* cache : {&used, &fresh}) ASSERT_OK(Append(*cache, c, 0, s, 0, s.n));
  EXPECT_TRUE(ExportAll(used, c) == ExportAll(fresh, c));
}

TEST(Cache, StatsCountWhatHappened) {
  Config c = SmallConfig();
  ExpressCache cache = Make(c);
  const Stream s(c, 500);
  Stats stats;
  ASSERT_OK(cache.GetStats(kAllLayers, &stats));
  EXPECT_EQ(stats.tokens, 0);
  EXPECT_EQ(stats.max_weight, 0);
  ASSERT_OK(Append(cache, c, 0, s, 0, 30));
  ASSERT_OK(cache.GetStats(0, &stats));
  EXPECT_EQ(stats.tokens, 30);
  EXPECT_EQ(stats.entries, 60);
  EXPECT_EQ(stats.entries_peak, 60);
  EXPECT_EQ(stats.min_weight, 1);
  EXPECT_EQ(stats.halvings, 0);
  ASSERT_OK(Append(cache, c, 0, s, 30, 500));
  ASSERT_OK(cache.GetStats(0, &stats));
  EXPECT_EQ(stats.tokens, 500);
  EXPECT_GT(stats.halvings, 10);
  EXPECT_GT(stats.max_weight, 8);
  EXPECT_GT(stats.compress_seconds, 0);
  EXPECT_LE(stats.entries_peak, stats.entries_budget);
  EXPECT_EQ(stats.entries_budget, 128);
  ASSERT_OK(cache.GetStats(kAllLayers, &stats));
  EXPECT_EQ(stats.tokens, 0);  // layer 1 has none
}

}  // namespace
}  // namespace express
