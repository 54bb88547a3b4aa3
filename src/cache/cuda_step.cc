// Append, attend and their batches on a GPU, eagerly and captured: planning into the rings, and the launches.
#include <algorithm>
#include <cstring>

#include "src/cache/cuda_cache.h"
#include "src/cache/message.h"

namespace express::cache {
namespace {

int32_t* PutLong(int64_t x, int32_t* to) {
  to[0] = static_cast<int32_t>(static_cast<uint32_t>(x));
  to[1] = static_cast<int32_t>(static_cast<uint32_t>(static_cast<uint64_t>(x) >> 32));
  return to + 2;
}
int32_t* PutFloat(float x, int32_t* to) {
  std::memcpy(to, &x, sizeof(x));
  return to + 1;
}

// One operation as ring.h describes it; a kWrite is of one token.
int32_t* Encode(const plan::Op& op, const plan::Slot* slots, int32_t* to) {
  const auto begin = [&](cuda::RingOp kind, int32_t count) { *to++ = kind | count << 4; };
  const auto put_slots = [&](int32_t count) { to = std::copy_n(slots, count, to); };
  switch (op.kind) {
    case plan::OpKind::kWrite:
      begin(cuda::kRingWrite, 1);
      to = PutLong(op.number, to);
      put_slots(1);
      break;
    case plan::OpKind::kCentre:
      begin(cuda::kRingCentre, op.count);
      put_slots(op.count);
      break;
    case plan::OpKind::kAdmit:
      begin(cuda::kRingAdmit, 1);
      to = PutLong(op.number, to);
      put_slots(1);
      break;
    case plan::OpKind::kSample:
      begin(cuda::kRingSample, 2);
      to = PutFloat(LogWeight(op.total), PutLong(op.total, PutLong(op.weight, PutLong(op.number, to))));
      put_slots(2);
      break;
    case plan::OpKind::kHalve:
      begin(cuda::kRingHalve, op.count);
      to = PutFloat(LogWeight(op.weight), PutLong(op.number, to));
      put_slots(op.count);
      break;
    case plan::OpKind::kFree:
      begin(cuda::kRingFree, op.count);
      put_slots(op.count);
      break;
    case plan::OpKind::kEvict:
      begin(cuda::kRingEvict, 0);
      break;
    case plan::OpKind::kMove:
      begin(cuda::kRingMove, op.count);
      put_slots(op.count);
      break;
  }
  return to;
}

int64_t Progress(const int32_t* progress, int32_t plan) {
  return progress == nullptr ? 0 : static_cast<const volatile int32_t*>(progress)[2 * plan];
}

}  // namespace

bool CudaCache::Capturing() const {
  if (stream_ == nullptr) return false;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream_, &status) != cudaSuccess) cudaGetLastError();
  return status == cudaStreamCaptureStatusActive;
}

int64_t CudaCache::Pending(int32_t plan) const {
  const RingState& ring = parts_.ring_states[plan];
  return ring.written - std::max(ring.launched, Progress(progress_, plan));
}

int64_t CudaCache::LayerTokens(int32_t layer) const {
  const int32_t plan = first_plan(layer);
  return plans_.plans[plan].plan.tokens() - Pending(plan);
}

bool CudaCache::AllLayersEven() const {
  for (int32_t layer = 0; layer < config_.layers; ++layer)
    if (parts_.ahead[layer] != 0 || LayerTokens(layer) != LayerTokens(0)) return false;
  return true;
}

Status CudaCache::CheckUnderflow() const {
  if (progress_ == nullptr) return Status();
  for (int32_t i = 0; i < plans_.plan_count; ++i)
    if (static_cast<const volatile int32_t*>(progress_)[2 * i + 1] != 0)
      return Error(
          StatusCode::kBroken,
          "cache: a graph was replayed more often than steps were prepared; only reset and destroy are allowed");
  return Status();
}

