// Kernel halving on the GPU against the scalar reference in double: the same choices, except from a near-tie onward
// (f32 may fall on the other side of one, and later pairs depend on it). And the same choices whatever the threads of a
// block.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <ostream>
#include <random>
#include <sstream>
#include <thread>
#include <vector>

#include "src/cpu/reference.h"
#include "src/cuda/halve.cuh"
#include "src/cuda/halve_fours.cuh"

namespace express::cuda {
namespace {

constexpr double kNearTie = 5e-6;  // Decision::margin below which f32 may differ

#define CHECK_CUDA(expression) ASSERT_EQ(expression, cudaSuccess) << cudaGetErrorString(cudaGetLastError())

enum class Kind {
  kPlain,
  kHugeMean,
  kSmallMean,
  kEqual,
  kAllEqual,
  kZeroValues,
  kFar,
  kHuge,
  kTiny,
  kLongRow,
  kCentred
};

struct ListCase {
  DType dtype;
  int32_t key_dim, value_dim;
  int32_t count;
  float gamma, tau;
  Kind kind = Kind::kPlain;
  bool coin = false;
};
std::ostream& operator<<(std::ostream& os, const ListCase& c) {
  return os << "dtype " << static_cast<int>(c.dtype) << " dims " << c.key_dim << ", " << c.value_dim << " count "
            << c.count << " gamma " << c.gamma << " tau " << c.tau << " kind " << static_cast<int>(c.kind)
            << (c.coin ? " coin" : "");
}
HalveParams Params(const ListCase& c) {
  return {1.0f / std::sqrt(static_cast<float>(c.key_dim)), c.gamma, c.tau, 0.5f, c.coin};
}

template <class T>
struct Job {
  const T* key;
  const T* value;
  const int32_t* slots;  // null: row i
  int32_t count, key_dim, value_dim;
  HalveParams params;
  StreamKey stream;
  uint64_t number;
  char* scratch;
  uint8_t* keep;
};

template <class T>
struct SlabRows {
  const Job<T>& job;
  __device__ const T* Key(int32_t i) const { return job.key + static_cast<int64_t>(job.slots[i]) * job.key_dim; }
  __device__ const T* Value(int32_t i) const { return job.value + static_cast<int64_t>(job.slots[i]) * job.value_dim; }
};

template <class T, int kThreads>
__global__ __launch_bounds__(kThreads) void HalveKernel(const Job<T>* jobs) {
  extern __shared__ __align__(16) char shared[];
  const Job<T>& job = jobs[blockIdx.x];
  HalveList<T, kThreads>(SlabRows<T>{job}, job.count, job.key_dim, job.value_dim, job.params, job.stream, job.number,
                         job.scratch, shared, job.keep);
}

// A warp for each list.
template <class T>
__global__ void WarpKernel(const Job<T>* jobs, int count, size_t bytes) {
  extern __shared__ __align__(16) char shared[];
  const int warp = static_cast<int>(threadIdx.x) / 32, index = static_cast<int>(blockIdx.x * blockDim.x / 32) + warp;
  if (index >= count) return;
  const Job<T>& job = jobs[index];
  HalveList<T, 32, kWarpList>(SlabRows<T>{job}, job.count, job.key_dim, job.value_dim, job.params, job.stream,
                              job.number, nullptr, shared + warp * bytes, job.keep);
}

// A warp for four lists of four entries, of one head. done: whether they were halved together.
template <class T>
struct FourRows {
  const Job<T>* jobs;
  int count;
  __device__ const Job<T>& job(int32_t i) const { return jobs[min(i / kFourEntries, count - 1)]; }
  __device__ const T* Key(int32_t i) const { return SlabRows<T>{job(i)}.Key(i % kFourEntries); }
  __device__ const T* Value(int32_t i) const { return SlabRows<T>{job(i)}.Value(i % kFourEntries); }
};
template <class T>
__global__ void FoursKernel(const Job<T>* jobs, int count, int32_t* together) {
  extern __shared__ __align__(16) char shared[];
  const FourRows<T> rows{jobs + kFours * blockIdx.x, min(kFours, count - kFours * static_cast<int>(blockIdx.x))};
  const int lane = static_cast<int>(threadIdx.x), list = lane % 8 / 2;
  const Job<T>& job = rows.job(list * kFourEntries);
  bool done = false;
  const bool keep = HalveFours<T>(rows, job.key_dim, job.value_dim, job.params, job.stream, job.number, shared, done);
  if (done && lane < 2 * rows.count) job.keep[lane % 2] = keep ? 1 : 0;
  if (lane == 0) together[blockIdx.x] = done;
}

// A list with structure (three directions, an offset common to all keys), in random slots of a larger slab whose other
// slots are NaN.
template <class T>
struct List {
  ListCase c;
  std::vector<int32_t> slots;
  std::vector<T> key, value;  // the slab
  reference::Matrix keys, values;
  StreamKey stream;
  uint64_t number;

