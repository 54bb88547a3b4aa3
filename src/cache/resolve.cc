#include "src/cache/resolve.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <span>
#include <thread>

#include "src/cache/message.h"
#ifdef EXPRESS_WITH_CUDA
#include "src/cache/cuda_cache.h"
#endif

namespace express::cache {
namespace {

constexpr int64_t kMaxEntries = int64_t{1} << 29;  // of one head: slots are 32-bit and operation lists hold a few B
constexpr int64_t kMaxHeads = int64_t{1} << 24;    // layers * kv_heads

template <class T>
Status InRange(const char* field, T value, T low, T high) {
  if (value >= low && value <= high) return Status();  // NaN fails
  return Error(StatusCode::kInvalidArgument, "config.", field, ": expected ", low, " .. ", high, ", got ", value);
}

Status AutoOrAtLeast(const char* field, int64_t value, int64_t low) {
  if (value == kAuto || (value >= low && value <= kMaxEntries)) return Status();
  return Error(StatusCode::kInvalidArgument, "config.", field, ": expected EXPRESS_AUTO or ", low, " .. ", kMaxEntries,
               ", got ", value);
}

Status CheckModel(const Config& c) {
  EXPRESS_RETURN_IF_ERROR(InRange("layers", c.layers, 1, 1 << 20));
  EXPRESS_RETURN_IF_ERROR(InRange("kv_heads", c.kv_heads, 1, 1 << 20));
  EXPRESS_RETURN_IF_ERROR(InRange("query_heads", c.query_heads, 1, 1 << 20));
  if (int64_t{c.layers} * c.kv_heads > kMaxHeads)
    return Error(StatusCode::kSizeOverflow, "config.layers * config.kv_heads: expected at most ", kMaxHeads, ", got ",
                 int64_t{c.layers} * c.kv_heads);
  if (c.query_heads % c.kv_heads != 0)
    return Error(StatusCode::kInvalidArgument, "config.query_heads: expected a multiple of kv_heads = ", c.kv_heads,
                 ", got ", c.query_heads);
  EXPRESS_RETURN_IF_ERROR(InRange("key_dim", c.key_dim, 1, 1024));
  EXPRESS_RETURN_IF_ERROR(InRange("value_dim", c.value_dim, 1, 1024));
  if (c.scale != kAuto && !(c.scale > 0 && c.scale <= 1e6))
    return Error(StatusCode::kInvalidArgument, "config.scale: expected EXPRESS_AUTO or a number in (0, 1e6], got ",
                 c.scale);
  EXPRESS_RETURN_IF_ERROR(InRange("first_layer", c.first_layer, 0, 1 << 30));
  EXPRESS_RETURN_IF_ERROR(InRange("first_kv_head", c.first_kv_head, 0, 1 << 30));
  if (c.dtype != DType::kF32 && c.dtype != DType::kF16 && c.dtype != DType::kBF16 && c.dtype != DType::kI8) {
    const auto number = static_cast<int32_t>(c.dtype);
    if (number > static_cast<int32_t>(DType::kI8) && number < 16)
      return Error(StatusCode::kUnsupported, "config.dtype: ", number,
                   " is reserved, this version stores F32, F16, BF16 or I8");
    return Error(StatusCode::kInvalidArgument, "config.dtype: expected F32 (0), F16 (1), BF16 (2) or I8 (3), got ",
                 number);
  }
  if (c.device_type == DeviceType::kCuda) {
#ifdef EXPRESS_WITH_CUDA
    return CheckCudaConfig(c);
#else
    return Error(StatusCode::kUnsupported, "config.device_type: this library was built without CUDA");
#endif
  }
  if (c.device_type != DeviceType::kCpu)
    return Error(StatusCode::kInvalidArgument, "config.device_type: expected CPU (1) or CUDA (2), got ",
                 static_cast<int32_t>(c.device_type));
  return InRange("device_id", c.device_id, 0, 0);
}

Status CheckArrays(const Config& c) {
  const auto heads = static_cast<size_t>(c.layers) * static_cast<size_t>(c.kv_heads);
  const auto layers = static_cast<size_t>(c.layers);
  const auto count_ok = [&](size_t count) { return count == 0 || count == layers || count == heads; };
  if (!count_ok(c.head_share.size()))
    return Error(StatusCode::kInvalidArgument, "config.head_share_count: expected 0, layers = ", layers,
                 " or layers * kv_heads = ", heads, ", got ", c.head_share.size());
  if (!count_ok(c.head_settings.size()))
    return Error(StatusCode::kInvalidArgument, "config.head_settings_count: expected 0, layers = ", layers,
                 " or layers * kv_heads = ", heads, ", got ", c.head_settings.size());
  if (!c.head_share.empty() && !c.head_settings.empty())
    return Error(StatusCode::kInvalidArgument, "config.head_settings: not together with head_share");
  if (!c.head_settings.empty() && c.budget_unit == BudgetUnit::kBytes)
    return Error(StatusCode::kInvalidArgument,
                 "config.head_settings: budgets are explicit, so budget_unit must be ENTRIES");
  for (size_t i = 0; i < c.head_share.size(); ++i)
    if (!(c.head_share[i] >= 0 && std::isfinite(c.head_share[i])))
      return Error(StatusCode::kInvalidArgument, "config.head_share[", i, "]: expected a finite number >= 0, got ",
                   c.head_share[i]);
  return Status();
}

Status CheckScore(const Config& c) {
  EXPRESS_RETURN_IF_ERROR(InRange("protection_score", static_cast<int32_t>(c.protection_score), 0, 2));
  EXPRESS_RETURN_IF_ERROR(InRange("rope_layout", static_cast<int32_t>(c.rope_layout), 0, 1));
  EXPRESS_RETURN_IF_ERROR(InRange("rope_frequency_count", static_cast<int64_t>(c.rope_frequencies.size()), int64_t{0},
                                  int64_t{c.key_dim / 2}));
  for (size_t i = 0; i < c.rope_frequencies.size(); ++i)
    if (!(std::abs(c.rope_frequencies[i]) <= std::numbers::pi_v<float>))
      return Error(StatusCode::kInvalidArgument, "config.rope_frequencies[", i,
                   "]: expected radians per token, of magnitude pi at most, got ", c.rope_frequencies[i]);
  return Status();
}

Status CheckMethod(const Config& c) {
  EXPRESS_RETURN_IF_ERROR(InRange("schedule", static_cast<int32_t>(c.schedule), 0, 1));
  EXPRESS_RETURN_IF_ERROR(InRange("halving", static_cast<int32_t>(c.halving), 0, 1));
  if (c.weight_exponent != kAuto && !(c.weight_exponent >= 0 && c.weight_exponent <= 1))
    return Error(StatusCode::kInvalidArgument, "config.weight_exponent: expected EXPRESS_AUTO or 0 .. 1, got ",
                 c.weight_exponent);
  EXPRESS_RETURN_IF_ERROR(InRange("gamma", c.gamma, 0.0, 1.0));
  EXPRESS_RETURN_IF_ERROR(InRange("tau", c.tau, 0.0, 1e6));
  if (!(c.delta > 0 && c.delta < 1))
    return Error(StatusCode::kInvalidArgument, "config.delta: expected a number in (0, 1), got ", c.delta);
  if (!(c.level_fraction > 0 && c.level_fraction < 1))
    return Error(StatusCode::kInvalidArgument, "config.level_fraction: expected a number in (0, 1), got ",
                 c.level_fraction);
  EXPRESS_RETURN_IF_ERROR(AutoOrAtLeast("level_floor", c.level_floor, 2));
  EXPRESS_RETURN_IF_ERROR(AutoOrAtLeast("max_levels", c.max_levels, 2));
  if (!c.auto_compress && c.schedule == Schedule::kRounds)
    return Error(StatusCode::kInvalidArgument,
                 "config.auto_compress: the schedule of rounds halves at fixed counts and needs it on");
  return Status();
}

// Parts proportional to the shares that sum to `total`: floors first, then one each to the largest remainders.
std::vector<int64_t> ShareOut(int64_t total, const std::vector<double>& share) {
  const double sum = std::accumulate(share.begin(), share.end(), 0.0);
  std::vector<int64_t> parts(share.size());
  std::vector<size_t> order(share.size());
  std::vector<double> remainder(share.size());
  int64_t given = 0;
  for (size_t i = 0; i < share.size(); ++i) {
    const double part = static_cast<double>(total) * (share[i] / sum);
    parts[i] = std::min(static_cast<int64_t>(part), total - given);
    remainder[i] = part - static_cast<double>(parts[i]);
    given += parts[i];
    order[i] = i;
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return remainder[a] > remainder[b]; });
  for (size_t i = 0; given < total; i = (i + 1) % order.size(), ++given) ++parts[order[i]];
  return parts;
}

// The budgets of all heads, by head_settings, head_share or evenly, and the base of a head.
std::vector<int64_t> BudgetsOfHeads(const Config& c, int64_t mean, int64_t* base) {
  const auto heads = static_cast<size_t>(c.layers) * static_cast<size_t>(c.kv_heads);
  const auto index = [&](size_t head, size_t count) {
    return count == heads ? head : head / static_cast<size_t>(c.kv_heads);
  };
  std::vector<int64_t> budgets(heads, mean);
  if (!c.head_settings.empty()) {
    int64_t total = 0;
    for (size_t i = 0; i < heads; ++i) total += budgets[i] = c.head_settings[index(i, c.head_settings.size())].budget;
    mean = total / static_cast<int64_t>(heads);
  }
  *base = BaseBudget(c, mean);
  if (c.head_share.empty()) return budgets;
  std::vector<double> share(heads);
  for (size_t i = 0; i < heads; ++i) share[i] = c.head_share[index(i, c.head_share.size())];
  if (std::all_of(share.begin(), share.end(), [](double s) { return s == 0; })) return budgets;
  const std::vector<int64_t> parts = ShareOut((mean - *base) * static_cast<int64_t>(heads), share);
  for (size_t i = 0; i < heads; ++i) budgets[i] = *base + parts[i];
  return budgets;
}

Status SettingStatus(plan::SettingError error, const plan::Setting& s, int64_t layer, int64_t kv_head) {
  std::ostringstream where;
  where << " (layer " << layer << ", KV head " << kv_head << ")";
  switch (error) {
    case plan::SettingError::kNone:
      return Status();
    case plan::SettingError::kBudget:
      if (s.budget > kMaxEntries)
        return Error(StatusCode::kInvalidArgument, "config.budget: expected at most ", kMaxEntries,
                     " entries per head, got ", s.budget, where.str());
      return Error(StatusCode::kBudgetTooSmall, "config.budget: expected at least ",
                   s.sinks + s.tail() + s.protect + 1 + plan::MinCoreset(s.schedule), " entries for ", s.sinks,
                   " sinks, a tail of ", s.tail(), ", ", s.protect, " protected and one halving, got ", s.budget,
                   where.str());
    case plan::SettingError::kFloor:
      return Error(StatusCode::kInvalidArgument, "config.level_floor: expected 2 .. ", s.coreset(), ", got ",
                   s.level_floor, where.str());
    case plan::SettingError::kLevels:
      return Error(StatusCode::kInvalidArgument, "config.max_levels: expected 2 .. ", s.coreset() / 2, ", got ",
                   s.max_levels, where.str());
    default:
      return Error(StatusCode::kInvalidArgument, "config: sinks ", s.sinks, ", window ", s.window,
                   ", rollback_reserve ", s.reserve, ", protected ", s.protect, ": expected 0 .. ", kMaxEntries,
                   where.str());
  }
}

// Whether the configuration allows observed budgets; and whether AUTO means them. The heads of one cache share its total: as far as
// it can tell, it has all heads of the model.
bool CanObserve(const Config& c) {
  return int64_t{c.layers} * c.kv_heads > 1 && c.window == kAuto && c.protected_entries == kAuto &&
         c.head_share.empty() && c.head_settings.empty() && c.schedule == Schedule::kBudget && c.auto_compress;
}

bool AutoObserves(const Config& c) {
  return CanObserve(c) && c.device_type == DeviceType::kCpu && c.first_layer == 0 && c.first_kv_head == 0;
}

// Small coresets bring nothing where budgets follow the heads' needs (measured: bench/results/quality/ablation.md), so below this mean
// window and protected entries share what a head has beyond its base.
constexpr int64_t kMeanWithCoreset = 1024;

bool SmallCoresets(const Config& c, int64_t base) {
  return c.head_budgets == HeadBudgets::kObserved && base < BaseBudget(c, kMeanWithCoreset);
}

plan::Shares SharesOf(const Config& c, int64_t base) {
  return SmallCoresets(c, base) ? plan::Shares{.window = 70, .protect = 30} : plan::Shares{};
}

// Where few entries are protected, those with large values would take the places of facts (measured, as above).
constexpr int64_t kMeanWithValues = 640;

ProtectionScore AutoScore(const Config& c, int64_t base) {
  return !c.rope_frequencies.empty() && base >= BaseBudget(c, kMeanWithValues) ? ProtectionScore::kEnergyValue
                                                                               : ProtectionScore::kEnergy;
}

// Four entries that stand for thousands of tokens are worth less than their weights say.
double AutoExponent(const Config& c, int64_t base) { return SmallCoresets(c, base) ? 0.25 : 0.5; }

void DivideCoreset(const Config& c, plan::Setting* s) {
  s->level_fraction = c.level_fraction;
  s->level_floor = c.level_floor != kAuto ? c.level_floor : plan::DefaultLevelFloor(s->coreset());
  s->max_levels = c.max_levels != kAuto ? c.max_levels : plan::DefaultMaxLevels(s->coreset(), s->level_floor);
}

}  // namespace

