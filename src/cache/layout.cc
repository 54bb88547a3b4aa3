// Where the parts of a cache lie, how many bytes that takes, and the largest budget that fits into given bytes.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "src/cache/cache.h"
#include "src/cache/message.h"

namespace express::cache {
namespace {

// Slots of one partial softmax state when a decode attention is split over threads.
int64_t PartialFloats(const Resolved& r) {
  const int64_t group = r.config.query_heads / r.config.kv_heads;
  int64_t most = 0;
  for (int32_t layer = 0; layer < r.config.layers; ++layer) {
    int64_t partials = 0;
    for (int32_t g = 0; g < r.config.kv_heads; ++g)
      partials += SplitCount(r.settings[static_cast<size_t>(layer * r.config.kv_heads + g)].budget);
    most = std::max(most, partials);
  }
  return r.threads > 1 ? most * group * (r.config.value_dim + 2) : 0;
}

void LayoutHead(const Resolved& r, const plan::Setting& setting, Arena& arena, HeadState* head) {
  const Config& c = r.config;
  const int64_t element = SizeOf(c.dtype), capacity = setting.budget;
  cpu::Slab slab{.key = arena.Take<char>(capacity * c.key_dim * element),
                 .value = arena.Take<char>(capacity * c.value_dim * element),
                 .position = arena.Take<int64_t>(capacity),
                 .capacity = capacity,
                 .key_dim = c.key_dim,
                 .value_dim = c.value_dim,
                 .dtype = c.dtype};
  cpu::Protection protection{};
  if (setting.protect > 0) {
    protection.mean = arena.Take<float>(c.key_dim);
    protection.sum = arena.Take<float>(c.key_dim);
    protection.score = arena.Take<float>(setting.protect);
    protection.slot = arena.Take<int32_t>(setting.protect);
    protection.capacity = setting.protect;
  }
  if (head != nullptr) {
    head->slab = slab;
    head->protection = protection;
  }
}

}  // namespace

Parts Cache::Layout(const Resolved& r, Arena& arena) {
  const Config& c = r.config;
  const int64_t heads = int64_t{c.layers} * c.kv_heads;
  arena.Take<Cache>(1);
  Parts parts{};
  parts.heads = arena.Take<HeadState>(heads);
  parts.plan_heads = arena.Take<int32_t>(heads);
  parts.layer_plans = arena.Take<int32_t>(int64_t{c.layers} + 1);
  parts.layer_entries = arena.Take<int64_t>(c.layers);
  parts.layer_peak = arena.Take<int64_t>(c.layers);

  // KV heads of a layer that have the same setting share a plan: head h belongs to the first head of its kind.
  const auto setting = [&](int64_t h) -> const plan::Setting& { return r.settings[static_cast<size_t>(h)]; };
  const auto leader = [&](int64_t h) {
    int64_t first = h / c.kv_heads * c.kv_heads;
    while (!(setting(first) == setting(h))) ++first;
    return first;
  };
  int32_t plan_count = 0;
  for (int64_t h = 0; h < heads; ++h) plan_count += leader(h) == h;
  parts.plan_count = plan_count;
  parts.plans = arena.Take<PlanState>(plan_count);
  parts.batch = arena.Take<BatchItem>(plan_count);

  int64_t max_ops = 0, max_slots = 0, max_list = 2;
  int32_t plan = 0, grouped = 0;
  for (int64_t h = 0; h < heads; ++h) {
    const auto layer = static_cast<int32_t>(h / c.kv_heads);
    if (parts.layer_plans != nullptr && h % c.kv_heads == 0) parts.layer_plans[layer] = plan;
    HeadState* head = parts.heads != nullptr ? &parts.heads[h] : nullptr;
    if (head != nullptr) {
      head->layer = layer;
      head->kv_head = static_cast<int32_t>(h % c.kv_heads);
      head->key = MakeStreamKey(c.seed, static_cast<uint32_t>(c.first_layer + layer),
                                static_cast<uint32_t>(c.first_kv_head + head->kv_head));
    }
    LayoutHead(r, setting(h), arena, head);
    if (leader(h) != h) continue;
    PlanState state{.plan = plan::Plan(setting(h), arena),
                    .log_weight = arena.Take<float>(setting(h).budget),
                    .layer = layer,
                    .first_head = grouped,
                    .head_count = 0,
                    .call_begin = 0};
    for (int64_t other = h; other < (int64_t{layer} + 1) * c.kv_heads; ++other) {
      if (leader(other) != h) continue;
      if (parts.heads != nullptr) {
        parts.heads[other].plan = plan;
        parts.plan_heads[grouped] = static_cast<int32_t>(other);
      }
      ++grouped;
      ++state.head_count;
    }
    max_ops = std::max(max_ops, state.plan.MaxOps());
    max_slots = std::max({max_slots, state.plan.MaxSlots(), setting(h).budget});
    max_list = std::max(max_list, state.plan.MaxList());
    if (parts.plans != nullptr) new (&parts.plans[plan]) PlanState(state);
    ++plan;
  }
  if (parts.layer_plans != nullptr) parts.layer_plans[c.layers] = plan_count;

  // Room for a few tokens of every plan of a layer, or for one with a large halving.
  parts.operations = plan::Operations(arena, 4 * max_ops + 256, max_slots + 1024);
  const size_t halve = cpu::HalveScratchBytes(max_list, c.key_dim, c.value_dim);
  const size_t block = cpu::BlockScratchBytes(c.query_heads / c.kv_heads, c.key_dim, c.value_dim);
  parts.scratch_bytes =
      static_cast<int64_t>((std::max(halve, block) + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment);
  parts.scratch = arena.Take<char>(parts.scratch_bytes * r.threads);
  parts.partial_floats = PartialFloats(r);
  parts.partials = arena.Take<float>(parts.partial_floats);
  return parts;
}

Cache* Cache::Place(const Resolved& resolved, void* memory, int64_t bytes) {
  Arena arena(memory);
  const Parts parts = Layout(resolved, arena);
  return new (memory) Cache(resolved, parts, bytes);
}

namespace {

Status LayoutBytes(const Resolved& resolved, int64_t* bytes) {
  Arena arena;
  Cache::Layout(resolved, arena);
  if (arena.overflow())
    return Error(StatusCode::kSizeOverflow, "config: the cache would take more bytes than can be addressed");
  *bytes = static_cast<int64_t>(arena.used());
  return Status();
}

// The largest mean budget whose layout has at most config.budget bytes. Bytes grow with the budget but for the rounding
// of parts, so a bisection is followed by a look at the next few.
Status SolveBytes(const Config& config, Resolved* resolved, int64_t* bytes) {
  const auto fits = [&](int64_t mean, Status* status) {
    Resolved candidate;
    int64_t size = 0;
    *status = ResolveEntries(config, mean, &candidate);
    if (!status->ok()) return false;
    *status = LayoutBytes(candidate, &size);
    return status->ok() && size <= config.budget;
  };
  const int64_t heads = int64_t{config.layers} * config.kv_heads;
  const int64_t entry = (int64_t{config.key_dim} + config.value_dim) * SizeOf(config.dtype);
  const int64_t most = std::min<int64_t>(config.budget / heads / entry + 1, int64_t{1} << 29);
  Status status;
  // Below the smallest legal budget nothing resolves: find it first.
  int64_t low = 1, high = int64_t{1} << 29;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    Resolved candidate;
    const Status legal = ResolveEntries(config, middle, &candidate);
    if (!legal.ok() && legal.code() != StatusCode::kBudgetTooSmall) return legal;
    (legal.ok() ? high : low) = legal.ok() ? middle : middle + 1;
  }
  if (!fits(low, &status)) {
    if (!status.ok() && status.code() != StatusCode::kBudgetTooSmall) return status;
    Resolved candidate;
    int64_t size = 0;
    if (status.ok() && ResolveEntries(config, low, &candidate).ok() && LayoutBytes(candidate, &size).ok())
      return Error(StatusCode::kBudgetTooSmall, "config.budget: expected at least ", size, " bytes, got ",
                   config.budget);
    return Error(StatusCode::kBudgetTooSmall, "config.budget: ", config.budget,
                 " bytes do not hold the smallest legal cache");
  }
  high = std::max(low, most);
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (fits(middle, &status))
      low = middle;
    else
      high = middle - 1;
  }
  for (int64_t mean = low + 64; mean > low; --mean) {
    if (fits(mean, &status)) {
      low = mean;
      break;
    }
  }
  EXPRESS_RETURN_IF_ERROR(ResolveEntries(config, low, resolved));
  return LayoutBytes(*resolved, bytes);
}

}  // namespace

