// Kernel halving of one list, against multiply-adds in registers: (2h)^2 (key_dim + value_dim) / 2 of them, the lower
// triangle of the two Gram matrices.
#include <cmath>
#include <new>

#include "bench/floors.h"
#include "bench/kernel_inputs.h"

namespace express::bench {
namespace {

// Arguments: entries of the list, head dimension.
void Halve(benchmark::State& state) {
  const int64_t count = state.range(0);
  const auto dim = static_cast<int32_t>(state.range(1));
  const FullSlab s(DType::kBF16, count, dim, dim);
  std::vector<int32_t> slots(static_cast<size_t>(count));
  std::iota(slots.begin(), slots.end(), 0);
  const cpu::HalveParams params{1 / std::sqrt(static_cast<float>(dim)), 1.0f, 0.1f, 0.5f, false};
  const StreamKey key = MakeStreamKey(1, 2, 3);
  void* scratch = ::operator new(cpu::HalveScratchBytes(count, dim, dim), std::align_val_t(64));
  const double floor_before = FlopRate(1);
  uint64_t number = 0;
  BestTime time;
  // Survivors overwrite entries, so the list changes from one iteration to the next; the work does not.
  time.Run(state, 1, [&](int) { cpu::Halve(s.slab, slots.data(), count, params, key, number++, scratch); });
  const auto flops = static_cast<double>(count) * static_cast<double>(count) * 2 * dim;
  time.Report(state, "GFLOP/s", flops, std::max(floor_before, FlopRate(1)));
  ::operator delete(scratch, std::align_val_t(64));
}
BENCHMARK(Halve)
    ->ArgNames({"count", "dim"})
    ->ArgsProduct({{64, 128, 256, 512, 1024, 4096}, {64, 128}})
    ->UseManualTime()
    ->MinTime(0.1)
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace express::bench
