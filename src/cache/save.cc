// A cache as bytes, and a cache from another one.
//
// The bytes are those of the fields one after the other, little-endian as all machines are that this runs on; their number depends
// on the configuration alone. They are the same whatever device the cache is on.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include <bit>
#include <cstring>
#include <memory>

#include "src/cache/cache.h"
#include "src/cache/message.h"
#include "src/cpu/kernels.h"

namespace express::cache {
namespace {

static_assert(std::endian::native == std::endian::little);

struct Header {
  char magic[8] = {'E', 'X', 'P', 'R', 'E', 'S', 'S', 0};
  uint32_t format = 0, reserved = 0;
  uint64_t bytes = 0;        // in all
  uint64_t fingerprint = 0;  // of the configuration
  uint64_t checksum = 0;     // of all that follows
};
static_assert(sizeof(Header) == 40);

// Of 8-bit storage, entries come with their scales: readers of format 2 do not know of them.
uint32_t FormatOf(DType dtype) { return dtype == DType::kI8 ? 3 : 2; }
constexpr uint32_t kOldestFormat = 2, kNewestFormat = 3;

uint64_t Hash(const void* data, size_t bytes) { return XXH3_64bits(data, bytes); }

// What a plan of this setting takes in an archive.
size_t PlanBytes(const plan::Setting& setting) {
  Arena none;
  Archive archive;
  plan::Plan(setting, none).Transfer(archive);
  return archive.used();
}

// Memory for the length of a call.
class Staging {
 public:
  explicit Staging(size_t bytes) : data_(bytes > 0 ? new char[bytes] : nullptr) {}
  void* data() const { return data_.get(); }

