// overhead.c in C++.
#include <express/cache.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>

namespace {

constexpr int64_t kDim = 16, kBudget = 16;

double Now() {
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void Check(const express::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  using express::View;
  const long calls = argc == 2 ? std::atol(argv[1]) : 0;
  float q[kDim], k[kDim], v[kDim], out[kDim];
  for (int i = 0; i < kDim; ++i) {
    q[i] = static_cast<float>(i * 5 % 7) / 7;
    k[i] = static_cast<float>(i * 3 % 5) / 5;
    v[i] = static_cast<float>(i * 7 % 11) / 11;
  }
  express::Config config;
  config.key_dim = config.value_dim = kDim;
  config.budget = kBudget;
  config.threads = 1;
  express::ExpressCache cache;
  Check(express::ExpressCache::Create(config, &cache));
  double start = Now();
  for (long i = 0; i < calls; ++i) {
    Check(cache.Append(0, View(k, {1, 1, kDim}), View(v, {1, 1, kDim})));
    Check(cache.Attend(0, View(q, {1, 1, kDim}), View(out, {1, 1, kDim})));
  }
  const double step = Now() - start;
  start = Now();
  int64_t bytes = 0;
  for (long i = 0; i < calls; ++i) Check(cache.Bytes(&bytes));
  const double look = Now() - start;
  double sum = 0;
  for (const float x : out) sum += x;
  express::Stats stats;
  Check(cache.GetStats(0, &stats));
  std::printf("%.1f %.1f %.4f %lld\n", step / static_cast<double>(calls), look / static_cast<double>(calls), sum,
              static_cast<long long>(stats.halvings));
}
