// The protected set against the plain reference, and where its contents lie.
#include <map>
#include <set>

#include "tests/cpu/testing.h"

namespace express::cpu {
namespace {

// A stream whose departures go through Admit, in a slab where a loser's slot is the next arrival's.
class Admission {
 public:
  Admission(DType dtype, int32_t key_dim, int64_t capacity)
      : slab(dtype, capacity + 1 + kTail, key_dim, 3),
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
    slab.Fill(slot, draw, draw, departures_);
    return slot;
  }
  void Depart(int32_t slot) { Admit(protection, slab.slab, slot, static_cast<uint64_t>(departures_++)); }

  std::set<int64_t> ProtectedPositions() const {
    std::set<int64_t> positions;
    for (int64_t i = 0; i < protection.count; ++i)
      positions.insert(slab.position[static_cast<size_t>(protection.slot[i])]);
    return positions;
  }

  static constexpr int32_t kTail = 6;
  TestSlab slab;
  std::vector<int32_t> tail_slots;

 private:
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

}  // namespace
}  // namespace express::cpu