  List(const ListCase& list_case, uint32_t seed)
      : c(list_case),
        slots(static_cast<size_t>(c.count) + 7),
        key(slots.size() * static_cast<size_t>(c.key_dim), Nan()),
        value(slots.size() * static_cast<size_t>(c.value_dim), Nan()),
        keys(c.count, c.key_dim),
        values(c.count, c.value_dim),
        stream(MakeStreamKey(11, 2, seed)),
        number(static_cast<uint64_t>(seed) << 31) {
    std::mt19937 rng(seed);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(slots.begin(), slots.end(), rng);
    slots.resize(static_cast<size_t>(c.count));
    Fill(rng);
  }
  static T Nan() {
    T x;
    std::memset(static_cast<void*>(&x), 0xFF, sizeof(T));
    return x;
  }
  static T Round(float x) {
    if constexpr (sizeof(T) == 4)
      return x;
    else if constexpr (std::is_same_v<T, Half>)
      return __float2half_rn(x);
    else
      return __float2bfloat16_rn(x);
  }
  static double Double(T x) {
    if constexpr (sizeof(T) == 4)
      return x;
    else if constexpr (std::is_same_v<T, Half>)
      return __half2float(x);
    else
      return __bfloat162float(x);
  }

  void Fill(std::mt19937& rng) {
    std::normal_distribution<float> normal;
    const auto dk = static_cast<size_t>(c.key_dim), dv = static_cast<size_t>(c.value_dim);
    std::vector<float> directions(3 * (dk + dv)), mean(dk, 1.5f);
    for (float& x : directions) x = normal(rng);
    if (c.kind == Kind::kCentred) std::fill(mean.begin(), mean.end(), 0.0f);
    if (c.kind == Kind::kHugeMean || c.kind == Kind::kSmallMean)
      for (float& x : mean) x = (c.kind == Kind::kHugeMean ? 1000.0f : 12.0f) * normal(rng);
    const bool half = std::is_same_v<T, Half>;
    const float key_scale = c.kind == Kind::kFar ? 20.0f : c.kind == Kind::kHuge ? (half ? 2e3f : 1e30f) : 1.0f;
    const float value_scale = c.kind == Kind::kZeroValues ? 0.0f
                              : c.kind == Kind::kHuge     ? (half ? 5e3f : 1e36f)
                              : c.kind == Kind::kTiny     ? (half ? 1e-4f : 1e-36f)
                                                          : 1.0f;
    for (int32_t i = 0; i < c.count; ++i) {
      const auto row = static_cast<size_t>(i), slot = static_cast<size_t>(slots[row]);
      if (c.kind == Kind::kAllEqual ? i > 0 : c.kind == Kind::kEqual && i % 2 == 1 && rng() % 3 == 0) {
        CopyRow(static_cast<size_t>(slots[row - 1]), slot);
      } else {
        float z[3];
        for (float& x : z) x = normal(rng);
        const float longer = c.kind == Kind::kLongRow && i == c.count / 3 ? 30.0f : 1.0f;
        size_t at = 0;
        const auto draw = [&] {
          float x = 0.2f * normal(rng);
          for (const float factor : z) x += 0.6f * factor * directions[at++];
          return x;
        };
        for (size_t d = 0; d < dk; ++d) key[slot * dk + d] = Round(key_scale * (draw() * longer + mean[d]));
        for (size_t d = 0; d < dv; ++d) value[slot * dv + d] = Round(value_scale * draw());
      }
      for (size_t d = 0; d < dk; ++d) keys.row(i)[d] = Double(key[slot * dk + d]);
      for (size_t d = 0; d < dv; ++d) values.row(i)[d] = Double(value[slot * dv + d]);
    }
  }
  void CopyRow(size_t from, size_t to) {
    const auto dk = static_cast<size_t>(c.key_dim), dv = static_cast<size_t>(c.value_dim);
    std::copy_n(key.begin() + static_cast<int64_t>(from * dk), dk, key.begin() + static_cast<int64_t>(to * dk));
    std::copy_n(value.begin() + static_cast<int64_t>(from * dv), dv, value.begin() + static_cast<int64_t>(to * dv));
  }
};

cpu::HalveParams CpuParams(const HalveParams& p) { return {p.scale, p.gamma, p.tau, p.delta, p.coin}; }

// Device memory of one test, freed at its end.
class Memory {
 public:
  ~Memory() {
    for (void* p : taken_) cudaFree(p);
  }
  template <class U>
  U* Take(size_t count, const U* from = nullptr) {
    void* p = nullptr;
    const size_t bytes = std::max<size_t>(count * sizeof(U), 16);
    EXPECT_EQ(cudaMalloc(&p, bytes), cudaSuccess);
    taken_.push_back(p);
    EXPECT_EQ(cudaMemset(p, 0xFF, bytes), cudaSuccess);
    if (from != nullptr) EXPECT_EQ(cudaMemcpy(p, from, count * sizeof(U), cudaMemcpyHostToDevice), cudaSuccess);
    return static_cast<U*>(p);
  }

