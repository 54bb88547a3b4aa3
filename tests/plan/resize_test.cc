// Plans that are given other settings on their way: what they must give up, where slots go, and that they go on as plans.
#include <random>
#include <set>

#include "src/cache/budgets.h"
#include "tests/plan/shadow.h"

namespace express::plan {
namespace {

char* Aligned(std::vector<char>& memory) {
  const auto at = reinterpret_cast<uintptr_t>(memory.data());
  return memory.data() + (Arena::kAlignment - at % Arena::kAlignment) % Arena::kAlignment;
}

// A plan whose arrays have room for any budget up to `most`, at places of their own.
class ResizedPlan {
 public:
  ResizedPlan(const Setting& first, int64_t most) : memory_(2 * Bytes(most)), shadow_(most) {
    for (std::vector<char>& half : halves_) half.resize(Bytes(most) + Arena::kAlignment);
    Arena arena(Aligned(halves_[0]));
    plan_ = std::make_unique<Plan>(first, arena);
    plan_->Reset();
    Arena counter;
    Operations(counter, 4096, 4 * most + 4096);
    memory_.resize(counter.used() + Arena::kAlignment);
    Arena operations(Aligned(memory_));
    out_ = Operations(operations, 4096, 4 * most + 4096);
  }

  Plan& plan() { return *plan_; }
  Shadow& shadow() { return shadow_; }

  testing::AssertionResult Run(int64_t tokens) {
    while (tokens > 0) {
      out_.Clear();
      tokens -= plan_->Append(tokens, out_);
      if (!shadow_.Apply(out_)) return testing::AssertionFailure() << shadow_.error;
    }
    return Check();
  }

  testing::AssertionResult Resize(const Setting& next) {
    const Setting before = plan_->setting();
    for (bool more = true; more;) {
      out_.Clear();
      more = plan_->GiveUp(next, out_);
      if (out_.size() > plan_->MaxOps())
        return testing::AssertionFailure() << "a step of " << out_.size() << " operations";
      if (SlotsListed(out_) > plan_->MaxSlots())
        return testing::AssertionFailure() << "a step that lists " << SlotsListed(out_) << " slots";
      if (!shadow_.Apply(out_)) return testing::AssertionFailure() << "giving up: " << shadow_.error;
    }
    out_.Clear();
    plan_->Compact(next.budget, out_);
    if (out_.size() > 1) return testing::AssertionFailure() << "compacting takes more than one operation";
    if (SlotsListed(out_) > before.budget) return testing::AssertionFailure() << "compacting lists too many slots";
    if (!shadow_.Apply(out_)) return testing::AssertionFailure() << "compacting: " << shadow_.error;
    for (size_t slot = static_cast<size_t>(next.budget); slot < shadow_.weights().size(); ++slot)
      if (shadow_.weights()[slot] != 0) return testing::AssertionFailure() << "a live slot beyond the budget";
    // To the other half of the memory, as the cache moves arrays: piece by piece, in order.
    Arena::Piece from[8], to[8];
    Arena old(from, 8), counted(to, 8);
    Plan(before, old);
    Plan(next, counted);
    const char* const source = Aligned(halves_[half_]);
    half_ = 1 - half_;
    char* const target = Aligned(halves_[half_]);
    std::fill(halves_[half_].begin(), halves_[half_].end(), static_cast<char>(0x5A));
    for (int64_t i = 0; i < old.piece_count(); ++i)
      std::copy_n(source + from[i].at, std::min(from[i].bytes, to[i].bytes), target + to[i].at);
    Arena arena(target);
    plan_->Resize(next, arena);
    return Check();
  }

