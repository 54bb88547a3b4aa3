// The plan's invariants, for every small count and over a grid of settings.
#include "src/plan/plan.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <tuple>
#include <vector>

#include "tests/plan/shadow.h"

namespace express::plan {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kSlower = 10;
#else
constexpr int kSlower = 1;
#endif

std::vector<Setting> Grid() {
  std::vector<Setting> grid;
  const std::vector<int64_t> coresets = {4,  5,  6,  7,  8,  9,  10, 11,  12,  13,  15, 16,
                                         17, 31, 32, 33, 50, 63, 64, 100, 255, 256, 500};
  for (ScheduleKind schedule : {ScheduleKind::kBudget, ScheduleKind::kRounds})
    for (int64_t coreset : coresets)
      for (int64_t sinks : {0, 1, 4})
        for (auto [window, reserve] : {std::pair<int64_t, int64_t>{0, 0}, {1, 0}, {0, 3}, {7, 2}, {32, 0}})
          for (int64_t protect : {0, 1, 9})
            if (coreset >= MinCoreset(schedule))
              grid.push_back(MakeSetting(coreset, sinks, window, reserve, protect, schedule));
  return grid;
}

// Sinks and window are the tokens they should be, and every weight is a power of two but for one open reservoir.
void CheckState(const Setting& s, Plan& plan, const Shadow& shadow) {
  const int64_t n = plan.tokens();
  std::vector<bool> exact(static_cast<size_t>(n), false);
  int64_t odd = 0;
  for (int64_t slot = 0; slot < s.budget; ++slot) {
    const int64_t weight = plan.weight(slot);
    ASSERT_EQ(weight, shadow.weights()[static_cast<size_t>(slot)]);
    if (weight == 0) continue;
    if (!std::has_single_bit(static_cast<uint64_t>(weight))) ++odd;
    if (weight == 1) exact[static_cast<size_t>(shadow.written(static_cast<Slot>(slot)))] = true;
  }
  ASSERT_LE(odd, 1);
  for (int64_t i = 0; i < std::min(n, s.sinks); ++i) ASSERT_TRUE(exact[static_cast<size_t>(i)]) << "sink " << i;
  for (int64_t i = std::max<int64_t>(0, n - s.window); i < n; ++i)
    ASSERT_TRUE(exact[static_cast<size_t>(i)]) << "window token " << i << " of " << n;
}

TEST(Plan, InvariantsHoldAfterEveryTokenOverAGridOfSettings) {
  for (const Setting& s : Grid()) {
    SCOPED_TRACE(Describe(s));
    ASSERT_EQ(Check(s), SettingError::kNone);
    OwnedPlan plan(s);
    Shadow shadow(s.budget);
    for (int64_t n = 1; n <= 3000 / kSlower; ++n) {
      plan.out().Clear();
      const int64_t most_slots = plan->NextSlots();
      ASSERT_LE(most_slots, plan->MaxSlots());
      ASSERT_EQ(plan->Append(1, plan.out()), 1);
      ASSERT_LE(plan.out().size(), plan->MaxOps());
      ASSERT_LE(SlotsListed(plan.out()), most_slots);
      ASSERT_TRUE(shadow.Apply(plan.out())) << shadow.error << " at token " << n;
      ASSERT_EQ(shadow.total(), n) << "weights do not sum to the tokens";
      ASSERT_LE(shadow.peak(), s.budget);
      ASSERT_EQ(shadow.live(), plan->live());
      if (n % 97 == 0 || n < 40) {
        ASSERT_NO_FATAL_FAILURE(CheckState(s, plan.plan(), shadow));
      }
    }
    int64_t sum = 0;
    for (int64_t slot = 0; slot < s.budget; ++slot) sum += plan->weight(slot);
    EXPECT_EQ(sum, plan->tokens());
    EXPECT_LE(shadow.largest_list(), plan->MaxList());
  }
}

TEST(Plan, SmallestBudgetsAreLegalAndOneLessIsNot) {
  for (ScheduleKind schedule : {ScheduleKind::kBudget, ScheduleKind::kRounds}) {
    Setting s = MakeSetting(MinCoreset(schedule), 4, 16, 2, 3, schedule);
    EXPECT_EQ(Check(s), SettingError::kNone);
    --s.budget;
    EXPECT_EQ(Check(s), SettingError::kBudget);
  }
}

TEST(Plan, LongStreamsKeepTheInvariantsAndTheWorkBound) {
  struct Case {
    int64_t coreset, tokens;
    ScheduleKind schedule;
  };
  for (const Case& c : {Case{4, 20'000'000, ScheduleKind::kBudget}, Case{64, 100'000'000, ScheduleKind::kBudget},
                        Case{500, 100'000'000, ScheduleKind::kBudget}, Case{2048, 4'000'000, ScheduleKind::kBudget},
                        Case{64, 20'000'000, ScheduleKind::kRounds}, Case{1000, 100'000'000, ScheduleKind::kRounds}}) {
    const Setting s = MakeSetting(c.coreset, 4, 8, 0, 5, c.schedule);
    SCOPED_TRACE(Describe(s));
    OwnedPlan plan(s, 64);
    Shadow shadow(s.budget);
    const int64_t n = c.tokens / (kSlower * kSlower);
    int64_t sample = 1000;
    while (plan->tokens() < n) {
      plan.out().Clear();
      ASSERT_GT(plan->Append(std::min<int64_t>(sample, n) - plan->tokens(), plan.out()), 0);
      ASSERT_TRUE(shadow.Apply(plan.out())) << shadow.error << " by token " << plan->tokens();
      ASSERT_EQ(shadow.total(), plan->tokens());
      if (plan->tokens() < sample) continue;
      sample = sample * 3 / 2;
      int64_t sum = 0, odd = 0;
      for (int64_t slot = 0; slot < s.budget; ++slot) {
        sum += plan->weight(slot);
        odd += plan->weight(slot) != 0 && !std::has_single_bit(static_cast<uint64_t>(plan->weight(slot)));
      }
      ASSERT_EQ(sum, plan->tokens());
      ASSERT_LE(odd, 1);
      ASSERT_LE(shadow.peak(), s.budget);
      if (c.schedule == ScheduleKind::kBudget && c.coreset >= 8) {
        const double b = static_cast<double>(c.coreset);
        const double bound = 1.1 * b * b * std::log2(b) * std::log2(static_cast<double>(plan->tokens()) / b);
        EXPECT_LE(shadow.work(), std::max(bound, b * b)) << "at " << plan->tokens();
        if (plan->halvings() > 0) {
          EXPECT_GE(static_cast<double>(plan->budget_schedule()->population()), 0.73 * b - 1)
              << "at " << plan->tokens();
        }
      }
    }
  }
}

// Operations as a flat sequence, writes one by one: what must not depend on how the stream is cut.
using FlatOp = std::tuple<OpKind, int64_t, int64_t, int64_t, std::vector<Slot>>;
void Flatten(const Operations& out, std::vector<FlatOp>* flat) {
  for (int64_t i = 0; i < out.size(); ++i) {
    const Slot* slots = out.slots(out[i]);
    if (out[i].kind != OpKind::kWrite) {
      flat->emplace_back(out[i].kind, out[i].number, out[i].weight, out[i].total,
                         std::vector<Slot>(slots, slots + out[i].count));
      continue;
    }
    for (int32_t j = 0; j < out[i].count; ++j)
      flat->emplace_back(OpKind::kWrite, out[i].number + j, 1, 0, std::vector<Slot>{slots[j]});
  }
}

TEST(Plan, TheSameOperationsHoweverTheStreamIsCut) {
  std::mt19937 rng(7);
  for (const Setting& s : Grid()) {
    if (s.sinks == 1 || s.protect == 1 || s.coreset() % 3 == 0) continue;  // a third of the grid
    SCOPED_TRACE(Describe(s));
    const int64_t n = 1500 / kSlower;
    std::vector<FlatOp> one, cut;
    OwnedPlan a(s), b(s, 8);
    for (int64_t i = 0; i < n; ++i) {
      a.out().Clear();
      a->Append(1, a.out());
      Flatten(a.out(), &one);
    }
    while (b->tokens() < n) {
      b.out().Clear();
      b->Append(std::min<int64_t>(n - b->tokens(), static_cast<int64_t>(rng() % 200)), b.out());
      Flatten(b.out(), &cut);
    }
    ASSERT_TRUE(one == cut);
  }
}

TEST(Plan, RoomBeforeHalvingIsExact) {
  std::mt19937 rng(3);
  for (const Setting& s : Grid()) {
    if (s.sinks == 1 || s.protect == 1) continue;
    SCOPED_TRACE(Describe(s));
    OwnedPlan plan(s);
    const auto append = [&](int64_t tokens) {
      for (int64_t i = 0; i < tokens; ++i) {
        plan.out().Clear();
        plan->Append(1, plan.out());
      }
    };
    while (plan->tokens() < 2500 / kSlower) {
      const int64_t room = plan->RoomBeforeHalving(), halvings = plan->halvings();
      ASSERT_GE(room, 0);
      append(room);
      ASSERT_EQ(plan->halvings(), halvings) << "at " << plan->tokens();
      append(1);
      ASSERT_GT(plan->halvings(), halvings) << "at " << plan->tokens();
      append(static_cast<int64_t>(rng() % 20));
    }
  }
}

TEST(Plan, HalvingAheadMakesRoomAndKeepsTheInvariants) {
  for (int64_t coreset : {4, 5, 16, 100, 500}) {
    const Setting s = MakeSetting(coreset, 4, 16, 0, 8);
    OwnedPlan plan(s);
    Shadow shadow(s.budget);
    for (int64_t i = 0; i < 4000 / kSlower; ++i) {
      plan.out().Clear();
      plan->Append(1, plan.out());
      ASSERT_TRUE(shadow.Apply(plan.out())) << shadow.error;
      if (i % 37 != 36) continue;
      int64_t room = plan->RoomBeforeHalving();
      for (int step = 0; step < 100; ++step) {
        plan.out().Clear();
        if (!plan->HalveAhead(plan.out())) break;
        ASSERT_LT(step, 99);
        ASSERT_TRUE(shadow.Apply(plan.out())) << shadow.error;
        ASSERT_EQ(shadow.total(), plan->tokens());
        ASSERT_GT(plan->RoomBeforeHalving(), room);
        room = plan->RoomBeforeHalving();
      }
      ASSERT_LE(plan->budget_schedule()->population(), coreset / 2);
    }
  }
}

TEST(Plan, RollbackShortensTheTailAndNothingElse) {
  const Setting s = MakeSetting(20, 4, 10, 6, 3);
  OwnedPlan plan(s);
  Shadow shadow(s.budget);
  const auto append = [&](int64_t tokens) {
    for (int64_t i = 0; i < tokens; ++i) {
      plan.out().Clear();
      plan->Append(1, plan.out());
      ASSERT_TRUE(shadow.Apply(plan.out())) << shadow.error;
    }
  };
  const auto rollback = [&](int64_t tokens) {
    plan.out().Clear();
    plan->Rollback(tokens, plan.out());
    ASSERT_TRUE(shadow.Apply(plan.out())) << shadow.error;
    ASSERT_EQ(shadow.total(), plan->tokens());
  };
  append(9);
  EXPECT_EQ(plan->RollbackAvailable(), 9);  // nothing has left the tail: everything, sinks too
  rollback(7);
  EXPECT_EQ(plan->tokens(), 2);
  append(18);
  EXPECT_EQ(plan->RollbackAvailable(), 20);  // 4 sinks and a tail of 16
  append(180);
  for (int64_t t = 6; t >= 0; --t) {
    EXPECT_EQ(plan->RollbackAvailable(), 6);
    const int64_t departed = plan->departures();
    rollback(t);
    EXPECT_EQ(plan->RollbackAvailable(), 6 - t);
    append(t);
    EXPECT_EQ(plan->departures(), departed);  // the tail is refilled before anything leaves it again
    append(5);
    CheckState(s, plan.plan(), shadow);
  }
}

TEST(Setting, AutomaticDivisionIsLegalForEveryBudgetFromTheSmallest) {
  for (ScheduleKind schedule : {ScheduleKind::kBudget, ScheduleKind::kRounds})
    for (int64_t sinks : {0, 4, 9})
      for (int64_t budget = sinks + 2 + MinCoreset(schedule); budget < 5000; budget += 1 + budget / 50)
        for (int64_t base : {int64_t{0}, budget * 5 / 16, budget, 2 * budget})
          for (const Shares& shares : {Shares{}, Shares{70, 30}, Shares{100, 0}, Shares{0, 100}}) {
            Setting s{.budget = budget, .sinks = sinks, .window = -1, .protect = -1, .schedule = schedule};
            DivideBudget(base, shares, &s);
            s.level_floor = DefaultLevelFloor(s.coreset());
            s.max_levels = DefaultMaxLevels(s.coreset(), s.level_floor);
            ASSERT_EQ(Check(s), SettingError::kNone) << Describe(s) << " base " << base;
          }
}

TEST(Setting, DividesTheBudgetAsDocumented) {
  Setting s{.budget = 1024, .sinks = 4, .window = -1, .protect = -1};
  DivideBudget(320, Shares{}, &s);
  EXPECT_EQ(s.protect, 197);           // 28 % of 704
  EXPECT_EQ(s.window, 320 + 422 - 4);  // base + 60 % of 704, sinks included
  EXPECT_EQ(s.coreset(), 1024 - 197 - 742 - 1);
  s = {.budget = 1024, .sinks = 4, .window = -1, .protect = -1};
  DivideBudget(320, Shares{70, 30}, &s);
  EXPECT_EQ(s.protect, 211);  // 30 % of 704
  EXPECT_EQ(s.coreset(),
            4);  // 70 % of 704 are 492: the window has 4 less than those, for the smallest coreset and the reservoir
  EXPECT_EQ(s.window, 1024 - 211 - 4 - 4 - 1);
}

TEST(Setting, EveryFieldIsChecked) {
  const Setting good = MakeSetting(32, 4, 8, 2, 3);
  const auto check = [&](auto change) {
    Setting s = good;
    change(s);
    return Check(s);
  };
  EXPECT_EQ(Check(good), SettingError::kNone);
  EXPECT_EQ(check([](Setting& s) { s.budget = 0; }), SettingError::kBudget);
  EXPECT_EQ(check([](Setting& s) { s.budget = int64_t{1} << 40; }), SettingError::kBudget);
  EXPECT_EQ(check([](Setting& s) { s.sinks = -1; }), SettingError::kSinks);
  EXPECT_EQ(check([](Setting& s) { s.window = -1; }), SettingError::kWindow);
  EXPECT_EQ(check([](Setting& s) { s.reserve = -1; }), SettingError::kReserve);
  EXPECT_EQ(check([](Setting& s) { s.protect = -1; }), SettingError::kProtect);
  EXPECT_EQ(check([](Setting& s) { s.level_fraction = 1; }), SettingError::kFraction);
  EXPECT_EQ(check([](Setting& s) { s.level_fraction = NAN; }), SettingError::kFraction);
  EXPECT_EQ(check([](Setting& s) { s.level_floor = 1; }), SettingError::kFloor);
  EXPECT_EQ(check([](Setting& s) { s.max_levels = 1; }), SettingError::kLevels);
  EXPECT_EQ(check([](Setting& s) { s.max_levels = 17; }), SettingError::kLevels);
}

}  // namespace
}  // namespace express::plan
