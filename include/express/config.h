// The configuration of a cache. Every field, its unit and its default are documented at express_config in the C ABI
// (express.h); the fields here have the same names and meanings.
#ifndef EXPRESS_CONFIG_H_
#define EXPRESS_CONFIG_H_

#include <span>

#include "express/types.h"

namespace express {

inline constexpr int64_t kAuto = -1;  // "let the library decide"

// The setting of one (layer, KV head), or of all KV heads of one layer.
struct HeadSetting {
  int64_t budget = 0;
  int64_t sinks = kAuto;
  int64_t window = kAuto;
  int64_t protected_entries = kAuto;
};

// Runs body(task, i, worker) for every i in [0, count) and returns when all are done; worker is in [0,
// Config::threads).
using ParallelFor = void (*)(void* context, int64_t count, void (*body)(void* task, int64_t i, int32_t worker),
                             void* task);

struct Config {
  int32_t layers = 1;
  int32_t query_heads = 1;
  int32_t kv_heads = 1;
  int32_t key_dim = 64;
  int32_t value_dim = 64;
  double scale = kAuto;
  DType dtype = DType::kF32;
  DeviceType device_type = DeviceType::kCpu;
  int32_t device_id = 0;
  int32_t first_layer = 0;
  int32_t first_kv_head = 0;

  BudgetUnit budget_unit = BudgetUnit::kEntries;
  int64_t budget = 1024;
  int64_t sinks = 4;
  int64_t window = kAuto;
  int64_t protected_entries = kAuto;
  int64_t rollback_reserve = 0;
  std::span<const float> head_share;           // empty, (layers) or (layers, kv_heads)
  std::span<const HeadSetting> head_settings;  // empty, (layers) or (layers, kv_heads)

  Schedule schedule = Schedule::kBudget;
  Halving halving = Halving::kKernel;
  double weight_exponent = kAuto;
  double gamma = 1.0;
  double tau = 0.1;
  double delta = 0.5;
  double level_fraction = 0.6;
  int64_t level_floor = kAuto;
  int64_t max_levels = kAuto;
  uint64_t seed = 0;

  int32_t prefill_block = 256;
  bool auto_compress = true;
  bool validate = false;
  int32_t threads = kAuto;
  ParallelFor parallel_for = nullptr;
  void* parallel_for_context = nullptr;

  void* stream = nullptr;  // cudaStream_t
  HeadBudgets head_budgets = HeadBudgets::kAuto;
  ProtectionScore protection_score = ProtectionScore::kAuto;
  std::span<const float> rope_frequencies;  // empty, or (pairs): radians per token
  RopeLayout rope_layout = RopeLayout::kHalves;
};

}  // namespace express

#endif  // EXPRESS_CONFIG_H_