Status CudaCache::CheckSettled() const {
  EXPRESS_RETURN_IF_ERROR(CheckUnderflow());
  for (int32_t layer = 0; layer < config_.layers; ++layer)
    if (parts_.ahead[layer] != 0)
      return Error(StatusCode::kStepsPending, "cache: in the middle of a step; layer ", layer, " lacks its token");
  if (!prepared_) return Status();
  for (int32_t i = 0; i < plans_.plan_count; ++i)
    if (Pending(i) > 0)
      return Error(StatusCode::kStepsPending, "cache: ", Pending(i), " prepared steps of layer ", plans_.plans[i].layer,
                   " have not run, as far as the host can see; synchronise the stream, or express_step_cancel");
  return Status();
}

Status CudaCache::Settle() {
  if (!prepared_) return CheckUnderflow();
  EXPRESS_RETURN_IF_ERROR(CheckSettled());
  for (int32_t i = 0; i < plans_.plan_count; ++i) parts_.ring_states[i].launched = parts_.ring_states[i].written;
  prepared_ = false;
  return Status();
}

// Whether any record of a token fits: behind the last one, or at the front with a jump left behind. Records that wait must stay.
bool CudaCache::HasRoom(int32_t plan) const {
  const RingState& ring = parts_.ring_states[plan];
  const plan::Plan& next = plans_.plans[plan].plan;
  const int64_t pending = Pending(plan), most = cuda::kRecordHeader + 10 * next.MaxOps() + next.NextSlots() + 2;
  const int64_t capacity = parts_.ring_copies[plan].capacity;
  if (pending == 0) return true;
  if (pending >= RingState::kMostSteps - 1) return false;
  const int64_t oldest = ring.begin[(ring.written - pending + 1) % RingState::kMostSteps];
  if (ring.write <= oldest) return ring.write + most < oldest;
  return ring.write + most <= capacity || most < oldest;
}

bool CudaCache::WriteRecord(int32_t plan, cuda::Uploader& uploader, int32_t flags) {
  RingState& ring = parts_.ring_states[plan];
  const cuda::Ring& device = parts_.ring_copies[plan];
  int32_t* at = parts_.record + cuda::kRecordHeader;
  for (int64_t i = 0; i < plans_.operations.size(); ++i) {
    at = Encode(plans_.operations[i], plans_.operations.slots(plans_.operations[i]), at);
    if (plans_.operations[i].kind == plan::OpKind::kHalve)
      flags |= cuda::kHalves | (plans_.operations[i].count > cuda::kShortList ? cuda::kHalvesLong : 0);
  }
  const auto words = static_cast<int32_t>(at - parts_.record);
  const int32_t tag = cuda::RecordTag(static_cast<int32_t>(++ring.written));
  parts_.record[0] = tag;
  parts_.record[1] = words - cuda::kRecordHeader;
  parts_.record[2] = flags;
  // Two words stay for a jump.
  if (ring.write + words > device.capacity - 2) {
    const int32_t jump[2] = {tag, cuda::kJump};
    uploader.Add(device.words + ring.write, jump, sizeof(jump));
    ring.write = 0;
  }
  ring.begin[ring.written % RingState::kMostSteps] = ring.write;
  uploader.Add(device.words + ring.write, parts_.record, static_cast<size_t>(words) * sizeof(int32_t));
  ring.write += words;
  return (flags & cuda::kHalves) != 0;
}

bool CudaCache::PlanToken(int32_t plan, cuda::Uploader& uploader) {
  plans_.operations.Clear();
  plans_.plans[plan].plan.Append(1, plans_.operations);
  return WriteRecord(plan, uploader);
}

CudaCache::Ahead CudaCache::PlanStep(int32_t layer, cuda::Uploader& uploader) {
  if (parts_.ahead[layer] != 0) return Ahead::kNothing;
  const bool all = layer == 0 && Hoistable() && AllLayersEven();
  const int32_t end = all ? plans_.plan_count : end_plan(layer);
  bool halvings = false;
  for (int32_t i = first_plan(layer); i < end; ++i) halvings = PlanToken(i, uploader) || halvings;
  if (!all) return Ahead::kNothing;
  std::fill_n(parts_.ahead, config_.layers, 1);
  return halvings ? Ahead::kHalvingsToo : Ahead::kAdmissions;
}

