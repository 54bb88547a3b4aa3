// Creation, layout and life of a cache on a GPU; export.
#include "src/cache/cuda_cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "src/cache/cuda_prompt.h"
#include "src/cache/message.h"
#include "src/cpu/kernels.h"

namespace express::cache {

Status CudaError(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  const StatusCode code = error == cudaErrorMemoryAllocation ? StatusCode::kOutOfMemory : StatusCode::kDeviceError;
  return Error(code, what, ": ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
}

DeviceScope::DeviceScope(int32_t device) : device_(device) {
  error_ = cudaGetDevice(&before_);
  if (error_ == cudaSuccess && before_ != device_) error_ = cudaSetDevice(device_);
}
DeviceScope::~DeviceScope() {
  if (before_ >= 0 && before_ != device_) cudaSetDevice(before_);
}

cudaError_t SideStream::Create() {
  int least = 0, greatest = 0;
  cudaError_t error = cudaDeviceGetStreamPriorityRange(&least, &greatest);
  // Its short kernels go first: attention waits for them.
  for (cudaStream_t* side : {&stream, &graph})
    if (error == cudaSuccess) error = cudaStreamCreateWithPriority(side, cudaStreamNonBlocking, greatest);
  for (cudaEvent_t* event : {&begun, &scored, &admitted, &selected[0], &selected[1], &attended[0], &attended[1]})
    if (error == cudaSuccess) error = cudaEventCreateWithFlags(event, cudaEventDisableTiming);
  return error;
}
void SideStream::Destroy() {
  for (const cudaEvent_t event : {begun, scored, admitted, selected[0], selected[1], attended[0], attended[1]})
    if (event != nullptr) cudaEventDestroy(event);
  for (const cudaStream_t side : {stream, graph})
    if (side != nullptr) cudaStreamDestroy(side);
  *this = SideStream();
}

namespace {

Status CheckPointer(const char* name, const void* data, int32_t device_id) {
  cudaPointerAttributes attributes{};
  const cudaError_t error = cudaPointerGetAttributes(&attributes, data);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return CudaError(name, error);
  }
  if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged)
    return Error(StatusCode::kDeviceMismatch, name, ".data: expected memory of CUDA device ", device_id,
                 ", got an address of the host");
  if (attributes.type == cudaMemoryTypeDevice && attributes.device != device_id)
    return Error(StatusCode::kDeviceMismatch, name, ".data: expected memory of CUDA device ", device_id,
                 ", got memory of device ", attributes.device);
  return Status();
}

// Waits until the stream is done, without touching other streams.
Status Synchronise(cudaStream_t stream) { return CudaError("stream", cudaStreamSynchronize(stream)); }

// All but how attention is launched.
Status ReadTraits(int32_t device, DeviceTraits* traits) {
  int major = 0, minor = 0;
  for (const auto& [attribute, value] : {std::pair(cudaDevAttrComputeCapabilityMajor, &major),
                                         {cudaDevAttrComputeCapabilityMinor, &minor},
                                         {cudaDevAttrMultiProcessorCount, &traits->multiprocessors},
                                         {cudaDevAttrMaxSharedMemoryPerBlockOptin, &traits->shared_bytes}})
    EXPRESS_RETURN_IF_ERROR(CudaError("config.device_id", cudaDeviceGetAttribute(value, attribute, device)));
  traits->compute_capability = 10 * major + minor;
  if (traits->compute_capability < 80)
    return Error(StatusCode::kUnsupported, "config.device_id: device ", device, " has compute capability ", major, ".",
                 minor, ", the kernels need 8.0");
  return Status();
}
Status ReadAttendTraits(int32_t device, DeviceTraits* traits) {
  for (int32_t blocks = 1; blocks <= cuda::kMostBlocks; ++blocks)
    EXPRESS_RETURN_IF_ERROR(
        CudaError("config.device_id", cuda::DescribeAttend(device, blocks, &traits->attend[blocks - 1])));
  return Status();
}

PinnedMemory LayoutPinned(const Resolved& resolved, int32_t plan_capacity, Arena& arena) {
  const int64_t heads = int64_t{resolved.config.layers} * resolved.config.kv_heads;
  int32_t* progress = arena.Take<int32_t>(2 * plan_capacity);
  Observed* observed = arena.Take<Observed>(resolved.observed() ? heads : 0);
  return {progress, observed};
}

}  // namespace

