// Rotary positions (Su et al., "RoFormer", arXiv:2104.09864): which angles they turn keys by, and their sine and cosine.
//
// A model turns pair i of a key at position p by p * f_i radians, f_i = frequency i: (x, y) -> (x cos - y sin, y cos + x sin). Angles
// are kept as parts of a full turn in 64-bit integers: their product with a position wraps around as angles do and is exact, however
// large the position; and CPU and GPU get the same floats, since nothing but sums and products of floats follows.
#ifndef EXPRESS_SRC_CORE_ROTARY_H_
#define EXPRESS_SRC_CORE_ROTARY_H_

#include <cmath>
#include <cstdint>
#include <numbers>

namespace express {

struct Rotation {
  const uint64_t* turns;  // (pairs): of pair i from one position to the next, in units of 2^-64 of a full turn
  int32_t pairs;          // 0: keys have no rotary positions
  int32_t
      interleaved;  // pair i is elements (2 i, 2 i + 1); otherwise (i, pairs + i). Elements from 2 pairs on are not turned
};

// By what departures are scored: src/cpu/kernels.h says how.
struct Scoring {
  Rotation rotation = {};
  bool without_position = false;  // otherwise nothing else is of interest: energies of keys as they come
  bool value_norm = false;        // the energy times the norm of the value
};

// frequency: radians, of magnitude pi at most.
inline uint64_t TurnsOf(float frequency) {
  const double turns = static_cast<double>(frequency) / (2 * std::numbers::pi);
  return static_cast<uint64_t>(static_cast<int64_t>(std::ldexp(turns, 63))) << 1;  // 2^63 of a whole turn are in range
}

// The angle of a pair at a position, in units of 2^-32 of a full turn.
constexpr uint32_t Phase(uint64_t turns, int64_t position) {
  return static_cast<uint32_t>((turns * static_cast<uint64_t>(position)) >> 32);
}

struct Angle {
  float cos, sin;
};

// To within 2^-22. `Ops` has the sum and the product of two floats, each rounded for itself.
template <class Ops>
constexpr Angle CosSin(uint32_t phase) {
  // A quarter of a turn, and the rest in [-1/8, 1/8) of a turn: x radians. Polynomials of Cephes (S. Moshier), sinf and cosf.
  const uint32_t quarter = (phase + 0x20000000u) >> 30;
  const auto rest = static_cast<int32_t>(phase - (quarter << 30));
  const float x = Ops::Product(static_cast<float>(rest), 0x1.921fb6p-30f);  // 2 pi / 2^32
  const float square = Ops::Product(x, x);
  float s = Ops::Sum(Ops::Product(square, -1.9515295891e-4f), 8.3321608736e-3f);
  s = Ops::Sum(Ops::Product(square, s), -1.6666654611e-1f);
  s = Ops::Sum(Ops::Product(Ops::Product(square, s), x), x);
  float c = Ops::Sum(Ops::Product(square, 2.443315711809948e-5f), -1.388731625493765e-3f);
  c = Ops::Sum(Ops::Product(square, c), 4.166664568298827e-2f);
  c = Ops::Sum(Ops::Product(Ops::Product(square, square), c), Ops::Sum(Ops::Product(square, -0.5f), 1.0f));
  const bool swapped = (quarter & 1) != 0;
  const float cos = swapped ? s : c, sin = swapped ? c : s;
  return {((quarter + 1) & 2) != 0 ? -cos : cos, (quarter & 2) != 0 ? -sin : sin};
}

}  // namespace express

#endif  // EXPRESS_SRC_CORE_ROTARY_H_