 private:
  std::vector<void*> taken_;
};

// keep of every list, with blocks of kThreads; 32: a warp for each list.
template <class T, int kThreads>
void HalveAll(const std::vector<List<T>>& lists, std::vector<std::vector<uint8_t>>& keeps) {
  Memory memory;
  std::vector<Job<T>> jobs;
  size_t shared = 0;
  for (const List<T>& l : lists) {
    shared = std::max(shared, HalveSharedBytes<T>(l.c.key_dim, l.c.value_dim, l.c.count));
    jobs.push_back({memory.Take(l.key.size(), l.key.data()), memory.Take(l.value.size(), l.value.data()),
                    memory.Take(l.slots.size(), l.slots.data()), l.c.count, l.c.key_dim, l.c.value_dim, Params(l.c),
                    l.stream, l.number, memory.Take<char>(HalveScratchBytes(l.c.count)),
                    memory.Take<uint8_t>(static_cast<size_t>(l.c.count / 2))});
  }
  ASSERT_LE(shared, size_t{43} << 10);
  const auto count = static_cast<uint32_t>(jobs.size());
  const Job<T>* list = memory.Take(jobs.size(), jobs.data());
  if constexpr (kThreads == 32) {
    size_t largest = 0;
    for (const Job<T>& job : jobs) largest = std::max(largest, HalveWarpBytes(job.key_dim));
    WarpKernel<T><<<(count + 2) / 3, 3 * 32, 3 * largest>>>(list, static_cast<int>(count), largest);
  } else {
    HalveKernel<T, kThreads><<<count, kThreads, shared>>>(list);
  }
  CHECK_CUDA(cudaGetLastError());
  CHECK_CUDA(cudaDeviceSynchronize());
  keeps.clear();
  for (const Job<T>& job : jobs) {
    keeps.emplace_back(static_cast<size_t>(job.count / 2));
    CHECK_CUDA(cudaMemcpy(keeps.back().data(), job.keep, keeps.back().size(), cudaMemcpyDeviceToHost));
  }
}

template <class T>
std::vector<reference::Halved> Expected(const std::vector<List<T>>& lists) {
  std::vector<reference::Halved> expected(lists.size());
  std::vector<size_t> order(lists.size());  // longest first
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return lists[a].c.count > lists[b].c.count; });
  std::atomic<size_t> next = 0;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < std::max(1u, std::thread::hardware_concurrency()); ++t)
    threads.emplace_back([&] {
      for (size_t i = next++; i < order.size(); i = next++) {
        const List<T>& l = lists[order[i]];
        expected[order[i]] = reference::Halve(l.keys, l.values, CpuParams(Params(l.c)), l.stream, l.number);
      }
    });
  for (std::thread& thread : threads) thread.join();
  return expected;
}

