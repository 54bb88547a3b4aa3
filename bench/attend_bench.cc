// Decode attention: over one slab larger than the caches, against plain reads of the same memory; and over one head's 1024 entries,
// which are in the caches, against multiply-adds in registers.
#include "bench/floors.h"
#include "bench/kernel_inputs.h"

namespace express::bench {
namespace {

constexpr int64_t kBytes = 96 << 20;

// Arguments: storage type, head dimension, query rows, threads.
void Attend(benchmark::State& state) {
  const auto dtype = static_cast<DType>(state.range(0));
  const auto dim = static_cast<int32_t>(state.range(1));
  const int64_t rows = state.range(2);
  const auto threads = static_cast<int>(state.range(3));
  const int64_t capacity = kBytes / (2 * dim * SizeOf(dtype));
  const FullSlab s(dtype, capacity, dim, dim);
  const std::vector<float> q = Normals(rows * dim, 2);
  std::vector<std::vector<float>> out(2, std::vector<float>(static_cast<size_t>(rows * dim))), max(2, out[0]),
      sum(2, out[0]);
  const double floor_before = ReadBandwidth(s.slab.key, s.bytes(), threads);
  BestTime time;
  time.Run(state, threads, [&](int i) {
    const auto t = static_cast<size_t>(i);
    cpu::AttendPartial(s.slab, s.log_weight.data(), 1.0f, capacity * i / threads, capacity * (i + 1) / threads,
                       q.data(), rows, {out[t].data(), max[t].data(), sum[t].data()});
  });
  const double floor_after = ReadBandwidth(s.slab.key, s.bytes(), threads);
  time.Report(state, "GB/s", static_cast<double>(s.bytes()), std::max(floor_before, floor_after));
  time.ReportRate(state, "Mentries/s", static_cast<double>(capacity) / 1e6);
  state.SetLabel(Name(dtype));
}
BENCHMARK(Attend)
    ->ArgNames({"type", "dim", "rows", "threads"})
    ->ArgsProduct({{0, 1, 2, 3}, {128}, {1, 4, 8}, {1, 2}})
    ->ArgsProduct({{2, 3}, {64, 80, 96, 256}, {1, 8}, {1, 2}})
    ->UseManualTime()
    ->MinTime(0.1)
    ->Unit(benchmark::kMillisecond);

// Arguments: storage type, head dimension, query rows. One thread.
void AttendHead(benchmark::State& state) {
  const auto dtype = static_cast<DType>(state.range(0));
  const auto dim = static_cast<int32_t>(state.range(1));
  const int64_t rows = state.range(2);
  constexpr int64_t kCapacity = 1024, kRepeats = 50;
  const FullSlab s(dtype, kCapacity, dim, dim);
  const std::vector<float> q = Normals(rows * dim, 2);
  std::vector<float> out(static_cast<size_t>(rows * dim)), max(out), sum(out);
  const double floor_before = FlopRate(1);
  BestTime time;
  time.Run(state, 1, [&](int) {
    for (int64_t i = 0; i < kRepeats; ++i)
      cpu::AttendPartial(s.slab, s.log_weight.data(), 1.0f, 0, kCapacity, q.data(), rows,
                         {out.data(), max.data(), sum.data()});
  });
  const double floor_after = FlopRate(1);
  time.Report(state, "GFLOP/s", static_cast<double>(kRepeats * kCapacity * rows * dim * 4),
              std::max(floor_before, floor_after));
  time.ReportRate(state, "Mentries/s", static_cast<double>(kRepeats * kCapacity) / 1e6);
  state.SetLabel(Name(dtype));
}
BENCHMARK(AttendHead)
    ->ArgNames({"type", "dim", "rows"})
    ->ArgsProduct({{2, 3}, {64, 128}, {1, 2, 4, 8}})
    ->UseManualTime()
    ->MinTime(0.1)
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace express::bench
