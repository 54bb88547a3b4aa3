#include "ops.h"

#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

// GCC and Clang vectors, as wide as the machine's: wider ones would be taken apart, and their sums not stay in registers.
#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
constexpr int64_t kRows = 12;  // rows of x whose sums are in registers: 2 kRows of 32
#elif defined(__AVX__)
constexpr int64_t kLanes = 8;
constexpr int64_t kRows = 6;  // of 16
#else
constexpr int64_t kLanes = 4;
constexpr int64_t kRows = 6;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr int64_t kPanel = 2 * kLanes;  // outputs of a packed panel: two vectors
constexpr int64_t kFew = 4;             // up to so many rows the product is bounded by reading the weights

Floats Load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
Floats LoadBf16(const uint16_t* p) {
  Halves half;
  std::memcpy(&half, p, sizeof half);
  const Words bits = __builtin_convertvector(half, Words) << 16;
  Floats v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
float Sum(Floats v) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}
float Bf16(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

// y (kCount, kPanel) = x (kCount, inputs) * panel (inputs, kPanel)
template <int64_t kCount>
void MultiplyPanel(const float* x, int64_t inputs, const float* panel, float* y, int64_t outputs) {
  Floats sum[kCount][2] = {};
  for (int64_t i = 0; i < inputs; ++i) {
    const Floats a = Load(panel + i * kPanel), b = Load(panel + i * kPanel + kLanes);
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
        Floats a = {}, b = {};
        for (int64_t i = 0; i < inputs_; i += kPanel) {
          a += LoadBf16(row + i) * Load(x + r * inputs_ + i);
          b += LoadBf16(row + i + kLanes) * Load(x + r * inputs_ + i + kLanes);
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
