// The decode attention kernels against attention in double precision: ragged batches, poisoned outputs and surroundings, free
// slots that hold NaN, every pair of dims, every way to share the work.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <type_traits>
#include <vector>

#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Device memory of one test, poisoned, with NaN on both sides of it, freed at its end.
class Memory {
 public:
  ~Memory() {
    for (void* p : taken_) cudaFree(p);
  }
  template <class U>
  U* Take(size_t count) {
    constexpr size_t kMargin = 4096;
    void* p = nullptr;
    const size_t bytes = (count * sizeof(U) + 255) / 256 * 256 + 2 * kMargin;
    EXPECT_EQ(cudaMalloc(&p, bytes), cudaSuccess);
    taken_.push_back(p);
    EXPECT_EQ(cudaMemset(p, 0xFF, bytes), cudaSuccess);
    return reinterpret_cast<U*>(static_cast<char*>(p) + kMargin);
  }
  template <class U>
  U* Take(const std::vector<U>& from) {
    U* to = Take<U>(from.size());
    EXPECT_EQ(cudaMemcpy(to, from.data(), from.size() * sizeof(U), cudaMemcpyHostToDevice), cudaSuccess);
    return to;
  }

 private:
  std::vector<void*> taken_;
};

float Value(float x) { return x; }
float Value(Half x) { return __half2float(x); }
float Value(BFloat16 x) { return __bfloat162float(x); }
template <class T>
T Rounded(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  if constexpr (std::is_same_v<T, Half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, BFloat16>) return __float2bfloat16_rn(x);
}
template <class T>
constexpr DType TypeOf() {
  return sizeof(T) == 4 ? DType::kF32 : std::is_same_v<T, Half> ? DType::kF16 : DType::kBF16;
}

struct Case {
  int32_t caches, kv_heads, group, tokens, key_dim, value_dim;
  int32_t least_capacity = 1, most_capacity;  // capacities are ragged up to it
  float logits = 1;                           // standard deviation, about
  bool free_blocks = false;                   // long stretches of free slots, too
};

// What one KV head of one cache holds, on the host.
template <class T>
struct HostHead {
  std::vector<T> key, value;
  std::vector<float> log_weight;
};

template <class T>
struct Problem {
  Case c;
  Memory memory;
  std::vector<HostHead<T>> heads;
  std::vector<Head> described;
  std::vector<T> q;
  AttendArgs args{};
  std::vector<const Head*> rows;  // of `described`, by cache
  int64_t out_count, lse_count;

  HostHead<T> MakeHead(std::mt19937& rng) const {
    std::normal_distribution<float> normal;
    const int32_t capacity =
        c.least_capacity + static_cast<int32_t>(rng() % static_cast<uint32_t>(c.most_capacity - c.least_capacity + 1));
    HostHead<T> head;
    const int fullness = static_cast<int>(rng() % 4);  // 0: empty slots only, in some
    int32_t stretch = 0;
    for (int32_t i = 0; i < capacity; ++i) {
      if (c.free_blocks && rng() % 64 == 0) stretch = static_cast<int32_t>(rng() % 200);
      const bool free = (fullness == 0 && heads.size() % 5 == 3) || (fullness == 1 && rng() % 3 == 0) ||
                        (fullness == 2 && i >= capacity / 3) || stretch-- > 0;
      for (int32_t d = 0; d < c.key_dim; ++d)
        head.key.push_back(Rounded<T>(free ? std::nanf("") : c.logits * normal(rng)));
      for (int32_t d = 0; d < c.value_dim; ++d) head.value.push_back(Rounded<T>(free ? std::nanf("") : normal(rng)));
      head.log_weight.push_back(free ? -kInfinity : static_cast<float>(rng() % 100) / 20.0f);
    }
    return head;
  }

