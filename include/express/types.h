// Enumerations of the public interface. The numbers are those of the C ABI (capi/express.h).
#ifndef EXPRESS_TYPES_H_
#define EXPRESS_TYPES_H_

#include <cstdint>

#if defined(__GNUC__) || defined(__clang__)
#define EXPRESS_EXPORT __attribute__((visibility("default")))
#else
#define EXPRESS_EXPORT
#endif

namespace express {

enum class DType : int32_t {
  kF32 = 0,
  kF16 = 1,
  kBF16 = 2,
  kI8 = 3,    // storage only: 8-bit codes, and a scale for each row
  kI64 = 16,  // positions only
};

enum class DeviceType : int32_t { kCpu = 1, kCuda = 2 };  // numbered as in DLPack

enum class Schedule : int32_t {
  kBudget = 0,  // halve one level when no slot is free
  kRounds = 1,  // the paper's rounds of four
};

enum class Halving : int32_t {
  kKernel = 0,
  kCoin = 1,  // uniform sampling, the baseline
};

enum class HeadBudgets : int32_t {
  kAuto = 0,  // observed where that can be, else fixed
  kFixed = 1,
  kObserved = 2,  // follow the attention that heads are seen to pay to far tokens
};

enum class ProtectionScore : int32_t {
  kAuto = 0,         // kEnergyValue with rotary frequencies and a mean of 640 entries or more, else kEnergy
  kEnergy = 1,       // ||k - mu||^2, of keys without their positions where frequencies are given
  kEnergyValue = 2,  // the same times ||v||
};

enum class RopeLayout : int32_t {
  kHalves = 0,       // pair i is elements (i, pairs + i)
  kInterleaved = 1,  // (2 i, 2 i + 1)
};

enum class BudgetUnit : int32_t { kEntries = 0, kBytes = 1 };

// Bytes of one element.
constexpr int64_t SizeOf(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kI64 ? 8 : dtype == DType::kI8 ? 1 : 2;
}

}  // namespace express

#endif  // EXPRESS_TYPES_H_
