// The list of SIMD targets, and forcing one: the suites that run once per target are only as good as this.
#include <set>

#include "tests/cpu/testing.h"

namespace express::cpu {
namespace {

TEST(TargetsTest, AreDistinctAndNamed) {
  ASSERT_GE(SimdTargetCount(), 1);
  std::set<std::string> names;
  for (int i = 0; i < SimdTargetCount(); ++i) names.insert(SimdTargetName(i));
  EXPECT_EQ(static_cast<int>(names.size()), SimdTargetCount());
#if defined(__x86_64__) && !defined(EXPRESS_DISABLED_TARGETS)
  // Every x86-64 machine that tests are run on has at least these.
  EXPECT_TRUE(names.contains("SSE4"));
#endif
}

// Vector widths show in how a long sum is rounded, so a forced target that is really used changes some result.
TEST(TargetsTest, ForcingOneHasAnEffect) {
  if (SimdTargetCount() < 3) GTEST_SKIP() << "only " << SimdTargetCount() << " targets here";
  TestSlab s(DType::kF32, 40, 256, 64);
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  const auto draw = [&] { return normal(rng); };
  for (int64_t i = 0; i < 40; ++i) {
    s.Fill(i, draw, draw, i);
    s.log_weight[static_cast<size_t>(i)] = 0;
  }
  std::vector<float> q(256);
  for (float& x : q) x = 0.1f * draw();
  std::set<std::vector<float>> results;
  for (int i = 0; i < SimdTargetCount(); ++i) {
    ForceSimdTarget(i);
    std::vector<float> out(64);
    float max, sum;
    AttendPartial(s.slab, s.log_weight.data(), 1.0f, 0, 40, q.data(), 1, {out.data(), &max, &sum});
    results.insert(out);
  }
  ForceSimdTarget(-1);
  EXPECT_GE(results.size(), 2u);
}

}  // namespace
}  // namespace express::cpu
