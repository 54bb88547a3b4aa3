// What the machine can do at most, measured in the run in which a kernel is measured: reading memory, and multiply-adds
// in registers. A program includes this once.
#ifndef EXPRESS_BENCH_FLOORS_H_
#define EXPRESS_BENCH_FLOORS_H_

#include <benchmark/benchmark.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <functional>
#include <limits>
#include <thread>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "bench/floors-inl.h"
// clang-format off
#include "hwy/foreach_target.h"  // before the file it includes for each target
#include "bench/floors-inl.h"
// clang-format on

namespace express::bench {

HWY_EXPORT(ReadAll);
HWY_EXPORT(MultiplyAdds);

// Wall time.
inline double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Processor time of this thread. It does not run while others have the processor, so that floors and kernels measured by
// it can be compared on a busy machine too; on an idle one it agrees with the wall's.
inline double ThreadSeconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Runs body(thread) on that many threads and returns the processor time of the slowest.
inline double TimeThreads(int threads, const std::function<void(int)>& body) {
  std::vector<double> seconds(static_cast<size_t>(threads));
  const auto timed = [&](int i) {
    const double begin = ThreadSeconds();
    body(i);
    seconds[static_cast<size_t>(i)] = ThreadSeconds() - begin;
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(timed, i);
  timed(0);
  for (std::thread& other : others) other.join();
  return *std::max_element(seconds.begin(), seconds.end());
}

// The best of several runs: what other programs take away is not the machine's floor.
inline double BestSeconds(int repeats, const std::function<double()>& run) {
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < repeats; ++i) best = std::min(best, run());
  return best;
}

// Bytes per second of plain vector reads of the buffer, cut evenly between the threads.
inline double ReadBandwidth(const void* data, int64_t bytes, int threads, int repeats = 10) {
  const int64_t share = bytes / static_cast<int64_t>(sizeof(float)) / threads;
  return static_cast<double>(bytes) / BestSeconds(repeats, [&] {
           return TimeThreads(threads, [&](int i) {
             benchmark::DoNotOptimize(
                 HWY_DYNAMIC_DISPATCH(ReadAll)(static_cast<const float*>(data) + i * share, share));
           });
         });
}

// Floating-point operations per second (a multiply-add is two) of as many threads.
inline double FlopRate(int threads, int repeats = 10) {
  int64_t done = 0;
  const double seconds = BestSeconds(repeats, [&] {
    return TimeThreads(threads, [&](int i) {
      int64_t mine = 0;
      benchmark::DoNotOptimize(HWY_DYNAMIC_DISPATCH(MultiplyAdds)(1'000'000, &mine));
      if (i == 0) done = mine;
    });
  });
  return 2.0 * static_cast<double>(done) * threads / seconds;
}

// Times the body of a benchmark's iterations one by one, so that the best of them can be set against a floor that is
// itself a best.
class BestTime {
 public:
  // body(thread)
  void Run(benchmark::State& state, int threads, const std::function<void(int)>& body) {
    for (auto _ : state) {
      const double seconds = TimeThreads(threads, body);
      state.SetIterationTime(seconds);
      best_ = std::min(best_, seconds);
    }
  }
  // Counters: the best rate in units of 1e9 per second, the floor in the same, and their ratio.
  void Report(benchmark::State& state, const char* unit, double work, double floor) const {
    state.counters[unit] = work / best_ / 1e9;
    state.counters["floor"] = floor / 1e9;
    state.counters["of_floor"] = work / best_ / floor;
  }
  // The best rate in units of `work` per second.
  void ReportRate(benchmark::State& state, const char* unit, double work) const { state.counters[unit] = work / best_; }

 private:
  double best_ = std::numeric_limits<double>::infinity();
};

}  // namespace express::bench

#endif  // EXPRESS_BENCH_FLOORS_H_
