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
  for (const DType dtype : kFloating) {
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
  for (const DType from : kFloating)
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
        TestSlab expected(to, 1, kKeyDim, kValueDim);
        int64_t k = row * 40, v = row * 11;
        expected.Fill(
            0, [&] { return key.Get(k++); }, [&] { return value.Get(v++); }, 1000 + row);
        ASSERT_EQ(s.Entry(slot), expected.Entry(0)) << Name(from) << " to " << Name(to);
      }
    }
}

// Rows to be stored in 8 bits, of `dim` elements: of every size, with one large element, with ties, constant, zero, tiny, huge.
std::vector<std::vector<float>> RowsToQuantise(int64_t dim) {
  const auto n = static_cast<size_t>(dim);
  const float max = std::numeric_limits<float>::max(), tiny = std::numeric_limits<float>::denorm_min();
  std::vector<std::vector<float>> rows;
  for (const float x :
       {0.0f, -0.0f, 1.0f, -3e-5f, max, -max, tiny, -tiny, 127 * tiny, 0x1p-126f, 127 * 0x1p-126f, 1e-38f})
    rows.emplace_back(n, x);
  std::mt19937 rng(7);
  std::normal_distribution<float> normal;
  for (int exponent = -150; exponent <= 120; exponent += 5) {
    rows.emplace_back();
    for (size_t i = 0; i < n; ++i) rows.back().push_back(std::ldexp(normal(rng), exponent));
  }
  for (const float outlier : {1e3f, -1e6f, 1e30f, max, -max}) {
    rows.emplace_back();
    for (size_t i = 0; i < n; ++i) rows.back().push_back(normal(rng));
    rows.back()[rng() % n] = outlier;
  }
  // Halves of codes, whose scale is a power of two: the largest is 127 of them.
  for (const float scale : {1.0f, 0x1p-20f, 0x1p100f}) {
    rows.emplace_back();
    for (size_t i = 0; i < n; ++i) rows.back().push_back(scale * 0.5f * (static_cast<float>(rng() % 509) - 254));
    rows.back()[rng() % n] = 127 * scale;
  }
  // Just above and below what a bfloat16 scale holds.
  for (const uint16_t bits : {0x3F80, 0x3F81, 0x3FFF, 0x0080, 0x7B00}) {
    const float largest = 127 * ToFloat(BFloat16{bits});
    for (const float x : {largest, std::nextafter(largest, 0.0f), std::nextafter(largest, max)})
      rows.emplace_back(n, x);
  }
  return rows;
}

// Codes and scales are those of the formula on every target, and what is read back is within half a scale.
TEST_P(EntriesTest, QuantisesAsTheFormula) {
  for (const int64_t dim : {1, 3, 16, 37, 64, 67})
    for (const std::vector<float>& x : RowsToQuantise(dim)) {
      const auto d32 = static_cast<int32_t>(dim);
      TestSlab s(DType::kI8, 2, d32, d32), expected(DType::kI8, 2, d32, d32);
      const int32_t slot = 1;
      std::vector<float> reversed(x.rbegin(), x.rend());
      WriteEntries(s.slab, &slot, 1, 5, {x.data(), dim, DType::kF32}, {reversed.data(), dim, DType::kF32});
      size_t k = 0, v = 0;
      expected.Fill(
          1, [&] { return x[k++]; }, [&] { return reversed[v++]; }, 5);
      ASSERT_EQ(s.Entry(1), expected.Entry(1)) << testing::PrintToString(x);
      ASSERT_EQ(s.Entry(0), expected.Entry(0));
      const double scale = static_cast<double>(ToFloat(BFloat16{s.scale[1].key}));
      double largest = 0;
      for (const float e : x) largest = std::max(largest, std::abs(static_cast<double>(e)));
      EXPECT_LE(scale, std::max(largest / 127 * (1 + 0x1p-7) * (1 + 0x1p-23), largest > 0 ? 0x1p-126 : 0.0));
      EXPECT_LE(largest, scale * 127 * (1 + 0x1p-23));
      std::vector<float> back(x.size()), back_value(x.size());
      ReadEntry(s.slab, 1, {back.data(), 0, DType::kF32}, {back_value.data(), 0, DType::kF32});
      for (size_t i = 0; i < x.size(); ++i) {
        ASSERT_TRUE(std::isfinite(back[i])) << x[i];
        ASSERT_LE(std::abs(static_cast<double>(back[i]) - static_cast<double>(x[i])), scale / 2 * (1 + 0x1p-16))
            << x[i];
        ASSERT_EQ(back[i], back_value[x.size() - 1 - i]);
        ASSERT_GE(static_cast<int8_t>(*s.key.at(dim + static_cast<int64_t>(i))), -127);
      }
    }
}

// One element that is not finite, wherever it is, makes its row NaN, and no other.
TEST_P(EntriesTest, WhatIsNotFiniteBecomesNaN) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const DType from : kFloating)
    for (const float bad : {infinity, -infinity, kNaN})
      for (int64_t at = 0; at < 37; ++at) {
        Buffer key(from, 37), value(from, 37);
        for (int64_t i = 0; i < 37; ++i) key.Set(i, 1), value.Set(i, 1);
        (at % 2 == 0 ? key : value).Set(at, bad);
        TestSlab s(DType::kI8, 1, 37, 37);
        const int32_t slot = 0;
        WriteEntries(s.slab, &slot, 1, 0, {key.at(0), 37, from}, {value.at(0), 37, from});
        for (const DType to : kFloating) {
          Buffer read_key(to, 37), read_value(to, 37);
          for (int64_t i = 0; i < 37; ++i) read_key.Set(i, 0), read_value.Set(i, 0);
          ReadEntry(s.slab, 0, {read_key.at(0), 0, to}, {read_value.at(0), 0, to});
          for (int64_t i = 0; i < 37; ++i) {
            ASSERT_EQ(std::isnan(read_key.Get(i)), at % 2 == 0) << Name(from) << " " << at << " " << i;
            ASSERT_EQ(std::isnan(read_value.Get(i)), at % 2 == 1) << Name(from) << " " << at << " " << i;
          }
        }
      }
}

// Every type out of every storage.
TEST_P(EntriesTest, ReadsWhatIsStored) {
  std::mt19937 rng(12);
  std::normal_distribution<float> normal;
  for (const DType from : kStorage)
    for (const DType to : kFloating) {
      TestSlab s(from, 3, 37, 5);
      const auto draw = [&] { return normal(rng); };
      s.Fill(2, draw, draw, 1);
      Buffer key(to, 40), value(to, 7), one(to, 1);
      ReadEntry(s.slab, 2, {key.at(1), 0, to}, {value.at(1), 0, to});
      for (int64_t i = 0; i < 40; ++i) {
        if (i < 1 || i > 37) {
          EXPECT_TRUE(std::isnan(key.Get(i)));
          continue;
        }
        one.Set(0, s.key.Get(2 * 37 + i - 1));
        ASSERT_EQ(key.Get(i), one.Get(0)) << Name(from) << " to " << Name(to);
      }
      for (int64_t i = 1; i < 6; ++i) {
        one.Set(0, s.value.Get(2 * 5 + i - 1));
        ASSERT_EQ(value.Get(i), one.Get(0)) << Name(from) << " to " << Name(to);
      }
      EXPECT_TRUE(std::isnan(value.Get(0)) && std::isnan(value.Get(6)));
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
