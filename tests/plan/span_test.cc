// The graph of a span, executed by depth, whether recorded as one or put together from those of its plans, gives what the plan's operations give, executed one by one.
#include "src/plan/span.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "tests/plan/shadow.h"
#include "tests/plan/slab.h"

namespace express::plan {
namespace {

constexpr int32_t kUnknown = -1;

// What the random settings have come by, so that none of it goes missing; and what of Bound was needed, per mille.
struct Coverage {
  int64_t samples = 0, runs = 0, joins = 0, swaps = 0, depths = 0, classes[Span::kClasses] = {}, needed[5] = {};
};

// One plan twice: operation by operation, and through spans. Tokens are their positions.
struct Head {
  Head(Span& owner, Coverage& c, int32_t i, const Setting& s, int64_t seed)
      : span(owner), coverage(c), plan(i), setting(s), plain(s), spanned(s), expected(s, seed), slab(s, seed) {}

  template <class Step>  // step(plan, out) plans operations
  void Both(const Step& step) {
    for (auto [p, held] : {std::pair(&plain, &expected), std::pair(&spanned, &slab)}) {
      p->out().Clear();
      step(p->plan(), p->out());
      held->Apply(p->out());
    }
  }

  // What is known before anything is executed: slots of the coreset...
  void KnowSlots(const std::vector<int32_t>& nodes) {
    values = slab.token;
    known.assign(values.size(), kUnknown);
    for (Slot slot = 0; slot < setting.budget; ++slot)
      if (const int32_t node = At(nodes, slot); node != Span::kNoNode) At(known, node) = 0;
  }
  // ...and departures, once they have met the protected entries; those that join them are never read.
  void KnowDepartures() {
    values.resize(static_cast<size_t>(span.nodes(plan)), kNothing);
    known.resize(values.size(), kUnknown);
    Tokens guarded;
    for (const Slot slot : slab.protected_slots) guarded.push_back(At(slab.token, slot));
    guarded_after.assign(1, guarded);
    for (int64_t j = 0, number = plain->departures(); j < span.departures(plan); ++j, ++number) {
      Token token = setting.sinks + number;
      const int64_t out = DrivesOut(slab.seed, number, token, setting.protect);
      if (Size(guarded) < setting.protect) {
        guarded.push_back(token);
      } else {
        if (out < setting.protect) std::swap(token, At(guarded, out)), ++coverage.swaps;
        At(values, setting.budget + j) = token, At(known, setting.budget + j) = 0;
      }
      guarded_after.push_back(guarded);
    }
    for (const SpanJoin& join : span.joins()) {
      if (join.plan != plan) continue;
      ASSERT_EQ(join.index, Size(slab.protected_slots));
      slab.protected_slots.push_back(join.slot);
      ++coverage.joins;
    }
  }

  // The token of a node that must be known before `depth`; `latest`: when the latest input was known.
  Token Input(int32_t node, int32_t depth, int32_t& latest) const {
    const int32_t at = At(known, node);
    EXPECT_TRUE(at != kUnknown && at < depth) << "node " << node << ", known at " << at << ", is read at " << depth;
    latest = std::max(latest, at);
    return At(values, node);
  }
  Token Final(int32_t node, int32_t latest = 0) const { return Input(node, span.depths() + 1, latest); }
  void Output(int32_t node, int32_t depth, Token token) {
    ASSERT_TRUE(node >= setting.budget + span.departures(plan) && At(known, node) == kUnknown) << node;
    At(values, node) = token, At(known, node) = depth;
  }
  void Execute(const SpanSample& op, int32_t depth) {
    int32_t latest = 0;
    Token kept = Input(op.first, depth, latest);
    for (int32_t j = 0; j < op.count; ++j) {
      const Token candidate = Input(op.candidate + j, depth, latest);
      if (Takes(slab.seed, op.number + j, op.weight, op.total + j * op.weight)) kept = candidate;
    }
    Output(op.out, depth, kept);
    ASSERT_EQ(depth, latest + 1);
    ++(op.count > 1 ? coverage.runs : coverage.samples);
  }
  void Execute(const SpanHalve& op, int32_t depth) {
    int32_t latest = 0, out = op.out;
    Tokens list;
    for (int32_t i = 0; i < op.count; ++i) list.push_back(Input(At(span.list(), op.begin + i), depth, latest));
    for (const Token token : Survivors(slab.seed, op.number, list)) Output(out++, depth, token);
    ASSERT_EQ(depth, latest + 1);
  }

