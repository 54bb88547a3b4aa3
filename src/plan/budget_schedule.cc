#include "src/plan/budget_schedule.h"

#include <algorithm>

namespace express::plan {

BudgetSchedule::BudgetSchedule(const Setting& setting) { Resize(setting); }

void BudgetSchedule::Resize(const Setting& next) {
  slots_ = room_ = next.coreset();
  fraction_ = next.level_fraction;
  floor_ = next.level_floor;
  max_levels_ = next.max_levels;
  max_list_ = std::max<int64_t>(floor_, static_cast<int64_t>(static_cast<double>(slots_) * (1 - fraction_))) / 2 * 2;
}

void BudgetSchedule::Reset() {
  levels_.fill(Fifo());
  reservoir_.Reset();
  bottom_ = 0;
  population_ = 0;
}

int BudgetSchedule::Top() const {
  int top = bottom_;
  int64_t left = population_;
  for (int h = bottom_; left > 0 && h < kLevels; ++h) {
    if (level_count(h) > 0) top = h;
    left -= level_count(h);
  }
  return top;
}

// The lowest level whose population has reached its capacity, else the most populous one; and that capacity,
// cap_h = max(floor, B' (1 - c) c^(H - h)).
int BudgetSchedule::ChooseLevel(double* capacity) const {
  int reached = -1, fullest = -1;
  double own = static_cast<double>(slots_) * (1 - fraction_), reached_capacity = 0, fullest_capacity = 0;
  for (int h = Top(); h >= bottom_; --h, own *= fraction_) {
    const int64_t count = level_count(h);
    const double most = std::max(static_cast<double>(floor_), own);
    if (static_cast<double>(count) >= most) reached = h, reached_capacity = most;
    if (fullest < 0 || count >= level_count(fullest)) fullest = h, fullest_capacity = most;
  }
  *capacity = reached >= 0 ? reached_capacity : fullest_capacity;
  return reached >= 0 ? reached : fullest;
}

void BudgetSchedule::HalveOne(Pool& pool, Operations& out) {
  double capacity = 0;
  const int level = ChooseLevel(&capacity);
  Fifo& from = levels_[static_cast<size_t>(level)];
  const int64_t count = std::min(from.count, static_cast<int64_t>(capacity)) / 2 * 2;
  pool.Halve(from, count, levels_[static_cast<size_t>(level) + 1], out);
  population_ -= count / 2;
  if (Top() - bottom_ + 1 > max_levels_) RetireBottom(pool, out);
}

// The bottom level moves up; an odd entry joins the reservoir. Lists are cut at max_list_, so that scratch is bounded
// by it.
void BudgetSchedule::RetireBottom(Pool& pool, Operations& out) {
  Fifo& from = levels_[static_cast<size_t>(bottom_)];
  while (from.count >= 2) {
    const int64_t count = std::min(from.count, max_list_) / 2 * 2;
    pool.Halve(from, count, levels_[static_cast<size_t>(bottom_) + 1], out);
    population_ -= count / 2;
  }
  if (from.count == 1) {
    reservoir_.Absorb(pool, pool.Pop(from), int64_t{1} << bottom_, out);
    --population_;
  }
  ++bottom_;
}

void BudgetSchedule::Insert(Pool& pool, Slot slot, Operations& out) {
  Slot hand = slot;
  int64_t weight = 1;
  while (true) {
    if (weight < int64_t{1} << bottom_) {  // below the bottom level: through the reservoir
      reservoir_.Absorb(pool, hand, weight, out);
      weight = reservoir_.weight();
      if (weight < int64_t{1} << bottom_) return;
      hand = reservoir_.Take();
    }
    if (population_ < room_) break;
    HalveOne(pool, out);  // may retire the level that the entry in hand belongs to
  }
  pool.Push(levels_[static_cast<size_t>(bottom_)], hand);
  ++population_;
}

// With at most room / 2 levels some level has a pair as long as there are more entries than room.
bool BudgetSchedule::ShrinkStep(Pool& pool, const Setting& next, Operations& out) {
  room_ = std::min(room_, next.coreset());
  max_levels_ = std::min(max_levels_, next.max_levels);
  if (Top() - bottom_ + 1 > max_levels_)
    RetireBottom(pool, out);
  else if (population_ > room_)
    HalveOne(pool, out);
  else
    return false;
  return true;
}

Reservoir::Candidates BudgetSchedule::TakeCandidates(Pool& pool, int64_t most) {
  if (reservoir_.weight() == 0) return {};
  return reservoir_.AbsorbMany(pool, std::min(most, (int64_t{1} << bottom_) - 1 - reservoir_.weight()));
}

bool BudgetSchedule::HalveAhead(Pool& pool, Operations& out) {
  if (population_ <= room_ / 2) return false;
  HalveOne(pool, out);
  return true;
}

// The reservoir holds W; k more tokens complete it floor((W + k) / 2^h0) times, each time taking a slot.
int64_t BudgetSchedule::RoomBeforeHalving() const {
  return ((room_ - population_ + 1) << bottom_) - reservoir_.weight() - 1;
}

}  // namespace express::plan
