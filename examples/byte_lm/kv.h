// The cache policies: exact, uniform and express through the C ABI of Express; window by plain loops of this engine's
// own.
#pragma once

#include <express.h>

#include <memory>
#include <string>
#include <vector>

#include "model.h"

struct KvOptions {
  std::string policy = "express";       // exact, window, uniform, express
  int64_t budget = 1024;                // mean entries per KV head over all layers, or
  std::string budget_unit = "entries";  // bytes of the whole cache
  std::string profile;                  // file of far masses; empty: the same budget for every head
  double power = 2;                     // budgets beyond the base are shared out in proportion to (far mass)^power
  int64_t sinks = 4, window = EXPRESS_AUTO, protect = EXPRESS_AUTO;
  double alpha = -1, gamma = 1, tau = 0.1;
  std::string schedule = "budget", halving = "kernel", dtype = "f32", head_budgets = "auto", score = "auto";
  bool rotary = true;   // the library is given the model's rotary frequencies
  int64_t block = 256;  // of prefill: its queries share the cache of its start
  int64_t chunk = 0;    // tokens of one call; 0: a block
  uint64_t seed = 0;
  int threads = EXPRESS_AUTO;
};

// A cache for up to `tokens` tokens; says so on stderr if that is more than the model was trained for. Throws
// std::runtime_error with the library's message.
std::unique_ptr<KvCache> MakeKv(const KvOptions& options, const ModelConfig& model, int64_t tokens);

// Keys and values in plain arrays, of all tokens or of sinks and the last ones; also measures far mass.
class PlainKv final : public KvCache {
 public:
  // capacity: (layers, kv_heads) entries, the first `sinks` of them for the first tokens. `beyond` > 0 measures
  // attention mass on tokens more than so many back, which needs a capacity that drops none. Throws unless every
  // capacity exceeds the sinks.
  PlainKv(const ModelConfig& model, const std::vector<int64_t>& capacity, int64_t sinks, int64_t beyond = 0);

  void Attend(int64_t layer, int64_t n, const float* q, const float* k, const float* v, float* out) override;
  int64_t BytesPeak() const override;
  int64_t EntriesPeak() const override;
  int64_t EntryBytes() const override { return 2 * model_.head_dim * static_cast<int64_t>(sizeof(float)); }
  // (layers, kv_heads): mean attention probability on far tokens, over the queries that have any.
  std::vector<double> FarMass() const;

 private:
  struct Head {
    int64_t capacity, count = 0, next = 0;  // next: where the window's ring is overwritten
    std::vector<float> k, v;                // (count, head_dim), grown by doubling up to (capacity, head_dim)
    double far_mass = 0;
    int64_t far_queries = 0;
  };
  void Insert(Head& head, const float* k, const float* v);

  ModelConfig model_;
  int64_t sinks_, beyond_;
  std::vector<Head> heads_;  // (layers, kv_heads)
};

// What `express-lm profile` writes.
struct Profile {
  int64_t beyond = 0;
  std::vector<double> far_mass;  // (layers, kv_heads)
};
Profile ReadProfile(const std::string& path, const ModelConfig& model);
// DESIGN: base 5/16 of the mean, the rest in proportion to (far mass)^power.
std::vector<int64_t> ProfileBudgets(const Profile& profile, int64_t mean, double power);
