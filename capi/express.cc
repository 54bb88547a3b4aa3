// The C ABI: converts types, guards the border, remembers the last error. Everything else is in src/cache.
#include "capi/express.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <iterator>
#include <new>
#include <optional>

#include "src/cache/cache.h"
#include "src/cache/message.h"

namespace {

using express::Status;
using express::StatusCode;
using express::cache::Cache;
using express::cache::Error;

constexpr size_t kMessageBytes = 1024;
thread_local char last_error[kMessageBytes] = "";

express_status Fail(StatusCode code, const char* message) noexcept {
  std::strncpy(last_error, message, kMessageBytes - 1);
  return static_cast<express_status>(code);
}

// Runs the body of a call. Nothing but a status leaves.
template <class Body>
express_status Guard(const Body& body) noexcept {
  try {
    const Status status = body();
    return status.ok() ? EXPRESS_STATUS_OK : Fail(status.code(), status.message().c_str());
  } catch (const std::bad_alloc&) {
    return Fail(StatusCode::kOutOfMemory, "out of memory");
  } catch (...) {
    return Fail(StatusCode::kInternal, "an exception inside the library");
  }
}

Cache* From(express_cache* cache) { return reinterpret_cast<Cache*>(cache); }
const Cache* From(const express_cache* cache) { return reinterpret_cast<const Cache*>(cache); }

// The first of the arguments that is NULL but must not be.
struct Argument {
  const char* name;
  const void* pointer;
};
Status NotNull(std::initializer_list<Argument> arguments) {
  for (const Argument& argument : arguments)
    if (argument.pointer == nullptr)
      return Error(StatusCode::kInvalidArgument, argument.name, ": expected a pointer, got NULL");
  return Status();
}

express::Tensor From(const express_tensor& t) {
  return {t.data,      static_cast<express::DeviceType>(t.device_type),
          t.device_id, static_cast<express::DType>(t.dtype),
          t.ndim,      t.shape,
          t.strides};
}
std::optional<express::Tensor> FromOptional(const express_tensor* t) {
  return t != nullptr ? std::optional(From(*t)) : std::nullopt;
}
const express::Tensor* PointerTo(const std::optional<express::Tensor>& t) { return t ? &*t : nullptr; }

Status CheckFlag(const char* name, int32_t value) {
  if (value == 0 || value == 1) return Status();
  return Error(StatusCode::kInvalidArgument, "config.", name, ": expected 0 or 1, got ", value);
}

// A span over the caller's array, or what is wrong with it.
template <class To, class From>
Status Span(const char* name, const char* count_name, const From* data, int64_t count, std::span<const To>* span) {
  static_assert(sizeof(To) == sizeof(From) && alignof(To) == alignof(From));
  if (count < 0) return Error(StatusCode::kInvalidArgument, "config.", count_name, ": expected >= 0, got ", count);
  if (count > 0 && data == nullptr)
    return Error(StatusCode::kInvalidArgument, "config.", name, ": expected ", count, " elements, got NULL");
  *span = {reinterpret_cast<const To*>(data), static_cast<size_t>(count)};
  return Status();
}

// Sizes of express_config in versions before this one.
constexpr uint32_t kConfigSizes[] = {offsetof(express_config, stream)};  // 1.0

bool KnownConfigSize(uint32_t size) {
  return size >= sizeof(express_config) || std::count(std::begin(kConfigSizes), std::end(kConfigSizes), size) > 0;
}

// The caller's struct may be longer than ours if the rest is zero; one of an older version is completed by the
// defaults, which `config` holds.
Status TakeConfig(const express_config* given, express_config* config) {
  EXPRESS_RETURN_IF_ERROR(NotNull({{"config", given}}));
  const uint32_t size = given->struct_size;
  if (!KnownConfigSize(size))
    return Error(StatusCode::kInvalidArgument, "config.struct_size: expected at least ", sizeof(express_config),
                 ", got ", size);
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  if (size > sizeof(express_config) &&
      std::any_of(bytes + sizeof(express_config), bytes + size, [](unsigned char byte) { return byte != 0; }))
    return Error(StatusCode::kUnsupported, "config.struct_size: ", size,
                 " bytes with fields set that this version of the library does not know");
  std::memcpy(config, given, std::min<size_t>(size, sizeof(express_config)));
  // A program from before the field was there relies on what it does not know to change.
  if (size <= offsetof(express_config, head_budgets)) config->head_budgets = EXPRESS_HEAD_BUDGETS_FIXED;
  return Status();
}

Status ConvertConfig(const express_config* given, express::Config* to) {
  express_config c = EXPRESS_CONFIG_INIT;
  EXPRESS_RETURN_IF_ERROR(TakeConfig(given, &c));
  EXPRESS_RETURN_IF_ERROR(CheckFlag("auto_compress", c.auto_compress));
  EXPRESS_RETURN_IF_ERROR(CheckFlag("validate", c.validate));
  to->layers = c.layers;
  to->query_heads = c.query_heads;
  to->kv_heads = c.kv_heads;
  to->key_dim = c.key_dim;
  to->value_dim = c.value_dim;
  to->scale = c.scale;
  to->dtype = static_cast<express::DType>(c.dtype);
  to->device_type = static_cast<express::DeviceType>(c.device_type);
  to->device_id = c.device_id;
  to->first_layer = c.first_layer;
  to->first_kv_head = c.first_kv_head;
  to->budget_unit = static_cast<express::BudgetUnit>(c.budget_unit);
  to->budget = c.budget;
  to->sinks = c.sinks;
  to->window = c.window;
  to->protected_entries = c.protected_entries;
  to->rollback_reserve = c.rollback_reserve;
  EXPRESS_RETURN_IF_ERROR(Span("head_share", "head_share_count", c.head_share, c.head_share_count, &to->head_share));
  EXPRESS_RETURN_IF_ERROR(
      Span("head_settings", "head_settings_count", c.head_settings, c.head_settings_count, &to->head_settings));
  to->schedule = static_cast<express::Schedule>(c.schedule);
  to->halving = static_cast<express::Halving>(c.halving);
  to->weight_exponent = c.weight_exponent;
  to->gamma = c.gamma;
  to->tau = c.tau;
  to->delta = c.delta;
  to->level_fraction = c.level_fraction;
  to->level_floor = c.level_floor;
  to->max_levels = c.max_levels;
  to->seed = c.seed;
  to->prefill_block = c.prefill_block;
  to->auto_compress = c.auto_compress != 0;
  to->validate = c.validate != 0;
  to->threads = c.threads;
  to->parallel_for = c.parallel_for;
  to->parallel_for_context = c.parallel_for_context;
  to->stream = c.stream;
  to->head_budgets = static_cast<express::HeadBudgets>(c.head_budgets);
  to->protection_score = static_cast<express::ProtectionScore>(c.protection_score);
  EXPRESS_RETURN_IF_ERROR(Span("rope_frequencies", "rope_frequency_count", c.rope_frequencies, c.rope_frequency_count,
                               &to->rope_frequencies));
  to->rope_layout = static_cast<express::RopeLayout>(c.rope_layout);
  if (c.reserved != 0) return Error(StatusCode::kInvalidArgument, "config.reserved: expected 0, got ", c.reserved);
  return Status();
}

// The numbers of the two interfaces are the same.
static_assert(static_cast<int>(StatusCode::kRingFull) == EXPRESS_STATUS_RING_FULL);
static_assert(static_cast<int>(StatusCode::kBroken) == EXPRESS_STATUS_BROKEN);
static_assert(static_cast<int>(express::DType::kBF16) == EXPRESS_DTYPE_BF16);
static_assert(static_cast<int>(express::DType::kI8) == EXPRESS_DTYPE_I8);
static_assert(static_cast<int>(express::DType::kI64) == EXPRESS_DTYPE_I64);
static_assert(static_cast<int>(express::DeviceType::kCuda) == EXPRESS_DEVICE_CUDA);
static_assert(static_cast<int>(express::Schedule::kRounds) == EXPRESS_SCHEDULE_ROUNDS);
static_assert(static_cast<int>(express::Halving::kCoin) == EXPRESS_HALVING_COIN);
static_assert(static_cast<int>(express::BudgetUnit::kBytes) == EXPRESS_BUDGET_BYTES);
static_assert(static_cast<int>(express::ProtectionScore::kEnergyValue) == EXPRESS_PROTECTION_SCORE_ENERGY_VALUE);
static_assert(static_cast<int>(express::RopeLayout::kInterleaved) == EXPRESS_ROPE_LAYOUT_INTERLEAVED);
static_assert(static_cast<int>(express::HeadBudgets::kObserved) == EXPRESS_HEAD_BUDGETS_OBSERVED);
static_assert(express::kAuto == EXPRESS_AUTO && express::kAllLayers == EXPRESS_AUTO);

}  // namespace

