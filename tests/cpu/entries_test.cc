// Entries in and out of a slab: conversions bit by bit, and which slots an operation touches.
#include <bit>

#include "tests/cpu/testing.h"

namespace express::cpu {
namespace {

class EntriesTest : public SimdTest {};
EXPRESS_FOR_EVERY_TARGET(EntriesTest);

// The value of a 16-bit pattern with `exponent_bits` exponent bits, from the definition of the formats.
double Decode(uint16_t bits, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (bits & 0x7FFF) >> mantissa_bits, mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa != 0 ? std::nan("") : sign * std::numeric_limits<double>::infinity();
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}
int ExponentBits(DType dtype) { return dtype == DType::kF16 ? 5 : 8; }

// All patterns of both formats; the value must be exact, NaN stays NaN, the sign of zero stays.
TEST_P(EntriesTest, WidensEveryPattern) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    std::vector<uint16_t> from(1 << 16);
    std::iota(from.begin(), from.end(), uint16_t{0});
    std::vector<float> to(from.size());
    Convert(from.data(), dtype, to.data(), DType::kF32, static_cast<int64_t>(from.size()));
    for (size_t i = 0; i < from.size(); ++i) {
      const double expected = Decode(from[i], ExponentBits(dtype));
      if (std::isnan(expected)) {
        ASSERT_TRUE(std::isnan(to[i])) << Name(dtype) << " " << i;
      } else {
        ASSERT_EQ(static_cast<double>(to[i]), expected) << Name(dtype) << " " << i;
        ASSERT_EQ(std::signbit(to[i]), std::signbit(expected)) << Name(dtype) << " " << i;
      }
    }
  }
}

// The pattern nearest to x, ties to the even one: by search among all finite patterns, which are in order of their
// values. From half a step above the largest finite value on, infinity.
uint16_t Encode(float x, int exponent_bits) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::abs(static_cast<double>(x));
  const int infinity = ((1 << exponent_bits) - 1) << (15 - exponent_bits);
  const auto value = [&](int bits) { return Decode(static_cast<uint16_t>(bits), exponent_bits); };
  const double largest = value(infinity - 1), half_step = (largest - value(infinity - 2)) / 2;
  if (magnitude >= largest + half_step) return static_cast<uint16_t>(infinity | sign);
  int low = 0, high = infinity;  // value(low) <= magnitude < value(high)
  while (high - low > 1) (value((low + high) / 2) <= magnitude ? low : high) = (low + high) / 2;
  if (high == infinity) return static_cast<uint16_t>(low | sign);
  const double below = magnitude - value(low), above = value(high) - magnitude;
  const bool up = above < below || (above == below && low % 2 == 1);
  return static_cast<uint16_t>((up ? high : low) | sign);
}

// Every pattern's value, the midpoint to the next, both neighbours of that midpoint, and random bits.
std::vector<float> NarrowingCases(DType dtype) {
  std::vector<float> cases;
  for (uint32_t bits = 0; bits < 1u << 16; bits += dtype == DType::kF16 ? 1 : 3) {
    const auto a = static_cast<float>(Decode(static_cast<uint16_t>(bits), ExponentBits(dtype)));
    const auto b = static_cast<float>(Decode(static_cast<uint16_t>(bits + 1), ExponentBits(dtype)));
    if (!std::isfinite(a) || !std::isfinite(b)) continue;
    const float middle = a / 2 + b / 2;
    for (const float x : {a, middle, std::nextafter(middle, a), std::nextafter(middle, b)}) cases.push_back(x);
  }
  std::mt19937 rng(1);
  for (int i = 0; i < 20000; ++i) {
    const auto x = std::bit_cast<float>(static_cast<uint32_t>(rng()));
    if (!std::isnan(x)) cases.push_back(x);
  }
  const float max = std::numeric_limits<float>::max();
  for (const float x : {65504.0f, 65519.996f, 65520.0f, 65536.0f, max, std::numeric_limits<float>::infinity(), 1e-8f,
                        std::numeric_limits<float>::denorm_min(), 0.0f})
    cases.insert(cases.end(), {x, -x});
  return cases;
}

TEST_P(EntriesTest, NarrowsToNearestEven) {
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    const std::vector<float> from = NarrowingCases(dtype);
    std::vector<uint16_t> to(from.size());
    Convert(from.data(), DType::kF32, to.data(), dtype, static_cast<int64_t>(from.size()));
    for (size_t i = 0; i < from.size(); ++i)
      ASSERT_EQ(to[i], Encode(from[i], ExponentBits(dtype))) << Name(dtype) << " of " << std::hexfloat << from[i];
  }
}