  Problem(const Case& c_, uint32_t seed) : c(c_) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    const int32_t query_heads = c.kv_heads * c.group, rows_of_q = c.caches * c.tokens;
    for (int32_t i = 0; i < c.caches * c.kv_heads; ++i) heads.push_back(MakeHead(rng));
    for (const HostHead<T>& h : heads) {
      Head head{};
      head.capacity = static_cast<int32_t>(h.log_weight.size());
      head.key = memory.Take(h.key);
      head.value = memory.Take(h.value);
      head.log_weight = memory.Take(h.log_weight);
      head.partial = memory.template Take<float>(static_cast<size_t>(AttendMaxSplits(c.most_capacity)) * kPartialRows *
                                                 static_cast<size_t>(c.value_dim + 2));
      head.ticket = memory.Take(std::vector<int32_t>{0});
      described.push_back(head);
    }
    const Head* device = memory.Take(described);
    for (int32_t i = 0; i < c.caches; ++i) {
      args.heads[i] = device + i * c.kv_heads;
      rows.push_back(described.data() + i * c.kv_heads);
      for (int32_t g = 0; g < c.kv_heads; ++g) args.max_capacity = std::max(args.max_capacity, rows.back()[g].capacity);
    }
    for (int64_t i = 0; i < int64_t{rows_of_q} * query_heads * c.key_dim; ++i) q.push_back(Rounded<T>(normal(rng)));
    args.caches = c.caches, args.kv_heads = c.kv_heads, args.group = c.group, args.tokens = c.tokens;
    args.key_dim = c.key_dim, args.value_dim = c.value_dim;
    args.dtype = TypeOf<T>();
    args.q = {memory.Take(q), int64_t{query_heads} * c.key_dim, c.key_dim, TypeOf<T>()};
    args.q_cache_stride = c.tokens * args.q.row_stride;
    out_count = int64_t{rows_of_q} * query_heads * c.value_dim;
    lse_count = int64_t{rows_of_q} * query_heads;
    args.out = {memory.template Take<float>(static_cast<size_t>(out_count)), int64_t{query_heads} * c.value_dim,
                c.value_dim, DType::kF32};
    args.out_cache_stride = c.tokens * args.out.row_stride;
    args.lse = memory.template Take<float>(static_cast<size_t>(lse_count));
    args.lse_row_stride = query_heads, args.lse_head_stride = 1;
    args.lse_cache_stride = int64_t{c.tokens} * query_heads;
    args.scale = 1 / std::sqrt(static_cast<float>(c.key_dim));
    args.exponent = 0.5f;
    Expect();
  }

  struct Output {
    std::vector<float> out, lse;
    bool operator==(const Output& other) const {  // to the bit
      return std::memcmp(out.data(), other.out.data(), out.size() * 4) == 0 &&
             std::memcmp(lse.data(), other.lse.data(), lse.size() * 4) == 0;
    }
  };
  Output Run(const AttendMachine& machine) {
    Output got;
    got.out.resize(static_cast<size_t>(out_count)), got.lse.resize(static_cast<size_t>(lse_count));
    EXPECT_EQ(cudaMemset(args.out.data, 0xFF, got.out.size() * 4), cudaSuccess);
    EXPECT_EQ(cudaMemset(args.lse, 0xFF, got.lse.size() * 4), cudaSuccess);
    Attend(args, rows.data(), &machine, 1, nullptr);
    EXPECT_EQ(cudaGetLastError(), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(got.out.data(), args.out.data, got.out.size() * 4, cudaMemcpyDeviceToHost), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(got.lse.data(), args.lse, got.lse.size() * 4, cudaMemcpyDeviceToHost), cudaSuccess);
    return got;
  }

  // The largest error relative to what rounding allows.
  double Compare(const Output& got) const {
    double worst = 0;
    const auto compare = [&](float x, double expected, double allowed) {
      if (std::isinf(expected)) {
        if (static_cast<double>(x) != expected) worst = 1e9;
        return;
      }
      const double error = std::abs(static_cast<double>(x) - expected);
      worst = std::max(worst, std::isnan(error) ? 1e9 : error / allowed);
    };
    for (size_t i = 0; i < got.out.size(); ++i) compare(got.out[i], out[i], out_allowed[i]);
    for (size_t i = 0; i < got.lse.size(); ++i) compare(got.lse[i], lse[i], lse_allowed[i]);
    return worst;
  }

 private:
  // P is rounded to the type, values weigh at most 1; logits are summed in float.
  void Expect() {
    const double unit = std::is_same_v<T, float> ? 3e-7 : std::is_same_v<T, Half> ? 1.0 / 2048 : 1.0 / 256;
    const int32_t query_heads = c.kv_heads * c.group;
    const auto key_dim = static_cast<size_t>(c.key_dim), value_dim = static_cast<size_t>(c.value_dim);
    for (int32_t row = 0; row < c.caches * c.tokens; ++row)
      for (int32_t h = 0; h < query_heads; ++h) {
        const HostHead<T>& head = heads[static_cast<size_t>(row / c.tokens * c.kv_heads + h / c.group)];
        const T* query = q.data() + static_cast<size_t>(row * query_heads + h) * key_dim;
        std::vector<double> logit;
        double max = -std::numeric_limits<double>::infinity(), sum = 0, size = 0;
        for (size_t i = 0; i < head.log_weight.size(); ++i) {
          logit.push_back(-std::numeric_limits<double>::infinity());
          if (head.log_weight[i] == -kInfinity) continue;
          double dot = 0, absolute = 0;
          for (size_t d = 0; d < key_dim; ++d) {
            const double x =
                static_cast<double>(Value(query[d])) * static_cast<double>(Value(head.key[i * key_dim + d]));
            dot += x, absolute += std::abs(x);
          }
          const auto scale = static_cast<double>(args.scale);
          size = std::max(size, absolute * scale);
          logit.back() = scale * dot + static_cast<double>(args.exponent * head.log_weight[i]);
          max = std::max(max, logit.back());
        }
        std::vector<double> sums(value_dim), largest(value_dim);
        for (size_t i = 0; i < logit.size(); ++i) {
          if (std::isinf(logit[i])) continue;
          const double p = std::exp(logit[i] - max);
          sum += p;
          for (size_t d = 0; d < value_dim; ++d) {
            const auto v = static_cast<double>(Value(head.value[i * value_dim + d]));
            sums[d] += p * v;
            largest[d] = std::max(largest[d], std::abs(v));
          }
        }
        const double float_error = 2e-6 * (1 + size);
        for (size_t d = 0; d < value_dim; ++d) {
          out.push_back(sum > 0 ? sums[d] / sum : 0);
          out_allowed.push_back((unit + float_error) * largest[d] + 1e-30);
        }
        lse.push_back(sum > 0 ? max + std::log(sum) : -std::numeric_limits<double>::infinity());
        lse_allowed.push_back(float_error + 1e-5);
      }
  }
  std::vector<double> out, out_allowed, lse, lse_allowed;
};

