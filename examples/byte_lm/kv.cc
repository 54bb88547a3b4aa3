#include "kv.h"

#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <stdexcept>

namespace {

void Check(express_status status, const char* what) {
  if (status != EXPRESS_STATUS_OK)
    throw std::runtime_error(std::string(what) + ": " + express_status_name(status) + ": " + express_last_error());
}

// A contiguous float32 tensor (n, heads, dim).
struct Tensor3 {
  int64_t shape[3];
  express_tensor tensor;
  Tensor3(const float* data, int64_t n, int64_t heads, int64_t dim)
      : shape{n, heads, dim},
        tensor{const_cast<float*>(data), EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape, nullptr} {}
  Tensor3(const Tensor3&) = delete;
};

int64_t EntryBytesOf(const ModelConfig& model, int32_t dtype) {
  if (dtype == EXPRESS_DTYPE_I8) return 2 * model.head_dim + 4;  // and two scales
  return 2 * model.head_dim * (dtype == EXPRESS_DTYPE_F32 ? 4 : 2);
}

// All that an engine needs of Express: create, then per layer either prefill, or append and attend.
class ExpressKv final : public KvCache {
 public:
  ExpressKv(const ModelConfig& model, const express_config& config)
      : model_(model), entry_bytes_(EntryBytesOf(model, config.dtype)) {
    Check(express_create(&config, &cache_), "express_create");
  }
  ~ExpressKv() override { express_destroy(&cache_); }

  void Attend(int64_t layer, int64_t n, const float* q, const float* k, const float* v, float* out) override {
    const Tensor3 tq(q, n, model_.heads, model_.head_dim), tk(k, n, model_.kv_heads, model_.head_dim),
        tv(v, n, model_.kv_heads, model_.head_dim), to(out, n, model_.heads, model_.head_dim);
    const auto index = static_cast<int32_t>(layer);
    if (n > 1) {
      Check(express_prefill(cache_, index, &tq.tensor, &tk.tensor, &tv.tensor, &to.tensor, nullptr, nullptr),
            "express_prefill");
    } else {
      Check(express_append(cache_, index, &tk.tensor, &tv.tensor), "express_append");
      Check(express_attend(cache_, index, &tq.tensor, &to.tensor, nullptr), "express_attend");
    }
  }
  int64_t BytesPeak() const override { return Stats().bytes_peak; }
  int64_t EntriesPeak() const override { return Stats().entries_peak; }
  int64_t EntryBytes() const override { return entry_bytes_; }

