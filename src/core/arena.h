// One piece of memory, handed out front to back.
//
// A layout is written once, as a sequence of Take calls, and run twice: over an arena without memory, which only
// counts, and over one of exactly that size. So the bytes a cache reports, solves a budget for and allocates cannot
// differ.
#ifndef EXPRESS_SRC_CORE_ARENA_H_
#define EXPRESS_SRC_CORE_ARENA_H_

#include <cstddef>
#include <cstdint>
#include <limits>

namespace express {

class Arena {
 public:
  static constexpr size_t kAlignment = 64;

  // Where one Take lies.
  struct Piece {
    size_t at, bytes;
  };

  Arena() = default;                                                   // counts only
  explicit Arena(void* memory) : base_(static_cast<char*>(memory)) {}  // aligned to kAlignment
  // Counts, and writes down each Take: at most `capacity`.
  Arena(Piece* pieces, int64_t capacity) : pieces_(pieces), piece_capacity_(capacity) {}

  // Uninitialised room for `count` objects, aligned to kAlignment; nullptr while counting.
  template <class T>
  T* Take(int64_t count) {
    size_t bytes = 0;
    if (count < 0 || __builtin_mul_overflow(static_cast<size_t>(count), sizeof(T), &bytes) ||
        __builtin_add_overflow(bytes, kAlignment - 1, &bytes)) {
      overflow_ = true;
      return nullptr;
    }
    bytes = bytes / kAlignment * kAlignment;
    const size_t at = used_;
    if (piece_count_ < piece_capacity_) pieces_[piece_count_] = {at, bytes};
    ++piece_count_;
    if (__builtin_add_overflow(used_, bytes, &used_) || used_ > kMax) {
      overflow_ = true;
      used_ = kMax;
      return nullptr;
    }
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }

  size_t used() const { return used_; }
  bool overflow() const { return overflow_; }
  int64_t piece_count() const { return piece_count_; }

 private:
  static constexpr size_t kMax = static_cast<size_t>(std::numeric_limits<int64_t>::max()) / 2;
  char* base_ = nullptr;
  Piece* pieces_ = nullptr;
  int64_t piece_capacity_ = 0, piece_count_ = 0;
  size_t used_ = 0;
  bool overflow_ = false;
};

}  // namespace express

#endif  // EXPRESS_SRC_CORE_ARENA_H_
