// Decode attention over one slab larger than the caches, against plain reads of the same memory.
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
  state.SetLabel(Name(dtype));
}
BENCHMARK(Attend)
    ->ArgNames({"type", "dim", "rows", "threads"})
    ->ArgsProduct({{0, 1, 2}, {128}, {1, 4, 8}, {1, 2}})
    ->ArgsProduct({{2}, {64, 80, 96, 256}, {1, 8}, {1, 2}})
    ->UseManualTime()
    ->MinTime(0.1)
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace express::bench
