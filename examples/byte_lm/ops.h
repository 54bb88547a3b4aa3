// Dense arithmetic of the model: matrix products, normalisation, rotary positions. Float32 throughout; weights are kept
// twice, as bfloat16 rows for decoding (bounded by memory) and as packed float32 panels for prefill (bounded by
// arithmetic).
#pragma once

#include <cstdint>
#include <vector>

// y = x W^T for a weight matrix W of shape (outputs, inputs).
class Linear {
 public:
  Linear() = default;
  Linear(const uint16_t* bf16, int64_t outputs, int64_t inputs);  // bf16: (outputs, inputs)

  int64_t outputs() const { return outputs_; }
  int64_t inputs() const { return inputs_; }
  void Row(int64_t output, float* to) const;  // row of W: the embedding of a token, where W is tied
  // x: (n, inputs), y: (n, outputs)
  void Apply(const float* x, int64_t n, float* y) const;

 private:
  void ApplyToFew(const float* x, int64_t n, float* y) const;

  int64_t outputs_ = 0, inputs_ = 0;
  std::vector<uint16_t> rows_;  // (outputs, inputs)
  std::vector<float> panels_;   // (outputs / 32, inputs, 32)
};

// y = x / sqrt(mean(x^2) + eps) * weight.   x, y: (n, dim)
void RmsNorm(const float* x, const float* weight, int64_t n, int64_t dim, float eps, float* y);

// Rotates the pairs (i, i + dim / 2) of every head by its token's angles.   x: (n, heads, dim)   cosine, sine: (n, dim
// / 2)
void Rope(float* x, int64_t n, int64_t heads, int64_t dim, const float* cosine, const float* sine);

// gate = silu(gate) * up
void SwiGlu(float* gate, const float* up, int64_t count);
