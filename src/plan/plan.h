// The plan of one (layer, setting): a state machine from counts of tokens to operations on slots (DESIGN 4).
//
// It never sees a key or a value, so all KV heads of the setting share it. How a stream is cut into appends never
// changes the operations. Invariants after every operation: the weights sum to the number of tokens, at most `budget`
// slots are live, sinks, window and protected entries weigh 1.
#ifndef EXPRESS_SRC_PLAN_PLAN_H_
#define EXPRESS_SRC_PLAN_PLAN_H_

#include <algorithm>
#include <cstdint>
#include <variant>

#include "src/core/arena.h"
#include "src/plan/budget_schedule.h"
#include "src/plan/operations.h"
#include "src/plan/pool.h"
#include "src/plan/rounds_schedule.h"
#include "src/plan/setting.h"

namespace express::plan {

class Plan {
 public:
  // `setting` has passed Check. Over a counting arena only the sizes below may be asked for.
  Plan(const Setting& setting, Arena& arena);

  void Reset();

  // Plans up to `tokens` tokens, as many as fit into what room `out` has left, and returns how many. At least one fits
  // if out has MaxOps and MaxSlots.
  int64_t Append(int64_t tokens, Operations& out);

  // Plans tokens of which each does no more than drive the oldest one out of the exact tail, which then is a candidate for
  // the open reservoir, and takes its slot: as many of `tokens` as come before one that does more. The same as Append, but
  // at once.
  Reservoir::Candidates AppendCandidates(int64_t tokens);

  // How many tokens can be appended before the next halving.
  int64_t RoomBeforeHalving() const;
  // Plans one halving ahead of need, so that RoomBeforeHalving grows. False if nothing is to be gained. Needs MaxOps
  // and MaxSlots.
  bool HalveAhead(Operations& out);

  // How many of the last tokens can be taken back, and their removal (needs room for as many slots).
  int64_t RollbackAvailable() const;
  void Rollback(int64_t tokens, Operations& out);

  // Another setting with the same sinks, reserve and schedule of budgets, in three steps between which the caller executes what was
  // planned:
  //   while (GiveUp(next, out)) ...    gives up, part by part, what `next` has no room for; each call needs MaxOps and MaxSlots
  //   Compact(next.budget, out)        all live slots are below next.budget then; needs 1 operation of `budget` slots
  //   Resize(next, arena)              the arrays are where a plan of `next` takes them from the arena, with what they held
  bool GiveUp(const Setting& next, Operations& out);
  void Compact(int64_t budget, Operations& out);
  void Resize(const Setting& next, Arena& arena);

  // The state of another plan of the same setting, from then on on its own.
  void Assume(const Plan& other);

  // Bounds on what one token or one HalveAhead emits, and on the length of a halved list.
  int64_t MaxOps() const { return max_ops_; }
  int64_t MaxSlots() const { return std::max(max_slots_, tail_size_ + 2); }
  // The slots of the next token, now: few once the tail has been listed, for its centre.
  int64_t NextSlots() const { return departures_ == 0 ? MaxSlots() : max_slots_; }
  int64_t MaxList() const;

  const Setting& setting() const { return setting_; }
  int64_t tokens() const { return tokens_; }
  int64_t departures() const { return departures_; }  // tokens that have left the exact tail
  int64_t live() const { return pool_.live(); }
  int64_t halvings() const { return pool_.halvings(); }
  int64_t weight(Slot slot) const { return pool_.weight(slot); }  // 0 = free

  int64_t protected_count() const { return protected_count_; }
  Slot protected_slot(int64_t i) const { return protected_[i]; }  // in the order in which they were taken
  const Slot* protected_slots() const { return protected_; }      // (protected_count)
  int64_t tail_count() const { return tail_count_; }
  // Slot of the token `i` places into the exact tail, oldest first, and of sink i; the slot that the next token takes out of
  // the tail, kNoSlot if none.
  Slot tail_slot(int64_t i) const { return tail_[Wrap(tail_begin_ + i)]; }
  Slot sink_slot(int64_t i) const { return sinks_[i]; }
  int64_t sink_count() const { return sink_count_; }
  Slot next_departure() const { return tail_count_ == tail_size_ ? tail_slot(0) : kNoSlot; }
  // body(slot) for every slot of the weighted coreset, the open reservoir among them.
  template <class Body>
  void ForEachCoresetSlot(const Body& body) const {
    std::visit([&](const auto& schedule) { schedule.ForEachSlot(pool_, body); }, schedule_);
  }

  // All that Reset forgets. What is read was written by a plan of the same setting.
  void Transfer(Archive& archive);

  const BudgetSchedule* budget_schedule() const { return std::get_if<BudgetSchedule>(&schedule_); }

 private:
  int64_t Wrap(int64_t i) const { return i < tail_size_ ? i : i - tail_size_; }
  void Measure();  // what follows from the setting
  void Depart(Operations& out);
  void Write(Slot slot, Operations& out);

  Setting setting_;
  Pool pool_;
  Slot* sinks_;      // (sinks): for rollback
  Slot* tail_;       // (tail): ring of the exact tail
  Slot* protected_;  // (protect)
  int64_t protect_;  // entries protected at most: setting_.protect, or fewer on the way to another setting
  int64_t sink_count_ = 0;
  int64_t tail_begin_ = 0, tail_count_ = 0;
  int64_t window_ = 0;  // last tokens that a rollback must leave: the window, as far as the tail has filled it
  int64_t protected_count_ = 0;
  int64_t tokens_ = 0;
  int64_t departures_ = 0;
  std::variant<BudgetSchedule, RoundsSchedule> schedule_;
  int64_t tail_size_, max_ops_, max_slots_;  // max_slots_: without the list of the tail, for its centre
};

}  // namespace express::plan

#endif  // EXPRESS_SRC_PLAN_PLAN_H_
