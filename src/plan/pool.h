// Slots, their weights, and first-in first-out lists of them.
#ifndef EXPRESS_SRC_PLAN_POOL_H_
#define EXPRESS_SRC_PLAN_POOL_H_

#include <algorithm>
#include <bit>
#include <cstdint>

#include "src/core/archive.h"
#include "src/core/arena.h"
#include "src/plan/operations.h"

namespace express::plan {

// Slots in the order in which their entries came; linked through Pool::next.
struct Fifo {
  Slot head = kNoSlot;
  Slot tail = kNoSlot;
  int64_t count = 0;
};

// All slots of one plan. weight 0 = free. Weights are powers of two, but for one slot's, that of the open reservoir: a byte says which.
class Pool {
 public:
  Pool(Arena& arena, int64_t capacity)
      : code_(arena.Take<uint8_t>(capacity)), next_(arena.Take<Slot>(capacity)), capacity_(capacity) {}

  void Reset();

  // A free slot, now of weight 1. There is one: the budgets of the parts add up to the capacity.
  Slot Allocate() {
    const Slot slot = free_;
    free_ = next_[slot];
    code_[slot] = kOne;
    ++live_;
    return slot;
  }
  void Release(Slot slot) {
    code_[slot] = kFree;
    next_[slot] = free_;
    free_ = slot;
    --live_;
  }

  // As if the slot, which is in use with weight 1, had been released and allocated again.
  void Renew(Slot slot) { next_[slot] = free_; }

  void Push(Fifo& list, Slot slot) {
    next_[slot] = kNoSlot;
    (list.tail == kNoSlot ? list.head : next_[list.tail]) = slot;
    list.tail = slot;
    ++list.count;
  }
  Slot Pop(Fifo& list) {
    const Slot slot = list.head;
    list.head = next_[slot];
    if (list.head == kNoSlot) list.tail = kNoSlot;
    --list.count;
    return slot;
  }

  template <class Body>
  void ForEach(const Fifo& list, const Body& body) const {
    for (Slot slot = list.head; slot != kNoSlot; slot = next_[slot]) body(slot);
  }

  // Halves the oldest `count` entries (even) of `from`, all of one weight, into `to`.
  void Halve(Fifo& from, int64_t count, Fifo& to, Operations& out);

  // Every slot of the list becomes body(slot), which moves what the pool knows of it.
  template <class Body>
  void Renumber(Fifo& list, const Body& body) {
    Slot* link = &list.head;
    Slot last = kNoSlot;
    while (*link != kNoSlot) {
      last = *link = body(*link);
      link = &next_[last];
    }
    list.tail = last;
  }
  // The lowest free slot at or above *from; *from moves behind it. To be followed by RebuildFree.
  Slot NextFree(Slot* from) const {
    while (code_[*from] != kFree) ++*from;
    return (*from)++;
  }
  void Move(Slot from, Slot to) {
    code_[to] = code_[from];
    next_[to] = next_[from];
    code_[from] = kFree;
  }
  // Slots [0, capacity), of which those from `known` on are new and free. Their memory has room for as many.
  void Resize(Arena& arena, int64_t known, int64_t capacity);
  void RebuildFree();
  // The state of another pool of the same capacity.
  void Assume(const Pool& other) {
    uint8_t* const code = code_;
    Slot* const next = next_;
    *this = other;
    code_ = code;
    next_ = next;
    std::copy_n(other.code_, capacity_, code_);
    std::copy_n(other.next_, capacity_, next_);
  }

  // Of one slot at a time the weight may be none of the powers of two.
  void SetWeight(Slot slot, int64_t weight) {
    const auto bits = static_cast<uint64_t>(weight);
    if (!std::has_single_bit(bits)) odd_weight_ = weight;
    code_[slot] = std::has_single_bit(bits) ? static_cast<uint8_t>(kOne + std::countr_zero(bits)) : kOdd;
  }
  int64_t weight(Slot slot) const {
    const uint8_t code = code_[slot];
    return code == kFree ? 0 : code == kOdd ? odd_weight_ : int64_t{1} << (code - kOne);
  }
  int64_t capacity() const { return capacity_; }
  int64_t live() const { return live_; }
  int64_t halvings() const { return halvings_; }

  void Transfer(Archive& archive) {
    archive.Array(code_, capacity_, capacity_);
    archive.Field(odd_weight_);
    archive.Array(next_, capacity_, capacity_);
    archive.Field(free_);
    archive.Field(live_);
    archive.Field(halvings_);
  }

 private:
  static constexpr uint8_t kFree = 0, kOne = 1, kOdd = 255;

  uint8_t* code_;  // (capacity): kFree, kOne + log2 of the weight, or kOdd
  Slot* next_;     // (capacity): free list and Fifos
  int64_t capacity_;
  int64_t odd_weight_ = 0;  // of the slot with kOdd
  Slot free_ = kNoSlot;
  int64_t live_ = 0;
  int64_t halvings_ = 0;
};

// The open reservoir: one entry that stands for all the weight it has taken in since it was last emptied (DESIGN 3.3).
class Reservoir {
 public:
  // Takes the entry in `slot` of weight `weight` as a candidate.
  void Absorb(Pool& pool, Slot slot, int64_t weight, Operations& out);
  // `count` candidates of weight 1, one after the other, as samples [number, number + count) of which the first has the total
  // `total`. The reservoir is not empty; the candidates' slots are the caller's to free.
  struct Candidates {
    int64_t count, number, total;
    Slot kept;
  };
  Candidates AbsorbMany(Pool& pool, int64_t count);
  // Gives the entry up, with all its weight.
  Slot Take() {
    const Slot slot = slot_;
    slot_ = kNoSlot;
    weight_ = 0;
    return slot;
  }
  int64_t weight() const { return weight_; }  // 0: empty
  Slot slot() const { return slot_; }
  void SetSlot(Slot slot) { slot_ = slot; }
  void Reset() { *this = Reservoir(); }

  void Transfer(Archive& archive) {
    archive.Field(slot_);
    archive.Field(weight_);
    archive.Field(samples_);
  }

 private:
  Slot slot_ = kNoSlot;
  int64_t weight_ = 0;
  int64_t samples_ = 0;
};

}  // namespace express::plan

#endif  // EXPRESS_SRC_PLAN_POOL_H_
