// The storage types as scalars, and a switch from a DType to one of them.
#ifndef EXPRESS_SRC_CPU_SCALAR_H_
#define EXPRESS_SRC_CPU_SCALAR_H_

#include <bit>
#include <cstdint>
#include <type_traits>

#include "express/types.h"

namespace express::cpu {

#if defined(__aarch64__) && !defined(__clang__)
typedef __fp16 Half;  // g++ 12 has no _Float16 here
#else
__extension__ typedef _Float16 Half;
#endif
struct BFloat16 {
  uint16_t bits;
};
// An element of a row that is stored in 8 bits: its number, once multiplied by the row's scale.
struct Int8 {
  int8_t code;
};
template <class T>
inline constexpr bool kScaled = std::is_same_v<T, Int8>;

inline constexpr float kLog2E = 1.44269504088896341f;
// Products of finite queries and keys beyond this count as this: differences of two logits must not overflow.
inline constexpr float kLargestLogit = 1e38f;

inline float ToFloat(float x) { return x; }
inline float ToFloat(Half x) { return static_cast<float>(x); }
inline float ToFloat(Int8 x) { return x.code; }  // not scaled
inline float ToFloat(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Rounds to nearest even; NaN stays NaN.
inline BFloat16 ToBFloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

inline void FromFloat(float x, float* to) { *to = x; }
inline void FromFloat(float x, Half* to) { *to = static_cast<Half>(x); }
inline void FromFloat(float x, BFloat16* to) { *to = ToBFloat16(x); }

// body(T()) with the type that stores `dtype`, one of the three floating ones.
template <class Body>
auto WithType(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kF16:
      return body(Half());
    case DType::kBF16:
      return body(BFloat16());
    default:
      return body(float());
  }
}
// The same for what slabs hold: of the floating types, or in 8 bits.
template <class Body>
auto WithStorage(DType dtype, const Body& body) {
  return dtype == DType::kI8 ? body(Int8()) : WithType(dtype, body);
}

}  // namespace express::cpu

#endif  // EXPRESS_SRC_CPU_SCALAR_H_