std::vector<ListCase> Cases(DType dtype) {
  std::vector<ListCase> cases;
  for (const auto& [dk, dv] :
       {std::pair{8, 8}, {64, 64}, {80, 96}, {96, 80}, {128, 128}, {128, 64}, {192, 128}, {256, 256}})
    for (const int32_t count : {2, 4, 6, 10, 12, 16, 18, 32, 34, 62, 64, 66, 126, 130, 200, 400})
      cases.push_back({dtype, dk, dv, count, 1, 0.1f});
  cases.push_back({dtype, 1024, 1024, 70, 1, 0.1f});
  cases.push_back({dtype, 72, 520, 70, 1, 0.1f});
  for (const float gamma : {0.0f, 0.5f, 1.0f})
    for (const float tau : {0.0f, 0.01f, 0.1f, 1.0f})
      for (const int32_t count : {32, 64, 200}) cases.push_back({dtype, 128, 128, count, gamma, tau});
  for (const Kind kind : {Kind::kHugeMean, Kind::kSmallMean, Kind::kEqual, Kind::kAllEqual, Kind::kZeroValues,
                          Kind::kFar, Kind::kHuge, Kind::kTiny, Kind::kLongRow})
    for (const float gamma : {0.5f, 1.0f})
      for (const int32_t count : {4, 14, 32, 66, 200, 400}) cases.push_back({dtype, 96, 128, count, gamma, 0.1f, kind});
  for (const int32_t count : {2, 64, 1226}) cases.push_back({dtype, 64, 64, count, 1, 0.1f, Kind::kPlain, true});
  cases.push_back({dtype, 128, 128, 1226, 1, 0.1f});
  cases.push_back({dtype, 128, 128, 1226, 0.5f, 1});
  cases.push_back({dtype, 192, 128, 1226, 1, 0.1f});
  cases.push_back({dtype, 64, 64, 6500, 1, 0.1f});
  return cases;
}

template <class T>
class HalveTest : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
      GTEST_SKIP() << "NO NVIDIA GPU ON THIS MACHINE: THIS TEST DID NOT RUN";
  }
  static constexpr DType kDType = sizeof(T) == 4 ? DType::kF32 : std::is_same_v<T, Half> ? DType::kF16 : DType::kBF16;
};
using Types = testing::Types<float, Half, BFloat16>;
TYPED_TEST_SUITE(HalveTest, Types);

TYPED_TEST(HalveTest, ChoosesAsTheReference) {
  using T = TypeParam;
  std::vector<List<T>> lists;
  for (const ListCase& c : Cases(TestFixture::kDType)) lists.emplace_back(c, static_cast<uint32_t>(40 + lists.size()));
  std::vector<std::vector<uint8_t>> keeps, other;
  HalveAll<T, 256>(lists, keeps);
  if (this->HasFatalFailure()) return;
  HalveAll<T, 128>(lists, other);
  if (this->HasFatalFailure()) return;
  std::vector<List<T>> short_lists;
  std::vector<std::vector<uint8_t>> expected_of_warps, warps;
  for (size_t l = 0; l < lists.size(); ++l) {
    if (lists[l].c.count > kWarpList) continue;
    short_lists.push_back(lists[l]);
    expected_of_warps.push_back(keeps[l]);
  }
  HalveAll<T, 32>(short_lists, warps);
  if (this->HasFatalFailure()) return;
  EXPECT_EQ(warps, expected_of_warps) << "a warp for each list";
  const std::vector<reference::Halved> expected = Expected(lists);
  int differ = 0, ties = 0, wrong = 0, decided = 0;
  double largest = 0, least = 1;
  for (size_t l = 0; l < lists.size(); ++l) {
    SCOPED_TRACE(testing::Message() << lists[l].c);
    EXPECT_EQ(keeps[l], other[l]) << "blocks of 256 and of 128 threads";
    const reference::Halved& e = expected[l];
    bool same = true;
    for (size_t a = 0; a < keeps[l].size() && same; ++a) {
      const reference::Decision& d = e.decisions[a];
      EXPECT_LE(keeps[l][a], 1);
      same = 2 * static_cast<int64_t>(a) + keeps[l][a] == e.kept[a];
      ties += !d.coin && d.margin < kNearTie;
      decided += !d.coin && std::abs(d.sum) > d.threshold;
      if (!d.coin && same) least = std::min(least, d.margin);
      if (same) continue;
      ++differ;
      const double margin = d.coin && std::isinf(d.margin) ? 1 : d.margin;
      largest = std::max(largest, margin);
      wrong += margin > kNearTie;
      std::ostringstream text;
      text << lists[l].c;
      std::printf("  %s: pair %zu of %zu differs, margin %.2g (sum %.6g threshold %.6g draw %.6g)\n",
                  text.str().c_str(), a, keeps[l].size(), margin, d.sum, d.threshold, d.draw);
      EXPECT_LE(margin, kNearTie) << "pair " << a;
    }
  }
  std::printf(
      "%zu lists: %d differ from some near-tie on (largest margin %.2g), %d wrong; %d near-ties met, smallest margin "
      "with "
      "the same choice %.2g; %d choices that no draw would have changed\n",
      lists.size(), differ, largest, wrong, ties, least, decided);
  EXPECT_LE(differ, static_cast<int>(lists.size()) / 20);
  EXPECT_GE(decided, 150);
}

