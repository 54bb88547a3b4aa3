// A stretch of a plan as a graph of values instead of operations on slots (DESIGN 4).
//
// Halving keeps survivors and makes no new entries: whatever a slot ever holds is one of the tokens. So a span of tokens that
// are all there at once (a prompt) needs no slab while it runs: its operations become nodes, each written once, and nodes
// whose inputs are known can be computed together, over all heads, whatever their place in time. Nodes of a span:
//   [0, budget)                      what slot s held when the span began
//   [budget, budget + departures)    what departure i hands on, once the protected entries have had their choice
//   above                            results of samples and halvings
#ifndef EXPRESS_SRC_PLAN_SPAN_H_
#define EXPRESS_SRC_PLAN_SPAN_H_

#include <array>
#include <cstdint>
#include <vector>

#include "src/plan/plan.h"

namespace express::plan {

// The reservoir node `first` takes candidates [candidate, candidate + count) one after the other: the j-th is sample
// number + j, has weight `weight` and comes with the total total + j * weight. The last one to be taken is node `out`.
struct SpanSample {
  int64_t number, weight, total;
  int32_t first, candidate, count, out;
  int32_t plan, depth;
};

// Halving `number` of the nodes list[begin, begin + count): the survivor of pair a is node out + a.
struct SpanHalve {
  int64_t number;
  int32_t begin, count, out;
  int32_t plan, depth;
};

// The coreset of one plan at a moment.
struct SpanSnapshot {
  int32_t begin, count;  // of members
  int32_t departures;    // of this span until then
  int32_t protected_count;
};
struct SpanMember {
  int32_t node;
  float log_weight;
};

// Operations [begin, begin + count) of one kind and depth, to be executed together. kind: the class of halvings, or
// Span::kClasses for samples.
struct SpanItem {
  int32_t begin;
  int16_t kind, count;
};

// A slot that the protected entries have taken for good, in the order of the departures that joined.
struct SpanJoin {
  int32_t plan, index, slot;
};

// The graph of one span of the plans of one layer. Vectors keep their memory from span to span.
class Span {
 public:
  Span();
  // Sizes that `tokens` tokens cannot exceed, for plans whose budgets add up to `slots`.
  struct Bounds {
    int64_t nodes, samples, halves, list, members;  // and items: samples + halves
  };
  static Bounds Bound(int64_t budget, int64_t tokens, int64_t snapshots);

  // Forgets all; reserves all memory that spans up to `tokens` tokens can need, so that neither Record nor
  // Finish can fail.
  void Reset(const std::vector<const Plan*>& plans, int64_t tokens, int64_t snapshots);
  // The same, for spans that are joined and not recorded.
  void Reserve(const std::vector<const Plan*>& plans, int64_t tokens, int64_t snapshots);
  // Begins the next span: slots hold what they held at the end of the last one.
  void Begin();
  // Records `tokens` tokens of plans[plan], with a snapshot before each token whose position is a multiple of `block`
  // (none if block is 0) and before the first. `operations` has room for one token.
  void Record(int32_t index, Plan& plan, int64_t tokens, int64_t block, Operations& operations);
  // What Begin and Record would give, from spans of one plan each: alone[i] is that of plan i, finished or not. They must stay as they
  // are while this one is used.
  void Join(const std::vector<const Span*>& alone);
  // Once every plan is recorded: orders samples by depth, and halvings by depth and then by the class of their length: class c
  // has lists longer than bounds[c - 1] and up to bounds[c]. Then makes items of up to together[kind] operations.
  static constexpr int32_t kClasses = 5;
  void Finish(const int32_t (&bounds)[kClasses - 1], const int16_t (&together)[kClasses + 1]);

  int32_t depths() const { return depths_; }  // depths are 1 .. depths
  // Samples of depth d are [sample_begin(d), sample_begin(d + 1)); halvings of depth d and class c begin at halve_begin(d, c),
  // where those of (d, c - 1) end; class kClasses is the end.
  int64_t sample_begin(int32_t depth) const { return sample_begin_[static_cast<size_t>(depth)]; }
  int64_t halve_begin(int32_t depth, int32_t length_class) const {
    return halve_begin_[static_cast<size_t>(depth * kClasses + length_class)];
  }

  const std::vector<SpanSample>& samples() const { return samples_; }
  const std::vector<SpanHalve>& halves() const { return halves_; }
  const std::vector<int32_t>& list() const { return list_; }
  // All operations, by depth; within a depth halvings of the longest class first.
  const std::vector<SpanItem>& items() const { return items_; }
  bool has_class(int32_t length_class) const { return has_class_[static_cast<size_t>(length_class)]; }
  const std::vector<SpanMember>& members() const { return members_; }
  const std::vector<SpanSnapshot>& snapshots(int32_t plan) const { return plans_[static_cast<size_t>(plan)].snapshots; }
  const std::vector<SpanJoin>& joins() const { return joins_; }
  int64_t departures(int32_t plan) const { return plans_[static_cast<size_t>(plan)].departures; }
  int64_t nodes(int32_t plan) const { return plans_[static_cast<size_t>(plan)].nodes; }
  // (budget): the node that each slot of the coreset holds now, kNoNode for all other slots.
  const std::vector<int32_t>& slot_nodes(int32_t plan) const {
    const PlanRecord& record = plans_[static_cast<size_t>(plan)];
    return record.alone != nullptr ? record.alone->node : record.node;
  }

  static constexpr int32_t kNoNode = -1;

 private:
  struct PlanRecord {
    std::vector<int32_t> node;     // (budget)
    std::vector<int32_t> depth;    // (nodes)
    std::vector<int32_t> coreset;  // slots with a node, in no order
    std::vector<int32_t> place;    // (budget): where in coreset
    std::vector<SpanSnapshot> snapshots;
    int64_t departures = 0;
    int64_t nodes = 0;
    int32_t open_sample = -1;           // index into samples of the last one, which may still grow
    const PlanRecord* alone = nullptr;  // of a joined span: where its slots' nodes are
  };

  void SetNode(PlanRecord& record, Slot slot, int32_t node);
  void Clear(PlanRecord& record, Slot slot);
  int32_t NewNode(PlanRecord& record, int32_t depth);
  void Snapshot(PlanRecord& record, const Plan& plan);
  void AddSample(PlanRecord& record, int32_t plan, const Op& op, const Slot* slots);
  void AddCandidates(PlanRecord& record, int32_t plan, const SpanSample& sample, Slot kept);
  float LogWeight(int64_t weight) const;
  void MakeItems(const int16_t (&together)[kClasses + 1]);
  void AddHalve(PlanRecord& record, int32_t plan, const Op& op, const Slot* slots);

  std::vector<PlanRecord> plans_;
  std::vector<SpanSample> samples_, sorted_samples_;
  std::vector<SpanHalve> halves_, sorted_halves_;
  std::vector<int32_t> list_;
  std::vector<SpanMember> members_;
  std::vector<SpanJoin> joins_;
  std::vector<SpanItem> items_;
  std::vector<int64_t> sample_begin_, halve_begin_;
  bool has_class_[kClasses] = {};
  int32_t depths_ = 0;
  std::array<float, 63> log_power_;  // of 2^i
};

}  // namespace express::plan

#endif  // EXPRESS_SRC_PLAN_SPAN_H_
