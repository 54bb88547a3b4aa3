// Where the parts of a CPU cache lie, and its life.
#include "src/cache/cpu_cache.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>

#include "src/cache/message.h"

namespace express::cache {
namespace {

// Slots of one partial softmax state when a decode attention is split over threads.
int64_t PartialFloats(const Shape& r) {
  const int64_t group = r.config.query_heads / r.config.kv_heads;
  int64_t most = r.largest != nullptr ? SplitCount(r.largest->budget) * r.config.kv_heads : 0;
  for (int32_t layer = 0; layer < r.config.layers; ++layer) {
    int64_t partials = 0;
    for (int32_t g = 0; g < r.config.kv_heads; ++g)
      partials += SplitCount(r.settings[layer * r.config.kv_heads + g].budget);
    most = std::max(most, partials);
  }
  return r.threads > 1 ? most * group * (r.config.value_dim + 2) : 0;
}

void LayoutHead(const Shape& r, const plan::Setting& setting, Arena& arena, HeadState* head) {
  const Config& c = r.config;
  const int64_t element = SizeOf(c.dtype), capacity = setting.budget;
  cpu::Slab slab{.key = arena.Take<char>(capacity * c.key_dim * element),
                 .value = arena.Take<char>(capacity * c.value_dim * element),
                 .position = arena.Take<int64_t>(capacity),
                 .capacity = capacity,
                 .key_dim = c.key_dim,
                 .value_dim = c.value_dim,
                 .dtype = c.dtype};
  if (cpu::ScaleBytes(c.dtype) > 0) slab.scale = arena.Take<cpu::RowScales>(capacity);
  cpu::Protection protection{};
  if (setting.protect > 0) {
    protection.mean = arena.Take<float>(c.key_dim);
    protection.sum = arena.Take<float>(c.key_dim);
    protection.score = arena.Take<float>(setting.protect);
    protection.slot = arena.Take<int32_t>(setting.protect);
    protection.capacity = setting.protect;
  }
  if (head == nullptr) return;
  head->slab = slab;
  protection.count = head->protection.count;
  protection.weakest = head->protection.weakest;
  head->protection = protection;
}

// Where budgets are observed: what another division of the same total can take more, by rounding.
int64_t ResizeSlack(const Shape& r) {
  return r.largest != nullptr ? int64_t{r.config.layers} * r.config.kv_heads * 1024 : 0;
}

}  // namespace

CpuParts CpuCache::Layout(const Shape& r, PlanSource source, Arena& arena) {
  const Config& c = r.config;
  const int64_t heads = int64_t{c.layers} * c.kv_heads;
  arena.Take<CpuCache>(1);
  CpuParts parts{};
  parts.scoring = LayoutScoring(c, arena);
  parts.budgets = LayoutBudgets(r, arena);
  parts.plans = LayoutPlans(r, true, source, arena);
  parts.heads = arena.Take<HeadState>(heads);
  parts.batch = arena.Take<BatchItem>(parts.plans.plan_capacity);
  for (int64_t h = 0; h < heads; ++h) {
    HeadState* head = parts.heads != nullptr ? &parts.heads[h] : nullptr;
    if (head != nullptr) {
      head->layer = static_cast<int32_t>(h / c.kv_heads);
      head->kv_head = static_cast<int32_t>(h % c.kv_heads);
      head->plan = parts.plans.head_plan[h];
      head->key = MakeStreamKey(c.seed, static_cast<uint32_t>(c.first_layer + head->layer),
                                static_cast<uint32_t>(c.first_kv_head + head->kv_head));
    }
    LayoutHead(r, r.settings[h], arena, head);
  }
  const size_t halve = cpu::HalveScratchBytes(parts.plans.max_list, c.key_dim, c.value_dim);
  const size_t block = cpu::BlockScratchBytes(c.query_heads / c.kv_heads, c.key_dim, c.value_dim);
  const auto aligned = [](size_t bytes) {
    return static_cast<int64_t>((bytes + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment);
  };
  parts.lse_offset = aligned(block);
  const int64_t lse_bytes =
      r.largest != nullptr ? int64_t{c.prefill_block} * (c.query_heads / c.kv_heads) * int64_t{sizeof(float)} : 0;
  parts.scratch_bytes = std::max(aligned(halve), parts.lse_offset + aligned(static_cast<size_t>(lse_bytes)));
  parts.scratch = arena.Take<char>(parts.scratch_bytes * r.threads);
  parts.partial_floats = PartialFloats(r);
  parts.partials = arena.Take<float>(parts.partial_floats);
  return parts;
}

CpuCache::CpuCache(const Resolved& resolved, const CpuParts& parts, int64_t bytes)
    : Cache(resolved, parts.scoring, parts.plans, parts.budgets, bytes, TensorCheck()),
      parts_(parts),
      threads_(resolved.threads, resolved.config.parallel_for, resolved.config.parallel_for_context),
      halve_{.scale = static_cast<float>(config_.scale),
             .gamma = static_cast<float>(config_.gamma),
             .tau = static_cast<float>(config_.tau),
             .delta = static_cast<float>(config_.delta),
             .coin = config_.halving == Halving::kCoin},
      largest_(resolved.largest) {
  ResetHeads();
}

void CpuCache::ResetHeads() {
  for (int32_t i = 0; i < plans_.plan_count; ++i)
    std::fill_n(plans_.plans[i].log_weight, plans_.plans[i].plan.setting().budget,
                -std::numeric_limits<float>::infinity());
  for (int64_t h = 0; h < int64_t{config_.layers} * config_.kv_heads; ++h) {
    cpu::Protection& protection = parts_.heads[h].protection;
    protection.count = protection.weakest = 0;
    if (protection.capacity > 0) {
      std::fill_n(protection.mean, config_.key_dim, 0.0f);
      std::fill_n(protection.sum, config_.key_dim, 0.0f);
    }
  }
  compress_nanoseconds_ = 0;
}

// ---- observed budgets ----

Shape CpuCache::ShapeOf(const plan::Setting* settings) const {
  return {config_, threads_.count(), settings, &largest_, budgets_.leader};
}

bool CpuCache::ResizeFits() const {
  Arena arena;
  Layout(ShapeOf(budgets_.settings), PlanSource::kNew, arena);
  return static_cast<int64_t>(arena.used()) <= bytes_ && arena.piece_count() <= budgets_.piece_capacity;
}

void CpuCache::BeginResize(int32_t index, const plan::Setting& next) {
  cpu::Protection& protection = parts_.heads[index].protection;
  protection.capacity = std::min(protection.capacity, next.protect);
  cpu::FindWeakest(protection, parts_.heads[index].slab);
}

Status CpuCache::SplitPlans() {
  Arena arena(this);
  parts_ = Layout(ShapeOf(budgets_.current), PlanSource::kSplit, arena);
  plans_ = parts_.plans;
  return Status();
}

Status CpuCache::FinishResize() {
  const bool empty = HoldsNothing();
  Arena::Piece* const from = budgets_.pieces;
  Arena::Piece* const to = from + budgets_.piece_capacity;
  Arena now(from, budgets_.piece_capacity), next(to, budgets_.piece_capacity);
  Layout(ShapeOf(budgets_.current), PlanSource::kNew, now);
  Layout(ShapeOf(budgets_.settings), PlanSource::kNew, next);
  MovePieces(reinterpret_cast<char*>(this), from, to, now.piece_count());
  Arena arena(this);
  parts_ = Layout(ShapeOf(budgets_.settings), empty ? PlanSource::kNew : PlanSource::kResized, arena);
  plans_ = parts_.plans;
  for (int32_t h = 0; h < HeadCount(); ++h) {
    PlanState& state = plans_.plans[plans_.head_plan[h]];
    if (LeaderOf(h) == h) {
      if (empty) state.plan.Reset();
      const int64_t after = budgets_.settings[h].budget,
                    known = empty ? 0 : std::min(budgets_.current[h].budget, after);
      std::fill(state.log_weight + known, state.log_weight + after, -std::numeric_limits<float>::infinity());
    }
    cpu::Protection& protection = parts_.heads[h].protection;
    for (int64_t i = 0; i < protection.count; ++i) protection.slot[i] = state.plan.protected_slot(i);
  }
  return Status();
}

Status CpuCache::ResetData() {
  ResetHeads();
  return Status();
}

Status CpuCache::DoSetStream(void*) {
  return Error(StatusCode::kUnsupported, "stream: this cache is on the CPU, where calls return when they are done");
}

CpuCache* CpuCache::Place(const Resolved& resolved, void* memory, int64_t bytes) {
  Arena arena(memory);
  const CpuParts parts = Layout(resolved.shape(), PlanSource::kNew, arena);
  return new (memory) CpuCache(resolved, parts, bytes);
}

Status CpuCache::Bytes(const Resolved& resolved, int64_t* bytes) {
  Arena arena;
  Layout(resolved.shape(), PlanSource::kNew, arena);
  if (arena.overflow())
    return Error(StatusCode::kSizeOverflow, "config: the cache would take more bytes than can be addressed");
  *bytes = static_cast<int64_t>(arena.used()) + ResizeSlack(resolved.shape());
  return Status();
}

Status CpuCache::Create(const Resolved& resolved, int64_t bytes, Cache** cache) {
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

void CpuCache::Delete() {
  this->~CpuCache();
  std::free(this);
}

// In place.
Status CpuCache::OpenHead(int32_t index, bool, void*, HeadArrays* arrays) const {
  const HeadState& head = parts_.heads[index];
  const cpu::Protection& p = head.protection;
  *arrays = {.key = static_cast<char*>(head.slab.key),
             .value = static_cast<char*>(head.slab.value),
             .scale = reinterpret_cast<char*>(head.slab.scale),
             .position = head.slab.position,
             .mean = p.mean,
             .sum = p.sum,
             .score = p.score,
             .protected_slot = p.slot,
             .protected_count = p.count,
             .weakest = p.weakest};
  return Status();
}

Status CpuCache::StoreHead(int32_t index, const HeadArrays& arrays) {
  parts_.heads[index].protection.count = arrays.protected_count;
  parts_.heads[index].protection.weakest = arrays.weakest;
  return Status();
}

// From the plans' weights.
Status CpuCache::FinishLoad() {
  for (int32_t i = 0; i < plans_.plan_count; ++i) {
    const PlanState& state = plans_.plans[i];
    for (int64_t slot = 0; slot < state.plan.setting().budget; ++slot) {
      const int64_t weight = state.plan.weight(slot);
      state.log_weight[slot] = weight > 0 ? LogWeight(weight) : -std::numeric_limits<float>::infinity();
    }
  }
  return Status();
}

Status CpuCache::CopyHeads(const Cache& other) {
  const auto& from = static_cast<const CpuCache&>(other);
  for (int32_t h = 0; h < HeadCount(); ++h) {
    const HeadState& source = from.parts_.heads[h];
    HeadState& head = parts_.heads[h];
    const int64_t capacity = head.slab.capacity, element = SizeOf(head.slab.dtype);
    std::copy_n(static_cast<const char*>(source.slab.key), capacity * head.slab.key_dim * element,
                static_cast<char*>(head.slab.key));
    std::copy_n(static_cast<const char*>(source.slab.value), capacity * head.slab.value_dim * element,
                static_cast<char*>(head.slab.value));
    if (head.slab.scale != nullptr) std::copy_n(source.slab.scale, capacity, head.slab.scale);
    std::copy_n(source.slab.position, capacity, head.slab.position);
    head.protection.count = source.protection.count;
    head.protection.weakest = source.protection.weakest;
    if (head.protection.capacity == 0) continue;
    std::copy_n(source.protection.mean, config_.key_dim, head.protection.mean);
    std::copy_n(source.protection.sum, config_.key_dim, head.protection.sum);
    std::copy_n(source.protection.score, source.protection.count, head.protection.score);
    std::copy_n(source.protection.slot, source.protection.count, head.protection.slot);
  }
  for (int32_t i = 0; i < plans_.plan_count; ++i)
    std::copy_n(from.plans_.plans[i].log_weight, plans_.plans[i].plan.setting().budget, plans_.plans[i].log_weight);
  return Status();
}

// Rank-2 k and v, rank-1 weights and positions.
Status CpuCache::ExportHead(int32_t index, const Array& k, const Array& v, const Array* log_weight,
                            const Array* position) const {
  const HeadState& head = parts_.heads[index];
  const PlanState& state = plans_.plans[head.plan];
  const cpu::Slab& slab = head.slab;
  int64_t row = 0;
  for (int64_t slot = 0; slot < slab.capacity; ++slot) {
    if (state.plan.weight(slot) == 0) continue;
    cpu::ReadEntry(slab, slot, {k.At(row), 0, k.dtype}, {v.At(row), 0, v.dtype});
    if (log_weight != nullptr) *static_cast<float*>(log_weight->At(row)) = state.log_weight[slot];
    if (position != nullptr) *static_cast<int64_t*>(position->At(row)) = slab.position[slot];
    ++row;
  }
  return Status();
}

Status CpuCache::CompressOnce(const Resolved& resolved, void* memory, int64_t bytes, const Tensor& k, const Tensor& v,
                              const OneShotOutput& out, int64_t* count) {
  CpuCache* cache = Place(resolved, memory, bytes);
  struct End {
    CpuCache* cache;
    ~End() { cache->~CpuCache(); }
  } end{cache};
  EXPRESS_RETURN_IF_ERROR(cache->Append(0, k, v));
  for (int32_t g = 0; g < resolved.config.kv_heads; ++g) {
    const Array weight = OfHead(out.log_weight, g),
                position = out.position != nullptr ? OfHead(*out.position, g) : Array{};
    EXPRESS_RETURN_IF_ERROR(cache->ExportHead(g, OfHead(out.k, g), OfHead(out.v, g), &weight,
                                              out.position != nullptr ? &position : nullptr));
  }
  return cache->Entries(0, 0, count);
}

}  // namespace express::cache
