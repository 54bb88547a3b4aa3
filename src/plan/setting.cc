#include "src/plan/setting.h"

#include <algorithm>

namespace express::plan {

int64_t DefaultLevelFloor(int64_t coreset) { return std::max<int64_t>(2, std::min<int64_t>(64, coreset / 16)); }

int64_t DefaultMaxLevels(int64_t coreset, int64_t level_floor) {
  return std::max<int64_t>(2, std::min(coreset / 4, coreset / (2 * std::max<int64_t>(1, level_floor))));
}

void DivideBudget(int64_t base, const Shares& shares, Setting* setting) {
  const int64_t beyond = std::max<int64_t>(0, setting->budget - base);
  const int64_t fixed = setting->sinks + setting->reserve + 1 + MinCoreset(setting->schedule);
  if (setting->protect < 0) {
    const int64_t share = beyond * shares.protect / 100;
    const int64_t room = setting->budget - fixed - std::max<int64_t>(1, setting->window);
    setting->protect = std::max<int64_t>(0, std::min(share, room));
  }
  if (setting->window < 0) {
    // The base is window but for what must come out of it; so a head at its base keeps the smallest coreset.
    const int64_t share =
        std::min(base, setting->budget) + beyond * shares.window / 100 - setting->sinks - setting->reserve;
    const int64_t room = setting->budget - fixed - setting->protect;
    setting->window = std::max<int64_t>(1, std::min(share, room));
  }
}

SettingError Check(const Setting& setting) {
  constexpr int64_t kMax = int64_t{1} << 29;  // slots are 32-bit
  if (setting.budget < 1 || setting.budget > kMax) return SettingError::kBudget;
  if (setting.sinks < 0 || setting.sinks > kMax) return SettingError::kSinks;
  if (setting.window < 0 || setting.window > kMax) return SettingError::kWindow;
  if (setting.reserve < 0 || setting.reserve > kMax) return SettingError::kReserve;
  if (setting.protect < 0 || setting.protect > kMax) return SettingError::kProtect;
  if (setting.coreset() < MinCoreset(setting.schedule)) return SettingError::kBudget;
  if (setting.schedule == ScheduleKind::kBudget) {
    if (!(setting.level_fraction > 0 && setting.level_fraction < 1)) return SettingError::kFraction;
    if (setting.level_floor < 2 || setting.level_floor > setting.coreset()) return SettingError::kFloor;
    // With more than B'/2 levels a full cache could hold one entry in each, and no pair to halve.
    if (setting.max_levels < 2 || setting.max_levels > setting.coreset() / 2) return SettingError::kLevels;
  }
  return SettingError::kNone;
}

}  // namespace express::plan