cuda::Part CudaCache::TakeStep(int32_t layer) {
  const bool ahead = parts_.ahead[layer] != 0;
  parts_.ahead[layer] = 0;
  MarkLaunched(layer, 1);
  return ahead ? cuda::Part::kWrites : cuda::Part::kAll;
}

void CudaCache::MarkLaunched(int32_t layer, int64_t steps) {
  for (int32_t i = first_plan(layer); i < end_plan(layer); ++i) {
    RingState& ring = parts_.ring_states[i];
    ring.launched = std::max(ring.launched, Progress(progress_, i)) + steps;
  }
}

cuda::Rows CudaCache::RowsOf(const Input& input, const Array& array, int32_t layer) const {
  return {input.Rows(array, layer, 0), Input::RowStride(array), Input::HeadStride(array), array.dtype};
}

// All but the heads, the part, and the batch's rows.
cuda::ExecuteArgs CudaCache::Arguments(const Input& input, int32_t layer) const {
  cuda::ExecuteArgs args{};
  args.layers = 1;
  args.kv_heads = config_.kv_heads;
  args.steps = 1;
  args.key_dim = config_.key_dim;
  args.value_dim = config_.value_dim;
  args.dtype = config_.dtype;
  if (input.layers > 0) {
    args.k = RowsOf(input, input.k, layer);
    args.v = RowsOf(input, input.v, layer);
    args.k_cache_stride = args.k.row_stride;
    args.v_cache_stride = args.v.row_stride;
  }
  args.halve = Halve();
  args.launch_early = traits_.attend[0].dependent_launches;
  args.multiprocessors = traits_.multiprocessors;
  return args;
}

void CudaCache::CopyHeads(int32_t layer, int32_t index, cuda::ExecuteArgs* args) const {
  args->heads[args->caches] = parts_.heads + layer * config_.kv_heads;
  args->rings[args->caches] = parts_.rings;
  args->row[args->caches++] = index;
}

Status CudaCache::Ingest(const Input& input) {
  const DeviceScope scope(config_.device_id);
  EXPRESS_RETURN_IF_ERROR(CudaError("config.device_id", scope.error()));
  if (Capturing()) return IngestCaptured(input);
  EXPRESS_RETURN_IF_ERROR(Settle());
  for (int32_t layer = input.first_layer; layer < input.first_layer + input.layers; ++layer)
    EXPRESS_RETURN_IF_ERROR(BreakOn(IngestLayer(input, layer)));
  CountEntries(input.first_layer, input.layers);
  return Status();
}

// Only the launches: the host's plans do not move.
Status CudaCache::IngestCaptured(const Input& input) {
  if (input.tokens != 1)
    return Error(StatusCode::kUnsupported, "k.shape: expected 1 token while the stream is being captured, got ",
                 input.tokens);
  for (int32_t layer = input.first_layer; layer < input.first_layer + input.layers; ++layer) {
    cuda::ExecuteArgs args = Arguments(input, layer);
    CopyHeads(layer, 0, &args);
    const auto launch = [&](cuda::Part part, int32_t layers) {
      args.part = part;
      args.layers = layers;
      cuda::Execute(args, stream_);
    };
    if (layer == 0 && Hoistable()) {
      launch(cuda::Part::kHalvings, config_.layers);
      launch(cuda::Part::kAdmissions, config_.layers);
    }
    launch(Hoistable() ? cuda::Part::kWrites : cuda::Part::kAll, 1);
  }
  return Launched("append");
}