  // All that a plan promises.
  testing::AssertionResult Check() {
    const Setting& s = plan_->setting();
    const auto fail = [&] {
      return testing::AssertionFailure() << Describe(s) << ", " << plan_->tokens() << " tokens: ";
    };
    int64_t total = 0, live = 0;
    for (int64_t slot = 0; slot < s.budget; ++slot) {
      total += plan_->weight(slot);
      live += plan_->weight(slot) > 0;
      if (plan_->weight(slot) != shadow_.weights()[static_cast<size_t>(slot)])
        return fail() << "weight of slot " << slot;
    }
    if (total != plan_->tokens()) return fail() << "weights sum to " << total;
    if (live != plan_->live() || live != shadow_.live()) return fail() << live << " live slots";
    if (plan_->sink_count() != std::min(s.sinks, plan_->tokens())) return fail() << "sinks";
    if (plan_->tail_count() > s.tail()) return fail() << "tail of " << plan_->tail_count();
    if (plan_->protected_count() > s.protect) return fail() << "protected " << plan_->protected_count();
    // The exact tail is the last tokens.
    for (int64_t i = 0; i < plan_->tail_count(); ++i)
      if (const Slot slot = plan_->tail_slot(i); plan_->weight(slot) != 1) return fail() << "tail weight";
    std::vector<int> seen(static_cast<size_t>(s.budget));
    const auto see = [&](Slot slot) { ++seen.at(static_cast<size_t>(slot)); };
    for (int64_t i = 0; i < plan_->sink_count(); ++i) see(plan_->sink_slot(i));
    for (int64_t i = 0; i < plan_->tail_count(); ++i) see(plan_->tail_slot(i));
    for (int64_t i = 0; i < plan_->protected_count(); ++i) see(plan_->protected_slot(i));
    plan_->ForEachCoresetSlot(see);
    for (int64_t slot = 0; slot < s.budget; ++slot)
      if (seen[static_cast<size_t>(slot)] != (plan_->weight(slot) > 0))
        return fail() << "slot " << slot << " has no one place";
    return testing::AssertionSuccess();
  }

 private:
  static size_t Bytes(int64_t most) { return static_cast<size_t>(most) * 40 + 4096; }

  std::vector<char> halves_[2], memory_;
  int half_ = 0;
  std::unique_ptr<Plan> plan_;
  Operations out_;
  Shadow shadow_;
};

class Settings {
 public:
  explicit Settings(uint32_t seed) : rng_(seed), sinks_(Pick(0, 5)), reserve_(Pick(0, 1) * Pick(0, 8)) {}
  int64_t Pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng_); }
  Setting Next() {
    return MakeSetting(Pick(0, 3) == 0 ? Pick(4, 12) : Pick(4, 150), sinks_, Pick(0, 120), reserve_, Pick(1, 60));
  }

 private:
  std::mt19937 rng_;
  int64_t sinks_, reserve_;
};

TEST(Resize, KeepsWhatAPlanPromises) {
  for (uint32_t seed = 0; seed < 300; ++seed) {
    Settings settings(seed);
    const Setting first = settings.Next();
    ResizedPlan resized(first, 400);
    for (int turn = 0; turn < 12; ++turn) {
      ASSERT_TRUE(resized.Run(settings.Pick(0, 1) == 0 ? settings.Pick(0, 40) : settings.Pick(0, 3000))) << seed;
      if (settings.Pick(0, 2) == 0) {
        const int64_t back = settings.Pick(0, resized.plan().RollbackAvailable());
        Arena counter;
        Operations(counter, 8, 5000);
        std::vector<char> memory(counter.used() + Arena::kAlignment);
        Arena arena(memory.data() + Arena::kAlignment - reinterpret_cast<uintptr_t>(memory.data()) % Arena::kAlignment);
        Operations out(arena, 8, 5000);
        if (back <= 4000) {
          resized.plan().Rollback(back, out);
          ASSERT_TRUE(resized.shadow().Apply(out)) << resized.shadow().error;
        }
      }
      ASSERT_TRUE(resized.Resize(settings.Next())) << seed << ", turn " << turn;
    }
    ASSERT_TRUE(resized.Run(5000)) << seed;
  }
}

// Once it is full again, a plan that was resized looks like one that always had its setting.
TEST(Resize, TheWindowFillsAgain) {
  const Setting small = MakeSetting(10, 4, 20, 0, 3), large = MakeSetting(40, 4, 90, 0, 30);
  ResizedPlan resized(large, 400);
  ASSERT_TRUE(resized.Run(1000));
  ASSERT_TRUE(resized.Resize(small));
  EXPECT_EQ(resized.plan().tail_count(), 20);
  EXPECT_EQ(resized.plan().protected_count(), 3);
  ASSERT_TRUE(resized.Run(10));
  ASSERT_TRUE(resized.Resize(large));
  EXPECT_EQ(resized.plan().tail_count(), 20);
  EXPECT_EQ(resized.plan().RollbackAvailable(), 0);
  ASSERT_TRUE(resized.Run(70));
  EXPECT_EQ(resized.plan().tail_count(), 90);
  ASSERT_TRUE(resized.Run(1000));
  EXPECT_EQ(resized.plan().protected_count(), 30);
  EXPECT_GT(resized.plan().live(), large.budget * 3 / 4);
}

