// Causal attention of a block against the scalar reference, and its independence of how callers share it out.
#include "tests/cpu/testing.h"

namespace express::cpu {
namespace {

class PrefillTest : public SimdTest {};
EXPRESS_FOR_EVERY_TARGET(PrefillTest);

struct BlockCase {
  DType slab_type, input_type, out_type;
  int32_t key_dim, value_dim, group;
  int64_t capacity, tokens;
};

std::ostream& operator<<(std::ostream& os, const BlockCase& c) {
  return os << Name(c.slab_type) << " slab, " << Name(c.input_type) << " block, dims " << c.key_dim << ", "
            << c.value_dim << " group " << c.group << " capacity " << c.capacity << " tokens " << c.tokens;
}

// A block and its slab. Rows are (token, head) with gaps between them; the gaps of every array are NaN.
struct Block {
  static constexpr int64_t kGap = 3;

  Block(const BlockCase& block_case, uint32_t seed, float query_size = 2)
      : c(block_case),
        slab(c.slab_type, c.capacity, c.key_dim, c.value_dim),
        key(c.input_type, c.tokens * (c.key_dim + kGap)),
        value(c.input_type, c.tokens * (c.value_dim + kGap)),
        q(c.input_type, c.tokens * c.group * (c.key_dim + kGap)) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    const auto draw = [&] { return normal(rng); };
    for (int64_t i = 0; i < c.capacity; ++i)
      if (rng() % 4 != 0) {
        slab.Fill(i, draw, draw, i);
        slab.log_weight[static_cast<size_t>(i)] = std::log(2.0f) * static_cast<float>(rng() % 6);
      }
    const auto fill = [&](Buffer& rows, int64_t columns, float size) {
      for (int64_t i = 0; i < rows.count(); ++i)
        if (i % (columns + kGap) < columns) rows.Set(i, size * normal(rng));
    };
    fill(key, c.key_dim, 1);
    fill(value, c.value_dim, 1);
    fill(q, c.key_dim, query_size);
  }

  float scale() const { return 1 / std::sqrt(static_cast<float>(c.key_dim)); }
  BlockArgs Args(Buffer& out, std::vector<float>* lse, int64_t first, int64_t last) const {
    const int64_t q_row = c.key_dim + kGap, out_row = c.value_dim + kGap;
    return {.key = {key.at(0), c.key_dim + kGap, c.input_type},
            .value = {value.at(0), c.value_dim + kGap, c.input_type},
            .q = q.at(0),
            .q_token_stride = c.group * q_row,
            .q_head_stride = q_row,
            .q_dtype = c.input_type,
            .out = out.at(0),
            .out_token_stride = c.group * out_row,
            .out_head_stride = out_row,
            .out_dtype = c.out_type,
            .lse = lse != nullptr ? lse->data() : nullptr,
            .lse_token_stride = 2 * c.group,
            .lse_head_stride = 2,
            .group = c.group,
            .scale = scale(),
            .exponent = 0.5f,
            .first = first,
            .last = last};
  }

