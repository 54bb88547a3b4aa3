// The draws: Philox against the known answers of its authors, and the uniforms made of it.
#include "src/core/random.h"

#include <gtest/gtest.h>

#include <set>

namespace express {
namespace {

// Known-answer vectors of Random123 1.14 (kat_vectors, philox4x32 with 10 rounds).
TEST(RandomTest, PhiloxKnownAnswers) {
  constexpr uint32_t kOnes = 0xFFFFFFFFu;
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, 0, 0), (Philox{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
  EXPECT_EQ(Philox4x32({kOnes, kOnes, kOnes, kOnes}, kOnes, kOnes),
            (Philox{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
  EXPECT_EQ(Philox4x32({0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}, 0xa4093822u, 0x299f31d0u),
            (Philox{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));
}

TEST(RandomTest, UniformIsOpenAndSymmetric) {
  EXPECT_GT(UniformFromBits(0), 0.0f);
  EXPECT_LT(UniformFromBits(0xFFFFFFFFu), 1.0f);
  for (uint32_t bits = 0; bits < 1u << 23; bits += 997) {
    const float low = UniformFromBits(bits << 9), high = UniformFromBits(~(bits << 9));
    ASSERT_EQ(low + high, 1.0f) << bits;  // exact: neither is rounded
    ASSERT_NE(low, 0.5f);
  }
}

// Every part of a draw's name changes the draw.
TEST(RandomTest, DrawsAreDistinct) {
  std::set<uint32_t> draws;
  int count = 0;
  for (const uint64_t seed : {0ull, 1ull, 1ull << 32})
    for (const uint32_t layer : {0u, 1u})
      for (const uint32_t head : {0u, 1u}) {
        const StreamKey key = MakeStreamKey(seed, layer, head);
        for (const RandomPurpose purpose : {RandomPurpose::kHalve, RandomPurpose::kComplement, RandomPurpose::kSample})
          for (const uint64_t number : {0ull, 1ull, 1ull << 32})
            for (const uint32_t index : {0u, 1u, 1u << 31}) {
              draws.insert(DrawBits(key, purpose, number, index));
              ++count;
            }
      }
  EXPECT_EQ(static_cast<int>(draws.size()), count);  // 324 draws: a chance collision has probability 1e-5
}

// Counts of 2^14 draws with probability 5/8 have a standard deviation of 62; 6 of these.
TEST(RandomTest, ChanceHasItsProbability) {
  const StreamKey key = MakeStreamKey(7, 0, 0);
  int hits = 0;
  for (uint64_t i = 0; i < 1u << 14; ++i) hits += DrawChance(key, RandomPurpose::kSample, i, 5, 8);
  EXPECT_NEAR(hits, 10240, 372);
  EXPECT_FALSE(DrawChance(key, RandomPurpose::kSample, 0, 0, 3));
  EXPECT_TRUE(DrawChance(key, RandomPurpose::kSample, 0, 3, 3));
}

}  // namespace
}  // namespace express
