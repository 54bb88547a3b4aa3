// Decode attention against the scalar reference: parts of a slab, their merge, and the finished output.
#include "tests/cpu/testing.h"

namespace express::cpu {
namespace {

class AttendTest : public SimdTest {};
EXPRESS_FOR_EVERY_TARGET(AttendTest);

// A slab of which a share is live, with weights 2^0 .. 2^9; free slots hold NaN.
TestSlab RandomSlab(DType dtype, int64_t capacity, int32_t key_dim, int32_t value_dim, double live, std::mt19937& rng) {
  TestSlab s(dtype, capacity, key_dim, value_dim);
  std::normal_distribution<float> normal;
  const auto draw = [&] { return normal(rng); };
  std::bernoulli_distribution is_live(live);
  for (int64_t i = 0; i < capacity; ++i)
    if (is_live(rng)) {
      s.Fill(i, draw, draw, i);
      s.log_weight[static_cast<size_t>(i)] = std::log(2.0f) * static_cast<float>(rng() % 10);
    }
  return s;
}

// A softmax state in poisoned memory of exact size.
struct State {
  State(int64_t rows, int32_t value_dim)
      : out(static_cast<size_t>(rows * value_dim), kNaN), max(static_cast<size_t>(rows), kNaN), sum(max) {}
  Partial view() { return {out.data(), max.data(), sum.data()}; }
  std::vector<float> out, max, sum;
};

struct Outputs {
  std::vector<float> out;  // (rows, value_dim)
  std::vector<float> lse;  // (rows)
};

// Attends in parts that end at `cuts`, and finishes.
Outputs Attend(const TestSlab& s, float exponent, const std::vector<float>& q, int64_t rows,
               const std::vector<int64_t>& cuts) {
  const int32_t dv = s.slab.value_dim;
  State all(rows, dv);
  int64_t begin = 0;
  for (size_t i = 0; i < cuts.size(); ++i) {
    State part(rows, dv);
    State& into = i == 0 ? all : part;
    AttendPartial(s.slab, s.log_weight.data(), exponent, begin, cuts[i], q.data(), rows, into.view());
    if (i > 0) MergePartial(all.view(), part.view(), rows, dv);
    begin = cuts[i];
  }
  Outputs o{std::vector<float>(static_cast<size_t>(rows * dv), kNaN), std::vector<float>(static_cast<size_t>(rows))};
  FinishPartial(all.view(), rows, dv, {o.out.data(), dv, DType::kF32}, o.lse.data(), 1);
  return o;
}

void ExpectReference(const TestSlab& s, float exponent, const std::vector<float>& q, int64_t rows, const Outputs& o,
                     double tolerance) {
  const reference::Matrix key = All(s.key, s.slab.key_dim), value = All(s.value, s.slab.value_dim);
  const int32_t dk = s.slab.key_dim, dv = s.slab.value_dim;
  for (int64_t r = 0; r < rows; ++r) {
    const std::vector<double> row(q.begin() + r * dk, q.begin() + (r + 1) * dk);
    const auto expected = reference::Attend(row.data(), 1.0, key, value, s.log_weight, static_cast<double>(exponent));
    if (std::isinf(expected.lse)) {
      ASSERT_EQ(static_cast<double>(o.lse[static_cast<size_t>(r)]), expected.lse);
    } else {
      ASSERT_NEAR(static_cast<double>(o.lse[static_cast<size_t>(r)]), expected.lse,
                  tolerance * (1 + std::abs(expected.lse)));
    }
    for (int32_t d = 0; d < dv; ++d)
      ASSERT_NEAR(static_cast<double>(o.out[static_cast<size_t>(r * dv + d)]), expected.out[static_cast<size_t>(d)],
                  tolerance)
          << "row " << r << " element " << d;
  }
}

std::vector<float> Queries(int64_t rows, int32_t key_dim, float size, std::mt19937& rng) {
  std::normal_distribution<float> normal(0, size / std::sqrt(static_cast<float>(key_dim)));
  std::vector<float> q(static_cast<size_t>(rows * key_dim));
  for (float& x : q) x = normal(rng);
  return q;
}

constexpr std::pair<int32_t, int32_t> kDims[] = {{1, 1},  {3, 5},   {16, 17},   {31, 33},   {64, 64},   {80, 80},
                                                 {96, 7}, {9, 100}, {128, 128}, {192, 128}, {256, 256}, {1024, 1023}};

TEST_P(AttendTest, MatchesTheReference) {
  std::mt19937 rng(1);
  for (const DType dtype : kStorage)
    for (const auto& [dk, dv] : kDims)
      for (const int64_t rows : {1, 2, 3, 4, 5, 8, 16}) {
        const int64_t capacity = dk > 256 ? 30 : 1 + static_cast<int64_t>(rng() % 300);
        SCOPED_TRACE(testing::Message() << Name(dtype) << " dims " << dk << ", " << dv << " rows " << rows
                                        << " capacity " << capacity);
        const TestSlab s = RandomSlab(dtype, capacity, dk, dv, 0.7, rng);
        const std::vector<float> q = Queries(rows, dk, 2, rng);
        ExpectReference(s, 0.5f, q, rows, Attend(s, 0.5f, q, rows, {capacity}), 2e-5);
      }
}

// Long runs of free slots, slabs that end in them, and exponents 0 and 1.
TEST_P(AttendTest, FreeSlots) {
  std::mt19937 rng(2);
  for (const double live : {0.0, 0.005, 0.1, 0.95, 1.0})
    for (const float exponent : {0.0f, 1.0f}) {
      SCOPED_TRACE(testing::Message() << "live " << live << " exponent " << exponent);
      const TestSlab s = RandomSlab(DType::kBF16, 700, 24, 24, live, rng);
      const std::vector<float> q = Queries(6, 24, 2, rng);
      ExpectReference(s, exponent, q, 6, Attend(s, exponent, q, 6, {700}), 2e-5);
    }
}

// An empty part, a part of free slots, an unaligned one, and one entry.
TEST_P(AttendTest, MergesParts) {
  std::mt19937 rng(3);
  TestSlab s = RandomSlab(DType::kF32, 500, 40, 24, 0.8, rng);
  for (size_t i = 100; i < 230; ++i) s.log_weight[i] = kFree;
  const std::vector<float> q = Queries(5, 40, 4, rng);
  for (const std::vector<int64_t>& cuts :
       {std::vector<int64_t>{500}, {0, 500}, {100, 230, 500}, {110, 120, 120, 231, 499, 500}, {1, 500, 500}}) {
    SCOPED_TRACE(testing::PrintToString(cuts));
    ExpectReference(s, 1.0f, q, 5, Attend(s, 1.0f, q, 5, cuts), 2e-5);
  }
}

// Nothing live anywhere: out = 0, lse = -inf, whatever is merged.
TEST_P(AttendTest, NothingLive) {
  const TestSlab s(DType::kF16, 130, 8, 12);
  const std::vector<float> q(3 * 8, 1.0f);
  for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{130}, {0}, {60, 130}}) {
    const Outputs o = Attend(s, 1.0f, q, 3, cuts);
    for (const float x : o.out) EXPECT_EQ(x, 0.0f);
    for (const float x : o.lse) EXPECT_EQ(x, kFree);
  }
}

