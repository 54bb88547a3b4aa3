#include "ops.h"

#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

// GCC and Clang vectors: 16 floats, whatever the machine has is made of it.
typedef float Float16 __attribute__((vector_size(64)));
typedef uint32_t Word16 __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));

constexpr int64_t kPanel = 32;  // outputs of a packed panel: two vectors
constexpr int64_t kRows = 12;   // rows of x whose sums are in registers
constexpr int64_t kFew = 4;     // up to so many rows the product is bounded by reading the weights

Float16 Load(const float* p) {
  Float16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
Float16 LoadBf16(const uint16_t* p) {
  Half16 half;
  std::memcpy(&half, p, sizeof half);
  const Word16 bits = __builtin_convertvector(half, Word16) << 16;
  Float16 v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
float Sum(Float16 v) {
  float sum = 0;
  for (int i = 0; i < 16; ++i) sum += v[i];
  return sum;
}
float Bf16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// y (kCount, panel of 32) = x (kCount, inputs) * panel (inputs, 32)
template <int64_t kCount>
void MultiplyPanel(const float* x, int64_t inputs, const float* panel, float* y, int64_t outputs) {
  Float16 sum[kCount][2] = {};
  for (int64_t i = 0; i < inputs; ++i) {
    const Float16 a = Load(panel + i * kPanel), b = Load(panel + i * kPanel + 16);
    for (int64_t r = 0; r < kCount; ++r) {
      sum[r][0] += a * x[r * inputs + i];
      sum[r][1] += b * x[r * inputs + i];
    }
  }
  for (int64_t r = 0; r < kCount; ++r) std::memcpy(y + r * outputs, sum[r], sizeof sum[r]);
}

}  // namespace

Linear::Linear(const uint16_t* bf16, int64_t outputs, int64_t inputs)
    : outputs_(outputs), inputs_(inputs), rows_(bf16, bf16 + outputs * inputs), panels_(rows_.size()) {
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t i = 0; i < inputs; ++i)
      panels_[static_cast<size_t>((o / kPanel * inputs + i) * kPanel + o % kPanel)] = Bf16(bf16[o * inputs + i]);
}

void Linear::Row(int64_t output, float* to) const {
  for (int64_t i = 0; i < inputs_; ++i) to[i] = Bf16(rows_[static_cast<size_t>(output * inputs_ + i)]);
}

void Linear::ApplyToFew(const float* x, int64_t n, float* y) const {
  constexpr int64_t kGrain = 64;  // outputs of one task
  tbb::parallel_for(int64_t{0}, (outputs_ + kGrain - 1) / kGrain, [&](int64_t task) {
    for (int64_t o = task * kGrain; o < std::min(outputs_, (task + 1) * kGrain); ++o) {
      const uint16_t* row = rows_.data() + o * inputs_;
      for (int64_t r = 0; r < n; ++r) {
        Float16 a = {}, b = {};
        for (int64_t i = 0; i < inputs_; i += 32) {
          a += LoadBf16(row + i) * Load(x + r * inputs_ + i);
          b += LoadBf16(row + i + 16) * Load(x + r * inputs_ + i + 16);
        }
        y[r * outputs_ + o] = Sum(a + b);
      }
    }
  });
}

void Linear::Apply(const float* x, int64_t n, float* y) const {
  if (n <= kFew) return ApplyToFew(x, n, y);
  tbb::parallel_for(int64_t{0}, outputs_ / kPanel, [&](int64_t p) {
    const float* panel = panels_.data() + p * inputs_ * kPanel;
    int64_t r = 0;
    for (; r + kRows <= n; r += kRows)
      MultiplyPanel<kRows>(x + r * inputs_, inputs_, panel, y + r * outputs_ + p * kPanel, outputs_);
    for (; r + 4 <= n; r += 4)
      MultiplyPanel<4>(x + r * inputs_, inputs_, panel, y + r * outputs_ + p * kPanel, outputs_);
    for (; r < n; ++r) MultiplyPanel<1>(x + r * inputs_, inputs_, panel, y + r * outputs_ + p * kPanel, outputs_);
  });
}

void RmsNorm(const float* x, const float* weight, int64_t n, int64_t dim, float eps, float* y) {
  for (int64_t t = 0; t < n; ++t) {
    float squares = 0;
    for (int64_t i = 0; i < dim; ++i) squares += x[t * dim + i] * x[t * dim + i];
    const float scale = 1 / std::sqrt(squares / static_cast<float>(dim) + eps);
    for (int64_t i = 0; i < dim; ++i) y[t * dim + i] = x[t * dim + i] * scale * weight[i];
  }
}

void Rope(float* x, int64_t n, int64_t heads, int64_t dim, const float* cosine, const float* sine) {
  const int64_t half = dim / 2;
  for (int64_t t = 0; t < n; ++t)
    for (int64_t h = 0; h < heads; ++h) {
      float* row = x + (t * heads + h) * dim;
      for (int64_t i = 0; i < half; ++i) {
        const float a = row[i], b = row[i + half], c = cosine[t * half + i], s = sine[t * half + i];
        row[i] = a * c - b * s;
        row[i + half] = b * c + a * s;
      }
    }
}

void SwiGlu(float* gate, const float* up, int64_t count) {
  for (int64_t i = 0; i < count; ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
}