TensorCheck CudaTensorCheck(int32_t device_id) {
  return {.device_type = DeviceType::kCuda, .device_id = device_id, .check_pointer = CheckPointer, .row_alignment = 16};
}

Status CheckCudaConfig(const Config& c) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    return Error(StatusCode::kDeviceError,
                 "config.device_type: no CUDA device can be used: ", cudaGetErrorString(error));
  }
  if (c.device_id < 0 || c.device_id >= count)
    return Error(StatusCode::kInvalidArgument, "config.device_id: expected 0 .. ", count - 1, ", got ", c.device_id);
  for (const auto& [name, dim] : {std::pair("key_dim", c.key_dim), std::pair("value_dim", c.value_dim)})
    if (dim != 64 && dim != 80 && dim != 96 && dim != 128 && dim != 192 && dim != 256)
      return Error(StatusCode::kUnsupported, "config.", name, ": on CUDA expected 64, 80, 96, 128, 192 or 256, got ",
                   dim);
  if (!cuda::AttendSupported(c.key_dim, c.value_dim) || !cuda::PrefillSupported(c.key_dim, c.value_dim))
    return Error(StatusCode::kUnsupported, "config.value_dim: on CUDA key_dim ", c.key_dim, " with value_dim ",
                 c.value_dim, " has no kernels; they may be equal, or 192 and 128");
  if (c.prefill_block % 64 != 0 || c.prefill_block > 8192)
    return Error(StatusCode::kUnsupported, "config.prefill_block: on CUDA expected a multiple of 64 up to 8192, got ",
                 c.prefill_block);
  if (c.validate)
    return Error(StatusCode::kUnsupported,
                 "config.validate: on CUDA expected 0: looking for NaN would have to wait for the device");
  return Status();
}

namespace {

Scoring ScoringOf(const CudaParts& parts) {
  Scoring scoring = parts.scoring != nullptr ? parts.scoring->scoring : Scoring{};
  scoring.rotation.turns = parts.turns;
  return scoring;
}

}  // namespace

// Runs over counting arenas first; then `host` has host memory, and `device` device memory that is only addressed here.
CudaParts CudaCache::Layout(const Shape& r, const PinnedMemory& pinned, Arena& host, Arena& device) {
  const Config& c = r.config;
  const int64_t heads = int64_t{c.layers} * c.kv_heads;
  // What another division of the same total can take more, by rounding: on the host, and on the device.
  const int64_t slack = r.largest != nullptr ? heads * 1024 : 0;
  CudaParts parts{};
  parts.scoring = LayoutScoring(c, host);
  parts.budgets = LayoutBudgets(r, host);
  if (parts.budgets.observed != nullptr) parts.budgets.observed = pinned.observed;
  parts.plans_begin = host.Take<char>(0);
  const size_t before = host.used();
  parts.plans = LayoutPlans(r, false, PlanSource::kNew, host);
  host.Take<char>(slack);
  parts.plans_bytes = static_cast<int64_t>(host.used() - before);
  parts.plans_saved = host.Take<char>(parts.plans_bytes);
  parts.head_copies = host.Take<cuda::Head>(heads);
  parts.ring_copies = host.Take<cuda::Ring>(parts.plans.plan_capacity);
  parts.ring_states = host.Take<RingState>(parts.plans.plan_capacity);
  parts.ahead = host.Take<uint8_t>(c.layers);
  parts.record_words = cuda::kRecordHeader + 10 * parts.plans.max_ops + parts.plans.max_slots;
  parts.record = host.Take<int32_t>(parts.record_words);
  LayoutFixed(r, pinned, device, &parts);
  const size_t begin = device.used();
  parts.arrays = device.Take<char>(0);
  LayoutArrays(r, parts.plans, device, parts.heads != nullptr ? parts.head_copies : nullptr);
  device.Take<char>(slack);
  parts.array_bytes = device.used() - begin;
  parts.state_bytes += parts.array_bytes;
  if (r.largest == nullptr) return parts;
  const bool counting = parts.head_copies == nullptr || parts.heads == nullptr;
  parts.work = device.Take<char>(0);
  LayoutWork(r, parts.plans, device, counting ? nullptr : parts.head_copies, counting ? nullptr : parts.ring_copies);
  device.Take<char>(slack);
  parts.work_bytes = device.used() - begin - parts.array_bytes;
  return parts;
}

