// The scalar references of the CPU kernels, in double, to be read beside the formulas. The kernels are tested against
// these, and nothing else calls them. Matrices are row-major.
#ifndef EXPRESS_SRC_CPU_REFERENCE_H_
#define EXPRESS_SRC_CPU_REFERENCE_H_

#include <cstdint>
#include <vector>

#include "src/core/random.h"
#include "src/cpu/kernels.h"

namespace express::reference {

struct Matrix {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<double> data;  // (rows, columns)

  Matrix() = default;
  Matrix(int64_t r, int64_t c) : rows(r), columns(c), data(static_cast<size_t>(r * c)) {}
  double* row(int64_t i) { return data.data() + i * columns; }
  const double* row(int64_t i) const { return data.data() + i * columns; }
};

// ---- 8-bit storage ----

// Row x in codes: scale = the smallest bfloat16 that is not below max |x| / 127 (in f32, and at least the smallest normal
// number), code = x / scale (in f32) to the nearest, ties to even. Zeros: scale 0. Anything not finite: scale NaN. Codes are 0
// in both cases.
struct Quantised {
  double scale;
  std::vector<int> code;
};
Quantised Quantise(const std::vector<float>& x);

// ---- halving (DESIGN 3.1) ----

// What was decided about pair a, before the complement.
struct Decision {
  bool keep_y;
  bool coin;         // by a fair coin: the first pair, t_a = 0, or the coin mode
  double sum;        // S_a
  double threshold;  // t_a
  double draw;       // u, or r when a coin decided
  // |u - S_a| over the root of the sum of the squares of what S_a is made of, each term counted as often as its
  // exponent is large (its rounding error grows so). Arithmetic in f32 may decide otherwise where this is of the order
  // of 2^-24. Infinite for a coin that does not depend on rounding, 0 where D_aa = 0.
  double margin;
};

struct Halved {
  std::vector<Decision> decisions;  // (pairs)
  bool complement;
  std::vector<int64_t> kept;  // (pairs): index in the list of what pair a keeps, after the complement
};

// Halves the list of keys (2h, key_dim) and values (2h, value_dim).
Halved Halve(const Matrix& key, const Matrix& value, const cpu::HalveParams& params, const StreamKey& stream,
             uint64_t number);

// ---- attention (DESIGN 2) ----

struct Attention {
  std::vector<double> out;  // (value_dim)
  double lse;
};

// One query (key_dim), not yet scaled, over the entries whose log weight is not -inf:
//   logit_j = scale <q, k_j> + exponent * log_weight_j,  out = sum_j softmax(logit)_j v_j,  lse = log sum_j e^logit_j
Attention Attend(const double* q, double scale, const Matrix& key, const Matrix& value,
                 const std::vector<float>& log_weight, double exponent);

// Query token t of a block sees the live entries of the slab and the block's own keys 0 .. t with weight 1.
Attention AttendCausal(const double* q, double scale, const Matrix& key, const Matrix& value,
                       const std::vector<float>& log_weight, double exponent, const Matrix& block_key,
                       const Matrix& block_value, int64_t t);

// ---- protected entries (DESIGN 3.5) ----

// R(position)^-1 k: a model has turned pair i of the key at position p by p * frequency i,
//   x = x' cos - y' sin,  y = y' cos + x' sin.
std::vector<double> WithoutPosition(const double* key, int64_t key_dim, int64_t position,
                                    const std::vector<float>& frequency, bool interleaved);

// The P departures with the largest ||k - mu||^2 * factor at the time of their departure, ties to the older. For the energy the
// factor is 1; for the other score k has no rotary position and the factor is ||v||.
class Protected {
 public:
  // `tail` are the keys of the exact tail at the first departure.
  Protected(int64_t capacity, const Matrix& tail);

  // The next departure. Returns the departure (0-based) that is unprotected from now on: this one, an earlier one that
  // it displaces, or -1 while there is room.
  int64_t Depart(const double* key, double factor = 1);

  const std::vector<int64_t>& members() const { return members_; }  // departures, oldest first
  double score(int64_t departure) const { return score_[static_cast<size_t>(departure)]; }

 private:
  size_t capacity_;
  std::vector<double> mean_;   // mu
  std::vector<double> sum_;    // of the keys of the running run of departures
  std::vector<double> score_;  // of every departure
  std::vector<int64_t> members_;
};

}  // namespace express::reference

#endif  // EXPRESS_SRC_CPU_REFERENCE_H_
