// Budgets that follow observed attention (config.head_budgets).
#include <algorithm>
#include <set>

#include "src/cpu/reference.h"
#include "tests/cache/testing.h"

namespace express {
namespace {

constexpr int64_t kMean = 128;

Config ObservedConfig(DType dtype = DType::kF32) {
  Config c = SmallConfig();
  c.dtype = dtype;
  c.layers = 2;
  c.kv_heads = 3;
  c.query_heads = 6;
  c.budget = kMean;
  c.head_budgets = HeadBudgets::kObserved;
  return c;
}

// Keys and queries by which head g of layer l looks at all tokens alike (far), or at itself alone.
bool LooksFar(int32_t layer, int32_t g) { return layer == 1 && g == 2; }
Stream StreamFor(const Config& c, int32_t layer, int64_t n) {
  Stream s(c, n, 7);
  for (int64_t t = 0; t < n; ++t)
    for (int32_t h = 0; h < c.query_heads; ++h) {
      const int32_t g = h / (c.query_heads / c.kv_heads);
      float* q = s.q.data() + (t * c.query_heads + h) * c.key_dim;
      const float* k = s.k.data() + (t * c.kv_heads + g) * c.key_dim;
      for (int32_t i = 0; i < c.key_dim; ++i) q[i] = LooksFar(layer, g) ? 0.0f : 4 * k[i];
    }
  return s;
}

struct Streams {
  explicit Streams(const Config& c, int64_t n) : layer{StreamFor(c, 0, n), StreamFor(c, 1, n)} {}
  Stream layer[2];
};

// Tokens [begin, end) of both layers: in prompts of `chunk` tokens, or one by one.
std::vector<Output> Feed(ExpressCache& cache, const Config& c, const Streams& s, int64_t begin, int64_t end,
                         int64_t chunk) {
  std::vector<Output> outputs;
  for (int64_t at = begin; at < end; at += chunk)
    for (int32_t layer = 0; layer < c.layers; ++layer) {
      const int64_t stop = std::min(at + chunk, end);
      if (chunk > 1) {
        outputs.push_back(Prefill(cache, c, layer, s.layer[layer], at, stop));
      } else {
        EXPECT_OK(Append(cache, c, layer, s.layer[layer], at, stop));
        outputs.push_back(Attend(cache, c, layer, s.layer[layer], at, stop));
      }
    }
  return outputs;
}

std::vector<int64_t> Entries(const ExpressCache& cache, const Config& c) {
  std::vector<int64_t> entries;
  for (int32_t layer = 0; layer < c.layers; ++layer)
    for (int32_t g = 0; g < c.kv_heads; ++g) {
      entries.push_back(0);
      EXPECT_OK(cache.Entries(layer, g, &entries.back()));
    }
  return entries;
}

ExpressCache Create(const Config& c) {
  ExpressCache cache;
  EXPECT_OK(ExpressCache::Create(c, &cache));
  return cache;
}

TEST(Observed, TheHeadThatLooksFarGetsMore) {
  for (const auto& [chunk, dtype] :
       {std::pair{1, DType::kF32}, {16, DType::kF32}, {64, DType::kF32}, {1, DType::kI8}, {64, DType::kI8}}) {
    const Config c = ObservedConfig(dtype);
    const Streams s(c, 3000);
    ExpressCache cache = Create(c);
    int64_t bytes = 0, now = 0;
    ASSERT_OK(cache.Bytes(&bytes));
    for (int64_t n = 0; n < 3000; n += 192) {
      const int64_t end = std::min<int64_t>(3000, n + 192);
      Feed(cache, c, s, n, end, chunk);
      Stats stats;
      ASSERT_OK(cache.GetStats(kAllLayers, &stats));
      ASSERT_LE(stats.entries, kMean * 6);
      ASSERT_LE(stats.entries_budget, kMean * 6);
      ASSERT_GT(stats.entries_budget, kMean * 6 - 6);  // heads of one kind have the same, to the entry
      ASSERT_OK(cache.Bytes(&now));
      ASSERT_EQ(now, bytes);
      for (const Held& held : ExportAll(cache, c)) {
        ASSERT_EQ(held.total_weight(), end);
        // Sinks and the last tokens are exact in every head, whatever its budget.
        std::vector<int64_t> exact;
        for (size_t i = 0; i < held.position.size(); ++i)
          if (held.log_weight[i] == 0) exact.push_back(held.position[i]);
        const auto has = [&](int64_t token) { return std::count(exact.begin(), exact.end(), token) == 1; };
        for (int64_t token = 0; token < 4; ++token) ASSERT_TRUE(has(token));
        for (int64_t token = end - 20; token < end; ++token) ASSERT_TRUE(has(token)) << token << " of " << end;
      }
    }
    const std::vector<int64_t> entries = Entries(cache, c);
    EXPECT_GT(entries[5], 2 * kMean) << "chunks of " << chunk;
    for (size_t h = 0; h < 5; ++h) EXPECT_LT(entries[h], kMean) << h;
    EXPECT_LE(std::set<int64_t>(entries.begin(), entries.end()).size(), 3u);  // few kinds of heads
  }
}

// Until the budget is full nothing is known, and all is as without.
TEST(Observed, BeginsWithEqualBudgets) {
  const Config c = ObservedConfig();
  Config fixed = c;
  fixed.head_budgets = HeadBudgets::kFixed;
  const Streams s(c, kMean);
  ExpressCache cache = Create(c), other = Create(fixed);
  EXPECT_EQ(Feed(cache, c, s, 0, 112, 16), Feed(other, fixed, s, 0, 112, 16));
}

// The most entries of a head that stand for more than one token, at the end of n tokens.
int64_t MostWeighted(const Config& c, int64_t n) {
  const Streams s(c, n);
  ExpressCache cache = Create(c);
  Feed(cache, c, s, 0, n, 128);
  int64_t most = 0;
  for (const Held& held : ExportAll(cache, c))
    most = std::max<int64_t>(most, std::ranges::count_if(held.log_weight, [](float w) { return w > 0; }));
  return most;
}

// Below a mean of 1024 entries window and protected entries have nearly all: the coreset is the smallest (4, a reservoir, and what
// rounding leaves). From there on it has its share.
TEST(Observed, SmallBudgetsHaveTheSmallestCoreset) {
  Config c = ObservedConfig();
  c.prefill_block = 128;
  c.budget = 1023;
  EXPECT_LE(MostWeighted(c, 6000), 8);
  c.budget = 1024;
  EXPECT_GT(MostWeighted(c, 6000), 40);
}

// Engines that attend by themselves.
TEST(Observed, WithoutAttentionBudgetsStayEqual) {
  const Config c = ObservedConfig();
  const Streams s(c, 2000);
  ExpressCache cache = Create(c);
  for (int64_t n = 0; n < 2000; ++n)
    for (int32_t layer = 0; layer < 2; ++layer) ASSERT_OK(Append(cache, c, layer, s.layer[layer], n, n + 1));
  const std::vector<int64_t> entries = Entries(cache, c);
  EXPECT_EQ(*std::min_element(entries.begin(), entries.end()), *std::max_element(entries.begin(), entries.end()));
}

TEST(Observed, ThreadsDoNotMatter) {
  Config c = ObservedConfig();
  const Streams s(c, 1500);
  ExpressCache one = Create(c);
  c.threads = 4;
  ExpressCache four = Create(c);
  EXPECT_EQ(Feed(one, c, s, 0, 1500, 48), Feed(four, c, s, 0, 1500, 48));
  EXPECT_EQ(ExportAll(one, c), ExportAll(four, c));
}

TEST(Observed, SavedAndCopiedCachesGoOn) {
  for (const auto& [before, dtype] :
       {std::pair{60, DType::kF32}, {130, DType::kI8}, {300, DType::kF32}, {300, DType::kI8}, {1200, DType::kF32}}) {
    const Config c = ObservedConfig(dtype);
    const Streams s(c, before + 500), t(c, 700);
    ExpressCache cache = Create(c);
    Feed(cache, c, s, 0, before, 20);
    const std::vector<char> data = Saved(cache);
    ExpressCache loaded = Create(c), copied = Create(c);
    Feed(loaded, c, t, 0, 700, 7);  // has budgets of its own by now
    Feed(copied, c, t, 0, 100, 10);
    ASSERT_OK(loaded.Load(data.data(), data.size()));
    ASSERT_OK(copied.Copy(cache));
    EXPECT_EQ(Saved(loaded), data);
    EXPECT_EQ(Saved(copied), data);
    const std::vector<Output> expected = Feed(cache, c, s, before, before + 500, 20);
    EXPECT_EQ(Feed(loaded, c, s, before, before + 500, 20), expected) << before;
    EXPECT_EQ(Feed(copied, c, s, before, before + 500, 20), expected) << before;
  }
}

TEST(Observed, ResetIsAsNew) {
  const Config c = ObservedConfig();
  const Streams s(c, 1500);
  ExpressCache cache = Create(c);
  const std::vector<Output> first = Feed(cache, c, s, 0, 1500, 30);
  ASSERT_OK(cache.Reset());
  EXPECT_EQ(Feed(cache, c, s, 0, 1500, 30), first);
}

TEST(Observed, FixedAndObservedDoNotMix) {
  const Config c = ObservedConfig();
  Config fixed = c;
  fixed.head_budgets = HeadBudgets::kFixed;
  const std::vector<char> data = Saved(Create(fixed));
  EXPECT_EQ(Create(c).Load(data.data(), data.size()).code(), StatusCode::kInvalidArgument);
}

TEST(Observed, ABudgetInBytesHolds) {
  for (const DType dtype : {DType::kF32, DType::kI8}) {
    Config c = ObservedConfig(dtype);
    c.budget_unit = BudgetUnit::kBytes;
    c.budget = 300'000;
    int64_t bytes = 0, mean = 0;
    ASSERT_OK(ExpressCache::Size(c, &bytes, &mean));
    EXPECT_LE(bytes, c.budget);
    EXPECT_GT(mean, kMean);
    const Streams s(c, 8 * mean);
    ExpressCache cache = Create(c);
    Feed(cache, c, s, 0, 8 * mean, 64);
    EXPECT_GT(Entries(cache, c)[5], 2 * mean);
  }
}

// What moves when budgets change keeps its codes and its scales: every entry is one of the tokens, rounded once.
TEST(Observed, EntriesInEightBitsKeepTheirScales) {
  const Config c = ObservedConfig(DType::kI8);
  const Streams s(c, 2000);
  ExpressCache cache = Create(c);
  Feed(cache, c, s, 0, 2000, 40);
  const auto expect_stored = [](const std::vector<float>& held, size_t row, const std::vector<float>& all, int64_t at,
                                int32_t dim) {
    const std::vector<float> x(all.begin() + at * dim, all.begin() + (at + 1) * dim);
    const reference::Quantised codes = reference::Quantise(x);
    for (size_t d = 0; d < x.size(); ++d)
      ASSERT_EQ(held[row * x.size() + d], static_cast<float>(codes.scale * codes.code[d]));
  };
  int64_t most = 0;
  for (int32_t layer = 0; layer < c.layers; ++layer)
    for (int32_t g = 0; g < c.kv_heads; ++g) {
      const Held held = Export(cache, c, layer, g);
      most = std::max<int64_t>(most, static_cast<int64_t>(held.position.size()));
      for (size_t i = 0; i < held.position.size(); ++i) {
        expect_stored(held.k, i, s.layer[layer].k, held.position[i] * c.kv_heads + g, c.key_dim);
        expect_stored(held.v, i, s.layer[layer].v, held.position[i] * c.kv_heads + g, c.value_dim);
      }
    }
  EXPECT_GT(most, 2 * kMean);  // budgets have changed
}

// AUTO, the default: where nothing speaks against it.
TEST(Observed, AutoIsObservedWhereItCan) {
  const auto of = [](auto change) {
    Config c = ObservedConfig();
    c.head_budgets = HeadBudgets::kAuto;
    change(c);
    const ExpressCache cache = Create(c);
    Stats stats;
    EXPECT_OK(cache.GetStats(kAllLayers, &stats));
    return stats.head_budgets;
  };
  static constexpr float kShare[] = {1, 2};
  static const HeadSetting kSetting[] = {{.budget = 64}, {.budget = 64}};
  EXPECT_EQ(Config().head_budgets, HeadBudgets::kAuto);
  EXPECT_EQ(of([](Config&) {}), HeadBudgets::kObserved);
  EXPECT_EQ(of([](Config& c) { c.budget_unit = BudgetUnit::kBytes, c.budget = 300'000; }), HeadBudgets::kObserved);
  EXPECT_EQ(of([](Config& c) { c.head_budgets = HeadBudgets::kFixed; }), HeadBudgets::kFixed);
  EXPECT_EQ(of([](Config& c) { c.window = 20; }), HeadBudgets::kFixed);
  EXPECT_EQ(of([](Config& c) { c.protected_entries = 3; }), HeadBudgets::kFixed);
  EXPECT_EQ(of([](Config& c) { c.head_share = kShare; }), HeadBudgets::kFixed);
  EXPECT_EQ(of([](Config& c) { c.head_settings = kSetting; }), HeadBudgets::kFixed);
  EXPECT_EQ(of([](Config& c) { c.schedule = Schedule::kRounds, c.window = 16; }), HeadBudgets::kFixed);
  EXPECT_EQ(of([](Config& c) { c.auto_compress = false; }), HeadBudgets::kFixed);
  EXPECT_EQ(of([](Config& c) { c.layers = c.kv_heads = 1; }), HeadBudgets::kFixed);
  EXPECT_EQ(of([](Config& c) { c.first_layer = 2; }), HeadBudgets::kFixed);
  EXPECT_EQ(of([](Config& c) { c.first_kv_head = 3; }), HeadBudgets::kFixed);
  EXPECT_EQ(of([](Config& c) { c.budget = 24; }), HeadBudgets::kFixed);  // a base of 7 would be too small
}

// AUTO, the default: what the smallest coresets stand for counts less.
TEST(Observed, TheWeightExponentFollowsTheBudget) {
  EXPECT_EQ(Config().weight_exponent, kAuto);
  const auto outputs = [](const Config& base, double exponent) {
    Config c = base;
    c.weight_exponent = exponent;
    const int64_t n = c.budget + c.budget / 2;
    const Streams s(c, n);
    ExpressCache cache = Create(c);
    return Feed(cache, c, s, 0, n, c.budget / 2);
  };
  Config small = ObservedConfig();
  EXPECT_EQ(outputs(small, kAuto), outputs(small, 0.25));
  EXPECT_NE(outputs(small, kAuto), outputs(small, 0.5));
  Config fixed = small;
  fixed.head_budgets = HeadBudgets::kFixed;
  EXPECT_EQ(outputs(fixed, kAuto), outputs(fixed, 0.5));
  EXPECT_NE(outputs(fixed, kAuto), outputs(fixed, 0.25));
  Config most = small;  // the first mean with coresets, and the last without
  for (const int64_t mean : {1023, 1024}) {
    most.budget = mean;
    EXPECT_EQ(outputs(most, kAuto), outputs(most, mean < 1024 ? 0.25 : 0.5)) << mean;
    EXPECT_NE(outputs(most, kAuto), outputs(most, mean < 1024 ? 0.5 : 0.25)) << mean;
  }
  // The budgets of a batch may differ all the same.
  Config large = small;
  small.head_budgets = large.head_budgets = HeadBudgets::kAuto;
  small.weight_exponent = large.weight_exponent = kAuto;
  large.budget = 2048;
  ExpressCache a = Create(small), b = Create(large);
  const Stream s(small, 2);
  ExpressCache* const both[] = {&a, &b};
  EXPECT_OK(ExpressCache::AppendBatch(both, 0, View(s.k.data(), {2, small.kv_heads, small.key_dim}),
                                      View(s.v.data(), {2, small.kv_heads, small.value_dim})));
  std::vector<float> out(static_cast<size_t>(2 * small.query_heads * small.value_dim));
  EXPECT_OK(ExpressCache::AttendBatch(both, 0, View(s.q.data(), {2, small.query_heads, small.key_dim}),
                                      View(out.data(), {2, small.query_heads, small.value_dim})));
  EXPECT_EQ(std::vector<float>(out.begin(), out.begin() + small.value_dim),  // one token: its own value
            std::vector<float>(s.v.begin(), s.v.begin() + small.value_dim));
}

// A prompt that is longer than the budget in one call: settled behind it. (Longer than those that fixed budgets answer exactly.)
TEST(Observed, APromptInOneCallIsSettledAfterwards) {
  const Config c = ObservedConfig();
  Config fixed = c;
  fixed.head_budgets = HeadBudgets::kFixed;
  fixed.protected_entries = (kMean - kMean * 5 / 16) * 30 / 100;  // the division of a mean below 1024
  fixed.window = kMean - c.sinks - fixed.protected_entries - 1 - 4;
  constexpr int64_t kPrompt = 3 * kMean + 50, kAll = kPrompt + 100;
  const Streams s(c, kAll);
  ExpressCache cache = Create(c), other = Create(fixed);
  EXPECT_EQ(Feed(cache, c, s, 0, kPrompt, kPrompt), Feed(other, fixed, s, 0, kPrompt, kPrompt));
  const std::vector<int64_t> equal = Entries(cache, c);
  EXPECT_LE(equal[5], kMean);
  Feed(cache, c, s, kPrompt, kAll, 10);
  EXPECT_LT(Entries(cache, c)[0], kMean / 2);
  for (const Held& held : ExportAll(cache, c)) EXPECT_EQ(held.total_weight(), kAll);
}

TEST(Observed, RefusesWhatItCannotDo) {
  const auto refused = [](const char* what, auto change) {
    Config c = ObservedConfig();
    change(c);
    ExpressCache cache;
    const Status status = ExpressCache::Create(c, &cache);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << what;
    EXPECT_NE(status.message().find("config.head_budgets"), std::string::npos) << status.message();
  };
  static constexpr float kShare[] = {1, 2};
  refused("window", [](Config& c) { c.window = 20; });
  refused("protected", [](Config& c) { c.protected_entries = 3; });
  refused("share", [](Config& c) { c.head_share = kShare; });
  refused("rounds", [](Config& c) { c.schedule = Schedule::kRounds; });
  refused("auto_compress", [](Config& c) { c.auto_compress = false; });
  refused("one head", [](Config& c) { c.layers = c.kv_heads = 1; });
  Config c = ObservedConfig();
  c.budget = 24;  // a base of 7
  ExpressCache cache;
  EXPECT_EQ(ExpressCache::Create(c, &cache).code(), StatusCode::kBudgetTooSmall);
}

}  // namespace
}  // namespace express
