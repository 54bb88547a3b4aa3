// Attention over the weighted cache: decode queries, and causal prefill in blocks.
//
// A head's slots are taken in fixed runs (kSplit) whose softmax states are merged in order, whether by one thread or by
// several: the result does not depend on the number of threads.
#include <algorithm>

#include "src/cache/cpu_cache.h"
#include "src/cache/exact_prompt.h"
#include "src/cache/message.h"

namespace express::cache {
namespace {

// Below this many bytes of slab an attention is not worth waking threads for.
constexpr int64_t kParallelBytes = 256 * 1024;
constexpr int64_t kStackFloats = 2048;  // of one buffer of query rows

// The query rows of one KV head: row r is (token r / group, head kv_head * group + r % group).
struct QueryRows {
  const Array& q;
  const Array& out;
  const Array* lse;
  int64_t kv_head, group;
  float scale;

  int64_t token(int64_t row) const { return row / group; }
  int64_t query_head(int64_t row) const { return kv_head * group + row % group; }

  // (rows, key_dim) f32, times the softmax scale.
  void Load(int64_t first, int64_t rows, int32_t key_dim, float* to) const {
    for (int64_t r = 0; r < rows; ++r)
      cpu::Convert(q.At(token(first + r), query_head(first + r)), q.dtype, to + r * key_dim, DType::kF32, key_dim);
    for (int64_t i = 0; i < rows * key_dim; ++i) to[i] *= scale;
  }
  void Store(int64_t first, int64_t rows, int32_t value_dim, const cpu::Partial& partial) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t t = token(first + r), h = query_head(first + r);
      const cpu::Partial one{partial.out + r * value_dim, partial.max + r, partial.sum + r};
      float* to = lse != nullptr ? static_cast<float*>(lse->At(t, h)) : nullptr;
      cpu::FinishPartial(one, 1, value_dim, {out.At(t, h), out.stride[1], out.dtype}, to, 1);
    }
  }
};

int64_t RowsAtOnce(int32_t key_dim, int32_t value_dim) {
  return std::clamp<int64_t>(kStackFloats / std::max(key_dim, value_dim), 1, cpu::kMaxQueryRows);
}

// One KV head, rows [first, first + rows), on this thread. observe(q, max, sum): the rows and their softmax states.
template <class Observe>
void AttendRows(const HeadState& head, const float* log_weight, float exponent, const QueryRows& queries, int64_t first,
                int64_t rows, const Observe& observe) {
  float q[kStackFloats];  // (rows, key_dim)
  float out[2][kStackFloats];
  float max[2][cpu::kMaxQueryRows], sum[2][cpu::kMaxQueryRows];
  const cpu::Slab& slab = head.slab;
  queries.Load(first, rows, slab.key_dim, q);
  const cpu::Partial total{out[0], max[0], sum[0]}, next{out[1], max[1], sum[1]};
  for (int64_t begin = 0; begin < slab.capacity; begin += kSplit) {
    const int64_t end = std::min(begin + kSplit, slab.capacity);
    cpu::AttendPartial(slab, log_weight, exponent, begin, end, q, rows, begin == 0 ? total : next);
    if (begin > 0) cpu::MergePartial(total, next, rows, slab.value_dim);
  }
  observe(q, total.max, total.sum);
  queries.Store(first, rows, slab.value_dim, total);
}

}  // namespace

