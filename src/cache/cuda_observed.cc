// Observed budgets on a GPU (config.head_budgets): what is launched to observe, and budgets that change.
//
// Masses are summed on the device. When the observation is over they are copied to the host behind the work of that step, and budgets
// are settled some steps later, when they have long been there; a call waits for them only if the host is further ahead than that.
// Arrays move within the cache's memory, and the descriptions of heads stay where they are: captured graphs read them anew.
#include <algorithm>

#include "src/cache/cuda_cache.h"
#include "src/cache/message.h"

namespace express::cache {
namespace {

static_assert(cuda::kObserveEvery == kObserveEvery && sizeof(Observed) == 2 * sizeof(uint64_t));

int64_t RowsAtOnce(int32_t dim) { return std::clamp<int64_t>(cuda::kObserveFloats / dim, 1, 16); }

// Of heads that share a plan only the first holds weights; every head has the room, behind its positions.
float* OwnWeights(const cuda::Head& head) {
  const auto end = reinterpret_cast<uintptr_t>(head.position + head.capacity);
  return reinterpret_cast<float*>((end + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment);
}

// The arrays of a head, in the order in which they lie; sizes are rounded up to what moves at once, which their room is, too.
void ListArrays(const Config& c, const cuda::Head& head, const char* base, Arena::Piece* pieces, int64_t* count) {
  const auto element = static_cast<size_t>(SizeOf(c.dtype)), capacity = static_cast<size_t>(head.capacity),
             protect = static_cast<size_t>(head.protect), dim = static_cast<size_t>(c.key_dim);
  const auto put = [&](const void* at, size_t bytes) {
    pieces[(*count)++] = {static_cast<size_t>(static_cast<const char*>(at) - base), (bytes + 15) / 16 * 16};
  };
  put(head.key, capacity * dim * element);
  put(head.value, capacity * static_cast<size_t>(c.value_dim) * element);
  if (head.scale != nullptr) put(head.scale, capacity * sizeof(cuda::RowScales));
  put(head.position, capacity * sizeof(int64_t));
  put(OwnWeights(head), head.leader != 0 ? capacity * sizeof(float) : 0);
  put(head.mean, dim * sizeof(float));
  put(head.sum, dim * sizeof(float));
  put(head.score, protect * sizeof(float));
  put(head.protected_slot, protect * sizeof(int32_t));
}

}  // namespace

// ---- observation ----

// Of the caches of one launch of attention, those whose newest token is one to observe. In a graph the device decides; a graph that is
// captured when the observation is over does without.
void CudaCache::ObserveQueries(const Cache* const* caches, int32_t layer, const cuda::AttendArgs& attend) const {
  const auto at = [&](int32_t i) { return static_cast<const CudaCache*>(caches[i]); };
  bool any = false;
  for (int32_t i = 0; i < attend.caches; ++i) any = any || at(i)->budgets_.observed != nullptr;
  if (!any) return;
  const bool captured = Capturing();
  cuda::ObserveArgs args;
  args.items = 0;
  for (int32_t i = 0; i < attend.caches; ++i) {
    const CudaCache& cache = *at(i);
    if (cache.budgets_.observed == nullptr) continue;
    const bool ask = (captured || cache.prepared_) && cache.observation_closed_ == 0;
    const int64_t position = ask ? -1 : cache.LayerTokens(layer) - 1;
    if (!ask && !cache.Observes(position)) continue;
    args.caches[args.items++] = {.heads = attend.heads[i],
                                 .position = position,
                                 .mean = cache.mean_budget_,
                                 .end = ObservationEnd(cache.mean_budget_),
                                 .row = i};
  }
  if (args.items == 0) return;
  args.kv_heads = attend.kv_heads;
  args.group = attend.group;
  args.tokens = attend.tokens;
  args.key_dim = attend.key_dim;
  args.rows_at_once = static_cast<int32_t>(RowsAtOnce(std::max(attend.key_dim, attend.value_dim)));  // as on the CPU
  args.dtype = attend.dtype;
  args.launch_early = traits_.attend[0].dependent_launches;
  args.q = attend.q;
  args.q_cache_stride = attend.q_cache_stride;
  args.prompt = false;
  args.k = {};
  args.first_position = 0;
  args.scale = attend.scale;
  args.exponent = attend.exponent;
  cuda::Observe(args, stream_);
}

// Before the prompt is ingested: until observation ends nothing has been dropped, so each of its tokens sees what the slabs hold now, and
// the prompt's own rows, as the slabs will hold them, up to itself.
void CudaCache::ObservePrompt(int32_t layer, const Queries& queries, const Input& input, const cuda::Rows& k) const {
  if (budgets_.observed == nullptr || observation_closed_ != 0) return;
  const int64_t begin = LayerTokens(layer), end = std::min(begin + input.tokens, ObservationEnd(mean_budget_));
  const int64_t first = (std::max(begin, FarDistance()) + kObserveEvery - 1) / kObserveEvery * kObserveEvery;
  constexpr int64_t kMost = 32768;  // of one launch
  cuda::ObserveArgs args;
  args.kv_heads = config_.kv_heads;
  args.group = config_.query_heads / config_.kv_heads;
  args.tokens = 1;
  args.key_dim = config_.key_dim;
  args.rows_at_once = static_cast<int32_t>(RowsAtOnce(config_.key_dim));
  args.dtype = config_.dtype;
  args.launch_early = traits_.attend[0].dependent_launches;
  args.q = {queries.q.data, queries.q.stride[0], queries.q.stride[1], queries.q.dtype};
  args.q_cache_stride = 0;
  args.prompt = true;
  args.k = k;
  args.first_position = begin;
  args.scale = static_cast<float>(config_.scale);
  args.exponent = static_cast<float>(config_.weight_exponent);
  for (int64_t at = first; at < end; at += kMost * kObserveEvery) {
    args.items = static_cast<int32_t>(std::min(kMost, (end - at + kObserveEvery - 1) / kObserveEvery));
    args.caches[0] = {.heads = parts_.heads + layer * config_.kv_heads,
                      .position = at,
                      .mean = mean_budget_,
                      .end = ObservationEnd(mean_budget_),
                      .row = 0};
    cuda::Observe(args, stream_);
  }
}

Status CudaCache::CloseObservation() {
  const DeviceScope scope(config_.device_id);
  cuda::CopySeen(parts_.seen, HeadCount(), &budgets_.observed->far, stream_);
  EXPRESS_RETURN_IF_ERROR(Launched("config.head_budgets"));
  return CudaError("config.head_budgets", cudaEventRecord(observed_, stream_));
}

// The only wait of a call that is not said to wait: at most once in a cache's life.
Status CudaCache::AwaitObservation() {
  const cudaError_t error = cudaEventQuery(observed_);
  if (error != cudaErrorNotReady) return CudaError("config.head_budgets", error);
  cudaGetLastError();
  return CudaError("config.head_budgets", cudaEventSynchronize(observed_));
}
bool CudaCache::ObservationKnown() const {
  if (observation_closed_ == 0 || cudaEventQuery(observed_) == cudaSuccess) return true;
  cudaGetLastError();
  return false;
}

Status CudaCache::FetchObserved() const {
  if (Capturing()) return Error(StatusCode::kUnsupported, "cache: express_save cannot be captured in a graph");
  const DeviceScope scope(config_.device_id);
  if (observation_closed_ == 0) cuda::CopySeen(parts_.seen, HeadCount(), &budgets_.observed->far, stream_);
  return CudaError("cache", cudaStreamSynchronize(stream_));
}

Status CudaCache::StoreObserved() {
  const DeviceScope scope(config_.device_id);
  cuda::Uploader uploader(stream_);
  for (int32_t h = 0; h < HeadCount(); ++h) {
    const Observed& seen = budgets_.observed[h];
    const cuda::Seen device{seen.far, seen.tokens, LayerTokens(h / config_.kv_heads) - 1, 0};
    uploader.Add(parts_.seen + h, &device, sizeof(device));
  }
  uploader.Flush();
  return Launched("load");
}

// What was planned for the cache is no longer of interest, and no copy to the host is on its way.
Status CudaCache::BeginCopy() {
  EXPRESS_RETURN_IF_ERROR(Settle());
  return observation_closed_ != 0 ? AwaitObservation() : Status();
}

// ---- other budgets ----

Shape CudaCache::ShapeOf(const plan::Setting* settings) const {
  return {config_, 1, settings, &largest_, budgets_.leader};
}

int64_t CudaCache::MostBudget() const {
  int64_t most = budgets_.observed != nullptr ? largest_.budget : 0;
  for (int32_t i = 0; i < plans_.plan_count; ++i) most = std::max(most, plans_.plans[i].plan.setting().budget);
  return most;
}

bool CudaCache::CanResize() const { return !Capturing() && CheckSettled().ok(); }

bool CudaCache::ResizeFits() const {
  const Shape next = ShapeOf(budgets_.settings);
  Arena host, device, work;
  LayoutPlans(next, false, PlanSource::kNew, host);
  LayoutArrays(next, plans_, device, nullptr);
  LayoutWork(next, plans_, work, nullptr, nullptr);
  return static_cast<int64_t>(host.used()) <= parts_.plans_bytes && device.used() <= parts_.array_bytes &&
         work.used() <= parts_.work_bytes &&
         std::max<int64_t>(host.piece_count(), 9 * HeadCount()) <= budgets_.piece_capacity;
}

// Rings are empty, and begin at their front. Their sequences go on from a number that none has come to, so that what a plan that had
// this index still reports of its progress is old.
void CudaCache::LayoutRings(cuda::Uploader& uploader) {
  int64_t written = 0;
  for (int32_t i = 0; i < plans_.plan_capacity; ++i) written = std::max(written, parts_.ring_states[i].written);
  for (int32_t i = 0; i < plans_.plan_count; ++i) {
    cuda::Ring& ring = parts_.ring_copies[i];
    RingState& state = parts_.ring_states[i];
    state.write = 0;
    state.written = state.launched = written;
    ring.heads = plans_.plans[i].head_count;
    ring.sequence = static_cast<int32_t>(written);
    const int32_t nothing = 0;
    uploader.Add(ring.words, &nothing, sizeof(nothing));
    uploader.Add(parts_.rings + i, &ring, sizeof(ring));
  }
}

// The weights of new plans, the host's plans, then what the device is to know. Arrays and rings stay where they are.
Status CudaCache::SplitPlans() {
  const DeviceScope scope(config_.device_id);
  EXPRESS_RETURN_IF_ERROR(CudaError("config.device_id", scope.error()));
  EXPRESS_RETURN_IF_ERROR(Settle());
  cuda::Mover mover(parts_.buffer, parts_.buffer_bytes, stream_);
  for (int32_t h = 0; h < HeadCount(); ++h) {
    const cuda::Head& head = parts_.head_copies[h];
    const size_t bytes = (static_cast<size_t>(head.capacity) * sizeof(float) + 15) / 16 * 16;
    if (budgets_.leader[h] == h && head.leader == 0) mover.Up(head.log_weight, OwnWeights(head), bytes);
  }
  mover.Flush();
  Arena host(parts_.plans_begin);
  plans_ = parts_.plans = LayoutPlans(ShapeOf(budgets_.current), false, PlanSource::kSplit, host);
  for (int32_t h = 0; h < HeadCount(); ++h) parts_.head_copies[h].plan = plans_.head_plan[h];
  Arena device(parts_.arrays), work(parts_.work);
  LayoutArrays(ShapeOf(budgets_.current), plans_, device, parts_.head_copies);
  LayoutWork(ShapeOf(budgets_.current), plans_, work, parts_.head_copies, parts_.ring_copies);
  cuda::Uploader uploader(stream_);
  LayoutRings(uploader);
  uploader.Add(parts_.heads, parts_.head_copies, static_cast<size_t>(HeadCount()) * sizeof(cuda::Head));
  uploader.Flush();
  cuda::Fence(stream_);
  return Launched("config.head_budgets");
}

// As much as one record holds; how many operations.
int64_t CudaCache::GiveUpSome(int32_t index) {
  plan::Plan& plan = plans_.plans[index].plan;
  plan::Operations& operations = plans_.operations;
  operations.Clear();
  int64_t words = cuda::kRecordHeader;
  for (int64_t counted = 0; operations.HasRoom(plan.MaxOps(), plan.MaxSlots()) &&
                            words + 10 * plan.MaxOps() + plan.MaxSlots() <= RecordWords(index);) {
    if (!plan.GiveUp(NextSetting(index), operations)) break;
    for (; counted < operations.size(); ++counted) words += 8 + operations[counted].count;
  }
  return operations.size();
}

// The records that have been written, one of each plan.
void CudaCache::ExecuteForAll(cuda::Uploader& uploader) {
  uploader.Flush();
  cuda::ExecuteArgs args = Arguments(Input{}, 0);
  CopyHeads(0, 0, &args);
  args.layers = config_.layers;
  args.part = cuda::Part::kAll;
  for (int32_t layer = 0; layer < config_.layers; ++layer) MarkLaunched(layer, 1);
  cuda::Execute(args, stream_);
}

// All heads side by side: a round takes a record of each.
Status CudaCache::GiveUpAndCompact() {
  const DeviceScope scope(config_.device_id);
  EXPRESS_RETURN_IF_ERROR(CudaError("config.device_id", scope.error()));
  EXPRESS_RETURN_IF_ERROR(Settle());
  if (HoldsNothing()) return Status();
  cuda::Uploader uploader(stream_);
  for (int32_t h = 0; h < HeadCount(); ++h) {
    cuda::Head& head = parts_.head_copies[h];
    head.protect = std::min(head.protect, static_cast<int32_t>(budgets_.settings[h].protect));
  }
  uploader.Add(parts_.heads, parts_.head_copies, static_cast<size_t>(HeadCount()) * sizeof(cuda::Head));
  uploader.Flush();
  cuda::Fence(stream_);
  int64_t operations = 1;
  for (int32_t flags = cuda::kRefresh; operations > 0; flags = 0) {
    operations = 0;
    for (int32_t i = 0; i < plans_.plan_count; ++i) {
      operations += GiveUpSome(i);
      WriteRecord(i, uploader, flags);
    }
    ExecuteForAll(uploader);
  }
  for (int32_t i = 0; i < plans_.plan_count; ++i) {
    plans_.operations.Clear();
    plans_.plans[i].plan.Compact(NextSetting(i).budget, plans_.operations);
    WriteRecord(i, uploader);
  }
  ExecuteForAll(uploader);
  return Launched("config.head_budgets");
}

// The host's plans, then the arrays on the device, then what the device is to know of both.
Status CudaCache::FinishResize() {
  const DeviceScope scope(config_.device_id);
  const bool empty = HoldsNothing();
  Arena::Piece *const from = budgets_.pieces, *const to = from + budgets_.piece_capacity;
  Arena now(from, budgets_.piece_capacity), next(to, budgets_.piece_capacity);
  LayoutPlans(ShapeOf(budgets_.current), false, PlanSource::kNew, now);
  LayoutPlans(ShapeOf(budgets_.settings), false, PlanSource::kNew, next);
  MovePieces(parts_.plans_begin, from, to, now.piece_count());
  Arena host(parts_.plans_begin);
  plans_ = parts_.plans =
      LayoutPlans(ShapeOf(budgets_.settings), false, empty ? PlanSource::kNew : PlanSource::kResized, host);
  for (int32_t i = 0; i < plans_.plan_count && empty; ++i) plans_.plans[i].plan.Reset();

  int64_t count = 0, other = 0;
  const auto* base = static_cast<const char*>(device_memory_);
  for (int32_t h = 0; h < HeadCount(); ++h) {
    parts_.head_copies[h].protect = static_cast<int32_t>(budgets_.current[h].protect);
    parts_.head_copies[h].plan = plans_.head_plan[h];
    ListArrays(config_, parts_.head_copies[h], base, from, &count);
  }
  Arena device(parts_.arrays);
  LayoutArrays(ShapeOf(budgets_.settings), plans_, device, parts_.head_copies);
  for (int32_t h = 0; h < HeadCount(); ++h) ListArrays(config_, parts_.head_copies[h], base, to, &other);
  if (!empty) MoveArrays(from, to, count);
  Arena work(parts_.work);
  LayoutWork(ShapeOf(budgets_.settings), plans_, work, parts_.head_copies, parts_.ring_copies);

  cuda::Uploader uploader(stream_);
  LayoutRings(uploader);
  uploader.Add(parts_.heads, parts_.head_copies, static_cast<size_t>(HeadCount()) * sizeof(cuda::Head));
  for (int32_t h = 0; h < HeadCount() && !empty; ++h) {
    const plan::Plan& plan = plans_.plans[plans_.head_plan[h]].plan;
    const auto known = static_cast<int32_t>(std::min(budgets_.current[h].budget, budgets_.settings[h].budget));
    uploader.Add(parts_.slot_scratch + h, &known, sizeof(known));
    uploader.Add(parts_.head_copies[h].protected_slot, plan.protected_slots(),
                 static_cast<size_t>(plan.protected_count()) * sizeof(plan::Slot));
  }
  uploader.Flush();
  if (empty)
    cuda::ResetHeads(parts_.heads, HeadCount(), parts_.rings, 0, config_.key_dim, stream_);
  else
    cuda::FreeSlots(parts_.heads, parts_.slot_scratch, HeadCount(), stream_);
  cuda::Fence(stream_);
  return Launched("config.head_budgets");
}

// In the order of MovePieces.
void CudaCache::MoveArrays(const Arena::Piece* from, const Arena::Piece* to, int64_t count) {
  auto* base = static_cast<char*>(device_memory_);
  cuda::Mover mover(parts_.buffer, parts_.buffer_bytes, stream_);
  const auto bytes = [&](int64_t i) { return std::min(from[i].bytes, to[i].bytes); };
  for (int64_t i = 0; i < count; ++i)
    if (to[i].at < from[i].at) mover.Down(base + from[i].at, base + to[i].at, bytes(i));
  for (int64_t i = count - 1; i >= 0; --i)
    if (to[i].at > from[i].at) mover.Up(base + from[i].at, base + to[i].at, bytes(i));
  mover.Flush();
}

}  // namespace express::cache