void CudaCache::LayoutFixed(const Shape& r, const PinnedMemory& pinned, Arena& device, CudaParts* parts) {
  const Config& c = r.config;
  const int64_t heads = int64_t{c.layers} * c.kv_heads;
  parts->heads = device.Take<cuda::Head>(heads);
  parts->rings = device.Take<cuda::Ring>(parts->plans.plan_capacity);
  if (WithoutPosition(c)) parts->turns = device.Take<uint64_t>(static_cast<int64_t>(c.rope_frequencies.size()));
  int64_t most = r.largest != nullptr ? r.largest->budget : 0;
  for (int64_t h = 0; h < heads; ++h) most = std::max(most, r.settings[h].budget);
  parts->slot_scratch = device.Take<int32_t>(std::max(2 * most, heads));
  // Split attention of one layer at a time: a KV head's partial results are at the same place in every layer.
  const int64_t partial = cuda::AttendMaxSplits(static_cast<int32_t>(most)) * cuda::kPartialRows * (c.value_dim + 2);
  float* partials = device.Take<float>(partial * c.kv_heads);
  parts->buffer = reinterpret_cast<char*>(partials);
  parts->buffer_bytes = static_cast<size_t>(partial * c.kv_heads) * sizeof(float);
  int32_t* tickets = device.Take<int32_t>(c.kv_heads);
  const auto scratch = static_cast<int64_t>(cuda::HalveScratch(static_cast<int32_t>(parts->plans.max_list)));
  const bool counting = parts->head_copies == nullptr || parts->heads == nullptr;
  const bool observed = r.largest != nullptr;  // then rings and scratch change with the budgets
  const auto ring_words = static_cast<int32_t>(2 * parts->record_words + kRingExtra);
  for (int32_t i = 0; i < parts->plans.plan_capacity; ++i) {
    int32_t* words = device.Take<int32_t>(observed ? 0 : ring_words);
    if (counting) continue;
    parts->ring_copies[i] = {.words = words,
                             .capacity = ring_words,
                             .heads = i < parts->plans.plan_count ? parts->plans.plans[i].head_count : 0,
                             .cursor = 0,
                             .sequence = 0,
                             .arrived = 0,
                             .progress = pinned.progress != nullptr ? pinned.progress + 2 * i : nullptr};
    new (&parts->ring_states[i]) RingState();
  }
  char* scratches = device.Take<char>(observed ? 0 : (scratch + 255) / 256 * 256 * heads);
  const size_t state = device.used();
  parts->state = device.Take<char>(0);
  parts->seen = device.Take<cuda::Seen>(r.largest != nullptr ? heads : 0);
  if (r.largest == nullptr) parts->seen = nullptr;
  int32_t* counts = device.Take<int32_t>(2 * heads);
  parts->state_bytes = device.used() - state;
  if (counting) return;
  for (int64_t h = 0; h < heads; ++h) {
    cuda::Head& head = *new (&parts->head_copies[h]) cuda::Head();
    head.partial = partials + h % c.kv_heads * partial;
    head.ticket = tickets + h % c.kv_heads;
    head.halve_scratch = scratches + (scratch + 255) / 256 * 256 * h;
    head.protected_count = counts + 2 * h;
    head.seen = parts->seen != nullptr ? parts->seen + h : nullptr;
    head.scoring = ScoringOf(*parts);
    head.plan = parts->plans.head_plan[h];
    head.stream = MakeStreamKey(c.seed, static_cast<uint32_t>(c.first_layer + h / c.kv_heads),
                                static_cast<uint32_t>(c.first_kv_head + h % c.kv_heads));
  }
}

// Every head may have a plan of its own.
void CudaCache::LayoutWork(const Shape& r, const Plans& plans, Arena& device, cuda::Head* described,
                           cuda::Ring* rings) {
  const int64_t heads = int64_t{r.config.layers} * r.config.kv_heads;
  for (int64_t h = 0; h < heads; ++h) {
    Arena none;
    const plan::Plan plan(r.settings[h], none);
    const int64_t record = cuda::kRecordHeader + 10 * plan.MaxOps() + std::max(plan.MaxSlots(), r.settings[h].budget);
    const auto words = static_cast<int32_t>(2 * record + kRingExtra);
    int32_t* ring = device.Take<int32_t>(words);
    char* scratch = device.Take<char>(static_cast<int64_t>(cuda::HalveScratch(static_cast<int32_t>(plan.MaxList()))));
    if (described == nullptr) continue;
    described[h].halve_scratch = scratch;
    const int32_t index = plans.head_plan[h];
    if (plans.plan_heads[plans.plans[index].first_head] != h) continue;
    rings[index].words = ring;
    rings[index].capacity = words;
  }
}

