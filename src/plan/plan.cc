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
      protected_(arena.Take<Slot>(setting.protect)),
      protect_(setting.protect),
      schedule_(MakeSchedule(setting)) {
  Measure();
}

void Plan::Measure() {
  tail_size_ = setting_.tail();
  max_ops_ = 3 + std::visit([](const auto& schedule) { return schedule.MaxOps(); }, schedule_);
  max_slots_ = 2 + std::visit([](const auto& schedule) { return schedule.MaxSlots(); }, schedule_);
}

void Plan::Reset() {
  pool_.Reset();
  schedule_ = MakeSchedule(setting_);
  std::visit([](auto& schedule) { schedule.Reset(); }, schedule_);
  protect_ = setting_.protect;
  sink_count_ = tail_begin_ = tail_count_ = window_ = protected_count_ = tokens_ = departures_ = 0;
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
    if (tail_count_ == tail_size_) Depart(out);
    const Slot slot = pool_.Allocate();
    tail_[Wrap(tail_begin_ + tail_count_++)] = slot;
    window_ = std::max(window_, std::min(setting_.window, tail_count_ - setting_.reserve));
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
      for (int64_t i = 0; i < tail_count_; ++i) out.AddSlot(tail_slot(i));
    }
    out.Begin(OpKind::kAdmit, departures_);
    out.AddSlot(slot);
  }
  tail_begin_ = Wrap(tail_begin_ + 1);
  --tail_count_;
  ++departures_;
  if (protected_count_ < protect_) {
    protected_[protected_count_++] = slot;
    return;
  }
  std::visit([&](auto& schedule) { schedule.Insert(pool_, slot, out); }, schedule_);
}

// A slot that is freed is the one that is taken next: the ring of the tail turns, and what is in it stays.
Reservoir::Candidates Plan::AppendCandidates(int64_t tokens) {
  auto* schedule = std::get_if<BudgetSchedule>(&schedule_);
  const bool full = sink_count_ == setting_.sinks && tail_count_ == tail_size_ && protected_count_ == protect_;
  if (schedule == nullptr || !full || departures_ == 0) return {};
  const Reservoir::Candidates taken = schedule->TakeCandidates(pool_, tokens);
  if (taken.count == 0) return {};
  window_ = std::max(window_, std::min(setting_.window, tail_count_ - setting_.reserve));
  for (int64_t i = 0; i < std::min(taken.count, tail_size_); ++i) pool_.Renew(tail_slot(i));
  tail_begin_ = (tail_begin_ + taken.count) % tail_size_;
  tokens_ += taken.count;
  departures_ += taken.count;
  return taken;
}

int64_t Plan::RoomBeforeHalving() const {
  const int64_t exact = (setting_.sinks - sink_count_) + (setting_.tail() - tail_count_);
  return exact + (protect_ - protected_count_) +
         std::visit([](const auto& schedule) { return schedule.RoomBeforeHalving(); }, schedule_);
}

bool Plan::HalveAhead(Operations& out) {
  auto* schedule = std::get_if<BudgetSchedule>(&schedule_);
  return schedule != nullptr && schedule->HalveAhead(pool_, out);
}

// Once a token has left the tail, the window must stay whole.
int64_t Plan::RollbackAvailable() const {
  if (departures_ == 0) return tokens_;
  return std::max<int64_t>(0, tail_count_ - window_);
}

void Plan::Rollback(int64_t tokens, Operations& out) {
  out.Begin(OpKind::kFree, tokens_ - tokens);
  for (int64_t i = 0; i < tokens; ++i) {
    const Slot slot = tail_count_ > 0 ? tail_[Wrap(tail_begin_ + --tail_count_)] : sinks_[--sink_count_];
    out.AddSlot(slot);
    pool_.Release(slot);
  }
  tokens_ -= tokens;
}

bool Plan::GiveUp(const Setting& next, Operations& out) {
  auto& schedule = std::get<BudgetSchedule>(schedule_);
  if (schedule.ShrinkStep(pool_, next, out)) return true;
  protect_ = std::min(protect_, next.protect);
  if (protected_count_ > protect_) {
    const Slot slot = protected_[--protected_count_];
    out.Begin(OpKind::kEvict, protected_count_);
    out.AddSlot(slot);
    schedule.Insert(pool_, slot, out);
    return true;
  }
  if (tail_count_ <= next.tail()) return false;
  Depart(out);
  return true;
}

void Plan::Compact(int64_t budget, Operations& out) {
  Slot free = 0;
  bool begun = false;
  const auto lower = [&](Slot slot) {
    if (slot < budget) return slot;
    const Slot to = pool_.NextFree(&free);
    pool_.Move(slot, to);
    if (!begun) out.Begin(OpKind::kMove, 0);
    begun = true;
    out.AddSlot(slot);
    out.AddSlot(to);
    return to;
  };
  for (int64_t i = 0; i < sink_count_; ++i) sinks_[i] = lower(sinks_[i]);
  std::rotate(tail_, tail_ + tail_begin_, tail_ + setting_.tail());
  tail_begin_ = 0;
  for (int64_t i = 0; i < tail_count_; ++i) tail_[i] = lower(tail_[i]);
  for (int64_t i = 0; i < protected_count_; ++i) protected_[i] = lower(protected_[i]);
  std::get<BudgetSchedule>(schedule_).Renumber(pool_, lower);
  pool_.RebuildFree();
}

void Plan::Resize(const Setting& next, Arena& arena) {
  pool_.Resize(arena, std::min(setting_.budget, next.budget), next.budget);
  sinks_ = arena.Take<Slot>(next.sinks);
  tail_ = arena.Take<Slot>(next.tail());
  protected_ = arena.Take<Slot>(next.protect);
  setting_ = next;
  protect_ = next.protect;
  window_ = std::min(window_, next.window);
  std::get<BudgetSchedule>(schedule_).Resize(next);
  Measure();
}

void Plan::Assume(const Plan& other) {
  Plan own = other;
  own.pool_ = pool_;
  own.pool_.Assume(other.pool_);
  const auto take = [](Slot* to, const Slot* from, int64_t count) {
    std::copy_n(from, count, to);
    return to;
  };
  own.sinks_ = take(sinks_, other.sinks_, setting_.sinks);
  own.tail_ = take(tail_, other.tail_, setting_.tail());
  own.protected_ = take(protected_, other.protected_, setting_.protect);
  *this = own;
}

void Plan::Transfer(Archive& archive) {
  for (int64_t* count : {&sink_count_, &tail_count_, &window_, &protected_count_, &tokens_, &departures_})
    archive.Field(*count);
  pool_.Transfer(archive);
  std::visit([&](auto& schedule) { schedule.Transfer(archive); }, schedule_);
  archive.Array(sinks_, sink_count_, setting_.sinks);
  if (archive.reading()) tail_begin_ = 0;
  const int64_t straight =
      std::min(tail_count_, setting_.tail() - tail_begin_);  // the oldest first, wherever the ring begins
  archive.Array(tail_ + tail_begin_, straight, straight);
  archive.Array(tail_, tail_count_ - straight, setting_.tail() - straight);
  archive.Array(protected_, protected_count_, setting_.protect);
}

}  // namespace express::plan