// The first token may have been planned ahead, with all but its write done. Then as many tokens at a time as the rings take.
Status CudaCache::IngestLayer(const Input& input, int32_t layer) {
  cuda::ExecuteArgs args = Arguments(input, layer);
  CopyHeads(layer, 0, &args);
  cuda::Uploader uploader(stream_);
  const auto launch = [&](cuda::Part part, int32_t layers, int64_t steps) {
    uploader.Flush();
    args.part = part;
    args.layers = layers;
    args.steps = static_cast<int32_t>(steps);
    cuda::Execute(args, stream_);
    if (part == cuda::Part::kHalvings || part == cuda::Part::kAdmissions) return;
    const auto advance = [&](cuda::Rows& rows) {
      rows.data = static_cast<char*>(rows.data) + steps * rows.row_stride * SizeOf(rows.dtype);
    };
    advance(args.k);
    advance(args.v);
  };
  int64_t done = 0;
  if (input.tokens == 1 || parts_.ahead[layer] != 0) {
    if (input.tokens == 0) return Status();
    const Ahead ahead = PlanStep(layer, uploader);
    if (ahead == Ahead::kHalvingsToo) launch(cuda::Part::kHalvings, config_.layers, 1);
    if (ahead != Ahead::kNothing) launch(cuda::Part::kAdmissions, config_.layers, 1);
    launch(TakeStep(layer), 1, 1);
    done = 1;
  }
  int64_t planned = 0;
  const auto flush = [&] {
    if (planned == 0) return;
    MarkLaunched(layer, planned);
    launch(cuda::Part::kAll, 1, planned);
    planned = 0;
  };
  for (; done < input.tokens; ++done, ++planned) {
    bool room = true;
    for (int32_t i = first_plan(layer); i < end_plan(layer); ++i) room = room && HasRoom(i);
    if (!room) flush();
    for (int32_t i = first_plan(layer); i < end_plan(layer); ++i) PlanToken(i, uploader);
  }
  flush();
  return Launched("append");
}

// Operations without tokens: halvings ahead of need, slots set free.
Status CudaCache::ExecuteOperations(int32_t plan) {
  const DeviceScope scope(config_.device_id);
  if (Capturing()) return Error(StatusCode::kUnsupported, "cache: compress and rollback cannot be captured in a graph");
  const int32_t layer = plans_.plans[plan].layer;
  cuda::Uploader uploader(stream_);
  // The other plans of the layer take part with an empty record.
  WriteRecord(plan, uploader);
  plans_.operations.Clear();
  for (int32_t i = first_plan(layer); i < end_plan(layer); ++i)
    if (i != plan) WriteRecord(i, uploader);
  uploader.Flush();
  cuda::ExecuteArgs args = Arguments(Input{}, layer);
  CopyHeads(layer, 0, &args);
  args.part = cuda::Part::kAll;
  MarkLaunched(layer, 1);
  cuda::Execute(args, stream_);
  return BreakOn(Launched("operations"));
}

Status CudaCache::DoStepPrepare(int64_t n) {
  const DeviceScope scope(config_.device_id);
  EXPRESS_RETURN_IF_ERROR(CheckUnderflow());
  for (int32_t layer = 0; layer < config_.layers; ++layer)
    if (parts_.ahead[layer] != 0)
      return Error(StatusCode::kStepsPending, "cache: in the middle of a step; layer ", layer, " lacks its token");
  if (Capturing()) return Error(StatusCode::kUnsupported, "cache: express_step_prepare cannot be captured in a graph");
  if (prepared_ && CheckSettled().ok()) EXPRESS_RETURN_IF_ERROR(Settle());
  const bool fresh = !prepared_;
  if (fresh) std::memcpy(parts_.plans_saved, parts_.plans_begin, static_cast<size_t>(parts_.plans_bytes));
  cuda::Uploader uploader(stream_);
  for (int64_t step = 0; step < n; ++step) {
    for (int32_t i = 0; i < plans_.plan_count; ++i)
      if (!HasRoom(i)) {
        uploader.Flush();
        prepared_ = prepared_ || step > 0;
        if (step > 0) EXPRESS_RETURN_IF_ERROR(TakeBack(step));
        return Error(StatusCode::kRingFull, "n: there is room for ", step, " more steps, got ", n);
      }
    for (int32_t i = 0; i < plans_.plan_count; ++i) PlanToken(i, uploader);
  }
  uploader.Flush();
  prepared_ = prepared_ || n > 0;
  CountEntries(0, config_.layers);
  return BreakOn(Launched("step_prepare"));
}