void CudaCache::LayoutArrays(const Shape& r, const Plans& plans, Arena& device, cuda::Head* described) {
  const Config& c = r.config;
  const int64_t heads = int64_t{c.layers} * c.kv_heads, element = SizeOf(c.dtype);
  const auto rows = [&](int64_t bytes) {
    constexpr int64_t kAlignment = 256;
    char* at = device.Take<char>((bytes + kAlignment - 1 + 64) / kAlignment * kAlignment + kAlignment);
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(at) + kAlignment - 1) / kAlignment * kAlignment);
  };
  for (int64_t h = 0; h < heads; ++h) {
    const plan::Setting& setting = r.settings[h];
    const int64_t leader = described == nullptr ? h : plans.plan_heads[plans.plans[plans.head_plan[h]].first_head];
    cuda::Head head = described == nullptr ? cuda::Head() : described[h];
    head.key = rows(setting.budget * c.key_dim * element);
    head.value = rows(setting.budget * (c.value_dim * element + cpu::ScaleBytes(c.dtype)));
    head.scale = nullptr;
    if (c.dtype == DType::kI8)
      head.scale = reinterpret_cast<cuda::RowScales*>(static_cast<char*>(head.value) + setting.budget * c.value_dim);
    head.position = device.Take<int64_t>(setting.budget);
    // Every head takes room for weights, so that the size does not depend on how heads share plans.
    float* own = device.Take<float>(setting.budget);
    head.log_weight = leader == h ? own : described[leader].log_weight;
    head.mean = head.sum = head.score = nullptr;
    head.protected_slot = nullptr;
    if (setting.protect > 0) {
      head.mean = device.Take<float>(c.key_dim);
      head.sum = device.Take<float>(c.key_dim);
      head.score = device.Take<float>(setting.protect);
      head.protected_slot = device.Take<int32_t>(setting.protect);
    }
    if (described == nullptr) continue;
    head.capacity = static_cast<int32_t>(setting.budget);
    head.protect = static_cast<int32_t>(setting.protect);
    head.leader = leader == h ? 1 : 0;
    described[h] = head;
  }
}

Status CudaCache::Bytes(const Resolved& resolved, int64_t* bytes) {
  Arena host, device;
  Layout(resolved.shape(), {}, host, device);
  if (host.overflow() || device.overflow())
    return Error(StatusCode::kSizeOverflow, "config: the cache would take more bytes than can be addressed");
  *bytes = static_cast<int64_t>(device.used());
  return Status();
}

CudaCache::CudaCache(const Resolved& resolved, const CudaParts& parts, int64_t bytes, void* device_memory,
                     int32_t* progress, DeviceTraits traits)
    : Cache(resolved, parts.scoring, parts.plans, parts.budgets, bytes, CudaTensorCheck(resolved.config.device_id)),
      parts_(parts),
      device_memory_(device_memory),
      progress_(progress),
      traits_(traits),
      stream_(static_cast<cudaStream_t>(resolved.config.stream)),
      largest_(resolved.largest) {}