// Logits of 1e4 in size: the largest wins outright, nothing overflows.
TEST_P(AttendTest, LargeLogits) {
  std::mt19937 rng(4);
  for (const DType dtype : kStorage) {
    SCOPED_TRACE(Name(dtype));
    const TestSlab s = RandomSlab(dtype, 300, 64, 64, 0.9, rng);
    const std::vector<float> q = Queries(4, 64, 5000, rng);
    // A logit of 1e4 is rounded to 5e-4.
    ExpectReference(s, 1.0f, q, 4, Attend(s, 1.0f, q, 4, {300}), 1e-2);
  }
}

// Finite inputs whose products overflow must not turn into NaN or infinity.
TEST_P(AttendTest, OverflowingLogitsStayFinite) {
  std::mt19937 rng(5);
  TestSlab s(DType::kF32, 200, 33, 5);
  const auto draw_key = [&] { return rng() % 2 ? 3e38f : -3e38f; };
  const auto draw_value = [&] { return static_cast<float>(rng() % 5) - 2; };
  for (int64_t i = 0; i < 200; i += 2) {
    s.Fill(i, draw_key, draw_value, i);
    s.log_weight[static_cast<size_t>(i)] = 1;
  }
  std::vector<float> q(3 * 33);
  for (float& x : q) x = rng() % 2 ? 1e30f : -1e30f;
  const Outputs o = Attend(s, 1.0f, q, 3, {77, 200});
  for (const float x : o.out) EXPECT_LE(std::abs(x), 2.0001f);
  for (const float x : o.lse) EXPECT_TRUE(std::isfinite(x));
}

// A value in 8 bits that was not finite shows; a free one does not.
TEST_P(AttendTest, NaNInEightBitsReachesTheOutput) {
  std::mt19937 rng(8);
  TestSlab s = RandomSlab(DType::kI8, 100, 32, 24, 1.0, rng);
  const std::vector<float> q = Queries(5, 32, 2, rng);
  s.scale[70].value = 0x7FC0;
  for (const float x : Attend(s, 1.0f, q, 5, {40, 100}).out) EXPECT_TRUE(std::isnan(x));
  s.log_weight[70] = kFree;
  ExpectReference(s, 1.0f, q, 5, Attend(s, 1.0f, q, 5, {40, 100}), 2e-5);
}

// Rows of very different sizes: scales from 1e-30 to 1e3.
TEST_P(AttendTest, ScalesOfEverySize) {
  std::mt19937 rng(9);
  std::normal_distribution<float> normal;
  TestSlab s(DType::kI8, 150, 40, 24);
  for (int64_t i = 0; i < 150; ++i) {
    const float size = std::pow(10.0f, static_cast<float>(static_cast<int64_t>(rng() % 34) - 30));
    const auto draw_key = [&] { return std::min(size, 1.0f) * normal(rng); };
    const auto draw_value = [&] { return size * normal(rng); };
    s.Fill(i, draw_key, draw_value, i);
    s.log_weight[static_cast<size_t>(i)] = i % 7 == 3 ? kFree : 0;
  }
  const std::vector<float> q = Queries(6, 40, 3, rng);
  ExpectReference(s, 1.0f, q, 6, Attend(s, 1.0f, q, 6, {150}), 1e-2);  // of outputs up to 1e3
}