// What can always be taken back stays so while a larger window fills.
TEST(Resize, TheReserveStays) {
  const Setting small = MakeSetting(10, 4, 20, 5, 3), large = MakeSetting(40, 4, 90, 5, 30);
  ResizedPlan resized(small, 400);
  ASSERT_TRUE(resized.Run(1000));
  ASSERT_TRUE(resized.Resize(large));
  for (int64_t i = 0; i < 100; ++i) {
    EXPECT_EQ(resized.plan().RollbackAvailable(), 5) << i;
    ASSERT_TRUE(resized.Run(1));
  }
}

// A plan that takes over another's state goes on as that one does, and the two do not touch each other any more.
TEST(Assume, GoesOnAsTheOther) {
  for (const int64_t tokens : {0, 3, 60, 150, 2000}) {
    const Setting setting = MakeSetting(30, 4, 40, 3, 15);
    Arena count;
    Plan(setting, count);
    std::vector<char> memory[2];
    std::unique_ptr<Plan> plans[2];
    for (int i = 0; i < 2; ++i) {
      memory[i].resize(count.used() + Arena::kAlignment);
      Arena arena(Aligned(memory[i]));
      plans[i] = std::make_unique<Plan>(setting, arena);
      plans[i]->Reset();
    }
    std::vector<char> room(1 << 20);
    const auto run = [&](Plan& plan, int64_t n) {  // what it says of each token
      std::vector<int64_t> said;
      Arena arena(Aligned(room));
      Operations out(arena, 4096, 65536);
      for (int64_t t = 0; t < n; ++t) {
        out.Clear();
        plan.Append(1, out);
        for (int64_t i = 0; i < out.size(); ++i) {
          said.insert(said.end(), {static_cast<int64_t>(out[i].kind), out[i].number, out[i].weight, out[i].total});
          said.insert(said.end(), out.slots(out[i]), out.slots(out[i]) + out[i].count);
        }
      }
      return said;
    };
    run(*plans[0], tokens);
    run(*plans[1], 77);
    plans[1]->Assume(*plans[0]);
    const std::vector<int64_t> first = run(*plans[1], 500);
    EXPECT_EQ(plans[0]->tokens(), tokens);
    EXPECT_EQ(run(*plans[0], 500), first) << tokens;
    EXPECT_EQ(plans[0]->RollbackAvailable(), plans[1]->RollbackAvailable());
  }
}

// ---- src/cache/budgets.h ----

TEST(ShareOut, SumsToTheTotalWithinItsBounds) {
  std::mt19937 rng(1);
  const auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); };
  for (int turn = 0; turn < 2000; ++turn) {
    const int64_t heads = pick(2, 40), base = pick(1, 100), most = base + pick(1, 900);
    const int64_t total = pick(heads * base, heads * most);
    std::vector<double> share(static_cast<size_t>(heads));
    for (double& s : share) s = pick(0, 3) == 0 ? 0 : std::pow(10.0, static_cast<double>(pick(-9, 0)));
    const std::vector<double> given = share;
    std::vector<int64_t> budget(share.size());
    cache::ShareOut(total, base, most, heads, share.data(), budget.data());
    int64_t sum = 0;
    for (size_t h = 0; h < budget.size(); ++h) {
      sum += budget[h];
      ASSERT_GE(budget[h], base);
      ASSERT_LE(budget[h], most);
      for (size_t other = 0; other < h; ++other)
        ASSERT_TRUE(given[h] < given[other] || budget[h] + 1 >= budget[other]);  // one: what rounding left
      for (size_t other = 0; other < h; ++other) ASSERT_TRUE(given[h] != given[other] || budget[h] == budget[other]);
    }
    ASSERT_LE(sum, total);
    ASSERT_GT(sum, total - heads);
    const std::set<double> kinds(given.begin(), given.end());
    if (kinds.size() == given.size()) {
      ASSERT_EQ(sum, total);
    }
  }
}