Status CpuCache::DoAttend(int32_t layer, const Queries& args) const {
  const int64_t n = args.q.shape[0];
  const int64_t group = config_.query_heads / config_.kv_heads, rows = n * group;
  const int64_t at_once = RowsAtOnce(config_.key_dim, config_.value_dim), chunks = (rows + at_once - 1) / at_once;
  const int64_t element = std::max<int64_t>(2, SizeOf(config_.dtype));  // rows of 8 bits take as long as those of 16
  int64_t bytes = 0;
  for (int32_t g = 0; g < config_.kv_heads; ++g)
    bytes += head(layer, g).slab.capacity * (config_.key_dim + config_.value_dim) * element * chunks;
  const bool parallel = threads_.count() > 1 && bytes >= kParallelBytes, observed = Observes(LayerTokens(layer) - 1);
  Status status;
  if (parallel && chunks == 1 && AttendInParallel(layer, args.q, args.out, args.lse_or_null(), &status)) return status;

  const auto body = [&](int64_t task, int32_t) {
    const HeadState& h = head(layer, static_cast<int32_t>(task / chunks));
    const int64_t first = task % chunks * at_once;
    const QueryRows queries{args.q, args.out, args.lse_or_null(), h.kv_head, group, static_cast<float>(config_.scale)};
    const int64_t count = std::min(at_once, rows - first);
    AttendRows(h, plans_.plans[h.plan].log_weight, static_cast<float>(config_.weight_exponent), queries, first, count,
               [&](const float* scaled, const float* max, const float* sum) {
                 if (observed) ObserveDecode(h, scaled, count, max, sum);
               });
  };
  if (!parallel) {
    for (int64_t task = 0; task < config_.kv_heads * chunks; ++task) body(task, 0);
    return Status();
  }
  if (threads_.Run(config_.kv_heads * chunks, body)) return Status();
  return Error(StatusCode::kBroken, "config.parallel_for: did not run every task once; the outputs are incomplete");
}

// One task for each run of kSplit slots, when there are too few heads to go round. False if that does not pay or
// another attention is using the room for partial results.
bool CpuCache::AttendInParallel(int32_t layer, const Array& q, const Array& out, const Array* lse,
                                Status* status) const {
  const int64_t group = config_.query_heads / config_.kv_heads, rows = q.shape[0] * group;
  const int32_t key_dim = config_.key_dim, value_dim = config_.value_dim;
  int64_t tasks = 0;
  for (int32_t g = 0; g < config_.kv_heads; ++g) tasks += SplitCount(head(layer, g).slab.capacity);
  if (rows == 0 || tasks == config_.kv_heads) return false;
  const int64_t floats = rows * (value_dim + 2);  // of one partial
  if (tasks * floats > parts_.partial_floats || partials_busy_.test_and_set(std::memory_order_acquire)) return false;
  struct Release {
    std::atomic_flag& busy;
    ~Release() { busy.clear(std::memory_order_release); }
  } release{partials_busy_};

  const auto partial = [&](int64_t task) {
    float* at = parts_.partials + task * floats;
    return cpu::Partial{at, at + rows * value_dim, at + rows * value_dim + rows};
  };
  const auto queries = [&](const HeadState& h) {
    return QueryRows{q, out, lse, h.kv_head, group, static_cast<float>(config_.scale)};
  };
  const bool complete = threads_.Run(tasks, [&](int64_t task, int32_t) {
    int64_t split = task;
    int32_t g = 0;
    for (; split >= SplitCount(head(layer, g).slab.capacity); ++g) split -= SplitCount(head(layer, g).slab.capacity);
    const HeadState& h = head(layer, g);
    float scaled[kStackFloats];  // (rows, key_dim)
    queries(h).Load(0, rows, key_dim, scaled);
    cpu::AttendPartial(h.slab, plans_.plans[h.plan].log_weight, static_cast<float>(config_.weight_exponent),
                       split * kSplit, std::min((split + 1) * kSplit, h.slab.capacity), scaled, rows, partial(task));
  });
  int64_t task = 0;
  for (int32_t g = 0; g < config_.kv_heads && complete; ++g) {
    const cpu::Partial total = partial(task++);
    for (int64_t split = 1; split < SplitCount(head(layer, g).slab.capacity); ++split)
      cpu::MergePartial(total, partial(task++), rows, value_dim);
    const HeadState& h = head(layer, g);
    if (Observes(LayerTokens(layer) - 1)) {
      float scaled[kStackFloats];  // (rows, key_dim)
      queries(h).Load(0, rows, key_dim, scaled);
      ObserveDecode(h, scaled, rows, total.max, total.sum);
    }
    queries(h).Store(0, rows, value_dim, total);
  }
  if (!complete)
    *status =
        Error(StatusCode::kBroken, "config.parallel_for: did not run every task once; the outputs are incomplete");
  return true;
}

Status CpuCache::DoWorkspaceSize(int64_t, size_t* bytes) const {
  *bytes = 0;  // works block by block, in the cache's own scratch
  return Status();
}