// The softmax state over chosen slots, which observed budgets are settled by.
TEST_P(AttendTest, AttendsChosenSlots) {
  std::mt19937 rng(10);
  for (const DType dtype : kStorage)
    for (const int32_t dim : {3, 64, 70}) {
      TestSlab s = RandomSlab(dtype, 90, dim, dim, 1.0, rng);
      const std::vector<float> q = Queries(5, dim, 2, rng);
      const std::vector<int32_t> slots = RandomSlots(rng, 90, 47);
      std::vector<float> bias, max(5, kFree), sum(5, 0.0f);
      std::vector<float> log_weight(90, kFree);
      for (const int32_t slot : slots) {
        bias.push_back(static_cast<float>(rng() % 4));
        log_weight[static_cast<size_t>(slot)] = bias.back();
      }
      AttendSlots(s.slab, slots.data(), bias.data(), 20, q.data(), 5, max.data(), sum.data());
      AttendSlots(s.slab, slots.data() + 20, bias.data() + 20, 27, q.data(), 5, max.data(), sum.data());
      for (size_t r = 0; r < 5; ++r) {
        const std::vector<double> row(q.begin() + static_cast<int64_t>(r) * dim,
                                      q.begin() + static_cast<int64_t>(r + 1) * dim);
        const double lse = reference::Attend(row.data(), 1.0, All(s.key, dim), All(s.value, dim), log_weight, 1.0).lse;
        ASSERT_NEAR(static_cast<double>(max[r]) + std::log(static_cast<double>(sum[r])), lse,
                    2e-5 * (1 + std::abs(lse)))
            << Name(dtype) << " " << dim;
      }
    }
}

// The same bits wherever the slab, the queries and the outputs lie.
TEST_P(AttendTest, AlignmentDoesNotMatter) {
  std::mt19937 rng(6);
  const TestSlab s = RandomSlab(DType::kF32, 150, 20, 28, 0.8, rng);
  const std::vector<float> q = Queries(7, 20, 2, rng);
  const Outputs expected = Attend(s, 1.0f, q, 7, {150});
  for (size_t shift = 1; shift < 16; shift += 3) {
    std::vector<float> key(150 * 20 + shift), value(150 * 28 + shift), moved_q(q.size() + shift);
    std::memcpy(key.data() + shift, s.key.at(0), s.key.size());
    std::memcpy(value.data() + shift, s.value.at(0), s.value.size());
    std::copy(q.begin(), q.end(), moved_q.begin() + static_cast<int64_t>(shift));
    const Slab slab{key.data() + shift, value.data() + shift, nullptr, 150, 20, 28, DType::kF32};
    std::vector<float> out(7 * 28 + shift, kNaN), max(7), sum(7);
    AttendPartial(slab, s.log_weight.data(), 1.0f, 0, 150, moved_q.data() + shift, 7,
                  {out.data() + shift, max.data(), sum.data()});
    FinishPartial({out.data() + shift, max.data(), sum.data()}, 7, 28, {out.data() + shift, 28, DType::kF32}, nullptr,
                  0);
    EXPECT_EQ(std::vector<float>(out.begin() + static_cast<int64_t>(shift), out.end()), expected.out);
  }
}

// Strides of out and lse, every output type, and only its own elements.
TEST_P(AttendTest, FinishWritesRows) {
  std::mt19937 rng(7);
  const TestSlab s = RandomSlab(DType::kF32, 60, 8, 11, 1.0, rng);
  const std::vector<float> q = Queries(3, 8, 1, rng);
  const Outputs expected = Attend(s, 1.0f, q, 3, {60});
  for (const DType dtype : kFloating) {
    State state(3, 11);
    AttendPartial(s.slab, s.log_weight.data(), 1.0f, 0, 60, q.data(), 3, state.view());
    Buffer out(dtype, 2 * 20 + 11);
    std::vector<float> lse(7, kNaN);
    FinishPartial(state.view(), 3, 11, {out.at(0), 20, dtype}, lse.data(), 3);
    for (int64_t i = 0; i < out.count(); ++i) {
      if (i % 20 >= 11) {
        EXPECT_TRUE(std::isnan(out.Get(i)));
        continue;
      }
      Buffer rounded(dtype, 1);
      rounded.Set(0, expected.out[static_cast<size_t>(i / 20 * 11 + i % 20)]);
      EXPECT_EQ(out.Get(i), rounded.Get(0));
    }
    for (size_t i = 0; i < lse.size(); ++i) {
      if (i % 3 == 0) {
        EXPECT_EQ(lse[i], expected.lse[i / 3]);
      } else {
        EXPECT_TRUE(std::isnan(lse[i]));
      }
    }
  }
}

}  // namespace
}  // namespace express::cpu