// In every lane of a vector and in what is left over of one.
TEST_P(EntriesTest, KeepsNaNInEveryLane) {
  for (const DType dtype : {DType::kF16, DType::kBF16})
    for (const uint32_t pattern : {0x7FC00000u, 0xFFC00000u, 0x7F800001u, 0x7FFFFFFFu, 0xFF801000u})
      for (int64_t lane = 0; lane < 37; ++lane) {
        std::vector<float> from(37, 1.0f), back(37);
        from[static_cast<size_t>(lane)] = std::bit_cast<float>(pattern);
        std::vector<uint16_t> to(37);
        Convert(from.data(), DType::kF32, to.data(), dtype, 37);
        Convert(to.data(), dtype, back.data(), DType::kF32, 37);
        for (int64_t i = 0; i < 37; ++i)
          ASSERT_EQ(std::isnan(back[static_cast<size_t>(i)]), i == lane) << Name(dtype) << std::hex << pattern;
      }
}

TEST_P(EntriesTest, AllFiniteFindsTheOne) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const DType dtype : kStorage) {
    EXPECT_TRUE(AllFinite(nullptr, dtype, 0));
    for (const int64_t count : {1, 7, 16, 33, 67}) {
      Buffer data(dtype, count);
      for (int64_t i = 0; i < count; ++i) data.Set(i, i % 2 ? -65504.0f : 1e-7f);
      ASSERT_TRUE(AllFinite(data.at(0), dtype, count)) << Name(dtype);
      for (int64_t i = 0; i < count; ++i)
        for (const float bad : {infinity, -infinity, kNaN}) {
          const float before = data.Get(i);
          data.Set(i, bad);
          ASSERT_FALSE(AllFinite(data.at(0), dtype, count)) << Name(dtype) << " " << i << " of " << count;
          data.Set(i, before);
        }
    }
  }
}

// Every pair of types, odd dimensions, strides wider than a row; other slots keep their bytes.
TEST_P(EntriesTest, WritesItsSlotsOnly) {
  std::mt19937 rng(2);
  std::normal_distribution<float> normal;
  for (const DType from : kStorage)
    for (const DType to : kStorage) {
      constexpr int64_t kCapacity = 9, kCount = 4, kKeyDim = 37, kValueDim = 5;
      TestSlab s(to, kCapacity, kKeyDim, kValueDim);
      Buffer key(from, kCount * 40), value(from, kCount * 11);
      for (int64_t i = 0; i < key.count(); ++i) key.Set(i, normal(rng));
      for (int64_t i = 0; i < value.count(); ++i) value.Set(i, normal(rng));
      std::vector<std::string> before;
      for (int64_t i = 0; i < kCapacity; ++i) before.push_back(s.Entry(i));
      const std::vector<int32_t> slots = RandomSlots(rng, kCapacity, kCount);
      WriteEntries(s.slab, slots.data(), kCount, 1000, {key.at(0), 40, from}, {value.at(0), 11, from});
      for (int64_t slot = 0; slot < kCapacity; ++slot) {
        const auto found = std::find(slots.begin(), slots.end(), slot);
        if (found == slots.end()) {
          EXPECT_EQ(s.Entry(slot), before[static_cast<size_t>(slot)]);
          continue;
        }
        const int64_t row = found - slots.begin();
        EXPECT_EQ(s.position[static_cast<size_t>(slot)], 1000 + row);
        Buffer expected(to, 1);
        for (int64_t d = 0; d < kKeyDim; ++d) {
          expected.Set(0, key.Get(row * 40 + d));
          ASSERT_EQ(s.key.Get(slot * kKeyDim + d), expected.Get(0)) << Name(from) << " to " << Name(to);
        }
        for (int64_t d = 0; d < kValueDim; ++d) {
          expected.Set(0, value.Get(row * 11 + d));
          ASSERT_EQ(s.value.Get(slot * kValueDim + d), expected.Get(0)) << Name(from) << " to " << Name(to);
        }
      }
    }
}

TEST(EntriesMoveTest, CopyAndSwap) {
  for (const DType dtype : kStorage) {
    TestSlab s(dtype, 4, 3, 5);
    float next = 0;
    const auto draw = [&] { return next++; };
    for (int64_t slot = 0; slot < 3; ++slot) s.Fill(slot, draw, draw, 10 + slot);
    const std::string zero = s.Entry(0), one = s.Entry(1), two = s.Entry(2), three = s.Entry(3);
    SwapEntries(s.slab, 0, 2);
    EXPECT_EQ(s.Entry(0), two);
    EXPECT_EQ(s.Entry(2), zero);
    CopyEntry(s.slab, 1, 0);
    EXPECT_EQ(s.Entry(0), one);
    EXPECT_EQ(s.Entry(1), one);
    EXPECT_EQ(s.Entry(2), zero);
    EXPECT_EQ(s.Entry(3), three);
    SwapEntries(s.slab, 1, 1);
    EXPECT_EQ(s.Entry(1), one);
  }
}

}  // namespace
}  // namespace express::cpu
