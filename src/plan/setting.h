// The setting of a plan: numbers of entries, nothing else.
#ifndef EXPRESS_SRC_PLAN_SETTING_H_
#define EXPRESS_SRC_PLAN_SETTING_H_

#include <cstdint>

namespace express::plan {

enum class ScheduleKind : uint8_t { kBudget, kRounds };

// Everything is resolved: no automatic values.
struct Setting {
  int64_t budget = 0;  // B: slots in all
  int64_t sinks = 0;
  int64_t window = 0;
  int64_t reserve = 0;  // rollback reserve
  int64_t protect = 0;  // P
  ScheduleKind schedule = ScheduleKind::kBudget;
  double level_fraction = 0.6;  // c
  int64_t level_floor = 2;
  int64_t max_levels = 2;  // L

  bool operator==(const Setting&) const = default;

  // Slots of the exact tail. At least one: the token that arrives is always exact.
  int64_t tail() const { return window + reserve > 0 ? window + reserve : 1; }
  // B': slots of the weighted entries, without the open reservoir.
  int64_t coreset() const { return budget - sinks - tail() - protect - 1; }
};

inline constexpr int64_t kMinCoresetBudget = 4;
inline constexpr int64_t kMinCoresetRounds = 8;
constexpr int64_t MinCoreset(ScheduleKind schedule) {
  return schedule == ScheduleKind::kBudget ? kMinCoresetBudget : kMinCoresetRounds;
}

// DESIGN 3.5: floor = max(2, min(64, B'/16)), L = max(2, min(B'/4, B'/(2 floor))).
int64_t DefaultLevelFloor(int64_t coreset);
int64_t DefaultMaxLevels(int64_t coreset, int64_t level_floor);

// Parts of what a head has beyond its base, in percent; the coreset has the rest.
struct Shares {
  int64_t window = 60;
  int64_t protect = 28;
};

// How a head with `budget` entries divides them when window or protected entries are automatic (negative). `base` is
// the head's base: protected is its share of what lies beyond the base, window the base and its share of that, less what sinks,
// reservoir and the smallest coreset need of it. The result may still be too small for the schedule; Check says so.
void DivideBudget(int64_t base, const Shares& shares, Setting* setting);

enum class SettingError : uint8_t { kNone, kBudget, kSinks, kWindow, kReserve, kProtect, kFraction, kFloor, kLevels };
// The first field that makes the setting illegal. kBudget: budget below sinks + tail + protect + 1 + the smallest
// coreset.
SettingError Check(const Setting& setting);

}  // namespace express::plan

#endif  // EXPRESS_SRC_PLAN_SETTING_H_
