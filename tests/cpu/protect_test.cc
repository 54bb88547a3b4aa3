// The protected set against the plain reference, and where its contents lie.
#include <map>
#include <set>

#include "tests/cpu/testing.h"

namespace express::cpu {
namespace {

// Rotary positions and what Rotation points to.
struct Rotary {
  Rotary(int32_t pairs, bool is_interleaved) : interleaved(is_interleaved) {
    for (int32_t i = 0; i < pairs; ++i) {
      frequency.push_back(std::pow(10000.0f, -static_cast<float>(i) / static_cast<float>(pairs)));
      turns.push_back(TurnsOf(frequency.back()));
    }
    scoring = {{turns.data(), pairs, interleaved ? 1 : 0}, true, true};
  }
  Rotary(const Rotary&) = delete;
  std::vector<double> Undo(const double* key, int64_t dim, int64_t position) const {
    return reference::WithoutPosition(key, dim, position, frequency, interleaved);
  }
  bool interleaved;
  std::vector<float> frequency;
  std::vector<uint64_t> turns;
  Scoring scoring;
};

double Norm(const reference::Matrix& row) {
  double sum = 0;
  for (const double x : row.data) sum += x * x;
  return std::sqrt(sum);
}

// A stream whose departures go through Admit, in a slab where a loser's slot is the next arrival's.
class Admission {
 public:
  Admission(DType dtype, int32_t key_dim, int64_t capacity, const Scoring& scoring = {}, int32_t value_dim = 3)
      : slab(dtype, capacity + 1 + kTail, key_dim, value_dim),
        scoring_(scoring),
        mean_(static_cast<size_t>(key_dim), kNaN),
        sum_(static_cast<size_t>(key_dim)),
        score_(static_cast<size_t>(capacity), kNaN),
        slot_(static_cast<size_t>(capacity), -1),
        protection{mean_.data(), sum_.data(), score_.data(), slot_.data(), capacity, 0, 0} {
    for (int32_t i = 0; i < kTail; ++i) tail_slots.push_back(static_cast<int32_t>(capacity) + 1 + i);
  }

  // The next departure lies in the returned slot; it may be left there (protected) or not.
  template <class Draw>
  int32_t Arrive(const Draw& draw) {
    const int32_t slot = protection.count < protection.capacity ? static_cast<int32_t>(protection.count)
                                                                : static_cast<int32_t>(protection.capacity);
    slab.Fill(slot, draw, draw, departures_ + first_position);
    return slot;
  }
  void Depart(int32_t slot) { Admit(protection, slab.slab, slot, static_cast<uint64_t>(departures_++), scoring_); }

  std::set<int64_t> ProtectedPositions() const {
    std::set<int64_t> positions;
    for (int64_t i = 0; i < protection.count; ++i)
      positions.insert(slab.position[static_cast<size_t>(protection.slot[i])]);
    return positions;
  }

  static constexpr int32_t kTail = 6;
  TestSlab slab;
  std::vector<int32_t> tail_slots;
  int64_t first_position = 0;

 private:
  Scoring scoring_;
  std::vector<float> mean_;
  std::vector<float> sum_;
  std::vector<float> score_;
  std::vector<int32_t> slot_;
  int64_t departures_ = 0;

