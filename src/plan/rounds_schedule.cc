#include "src/plan/rounds_schedule.h"

#include <bit>

namespace express::plan {

// s is the largest power of two with 8 s <= B'.
RoundsSchedule::RoundsSchedule(const Setting& setting)
    : s_(static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(setting.coreset() / 8)))),
      m_bar_(static_cast<int>(std::bit_width(static_cast<uint64_t>(s_)))) {}

void RoundsSchedule::Reset() {
  m_ = 0;
  finished_ = Fifo();
  ladder_.fill(Fifo());
  reservoir_.Reset();
}

// s 2^(l + 2 - rungs)
int64_t RoundsSchedule::RungCapacity(int rung) const { return (s_ << (rung + 2)) >> Rungs(); }

void RoundsSchedule::Insert(Pool& pool, Slot slot, Operations& out) {
  if (m_ == 0) {  // the first 4 s entries are kept as they are
    pool.Push(finished_, slot);
  } else {
    const int64_t block = int64_t{1} << (m_ - Rungs());  // Subsample: one of every `block`
    Slot hand = slot;
    if (block > 1) {
      reservoir_.Absorb(pool, slot, 1, out);
      if (reservoir_.weight() < block) return;
      hand = reservoir_.Take();
    }
    pool.Push(ladder_[0], hand);
    ClimbLadder(pool, out);
  }
  if (finished_.count == 4 * s_) EndRound(pool, out);
}

// Every full buffer is halved into the next; the last one's s entries are finished.
void RoundsSchedule::ClimbLadder(Pool& pool, Operations& out) {
  const int rungs = Rungs();
  for (int l = 0; l < rungs; ++l) {
    Fifo& rung = ladder_[static_cast<size_t>(l)];
    if (rung.count < RungCapacity(l)) return;
    pool.Halve(rung, rung.count, l + 1 < rungs ? ladder_[static_cast<size_t>(l) + 1] : finished_, out);
  }
}

void RoundsSchedule::EndRound(Pool& pool, Operations& out) {
  for (int i = 0; i < 2; ++i) {
    Fifo halved;
    pool.Halve(finished_, finished_.count, halved, out);
    finished_ = halved;
  }
  m_ += 2;
}

// The bottom buffer takes what it lacks but one; each entry of it is `block` tokens.
int64_t RoundsSchedule::RoomBeforeHalving() const {
  if (m_ == 0) return 4 * s_ - finished_.count - 1;
  const int64_t lacking = RungCapacity(0) - ladder_[0].count;
  return (lacking << (m_ - Rungs())) - reservoir_.weight() - 1;
}

}  // namespace express::plan
