#include "src/cache/budgets.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "src/cache/cache.h"
#include "src/cache/message.h"

namespace express::cache {

namespace {

// Budgets of heads stand in ratios of about this, and so do the largest and the smallest that get the same.
constexpr double kGrid = 2;

}  // namespace

Budgets LayoutBudgets(const Shape& shape, Arena& arena) {
  if (shape.largest == nullptr) return {};
  const int64_t heads = int64_t{shape.config.layers} * shape.config.kv_heads;
  Budgets out{};
  out.observed = arena.Take<Observed>(heads);
  out.share = arena.Take<double>(heads);
  out.budget = arena.Take<int64_t>(heads);
  out.settings = arena.Take<plan::Setting>(heads);
  out.current = arena.Take<plan::Setting>(heads);
  out.leader = arena.Take<int32_t>(heads);
  out.piece_capacity = 16 * heads + 64;  // more than any layout takes
  out.pieces = arena.Take<Arena::Piece>(2 * out.piece_capacity);
  return out;
}

namespace {

// What parts that are whole numbers have left, or have taken too much by rounding: to all heads of a share or none.
void GiveRest(int64_t left, int64_t most, int64_t heads, double* share, int64_t* budget) {
  for (int64_t first = 0; first < heads && left != 0; ++first) {
    if (share[first] < 0) continue;
    const double same = share[first];
    const int64_t count = std::count(share + first, share + heads, same);
    const int64_t more = left < 0 ? -1 : left >= count && budget[first] < most ? 1 : 0;
    if (more != 0)
      for (int64_t h = first; h < heads; ++h)
        if (share[h] == same) budget[h] += more;
    left -= more * count;
    std::replace(share + first, share + heads, same, -1.0);
  }
}

}  // namespace

void ShareOut(int64_t total, int64_t base, int64_t most, int64_t heads, double* share, int64_t* budget) {
  int64_t left = total - heads * base, open = heads;  // to be shared out, among heads below the most
  std::fill_n(budget, heads, -1);
  for (bool again = true; again;) {
    again = false;
    double sum = 0;
    for (int64_t h = 0; h < heads; ++h)
      if (budget[h] < 0) sum += share[h];
    const auto part = [&](int64_t h) {
      return sum > 0 ? static_cast<double>(left) * (share[h] / sum)
                     : static_cast<double>(left) / static_cast<double>(open);
    };
    // One share at a time, the largest first: what others get grows with it.
    int64_t largest = -1;
    for (int64_t h = 0; h < heads; ++h)
      if (budget[h] < 0 && (largest < 0 || share[h] > share[largest])) largest = h;
    if (largest >= 0 && part(largest) >= static_cast<double>(most - base)) {
      const double full = share[largest];
      for (int64_t h = 0; h < heads; ++h) {
        if (budget[h] >= 0 || share[h] != full) continue;
        budget[h] = most;
        left -= most - base;
        --open;
      }
      again = true;
      continue;
    }
    int64_t given = 0;
    for (int64_t h = 0; h < heads; ++h) {
      if (budget[h] >= 0) {
        share[h] = -1;  // full
        continue;
      }
      budget[h] = base + static_cast<int64_t>(part(h));
      given += budget[h] - base;
    }
    left -= given;
  }
  GiveRest(left, most, heads, share, budget);
}

void JoinShares(int64_t base, int64_t heads, int64_t* budget, double* share) {
  const auto low = static_cast<double>(base) / std::sqrt(kGrid);  // of the first kind
  for (int64_t h = 0; h < heads; ++h) {
    int64_t kind = 0;
    for (double end = low * kGrid; static_cast<double>(budget[h]) > end; end *= kGrid) ++kind;
    budget[h] = kind;
  }
  constexpr int64_t kDone = -1;
  for (int64_t first = 0; first < heads; ++first) {
    const int64_t kind = budget[first];
    if (kind == kDone) continue;
    double sum = 0, count = 0;
    for (int64_t h = first; h < heads; ++h)
      if (budget[h] == kind) sum += share[h], count += 1;
    for (int64_t h = first; h < heads; ++h)
      if (budget[h] == kind) share[h] = sum / count, budget[h] = kDone;
  }
}

// Those that go down, the lowest first, then those that go up, the highest first: none lands on one that has still to move.
void MovePieces(char* memory, const Arena::Piece* from, const Arena::Piece* to, int64_t count) {
  const auto move = [&](int64_t i) {
    std::memmove(memory + to[i].at, memory + from[i].at, std::min(from[i].bytes, to[i].bytes));
  };
  for (int64_t i = 0; i < count; ++i)
    if (to[i].at < from[i].at) move(i);
  for (int64_t i = count - 1; i >= 0; --i)
    if (to[i].at > from[i].at) move(i);
}

void Cache::ResetBudgets() {
  std::fill_n(budgets_.observed, HeadCount(), Observed{});
  observation_closed_ = 0;
  next_settling_ = mean_budget_ - mean_budget_ / 16;  // just before an equal share is full
}

// A step of all layers is about to begin, and the plans can be changed.
bool Cache::AtStepBoundary() const {
  const int64_t tokens = LayerTokens(0);
  for (int32_t layer = 1; layer < config_.layers; ++layer)
    if (LayerTokens(layer) != tokens) return false;
  return CanResize();
}

// By the third power of the mean far mass. False if there is none: the engine attends by itself, or nobody looks far.
bool Cache::TakeShares() {
  double sum = 0;
  for (int32_t h = 0; h < HeadCount(); ++h) {
    const Observed& seen = budgets_.observed[h];
    const double mass =
        seen.tokens > 0 ? static_cast<double>(seen.far) / kFarUnit / static_cast<double>(seen.tokens) : 0;
    budgets_.share[h] = mass * mass * mass;
    sum += budgets_.share[h];
  }
  return sum > 0;
}

// What is due at the beginning of a call that appends.
Status Cache::SettleBudgets() {
  if (budgets_.observed == nullptr) return Status();
  const int64_t tokens = LayerTokens(0), due = observation_closed_ != 0 ? next_settling_ : ObservationEnd(mean_budget_);
  if (tokens < due || !AtStepBoundary()) return Status();
  if (observation_closed_ == 0) {
    EXPRESS_RETURN_IF_ERROR(CloseObservation());
    observation_closed_ = 1;
    if (tokens < next_settling_) return Status();
  }
  EXPRESS_RETURN_IF_ERROR(AwaitObservation());
  const int64_t largest = LargestBudget(config_, mean_budget_, HeadCount());
  const int64_t most = std::min(largest, 2 * tokens);  // soon no head has more to hold
  next_settling_ = most < largest ? std::max(2 * mean_budget_, 2 * tokens) : std::numeric_limits<int64_t>::max();
  const int32_t heads = HeadCount();
  if (!TakeShares()) return Status();
  const int64_t base = BaseBudget(config_, mean_budget_);
  ShareOut(mean_budget_ * heads, base, largest, heads, budgets_.share, budgets_.budget);
  TakeShares();
  JoinShares(base, heads, budgets_.budget, budgets_.share);  // by what heads get in the end: the same heads every time
  ShareOut(mean_budget_ * heads, base, most, heads, budgets_.share, budgets_.budget);
  for (int32_t h = 0; h < heads; ++h) budgets_.settings[h] = DivideHead(config_, base, budgets_.budget[h]);
  for (int32_t h = 0; h < heads; ++h) {
    int32_t first = h / config_.kv_heads * config_.kv_heads;
    while (plans_.head_plan[first] != plans_.head_plan[h] || !(budgets_.settings[first] == budgets_.settings[h]))
      ++first;
    budgets_.leader[h] = first;
  }
  broken_ = true;
  EXPRESS_RETURN_IF_ERROR(ResizeHeads());
  broken_ = false;
  return Status();
}

// The budgets of a new cache, for one without tokens.
Status Cache::EqualHeads() {
  if (budgets_.observed == nullptr) return Status();
  std::fill_n(budgets_.settings, HeadCount(), DivideHead(config_, BaseBudget(config_, mean_budget_), mean_budget_));
  for (int32_t h = 0; h < HeadCount(); ++h) budgets_.leader[h] = h / config_.kv_heads * config_.kv_heads;
  return ResizeHeads();
}

// To budgets_.settings, and to plans by budgets_.leader: of a cache with tokens heads of one plan may go apart, not the other way.
Status Cache::ResizeHeads() {
  bool splits = false;
  for (int32_t h = 0; h < HeadCount(); ++h) {
    budgets_.current[h] = HeadSettingOf(h);
    splits = splits || budgets_.leader[h] != LeaderOf(h);
  }
  if (!ResizeFits())
    return Error(StatusCode::kInternal, "config.head_budgets: the new budgets do not fit into the cache's memory");
  if (splits && !HoldsNothing()) EXPRESS_RETURN_IF_ERROR(SplitPlans());
  EXPRESS_RETURN_IF_ERROR(GiveUpAndCompact());
  EXPRESS_RETURN_IF_ERROR(FinishResize());
  CountEntries(0, config_.layers);
  return Status();
}

bool Cache::HoldsNothing() const {
  for (int32_t i = 0; i < plans_.plan_count; ++i)
    if (plans_.plans[i].plan.live() > 0) return false;
  return true;
}

// One plan after the other.
Status Cache::GiveUpAndCompact() {
  plan::Operations& operations = plans_.operations;
  for (int32_t index = 0; index < plans_.plan_count; ++index) {
    PlanState& state = plans_.plans[index];
    plan::Plan& plan = state.plan;
    const plan::Setting& next = NextSetting(index);
    for (int32_t i = 0; i < state.head_count; ++i) BeginResize(plans_.plan_heads[state.first_head + i], next);
    for (bool more = true; more;) {
      operations.Clear();
      while (more && operations.HasRoom(plan.MaxOps(), plan.MaxSlots())) more = plan.GiveUp(next, operations);
      EXPRESS_RETURN_IF_ERROR(ExecuteOperations(index));
    }
    operations.Clear();
    plan.Compact(next.budget, operations);
    EXPRESS_RETURN_IF_ERROR(ExecuteOperations(index));
  }
  return Status();
}

}  // namespace express::cache
