// The SIMD targets, for tests.
#include "src/cpu/targets.h"

#include <vector>

#include "hwy/highway.h"
#include "hwy/targets.h"
#include "src/cpu/kernels.h"

namespace express::cpu {
namespace {

const std::vector<int64_t>& Targets() {
  static const std::vector<int64_t> targets = [] {
    std::vector<int64_t> all;
    hwy::SetSupportedTargetsForTest(0);
    for (const auto target : hwy::SupportedAndGeneratedTargets()) all.push_back(static_cast<int64_t>(target));
    return all;
  }();
  return targets;
}

}  // namespace

int SimdTargetCount() { return static_cast<int>(Targets().size()); }

const char* SimdTargetName(int i) { return hwy::TargetName(Targets()[static_cast<size_t>(i)]); }

void ForceSimdTarget(int i) {
  hwy::SetSupportedTargetsForTest(i < 0 ? 0 : Targets()[static_cast<size_t>(i)]);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

}  // namespace express::cpu