int64_t BaseBudget(const Config&, int64_t mean) { return mean * 5 / 16; }

int64_t LargestBudget(const Config& c, int64_t mean, int64_t heads) {
  const int64_t base = BaseBudget(c, mean);
  return std::min({8 * mean, base + (mean - base) * heads, kMaxEntries});
}

plan::Setting DivideHead(const Config& c, int64_t base, int64_t budget) {
  plan::Setting s;
  s.schedule = c.schedule == Schedule::kBudget ? plan::ScheduleKind::kBudget : plan::ScheduleKind::kRounds;
  s.budget = budget;
  s.sinks = c.sinks;
  s.window = c.window;
  s.protect = c.protected_entries;
  s.reserve = c.rollback_reserve;
  // Where budgets are observed, every head protects at least one entry: scores need their mean from the beginning on.
  const plan::Shares shares = SharesOf(c, base);
  if (c.head_budgets == HeadBudgets::kObserved)
    s.protect = std::max<int64_t>(1, (budget - base) * shares.protect / 100);
  plan::DivideBudget(base, shares, &s);
  DivideCoreset(c, &s);
  return s;
}

Status CheckConfig(const Config& c) {
  EXPRESS_RETURN_IF_ERROR(CheckModel(c));
  EXPRESS_RETURN_IF_ERROR(InRange("budget_unit", static_cast<int32_t>(c.budget_unit), 0, 1));
  if (c.head_settings.empty()) {
    if (c.budget <= 0)
      return Error(StatusCode::kInvalidArgument, "config.budget: expected a positive number, got ", c.budget);
    if (c.budget_unit == BudgetUnit::kEntries)
      EXPRESS_RETURN_IF_ERROR(InRange("budget", c.budget, int64_t{1}, kMaxEntries));
  }
  EXPRESS_RETURN_IF_ERROR(InRange("sinks", c.sinks, int64_t{0}, kMaxEntries));
  EXPRESS_RETURN_IF_ERROR(AutoOrAtLeast("window", c.window, 0));
  EXPRESS_RETURN_IF_ERROR(AutoOrAtLeast("protected_entries", c.protected_entries, 0));
  EXPRESS_RETURN_IF_ERROR(InRange("rollback_reserve", c.rollback_reserve, int64_t{0}, kMaxEntries));
  EXPRESS_RETURN_IF_ERROR(CheckArrays(c));
  EXPRESS_RETURN_IF_ERROR(CheckMethod(c));
  EXPRESS_RETURN_IF_ERROR(CheckScore(c));
  EXPRESS_RETURN_IF_ERROR(InRange("prefill_block", c.prefill_block, 1, 1 << 20));
  EXPRESS_RETURN_IF_ERROR(InRange("head_budgets", static_cast<int32_t>(c.head_budgets), 0, 2));
  if (c.head_budgets == HeadBudgets::kObserved && !CanObserve(c))
    return Error(StatusCode::kInvalidArgument,
                 "config.head_budgets: OBSERVED needs more than one (layer, KV head), automatic window and "
                 "protected_entries, no head_share or head_settings, schedule BUDGET and auto_compress");
  if (c.threads != kAuto) EXPRESS_RETURN_IF_ERROR(InRange("threads", c.threads, 1, 4096));
  if (c.parallel_for != nullptr && c.threads == kAuto)
    return Error(StatusCode::kInvalidArgument,
                 "config.threads: parallel_for needs the number of its workers, got EXPRESS_AUTO");
  return Status();
}

