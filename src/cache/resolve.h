// From a configuration to the setting of every head: checks each field, fills the automatic ones, shares out the
// budget.
#ifndef EXPRESS_SRC_CACHE_RESOLVE_H_
#define EXPRESS_SRC_CACHE_RESOLVE_H_

#include <vector>

#include "express/config.h"
#include "express/status.h"
#include "src/plan/setting.h"

namespace express::cache {

// A configuration without automatic values. The spans of `config` are not to be used any more.
struct Resolved {
  Config config;
  int32_t threads = 1;
  std::vector<plan::Setting> settings;  // (layers, kv_heads)
  int64_t mean_entries = 0;             // of a KV head
};

// Everything but a budget in bytes, which needs the size of a layout: see create.cc.
Status CheckConfig(const Config& config);
// `config` has passed CheckConfig; `mean` takes the place of its budget.
Status ResolveEntries(const Config& config, int64_t mean, Resolved* resolved);

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_RESOLVE_H_