extern "C" {

const char* express_status_name(express_status status) {
  static constexpr const char* kNames[] = {
      "EXPRESS_STATUS_OK",
      "EXPRESS_STATUS_INVALID_ARGUMENT",
      "EXPRESS_STATUS_OUT_OF_RANGE",
      "EXPRESS_STATUS_SHAPE_MISMATCH",
      "EXPRESS_STATUS_DTYPE_MISMATCH",
      "EXPRESS_STATUS_DEVICE_MISMATCH",
      "EXPRESS_STATUS_NOT_FINITE",
      "EXPRESS_STATUS_BUDGET_TOO_SMALL",
      "EXPRESS_STATUS_WOULD_COMPRESS",
      "EXPRESS_STATUS_ROLLBACK_UNAVAILABLE",
      "EXPRESS_STATUS_BUFFER_TOO_SMALL",
      "EXPRESS_STATUS_SIZE_OVERFLOW",
      "EXPRESS_STATUS_OUT_OF_MEMORY",
      "EXPRESS_STATUS_UNSUPPORTED",
      "EXPRESS_STATUS_BROKEN",
      "EXPRESS_STATUS_INTERNAL",
      "EXPRESS_STATUS_DEVICE_ERROR",
      "EXPRESS_STATUS_STEPS_PENDING",
      "EXPRESS_STATUS_RING_FULL",
  };
  const auto number = static_cast<unsigned>(status);
  return number < std::size(kNames) ? kNames[number] : "EXPRESS_STATUS_UNKNOWN";
}

const char* express_last_error(void) { return last_error; }

uint32_t express_version(void) {
  return EXPRESS_VERSION_MAJOR * 10000 + EXPRESS_VERSION_MINOR * 100 + EXPRESS_VERSION_PATCH;
}

const char* express_version_string(void) { return "1.1.0"; }

express_status express_config_init(express_config* config, uint32_t struct_size) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"config", config}}));
    if (struct_size > sizeof(express_config) || !KnownConfigSize(struct_size))
      return Error(StatusCode::kInvalidArgument, "struct_size: expected ", sizeof(express_config), ", got ",
                   struct_size);
    express_config defaults = EXPRESS_CONFIG_INIT;
    defaults.struct_size = struct_size;
    std::memcpy(config, &defaults, struct_size);
    return Status();
  });
}

