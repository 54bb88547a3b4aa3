// Rotary frequencies and scores of protection, as a cache takes them; the scores themselves: tests/cpu/protect_test.cc.
#include <algorithm>

#include "tests/cache/testing.h"

namespace express {
namespace {

ExpressCache Make(const Config& c) {
  ExpressCache cache;
  EXPECT_OK(ExpressCache::Create(c, &cache));
  return cache;
}

// Frequencies change what is kept, and nothing else does: not the threads, nor how the stream is cut, nor what the caller does with
// his array.
TEST(Rotary, PositionsAreUndoneForScoresOnly) {
  Config c = SmallConfig();
  c.window = 10;
  c.protected_entries = 12;
  const Stream s(c, 500);
  const auto held = [&](const Config& config, int64_t step) {
    ExpressCache cache = Make(config);
    for (int64_t t = 0; t < s.n; t += step) EXPECT_OK(Append(cache, config, 0, s, t, std::min(s.n, t + step)));
    return Export(cache, config, 0, 0);
  };
  const Held by_energy = held(c, 50);
  std::vector<float> frequencies = {1, 0.5, 0.25, 0.1f, 0.01f, 0.001f, 0, 0};
  c.rope_frequencies = frequencies;
  const Held without_positions = held(c, 50);
  EXPECT_NE(without_positions.position, by_energy.position);
  Config explicitly = c;
  explicitly.protection_score = ProtectionScore::kEnergy;  // what so small a budget comes to
  explicitly.threads = 2;
  EXPECT_EQ(held(explicitly, 1), without_positions);
  explicitly.protection_score = ProtectionScore::kEnergyValue;
  EXPECT_NE(held(explicitly, 50).position, without_positions.position);
  Config values = explicitly;  // of keys as they come
  values.rope_frequencies = {};
  EXPECT_NE(held(values, 50).position, held(explicitly, 50).position);
  EXPECT_NE(held(values, 50).position, by_energy.position);
  Config interleaved = c;
  interleaved.rope_layout = RopeLayout::kInterleaved;
  EXPECT_NE(held(interleaved, 50).position, without_positions.position);

  ExpressCache cache = Make(c);
  std::fill(frequencies.begin(), frequencies.end(), 3.0f);
  EXPECT_OK(Append(cache, c, 0, s, 0, s.n));
  EXPECT_EQ(Export(cache, c, 0, 0), without_positions);
}

// AUTO: with frequencies, values' norms count from a mean of 640 entries on.
TEST(Rotary, TheScoreFollowsTheBudget) {
  Config c = SmallConfig();
  static constexpr float kFrequencies[] = {1, 0.1f};
  const auto same = [](Config a, Config b) {
    const std::vector<char> data = Saved(Make(a));
    return Make(b).Load(data.data(), data.size()).ok();
  };
  for (const bool frequencies : {false, true})
    for (const int64_t budget : {64, 639, 640, 2000}) {
      c.budget = budget;
      if (frequencies) c.rope_frequencies = kFrequencies;
      Config energy = c, value = c;
      energy.protection_score = ProtectionScore::kEnergy;
      value.protection_score = ProtectionScore::kEnergyValue;
      EXPECT_EQ(same(c, energy), !frequencies || budget < 640) << budget;
      EXPECT_EQ(same(c, value), frequencies && budget >= 640) << budget;
    }
}

// What is not used takes no bytes.
TEST(Rotary, WhatIsNotUsedTakesNoBytes) {
  Config c = SmallConfig();
  const auto bytes = [](const Config& config) {
    int64_t size = 0;
    EXPECT_OK(ExpressCache::Size(config, &size, nullptr));
    return size;
  };
  const int64_t none = bytes(c);
  static constexpr float kFrequencies[8] = {1};
  c.rope_frequencies = kFrequencies;
  EXPECT_EQ(bytes(c), none + 3 * 64);  // a description, and two arrays of a line each
  c.rope_frequencies = {};
  c.protection_score = ProtectionScore::kEnergyValue;
  EXPECT_EQ(bytes(c), none + 64);
}

}  // namespace
}  // namespace express