Status CudaCache::Create(const Resolved& resolved, int64_t bytes, Cache** cache) {
  const DeviceScope scope(resolved.config.device_id);
  EXPRESS_RETURN_IF_ERROR(CudaError("config.device_id", scope.error()));
  DeviceTraits traits;
  EXPRESS_RETURN_IF_ERROR(ReadTraits(resolved.config.device_id, &traits));
  EXPRESS_RETURN_IF_ERROR(ReadAttendTraits(resolved.config.device_id, &traits));
  EXPRESS_RETURN_IF_ERROR(CudaError("config", cuda::PrepareAttend(resolved.config.dtype, resolved.config.key_dim,
                                                                  resolved.config.value_dim, traits.attend[0])));
  Arena host_count, device_count;
  const CudaParts counted = Layout(resolved.shape(), {}, host_count, device_count);
  struct Memory {  // freed unless taken
    void *host = nullptr, *device = nullptr, *pinned = nullptr;
    ~Memory() {
      std::free(host);
      if (device != nullptr) cudaFree(device);
      if (pinned != nullptr) cudaFreeHost(pinned);
    }
  } memory;
  const auto out_of_memory = [&](const char* where, size_t size) {
    cudaGetLastError();
    return Error(StatusCode::kOutOfMemory, "config: no memory for a cache of ", size, " bytes on the ", where);
  };
  const size_t object = (sizeof(CudaCache) + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
  memory.host = std::aligned_alloc(Arena::kAlignment, object + host_count.used());
  if (memory.host == nullptr) return out_of_memory("host", object + host_count.used());
  if (cudaMalloc(&memory.device, static_cast<size_t>(bytes)) != cudaSuccess)
    return out_of_memory("device", static_cast<size_t>(bytes));
  Arena pinned_count;
  LayoutPinned(resolved, counted.plans.plan_capacity, pinned_count);
  if (cudaHostAlloc(&memory.pinned, pinned_count.used(), cudaHostAllocDefault) != cudaSuccess)
    return out_of_memory("host", pinned_count.used());
  std::memset(memory.pinned, 0, pinned_count.used());

  Arena host(static_cast<char*>(memory.host) + object), device(memory.device), pinned(memory.pinned);
  const PinnedMemory pinned_memory = LayoutPinned(resolved, counted.plans.plan_capacity, pinned);
  const CudaParts parts = Layout(resolved.shape(), pinned_memory, host, device);
  auto* created = new (memory.host) CudaCache(resolved, parts, bytes, memory.device, pinned_memory.progress, traits);
  Status status = CudaError("config", created->side_.Create());
  if (status.ok() && resolved.observed())
    status = CudaError("config", cudaEventCreateWithFlags(&created->observed_, cudaEventDisableTiming));
  if (status.ok()) status = created->ResetData();
  if (!status.ok()) {
    created->side_.Destroy();
    if (created->observed_ != nullptr) cudaEventDestroy(created->observed_);
    created->~CudaCache();
    return status;
  }
  memory.host = memory.device = memory.pinned = nullptr;
  *cache = created;
  return Status();
}

CudaCache::~CudaCache() = default;

void CudaCache::Delete() {
  const DeviceScope scope(config_.device_id);
  if (device_memory_ != nullptr) {
    cudaStreamSynchronize(stream_);
    side_.Destroy();
    if (observed_ != nullptr) cudaEventDestroy(observed_);
    cudaFree(device_memory_);
    cudaFreeHost(progress_);
  }
  this->~CudaCache();
  std::free(this);
}

Status CudaCache::DoSetStream(void* stream) {
  stream_ = static_cast<cudaStream_t>(stream);
  return Status();
}

void CudaCache::InitDevice() {
  const int32_t heads = config_.layers * config_.kv_heads;
  cuda::Uploader uploader(stream_);
  uploader.Add(parts_.heads, parts_.head_copies, static_cast<size_t>(heads) * sizeof(cuda::Head));
  uploader.Add(parts_.rings, parts_.ring_copies, static_cast<size_t>(plans_.plan_capacity) * sizeof(cuda::Ring));
  if (parts_.scoring != nullptr)
    uploader.Add(parts_.turns, parts_.scoring->scoring.rotation.turns,
                 static_cast<size_t>(parts_.scoring->scoring.rotation.pairs) * sizeof(uint64_t));
  uploader.Flush();
  cuda::ResetHeads(parts_.heads, heads, parts_.rings, plans_.plan_count, config_.key_dim, stream_);
}

// Descriptions are sent again: a kernel that was broken off may have left the rings in disorder.
Status CudaCache::ResetData() {
  const DeviceScope scope(config_.device_id);
  EXPRESS_RETURN_IF_ERROR(Synchronise(stream_));
  InitDevice();
  EXPRESS_RETURN_IF_ERROR(CudaError("cache", cudaGetLastError()));
  EXPRESS_RETURN_IF_ERROR(Synchronise(stream_));
  for (int32_t i = 0; i < plans_.plan_capacity; ++i) parts_.ring_states[i] = RingState();
  std::fill_n(progress_, 2 * plans_.plan_capacity, 0);
  std::fill_n(parts_.ahead, config_.layers, 0);
  prepared_ = false;
  return Status();
}

Status CudaCache::Place(const Resolved& resolved, int64_t bytes, void* device_memory, CudaCache** cache) {
  DeviceTraits traits;
  if (device_memory != nullptr) EXPRESS_RETURN_IF_ERROR(ReadTraits(resolved.config.device_id, &traits));
  Arena count, device_count;
  Layout(resolved.shape(), {}, count, device_count);
  const size_t object = (sizeof(CudaCache) + Arena::kAlignment - 1) / Arena::kAlignment * Arena::kAlignment;
  void* memory = std::aligned_alloc(Arena::kAlignment, object + count.used());
  if (memory == nullptr) return Error(StatusCode::kOutOfMemory, "config: no memory for plans on the host");
  // Device pointers are formed, not followed: without memory yet, any aligned base serves to count.
  void* base = device_memory != nullptr ? device_memory : reinterpret_cast<void*>(uintptr_t{4096});
  Arena host(static_cast<char*>(memory) + object), device(base);
  const CudaParts parts = Layout(resolved.shape(), {}, host, device);
  std::fill_n(parts.ahead, resolved.config.layers, 0);
  *cache = new (memory) CudaCache(resolved, parts, bytes, nullptr, nullptr, traits);
  return Status();
}

Status CudaCache::Launched(const char* what) const { return CudaError(what, cudaGetLastError()); }

Status CudaCache::BreakOn(const Status& status) {
  if (!status.ok()) broken_ = true;
  return status;
}

Scoring CudaCache::DeviceScoring() const { return ScoringOf(parts_); }

cuda::HalveParams CudaCache::Halve() const {
  return {.scale = static_cast<float>(config_.scale),
          .gamma = static_cast<float>(config_.gamma),
          .tau = static_cast<float>(config_.tau),
          .delta = static_cast<float>(config_.delta),
          .coin = config_.halving == Halving::kCoin};
}

// The live slots, their weights and the copy's description travel to the device in the launch.
Status CudaCache::ExportHead(int32_t index, const Array& k, const Array& v, const Array* log_weight,
                             const Array* position) const {
  const DeviceScope scope(config_.device_id);
  const cuda::Head& head = parts_.head_copies[index];
  const plan::Plan& plan = plans_.plans[head.plan].plan;
  cuda::Uploader uploader(stream_);
  int32_t* entries = parts_.slot_scratch;
  auto* weights = reinterpret_cast<float*>(entries + plan.setting().budget);
  constexpr int32_t kPiece = 512;
  int32_t piece[kPiece], count = 0;
  float weight_piece[kPiece];
  const auto send = [&](int32_t filled) {
    uploader.Add(entries + count - filled, piece, static_cast<size_t>(filled) * 4);
    uploader.Add(weights + count - filled, weight_piece, static_cast<size_t>(filled) * 4);
  };
  int32_t filled = 0;
  for (int32_t slot = 0; slot < head.capacity; ++slot) {
    if (plan.weight(slot) == 0) continue;
    piece[filled] = -1 - slot;
    weight_piece[filled++] = LogWeight(plan.weight(slot));
    ++count;
    if (filled == kPiece) send(std::exchange(filled, 0));
  }
  send(filled);
  const cuda::GatherHead gather{
      .slab_key = head.key,
      .slab_value = head.value,
      .slab_scale = head.scale,
      .slab_position = head.position,
      .key = k.data,
      .value = v.data,
      .scale = nullptr,
      .position = position != nullptr ? reinterpret_cast<int64_t*>(position->data) : nullptr,
      .log_weight = log_weight != nullptr ? reinterpret_cast<float*>(log_weight->data) : nullptr,
      .index = entries,
      .to = nullptr,
      .weights = weights,
      .count = count,
      .kv_head = 0};
  uploader.Flush();
  cuda::GatherOne(gather,
                  {.heads = nullptr,
                   .head_count = 1,
                   .most_count = count,
                   .key_dim = config_.key_dim,
                   .value_dim = config_.value_dim,
                   .dtype = config_.dtype,
                   .key_dtype = k.dtype,
                   .value_dtype = v.dtype,
                   .key_stride = k.stride[0],
                   .value_stride = v.stride[0],
                   .position_stride = position != nullptr ? position->stride[0] : 0,
                   .log_weight_stride = log_weight != nullptr ? log_weight->stride[0] : 0,
                   .k = {},
                   .v = {},
                   .first_position = 0},
                  stream_);
  return Launched("export");
}

}  // namespace express::cache
