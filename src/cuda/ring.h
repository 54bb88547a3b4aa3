// The ring through which plans reach captured kernels: per plan a stretch of device words that the host fills, record after
// record, and that append kernels read in step with a cursor on the device (DESIGN 5).
//
// A record is one token of one plan: {tag of its sequence number, words of the body, flags} and a body of operations. A body
// of length kJump sends the reader to offset 0. Where no record is yet, old words do not look like the next one's tag.
#ifndef EXPRESS_SRC_CUDA_RING_H_
#define EXPRESS_SRC_CUDA_RING_H_

#include <cstdint>

namespace express::cuda {

inline constexpr int32_t kRecordHeader = 3;  // words
inline constexpr int32_t kJump = -1;
constexpr int32_t RecordTag(int32_t sequence) {
  return static_cast<int32_t>(static_cast<uint32_t>(sequence) * 0x9E3779B1u + 0x7F4A7C15u);
}
// Flags.
inline constexpr int32_t kRefresh = 1;  // Head::protect has changed, and which protected entry is the weakest may have
inline constexpr int32_t kHalves = 2;   // there is a kRingHalve among the operations,
inline constexpr int32_t kHalvesLong = 4;  // and one of more than kShortList entries
inline constexpr int32_t kShortList = 16;

// Operations: word 0 is kind | count << 4, then what the kind has; 64-bit numbers take two words, low first. What a token brings is
// written last: all that goes before touches nothing of it.
enum RingOp : int32_t {
  kRingWrite = 1,   // position, slot; the last of a token's record
  kRingCentre = 2,  // count slots
  kRingAdmit = 3,   // ordinal, slot
  kRingSample = 4,  // number, weight, total, float log weight, slot kept, slot freed
  kRingHalve = 5,   // number, float log weight, count slots
  kRingFree = 6,    // count slots
  kRingEvict = 7,   // nothing
  kRingMove = 8,    // count slots, in pairs: from, to
};

inline constexpr int32_t kWriteWords = 4;

// One plan's ring; device memory.
struct Ring {
  int32_t* words;  // (capacity)
  int32_t capacity;
  int32_t heads;      // that execute each record
  int32_t cursor;     // offset of the next record
  int32_t sequence;   // of the last record executed; the next one has sequence + 1
  int32_t arrived;    // heads that are done with the launch in progress
  int32_t* progress;  // (2), host memory: sequence of the last record executed, and whether a replay found none
  // Of a record that is executed in parts (Part), between two of them.
  int64_t position = 0;
  int32_t slot = -1;    // of its write; negative: there is none
  int32_t written = 0;  // sequence of the record that this is of
};

}  // namespace express::cuda

#endif  // EXPRESS_SRC_CUDA_RING_H_