Status Cache::Resolve(const Config& config, Resolved* resolved, int64_t* bytes) {
  EXPRESS_RETURN_IF_ERROR(CheckConfig(config));
  if (config.budget_unit == BudgetUnit::kBytes) return SolveBytes(config, resolved, bytes);
  EXPRESS_RETURN_IF_ERROR(ResolveEntries(config, config.budget, resolved));
  return LayoutBytes(*resolved, bytes);
}

Status Cache::Size(const Config& config, int64_t* bytes, int64_t* mean_entries) {
  Resolved resolved;
  int64_t size = 0;
  EXPRESS_RETURN_IF_ERROR(Resolve(config, &resolved, &size));
  if (bytes != nullptr) *bytes = size;
  if (mean_entries != nullptr) *mean_entries = resolved.mean_entries;
  return Status();
}

Status Cache::Create(const Config& config, Cache** cache) {
  Resolved resolved;
  int64_t bytes = 0;
  EXPRESS_RETURN_IF_ERROR(Resolve(config, &resolved, &bytes));
  void* memory = std::aligned_alloc(Arena::kAlignment, static_cast<size_t>(bytes));
  if (memory == nullptr) return Error(StatusCode::kOutOfMemory, "config: no memory for a cache of ", bytes, " bytes");
  try {
    *cache = Place(resolved, memory, bytes);
  } catch (...) {
    std::free(memory);
    throw;
  }
  return Status();
}

void Cache::Destroy(Cache* cache) {
  if (cache == nullptr) return;
  cache->~Cache();
  std::free(cache);
}

}  // namespace express::cache
