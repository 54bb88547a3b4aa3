// From a configuration to the setting of every head: checks each field, fills the automatic ones, shares out the
// budget.
#ifndef EXPRESS_SRC_CACHE_RESOLVE_H_
#define EXPRESS_SRC_CACHE_RESOLVE_H_

#include <vector>

#include "express/config.h"
#include "express/status.h"
#include "src/plan/setting.h"

namespace express::cache {

// What a layout depends on. config.rope_frequencies: the caller's, or the cache's own copy.
struct Shape {
  const Config& config;
  int32_t threads;
  const plan::Setting* settings;  // (layers, kv_heads)
  const plan::Setting* largest;   // not null: budgets are observed, and a head may come to have this one
  // (layers, kv_heads): the first head of its layer that each shares a plan with; null: that has the same setting.
  const int32_t* leader = nullptr;
};

// A configuration without automatic values.
struct Resolved {
  Config config;  // no spans but rope_frequencies, which is the caller's
  int32_t threads = 1;
  std::vector<plan::Setting> settings;  // (layers, kv_heads)
  int64_t mean_entries = 0;             // of a KV head
  plan::Setting largest;                // where budgets are observed: of any head, ever
  bool observed() const { return config.head_budgets == HeadBudgets::kObserved; }
  Shape shape() const { return {config, threads, settings.data(), observed() ? &largest : nullptr}; }
};

// Of a configuration without automatic values: whether scores are other than energies of keys as they come.
inline bool WithoutPosition(const Config& c) {
  return c.protection_score == ProtectionScore::kEnergyValue || !c.rope_frequencies.empty();
}

// The base of a head where the mean is `mean`, and, where budgets are observed, the most that one head can get.
int64_t BaseBudget(const Config& config, int64_t mean);
int64_t LargestBudget(const Config& config, int64_t mean, int64_t heads);
// The setting of a head of `budget` entries.
plan::Setting DivideHead(const Config& config, int64_t base, int64_t budget);

// Everything but a budget in bytes, which needs the size of a layout: see create.cc.
Status CheckConfig(const Config& config);
// `config` has passed CheckConfig; `mean` takes the place of its budget.
Status ResolveEntries(const Config& config, int64_t mean, Resolved* resolved);

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_RESOLVE_H_
