// The paper's schedule: Express(s, m-bar, Halve), rounds of four with Compress2 and Subsample inside (DESIGN 3.2
// to 3.4).
#ifndef EXPRESS_SRC_PLAN_ROUNDS_SCHEDULE_H_
#define EXPRESS_SRC_PLAN_ROUNDS_SCHEDULE_H_

#include <array>
#include <cstdint>

#include "src/plan/pool.h"
#include "src/plan/setting.h"

namespace express::plan {

class RoundsSchedule {
 public:
  explicit RoundsSchedule(const Setting& setting);

  void Reset();
  // The entry in `slot`, of weight 1, enters.
  void Insert(Pool& pool, Slot slot, Operations& out);
  // How many entries can enter before the next halving.
  int64_t RoomBeforeHalving() const;

  template <class Body>
  void ForEachSlot(const Pool& pool, const Body& body) const {
    pool.ForEach(finished_, body);
    for (const Fifo& rung : ladder_) pool.ForEach(rung, body);
    if (reservoir_.weight() > 0) body(reservoir_.slot());
  }

  // The largest list that is ever halved, and bounds on what one Insert can emit: every buffer of the ladder, and twice
  // at a round's end.
  int64_t MaxList() const { return 4 * s_; }
  int64_t MaxOps() const { return 8 + kLevels; }
  int64_t MaxSlots() const { return 10 * s_ + 8; }

  void Transfer(Archive& archive) {
    archive.Field(m_);
    archive.Field(finished_);
    for (Fifo& rung : ladder_) archive.Field(rung);
    reservoir_.Transfer(archive);
  }

  int64_t s() const { return s_; }
  int round_exponent() const { return m_; }  // m: finished entries weigh 2^m

 private:
  static constexpr int kLevels = 64;

  int Rungs() const { return m_ < m_bar_ ? m_ : m_bar_; }  // buffers of the ladder of this round
  int64_t RungCapacity(int rung) const;
  void ClimbLadder(Pool& pool, Operations& out);
  void EndRound(Pool& pool, Operations& out);

  int64_t s_;
  int m_bar_;  // log2(s) + 1: the longest ladder
  int m_ = 0;
  Fifo finished_;                     // entries of weight 2^m, at most 4 s
  std::array<Fifo, kLevels> ladder_;  // rung l: weight 2^(l + m - rungs)
  Reservoir reservoir_;
};

}  // namespace express::plan

#endif  // EXPRESS_SRC_PLAN_ROUNDS_SCHEDULE_H_
