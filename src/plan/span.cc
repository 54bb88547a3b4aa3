#include "src/plan/span.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>

namespace express::plan {
namespace {

// Stable counting sort by key(item) in [0, keys); begins[k] is where key k begins, begins[keys] the end. Allocates nothing
// where both vectors have room.
template <class T, class Key>
void SortBy(const std::vector<T>& from, int32_t keys, const Key& key, std::vector<T>& to,
            std::vector<int64_t>& begins) {
  begins.assign(static_cast<size_t>(keys) + 1, 0);
  for (const T& item : from) ++begins[static_cast<size_t>(key(item)) + 1];
  for (size_t k = 1; k < begins.size(); ++k) begins[k] += begins[k - 1];
  to.resize(from.size());
  for (const T& item : from) to[static_cast<size_t>(begins[static_cast<size_t>(key(item))]++)] = item;
  for (size_t k = begins.size() - 1; k > 0; --k) begins[k] = begins[k - 1];  // each has moved to where the next begins
  begins[0] = 0;
}

}  // namespace

// Entries are the coreset that the span begins with and the departures. A sample, and a pair of a halving, makes one node
// and ends one entry.
Span::Bounds Span::Bound(int64_t budget, int64_t tokens, int64_t snapshots) {
  const int64_t entries = tokens + budget;
  return {.nodes = budget + tokens + entries,
          .samples = entries,
          .halves = entries,
          .list = 2 * entries,
          .members = (snapshots + 1) * budget};
}

Span::Span() {
  for (size_t i = 0; i < log_power_.size(); ++i)
    log_power_[i] = static_cast<float>(std::log(static_cast<double>(int64_t{1} << i)));
}

// The same number as that of any other weight; nearly all weights are powers of two.
float Span::LogWeight(int64_t weight) const {
  const auto bits = static_cast<uint64_t>(weight);
  if ((bits & (bits - 1)) == 0) return log_power_[static_cast<size_t>(std::countr_zero(bits))];
  return static_cast<float>(std::log(static_cast<double>(weight)));
}

void Span::Reset(const std::vector<const Plan*>& plans, int64_t tokens, int64_t snapshots) {
  Reserve(plans, tokens, snapshots);
  for (size_t i = 0; i < plans.size(); ++i) {
    const int64_t budget = plans[i]->setting().budget;
    PlanRecord& record = plans_[i];
    record.node.assign(static_cast<size_t>(budget), kNoNode);
    record.place.assign(static_cast<size_t>(budget), -1);
    record.coreset.clear();
    record.coreset.reserve(static_cast<size_t>(budget));
    record.depth.reserve(static_cast<size_t>(Bound(budget, tokens, snapshots).nodes));
    record.alone = nullptr;
    plans[i]->ForEachCoresetSlot([&](Slot slot) { SetNode(record, slot, slot); });
  }
}

void Span::Reserve(const std::vector<const Plan*>& plans, int64_t tokens, int64_t snapshots) {
  plans_.resize(plans.size());
  size_t samples = 0, halves = 0, list = 0, members = 0, joins = 0, depths = 0;
  for (size_t i = 0; i < plans.size(); ++i) {
    const int64_t budget = plans[i]->setting().budget;
    const Bounds bound = Bound(budget, tokens, snapshots);
    plans_[i].snapshots.reserve(static_cast<size_t>(snapshots) + 1);
    samples += static_cast<size_t>(bound.samples);
    halves += static_cast<size_t>(bound.halves);
    list += static_cast<size_t>(bound.list);
    members += static_cast<size_t>(bound.members);
    joins += static_cast<size_t>(plans[i]->setting().protect);
    depths = std::max(depths, static_cast<size_t>(tokens + budget));  // each costs an entry
  }
  for (std::vector<SpanSample>* v : {&samples_, &sorted_samples_}) v->reserve(samples);
  for (std::vector<SpanHalve>* v : {&halves_, &sorted_halves_}) v->reserve(halves);
  list_.reserve(list);
  items_.reserve(samples + halves);
  members_.reserve(members);
  joins_.reserve(joins);
  sample_begin_.reserve(depths + 2);
  halve_begin_.reserve((depths + 1) * kClasses + 1);
}

void Span::Begin() {
  for (PlanRecord& record : plans_) {
    for (const int32_t slot : record.coreset) record.node[static_cast<size_t>(slot)] = slot;
    record.depth.assign(record.node.size(), 0);
    record.nodes = static_cast<int64_t>(record.node.size());
    record.snapshots.clear();
    record.departures = 0;
    record.open_sample = -1;
  }
  samples_.clear();
  halves_.clear();
  list_.clear();
  members_.clear();
  joins_.clear();
  depths_ = 0;
}

void Span::Join(const std::vector<const Span*>& alone) {
  Begin();
  for (size_t i = 0; i < alone.size(); ++i) {
    const Span& from = *alone[i];
    const auto plan = static_cast<int32_t>(i), lists = static_cast<int32_t>(list_.size()),
               members = static_cast<int32_t>(members_.size());
    PlanRecord& record = plans_[i];
    record.alone = from.plans_.data();
    record.departures = record.alone->departures;
    record.nodes = record.alone->nodes;
    record.snapshots = record.alone->snapshots;
    for (SpanSnapshot& snapshot : record.snapshots) snapshot.begin += members;
    for (SpanSample sample : from.samples_) sample.plan = plan, samples_.push_back(sample);
    for (SpanHalve halve : from.halves_) halve.plan = plan, halve.begin += lists, halves_.push_back(halve);
    for (SpanJoin join : from.joins_) join.plan = plan, joins_.push_back(join);
    list_.insert(list_.end(), from.list_.begin(), from.list_.end());
    members_.insert(members_.end(), from.members_.begin(), from.members_.end());
    depths_ = std::max(depths_, from.depths_);
  }
}

void Span::SetNode(PlanRecord& record, Slot slot, int32_t node) {
  const auto s = static_cast<size_t>(slot);
  if (record.node[s] == kNoNode) {
    record.place[s] = static_cast<int32_t>(record.coreset.size());
    record.coreset.push_back(slot);
  }
  record.node[s] = node;
}

void Span::Clear(PlanRecord& record, Slot slot) {
  const auto s = static_cast<size_t>(slot);
  if (record.node[s] == kNoNode) return;
  const int32_t last = record.coreset.back();
  record.coreset[static_cast<size_t>(record.place[s])] = last;
  record.place[static_cast<size_t>(last)] = record.place[s];
  record.coreset.pop_back();
  record.node[s] = kNoNode;
}

int32_t Span::NewNode(PlanRecord& record, int32_t depth) {
  record.depth.push_back(depth);
  depths_ = std::max(depths_, depth);
  return static_cast<int32_t>(record.nodes++);
}

void Span::Snapshot(PlanRecord& record, const Plan& plan) {
  const auto begin = static_cast<int32_t>(members_.size());
  for (const int32_t slot : record.coreset)
    members_.push_back({record.node[static_cast<size_t>(slot)], LogWeight(plan.weight(slot))});
  record.snapshots.push_back({begin, static_cast<int32_t>(record.coreset.size()),
                              static_cast<int32_t>(record.departures), static_cast<int32_t>(plan.protected_count())});
  record.open_sample = -1;  // what it has given so far is read: it must not change any more
}

// The reservoir in slots[0] takes the entry in slots[1].
void Span::AddSample(PlanRecord& record, int32_t plan, const Op& op, const Slot* slots) {
  const int32_t candidate = record.node[static_cast<size_t>(slots[1])];
  Clear(record, slots[1]);
  AddCandidates(record, plan, {op.number, op.weight, op.total, 0, candidate, 1, 0, plan, 0}, slots[0]);
}

// What is in slot `kept` takes the sample's candidates. It extends the sample before if that is what fills the same reservoir
// and all candidates are departures in a row.
void Span::AddCandidates(PlanRecord& record, int32_t plan, const SpanSample& sample, Slot kept) {
  const int32_t first = record.node[static_cast<size_t>(kept)];
  const auto depth = [&](int32_t n) { return record.depth[static_cast<size_t>(n)]; };
  if (record.open_sample >= 0) {
    SpanSample& open = samples_[static_cast<size_t>(record.open_sample)];
    if (open.out == first && open.candidate + open.count == sample.candidate &&
        open.number + open.count == sample.number && open.weight == sample.weight &&
        open.total + open.count * open.weight == sample.total && depth(sample.candidate) == 0) {
      open.count += sample.count;
      return;
    }
  }
  const int32_t at = 1 + std::max(depth(first), depth(sample.candidate));
  record.open_sample = static_cast<int32_t>(samples_.size());
  samples_.push_back(sample);
  SpanSample& own = samples_.back();
  own.first = first;
  own.out = NewNode(record, at);
  own.plan = plan;
  own.depth = at;
  SetNode(record, kept, own.out);
}

void Span::AddHalve(PlanRecord& record, int32_t plan, const Op& op, const Slot* slots) {
  const auto begin = static_cast<int32_t>(list_.size());
  int32_t depth = 0;
  for (int32_t i = 0; i < op.count; ++i) {
    const int32_t node = record.node[static_cast<size_t>(slots[i])];
    list_.push_back(node);
    depth = std::max(depth, record.depth[static_cast<size_t>(node)]);
  }
  const auto out = static_cast<int32_t>(record.nodes);
  for (int32_t a = 0; a < op.count / 2; ++a) {
    SetNode(record, slots[2 * a], NewNode(record, depth + 1));
    Clear(record, slots[2 * a + 1]);
  }
  halves_.push_back({op.number, begin, op.count, out, plan, depth + 1});
  record.open_sample = -1;
}

void Span::Record(int32_t index, Plan& plan, int64_t tokens, int64_t block, Operations& operations) {
  PlanRecord& record = plans_[static_cast<size_t>(index)];
  // Departures have the first nodes, known or not, so that the candidates of a sample are consecutive.
  const int64_t room =
      plan.setting().sinks + plan.setting().tail() - std::min(plan.tokens(), plan.setting().sinks) - plan.tail_count();
  const int64_t departures = std::max<int64_t>(0, tokens - room);
  const auto first_departure = static_cast<int32_t>(record.nodes);
  for (int64_t i = 0; i < departures; ++i) NewNode(record, 0);

  int64_t until_snapshot = 0;
  for (int64_t i = 0; i < tokens; ++i, --until_snapshot) {
    if (until_snapshot == 0) {
      Snapshot(record, plan);
      until_snapshot = block > 0 ? block - plan.tokens() % block : tokens;
    }
    // From some point on most tokens do no more than add to the open reservoir.
    if (const auto taken = plan.AppendCandidates(std::min(tokens - i, until_snapshot)); taken.count > 0) {
      const auto count = static_cast<int32_t>(taken.count);
      const auto candidate = first_departure + static_cast<int32_t>(record.departures);
      AddCandidates(record, index, {taken.number, 1, taken.total, 0, candidate, count, 0, index, 0}, taken.kept);
      record.departures += count;
      i += count - 1;
      until_snapshot -= count - 1;
      continue;
    }
    const int64_t departed = plan.departures(), joined = plan.protected_count();
    const Slot leaving = plan.next_departure();
    operations.Clear();
    plan.Append(1, operations);
    if (plan.departures() > departed) {
      if (plan.protected_count() > joined)
        joins_.push_back({index, static_cast<int32_t>(joined), leaving});
      else
        SetNode(record, leaving, first_departure + static_cast<int32_t>(record.departures));
      ++record.departures;
    }
    for (int64_t j = 0; j < operations.size(); ++j) {
      const Op& op = operations[j];
      if (op.kind == OpKind::kSample) AddSample(record, index, op, operations.slots(op));
      if (op.kind == OpKind::kHalve) AddHalve(record, index, op, operations.slots(op));
    }
  }
}

void Span::Finish(const int32_t (&bounds)[kClasses - 1], const int16_t (&together)[kClasses + 1]) {
  const auto length_class = [&](int32_t count) {
    return static_cast<int32_t>(std::lower_bound(std::begin(bounds), std::end(bounds), count) - std::begin(bounds));
  };
  SortBy(
      samples_, depths_ + 1, [](const SpanSample& s) { return s.depth; }, sorted_samples_, sample_begin_);
  SortBy(
      halves_, (depths_ + 1) * kClasses, [&](const SpanHalve& h) { return h.depth * kClasses + length_class(h.count); },
      sorted_halves_, halve_begin_);
  samples_.swap(sorted_samples_);
  halves_.swap(sorted_halves_);
  MakeItems(together);
}

void Span::MakeItems(const int16_t (&together)[kClasses + 1]) {
  items_.clear();
  std::fill(std::begin(has_class_), std::end(has_class_), false);
  const auto add = [&](int32_t kind, int64_t begin, int64_t end) {
    const int64_t most = together[kind];
    for (int64_t at = begin; at < end; at += most)
      items_.push_back(
          {static_cast<int32_t>(at), static_cast<int16_t>(kind), static_cast<int16_t>(std::min(most, end - at))});
  };
  for (int32_t depth = 1; depth <= depths_; ++depth) {
    for (int32_t c = kClasses - 1; c >= 0; --c) {
      add(c, halve_begin(depth, c), halve_begin(depth, c + 1));
      has_class_[static_cast<size_t>(c)] |= halve_begin(depth, c) < halve_begin(depth, c + 1);
    }
    add(kClasses, sample_begin(depth), sample_begin(depth + 1));
  }
}

}  // namespace express::plan
