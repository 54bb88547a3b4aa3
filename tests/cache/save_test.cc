// Saved, loaded and copied caches go on as the originals do, bit for bit.
#include <algorithm>
#include <string>

#include "tests/cache/testing.h"

namespace express {
namespace {

// Stats but for times.
std::vector<int64_t> Counts(const ExpressCache& cache) {
  std::vector<int64_t> all;
  for (const int32_t layer : {kAllLayers, 0, 1}) {
    Stats s;
    EXPECT_OK(cache.GetStats(layer, &s));
    all.insert(all.end(), {s.tokens, s.entries, s.entries_peak, s.min_weight, s.max_weight, s.halvings});
  }
  return all;
}

std::vector<Config> Configs() {
  std::vector<Config> configs;
  std::mt19937 rng(9);
  for (const Schedule schedule : {Schedule::kBudget, Schedule::kRounds})
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kI8})
      for (const int64_t protect : {0, 7}) {
        Config c = SmallConfig();
        c.schedule = schedule;
        c.dtype = dtype;
        c.protected_entries = protect;
        c.window = 10;
        c.rollback_reserve = static_cast<int64_t>(rng() % 6);
        c.seed = rng();
        configs.push_back(c);
      }
  static constexpr float kShare[] = {1, 2, 0, 5};
  configs.push_back(SmallConfig());
  configs.back().head_share = kShare;
  static constexpr float kFrequencies[] = {1, 0.5, 0.25, 0.125, 0};
  configs.push_back(SmallConfig());
  configs.back().protected_entries = 7;
  configs.back().rope_frequencies = kFrequencies;
  return configs;
}

TEST(Save, LoadedCachesGoOnAsTheSaved) {
  std::mt19937 rng(3);
  for (const Config& c : Configs())
    for (const int64_t before : {0, 3, 40, 700}) {
      const Stream s(c, before + 400);
      ExpressCache cache;
      ASSERT_OK(ExpressCache::Create(c, &cache));
      const std::vector<char> empty = Saved(cache);
      for (int32_t layer = 0; layer < c.layers; ++layer) ASSERT_OK(Append(cache, c, layer, s, 0, before));
      if (c.rollback_reserve > 1 && before > 10) {
        ASSERT_OK(cache.Rollback(2));
        for (int32_t layer = 0; layer < c.layers; ++layer) ASSERT_OK(Append(cache, c, layer, s, before - 2, before));
      }
      const std::vector<char> data = Saved(cache);
      EXPECT_EQ(data.size(), empty.size());

      Config other = c;  // all that may differ
      other.query_heads = c.kv_heads;
      other.threads = 2;
      other.prefill_block = 64;
      other.weight_exponent = 1;
      other.validate = true;
      ExpressCache loaded, copied;
      ASSERT_OK(ExpressCache::Create(other, &loaded));
      ASSERT_OK(ExpressCache::Create(c, &copied));
      for (ExpressCache* used : {&loaded, &copied})  // what they held is gone
        for (int32_t layer = 0; layer < c.layers; ++layer)
          ASSERT_OK(Append(*used, c, layer, s, 0, static_cast<int64_t>(rng() % 300)));
      ASSERT_OK(loaded.Load(data.data(), data.size()));
      ASSERT_OK(copied.Copy(cache));
      for (const ExpressCache* same : {&loaded, &copied}) {
        EXPECT_EQ(Counts(*same), Counts(cache));
        EXPECT_EQ(ExportAll(*same, c), ExportAll(cache, c));
        EXPECT_EQ(Saved(*same), data);
      }
      for (int64_t t = before; t < before + 400;) {
        const int64_t n = std::min<int64_t>(1 + static_cast<int64_t>(rng() % 30), before + 400 - t);
        for (int32_t layer = 0; layer < c.layers; ++layer)
          for (ExpressCache* one : {&cache, &loaded, &copied}) ASSERT_OK(Append(*one, c, layer, s, t, t + n));
        t += n;
      }
      for (const ExpressCache* same : {&loaded, &copied}) {
        EXPECT_EQ(Counts(*same), Counts(cache));
        EXPECT_EQ(ExportAll(*same, c), ExportAll(cache, c));
      }
      EXPECT_EQ(Attend(copied, c, 1, s, 0, 3), Attend(cache, c, 1, s, 0, 3));
      ASSERT_OK(cache.Load(empty.data(), empty.size()));
      EXPECT_EQ(Counts(cache)[0], 0);
    }
}

