// Appending: plan the tokens, then execute the operations on every head. A list of operations is bounded, so long
// inputs go through it in several batches; a batch holds operations of many plans, and its tasks are (plan, head)
// pairs.
#include <chrono>
#include <cmath>
#include <limits>

#include "src/cache/cpu_cache.h"
#include "src/cache/message.h"

namespace express::cache {
namespace {

// Below this much arithmetic a batch is not worth waking threads for.
constexpr double kParallelWork = 2e5;

int64_t Nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Multiply-adds of one operation on one head, roughly.
double Work(const plan::Op& op, int64_t dims) {
  const double count = op.count;
  return (op.kind == plan::OpKind::kHalve ? count * count : count) * static_cast<double>(dims);
}

}  // namespace

Status CpuCache::Broken() {
  return Error(StatusCode::kBroken, "config.parallel_for: did not run every task once; the cache must be reset");
}

Status CpuCache::Ingest(const Input& input) {
  const int32_t first = first_plan(input.first_layer), end = end_plan(input.first_layer + input.layers - 1);
  broken_ = true;  // until all is done: a callback that throws or does too little leaves the heads apart
  for (int32_t i = first; i < end; ++i) plans_.plans[i].call_begin = plans_.plans[i].plan.tokens();
  int32_t plan = first;
  int64_t left = input.tokens;  // of this plan
  while (plan < end && input.tokens > 0) {
    plans_.operations.Clear();
    int64_t items = 0;
    while (plan < end) {
      const int64_t begin = plans_.operations.size();
      const int64_t taken = plans_.plans[plan].plan.Append(left, plans_.operations);
      if (taken > 0) parts_.batch[items++] = {plan, begin, plans_.operations.size(), 0};
      left -= taken;
      if (left > 0) break;  // the list is full
      ++plan;
      left = input.tokens;
    }
    if (!ExecuteBatch(items, &input)) return Broken();
  }
  CountEntries(input.first_layer, input.layers);
  broken_ = false;
  return Status();
}

bool CpuCache::ExecuteBatch(int64_t items, const Input* input) {
  int64_t tasks = 0;
  double work = 0;
  for (int64_t i = 0; i < items; ++i) {
    BatchItem& item = parts_.batch[i];
    PlanState& state = plans_.plans[item.plan];
    item.first_task = tasks;
    tasks += state.head_count;
    ApplyWeights(state, item.op_begin, item.op_end);
    for (int64_t op = item.op_begin; op < item.op_end; ++op)
      work += Work(plans_.operations[op], config_.key_dim + config_.value_dim) * state.head_count;
  }
  const auto body = [&](int64_t task, int32_t worker) {
    int64_t i = 0;
    for (int64_t high = items; high - i > 1;) {  // the last item with first_task <= task
      const int64_t middle = (i + high) / 2;
      (parts_.batch[middle].first_task <= task ? i : high) = middle;
    }
    const BatchItem& item = parts_.batch[i];
    const int32_t head = plans_.plan_heads[plans_.plans[item.plan].first_head + (task - item.first_task)];
    ExecuteHead(parts_.heads[head], item, input, worker);
  };
  if (work >= kParallelWork) return threads_.Run(tasks, body);
  for (int64_t task = 0; task < tasks; ++task) body(task, 0);
  return true;
}

Status CpuCache::ExecuteOperations(int32_t plan) {
  parts_.batch[0] = {plan, 0, plans_.operations.size(), 0};
  return ExecuteBatch(1, nullptr) ? Status() : Broken();
}

// Weights are the same for all heads of a plan.
void CpuCache::ApplyWeights(PlanState& state, int64_t op_begin, int64_t op_end) {
  constexpr float kFree = -std::numeric_limits<float>::infinity();
  for (int64_t i = op_begin; i < op_end; ++i) {
    const plan::Op& op = plans_.operations[i];
    const plan::Slot* slots = plans_.operations.slots(op);
    switch (op.kind) {
      case plan::OpKind::kWrite:
        for (int32_t j = 0; j < op.count; ++j) state.log_weight[slots[j]] = 0;
        break;
      case plan::OpKind::kSample:
        state.log_weight[slots[0]] = LogWeight(op.total);
        state.log_weight[slots[1]] = kFree;
        break;
      case plan::OpKind::kHalve: {
        const float log_weight = LogWeight(op.weight);
        for (int32_t j = 0; j < op.count; j += 2) {
          state.log_weight[slots[j]] = log_weight;
          state.log_weight[slots[j + 1]] = kFree;
        }
        break;
      }
      case plan::OpKind::kFree:
        for (int32_t j = 0; j < op.count; ++j) state.log_weight[slots[j]] = kFree;
        break;
      case plan::OpKind::kMove:
        for (int32_t j = 0; j < op.count; j += 2) {
          state.log_weight[slots[j + 1]] = state.log_weight[slots[j]];
          state.log_weight[slots[j]] = kFree;
        }
        break;
      case plan::OpKind::kCentre:
      case plan::OpKind::kAdmit:
      case plan::OpKind::kEvict:
        break;
    }
  }
}

void CpuCache::ExecuteHead(HeadState& head, const BatchItem& item, const Input* input, int32_t worker) {
  const int64_t begin = Nanoseconds();
  const cpu::Slab& slab = head.slab;
  const Scoring scoring = parts_.scoring != nullptr ? parts_.scoring->scoring : Scoring{};
  cpu::ConstRows k{}, v{};
  int64_t first_position = 0;  // of the input's first row
  if (input != nullptr) {
    k = {input->Rows(input->k, head.layer, head.kv_head), Input::RowStride(input->k), input->k.dtype};
    v = {input->Rows(input->v, head.layer, head.kv_head), Input::RowStride(input->v), input->v.dtype};
    first_position = plans_.plans[item.plan].call_begin;
  }
  for (int64_t i = item.op_begin; i < item.op_end; ++i) {
    const plan::Op& op = plans_.operations[i];
    const plan::Slot* slots = plans_.operations.slots(op);
    switch (op.kind) {
      case plan::OpKind::kWrite: {
        const int64_t row = op.number - first_position;
        const auto at = [row](cpu::ConstRows rows) {
          rows.data = static_cast<const char*>(rows.data) + row * rows.stride * SizeOf(rows.dtype);
          return rows;
        };
        cpu::WriteEntries(slab, slots, op.count, op.number, at(k), at(v));
        break;
      }
      case plan::OpKind::kCentre:
        cpu::CentreOn(head.protection, slab, slots, op.count, scoring);
        break;
      case plan::OpKind::kAdmit:
        cpu::Admit(head.protection, slab, slots[0], static_cast<uint64_t>(op.number), scoring);
        break;
      case plan::OpKind::kSample:
        if (DrawChance(head.key, RandomPurpose::kSample, static_cast<uint64_t>(op.number),
                       static_cast<uint64_t>(op.weight), static_cast<uint64_t>(op.total)))
          cpu::CopyEntry(slab, slots[1], slots[0]);
        break;
      case plan::OpKind::kHalve:
        cpu::Halve(slab, slots, op.count, halve_, head.key, static_cast<uint64_t>(op.number), scratch(worker));
        break;
      case plan::OpKind::kFree:
        break;
      case plan::OpKind::kEvict:
        cpu::Evict(head.protection, slab);
        break;
      case plan::OpKind::kMove:
        for (int32_t j = 0; j < op.count; j += 2) cpu::CopyEntry(slab, slots[j], slots[j + 1]);
        break;
    }
  }
  compress_nanoseconds_.fetch_add(Nanoseconds() - begin, std::memory_order_relaxed);
}

}  // namespace express::cache