Status ResolveEntries(const Config& c, int64_t mean, Resolved* resolved) {
  if (c.head_budgets == HeadBudgets::kAuto) {
    Config decided = c;
    decided.head_budgets = HeadBudgets::kObserved;
    if (AutoObserves(c) && ResolveEntries(decided, mean, resolved).ok()) return Status();
    decided.head_budgets = HeadBudgets::kFixed;  // or the base of a head would be too small
    return ResolveEntries(decided, mean, resolved);
  }
  resolved->config = c;
  resolved->config.head_share = {};
  resolved->config.head_settings = {};
  if (c.scale == kAuto) resolved->config.scale = 1.0 / std::sqrt(static_cast<double>(c.key_dim));
  resolved->threads =
      c.threads != kAuto ? c.threads : std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()));

  int64_t base = 0;
  const std::vector<int64_t> budgets = BudgetsOfHeads(c, mean, &base);
  if (c.protection_score == ProtectionScore::kAuto) resolved->config.protection_score = AutoScore(c, base);
  if (c.weight_exponent == kAuto) resolved->config.weight_exponent = AutoExponent(c, base);
  resolved->settings.clear();
  resolved->mean_entries =
      std::accumulate(budgets.begin(), budgets.end(), int64_t{0}) / static_cast<int64_t>(budgets.size());
  for (size_t i = 0; i < budgets.size(); ++i) {
    plan::Setting s = DivideHead(resolved->config, base, budgets[i]);
    if (!c.head_settings.empty()) {
      const HeadSetting& head = c.head_settings.size() == budgets.size()
                                    ? c.head_settings[i]
                                    : c.head_settings[i / static_cast<size_t>(c.kv_heads)];
      for (int64_t value : {head.sinks, head.window, head.protected_entries})
        if (value < kAuto || value > kMaxEntries)
          return Error(StatusCode::kInvalidArgument, "config.head_settings[", i, "]: expected EXPRESS_AUTO or 0 .. ",
                       kMaxEntries, ", got ", value);
      if (head.sinks != kAuto) s.sinks = head.sinks;
      s.window = head.window != kAuto ? head.window : c.window;
      s.protect = head.protected_entries != kAuto ? head.protected_entries : c.protected_entries;
      plan::DivideBudget(base, SharesOf(c, base), &s);
      DivideCoreset(c, &s);
    }
    const auto kv_heads = static_cast<size_t>(c.kv_heads);
    EXPRESS_RETURN_IF_ERROR(
        SettingStatus(plan::Check(s), s, static_cast<int64_t>(i / kv_heads), static_cast<int64_t>(i % kv_heads)));
    resolved->settings.push_back(s);
  }
  if (!resolved->observed()) return Status();
  // A head may come to have its base alone.
  for (const int64_t budget : {base, LargestBudget(resolved->config, mean, static_cast<int64_t>(budgets.size()))}) {
    resolved->largest = DivideHead(resolved->config, base, budget);
    EXPRESS_RETURN_IF_ERROR(SettingStatus(plan::Check(resolved->largest), resolved->largest, 0, 0));
  }
  return Status();
}

}  // namespace express::cache