// The machine as it is, and as it would be with other ways to share the work.
std::vector<AttendMachine> Machines(const AttendMachine& machine) {
  std::vector<AttendMachine> all{machine};
  for (int i = 0; i < AttendMachine::kClusterSizes; ++i) {
    if (machine.clusters[i] == 0) continue;
    AttendMachine one = machine;
    std::fill_n(one.clusters, AttendMachine::kClusterSizes, 0);
    one.clusters[i] = machine.clusters[i];
    all.push_back(one);
    one.clusters[i] = std::min(machine.clusters[i], 3);  // few and long shares, over the borders of heads
    one.dependent_launches = false;
    all.push_back(one);
  }
  for (int32_t blocks = 2; blocks <= kMostBlocks; ++blocks) {
    AttendMachine several = machine;
    EXPECT_EQ(DescribeAttend(0, blocks, &several), cudaSuccess);
    all.push_back(several);
    several.multiprocessors = 5;  // heads that are alike, and more than this, get a block each
    all.push_back(several);
  }
  AttendMachine small = machine;  // shared memory of smaller devices: few stages
  small.shared_bytes = std::min(machine.shared_bytes, 99 * 1024);
  all.push_back(small);
  return all;
}

template <class T>
class AttendTest : public testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
      GTEST_SKIP() << "NO NVIDIA GPU ON THIS MACHINE: THIS TEST DID NOT RUN";
    ASSERT_EQ(DescribeAttend(0, 1, &machine_), cudaSuccess);
  }
  void Check(const Case& c, uint32_t seed) {
    ASSERT_EQ(PrepareAttend(TypeOf<T>(), c.key_dim, c.value_dim, machine_), cudaSuccess);
    Problem<T> problem(c, seed);
    int i = 0;
    for (const AttendMachine& machine : Machines(machine_)) {
      const auto got = problem.Run(machine);
      const double error = problem.Compare(got);
      EXPECT_LE(error, 1) << "machine " << i << " seed " << seed << " dims " << c.key_dim << " " << c.value_dim
                          << " caches " << c.caches << " heads " << c.kv_heads << " group " << c.group << " tokens "
                          << c.tokens;
      largest_ = std::max(largest_, error);
      EXPECT_TRUE(problem.Run(machine) == got) << "equal calls differ";
      ++i, ++runs_;
      if (TypeOf<T>() == DType::kF32) break;
    }
  }
  AttendMachine machine_{};
  double largest_ = 0;
  int runs_ = 0;
};
using Types = testing::Types<float, Half, BFloat16>;
TYPED_TEST_SUITE(AttendTest, Types);

