// Kernel halving against the scalar reference: the same choices, except from a near-tie onward (f32 may fall on the
// other side of one, and later pairs depend on it); and what happens to the slots.
#include <set>

#include "tests/cpu/testing.h"

namespace express::cpu {
namespace {

class HalveTest : public SimdTest {};
EXPRESS_FOR_EVERY_TARGET(HalveTest);

constexpr double kNearTie = 2e-6;  // Decision::margin below which f32 may differ

struct ListCase {
  DType dtype;
  int32_t key_dim, value_dim;
  int64_t count;
  HalveParams params;
};

std::ostream& operator<<(std::ostream& os, const ListCase& c) {
  return os << Name(c.dtype) << " dims " << c.key_dim << ", " << c.value_dim << " count " << c.count << " gamma "
            << c.params.gamma << " tau " << c.params.tau << (c.params.coin ? " coin" : "");
}

HalveParams Params(int32_t key_dim, float gamma, float tau) {
  return {1.0f / std::sqrt(static_cast<float>(key_dim)), gamma, tau, 0.5f, false};
}

// A list with structure (three directions, an offset common to all keys), in random slots of a larger slab.
struct List {
  List(const ListCase& c, uint32_t seed)
      : rng(seed), slab(c.dtype, c.count + 7, c.key_dim, c.value_dim), slots(RandomSlots(rng, c.count + 7, c.count)) {
    std::normal_distribution<float> normal;
    std::vector<float> directions(static_cast<size_t>(3 * (c.key_dim + c.value_dim)));
    for (float& x : directions) x = normal(rng);
    for (int64_t i = 0; i < c.count; ++i) {
      float z[3];
      for (float& x : z) x = normal(rng);
      size_t at = 0;
      const auto draw = [&] {
        float x = 0.2f * normal(rng);
        for (const float factor : z) x += 0.6f * factor * directions[at++];
        return x;
      };
      slab.Fill(
          slots[static_cast<size_t>(i)], [&] { return draw() + 1.5f; }, draw, 100 + i);
    }
  }
  reference::Matrix key() const { return Gather(slab.key, slab.slab.key_dim, slots); }
  reference::Matrix value() const { return Gather(slab.value, slab.slab.value_dim, slots); }

