// The schedule of rounds token by token (the plan) against the paper's offline algorithm (the reference): the same
// weights after every token, and the same distribution of what is kept.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "src/cpu/reference_rounds.h"
#include "tests/plan/shadow.h"

namespace express {
namespace {

using reference::Entry;

// A stand-in for kernel halving with memory: pairs are decided by a walk that balances the sum of f over tokens, so
// that the outcome depends on the whole list, as the real one does; then the complement by a fair coin.
class BalancingHalver {
 public:
  explicit BalancingHalver(uint64_t seed) : rng_(seed) {}
  std::vector<int64_t> operator()(const std::vector<int64_t>& tokens) {
    const bool complement = rng_() & 1;
    double sum = 0;
    std::vector<int64_t> kept;
    for (size_t i = 0; i < tokens.size(); i += 2) {
      const double difference = F(tokens[i]) - F(tokens[i + 1]);
      const double u = std::uniform_real_distribution<double>(-1, 1)(rng_);
      const bool second = u < sum * difference;
      sum += second ? -difference : difference;
      kept.push_back(tokens[i + (second != complement)]);
    }
    return kept;
  }
  static double F(int64_t token) { return std::sin(0.7 * static_cast<double>(token)); }
  bool Chance(int64_t weight, int64_t total) {
    return std::uniform_int_distribution<int64_t>(1, total)(rng_) <= weight;
  }

 private:
  std::mt19937_64 rng_;
};

// Executes the plan's operations on tokens.
std::vector<Entry> Stream(int64_t n, int64_t s, BalancingHalver& halver) {
  const plan::Setting setting = plan::MakeSetting(8 * s, 0, 0, 0, 0, plan::ScheduleKind::kRounds);
  plan::OwnedPlan plan(setting);
  std::vector<int64_t> token(static_cast<size_t>(setting.budget), -1);
  for (int64_t i = 0; i < n; ++i) {
    plan.out().Clear();
    plan->Append(1, plan.out());
    for (int64_t j = 0; j < plan.out().size(); ++j) {
      const plan::Op& op = plan.out()[j];
      const plan::Slot* slots = plan.out().slots(op);
      const auto at = [&](int32_t k) -> int64_t& { return token[static_cast<size_t>(slots[k])]; };
      if (op.kind == plan::OpKind::kWrite) at(0) = i;
      if (op.kind == plan::OpKind::kSample && halver.Chance(op.weight, op.total)) at(0) = at(1);
      if (op.kind == plan::OpKind::kHalve) {
        std::vector<int64_t> list;
        for (int32_t k = 0; k < op.count; ++k) list.push_back(at(k));
        const std::vector<int64_t> kept = halver(list);
        for (int32_t k = 0; k < op.count; k += 2) at(k) = kept[static_cast<size_t>(k / 2)];
      }
    }
  }
  std::vector<Entry> cache;
  for (int64_t slot = 0; slot < setting.budget; ++slot)
    if (plan->weight(slot) > 0) cache.push_back({token[static_cast<size_t>(slot)], plan->weight(slot)});
  return cache;
}

// The offline algorithm sees what has left the exact tail (of one token) after n; the newest token is exact.
std::vector<Entry> Offline(int64_t n, int64_t s, BalancingHalver& halver) {
  std::vector<Entry> cache = reference::Express(
      n - 1, s, std::ref(halver), [&](int64_t weight, int64_t total) { return halver.Chance(weight, total); });
  cache.push_back({n - 1, 1});
  return cache;
}

std::vector<int64_t> Weights(const std::vector<Entry>& cache) {
  std::vector<int64_t> weights;
  for (const Entry& entry : cache) weights.push_back(entry.weight);
  std::sort(weights.begin(), weights.end());
  return weights;
}

TEST(Rounds, StreamAndOfflineHoldTheSameWeightsAfterEveryCount) {
  for (int64_t s : {1, 2, 4, 16})
    for (int64_t n = 1; n < 2000; n += 1 + n / 40) {
      BalancingHalver a(1), b(2);
      ASSERT_EQ(Weights(Stream(n, s, a)), Weights(Offline(n, s, b))) << "s " << s << " n " << n;
    }
}

// The weighted sum of a test function has the same mean and variance in both, and the mean is the truth: two-sample z
// tests at |z| < 4.5 each on 4000 seeds. 6 counts x 3 tests: a false alarm in about 1 of 8000 choices of the seeds,
// which are fixed.
TEST(Rounds, StreamAndOfflineAgreeInDistribution) {
  constexpr int kSeeds = 4000;
  for (const auto& [s, n] : {std::pair<int64_t, int64_t>{2, 60}, {2, 150}, {4, 100}, {4, 333}, {4, 700}, {8, 900}}) {
    double sum[2] = {0, 0}, squares[2] = {0, 0}, fourths[2] = {0, 0}, truth = 0;
    for (int64_t i = 0; i < n; ++i) truth += BalancingHalver::F(i + 3);
    for (int seed = 0; seed < kSeeds; ++seed)
      for (int offline : {0, 1}) {
        BalancingHalver halver(static_cast<uint64_t>(2 * seed + offline) * 7919 + 13);
        double estimate = -truth;
        for (const Entry& entry : offline ? Offline(n, s, halver) : Stream(n, s, halver))
          estimate += static_cast<double>(entry.weight) * BalancingHalver::F(entry.token + 3);
        sum[offline] += estimate;
        squares[offline] += estimate * estimate;
        fourths[offline] += estimate * estimate * estimate * estimate;
      }
    double error[2], square_error[2];
    for (int i : {0, 1}) {
      error[i] = std::sqrt(squares[i] / kSeeds / kSeeds);
      const double variance = squares[i] / kSeeds;
      square_error[i] = std::sqrt((fourths[i] / kSeeds - variance * variance) / kSeeds);
      EXPECT_LT(std::abs(sum[i] / kSeeds), 4.5 * error[i]) << "biased: s " << s << " n " << n << " offline " << i;
    }
    EXPECT_LT(std::abs(squares[0] - squares[1]) / kSeeds, 4.5 * std::hypot(square_error[0], square_error[1]))
        << "s " << s << " n " << n;
  }
}

}  // namespace
}  // namespace express