TYPED_TEST(AttendTest, AttendsAsDoublePrecisionDoes) {
  std::mt19937 rng(9);
  uint32_t seed = 0;
  for (const auto& [dk, dv] : {std::pair{64, 64}, {80, 80}, {96, 96}, {128, 128}, {192, 192}, {192, 128}, {256, 256}}) {
    for (const int32_t group : {1, 4, 8, 13})
      this->Check({.caches = 1 + static_cast<int32_t>(rng() % 5),
                   .kv_heads = 1 + static_cast<int32_t>(rng() % 4),
                   .group = group,
                   .tokens = group == 1 ? 3 : 1 + static_cast<int32_t>(rng() % 2),
                   .key_dim = dk,
                   .value_dim = dv,
                   .most_capacity = group == 4 ? 3000 : 400,
                   .logits = group == 8 ? 3.0f : 1.0f,
                   .free_blocks = group == 4},
                  ++seed);
  }
  std::printf("%d runs, largest error %.2f of what rounding allows\n", this->runs_, this->largest_);
}

TYPED_TEST(AttendTest, HeadsThatAreAlike) {
  for (const int32_t group : {1, 5, 9})
    this->Check({.caches = 4,
                 .kv_heads = 5,
                 .group = group,
                 .tokens = 1,
                 .key_dim = 128,
                 .value_dim = 128,
                 .least_capacity = 500,
                 .most_capacity = 520,
                 .logits = 1.0f,
                 .free_blocks = true},
                100 + static_cast<uint32_t>(group));
}

TYPED_TEST(AttendTest, ManyCachesOfAllSizes) {
  uint32_t seed = 100;
  this->Check(
      {.caches = 60, .kv_heads = 8, .group = 4, .tokens = 1, .key_dim = 128, .value_dim = 128, .most_capacity = 700},
      ++seed);
  this->Check(
      {.caches = 200, .kv_heads = 2, .group = 2, .tokens = 1, .key_dim = 64, .value_dim = 64, .most_capacity = 90},
      ++seed);
  this->Check(
      {.caches = 1, .kv_heads = 1, .group = 16, .tokens = 1, .key_dim = 128, .value_dim = 128, .most_capacity = 16000},
      ++seed);
  this->Check(
      {.caches = 1, .kv_heads = 8, .group = 4, .tokens = 9, .key_dim = 128, .value_dim = 128, .most_capacity = 1500},
      ++seed);
  std::printf("%d runs, largest error %.2f of what rounding allows\n", this->runs_, this->largest_);
}

}  // namespace
}  // namespace express::cuda