express_status express_size(const express_config* config, int64_t* bytes, int64_t* mean_entries) {
  return Guard([&] {
    express::Config c;
    EXPRESS_RETURN_IF_ERROR(ConvertConfig(config, &c));
    return Cache::Size(c, bytes, mean_entries);
  });
}

express_status express_create(const express_config* config, express_cache** cache) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}}));
    *cache = nullptr;
    express::Config c;
    EXPRESS_RETURN_IF_ERROR(ConvertConfig(config, &c));
    Cache* created = nullptr;
    EXPRESS_RETURN_IF_ERROR(Cache::Create(c, &created));
    *cache = reinterpret_cast<express_cache*>(created);
    return Status();
  });
}

void express_destroy(express_cache** cache) {
  if (cache == nullptr) return;
  Cache::Destroy(From(*cache));
  *cache = nullptr;
}

express_status express_reset(express_cache* cache) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}}));
    return From(cache)->Reset();
  });
}

express_status express_append(express_cache* cache, int32_t layer, const express_tensor* k, const express_tensor* v) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"k", k}, {"v", v}}));
    return From(cache)->Append(layer, From(*k), From(*v));
  });
}

express_status express_append_all(express_cache* cache, const express_tensor* k, const express_tensor* v) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"k", k}, {"v", v}}));
    return From(cache)->AppendAll(From(*k), From(*v));
  });
}

express_status express_attend(const express_cache* cache, int32_t layer, const express_tensor* q,
                              const express_tensor* out, const express_tensor* lse) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"q", q}, {"out", out}}));
    const auto lse_tensor = FromOptional(lse);
    return From(cache)->Attend(layer, From(*q), From(*out), PointerTo(lse_tensor));
  });
}

express_status express_append_batch(express_cache* const* caches, int64_t count, int32_t layer, const express_tensor* k,
                                    const express_tensor* v) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"caches", caches}, {"k", k}, {"v", v}}));
    if (count < 0) return Error(StatusCode::kInvalidArgument, "count: expected >= 0, got ", count);
    return Cache::AppendBatch(reinterpret_cast<Cache* const*>(caches), count, layer, From(*k), From(*v));
  });
}

express_status express_attend_batch(const express_cache* const* caches, int64_t count, int32_t layer,
                                    const express_tensor* q, const express_tensor* out, const express_tensor* lse) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"caches", caches}, {"q", q}, {"out", out}}));
    if (count < 0) return Error(StatusCode::kInvalidArgument, "count: expected >= 0, got ", count);
    const auto lse_tensor = FromOptional(lse);
    return Cache::AttendBatch(reinterpret_cast<const Cache* const*>(caches), count, layer, From(*q), From(*out),
                              PointerTo(lse_tensor));
  });
}

express_status express_set_stream(express_cache* cache, void* stream) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}}));
    return From(cache)->SetStream(stream);
  });
}

express_status express_step_prepare(express_cache* cache, int64_t n) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}}));
    return From(cache)->StepPrepare(n);
  });
}

express_status express_step_cancel(express_cache* cache) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}}));
    return From(cache)->StepCancel();
  });
}

