// One token of many caches in one call: continuous batching.
#include <utility>

#include "src/cache/cache.h"
#include "src/cache/message.h"

namespace express::cache {
namespace {

// All caches must serve the same model on the same device, so that their tensors can be one.
Status CheckAlike(const Cache* const* caches, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (caches[i] == nullptr) return Error(StatusCode::kInvalidArgument, "caches[", i, "]: expected a cache, got NULL");
    const Config &a = caches[0]->config(), &b = caches[i]->config();
    const bool alike = a.layers == b.layers && a.query_heads == b.query_heads && a.kv_heads == b.kv_heads &&
                       a.key_dim == b.key_dim && a.value_dim == b.value_dim && a.dtype == b.dtype &&
                       a.device_type == b.device_type && a.device_id == b.device_id && a.scale == b.scale &&
                       (a.device_type == DeviceType::kCpu || a.weight_exponent == b.weight_exponent);
    if (!alike)
      return Error(
          StatusCode::kInvalidArgument, "caches[", i,
          "]: layers, heads, dims, dtype, device, scale and, on CUDA, weight_exponent must be those of caches[0]");
  }
  return Status();
}

// Row i of a tensor, as a tensor of one token.
Array Token(const Array& array, int64_t i) {
  Array one = array;
  one.data = static_cast<char*>(array.At(i));
  one.shape[0] = 1;
  return one;
}

}  // namespace

Status Cache::AppendBatch(Cache* const* caches, int64_t count, int32_t layer, const Tensor& k, const Tensor& v) {
  EXPRESS_RETURN_IF_ERROR(CheckAlike(caches, count));
  if (count == 0) return Status();
  int64_t repeated = -1;
  for (int64_t i = 0; i < count; ++i)
    if (std::exchange(caches[i]->in_batch_, true)) repeated = i;
  for (int64_t i = 0; i < count; ++i) caches[i]->in_batch_ = false;
  if (repeated >= 0)
    return Error(StatusCode::kInvalidArgument, "caches[", repeated, "]: this cache is in the batch twice");
  for (int64_t i = 0; i < count; ++i) EXPRESS_RETURN_IF_ERROR(caches[i]->CheckUsable());
  EXPRESS_RETURN_IF_ERROR(caches[0]->CheckLayer(layer, false));
  Input input{};
  EXPRESS_RETURN_IF_ERROR(caches[0]->CheckInput(k, v, layer, &input));
  if (input.tokens != count)
    return Error(StatusCode::kShapeMismatch, "k.shape: expected ", count, " rows, one for each cache, got ",
                 input.tokens);
  Input one = input;
  one.tokens = 1;
  for (int64_t i = 0; i < count; ++i) EXPRESS_RETURN_IF_ERROR(caches[i]->CheckRoom(one));
  for (int64_t i = 0; i < count; ++i) EXPRESS_RETURN_IF_ERROR(caches[i]->SettleBudgets());
  return caches[0]->DoAppendBatch(caches, count, input);
}

Status Cache::AttendBatch(const Cache* const* caches, int64_t count, int32_t layer, const Tensor& q, const Tensor& out,
                          const Tensor* lse) {
  EXPRESS_RETURN_IF_ERROR(CheckAlike(caches, count));
  if (count == 0) return Status();
  for (int64_t i = 0; i < count; ++i) EXPRESS_RETURN_IF_ERROR(caches[i]->CheckUsable());
  EXPRESS_RETURN_IF_ERROR(caches[0]->CheckLayer(layer, false));
  Queries queries{};
  EXPRESS_RETURN_IF_ERROR(caches[0]->CheckQueries(count, q, out, lse, &queries));
  return caches[0]->DoAttendBatch(caches, count, layer, queries);
}

// Without a kernel for all of them: one after the other.
Status Cache::DoAppendBatch(Cache* const* caches, int64_t count, const Input& input) {
  for (int64_t i = 0; i < count; ++i) {
    Input one = input;
    one.first_token = i;
    one.tokens = 1;
    EXPRESS_RETURN_IF_ERROR(caches[i]->Ingest(one));
  }
  return Status();
}

Status Cache::DoAttendBatch(const Cache* const* caches, int64_t count, int32_t layer, const Queries& queries) const {
  for (int64_t i = 0; i < count; ++i) {
    Queries one = queries;
    one.q = Token(queries.q, i);
    one.out = Token(queries.out, i);
    if (queries.has_lse) one.lse = Token(queries.lse, i);
    EXPRESS_RETURN_IF_ERROR(caches[i]->DoAttend(layer, one));
  }
  return Status();
}

}  // namespace express::cache
