#include "src/plan/pool.h"

namespace express::plan {

void Pool::Reset() {
  for (int64_t i = 0; i < capacity_; ++i) {
    code_[i] = kFree;
    next_[i] = static_cast<Slot>(i + 1 < capacity_ ? i + 1 : kNoSlot);
  }
  odd_weight_ = 0;
  free_ = 0;
  live_ = 0;
  halvings_ = 0;
}

void Pool::Resize(Arena& arena, int64_t known, int64_t capacity) {
  code_ = arena.Take<uint8_t>(capacity);
  next_ = arena.Take<Slot>(capacity);
  capacity_ = capacity;
  for (int64_t i = known; i < capacity; ++i) code_[i] = kFree;
  RebuildFree();
}

void Pool::RebuildFree() {
  Slot* link = &free_;
  for (int64_t i = 0; i < capacity_; ++i) {
    if (code_[i] != kFree) continue;
    *link = static_cast<Slot>(i);
    link = &next_[i];
  }
  *link = kNoSlot;
}

void Pool::Halve(Fifo& from, int64_t count, Fifo& to, Operations& out) {
  const int64_t doubled = 2 * weight(from.head);
  out.Begin(OpKind::kHalve, halvings_++, doubled);
  for (int64_t i = 0; i < count; i += 2) {
    const Slot kept = Pop(from);
    const Slot freed = Pop(from);
    out.AddSlot(kept);
    out.AddSlot(freed);
    SetWeight(kept, doubled);
    Push(to, kept);
    Release(freed);
  }
}

void Reservoir::Absorb(Pool& pool, Slot slot, int64_t weight, Operations& out) {
  weight_ += weight;
  if (slot_ == kNoSlot) {
    slot_ = slot;
    return;
  }
  out.Begin(OpKind::kSample, samples_++, weight, weight_);
  out.AddSlot(slot_);
  out.AddSlot(slot);
  pool.SetWeight(slot_, weight_);
  pool.Release(slot);
}

Reservoir::Candidates Reservoir::AbsorbMany(Pool& pool, int64_t count) {
  if (count <= 0) return {};
  const Candidates taken{count, samples_, weight_ + 1, slot_};
  weight_ += count;
  samples_ += count;
  pool.SetWeight(slot_, weight_);
  return taken;
}

}  // namespace express::plan