express_status express_workspace_size(const express_cache* cache, int64_t n, size_t* bytes) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"bytes", bytes}}));
    return From(cache)->WorkspaceSize(n, bytes);
  });
}

express_status express_prefill(express_cache* cache, int32_t layer, const express_tensor* q, const express_tensor* k,
                               const express_tensor* v, const express_tensor* out, const express_tensor* lse,
                               const express_workspace* workspace) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"q", q}, {"k", k}, {"v", v}, {"out", out}}));
    const auto lse_tensor = FromOptional(lse);
    const express::Workspace scratch =
        workspace != nullptr ? express::Workspace{workspace->data, workspace->bytes} : express::Workspace{};
    return From(cache)->Prefill(layer, From(*q), From(*k), From(*v), From(*out), PointerTo(lse_tensor), &scratch);
  });
}

express_status express_compress(express_cache* cache, int32_t layer, int64_t tokens, int64_t* achieved) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}}));
    return From(cache)->Compress(layer, tokens, achieved);
  });
}

express_status express_rollback(express_cache* cache, int64_t tokens) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}}));
    return From(cache)->Rollback(tokens);
  });
}

express_status express_rollback_available(const express_cache* cache, int64_t* tokens) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"tokens", tokens}}));
    return From(cache)->RollbackAvailable(tokens);
  });
}

express_status express_entries(const express_cache* cache, int32_t layer, int32_t kv_head, int64_t* count) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"count", count}}));
    return From(cache)->Entries(layer, kv_head, count);
  });
}

express_status express_export(const express_cache* cache, int32_t layer, int32_t kv_head, const express_tensor* k,
                              const express_tensor* v, const express_tensor* log_weight, const express_tensor* position,
                              int64_t* count) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"k", k}, {"v", v}, {"count", count}}));
    const auto weight_tensor = FromOptional(log_weight), position_tensor = FromOptional(position);
    return From(cache)->Export(layer, kv_head, From(*k), From(*v), PointerTo(weight_tensor), PointerTo(position_tensor),
                               count);
  });
}

express_status express_compress_kv_workspace(const express_config* config, size_t* bytes) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"bytes", bytes}}));
    express::Config c;
    EXPRESS_RETURN_IF_ERROR(ConvertConfig(config, &c));
    return Cache::CompressKvWorkspace(c, bytes);
  });
}

express_status express_compress_kv(const express_config* config, const express_tensor* k, const express_tensor* v,
                                   const express_tensor* out_k, const express_tensor* out_v,
                                   const express_tensor* log_weight, const express_tensor* position, int64_t* count,
                                   const express_workspace* workspace) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"k", k},
                                     {"v", v},
                                     {"out_k", out_k},
                                     {"out_v", out_v},
                                     {"log_weight", log_weight},
                                     {"count", count},
                                     {"workspace", workspace}}));
    express::Config c;
    EXPRESS_RETURN_IF_ERROR(ConvertConfig(config, &c));
    const auto position_tensor = FromOptional(position);
    return Cache::CompressKv(c, From(*k), From(*v), From(*out_k), From(*out_v), From(*log_weight),
                             PointerTo(position_tensor), count, {workspace->data, workspace->bytes});
  });
}

express_status express_get_stats(const express_cache* cache, int32_t layer, express_stats* stats) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"stats", stats}}));
    if (stats->struct_size < sizeof(express_stats))
      return Error(StatusCode::kInvalidArgument, "stats.struct_size: expected at least ", sizeof(express_stats),
                   ", got ", stats->struct_size);
    express::Stats s;
    EXPRESS_RETURN_IF_ERROR(From(cache)->GetStats(layer, &s));
    const uint32_t size = stats->struct_size;
    *stats = {size,           static_cast<int32_t>(s.head_budgets),
              s.tokens,       s.entries,
              s.entries_peak, s.entries_budget,
              s.min_weight,   s.max_weight,
              s.halvings,     s.bytes,
              s.bytes_peak,   s.compress_seconds};
    return Status();
  });
}

express_status express_bytes(const express_cache* cache, int64_t* bytes) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"bytes", bytes}}));
    return From(cache)->Bytes(bytes);
  });
}

express_status express_save_size(const express_cache* cache, size_t* bytes) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"bytes", bytes}}));
    return From(cache)->SaveSize(bytes);
  });
}

express_status express_save(const express_cache* cache, void* data, size_t bytes) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"data", data}}));
    return From(cache)->Save(data, bytes);
  });
}

express_status express_load(express_cache* cache, const void* data, size_t bytes) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"data", data}}));
    return From(cache)->Load(data, bytes);
  });
}

express_status express_copy(express_cache* cache, const express_cache* from) {
  return Guard([&] {
    EXPRESS_RETURN_IF_ERROR(NotNull({{"cache", cache}, {"from", from}}));
    return From(cache)->Copy(*From(from));
  });
}

}  // extern "C"