  std::mt19937 rng;
  TestSlab slab;
  std::vector<int32_t> slots;
};

// Halves the list and returns for every pair the index that was kept, after checking that survivors are whole and in
// place and that no other slot was touched.
std::vector<int64_t> HalveAndCheckSlots(List& list, const HalveParams& params, const StreamKey& stream,
                                        uint64_t number) {
  const Slab& slab = list.slab.slab;
  std::vector<std::string> before;
  for (int64_t i = 0; i < slab.capacity; ++i) before.push_back(list.slab.Entry(i));
  const auto count = static_cast<int64_t>(list.slots.size());
  const Scratch scratch(HalveScratchBytes(count, slab.key_dim, slab.value_dim));
  Halve(slab, list.slots.data(), count, params, stream, number, scratch.get());
  const auto slot = [&](int64_t i) { return static_cast<size_t>(list.slots[static_cast<size_t>(i)]); };
  std::set<size_t> touched;
  std::vector<int64_t> kept;
  for (int64_t a = 0; a < count / 2; ++a) {
    const int64_t index = list.slab.position[slot(2 * a)] - 100;
    EXPECT_EQ(index / 2, a);
    EXPECT_EQ(list.slab.Entry(static_cast<int64_t>(slot(2 * a))), before[slot(index)]) << "pair " << a;
    kept.push_back(index);
    touched.insert({slot(2 * a), slot(2 * a + 1)});
  }
  for (size_t i = 0; i < before.size(); ++i)
    if (!touched.contains(i)) {
      EXPECT_EQ(list.slab.Entry(static_cast<int64_t>(i)), before[i]) << "slot " << i;
    }
  return kept;
}

// The first pair whose decision is a near-tie, or the number of pairs.
size_t FirstNearTie(const reference::Halved& halved) {
  const auto& d = halved.decisions;
  const auto near = [](const reference::Decision& decision) { return decision.margin < kNearTie; };
  return static_cast<size_t>(std::find_if(d.begin(), d.end(), near) - d.begin());
}

std::vector<ListCase> Cases() {
  std::vector<ListCase> cases;
  for (const DType dtype : kStorage)
    for (const auto& [key_dim, value_dim] : {std::pair{1, 1}, {3, 16}, {7, 3}, {33, 20}, {64, 64}, {80, 96}})
      for (const int64_t count : {2, 4, 30, 34, 126, 130, 262})
        cases.push_back({dtype, key_dim, value_dim, count, Params(key_dim, 1.0f, 0.1f)});
  for (const auto& [key_dim, value_dim] : {std::pair{128, 128}, {192, 128}, {256, 256}})
    for (const int64_t count : {6, 98})
      cases.push_back({DType::kBF16, key_dim, value_dim, count, Params(key_dim, 1.0f, 0.1f)});
  for (const float gamma : {0.0f, 0.5f, 1.0f})
    for (const float tau : {0.0f, 0.01f, 0.1f, 1.0f})
      for (const int64_t count : {64, 200}) cases.push_back({DType::kF32, 24, 16, count, Params(24, gamma, tau)});
  return cases;
}

TEST_P(HalveTest, ChoosesAsTheReference) {
  int lists = 0, clear = 0, decided = 0;
  for (const ListCase& c : Cases()) {
    SCOPED_TRACE(testing::Message() << c);
    List list(c, static_cast<uint32_t>(40 + lists));
    const StreamKey stream = MakeStreamKey(11, 2, static_cast<uint32_t>(lists));
    const auto number = static_cast<uint64_t>(lists) << 31;
    const reference::Halved expected = reference::Halve(list.key(), list.value(), c.params, stream, number);
    const std::vector<int64_t> kept = HalveAndCheckSlots(list, c.params, stream, number);
    const size_t tie = FirstNearTie(expected);
    for (size_t a = 0; a < tie; ++a) ASSERT_EQ(kept[a], expected.kept[a]) << "pair " << a << ", near-tie at " << tie;
    ++lists;
    clear += tie == kept.size();
    for (const reference::Decision& d : expected.decisions) decided += !d.coin && std::abs(d.sum) > d.threshold;
  }
  std::printf("%d of %d lists have a near-tie\n", lists - clear, lists);
  EXPECT_GE(clear, lists * 95 / 100);  // else the comparison says little
  EXPECT_GE(decided, 400);             // choices that no draw would have changed
}

// More pairs than any block or tile; the near-tie may be anywhere, so several lists.
TEST_P(HalveTest, LongLists) {
  int clear = 0;
  for (uint32_t seed = 0; seed < 4; ++seed) {
    const ListCase c{DType::kF32, 8, 8, 2000, Params(8, 1.0f, 0.1f)};
    List list(c, seed);
    const StreamKey stream = MakeStreamKey(seed, 0, 0);
    const reference::Halved expected = reference::Halve(list.key(), list.value(), c.params, stream, 5);
    const std::vector<int64_t> kept = HalveAndCheckSlots(list, c.params, stream, 5);
    const size_t tie = FirstNearTie(expected);
    for (size_t a = 0; a < tie; ++a) ASSERT_EQ(kept[a], expected.kept[a]) << "pair " << a << ", near-tie at " << tie;
    clear += tie == kept.size();
  }
  EXPECT_GE(clear, 2);
}

// The longest lists that a cache makes; the scratch is linear in them. The reference would take minutes.
TEST_P(HalveTest, SixteenThousandEntries) {
  const ListCase c{DType::kBF16, 4, 2, 16384, Params(4, 1.0f, 0.1f)};
  List list(c, 1);
  EXPECT_LT(HalveScratchBytes(c.count, 128, 128), size_t{18} << 20);  // the list in f32 is 16 MiB
  int second = 0;
  for (const int64_t kept : HalveAndCheckSlots(list, c.params, MakeStreamKey(1, 0, 0), 1)) second += kept % 2 != 0;
  EXPECT_NEAR(second, 4096, 300);  // of 8192 near-fair choices: more than 6 standard deviations
}

TEST_P(HalveTest, CoinsAreTheDraws) {
  for (uint64_t number = 0; number < 8; ++number) {
    ListCase c{DType::kF16, 5, 9, 100, Params(5, 1.0f, 0.1f)};
    c.params.coin = true;
    List list(c, 3);
    const StreamKey stream = MakeStreamKey(1, 2, 3);
    const reference::Halved expected = reference::Halve(list.key(), list.value(), c.params, stream, number);
    EXPECT_EQ(HalveAndCheckSlots(list, c.params, stream, number), expected.kept);
  }
}

// Over many operations, half are complemented, and first pairs are fair: both hold when x of pair 0 survives about half
// the time and half of all selections are complemented. 400 fair coins: standard deviation 10; 5 of these.
TEST_P(HalveTest, ComplementsHalf) {
  int complements = 0, first = 0;
  const ListCase c{DType::kF32, 4, 4, 8, Params(4, 1.0f, 0.1f)};
  for (uint64_t number = 0; number < 400; ++number) {
    List list(c, 9);
    const StreamKey stream = MakeStreamKey(8, 0, 1);
    complements += reference::Halve(list.key(), list.value(), c.params, stream, number).complement;
    first += static_cast<int>(HalveAndCheckSlots(list, c.params, stream, number)[0]);
  }
  EXPECT_NEAR(complements, 200, 50);
  EXPECT_NEAR(first, 200, 50);
}

// Numbers in (-1, 1) without any pattern.
float Ragged(int64_t entry, int64_t d) {
  const uint32_t bits = Philox4x32({static_cast<uint32_t>(entry), static_cast<uint32_t>(d), 0, 0}, 0, 0)[0];
  return 2 * UniformFromBits(bits) - 1;
}

// What a degenerate list holds, and whether every pair's D_aa is exactly 0, so that the draws alone must decide.
struct Degenerate {
  const char* name;
  bool all_coins;
  float (*key)(int64_t entry, int64_t d);
  float (*value)(int64_t entry, int64_t d);
};
const Degenerate kDegenerate[] = {
    {"all entries equal", true, [](int64_t, int64_t d) { return 1.0f + static_cast<float>(d); },
     [](int64_t, int64_t d) { return 0.3f * static_cast<float>(d); }},
    {"all zero", true, [](int64_t, int64_t) { return 0.0f; }, [](int64_t, int64_t) { return 0.0f; }},
    {"pairs of equals", true, [](int64_t i, int64_t d) { return static_cast<float>((i / 2 * 7 + d * 3) % 11) - 5; },
     [](int64_t i, int64_t d) { return static_cast<float>((i / 2 * 5 + d) % 7) - 3; }},
    {"pairs of long equals", true, [](int64_t i, int64_t d) { return 1e4f * static_cast<float>((i / 2 + d) % 6); },
     [](int64_t i, int64_t d) { return static_cast<float>((i / 2 * 5 + d) % 7) - 3; }},
    {"huge keys", false, [](int64_t i, int64_t d) { return (i * 5 + d) % 3 ? 3e38f : -3e38f; },
     [](int64_t i, int64_t d) { return static_cast<float>((i + d) % 5); }},
    {"huge values", false, [](int64_t i, int64_t d) { return static_cast<float>((i * 3 + d) % 5); },
     [](int64_t i, int64_t d) { return (i + d) % 2 ? 3e38f : -3e38f; }},
    {"denormals", false, [](int64_t i, int64_t d) { return 1e-42f * static_cast<float>((i * 3 + d) % 5); },
     [](int64_t i, int64_t d) { return 1e-43f * static_cast<float>((i + d) % 5); }},
    {"zero values", false, [](int64_t i, int64_t d) { return 3 * Ragged(i, d); },
     [](int64_t, int64_t) { return 0.0f; }},
    {"long keys far apart", false, [](int64_t i, int64_t d) { return 1e20f * Ragged(i, d); }, Ragged},
    {"one long key", false, [](int64_t i, int64_t) { return i == 3 ? 1e6f : static_cast<float>(i % 4); },
     [](int64_t i, int64_t d) { return static_cast<float>((i * 3 + d) % 5) - 2; }},
};

TEST_P(HalveTest, DegenerateLists) {
  for (const Degenerate& degenerate : kDegenerate)
    for (const float gamma : {0.0f, 1.0f}) {
      SCOPED_TRACE(testing::Message() << degenerate.name << " gamma " << gamma);
      ListCase c{DType::kF32, 19, 6, 120, Params(19, gamma, 0.1f)};
      List list(c, 1);
      for (int64_t i = 0; i < c.count; ++i) {
        int64_t k = 0, v = 0;
        list.slab.Fill(
            list.slots[static_cast<size_t>(i)], [&] { return degenerate.key(i, k++); },
            [&] { return degenerate.value(i, v++); }, 100 + i);
      }
      const StreamKey stream = MakeStreamKey(1, 1, 1);
      const reference::Halved expected = reference::Halve(list.key(), list.value(), c.params, stream, 3);
      const std::vector<int64_t> kept = HalveAndCheckSlots(list, c.params, stream, 3);
      for (size_t a = 0; a < FirstNearTie(expected); ++a) ASSERT_EQ(kept[a], expected.kept[a]) << "pair " << a;
      // A sum that is NaN would keep the first of every pair but pair 0, or, after the complement, the second.
      int64_t second = 0;
      for (size_t a = 1; a < kept.size(); ++a) second += kept[a] % 2;
      EXPECT_GT(second, 0);
      EXPECT_LT(second, static_cast<int64_t>(kept.size()) - 1);
      c.params.coin = true;
      const reference::Halved coins = reference::Halve(list.key(), list.value(), c.params, stream, 3);
      if (degenerate.all_coins) {
        EXPECT_EQ(kept, coins.kept);
      }
    }
}

// A factor on all values changes no decision: kappa is homogeneous in them.
TEST_P(HalveTest, ValuesOfAnyScale) {
  const ListCase c{DType::kF32, 16, 16, 128, Params(16, 1.0f, 0.1f)};
  std::vector<int64_t> expected;
  for (const float factor : {1.0f, 0x1p-100f, 0x1p100f}) {
    List list(c, 5);
    for (int64_t i = 0; i < list.slab.value.count(); ++i) list.slab.value.Set(i, list.slab.value.Get(i) * factor);
    const std::vector<int64_t> kept = HalveAndCheckSlots(list, c.params, MakeStreamKey(2, 2, 2), 1);
    if (expected.empty()) expected = kept;
    EXPECT_EQ(kept, expected) << factor;
  }
}

// The choice depends on the entries, not on where they lie or how the scratch is filled.
TEST_P(HalveTest, SlotsDoNotMatter) {
  const ListCase c{DType::kBF16, 12, 20, 90, Params(12, 1.0f, 0.1f)};
  List one(c, 5), other(c, 5);
  std::reverse(other.slots.begin(), other.slots.end());
  for (size_t i = 0; i < one.slots.size(); ++i)
    for (int64_t d = 0; d < c.key_dim; ++d)
      other.slab.key.Set(other.slots[i] * c.key_dim + d, one.slab.key.Get(one.slots[i] * c.key_dim + d));
  for (size_t i = 0; i < one.slots.size(); ++i) {
    for (int64_t d = 0; d < c.value_dim; ++d)
      other.slab.value.Set(other.slots[i] * c.value_dim + d, one.slab.value.Get(one.slots[i] * c.value_dim + d));
    other.slab.position[static_cast<size_t>(other.slots[i])] = 100 + static_cast<int64_t>(i);
  }
  const StreamKey stream = MakeStreamKey(4, 4, 4);
  EXPECT_EQ(HalveAndCheckSlots(one, c.params, stream, 1), HalveAndCheckSlots(other, c.params, stream, 1));
}

}  // namespace
}  // namespace express::cpu