// How far a list goes of what needs neither another origin nor another scale: up to 1.
template <class T>
double OfLimits(const List<T>& list) {
  double key = 0, value = 0, norm = 0;
  for (int32_t i = 0; i < list.c.count; ++i) {
    double square = 0;
    for (size_t d = 0; d < static_cast<size_t>(list.c.key_dim); ++d) {
      const double x = list.keys.row(i)[d];
      square += x * x;
      key = std::max(key, std::abs(x));
    }
    norm = std::max(norm, square);
    for (size_t d = 0; d < static_cast<size_t>(list.c.value_dim); ++d)
      value = std::max(value, std::abs(list.values.row(i)[d]));
  }
  const double exponent = 0.5 * kLog2E * Params(list.c).scale * norm / halve::kPlainExponent;
  const double small = value > 0 ? halve::kSmallestValue / value : 0;
  return std::max({key / halve::kLargestKey, value / halve::kLargestValue, small, exponent});
}

// To the bit as a warp for each list; together wherever no list of the four needs another origin or scale.
TYPED_TEST(HalveTest, FourListsOfFourChooseAsOneByOne) {
  using T = TypeParam;
  int groups = 0, all_together = 0;
  for (const auto& [dk, dv] : {std::pair{64, 64}, {80, 80}, {96, 96}, {128, 128}, {192, 128}, {256, 256}})
    for (const Kind odd : {Kind::kPlain, Kind::kEqual, Kind::kAllEqual, Kind::kZeroValues, Kind::kHuge, Kind::kTiny})
      for (const float tau : {0.1f, 1.0f}) {
        std::vector<List<T>> lists;
        for (int i = 0; i < 39; ++i) {  // the last warp has three
          const ListCase c{TestFixture::kDType, dk, dv, kFourEntries, 1, tau, i % 8 == 5 ? odd : Kind::kCentred};
          lists.emplace_back(c, static_cast<uint32_t>(7000 + i + dk));
          lists.back().stream = lists[0].stream;
        }
        std::vector<std::vector<uint8_t>> expected;
        HalveAll<T, 32>(lists, expected);
        if (this->HasFatalFailure()) return;
        Memory memory;
        std::vector<Job<T>> jobs;
        for (const List<T>& l : lists)
          jobs.push_back({memory.Take(l.key.size(), l.key.data()), memory.Take(l.value.size(), l.value.data()),
                          memory.Take(l.slots.size(), l.slots.data()), l.c.count, l.c.key_dim, l.c.value_dim,
                          Params(l.c), l.stream, l.number, nullptr, memory.Take<uint8_t>(2)});
        const auto count = static_cast<int>(jobs.size()), warps = (count + kFours - 1) / kFours;
        const Job<T>* list = memory.Take(jobs.size(), jobs.data());
        int32_t* together = memory.Take<int32_t>(static_cast<size_t>(warps));
        FoursKernel<T><<<static_cast<uint32_t>(warps), 32, HalveWarpBytes(dk)>>>(list, count, together);
        CHECK_CUDA(cudaGetLastError());
        CHECK_CUDA(cudaDeviceSynchronize());
        std::vector<int32_t> done(static_cast<size_t>(warps));
        CHECK_CUDA(cudaMemcpy(done.data(), together, done.size() * sizeof(int32_t), cudaMemcpyDeviceToHost));
        for (int w = 0; w < warps; ++w) {
          ++groups, all_together += done[static_cast<size_t>(w)];
          const int begin = kFours * w, end = std::min(count, begin + kFours);
          double furthest = 0;  // of the limits
          for (int i = begin; i < end; ++i) furthest = std::max(furthest, OfLimits(lists[static_cast<size_t>(i)]));
          if (std::abs(furthest - 1) > 1e-4) EXPECT_EQ(done[static_cast<size_t>(w)], furthest < 1) << "group " << w;
          for (int i = kFours * w; done[static_cast<size_t>(w)] && i < std::min(count, kFours * (w + 1)); ++i) {
            std::vector<uint8_t> keep(2);
            CHECK_CUDA(cudaMemcpy(keep.data(), jobs[static_cast<size_t>(i)].keep, 2, cudaMemcpyDeviceToHost));
            EXPECT_EQ(keep, expected[static_cast<size_t>(i)])
                << "list " << i << " of " << lists[static_cast<size_t>(i)].c;
          }
        }
      }
  std::printf("%d of %d groups of four lists were halved together\n", all_together, groups);
  EXPECT_GT(all_together, 0);
  EXPECT_LT(all_together, groups);
}

}  // namespace
}  // namespace express::cuda
