// A slow model that executes a plan's operations on weights alone and objects to any that breaks the rules.
#ifndef EXPRESS_TESTS_PLAN_SHADOW_H_
#define EXPRESS_TESTS_PLAN_SHADOW_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "src/plan/plan.h"

namespace express::plan {

// A plan with memory of its own.
class OwnedPlan {
 public:
  explicit OwnedPlan(const Setting& setting, int64_t op_scale = 1) {
    Arena counter;
    Plan counted(setting, counter);
    const int64_t ops = counted.MaxOps() * op_scale;
    const int64_t slots = std::max(setting.budget, counted.MaxSlots() * op_scale);
    Operations(counter, ops, slots);
    memory_.reset(std::aligned_alloc(Arena::kAlignment, counter.used()));
    Arena arena(memory_.get());
    plan_ = std::make_unique<Plan>(setting, arena);
    out_ = Operations(arena, ops, slots);
    EXPECT_EQ(arena.used(), counter.used());
    plan_->Reset();
  }
  Plan* operator->() { return plan_.get(); }
  Plan& plan() { return *plan_; }
  Operations& out() { return out_; }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  std::unique_ptr<Plan> plan_;
  Operations out_;
};

inline int64_t SlotsListed(const Operations& operations) {
  int64_t slots = 0;
  for (int64_t i = 0; i < operations.size(); ++i) slots += operations[i].count;
  return slots;
}

inline std::string Describe(const Setting& s) {
  return "budget " + std::to_string(s.budget) + " sinks " + std::to_string(s.sinks) + " window " +
         std::to_string(s.window) + " reserve " + std::to_string(s.reserve) + " protect " + std::to_string(s.protect) +
         (s.schedule == ScheduleKind::kRounds ? " rounds" : " budget");
}

// A setting with the default levels for its coreset.
inline Setting MakeSetting(int64_t coreset, int64_t sinks, int64_t window, int64_t reserve, int64_t protect,
                           ScheduleKind schedule = ScheduleKind::kBudget) {
  Setting s{
      .budget = 0, .sinks = sinks, .window = window, .reserve = reserve, .protect = protect, .schedule = schedule};
  s.budget = coreset + sinks + s.tail() + protect + 1;
  s.level_floor = DefaultLevelFloor(coreset);
  s.max_levels = DefaultMaxLevels(coreset, s.level_floor);
  return s;
}

class Shadow {
 public:
  explicit Shadow(int64_t budget)
      : weight_(static_cast<size_t>(budget), 0), position_(static_cast<size_t>(budget), -1) {}

  // False at the first broken rule; `error` says which.
  bool Apply(const Operations& out) {
    for (int64_t i = 0; i < out.size(); ++i)
      if (!ApplyOne(out[i], out.slots(out[i]))) return false;
    return true;
  }

  int64_t total() const { return total_; }
  int64_t live() const { return live_; }
  int64_t peak() const { return peak_; }
  int64_t halvings() const { return halvings_; }
  double work() const { return work_; }  // sum of squared halving sizes
  int64_t largest_list() const { return largest_list_; }
  const std::vector<int64_t>& weights() const { return weight_; }
  // The token that a Write put into the slot last (an entry that survives a halving or a swap may be another).
  int64_t written(Slot slot) const { return position_[static_cast<size_t>(slot)]; }
  std::string error;

 private:
  bool Fail(const std::string& what) {
    error = what;
    return false;
  }
  int64_t& W(Slot slot) { return weight_[static_cast<size_t>(slot)]; }

  bool ApplyOne(const Op& op, const Slot* slots) {
    for (int32_t i = 0; i < op.count; ++i)
      if (slots[i] < 0 || slots[i] >= static_cast<Slot>(weight_.size())) return Fail("slot outside the slab");
    switch (op.kind) {
      case OpKind::kWrite:
        for (int32_t i = 0; i < op.count; ++i) {
          if (W(slots[i]) != 0) return Fail("write into a live slot");
          W(slots[i]) = 1;
          position_[static_cast<size_t>(slots[i])] = op.number + i;
          if (op.number + i != total_) return Fail("write out of order");
          ++total_;
          ++live_;
        }
        peak_ = std::max(peak_, live_);
        return true;
      case OpKind::kCentre:
        return op.count > 0 || Fail("centre of nothing");
      case OpKind::kAdmit:
        if (op.count != 1 || W(slots[0]) != 1) return Fail("admit of what is no token");
        if (op.number != admitted_++) return Fail("admission number");
        return true;
      case OpKind::kSample:
        if (op.count != 2 || W(slots[1]) != op.weight) return Fail("sample weight");
        if (W(slots[0]) + op.weight != op.total) return Fail("reservoir weight");
        W(slots[0]) = op.total;
        W(slots[1]) = 0;
        --live_;
        return true;
      case OpKind::kHalve:
        return ApplyHalve(op, slots);
      case OpKind::kFree:
        for (int32_t i = 0; i < op.count; ++i) {
          if (W(slots[i]) != 1) return Fail("rollback of what is no token");
          W(slots[i]) = 0;
          --live_;
          --total_;
        }
        return true;
      case OpKind::kEvict:
        return (op.count == 1 && W(slots[0]) == 1) || Fail("eviction of what is no protected entry");
      case OpKind::kMove:
        for (int32_t i = 0; i < op.count; i += 2) {
          if (W(slots[i]) == 0 || W(slots[i + 1]) != 0) return Fail("move from a free slot, or to a live one");
          W(slots[i + 1]) = W(slots[i]);
          W(slots[i]) = 0;
        }
        return true;
    }
    return Fail("unknown operation");
  }

  bool ApplyHalve(const Op& op, const Slot* slots) {
    if (op.count < 2 || op.count % 2 != 0) return Fail("halving of " + std::to_string(op.count));
    if (op.number != halvings_++) return Fail("halving number");
    if (!std::has_single_bit(static_cast<uint64_t>(op.weight))) return Fail("weight is no power of two");
    for (int32_t i = 0; i < op.count; ++i)
      if (W(slots[i]) * 2 != op.weight) return Fail("halving of unequal weights");
    for (int32_t i = 0; i < op.count; i += 2) {
      W(slots[i]) = op.weight;
      W(slots[i + 1]) = 0;
    }
    live_ -= op.count / 2;
    work_ += static_cast<double>(op.count) * op.count;
    largest_list_ = std::max<int64_t>(largest_list_, op.count);
    return true;
  }

  std::vector<int64_t> weight_;
  std::vector<int64_t> position_;
  int64_t total_ = 0, live_ = 0, peak_ = 0, halvings_ = 0, admitted_ = 0, largest_list_ = 0;
  double work_ = 0;
};

}  // namespace express::plan

#endif  // EXPRESS_TESTS_PLAN_SHADOW_H_