// Plans are set back to before all prepared steps, and go forward again by those that stay.
Status CudaCache::TakeBack(int64_t last_steps) {
  std::memcpy(parts_.plans_begin, parts_.plans_saved, static_cast<size_t>(parts_.plans_bytes));
  cuda::Uploader uploader(stream_);
  const int32_t nothing = 0;
  for (int32_t i = 0; i < plans_.plan_count; ++i) {
    RingState& ring = parts_.ring_states[i];
    const int64_t stay = ring.written - last_steps - ring.launched;
    for (int64_t step = 0; step < stay; ++step) {
      plans_.operations.Clear();
      plans_.plans[i].plan.Append(1, plans_.operations);
    }
    if (last_steps == 0) continue;
    ring.write = ring.begin[(ring.written - last_steps + 1) % RingState::kMostSteps];
    ring.written -= last_steps;
    uploader.Add(parts_.ring_copies[i].words + ring.write, &nothing, sizeof(nothing));
  }
  uploader.Flush();
  CountEntries(0, config_.layers);
  return BreakOn(Launched("step_cancel"));
}

Status CudaCache::DoStepCancel() {
  const DeviceScope scope(config_.device_id);
  EXPRESS_RETURN_IF_ERROR(CheckUnderflow());
  if (!prepared_) return Status();
  const int64_t unused = Pending(0);
  for (int32_t i = 0; i < plans_.plan_count; ++i)
    if (Pending(i) != unused)
      return Error(StatusCode::kStepsPending, "cache: layer ", plans_.plans[i].layer,
                   " has run another number of steps than layer 0; let the replay of the step finish");
  EXPRESS_RETURN_IF_ERROR(TakeBack(unused));
  return Settle();
}

Status CudaCache::DoAttend(int32_t layer, const Queries& queries) const {
  const Cache* self = this;
  return AttendCaches(&self, 1, layer, queries, queries.q.shape[0]);
}

Status CudaCache::DoAttendBatch(const Cache* const* caches, int64_t count, int32_t layer,
                                const Queries& queries) const {
  EXPRESS_RETURN_IF_ERROR(CheckOneStream(caches, count));
  return AttendCaches(caches, count, layer, queries, 1);
}

Status CudaCache::CheckOneStream(const Cache* const* caches, int64_t count) const {
  for (int64_t i = 0; i < count; ++i)
    if (static_cast<const CudaCache*>(caches[i])->stream_ != stream_)
      return Error(StatusCode::kInvalidArgument, "caches[", i, "]: expected the stream of caches[0]");
  return Status();
}