 private:
  std::unique_ptr<char[]> data_;
};

}  // namespace

// Of all that decides what is kept, and in which places. Devices, threads and what only attention uses may differ.
uint64_t Cache::Fingerprint() const {
  const Config& c = config_;
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  const auto add = [&](const auto&... fields) { (XXH3_64bits_update(&state, &fields, sizeof(fields)), ...); };
  add(c.layers, c.kv_heads, c.key_dim, c.value_dim, c.scale, c.dtype, c.first_layer, c.first_kv_head, c.halving,
      c.gamma, c.tau, c.delta, c.seed);
  if (WithoutPosition(c)) {  // as before there was a choice, otherwise
    add(c.protection_score, c.rope_layout, c.rope_frequencies.size());
    for (const float frequency : c.rope_frequencies) add(frequency);
  }
  const auto add_setting = [&](const plan::Setting& s) {
    add(s.budget, s.sinks, s.window, s.reserve, s.protect, s.schedule, s.level_fraction, s.level_floor, s.max_levels);
  };
  if (budgets_.observed != nullptr) {  // those of a new cache
    add(c.head_budgets);
    add_setting(DivideHead(c, BaseBudget(c, mean_budget_), mean_budget_));
  } else {
    for (int32_t h = 0; h < HeadCount(); ++h) add_setting(HeadSettingOf(h));
  }
  return XXH3_64bits_digest(&state);
}

void Cache::TransferObservation(Archive& archive) {
  archive.Array(budgets_.observed, HeadCount(), HeadCount());
  archive.Field(next_settling_);
  archive.Field(observation_closed_);
}

// budgets_.leader, from what TransferPlans has written for budgets_.settings: heads of a layer share a plan if they have the same one.
void Cache::FindLeaders(const char* saved) {
  Archive skipped;
  TransferObservation(skipped);
  saved += skipped.used();
  for (int32_t h = 0; h < HeadCount(); ++h) {
    const size_t bytes = PlanBytes(budgets_.settings[h]);
    const char* other = saved;
    int32_t first = h;
    for (int32_t g = h; g-- > h / config_.kv_heads * config_.kv_heads;) {
      other -= PlanBytes(budgets_.settings[g]);
      if (budgets_.settings[g] == budgets_.settings[h] && std::memcmp(other, saved, bytes) == 0) first = g;
    }
    budgets_.leader[h] = first;
    saved += bytes;
  }
}

// Plans and counts, which the host keeps. The budgets of heads are those of the plans by now.
void Cache::TransferPlans(Archive& archive) {
  if (budgets_.observed != nullptr) TransferObservation(archive);
  // Where budgets are observed, once for every head: how heads share plans is no part of what is saved.
  for (int32_t h = 0; h < HeadCount(); ++h)
    if (budgets_.observed != nullptr || LeaderOf(h) == h) plans_.plans[plans_.head_plan[h]].plan.Transfer(archive);
  archive.Array(plans_.layer_peak, config_.layers, config_.layers);
  archive.Field(entries_peak_);
}

// Live slots and zeros; the plan knows which are live.
void Cache::TransferHead(Archive& archive, int32_t head, HeadArrays& arrays) const {
  const plan::Plan& plan = plans_.plans[plans_.head_plan[head]].plan;
  const int64_t budget = plan.setting().budget, protect = plan.setting().protect;
  const int64_t key_bytes = config_.key_dim * SizeOf(config_.dtype),
                value_bytes = config_.value_dim * SizeOf(config_.dtype), scale_bytes = cpu::ScaleBytes(config_.dtype);
  for (int64_t slot = 0; slot < budget; ++slot) {
    const bool live = plan.weight(slot) > 0;
    archive.Array(arrays.key + slot * key_bytes, live ? key_bytes : 0, key_bytes);
    archive.Array(arrays.value + slot * value_bytes, live ? value_bytes : 0, value_bytes);
    if (scale_bytes > 0) archive.Array(arrays.scale + slot * scale_bytes, live ? scale_bytes : 0, scale_bytes);
    archive.Array(arrays.position + slot, live ? 1 : 0, 1);
  }
  if (protect == 0) return;
  archive.Array(arrays.mean, config_.key_dim, config_.key_dim);
  archive.Array(arrays.sum, config_.key_dim, config_.key_dim);
  archive.Field(arrays.protected_count);
  archive.Field(arrays.weakest);
  archive.Array(arrays.score, arrays.protected_count, protect);
  archive.Array(arrays.protected_slot, arrays.protected_count, protect);
}

// Of a new cache. Where budgets are observed, another division of the same total can take some bytes more, by rounding.
size_t Cache::CountSaveBytes() const {
  Archive archive;
  const_cast<Cache*>(this)->TransferPlans(archive);  // counting changes nothing
  HeadArrays none{};
  for (int32_t h = 0; h < HeadCount(); ++h) TransferHead(archive, h, none);
  constexpr size_t kSlack = 128;
  const size_t slack = budgets_.observed != nullptr ? static_cast<size_t>(HeadCount()) * kSlack : 0;
  return sizeof(Header) + archive.used() + slack;
}

Status Cache::SaveSize(size_t* bytes) const {
  *bytes = save_bytes_;
  return Status();
}

Status Cache::Save(void* data, size_t bytes) const {
  EXPRESS_RETURN_IF_ERROR(CheckUsable());
  EXPRESS_RETURN_IF_ERROR(CheckSettled());
  const size_t needed = save_bytes_;
  if (bytes < needed)
    return Error(StatusCode::kBufferTooSmall, "bytes: expected at least ", needed, " (express_save_size), got ", bytes);
  char* const body = static_cast<char*>(data) + sizeof(Header);
  const Staging staging(StagingBytes());
  Archive archive = Archive::Writer(body);
  if (budgets_.observed != nullptr) {
    for (int32_t h = 0; h < HeadCount(); ++h) budgets_.budget[h] = HeadSettingOf(h).budget;
    archive.Array(budgets_.budget, HeadCount(), HeadCount());
    EXPRESS_RETURN_IF_ERROR(FetchObserved());
  }
  const_cast<Cache*>(this)->TransferPlans(archive);  // writing changes nothing
  for (int32_t h = 0; h < HeadCount(); ++h) {
    HeadArrays arrays{};
    EXPRESS_RETURN_IF_ERROR(OpenHead(h, true, staging.data(), &arrays));
    TransferHead(archive, h, arrays);
  }
  std::memset(body + archive.used(), 0, needed - sizeof(Header) - archive.used());
  Header header;
  header.format = FormatOf(config_.dtype);
  header.bytes = needed;
  header.fingerprint = Fingerprint();
  header.checksum = Hash(body, needed - sizeof(Header));
  std::memcpy(data, &header, sizeof(header));
  return Status();
}

Status Cache::Load(const void* data, size_t bytes) {
  const Header expected;
  Header header;
  if (bytes < sizeof(header))
    return Error(StatusCode::kInvalidArgument, "bytes: expected a saved cache, got ", bytes, " bytes");
  std::memcpy(&header, data, sizeof(header));
  if (std::memcmp(header.magic, expected.magic, sizeof(header.magic)) != 0)
    return Error(StatusCode::kInvalidArgument, "data: not a saved cache");
  if (header.format < kOldestFormat || header.format > kNewestFormat)
    return Error(StatusCode::kUnsupported, "data: saved in format ", header.format, ", this library reads ",
                 kOldestFormat, " and ", kNewestFormat);
  const size_t needed = save_bytes_;
  if (header.format != FormatOf(config_.dtype) || header.fingerprint != Fingerprint() || header.bytes != needed)
    return Error(StatusCode::kInvalidArgument,
                 "data: saved from a cache of another configuration: model, rotary frequencies, dtype, budgets, method "
                 "and seed must be this cache's");
  if (bytes < needed) return Error(StatusCode::kInvalidArgument, "bytes: expected ", needed, ", got ", bytes);
  const char* const body = static_cast<const char*>(data) + sizeof(header);
  if (Hash(body, needed - sizeof(header)) != header.checksum)
    return Error(StatusCode::kInvalidArgument, "data: its checksum is wrong");
  const Staging staging(StagingBytes());
  EXPRESS_RETURN_IF_ERROR(Reset());
  broken_ = true;  // until all is there
  Archive archive = Archive::Reader(body);
  if (budgets_.observed != nullptr) {
    archive.Array(budgets_.budget, HeadCount(), HeadCount());
    for (int32_t h = 0; h < HeadCount(); ++h)
      budgets_.settings[h] = DivideHead(config_, BaseBudget(config_, mean_budget_), budgets_.budget[h]);
    FindLeaders(body + archive.used());
    EXPRESS_RETURN_IF_ERROR(ResizeHeads());
  }
  TransferPlans(archive);
  if (budgets_.observed != nullptr) EXPRESS_RETURN_IF_ERROR(StoreObserved());
  for (int32_t h = 0; h < HeadCount(); ++h) {
    HeadArrays arrays{};
    EXPRESS_RETURN_IF_ERROR(OpenHead(h, false, staging.data(), &arrays));
    TransferHead(archive, h, arrays);
    EXPRESS_RETURN_IF_ERROR(StoreHead(h, arrays));
  }
  EXPRESS_RETURN_IF_ERROR(FinishLoad());
  const int64_t peak = entries_peak_;
  CountEntries(0, config_.layers);
  entries_peak_ = peak;
  broken_ = false;
  return Status();
}

Status Cache::Copy(const Cache& from) {
  if (this == &from) return Status();
  EXPRESS_RETURN_IF_ERROR(from.CheckUsable());
  EXPRESS_RETURN_IF_ERROR(from.CheckSettled());
  EXPRESS_RETURN_IF_ERROR(CheckSettled());
  if (config_.device_type != from.config_.device_type || config_.device_id != from.config_.device_id)
    return Error(StatusCode::kDeviceMismatch, "from: expected a cache on the same device");
  if (Fingerprint() != from.Fingerprint())
    return Error(
        StatusCode::kInvalidArgument,
        "from: expected a cache of the same configuration: model, rotary frequencies, dtype, budgets, method and "
        "seed");
  const bool observation_known = budgets_.observed == nullptr || from.ObservationKnown();
  if (budgets_.observed != nullptr) {
    EXPRESS_RETURN_IF_ERROR(BeginCopy());
    ResetCounts();
    for (int32_t h = 0; h < HeadCount(); ++h) {
      budgets_.settings[h] = from.HeadSettingOf(h);
      budgets_.leader[h] = from.LeaderOf(h);
    }
    EXPRESS_RETURN_IF_ERROR(ResizeHeads());
  }
  Archive size;
  TransferPlans(size);
  const Staging plans(size.used());
  EXPRESS_RETURN_IF_ERROR(CopyHeads(from));
  Archive writer = Archive::Writer(plans.data()), reader = Archive::Reader(plans.data());
  const_cast<Cache&>(from).TransferPlans(writer);  // writing changes nothing
  TransferPlans(reader);
  if (!observation_known) observation_closed_ = 0;  // once more, from what has been copied
  const int64_t peak = entries_peak_;
  CountEntries(0, config_.layers);
  entries_peak_ = peak;
  broken_ = false;
  return Status();
}

}  // namespace express::cache