 private:
  express_stats Stats() const {
    express_stats stats = EXPRESS_STATS_INIT;
    Check(express_get_stats(cache_, EXPRESS_AUTO, &stats), "express_get_stats");
    return stats;
  }
  ModelConfig model_;
  int64_t entry_bytes_;
  express_cache* cache_ = nullptr;
};

template <class Value>
Value Choose(const std::string& option, const std::string& given,
             std::initializer_list<std::pair<const char*, Value>> choices) {
  for (const auto& [name, value] : choices)
    if (given == name) return value;
  throw std::runtime_error(option + ": unknown value " + given);
}

std::unique_ptr<KvCache> MakeExpress(const KvOptions& o, const ModelConfig& m, int64_t tokens) {
  express_config c = EXPRESS_CONFIG_INIT;
  c.layers = static_cast<int32_t>(m.layers);
  c.query_heads = static_cast<int32_t>(m.heads);
  c.kv_heads = static_cast<int32_t>(m.kv_heads);
  c.key_dim = c.value_dim = static_cast<int32_t>(m.head_dim);
  c.dtype = Choose<int32_t>(
      "--dtype", o.dtype,
      {{"f32", EXPRESS_DTYPE_F32}, {"f16", EXPRESS_DTYPE_F16}, {"bf16", EXPRESS_DTYPE_BF16}, {"i8", EXPRESS_DTYPE_I8}});
  c.budget_unit = Choose<int32_t>("--budget-unit", o.budget_unit,
                                  {{"entries", EXPRESS_BUDGET_ENTRIES}, {"bytes", EXPRESS_BUDGET_BYTES}});
  c.schedule = Choose<int32_t>("--schedule", o.schedule,
                               {{"budget", EXPRESS_SCHEDULE_BUDGET}, {"rounds", EXPRESS_SCHEDULE_ROUNDS}});
  c.halving =
      Choose<int32_t>("--halving", o.halving, {{"kernel", EXPRESS_HALVING_KERNEL}, {"coin", EXPRESS_HALVING_COIN}});
  c.budget = o.budget;
  c.sinks = o.sinks;
  c.window = o.window;
  c.protected_entries = o.protect;
  c.weight_exponent = o.alpha;
  c.head_budgets = Choose<int32_t>("--head-budgets", o.head_budgets,
                                   {{"auto", EXPRESS_HEAD_BUDGETS_AUTO},
                                    {"fixed", EXPRESS_HEAD_BUDGETS_FIXED},
                                    {"observed", EXPRESS_HEAD_BUDGETS_OBSERVED}});
  // Keys come with their rotary positions: with the frequencies, protected entries are chosen without them.
  std::vector<float> frequencies(static_cast<size_t>(m.head_dim / 2));
  for (size_t i = 0; i < frequencies.size(); ++i)
    frequencies[i] = std::pow(m.theta, -static_cast<float>(2 * i) / static_cast<float>(m.head_dim));
  if (o.rotary) {
    c.rope_frequencies = frequencies.data();
    c.rope_frequency_count = static_cast<int64_t>(frequencies.size());
    c.rope_layout = EXPRESS_ROPE_LAYOUT_HALVES;
  }
  c.protection_score = Choose<int32_t>("--score", o.score,
                                       {{"auto", EXPRESS_PROTECTION_SCORE_AUTO},
                                        {"energy", EXPRESS_PROTECTION_SCORE_ENERGY},
                                        {"energy-value", EXPRESS_PROTECTION_SCORE_ENERGY_VALUE}});
  c.gamma = o.gamma;
  c.tau = o.tau;
  c.seed = o.seed;
  c.prefill_block = static_cast<int32_t>(std::max<int64_t>(1, o.block));
  c.threads = o.threads;
  std::vector<float> share;
  if (o.policy == "exact") {  // everything stays in the window
    c.sinks = c.protected_entries = 0;
    c.window = tokens;
    c.budget = tokens + 5;
    c.budget_unit = EXPRESS_BUDGET_ENTRIES;
    c.schedule = EXPRESS_SCHEDULE_BUDGET;
  } else {
    if (o.policy == "uniform") {
      c.halving = EXPRESS_HALVING_COIN;
      c.protected_entries = 0;
    }
    if (!o.profile.empty()) {
      for (const double mass : ReadProfile(o.profile, m).far_mass)
        share.push_back(static_cast<float>(std::pow(mass, o.power)));
      c.head_share = share.data();
      c.head_share_count = static_cast<int64_t>(share.size());
    }
  }
  return std::make_unique<ExpressKv>(m, c);
}

float Dot(const float* a, const float* b, int64_t n) {
  float sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

std::unique_ptr<KvCache> MakeKv(const KvOptions& o, const ModelConfig& m, int64_t tokens) {
  if (tokens > m.context)
    std::fprintf(stderr, "express-lm: %lld tokens are more than the %lld that the model was trained for\n",
                 static_cast<long long>(tokens), static_cast<long long>(m.context));
  if (o.policy != "window") {
    Choose<int>("--policy", o.policy, {{"exact", 0}, {"uniform", 0}, {"express", 0}});
    return MakeExpress(o, m, tokens);
  }
  if (o.budget_unit != "entries")
    throw std::runtime_error("--budget-unit: the engine's own window cache counts entries only");
  if (o.dtype != "f32") throw std::runtime_error("--dtype: the engine's own window cache stores f32 only");
  const auto heads = static_cast<size_t>(m.layers * m.kv_heads);
  std::vector<int64_t> capacity(heads, o.budget);
  if (!o.profile.empty()) capacity = ProfileBudgets(ReadProfile(o.profile, m), o.budget, o.power);
  return std::make_unique<PlainKv>(m, capacity, o.sinks);
}

PlainKv::PlainKv(const ModelConfig& model, const std::vector<int64_t>& capacity, int64_t sinks, int64_t beyond)
    : model_(model), sinks_(sinks), beyond_(beyond), heads_(capacity.size()) {
  if (sinks < 0) throw std::runtime_error("--sinks: expected at least 0");
  for (const int64_t c : capacity)
    if (c <= sinks) throw std::runtime_error("--budget: every head needs more entries than sinks");
  for (size_t i = 0; i < heads_.size(); ++i) heads_[i].capacity = capacity[i];
}

void PlainKv::Insert(Head& head, const float* k, const float* v) {
  const int64_t dim = model_.head_dim;
  if (head.count < head.capacity) {
    if (head.k.size() == head.k.capacity())  // never more than the capacity
      for (std::vector<float>* x : {&head.k, &head.v})
        x->reserve(
            static_cast<size_t>(std::clamp<int64_t>(2 * head.count, 64, std::max<int64_t>(64, head.capacity)) * dim));
    head.k.insert(head.k.end(), k, k + dim);
    head.v.insert(head.v.end(), v, v + dim);
    ++head.count;
    return;
  }
  const int64_t slot = sinks_ + head.next;
  head.next = (head.next + 1) % (head.capacity - sinks_);
  std::copy_n(k, dim, head.k.begin() + slot * dim);
  std::copy_n(v, dim, head.v.begin() + slot * dim);
}

void PlainKv::Attend(int64_t layer, int64_t n, const float* q, const float* k, const float* v, float* out) {
  const int64_t dim = model_.head_dim, heads = model_.heads, kv_heads = model_.kv_heads, group = heads / kv_heads;
  const float scale = 1 / std::sqrt(static_cast<float>(dim));
  std::vector<double> far(static_cast<size_t>(n * heads), 0.0);
  tbb::parallel_for(int64_t{0}, n * heads, [&](int64_t task) {
    const int64_t t = task / heads, h = task % heads, g = h / group;
    const Head& head = heads_[static_cast<size_t>(layer * kv_heads + g)];
    const float* query = q + (t * heads + h) * dim;
    const int64_t own = t + 1,
                  all = head.count + own;  // what the cache held before this call, then the new tokens up to t
    const auto key = [&](int64_t j) {
      return j < head.count ? head.k.data() + j * dim : k + ((j - head.count) * kv_heads + g) * dim;
    };
    const auto value = [&](int64_t j) {
      return j < head.count ? head.v.data() + j * dim : v + ((j - head.count) * kv_heads + g) * dim;
    };
    thread_local std::vector<float> p;
    p.resize(static_cast<size_t>(all));
    float top = -1e30f, sum = 0;
    for (int64_t j = 0; j < all; ++j) top = std::max(top, p[static_cast<size_t>(j)] = scale * Dot(query, key(j), dim));
    for (float& x : p) sum += x = std::exp(x - top);
    float* to = out + (t * heads + h) * dim;
    std::fill_n(to, dim, 0.0f);
    for (int64_t j = 0; j < all; ++j) {
      const float weight = p[static_cast<size_t>(j)] / sum;
      const float* row = value(j);
      for (int64_t i = 0; i < dim; ++i) to[i] += weight * row[i];
    }
    for (int64_t j = 0; beyond_ > 0 && j < all - 1 - beyond_; ++j)
      far[static_cast<size_t>(task)] += p[static_cast<size_t>(j)] / sum;
  });
  for (int64_t task = 0; beyond_ > 0 && task < n * heads; ++task) {
    Head& head = heads_[static_cast<size_t>(layer * kv_heads + task % heads / group)];
    if (head.count + task / heads < beyond_ + 1) continue;
    head.far_mass += far[static_cast<size_t>(task)];
    ++head.far_queries;
  }
  for (int64_t g = 0; g < kv_heads; ++g)
    for (int64_t t = 0; t < n; ++t)
      Insert(heads_[static_cast<size_t>(layer * kv_heads + g)], k + (t * kv_heads + g) * dim,
             v + (t * kv_heads + g) * dim);
}

int64_t PlainKv::EntriesPeak() const {
  return std::accumulate(heads_.begin(), heads_.end(), int64_t{0},
                         [](int64_t sum, const Head& head) { return sum + head.count; });
}

int64_t PlainKv::BytesPeak() const {
  return std::accumulate(heads_.begin(), heads_.end(), int64_t{0}, [](int64_t sum, const Head& head) {
    return sum + static_cast<int64_t>((head.k.capacity() + head.v.capacity()) * sizeof(float));
  });
}

std::vector<double> PlainKv::FarMass() const {
  std::vector<double> mass;
  for (const Head& head : heads_)
    mass.push_back(head.far_mass / static_cast<double>(std::max<int64_t>(1, head.far_queries)));
  return mass;
}

Profile ReadProfile(const std::string& path, const ModelConfig& model) {
  std::ifstream file(path);
  if (!file) throw std::runtime_error("--profile: cannot read " + path);
  const nlohmann::json json = nlohmann::json::parse(file);
  Profile profile;
  profile.beyond = json.at("beyond");
  for (const auto& layer : json.at("far_mass"))
    for (const double mass : layer) profile.far_mass.push_back(mass);
  if (static_cast<int64_t>(profile.far_mass.size()) != model.layers * model.kv_heads)
    throw std::runtime_error("--profile: " + path + " is not of this model");
  return profile;
}

std::vector<int64_t> ProfileBudgets(const Profile& profile, int64_t mean, double power) {
  const auto heads = static_cast<int64_t>(profile.far_mass.size());
  const int64_t base = mean * 5 / 16, rest = (mean - base) * heads;
  std::vector<double> share;
  for (const double mass : profile.far_mass) share.push_back(std::pow(mass, power));
  const double sum = std::accumulate(share.begin(), share.end(), 0.0);
  std::vector<int64_t> budgets;
  for (const double s : share)
    budgets.push_back(base + static_cast<int64_t>(static_cast<double>(rest) *
                                                  (sum > 0 ? s / sum : 1.0 / static_cast<double>(heads))));
  return budgets;
}