Status CpuCache::DoPrefill(int32_t layer, const Queries& queries, const Input& all, const Workspace&) {
  Input input = all;
  const int64_t begin = LayerTokens(layer), end = begin + input.tokens, block = config_.prefill_block;
  const auto is_exact = [&](const HeadState& h) {
    return IsExactPrompt(config_, plans_.plans[h.plan].plan.setting(), begin, all.tokens);
  };
  int32_t exact = 0;  // heads for which the prompt is one block
  for (int32_t g = 0; g < config_.kv_heads; ++g) exact += is_exact(head(layer, g));
  if (exact > 0) EXPRESS_RETURN_IF_ERROR(PrefillBlock(layer, queries, input, is_exact));
  const auto others = [&](const HeadState& h) { return exact == 0 || !is_exact(h); };
  for (int64_t position = begin; position < end;) {
    const int64_t stop = exact == config_.kv_heads ? end : std::min(end, (position / block + 1) * block);
    input.first_token = position - begin;
    input.tokens = stop - position;
    if (exact < config_.kv_heads) EXPRESS_RETURN_IF_ERROR(PrefillBlock(layer, queries, input, others));
    EXPRESS_RETURN_IF_ERROR(Ingest(input));
    position = stop;
  }
  return Status();
}

// The queries of the heads that `takes` is true of.
template <class Takes>
Status CpuCache::PrefillBlock(int32_t layer, const Queries& queries, const Input& input, const Takes& takes) {
  const Array &q = queries.q, &out = queries.out, *lse = queries.lse_or_null();
  const int32_t group = config_.query_heads / config_.kv_heads;
  // Few heads: cut the block's queries too. A query's result does not depend on the cut.
  const int64_t wanted =
      config_.kv_heads % threads_.count() == 0 ? 1 : (2 * threads_.count() + config_.kv_heads - 1) / config_.kv_heads;
  const int64_t cuts = std::clamp<int64_t>(input.tokens / 16, 1, wanted);
  const auto body = [&](int64_t task, int32_t worker) {
    const HeadState& h = head(layer, static_cast<int32_t>(task / cuts));
    if (!takes(h)) return;
    const int64_t cut = task % cuts, t0 = input.first_token, h0 = int64_t{h.kv_head} * group;
    float* observed_lse = reinterpret_cast<float*>(static_cast<char*>(scratch(worker)) + parts_.lse_offset);
    float* lse_data = lse != nullptr ? static_cast<float*>(lse->At(t0, h0)) : nullptr;
    int64_t lse_token_stride = lse != nullptr ? lse->stride[0] : group,
            lse_head_stride = lse != nullptr ? lse->stride[1] : 1;
    if (lse == nullptr && budgets_.observed != nullptr) lse_data = observed_lse;
    const cpu::BlockArgs args{
        .key = {input.Rows(input.k, layer, h.kv_head), Input::RowStride(input.k), input.k.dtype},
        .value = {input.Rows(input.v, layer, h.kv_head), Input::RowStride(input.v), input.v.dtype},
        .q = q.At(t0, h0),
        .q_token_stride = q.stride[0],
        .q_head_stride = q.stride[1],
        .q_dtype = q.dtype,
        .out = out.At(t0, h0),
        .out_token_stride = out.stride[0],
        .out_head_stride = out.stride[1],
        .out_dtype = out.dtype,
        .lse = lse_data,
        .lse_token_stride = lse_token_stride,
        .lse_head_stride = lse_head_stride,
        .group = group,
        .scale = static_cast<float>(config_.scale),
        .exponent = static_cast<float>(config_.weight_exponent),
        .first = input.tokens * cut / cuts,
        .last = input.tokens * (cut + 1) / cuts,
    };
    cpu::AttendBlock(h.slab, plans_.plans[h.plan].log_weight, args, scratch(worker));
    for (int64_t t = args.first; t < args.last; ++t)
      if (Observes(LayerTokens(layer) + t))
        ObserveBlock(h, q, t0 + t, LayerTokens(layer) + t, lse_data + t * lse_token_stride, lse_head_stride);
  };
  broken_ = true;
  if (!threads_.Run(config_.kv_heads * cuts, body)) return Broken();
  broken_ = false;
  return Status();
}

}  // namespace express::cache
