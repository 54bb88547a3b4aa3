// The graph of a span, executed by depth, gives what the plan's operations give, executed one by one.
#include "src/plan/span.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "tests/plan/shadow.h"

namespace express::plan {
namespace {

using Token = int64_t;
constexpr Token kNothing = -1;
constexpr int32_t kUnknown = -1;
using Tokens = std::vector<Token>;
using Entries = std::vector<std::pair<Token, float>>;  // tokens with log weights, sorted

template <class Vector, class Index>
auto& At(Vector& v, Index i) {
  return v.at(static_cast<size_t>(i));
}
template <class Vector>
int64_t Size(const Vector& v) {
  return static_cast<int64_t>(v.size());
}

// Decisions are hashes of all that they may depend on.
int64_t Hash(std::initializer_list<int64_t> words) {
  uint64_t hash = 0;
  for (const int64_t word : words) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15u;
    hash ^= hash >> 29;
  }
  return static_cast<int64_t>(hash >> 1);
}
bool Takes(int64_t seed, int64_t number, int64_t weight, int64_t total) {
  return Hash({seed, 1, number, weight, total}) % total < weight;
}
Tokens Survivors(int64_t seed, int64_t number, const Tokens& list) {
  int64_t content = 0;
  for (const Token token : list) content = Hash({content, token});
  Tokens kept;
  for (int64_t a = 0; a < Size(list) / 2; ++a)
    kept.push_back(At(list, 2 * a + Hash({seed, 2, number, a, content}) % 2));
  return kept;
}
// Of `protect` entries the one that a departure drives out; `protect` or more: none.
int64_t DrivesOut(int64_t seed, int64_t departure, Token token, int64_t protect) {
  return Hash({seed, 3, departure, token}) % (2 * protect + 1);
}

// What the slots of a plan hold.
struct Slab {
  Slab(const Setting& setting, int64_t s) : seed(s), protect(setting.protect) {
    token.assign(static_cast<size_t>(setting.budget), kNothing);
    weight.assign(token.size(), 0);
  }
  void Set(Slot slot, Token t, int64_t w) { At(token, slot) = t, At(weight, slot) = w; }

  void Apply(const Operations& out) {
    for (int64_t i = 0; i < out.size(); ++i) ApplyOne(out[i], out.slots(out[i]));
  }
  void ApplyOne(const Op& op, const Slot* slots) {
    Tokens held;
    for (int32_t i = 0; i < op.count; ++i) held.push_back(At(token, slots[i]));
    if (op.kind == OpKind::kAdmit) {
      const int64_t out = DrivesOut(seed, op.number, held[0], protect);
      if (Size(protected_slots) < protect)
        protected_slots.push_back(slots[0]);
      else if (out < protect)
        std::swap(At(token, slots[0]), At(token, At(protected_slots, out)));
    }
    if (op.kind == OpKind::kAdmit || op.kind == OpKind::kCentre) return;
    for (int32_t i = 0; i < op.count; ++i) Set(slots[i], kNothing, 0);
    if (op.kind == OpKind::kWrite)
      for (int32_t i = 0; i < op.count; ++i) Set(slots[i], next++, 1);
    if (op.kind == OpKind::kSample) Set(slots[0], held[Takes(seed, op.number, op.weight, op.total)], op.total);
    if (op.kind == OpKind::kHalve)
      for (const Token t : Survivors(seed, op.number, held)) Set(*slots, t, op.weight), slots += 2;
  }

  Entries All() const {
    Entries entries;
    for (int64_t slot = 0; slot < Size(token); ++slot)
      if (const int64_t w = At(weight, slot); w > 0)
        entries.emplace_back(At(token, slot), static_cast<float>(std::log(static_cast<double>(w))));
    std::sort(entries.begin(), entries.end());
    return entries;
  }

  int64_t seed, protect;
  Token next = 0;
  Tokens token;
  std::vector<int64_t> weight;
  std::vector<Slot> protected_slots;
};

// What the random settings have come by, so that none of it goes missing; and what of Bound was needed, per mille.
struct Coverage {
  int64_t samples = 0, runs = 0, joins = 0, swaps = 0, depths = 0, classes[Span::kClasses] = {};
  int64_t most_nodes = 0, most_samples = 0, most_halves = 0, most_list = 0, most_members = 0;
};

// One plan twice: operation by operation, and through spans.
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

  void BeginPrompt(int64_t tokens) {
    for (Tokens* list : {&sinks, &stream, &guarded}) list->clear();
    for (int64_t j = 0; j < spanned->sink_count(); ++j) sinks.push_back(At(slab.token, spanned->sink_slot(j)));
    for (int64_t j = 0; j < spanned->tail_count(); ++j) stream.push_back(At(slab.token, spanned->tail_slot(j)));
    for (const Slot slot : slab.protected_slots) guarded.push_back(At(slab.token, slot));
    first = std::max(setting.sinks, spanned->tokens() - spanned->tail_count());
    for (int64_t row = 0; row < tokens; ++row) (Size(sinks) < setting.sinks ? sinks : stream).push_back(slab.next++);
    departed = 0;
    values = slab.token;
  }

