// A byte-level Llama-style model: loading and the forward pass. The KV cache is somebody else's (kv.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "ops.h"

struct ModelConfig {
  int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, context;
  float eps, theta;
};

// Ingests the keys and values of n new tokens of one layer and attends over everything it keeps, each query to no later
// token.
class KvCache {
 public:
  virtual ~KvCache() = default;
  // q: (n, heads, head_dim)   k, v: (n, kv_heads, head_dim)   out: (n, heads, head_dim)
  virtual void Attend(int64_t layer, int64_t n, const float* q, const float* k, const float* v, float* out) = 0;
  virtual int64_t BytesPeak() const = 0;    // of memory, everything included
  virtual int64_t EntriesPeak() const = 0;  // keys held at most, over all layers and KV heads
  virtual int64_t EntryBytes() const = 0;   // of one key with its value
};

class Model {
 public:
  explicit Model(const std::string& folder);  // config.json and model.safetensors; throws std::runtime_error

  const ModelConfig& config() const { return config_; }

  // Logits (n, vocab) of n tokens that follow `position` earlier ones.
  void Forward(const int32_t* tokens, int64_t n, int64_t position, KvCache& kv, std::vector<float>& logits);

 private:
  struct Layer {
    std::vector<float> attention_norm, mlp_norm;  // (hidden)
    Linear q, k, v, o, gate, up, down;
  };
  void Attention(const Layer& layer, int64_t index, int64_t n, KvCache& kv);
  void Mlp(const Layer& layer, int64_t n);

  ModelConfig config_;
  Linear embedding_;  // (vocab, hidden), tied to the output
  std::vector<float> final_norm_;
  std::vector<Layer> layers_;
  // Scratch of one forward pass.
  std::vector<float> x_, h_, q_, k_, v_, a_, gate_, up_;  // (n, hidden) .. (n, intermediate)
  std::vector<float> cosine_, sine_;                      // (n, head_dim / 2)
};