  void CheckSizes(int64_t tokens) const {
    const int64_t given = setting.budget + span.departures(plan);
    ASSERT_EQ(std::count(known.begin() + given, known.end(), kUnknown), 0);
    const Span::Bounds bound = Span::Bound(setting.budget, tokens, Size(span.snapshots(plan)));
    const int64_t bounds[] = {bound.nodes, bound.samples, bound.halves, bound.list, bound.members};
    int64_t sizes[] = {span.nodes(plan), 0, 0, 0, 0};
    for (const SpanSample& op : span.samples()) sizes[1] += op.plan == plan;
    for (const SpanHalve& op : span.halves()) sizes[2] += op.plan == plan, sizes[3] += op.plan == plan ? op.count : 0;
    for (const SpanSnapshot& snapshot : span.snapshots(plan)) sizes[4] += snapshot.count;
    for (int i = 0; i < 5; ++i) {
      ASSERT_LE(sizes[i], bounds[i]) << i;
      coverage.needed[i] = std::max(coverage.needed[i], 1000 * sizes[i] / bounds[i]);
    }
  }

  // Operation by operation, with a look at the slots wherever there is a snapshot.
  void CheckSnapshots(int64_t tokens, int64_t block) {
    const std::vector<SpanSnapshot>& snapshots = span.snapshots(plan);
    const int64_t departures = plain->departures();
    int64_t seen = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      if (t == 0 || (block > 0 && plain->tokens() % block == 0)) {
        ASSERT_LT(seen, Size(snapshots));
        ASSERT_EQ(At(snapshots, seen).departures, plain->departures() - departures);
        ASSERT_EQ(Seen(At(snapshots, seen++)), expected.All()) << "before token " << plain->tokens();
      }
      plain.out().Clear();
      plain->Append(1, plain.out());
      expected.Apply(plain.out());
    }
    ASSERT_EQ(seen, Size(snapshots));
    ASSERT_EQ(span.departures(plan), plain->departures() - departures);
  }
  Entries Seen(const SpanSnapshot& snapshot) {
    Entries entries;
    const auto put = [&](Token begin, Token end) {
      for (Token token = begin; token < end; ++token) entries.emplace_back(token, 0.0f);
    };
    put(0, std::min(setting.sinks, plain->tokens()));
    put(setting.sinks + plain->departures(), plain->tokens());
    for (const Token token : At(guarded_after, snapshot.departures)) put(token, token + 1);
    EXPECT_EQ(snapshot.protected_count, Size(At(guarded_after, snapshot.departures)));
    for (int32_t i = snapshot.begin; i < snapshot.begin + snapshot.count; ++i)
      entries.emplace_back(Final(At(span.members(), i).node), At(span.members(), i).log_weight);
    std::sort(entries.begin(), entries.end());
    return entries;
  }

  // All slots from where their tokens are at the span's end, as PromptRun::ListEntries has it.
  void EndSpan() {
    slab.token.assign(slab.token.size(), kNothing);
    const auto put = [&](Slot slot, Token token) {
      ASSERT_EQ(At(slab.token, slot), kNothing) << "slot " << slot << " is filled twice";
      At(slab.token, slot) = token;
    };
    for (Slot slot = 0; slot < setting.budget; ++slot)
      if (const int32_t node = At(span.slot_nodes(plan), slot); node != Span::kNoNode) put(slot, Final(node));
    for (int64_t j = 0; j < Size(slab.protected_slots); ++j)
      put(At(slab.protected_slots, j), At(guarded_after.back(), j));
    for (int64_t j = 0; j < spanned->sink_count(); ++j) put(spanned->sink_slot(j), j);
    const Token tail = spanned->tokens() - spanned->tail_count();
    for (int64_t j = 0; j < spanned->tail_count(); ++j) put(spanned->tail_slot(j), tail + j);
    for (Slot slot = 0; slot < setting.budget; ++slot) At(slab.weight, slot) = spanned->weight(slot);
    ASSERT_EQ(slab.token, expected.token);
    ASSERT_EQ(slab.weight, expected.weight);
    ASSERT_EQ(slab.protected_slots, expected.protected_slots);
  }

  Span& span;
  Coverage& coverage;
  int32_t plan;
  Setting setting;
  OwnedPlan plain, spanned;
  Slab expected, slab;
  // Of the span: values of nodes, and depths at which they are known; what is protected after how many departures.
  Tokens values;
  std::vector<int32_t> known;
  std::vector<Tokens> guarded_after;
};

class Layer {
 public:
  Layer(int64_t seed, Coverage& coverage) : rng_(static_cast<uint64_t>(seed)), coverage_(coverage) {
    for (int32_t i = 0, count = static_cast<int32_t>(Pick({1, 1, 2, 3})); i < count; ++i)
      heads_.push_back(std::make_unique<Head>(span_, coverage, i, RandomSetting(), seed + i));
  }