  void BeginSpan() {
    before.swap(values);
    nodes_before = span.slot_nodes(plan);
  }

  // What is known before anything is executed. Departures have met the protected entries; who joins them is never read.
  void Prepare() {
    values.assign(static_cast<size_t>(span.nodes(plan)), kNothing);
    known.assign(values.size(), kUnknown);
    const auto set = [&](int64_t node, Token token) { At(values, node) = token, At(known, node) = 0; };
    for (int64_t slot = 0; slot < setting.budget; ++slot)
      if (At(nodes_before, slot) != Span::kNoNode) set(slot, At(before, At(nodes_before, slot)));
    guarded_after.assign(1, guarded);
    for (int64_t j = 0, number = plain->departures(); j < span.departures(plan); ++j) {
      Token token = At(stream, departed + j);
      const int64_t out = DrivesOut(slab.seed, number + j, token, setting.protect);
      if (Size(guarded) < setting.protect) {
        guarded.push_back(token);
      } else {
        if (out < setting.protect) std::swap(token, At(guarded, out)), ++coverage.swaps;
        set(setting.budget + j, token);
      }
      guarded_after.push_back(guarded);
    }
    for (const SpanJoin& join : span.joins())
      if (join.plan == plan) {
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
  void Output(int32_t node, int32_t depth, Token token) {
    ASSERT_TRUE(node >= setting.budget + span.departures(plan) && At(known, node) == kUnknown) << node;
    At(values, node) = token, At(known, node) = depth;
  }
  void Execute(const SpanSample& op, int32_t depth) {
    int32_t latest = 0;
    Token kept = Input(op.first, depth, latest);
    for (int32_t j = 0; j < op.count; ++j)
      if (const Token candidate = Input(op.candidate + j, depth, latest);
          Takes(slab.seed, op.number + j, op.weight, op.total + j * op.weight))
        kept = candidate;
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

  void CheckSizes(int64_t tokens) {
    const int64_t given = setting.budget + span.departures(plan);
    ASSERT_EQ(std::count(known.begin() + given, known.end(), kUnknown), 0);
    int64_t samples = 0, halves = 0, list = 0, members = 0;
    for (const SpanSample& op : span.samples()) samples += op.plan == plan;
    for (const SpanHalve& op : span.halves()) halves += op.plan == plan, list += op.plan == plan ? op.count : 0;
    for (const SpanSnapshot& snapshot : span.snapshots(plan)) members += snapshot.count;
    const Span::Bounds bound = Span::Bound(setting.budget, tokens, Size(span.snapshots(plan)));
    const auto check = [](int64_t size, int64_t most, int64_t& per_mille) {
      ASSERT_LE(size, most);
      per_mille = std::max(per_mille, 1000 * size / most);
    };
    check(span.nodes(plan), bound.nodes, coverage.most_nodes);
    check(samples, bound.samples, coverage.most_samples);
    check(halves, bound.halves, coverage.most_halves);
    check(list, bound.list, coverage.most_list);
    check(members, bound.members, coverage.most_members);
  }

  // Operation by operation, with a look at the slots wherever there is a snapshot.
  void CheckSnapshots(int64_t tokens, int64_t block) {
    const int64_t departures = plain->departures();
    int64_t seen = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      if (t == 0 || (block > 0 && plain->tokens() % block == 0)) {
        ASSERT_LT(seen, Size(span.snapshots(plan)));
        ASSERT_EQ(At(span.snapshots(plan), seen).departures, plain->departures() - departures);
        ASSERT_EQ(Seen(At(span.snapshots(plan), seen++), plain->tokens()), expected.All()) << "at " << plain->tokens();
      }
      plain.out().Clear();
      plain->Append(1, plain.out());
      expected.Apply(plain.out());
    }
    ASSERT_EQ(seen, Size(span.snapshots(plan)));
    ASSERT_EQ(span.departures(plan), plain->departures() - departures);
  }
  Entries Seen(const SpanSnapshot& snapshot, int64_t position) const {
    Entries entries;
    for (int64_t j = 0; j < std::min(setting.sinks, position); ++j) entries.emplace_back(At(sinks, j), 0.0f);
    for (int64_t j = departed + snapshot.departures; j < position - first; ++j)
      entries.emplace_back(At(stream, j), 0.0f);
    for (const Token token : At(guarded_after, snapshot.departures)) entries.emplace_back(token, 0.0f);
    EXPECT_EQ(snapshot.protected_count, Size(At(guarded_after, snapshot.departures)));
    int32_t latest = 0;
    for (int32_t i = snapshot.begin; i < snapshot.begin + snapshot.count; ++i) {
      const SpanMember& member = At(span.members(), i);
      entries.emplace_back(Input(member.node, span.depths() + 1, latest), member.log_weight);
    }
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
    int32_t latest = 0;
    for (Slot slot = 0; slot < setting.budget; ++slot)
      if (const int32_t node = At(span.slot_nodes(plan), slot); node != Span::kNoNode)
        put(slot, Input(node, span.depths() + 1, latest));
    departed += span.departures(plan);
    for (int64_t j = 0; j < Size(guarded); ++j) put(At(slab.protected_slots, j), At(guarded, j));
    for (int64_t j = 0; j < spanned->sink_count(); ++j) put(spanned->sink_slot(j), At(sinks, j));
    for (int64_t j = 0; j < spanned->tail_count(); ++j) put(spanned->tail_slot(j), At(stream, departed + j));
    slab.weight.assign(spanned->weights(), spanned->weights() + setting.budget);
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
  // Of the prompt: sinks, other tokens from the exact tail on, those protected; the position of the first of stream, and how
  // many of it have departed.
  Tokens sinks, stream, guarded;
  int64_t first = 0, departed = 0;
  // Of the span: values of nodes and depths at which they are known; what was protected, by departures.
  Tokens values, before;
  std::vector<int32_t> known, nodes_before;
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
    for (auto& h : heads_) {
      h->BeginPrompt(tokens);
      plans.push_back(&h->spanned.plan());
    }
    const int64_t block = Pick({0, 1, 2, 7, 16, 64, 1 + Below(200)}), most = 1 + Below(tokens);
    span_.Reset(plans, most, block > 0 ? most / block + 2 : 1);
    const bool aligned = block > 0 && Below(2) == 0;  // to blocks, where a span holds the end of one
    for (int64_t left = tokens, count = 0; left > 0; left -= count) {
      count = std::min(left, Pick({most, most, 1 + Below(most)}));
      const int64_t over = aligned ? (heads_[0]->plain->tokens() + count) % block : 0;
      if (count < left && over < count) count -= over;
      ASSERT_NO_FATAL_FAILURE(RunSpan(count, block, most));
    }
  }

  void RunSpan(int64_t tokens, int64_t block, int64_t most) {
    for (auto& h : heads_) h->BeginSpan();
    span_.Begin();
    int64_t samples = 0, halves = 0;
    for (auto& h : heads_) samples += Span::Bound(h->setting.budget, most, 0).samples;
    for (auto& h : heads_) halves += Span::Bound(h->setting.budget, most, 0).halves;
    ASSERT_GE(static_cast<int64_t>(span_.samples().capacity()), samples) << "Record may have to allocate";
    ASSERT_GE(static_cast<int64_t>(span_.halves().capacity()), halves) << "Record may have to allocate";
    for (auto& h : heads_) span_.Record(h->plan, h->spanned.plan(), tokens, block, h->spanned.out());
    constexpr int32_t kBounds[][Span::kClasses - 1] = {{2, 16, 64}, {2, 4, 8}, {3, 5, 32}};
    const auto& bounds = kBounds[Below(3)];
    span_.Finish(bounds);
    for (auto& h : heads_) ASSERT_NO_FATAL_FAILURE(h->Prepare());
    ASSERT_NO_FATAL_FAILURE(Execute(bounds));
    for (auto& h : heads_) {
      ASSERT_NO_FATAL_FAILURE(h->CheckSizes(tokens));
      ASSERT_NO_FATAL_FAILURE(h->CheckSnapshots(tokens, block));
      ASSERT_NO_FATAL_FAILURE(h->EndSpan());
    }
  }

  // Backwards within a depth: nothing there may depend on anything else there.
  void Execute(const int32_t (&bounds)[Span::kClasses - 1]) {
    const int32_t depths = span_.depths();
    ASSERT_EQ(span_.sample_begin(1), 0);
    ASSERT_EQ(span_.halve_begin(1, 0), 0);
    ASSERT_EQ(span_.sample_begin(depths + 1), Size(span_.samples()));
    ASSERT_EQ(span_.halve_begin(depths, Span::kClasses), Size(span_.halves()));
    for (int32_t d = 1; d <= depths && !testing::Test::HasFailure(); ++d) {
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
  std::vector<std::unique_ptr<Head>> heads_;
};

TEST(Span, TheGraphGivesWhatTheOperationsGive) {
  Coverage c;
  for (int64_t seed = 0; seed < 1000 && !HasFailure(); ++seed) {
    SCOPED_TRACE(seed);
    Layer(100 * seed, c).Run();
  }
  for (const int64_t count : {c.samples, c.runs, c.joins, c.swaps, c.depths / 20}) EXPECT_GT(count, 0);
  for (const int64_t count : c.classes) EXPECT_GT(count, 100);
  RecordProperty("nodes", std::to_string(c.most_nodes));
  RecordProperty("samples", std::to_string(c.most_samples));
  RecordProperty("halves", std::to_string(c.most_halves));
  RecordProperty("list", std::to_string(c.most_list));
  RecordProperty("members", std::to_string(c.most_members));
}

}  // namespace
}  // namespace express::plan
