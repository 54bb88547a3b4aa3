// Causal attention of a block over a slab, against multiply-adds in registers: 4 (capacity + (tokens + 1) / 2) dim
// floating-point operations per query.
#include <cmath>
#include <new>

#include "bench/floors.h"
#include "bench/kernel_inputs.h"

namespace express::bench {
namespace {

// Arguments: live slots, tokens of the block, group, head dimension.
void Block(benchmark::State& state) {
  const int64_t capacity = state.range(0), tokens = state.range(1);
  const auto group = static_cast<int32_t>(state.range(2)), dim = static_cast<int32_t>(state.range(3));
  const FullSlab s(DType::kBF16, capacity, dim, dim);
  const std::vector<float> q = Normals(tokens * group * dim, 2), k = Normals(tokens * dim, 3),
                           v = Normals(tokens * dim, 4);
  std::vector<float> out(q.size());
  const cpu::BlockArgs args{.key = {k.data(), dim, DType::kF32},
                            .value = {v.data(), dim, DType::kF32},
                            .q = q.data(),
                            .q_token_stride = group * dim,
                            .q_head_stride = dim,
                            .q_dtype = DType::kF32,
                            .out = out.data(),
                            .out_token_stride = group * dim,
                            .out_head_stride = dim,
                            .out_dtype = DType::kF32,
                            .lse = nullptr,
                            .lse_token_stride = 0,
                            .lse_head_stride = 0,
                            .group = group,
                            .scale = 1 / std::sqrt(static_cast<float>(dim)),
                            .exponent = 1,
                            .first = 0,
                            .last = tokens};
  void* scratch = ::operator new(cpu::BlockScratchBytes(group, dim, dim), std::align_val_t(64));
  const double floor_before = FlopRate(1);
  BestTime time;
  time.Run(state, 1, [&](int) { cpu::AttendBlock(s.slab, s.log_weight.data(), args, scratch); });
  const double keys = static_cast<double>(capacity) + static_cast<double>(tokens + 1) / 2;
  time.Report(state, "GFLOP/s", 4 * keys * dim * static_cast<double>(tokens * group),
              std::max(floor_before, FlopRate(1)));
  ::operator delete(scratch, std::align_val_t(64));
}
BENCHMARK(Block)
    ->ArgNames({"slots", "tokens", "group", "dim"})
    ->ArgsProduct({{1024}, {64, 256}, {1, 4}, {64, 128}})
    ->Args({0, 1024, 1, 128})
    ->Args({4096, 1024, 1, 128})
    ->UseManualTime()
    ->MinTime(0.2)
    ->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace express::bench
