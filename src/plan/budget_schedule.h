// The budget schedule (DESIGN 3.5): levels of entries of weight 2^h; when no slot is free, one level is halved into the
// next.
#ifndef EXPRESS_SRC_PLAN_BUDGET_SCHEDULE_H_
#define EXPRESS_SRC_PLAN_BUDGET_SCHEDULE_H_

#include <array>
#include <cstdint>

#include "src/plan/pool.h"
#include "src/plan/setting.h"

namespace express::plan {

class BudgetSchedule {
 public:
  explicit BudgetSchedule(const Setting& setting);

  void Reset();
  // The entry in `slot`, of weight 1, enters.
  void Insert(Pool& pool, Slot slot, Operations& out);
  // Entries of weight 1 of which each leaves the reservoir open: how many of `most`, all of them candidates from now on. Their
  // slots are left alone.
  Reservoir::Candidates TakeCandidates(Pool& pool, int64_t most);
  // One halving ahead of need. False if too little could be gained: half of the slots are free already.
  bool HalveAhead(Pool& pool, Operations& out);
  // One step towards `next`, whose coreset may be smaller: fewer levels, then fewer entries. False when all fits. From the first
  // step on no more enters than fits both.
  bool ShrinkStep(Pool& pool, const Setting& next, Operations& out);
  // The sizes of `next`, once all fits.
  void Resize(const Setting& next);
  // How many entries can enter before the next halving.
  int64_t RoomBeforeHalving() const;

  template <class Body>
  void ForEachSlot(const Pool& pool, const Body& body) const {
    for (const Fifo& level : levels_) pool.ForEach(level, body);
    if (reservoir_.weight() > 0) body(reservoir_.slot());
  }
  // body(slot) gives every slot its new number.
  template <class Body>
  void Renumber(Pool& pool, const Body& body) {
    for (Fifo& level : levels_) pool.Renumber(level, body);
    if (reservoir_.weight() > 0) reservoir_.SetSlot(body(reservoir_.slot()));
  }

  // The largest list that is ever halved, and bounds on what one Insert or HalveAhead can emit.
  int64_t MaxList() const { return max_list_; }
  int64_t MaxOps() const { return 8 + slots_ / max_list_; }
  int64_t MaxSlots() const { return slots_ + max_list_ + 8; }

  void Transfer(Archive& archive) {
    for (Fifo& level : levels_) archive.Field(level);
    reservoir_.Transfer(archive);
    archive.Field(bottom_);
    archive.Field(population_);
  }

  int64_t population() const { return population_; }
  int bottom() const { return bottom_; }
  int64_t level_count(int level) const { return levels_[static_cast<size_t>(level)].count; }

 private:
  static constexpr int kLevels = 64;  // weights are 64-bit

  int Top() const;
  int ChooseLevel(double* capacity) const;
  void HalveOne(Pool& pool, Operations& out);
  void RetireBottom(Pool& pool, Operations& out);

  int64_t slots_;  // B'
  int64_t room_;   // entries allowed now: B', or fewer on the way to a smaller one
  double fraction_;
  int64_t floor_;
  int64_t max_levels_;
  int64_t max_list_;
  std::array<Fifo, kLevels> levels_;
  Reservoir reservoir_;
  int bottom_ = 0;  // h0: the lowest level alive
  int64_t population_ = 0;
};

}  // namespace express::plan

#endif  // EXPRESS_SRC_PLAN_BUDGET_SCHEDULE_H_
