// What a plan tells a backend to do: operations on slots, in order.
#ifndef EXPRESS_SRC_PLAN_OPERATIONS_H_
#define EXPRESS_SRC_PLAN_OPERATIONS_H_

#include <cstdint>

#include "src/core/arena.h"

namespace express::plan {

using Slot = int32_t;
inline constexpr Slot kNoSlot = -1;

enum class OpKind : uint8_t {
  kWrite,   // slots[i] takes the token at position number + i, with weight 1
  kCentre,  // the scores of Admit are centred on the mean of slots: the exact tail, before its first departure
  kAdmit,   // slots[0] leaves the exact tail as departure `number` and competes with the weakest protected entry; the
            // loser is in slots[0] afterwards (while the protected set is not full the entry joins it, and stays where
            // it is)
  kSample,  // the reservoir slots[0] of weight total - weight takes slots[1] of weight `weight` as its candidate with
            // probability weight / total, and weighs `total`; slots[1] is free. Sample number `number`
  kHalve,   // slots, oldest first: of each pair (2a, 2a+1) one survives, in slot 2a, and weighs `weight`; slot 2a+1 is
            // free. Halving `number`
  kFree,    // slots are free
  kEvict,  // the weakest protected entry leaves the set; it is in slots[0], the slot protected last, afterwards, and the entry
           // that was there in its place
  kMove,  // the entry in slots[2i] moves to slots[2i+1], which was free; slots[2i] is free
};

struct Op {
  OpKind kind;
  int32_t count;  // of slots
  int64_t first;  // index of the first of them in Operations::slots()
  int64_t number;
  int64_t weight;
  int64_t total;
};

// A list of bounded capacity in memory of the caller's.
class Operations {
 public:
  Operations() = default;
  Operations(Arena& arena, int64_t op_capacity, int64_t slot_capacity)
      : ops_(arena.Take<Op>(op_capacity)),
        slots_(arena.Take<Slot>(slot_capacity)),
        op_capacity_(op_capacity),
        slot_capacity_(slot_capacity) {}

  void Clear() { op_count_ = slot_count_ = 0; }
  bool HasRoom(int64_t ops, int64_t slots) const {
    return op_capacity_ - op_count_ >= ops && slot_capacity_ - slot_count_ >= slots;
  }

  // Begins an operation; its slots follow by AddSlot.
  void Begin(OpKind kind, int64_t number, int64_t weight = 1, int64_t total = 0) {
    ops_[op_count_++] = {kind, 0, slot_count_, number, weight, total};
  }
  void AddSlot(Slot slot) {
    slots_[slot_count_++] = slot;
    ++ops_[op_count_ - 1].count;
  }

  int64_t size() const { return op_count_; }
  Op& back() { return ops_[op_count_ - 1]; }
  const Op& operator[](int64_t i) const { return ops_[i]; }
  const Slot* slots(const Op& op) const { return slots_ + op.first; }

 private:
  Op* ops_ = nullptr;      // (op_capacity)
  Slot* slots_ = nullptr;  // (slot_capacity)
  int64_t op_capacity_ = 0, slot_capacity_ = 0;
  int64_t op_count_ = 0, slot_count_ = 0;
};

}  // namespace express::plan

#endif  // EXPRESS_SRC_PLAN_OPERATIONS_H_