TEST(ShareOut, GoesByTheShares) {
  double share[] = {1, 3, 0, 6};
  int64_t budget[4];
  cache::ShareOut(140, 10, 1000, 4, share, budget);
  EXPECT_EQ(std::vector<int64_t>(budget, budget + 4), (std::vector<int64_t>{20, 40, 10, 70}));
  double capped[] = {1, 3, 0, 6};
  cache::ShareOut(140, 10, 50, 4, capped, budget);  // the last is full; 60 are left for 1 : 3
  EXPECT_EQ(std::vector<int64_t>(budget, budget + 4), (std::vector<int64_t>{30, 50, 10, 50}));
}

TEST(ShareOut, EqualSharesGetEqualParts) {
  double share[] = {1, 1, 2, 1};
  int64_t budget[4];
  cache::ShareOut(40 + 13, 10, 1000, 4, share,
                  budget);  // 2.6, 2.6, 5.2, 2.6: two are left, and one head has a kind of its own
  EXPECT_EQ(std::vector<int64_t>(budget, budget + 4), (std::vector<int64_t>{12, 12, 16, 12}));
  double all[] = {0, 0, 0, 0};
  cache::ShareOut(40 + 7, 10, 1000, 4, all, budget);
  EXPECT_EQ(std::vector<int64_t>(budget, budget + 4), (std::vector<int64_t>{11, 11, 11, 11}));
  double full[] = {0.3, 0.3, 0.1, 0.3};
  cache::ShareOut(40 + 100, 10, 40, 4, full, budget);
  EXPECT_EQ(std::vector<int64_t>(budget, budget + 4), (std::vector<int64_t>{40, 40, 20, 40}));
}

TEST(JoinShares, TheMeanOfThoseThatGetAboutAsMuch) {
  int64_t budget[] = {100, 110, 260, 141, 230, 800, 142};
  double share[] = {0, 1, 16, 2, 12, 70, 3};
  cache::JoinShares(100, 7, budget, share);  // up to 141, up to 282, up to 565, up to 1131
  const double low = 1, middle = 31.0 / 3;
  EXPECT_EQ(std::vector<double>(share, share + 7), (std::vector<double>{low, low, middle, low, middle, 70, middle}));
}

// Few kinds, whatever the shares, and the same total.
TEST(JoinShares, LeavesFewKinds) {
  std::mt19937 rng(4);
  std::uniform_real_distribution<double> exponent(-14, 0);
  for (int turn = 0; turn < 200; ++turn) {
    std::vector<double> share(256), joined;
    for (double& s : share) s = std::exp(exponent(rng));
    joined = share;
    std::vector<int64_t> budget(share.size());
    cache::ShareOut(256 * 1024, 320, 8192, 256, share.data(), budget.data());
    const std::vector<int64_t> before = budget;
    cache::JoinShares(320, 256, budget.data(), joined.data());
    cache::ShareOut(256 * 1024, 320, 8192, 256, joined.data(), budget.data());
    const std::set<int64_t> kinds(budget.begin(), budget.end());
    EXPECT_LE(kinds.size(), 6u);
    int64_t sum = 0;
    for (size_t h = 0; h < budget.size(); ++h) {
      sum += budget[h];
      EXPECT_LE(budget[h], 2 * before[h]);
      EXPECT_LE(before[h], 2 * budget[h]);
    }
    EXPECT_LE(sum, 256 * 1024);
    EXPECT_GT(sum, 255 * 1024);
  }
}

TEST(MovePieces, NothingIsOverwrittenBeforeItMoves) {
  std::mt19937 rng(2);
  const auto pick = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); };
  for (int turn = 0; turn < 2000; ++turn) {
    const int64_t count = pick(1, 12);
    std::vector<Arena::Piece> from, to;
    for (auto* pieces : {&from, &to}) {
      size_t at = 0;
      for (int64_t i = 0; i < count; ++i) {
        const auto bytes = static_cast<size_t>(pick(0, 20));
        pieces->push_back({at, bytes});
        at += bytes;
      }
    }
    std::vector<char> memory(300);
    for (char& byte : memory) byte = static_cast<char>(pick(0, 127));
    const std::vector<char> before = memory;
    cache::MovePieces(memory.data(), from.data(), to.data(), count);
    for (size_t i = 0; i < from.size(); ++i)
      for (size_t j = 0; j < std::min(from[i].bytes, to[i].bytes); ++j)
        ASSERT_EQ(memory[to[i].at + j], before[from[i].at + j]) << turn;
  }
}

}  // namespace
}  // namespace express::plan