TEST(Save, WhatCannotBeLoadedChangesNothing) {
  const Config c = SmallConfig();
  const Stream s(c, 300);
  ExpressCache cache, from;
  ASSERT_OK(ExpressCache::Create(c, &cache));
  ASSERT_OK(ExpressCache::Create(c, &from));
  for (int32_t layer = 0; layer < c.layers; ++layer) {
    ASSERT_OK(Append(cache, c, layer, s, 0, 200));
    ASSERT_OK(Append(from, c, layer, s, 0, 300));
  }
  const std::vector<Held> held = ExportAll(cache, c);
  const std::vector<char> data = Saved(from);
  const auto refused = [&](std::vector<char> bytes, StatusCode code, const std::string& text) {
    const Status status = cache.Load(bytes.data(), bytes.size());
    EXPECT_EQ(status.code(), code);
    EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
    EXPECT_EQ(ExportAll(cache, c), held);
  };
  refused({}, StatusCode::kInvalidArgument, "bytes:");
  refused(std::vector<char>(data.begin(), data.begin() + 39), StatusCode::kInvalidArgument, "bytes:");
  refused(std::vector<char>(data.begin(), data.end() - 1), StatusCode::kInvalidArgument, "bytes:");
  const auto changed = [&](size_t at) {
    std::vector<char> bytes = data;
    bytes[at] = static_cast<char>(bytes[at] ^ 1);
    return bytes;
  };
  refused(changed(0), StatusCode::kInvalidArgument, "not a saved cache");
  for (const char format : {1, 4}) {
    std::vector<char> bytes = data;
    bytes[8] = format;
    refused(bytes, StatusCode::kUnsupported, "format");
  }
  refused(changed(24), StatusCode::kInvalidArgument, "another configuration");
  for (const size_t at : {size_t{32}, size_t{40}, data.size() / 2, data.size() - 1})
    refused(changed(at), StatusCode::kInvalidArgument, "checksum");

  std::vector<char> small(data.size() - 1, 7);
  const Status status = cache.Save(small.data(), small.size());
  EXPECT_EQ(status.code(), StatusCode::kBufferTooSmall) << status.message();
  EXPECT_EQ(std::count(small.begin(), small.end(), 7), static_cast<int64_t>(small.size()));

  // The format of 8-bit storage is one that readers of the other's refuse.
  Config eight = c;
  eight.dtype = DType::kI8;
  ExpressCache of_eight;
  ASSERT_OK(ExpressCache::Create(eight, &of_eight));
  const std::vector<char> in_eight = Saved(of_eight);
  EXPECT_EQ(data[8], 2);
  EXPECT_EQ(in_eight[8], 3);
  EXPECT_EQ(of_eight.Load(data.data(), data.size()).code(), StatusCode::kInvalidArgument);

  static constexpr float kFrequencies[] = {1, 0.5};
  Config others[] = {c, c, c, c, c, eight, c, c};
  others[0].seed = 6;
  others[1].budget = 65;
  others[2].dtype = DType::kF16;
  others[3].tau = 0.2;
  others[4].first_layer = 1;
  others[6].rope_frequencies = kFrequencies;
  others[7].protection_score = ProtectionScore::kEnergyValue;
  for (const Config& other : others) {
    ExpressCache different;
    ASSERT_OK(ExpressCache::Create(other, &different));
    refused(Saved(different), StatusCode::kInvalidArgument, "another configuration");
    EXPECT_EQ(cache.Copy(different).code(), StatusCode::kInvalidArgument);
    EXPECT_EQ(ExportAll(cache, c), held);
  }
  EXPECT_OK(cache.Copy(cache));
  EXPECT_EQ(ExportAll(cache, c), held);
}

// Which rotary positions were undone is part of what was saved.
TEST(Save, RotaryPositionsMustBeTheSame) {
  static constexpr float kOne[] = {1, 0.5}, kOther[] = {1, 0.25};
  Config c = SmallConfig();
  c.rope_frequencies = kOne;
  ExpressCache cache;
  ASSERT_OK(ExpressCache::Create(c, &cache));
  const std::vector<char> data = Saved(cache);
  std::vector<float> copied(std::begin(kOne), std::end(kOne));
  const auto loads = [&](const std::vector<char>& bytes, auto change) {
    Config other = c;
    change(other);
    ExpressCache into;
    EXPECT_OK(ExpressCache::Create(other, &into));
    return into.Load(bytes.data(), bytes.size()).ok();
  };
  EXPECT_TRUE(loads(data, [&](Config& o) { o.rope_frequencies = copied; }));
  EXPECT_TRUE(loads(data, [&](Config& o) { o.protection_score = ProtectionScore::kEnergy; }));
  EXPECT_FALSE(loads(data, [&](Config& o) { o.protection_score = ProtectionScore::kEnergyValue; }));
  EXPECT_FALSE(loads(data, [&](Config& o) { o.rope_frequencies = kOther; }));
  EXPECT_FALSE(loads(data, [&](Config& o) { o.rope_frequencies = o.rope_frequencies.first(1); }));
  EXPECT_FALSE(loads(data, [&](Config& o) { o.rope_layout = RopeLayout::kInterleaved; }));
  EXPECT_FALSE(loads(data, [&](Config& o) { o.rope_frequencies = {}; }));
}

}  // namespace
}  // namespace express