Status CudaCache::AttendCaches(const Cache* const* caches, int64_t count, int32_t layer, const Queries& queries,
                               int64_t tokens) const {
  if (count == 0 || tokens == 0) return Status();
  const DeviceScope scope(config_.device_id);
  const bool batch = count > 1 || queries.q.shape[0] != tokens, captured = Capturing();
  cuda::AttendArgs args{};
  args.kv_heads = config_.kv_heads;
  args.group = config_.query_heads / config_.kv_heads;
  args.tokens = static_cast<int32_t>(tokens);
  args.key_dim = config_.key_dim;
  args.value_dim = config_.value_dim;
  args.dtype = config_.dtype;
  args.scale = static_cast<float>(config_.scale);
  args.exponent = static_cast<float>(config_.weight_exponent);
  args.q = {queries.q.data, queries.q.stride[0], queries.q.stride[1], queries.q.dtype};
  args.out = {queries.out.data, queries.out.stride[0], queries.out.stride[1], queries.out.dtype};
  args.lse = queries.has_lse ? reinterpret_cast<float*>(queries.lse.data) : nullptr;
  args.lse_row_stride = queries.lse.stride[0];
  args.lse_head_stride = queries.lse.stride[1];
  args.q_cache_stride = batch ? args.q.row_stride : 0;
  args.out_cache_stride = batch ? args.out.row_stride : 0;
  args.lse_cache_stride = batch ? args.lse_row_stride : 0;
  const auto advance = [](cuda::Rows& rows, int64_t by) {
    rows.data = static_cast<char*>(rows.data) + by * rows.row_stride * SizeOf(rows.dtype);
  };
  const cuda::Head* described[cuda::kMaxBatch];
  for (int64_t first = 0; first < count; first += cuda::kMaxBatch) {
    args.caches = static_cast<int32_t>(std::min<int64_t>(cuda::kMaxBatch, count - first));
    args.max_capacity = 0;
    args.sizes_change = false;
    for (int32_t i = 0; i < args.caches; ++i) {
      const auto& cache = *static_cast<const CudaCache*>(caches[first + i]);
      const CudaParts& parts = cache.parts_;
      if (captured && cache.largest() != nullptr) {
        args.sizes_change = true;
        args.max_capacity = std::max(args.max_capacity, static_cast<int32_t>(cache.largest_.budget));
      }
      args.heads[i] = parts.heads + layer * config_.kv_heads;
      described[i] = parts.head_copies + layer * config_.kv_heads;
      for (int32_t g = 0; g < config_.kv_heads; ++g)
        args.max_capacity = std::max(args.max_capacity, described[i][g].capacity);
    }
    cuda::Attend(args, described, traits_.attend, cuda::kMostBlocks, stream_);
    ObserveQueries(caches + first, layer, args);
    advance(args.q, args.caches);
    advance(args.out, args.caches);
    if (args.lse != nullptr) args.lse += args.caches * args.lse_row_stride;
  }
  return Launched("attend");
}

// Plans every cache, then a few launches for up to kMaxBatch of them.
Status CudaCache::DoAppendBatch(Cache* const* caches, int64_t count, const Input& input) {
  EXPRESS_RETURN_IF_ERROR(CheckOneStream(caches, count));
  const DeviceScope scope(config_.device_id);
  const int32_t layer = input.first_layer;
  const auto at = [&](int64_t i) { return static_cast<CudaCache*>(caches[i]); };
  const bool captured = Capturing();
  for (int64_t i = 0; i < count && !captured; ++i) EXPRESS_RETURN_IF_ERROR(at(i)->Settle());
  cuda::Uploader uploader(stream_);
  cuda::ExecuteArgs halvings = Arguments(input, layer), writes = halvings, all = halvings;
  halvings.part = cuda::Part::kHalvings;
  halvings.layers = config_.layers;
  cuda::ExecuteArgs admissions = halvings;
  admissions.part = cuda::Part::kAdmissions;
  writes.part = cuda::Part::kWrites;
  all.part = cuda::Part::kAll;
  const auto launch = [&](cuda::ExecuteArgs& args) {
    if (args.caches > 0) cuda::Execute(args, stream_);
    args.caches = 0;
  };
  for (int64_t first = 0; first < count; first += cuda::kMaxBatch) {
    for (int64_t i = first; i < std::min<int64_t>(count, first + cuda::kMaxBatch); ++i) {
      CudaCache* cache = at(i);
      const auto row = static_cast<int32_t>(i);
      const Ahead ahead = !captured                          ? cache->PlanStep(layer, uploader)
                          : layer == 0 && cache->Hoistable() ? Ahead::kHalvingsToo
                                                             : Ahead::kNothing;
      if (ahead == Ahead::kHalvingsToo) cache->CopyHeads(0, row, &halvings);
      if (ahead != Ahead::kNothing) cache->CopyHeads(0, row, &admissions);
      const cuda::Part part = !captured            ? cache->TakeStep(layer)
                              : cache->Hoistable() ? cuda::Part::kWrites
                                                   : cuda::Part::kAll;
      cache->CopyHeads(layer, row, part == cuda::Part::kWrites ? &writes : &all);
      if (!captured) cache->CountEntries(layer, 1);
    }
    uploader.Flush();
    launch(halvings);
    launch(admissions);
    launch(writes);
    launch(all);
  }
  const Status status = Launched("append_batch");
  for (int64_t i = 0; i < count && !status.ok(); ++i) at(i)->broken_ = true;
  return status;
}

}  // namespace express::cache