  const BlockCase c;
  TestSlab slab;
  Buffer key, value, q;
};

struct Outputs {
  explicit Outputs(const Block& b)
      : out(b.c.out_type, b.c.tokens * b.c.group * (b.c.value_dim + Block::kGap)),
        lse(static_cast<size_t>(b.c.tokens * b.c.group * 2), kNaN) {}
  Buffer out;
  std::vector<float> lse;
};

// Tokens [0, tokens) in calls that end at `cuts`.
Outputs Attend(const Block& b, const std::vector<int64_t>& cuts) {
  Outputs o(b);
  const Scratch scratch(BlockScratchBytes(b.c.group, b.c.key_dim, b.c.value_dim));
  int64_t first = 0;
  for (const int64_t last : cuts) {
    AttendBlock(b.slab.slab, b.slab.log_weight.data(), b.Args(o.out, &o.lse, first, last), scratch.get());
    first = last;
  }
  return o;
}

reference::Matrix WithoutGaps(const Buffer& rows, int64_t columns) {
  reference::Matrix m = All(rows, columns + Block::kGap), out(m.rows, columns);
  for (int64_t i = 0; i < m.rows; ++i) std::copy_n(m.row(i), columns, out.row(i));
  return out;
}

void ExpectReference(const Block& b, const Outputs& o, double tolerance) {
  const BlockCase& c = b.c;
  const reference::Matrix key = All(b.slab.key, c.key_dim), value = All(b.slab.value, c.value_dim),
                          block_key = WithoutGaps(b.key, c.key_dim), block_value = WithoutGaps(b.value, c.value_dim),
                          q = WithoutGaps(b.q, c.key_dim);
  for (int64_t row = 0; row < c.tokens * c.group; ++row) {
    const auto expected = reference::AttendCausal(q.row(row), static_cast<double>(b.scale()), key, value,
                                                  b.slab.log_weight, 0.5, block_key, block_value, row / c.group);
    ASSERT_NEAR(static_cast<double>(o.lse[static_cast<size_t>(2 * row)]), expected.lse,
                1e-5 * (1 + std::abs(expected.lse)));
    ASSERT_TRUE(std::isnan(o.lse[static_cast<size_t>(2 * row + 1)]));
    for (int64_t d = 0; d < c.value_dim + Block::kGap; ++d) {
      const float actual = o.out.Get(row * (c.value_dim + Block::kGap) + d);
      if (d >= c.value_dim) {
        ASSERT_TRUE(std::isnan(actual)) << "outside of row " << row;
      } else {
        const double x = expected.out[static_cast<size_t>(d)];
        ASSERT_NEAR(static_cast<double>(actual), x, tolerance) << "row " << row << " element " << d;
      }
    }
  }
}

double Tolerance(DType out) { return out == DType::kF32 ? 2e-5 : out == DType::kF16 ? 2e-3 : 2e-2; }

std::vector<BlockCase> Cases() {
  std::vector<BlockCase> cases;
  const DType f32 = DType::kF32;
  for (const DType slab : kStorage)
    for (const DType input : kFloating) cases.push_back({slab, input, input, 40, 24, 2, 90, 21});
  for (const auto& [dk, dv] : {std::pair{1, 1}, {5, 3}, {17, 31}, {64, 64}, {80, 80}, {96, 33}, {128, 128}, {257, 100}})
    for (const int32_t group : {1, 3}) cases.push_back({DType::kF16, f32, f32, dk, dv, group, 70, 40});
  for (const int64_t capacity : {0, 1, 63, 64, 65, 200})
    for (const int64_t tokens : {1, 2, 7, 64, 65, 140})
      cases.push_back({f32, f32, f32, 16, 16, tokens == 140 ? 2 : 1, capacity, tokens});
  cases.push_back({f32, f32, f32, 8, 8, 16, 33, 70});
  return cases;
}

TEST_P(PrefillTest, MatchesTheReference) {
  uint32_t seed = 0;
  for (const BlockCase& c : Cases()) {
    SCOPED_TRACE(testing::Message() << c);
    const Block b(c, ++seed);
    ExpectReference(b, Attend(b, {c.tokens}), Tolerance(c.out_type));
  }
}

// Bit for bit: callers share a block out between any number of threads.
TEST_P(PrefillTest, CutsDoNotMatter) {
  for (const auto& [dtype, dk, dv, group] : {std::tuple{DType::kBF16, 48, 40, 3},
                                             {DType::kF32, 7, 33, 1},
                                             {DType::kF16, 64, 64, 5},
                                             {DType::kI8, 40, 24, 2}}) {
    const BlockCase c{dtype, DType::kF32, DType::kF32, dk, dv, group, 150, 150};
    SCOPED_TRACE(testing::Message() << c);
    const Block b(c, 5);
    const Outputs expected = Attend(b, {c.tokens});
    std::vector<int64_t> singles;
    for (int64_t t = 1; t <= c.tokens; ++t) singles.push_back(t);
    for (const std::vector<int64_t>& cuts :
         {std::vector<int64_t>{75, 150}, {1, 2, 64, 65, 130, 150}, {0, 50, 100, 150}, singles}) {
      const Outputs o = Attend(b, cuts);
      EXPECT_EQ(o.out.Bytes(), expected.out.Bytes());
      EXPECT_EQ(std::memcmp(o.lse.data(), expected.lse.data(), o.lse.size() * sizeof(float)), 0);
    }
  }
}

// Tokens outside of [first, last) are not written, and lse is optional.
TEST_P(PrefillTest, WritesItsTokensOnly) {
  const BlockCase c{DType::kF32, DType::kF32, DType::kF32, 16, 16, 2, 20, 30};
  const Block b(c, 6);
  const Outputs expected = Attend(b, {c.tokens});
  Outputs o(b);
  const Scratch scratch(BlockScratchBytes(c.group, c.key_dim, c.value_dim));
  AttendBlock(b.slab.slab, b.slab.log_weight.data(), b.Args(o.out, nullptr, 10, 13), scratch.get());
  const int64_t token = c.group * (c.value_dim + Block::kGap);
  EXPECT_EQ(o.out.Bytes().substr(static_cast<size_t>(10 * token * 4), static_cast<size_t>(3 * token * 4)),
            expected.out.Bytes().substr(static_cast<size_t>(10 * token * 4), static_cast<size_t>(3 * token * 4)));
  for (int64_t i = 0; i < o.out.count(); ++i)
    if (i < 10 * token || i >= 13 * token) {
      ASSERT_TRUE(std::isnan(o.out.Get(i)));
    }
}

// What comes after a query must not reach it, not even as NaN.
TEST_P(PrefillTest, TheFutureIsNotRead) {
  const BlockCase c{DType::kF32, DType::kF32, DType::kF32, 24, 20, 2, 70, 90};
  Block b(c, 7);
  const Outputs expected = Attend(b, {c.tokens});
  constexpr int64_t kSeen = 41;
  for (int64_t i = kSeen * (c.key_dim + Block::kGap); i < b.key.count(); ++i) b.key.Set(i, kNaN);
  for (int64_t i = kSeen * (c.value_dim + Block::kGap); i < b.value.count(); ++i) b.value.Set(i, kNaN);
  const Outputs o = Attend(b, {c.tokens});
  const auto seen = static_cast<size_t>(kSeen * c.group * (c.value_dim + Block::kGap) * 4);
  EXPECT_EQ(o.out.Bytes().substr(0, seen), expected.out.Bytes().substr(0, seen));
}

// Logits of 1e4, and products that overflow.
TEST_P(PrefillTest, LargeLogits) {
  const BlockCase c{DType::kF32, DType::kF32, DType::kF32, 32, 16, 2, 60, 30};
  const Block b(c, 8, 1e4f);
  ExpectReference(b, Attend(b, {c.tokens}), 3e-2);  // a logit of 1e4 is rounded to 5e-4, some are twice as large

  Block huge(c, 9);
  std::mt19937 rng(9);
  for (Buffer* rows : {&huge.key, &huge.q})
    for (int64_t i = 0; i < rows->count(); ++i)
      if (!std::isnan(rows->Get(i))) rows->Set(i, rng() % 2 ? 3e38f : -3e38f);
  const Outputs o = Attend(huge, {c.tokens});
  for (int64_t i = 0; i < o.out.count(); ++i)
    if (i % (c.value_dim + Block::kGap) < c.value_dim) {
      ASSERT_TRUE(std::isfinite(o.out.Get(i))) << i;
    }
  for (size_t i = 0; i < o.lse.size(); i += 2) ASSERT_TRUE(std::isfinite(o.lse[i])) << i;
}

}  // namespace
}  // namespace express::cpu