  void Run() {
    for (int64_t calls = Pick({1, 2, 4}); calls > 0; --calls) {
      ASSERT_NO_FATAL_FAILURE(Prompt(1 + Pick({0, Below(40), Below(300), Below(2000)})));
      const int64_t tokens = Pick({0, 1, Below(200)}), halvings = Pick({0, 0, 1, 3});
      int64_t back = Pick({0, 0, 1, 5, 30});
      for (auto& h : heads_) {
        for (int64_t i = 0; i < tokens; ++i) h->Both([](Plan& plan, Operations& out) { plan.Append(1, out); });
        for (int64_t i = 0; i < halvings; ++i) h->Both([](Plan& plan, Operations& out) { plan.HalveAhead(out); });
        back = std::min(back, h->plain->RollbackAvailable());
      }
      for (auto& h : heads_) h->Both([&](Plan& plan, Operations& out) { plan.Rollback(back, out); });
    }
  }

 private:
  int64_t Below(int64_t end) { return static_cast<int64_t>(rng_() % static_cast<uint64_t>(end)); }
  int64_t Pick(std::initializer_list<int64_t> list) { return list.begin()[Below(Size(list))]; }

  Setting RandomSetting() {
    const auto kind = Below(3) == 0 ? ScheduleKind::kRounds : ScheduleKind::kBudget;
    const int64_t coreset = MinCoreset(kind) + Pick({0, Below(5), Below(20), Below(100), Below(400)});
    const int64_t sinks = Pick({0, 1, 4, 9}), window = Pick({0, 1, 7, Below(60)}), reserve = Pick({0, 0, 3, Below(20)});
    Setting s = MakeSetting(coreset, sinks, window, reserve, Pick({0, 1, 2, 9}), kind);
    if (Below(2) == 0) return s;
    s.level_fraction = static_cast<double>(1 + Below(9)) / 10;
    s.level_floor = 2 + Below(coreset - 1);
    s.max_levels = 2 + Below(coreset / 2 - 1);
    EXPECT_EQ(Check(s), SettingError::kNone) << Describe(s);
    return s;
  }

  void Prompt(int64_t tokens) {
    std::vector<const Plan*> plans;
    for (auto& h : heads_) plans.push_back(&h->spanned.plan());
    const int64_t block = Pick({0, 1, 2, 7, 16, 64, 1 + Below(200)}), most = 1 + Below(tokens);
    const int64_t snapshots = block > 0 ? most / block + 2 : 1;
    joins_ = Below(2) == 0;
    alone_.resize(plans.size());
    for (size_t i = 0; i < plans.size() && joins_; ++i) alone_[i].Reset({plans[i]}, most, snapshots);
    joins_ ? span_.Reserve(plans, most, snapshots) : span_.Reset(plans, most, snapshots);
    const bool aligned = block > 0 && Below(2) == 0;  // to blocks, where a span holds the end of one
    for (int64_t left = tokens, count = 0; left > 0; left -= count) {
      count = std::min(left, Pick({most, most, 1 + Below(most)}));
      const int64_t over = aligned && count < left ? (heads_[0]->plain->tokens() + count) % block : 0;
      if (over < count) count -= over;
      ASSERT_NO_FATAL_FAILURE(RunSpan(count, block));
    }
  }

  void RunSpan(int64_t tokens, int64_t block) {
    constexpr int32_t kBounds[][Span::kClasses - 1] = {{2, 4, 16, 64}, {2, 4, 8, 16}, {3, 5, 7, 32}};
    const auto& bounds = kBounds[Below(3)];
    constexpr int16_t kTogether[][Span::kClasses + 1] = {{128, 16, 4, 1, 1, 4}, {1, 1, 1, 1, 1, 1}, {3, 2, 7, 2, 5, 4}};
    const auto& together = kTogether[Below(3)];
    if (!joins_) span_.Begin();
    const auto room = [&](const auto&... v) { return std::vector<size_t>{v.capacity()...}; };
    const auto before = room(span_.samples(), span_.halves(), span_.list(), span_.members(), span_.joins());
    std::vector<const Span*> alone;
    for (auto& h : heads_) {
      Span& span = joins_ ? At(alone_, h->plan) : span_;
      const int32_t plan = joins_ ? 0 : h->plan;
      if (joins_) span.Begin();
      h->KnowSlots(span.slot_nodes(plan));
      span.Record(plan, h->spanned.plan(), tokens, block, h->spanned.out());
      if (joins_ && Below(2) == 0) span.Finish(bounds, together);
      alone.push_back(&span);
    }
    if (joins_) span_.Join(alone);
    ASSERT_EQ(room(span_.samples(), span_.halves(), span_.list(), span_.members(), span_.joins()), before);
    span_.Finish(bounds, together);
    ASSERT_NO_FATAL_FAILURE(CheckItems(together));
    for (auto& h : heads_) ASSERT_NO_FATAL_FAILURE(h->KnowDepartures());
    ASSERT_NO_FATAL_FAILURE(Execute(bounds));
    for (auto& h : heads_) {
      ASSERT_NO_FATAL_FAILURE(h->CheckSizes(tokens));
      ASSERT_NO_FATAL_FAILURE(h->CheckSnapshots(tokens, block));
      ASSERT_NO_FATAL_FAILURE(h->EndSpan());
    }
  }

