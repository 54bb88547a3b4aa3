#include "src/plan/plan.h"

#include <algorithm>

namespace express::plan {
namespace {

std::variant<BudgetSchedule, RoundsSchedule> MakeSchedule(const Setting& setting) {
  if (setting.schedule == ScheduleKind::kRounds) return RoundsSchedule(setting);
  return BudgetSchedule(setting);
}

}  // namespace

Plan::Plan(const Setting& setting, Arena& arena)
    : setting_(setting),
      pool_(arena, setting.budget),
      sinks_(arena.Take<Slot>(setting.sinks)),
      tail_(arena.Take<Slot>(setting.tail())),
      schedule_(MakeSchedule(setting)) {}

void Plan::Reset() {
  pool_.Reset();
  std::visit([](auto& schedule) { schedule.Reset(); }, schedule_);
  sink_count_ = tail_begin_ = tail_count_ = protected_count_ = tokens_ = departures_ = 0;
}

int64_t Plan::MaxOps() const {
  return 3 + std::visit([](const auto& schedule) { return schedule.MaxOps(); }, schedule_);
}

int64_t Plan::MaxSlots() const {
  return setting_.tail() + 2 + std::visit([](const auto& schedule) { return schedule.MaxSlots(); }, schedule_);
}

int64_t Plan::MaxList() const {
  return std::visit([](const auto& schedule) { return schedule.MaxList(); }, schedule_);
}

int64_t Plan::Append(int64_t tokens, Operations& out) {
  const int64_t ops = MaxOps(), slots = MaxSlots();
  for (int64_t i = 0; i < tokens; ++i) {
    if (!out.HasRoom(ops, slots)) return i;
    if (sink_count_ < setting_.sinks) {
      sinks_[sink_count_++] = pool_.Allocate();
      Write(sinks_[sink_count_ - 1], out);
      continue;
    }
    if (tail_count_ == setting_.tail()) Depart(out);
    const Slot slot = pool_.Allocate();
    tail_[(tail_begin_ + tail_count_++) % setting_.tail()] = slot;
    Write(slot, out);
  }
  return tokens;
}

void Plan::Write(Slot slot, Operations& out) {
  const int64_t position = tokens_++;
  const bool extends =
      out.size() > 0 && out.back().kind == OpKind::kWrite && out.back().number + out.back().count == position;
  if (!extends) out.Begin(OpKind::kWrite, position);
  out.AddSlot(slot);
}

// The oldest token of the full tail leaves it: to the protected entries, or, like the loser there, to the schedule.
void Plan::Depart(Operations& out) {
  const Slot slot = tail_[tail_begin_];
  if (setting_.protect > 0) {
    if (departures_ == 0) {
      out.Begin(OpKind::kCentre, 0);
      for (int64_t i = 0; i < tail_count_; ++i) out.AddSlot(tail_[(tail_begin_ + i) % setting_.tail()]);
    }
    out.Begin(OpKind::kAdmit, departures_);
    out.AddSlot(slot);
  }
  tail_begin_ = (tail_begin_ + 1) % setting_.tail();
  --tail_count_;
  ++departures_;
  if (protected_count_ < setting_.protect) {
    ++protected_count_;
    return;
  }
  std::visit([&](auto& schedule) { schedule.Insert(pool_, slot, out); }, schedule_);
}

int64_t Plan::RoomBeforeHalving() const {
  const int64_t exact = (setting_.sinks - sink_count_) + (setting_.tail() - tail_count_);
  return exact + (setting_.protect - protected_count_) +
         std::visit([](const auto& schedule) { return schedule.RoomBeforeHalving(); }, schedule_);
}

bool Plan::HalveAhead(Operations& out) {
  auto* schedule = std::get_if<BudgetSchedule>(&schedule_);
  return schedule != nullptr && schedule->HalveAhead(pool_, out);
}

// Once a token has left the tail, the window must stay whole.
int64_t Plan::RollbackAvailable() const {
  if (departures_ == 0) return tokens_;
  return std::max<int64_t>(0, tail_count_ - setting_.window);
}

void Plan::Rollback(int64_t tokens, Operations& out) {
  out.Begin(OpKind::kFree, tokens_ - tokens);
  for (int64_t i = 0; i < tokens; ++i) {
    const Slot slot = tail_count_ > 0 ? tail_[(tail_begin_ + --tail_count_) % setting_.tail()] : sinks_[--sink_count_];
    out.AddSlot(slot);
    pool_.Release(slot);
  }
  tokens_ -= tokens;
}

void Plan::Transfer(Archive& archive) {
  for (int64_t* count : {&sink_count_, &tail_count_, &protected_count_, &tokens_, &departures_}) archive.Field(*count);
  pool_.Transfer(archive);
  std::visit([&](auto& schedule) { schedule.Transfer(archive); }, schedule_);
  archive.Array(sinks_, sink_count_, setting_.sinks);
  if (archive.reading()) tail_begin_ = 0;
  for (int64_t i = 0; i < tail_count_; ++i) {  // the oldest first, wherever the ring begins
    Slot slot = archive.reading() ? kNoSlot : tail_slot(i);
    archive.Field(slot);
    if (archive.reading()) tail_[i] = slot;
  }
  archive.Array(tail_, 0, setting_.tail() - tail_count_);
}

}  // namespace express::plan