 public:
  Protection protection;
};

// 800 departures pass the changes of the mean at 256, 512 and 768. After each, the set and the loser are the
// reference's, and every entry's contents are what departed.
TEST(ProtectTest, FollowsTheReference) {
  for (const DType dtype : kStorage)
    for (const int32_t key_dim : {1, 5, 64, 80})
      for (const int64_t capacity : {1, 7, 32}) {
        SCOPED_TRACE(testing::Message() << Name(dtype) << " key_dim " << key_dim << " capacity " << capacity);
        std::mt19937 rng(3);
        std::normal_distribution<float> normal;
        Admission a(dtype, key_dim, capacity);
        // Keys drift, so that an outdated mean would choose others.
        float drift = 0;
        const auto draw = [&] { return normal(rng) + drift; };
        for (const int32_t slot : a.tail_slots) a.slab.Fill(slot, draw, draw, -1);
        CentreOn(a.protection, a.slab.slab, a.tail_slots.data(), Admission::kTail);
        reference::Protected expected(capacity, Gather(a.slab.key, key_dim, a.tail_slots));
        std::map<int64_t, std::string> departed;
        for (int64_t i = 0; i < 800; ++i) {
          drift += 0.01f;
          const int32_t slot = a.Arrive(draw);
          departed[i] = a.slab.Entry(slot);
          const reference::Matrix key = Gather(a.slab.key, key_dim, {slot});
          a.Depart(slot);
          const int64_t loser = expected.Depart(key.row(0));
          ASSERT_EQ(a.ProtectedPositions(), std::set<int64_t>(expected.members().begin(), expected.members().end()));
          if (loser >= 0) {
            ASSERT_EQ(a.slab.Entry(slot), departed[loser]) << "departure " << i;
          }
          for (int64_t j = 0; j < a.protection.count; ++j) {
            const int32_t held = a.protection.slot[j];
            ASSERT_EQ(a.slab.Entry(held), departed[a.slab.position[static_cast<size_t>(held)]]);
          }
        }
      }
}

// Small integers: all scores are exact, and many are equal. The older of two equals stays, the youngest of the weakest
// goes.
TEST(ProtectTest, TiesGoToTheOlder) {
  std::mt19937 rng(4);
  std::uniform_int_distribution<int> digit(-1, 1);
  Admission a(DType::kF32, 2, 5);
  const auto zero = [] { return 0.0f; };
  for (const int32_t slot : a.tail_slots) a.slab.Fill(slot, zero, zero, -1);
  CentreOn(a.protection, a.slab.slab, a.tail_slots.data(), Admission::kTail);
  reference::Protected expected(5, reference::Matrix(1, 2));
  for (int64_t i = 0; i < 60; ++i) {  // before the mean moves
    const auto draw = [&] { return static_cast<float>(digit(rng)); };
    const int32_t slot = a.Arrive(draw);
    const reference::Matrix key = Gather(a.slab.key, 2, {slot});
    a.Depart(slot);
    expected.Depart(key.row(0));
    ASSERT_EQ(a.ProtectedPositions(), std::set<int64_t>(expected.members().begin(), expected.members().end())) << i;
  }
  for (const int64_t member : expected.members()) EXPECT_LT(member, 40);  // the later ones met only their equals
}

// As FollowsTheReference, by the other score: keys turned back, partly or not at all, times the norm of the value.
TEST(ProtectTest, WithoutPositionsFollowsTheReference) {
  for (const DType dtype : kStorage)
    for (const int32_t pairs : {0, 1, 12, 22})
      for (const auto& [interleaved, value_norm] :
           {std::pair{false, true}, {true, true}, {false, false}, {true, false}}) {
        constexpr int32_t kDim = 44, kValueDim = 13;
        constexpr int64_t kCapacity = 9, kFirst = 100000;
        SCOPED_TRACE(testing::Message() << Name(dtype) << " pairs " << pairs << " interleaved " << interleaved
                                        << " norm " << value_norm);
        Rotary rotary(pairs, interleaved);
        rotary.scoring.value_norm = value_norm;
        std::mt19937 rng(5);
        std::normal_distribution<float> normal;
        Admission a(dtype, kDim, kCapacity, rotary.scoring, kValueDim);
        a.first_position = kFirst;
        const auto draw = [&] { return normal(rng); };
        reference::Matrix tail(Admission::kTail, kDim);
        for (int32_t i = 0; i < Admission::kTail; ++i) {
          const int32_t slot = a.tail_slots[static_cast<size_t>(i)];
          a.slab.Fill(slot, draw, draw, kFirst + i);
          const auto key = rotary.Undo(Gather(a.slab.key, kDim, {slot}).row(0), kDim, kFirst + i);
          std::copy(key.begin(), key.end(), tail.row(i));
        }
        CentreOn(a.protection, a.slab.slab, a.tail_slots.data(), Admission::kTail, rotary.scoring);
        reference::Protected expected(kCapacity, tail);
        for (int64_t i = 0; i < 600; ++i) {
          const int32_t slot = a.Arrive(draw);
          const auto key = rotary.Undo(Gather(a.slab.key, kDim, {slot}).row(0), kDim, kFirst + i);
          const double norm = value_norm ? Norm(Gather(a.slab.value, kValueDim, {slot})) : 1;
          a.Depart(slot);
          expected.Depart(key.data(), norm);
          std::set<int64_t> positions;
          for (const int64_t member : expected.members()) positions.insert(kFirst + member);
          ASSERT_EQ(a.ProtectedPositions(), positions) << "departure " << i;
          for (int64_t j = 0; j < a.protection.count; ++j) {
            const int64_t position = a.slab.position[static_cast<size_t>(a.protection.slot[j])];
            const double score = expected.score(position - kFirst);
            ASSERT_NEAR(a.protection.score[j], score, 2e-5 * score);
          }
        }
      }
}

// What a model makes of one key at different positions gets one score, and another one by energy.
TEST(ProtectTest, ScoresDoNotDependOnPositions) {
  constexpr int32_t kDim = 64, kCapacity = 8;
  std::mt19937 rng(6);
  std::normal_distribution<float> normal;
  std::vector<double> plain(kDim);
  for (double& x : plain) x = static_cast<double>(normal(rng)) + 1;
  for (const bool interleaved : {false, true}) {
    Rotary rotary(kDim / 2, interleaved), back(kDim / 2, interleaved);
    for (float& frequency : back.frequency) frequency = -frequency;
    for (const Scoring& scoring : {rotary.scoring, Scoring{}}) {
      Admission a(DType::kF32, kDim, kCapacity, scoring);
      const auto place = [&](int32_t slot, const std::vector<double>& key, int64_t position) {
        const std::vector<double> turned = back.Undo(key.data(), kDim, position);  // back and forth
        size_t d = 0;
        a.slab.Fill(
            slot, [&] { return static_cast<float>(turned[d++]); }, [] { return 2.0f; }, position);
      };
      for (int32_t i = 0; i < Admission::kTail; ++i)
        place(a.tail_slots[static_cast<size_t>(i)], std::vector<double>(kDim, 0.5), i);
      CentreOn(a.protection, a.slab.slab, a.tail_slots.data(), Admission::kTail, scoring);
      int32_t slot = 0;
      for (const int64_t position : {0, 1, 77, 4096, 131071, 1 << 20}) {
        place(slot, plain, position);
        Admit(a.protection, a.slab.slab, slot, static_cast<uint64_t>(slot) + 1, scoring);
        ++slot;
      }
      const auto [low, high] = std::minmax_element(a.protection.score, a.protection.score + slot);
      if (scoring.without_position)
        EXPECT_NEAR(*low, *high, 1e-5f * *high);
      else
        EXPECT_LT(*low, 0.9f * *high);
    }
  }
}

// Whatever is in an entry, its score is no NaN, which would compare with nothing.
TEST(ProtectTest, ScoresWithoutPositionsAreNumbers) {
  const Rotary rotary(4, false);
  Admission a(DType::kF32, 8, 4, rotary.scoring);
  const auto fill = [&](int32_t slot, float key, float value) {
    a.slab.Fill(
        slot, [&] { return key; }, [&] { return value; }, slot);
  };
  for (const int32_t slot : a.tail_slots) fill(slot, 0, 0);
  CentreOn(a.protection, a.slab.slab, a.tail_slots.data(), Admission::kTail, rotary.scoring);
  const float kBig = 1e30f;
  int32_t slot = 0;
  for (const auto& [key, value] :
       {std::pair{kBig, 0.0f}, std::pair{0.0f, kBig}, std::pair{kNaN, 1.0f}, std::pair{kBig, kBig}}) {
    fill(slot, key, value);
    a.Depart(slot++);
  }
  EXPECT_EQ(a.protection.score[0], 0);
  EXPECT_EQ(a.protection.score[1], 0);
  EXPECT_EQ(a.protection.score[2], 0);
  EXPECT_EQ(a.protection.score[3], std::numeric_limits<float>::infinity());
}

// Angles wrap around as they should, however large the position.
TEST(RotaryTest, CosSinOfAnyPosition) {
  struct Ops {
    static float Sum(float a, float b) { return a + b; }
    static float Product(float a, float b) { return a * b; }
  };
  std::mt19937_64 rng(7);
  std::uniform_real_distribution<float> exponent(-14, 1.14f);
  double worst = 0;
  for (int i = 0; i < 200000; ++i) {
    const float frequency = (i % 2 == 0 ? 1.0f : -1.0f) * std::exp(exponent(rng));
    const auto position = static_cast<int64_t>(rng() >> (35 + i % 29));  // below 2^29: the product is exact in double
    const double angle = static_cast<double>(position) * static_cast<double>(frequency);
    const Angle got = CosSin<Ops>(Phase(TurnsOf(frequency), position));
    // A frequency in turns is rounded to 53 bits; that of a large angle counts.
    const double error = std::max(std::abs(static_cast<double>(got.cos) - std::cos(angle)),
                                  std::abs(static_cast<double>(got.sin) - std::sin(angle)));
    worst = std::max(worst, error - std::abs(angle) * 0x1p-51);
  }
  EXPECT_LT(worst, 0x1p-22);
  EXPECT_GT(worst, 0);  // floats are not exact
}

}  // namespace
}  // namespace express::cpu