  // Every operation is in one item, with others of its depth and class, and behind all of smaller depth.
  void CheckItems(const int16_t (&together)[Span::kClasses + 1]) {
    std::vector<int> samples(span_.samples().size()), halves(span_.halves().size());
    bool seen[Span::kClasses] = {};
    int32_t depth = 0;
    for (const SpanItem& item : span_.items()) {
      ASSERT_TRUE(item.kind >= 0 && item.kind <= Span::kClasses && item.count > 0);
      ASSERT_LE(item.count, together[item.kind]);
      const bool is_sample = item.kind == Span::kClasses;
      const int32_t own = is_sample ? At(span_.samples(), item.begin).depth : At(span_.halves(), item.begin).depth;
      ASSERT_GE(own, depth);
      depth = own;
      for (int64_t i = item.begin; i < item.begin + item.count; ++i) {
        ++At(is_sample ? samples : halves, i);
        if (is_sample) {
          ASSERT_EQ(At(span_.samples(), i).depth, depth);
          continue;
        }
        ASSERT_EQ(At(span_.halves(), i).depth, depth);
        ASSERT_GE(i, span_.halve_begin(depth, item.kind));
        ASSERT_LT(i, span_.halve_begin(depth, item.kind + 1));
        seen[item.kind] = true;
      }
    }
    for (const std::vector<int>& all : {samples, halves}) ASSERT_EQ(std::count(all.begin(), all.end(), 1), Size(all));
    for (int32_t c = 0; c < Span::kClasses; ++c) ASSERT_EQ(span_.has_class(c), seen[c]);
  }

  // Backwards within a depth: nothing there may depend on anything else there.
  void Execute(const int32_t (&bounds)[Span::kClasses - 1]) {
    const int32_t depths = span_.depths();
    ASSERT_EQ(std::pair(span_.sample_begin(1), span_.halve_begin(1, 0)), std::pair(int64_t{0}, int64_t{0}));
    ASSERT_EQ(span_.sample_begin(depths + 1), Size(span_.samples()));
    ASSERT_EQ(span_.halve_begin(depths, Span::kClasses), Size(span_.halves()));
    for (int32_t d = 1; d <= depths && !testing::Test::HasFailure(); ++d) {
      const int64_t before = span_.sample_begin(d) + span_.halve_begin(d, 0);
      ASSERT_LT(before, span_.sample_begin(d + 1) + span_.halve_begin(d + 1, 0)) << "nothing at depth " << d;
      for (int32_t c = Span::kClasses; c-- > 0;)
        for (int64_t i = span_.halve_begin(d, c + 1); i-- > span_.halve_begin(d, c); ++coverage_.classes[c]) {
          const SpanHalve& op = At(span_.halves(), i);
          ASSERT_TRUE((c == 0 || op.count > bounds[c - 1]) && (c == Span::kClasses - 1 || op.count <= bounds[c]));
          At(heads_, op.plan)->Execute(op, d);
        }
      for (int64_t i = span_.sample_begin(d + 1); i-- > span_.sample_begin(d);)
        At(heads_, At(span_.samples(), i).plan)->Execute(At(span_.samples(), i), d);
    }
    coverage_.depths = std::max<int64_t>(coverage_.depths, depths);
  }

  std::mt19937_64 rng_;
  Coverage& coverage_;
  Span span_;
  bool joins_ = false;  // span_ is put together from
  std::vector<Span> alone_;
  std::vector<std::unique_ptr<Head>> heads_;
};

TEST(Span, TheGraphGivesWhatTheOperationsGive) {
  Coverage c;
  for (int64_t seed = 0; seed < 400 && !HasFailure(); ++seed) {
    SCOPED_TRACE(seed);
    Layer(100 * seed, c).Run();
  }
  for (const int64_t count : {c.samples, c.runs, c.joins, c.swaps, c.depths / 20}) EXPECT_GT(count, 0);
  for (const int64_t count : c.classes) EXPECT_GT(count, 100);
  const char* const names[] = {"nodes", "samples", "halves", "list", "members"};
  for (int i = 0; i < 5; ++i) RecordProperty(names[i], std::to_string(c.needed[i]));
}

}  // namespace
}  // namespace express::plan
