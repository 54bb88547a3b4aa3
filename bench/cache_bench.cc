// The cache against the same code without compression (a budget that holds everything): decode attention, whole decode steps, prefill.
// Every figure comes with its floor: the memory's read bandwidth or the processor's multiply-add rate, measured in the same run.
#include <algorithm>
#include <cmath>
#include <string>

#include "bench/floors.h"
#include "bench/kernel_inputs.h"
#include "express/cache.h"

namespace express::bench {
namespace {

constexpr int32_t kDim = 128;
constexpr int kThreads = 2;

void Check(const Status& status, benchmark::State& state) {
  if (!status.ok()) state.SkipWithError(status.message().c_str());
}

Config MakeConfig(int32_t query_heads, int32_t kv_heads, int64_t budget, DType dtype) {
  Config c;
  c.query_heads = query_heads;
  c.kv_heads = kv_heads;
  c.key_dim = c.value_dim = kDim;
  c.budget = budget;
  c.dtype = dtype;
  c.threads = kThreads;
  return c;
}

// A cache that keeps n tokens exactly.
Config ExactConfig(Config c, int64_t n) {
  c.sinks = c.protected_entries = 0;
  c.window = n;
  c.budget = n + 5;
  return c;
}

// Tokens to append: rows of one block, over and over.
struct Tokens {
  Tokens(const Config& config, int64_t block_size)
      : c(config),
        block(block_size),
        q(Normals(block * c.query_heads * kDim, 1)),
        k(Normals(block * c.kv_heads * kDim, 2)),
        v(Normals(block * c.kv_heads * kDim, 3)),
        out(q.size()) {}
  Status Append(ExpressCache& cache, int64_t n, int64_t first = 0) const {
    return cache.Append(0, View(k.data() + first * c.kv_heads * kDim, {n, c.kv_heads, kDim}),
                        View(v.data() + first * c.kv_heads * kDim, {n, c.kv_heads, kDim}));
  }
  Status Fill(ExpressCache& cache, int64_t n) const {
    for (int64_t at = 0; at < n; at += block)
      if (Status status = Append(cache, std::min(block, n - at)); !status.ok()) return status;
    return Status();
  }
  Status Attend(const ExpressCache& cache) {
    return cache.Attend(0, View(q.data(), {1, c.query_heads, kDim}), View(out.data(), {1, c.query_heads, kDim}));
  }
  Status Prefill(ExpressCache& cache, int64_t n) {
    for (int64_t at = 0; at < n; at += block) {
      const Status status =
          cache.Prefill(0, View(q.data(), {block, c.query_heads, kDim}), View(k.data(), {block, c.kv_heads, kDim}),
                        View(v.data(), {block, c.kv_heads, kDim}), View(out.data(), {block, c.query_heads, kDim}));
      if (!status.ok()) return status;
    }
    return Status();
  }
  Config c;
  int64_t block;
  std::vector<float> q, k, v, out;
};

double Median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<int64_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

// Decode attention over n tokens: 1024 entries per head against all of them. Arguments: n, storage type.
void DecodeAttention(benchmark::State& state) {
  const int64_t n = state.range(0);
  const auto dtype = static_cast<DType>(state.range(1));
  const Config config = MakeConfig(32, 8, 1024, dtype);
  Tokens tokens(config, 1024);
  ExpressCache cache, exact;
  Check(ExpressCache::Create(config, &cache), state);
  Check(ExpressCache::Create(ExactConfig(config, n), &exact), state);
  Check(tokens.Fill(cache, n), state);
  Check(tokens.Fill(exact, n), state);
  std::vector<double> small, large;
  const auto time = [&](ExpressCache& which, std::vector<double>& seconds) {
    const double begin = Seconds();
    Check(tokens.Attend(which), state);
    seconds.push_back(Seconds() - begin);
  };
  for (auto _ : state) {
    time(exact, large);
    // As after other work: what the cache can keep of 1024 entries, it has lost to the exact one.
    time(cache, small);
    state.SetIterationTime(small.back());
  }
  const double exact_bytes = static_cast<double>(n * 8 * 2 * kDim * SizeOf(dtype));
  const std::vector<float> buffer(static_cast<size_t>(64 << 20));
  const double floor = ReadBandwidth(buffer.data(), static_cast<int64_t>(buffer.size() * 4), kThreads);
  state.counters["exact_us"] = Median(large) * 1e6;
  state.counters["express_us"] = Median(small) * 1e6;
  state.counters["speedup"] = Median(large) / Median(small);
  state.counters["exact_GB/s"] = exact_bytes / Median(large) / 1e9;
  state.counters["floor_GB/s"] = floor / 1e9;
  state.counters["exact_of_floor"] = exact_bytes / Median(large) / floor;
  state.SetLabel(Name(dtype));
}
BENCHMARK(DecodeAttention)
    ->ArgNames({"n", "type"})
    ->ArgsProduct({{4096, 16384, 65536, 131072}, {2}})
    ->Args({65536, 0})
    ->UseManualTime()
    ->Iterations(30)
    ->Unit(benchmark::kMicrosecond);

// Append + attend, token by token, over n = 64 x budget tokens. Argument: budget.
void DecodeStep(benchmark::State& state) {
  const int64_t budget = state.range(0), n = 64 * budget;
  const Config config = MakeConfig(8, 2, budget, DType::kBF16);
  Tokens tokens(config, 1024);
  ExpressCache cache;
  Check(ExpressCache::Create(config, &cache), state);
  std::vector<double> append(static_cast<size_t>(n)), step(static_cast<size_t>(n));
  for (auto _ : state) {
    for (int64_t t = 0; t < n; ++t) {
      const double begin = Seconds();
      Check(tokens.Append(cache, 1, t % 1024), state);
      append[static_cast<size_t>(t)] = Seconds() - begin;
      Check(tokens.Attend(cache), state);
      step[static_cast<size_t>(t)] = Seconds() - begin;
    }
    double sum = 0;
    for (const double s : step) sum += s;
    state.SetIterationTime(sum);
  }
  // What appending costs without compression: the same tokens into a cache that keeps them all.
  double plain_sum = 0;
  {
    ExpressCache exact;
    Check(ExpressCache::Create(ExactConfig(config, n), &exact), state);
    for (int64_t t = 0; t < n; ++t) {
      const double begin = Seconds();
      Check(tokens.Append(exact, 1, t % 1024), state);
      plain_sum += Seconds() - begin;
    }
  }
  double append_sum = 0, step_sum = 0;
  for (size_t i = 0; i < append.size(); ++i) append_sum += append[i], step_sum += step[i];
  std::sort(append.begin(), append.end());
  std::sort(step.begin(), step.end());
  const auto at = [](const std::vector<double>& sorted, double share) {
    return sorted[static_cast<size_t>(share * static_cast<double>(sorted.size() - 1))] * 1e6;
  };
  Stats stats;
  Check(cache.GetStats(0, &stats), state);
  state.counters["append_share"] = append_sum / step_sum;  // of the decode time: writes, admissions, halvings, calls
  state.counters["compression_share"] = (append_sum - plain_sum) / step_sum;
  state.counters["append_mean_us"] = append_sum / static_cast<double>(n) * 1e6;
  state.counters["append_p50_us"] = at(append, 0.5);
  state.counters["append_p99_us"] = at(append, 0.99);
  state.counters["append_max_us"] = at(append, 1);
  state.counters["step_p50_us"] = at(step, 0.5);
  state.counters["step_p99_us"] = at(step, 0.99);
  state.counters["step_max_us"] = at(step, 1);
  state.counters["halvings"] = static_cast<double>(stats.halvings);
  // The floor of a step: reading every live entry once. (Slabs that fit a cache are faster than memory.)
  const std::vector<float> buffer(static_cast<size_t>(64 << 20));
  const double floor = ReadBandwidth(buffer.data(), static_cast<int64_t>(buffer.size() * 4), 1);
  const double bytes = static_cast<double>(stats.entries * 2 * kDim * SizeOf(config.dtype));
  state.counters["step_floor_us"] = bytes / floor * 1e6;
}
BENCHMARK(DecodeStep)
    ->ArgName("budget")
    ->Arg(512)
    ->Arg(1024)
    ->Arg(2048)
    ->UseManualTime()
    ->Iterations(1)
    ->Unit(benchmark::kMillisecond);

// Causal prefill of n tokens, 1024 entries per head, against exact causal attention. Argument: n.
void Prefill(benchmark::State& state) {
  const int64_t n = state.range(0), block = 256;
  const Config config = MakeConfig(4, 2, 1024, DType::kBF16);
  Tokens tokens(config, block);
  double small = 0, large = 0;
  for (auto _ : state) {
    ExpressCache cache, exact;
    Check(ExpressCache::Create(config, &cache), state);
    Check(ExpressCache::Create(ExactConfig(config, n), &exact), state);
    double begin = Seconds();
    Check(tokens.Prefill(cache, n), state);
    small = Seconds() - begin;
    begin = Seconds();
    Check(tokens.Prefill(exact, n), state);
    large = Seconds() - begin;
    state.SetIterationTime(small);
  }
  const double floor = FlopRate(kThreads);
  const auto tokens_d = static_cast<double>(n);
  // 4 n (B + block / 2) d per query head; exact: 4 n (n / 2) d
  const double express_flops = 4 * tokens_d * (1024 + static_cast<double>(block) / 2) * kDim * 4;
  const double exact_flops = 4 * tokens_d * tokens_d / 2 * kDim * 4;
  state.counters["exact_ms"] = large * 1e3;
  state.counters["express_ms"] = small * 1e3;
  state.counters["speedup"] = large / small;
  state.counters["express_of_floor"] = express_flops / small / floor;
  state.counters["exact_of_floor"] = exact_flops / large / floor;
  state.counters["floor_GFLOP/s"] = floor / 1e9;
}
BENCHMARK(Prefill)->ArgName("n")->Arg(1024)->Arg(4096)->Arg(16384)->Arg(32768)->UseManualTime()->Iterations(1)->Unit(
    benchmark::kMillisecond);

// What scores of protection without rotary positions cost: a cache that is given frequencies beside one that is not, in turns, over
// n = 16 x budget tokens. Arguments: budget, tokens of a call (1: append and attend, more: prefill), storage type.
void ScoreWithoutPosition(benchmark::State& state) {
  const int64_t budget = state.range(0), n = 16 * budget, call = state.range(1);
  Config config = MakeConfig(8, 2, budget, static_cast<DType>(state.range(2)));
  config.threads = 1;
  Tokens tokens(config, 256);
  std::vector<float> frequencies;
  for (int32_t i = 0; i < kDim / 2; ++i) frequencies.push_back(static_cast<float>(std::pow(500000.0, -2.0 * i / kDim)));
  ExpressCache caches[2];
  Check(ExpressCache::Create(config, &caches[0]), state);
  config.rope_frequencies = frequencies;
  Check(ExpressCache::Create(config, &caches[1]), state);
  double seconds[2] = {};
  for (auto _ : state) {
    for (int64_t t = 0; t < n; t += call)
      for (int i = 0; i < 2; ++i) {
        const double begin = Seconds();
        if (call > 1) {
          Check(tokens.Prefill(caches[i], call), state);
        } else {
          Check(tokens.Append(caches[i], 1, t % 256), state);
          Check(tokens.Attend(caches[i]), state);
        }
        seconds[i] += Seconds() - begin;
      }
    state.SetIterationTime(seconds[1]);
  }
  const auto tokens_seen = static_cast<double>(n * state.iterations());
  state.counters["energy_ns_token"] = seconds[0] / tokens_seen * 1e9;
  state.counters["without_position_ns_token"] = seconds[1] / tokens_seen * 1e9;
  state.counters["ratio"] = seconds[1] / seconds[0];
  state.SetLabel(Name(static_cast<DType>(state.range(2))));
}
BENCHMARK(ScoreWithoutPosition)
    ->ArgNames({"budget", "call", "type"})
    ->ArgsProduct({{256, 1024}, {1, 256}, {0, 2, 3}})
    ->UseManualTime()
    ->Iterations(3)
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace express::bench
