// Admissions of many departures at once against those of src/cpu/protect.cc, one by one: the same losers, snapshots,
// scores, means and sums to the bit, wherever the stream is cut into calls.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <ostream>
#include <random>
#include <type_traits>
#include <vector>

#include "bench/cuda_fill.cuh"
#include "src/cuda/device.cuh"
#include "src/cuda/kernels.h"

namespace express::cuda {
namespace {

#define CHECK_CUDA(expression) ASSERT_EQ(expression, cudaSuccess) << #expression
#define EXPECT_CUDA(expression) EXPECT_EQ(expression, cudaSuccess) << #expression

// Device memory of exactly `count` elements, all bytes 0xFF (NaN) until they are set; bytes behind must stay 0xFF.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : count_(count) {
    EXPECT_CUDA(cudaMalloc(&data_, count * sizeof(T) + kGuard));
    Poison();
  }
  explicit Array(const std::vector<T>& host) : Array(host.size()) { Set(host); }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  void Poison() { EXPECT_CUDA(cudaMemset(data_, 0xFF, count_ * sizeof(T) + kGuard)); }
  void Set(const std::vector<T>& host) {
    EXPECT_CUDA(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> Get() const {
    std::vector<T> host(count_);
    EXPECT_CUDA(cudaMemcpy(host.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    unsigned char guard[kGuard];
    EXPECT_CUDA(cudaMemcpy(guard, reinterpret_cast<char*>(data_) + count_ * sizeof(T), kGuard, cudaMemcpyDeviceToHost));
    EXPECT_TRUE(std::all_of(guard, guard + kGuard, [](unsigned char byte) { return byte == 0xFF; })) << "overrun";
    return host;
  }
  T* data() const { return data_; }

 private:
  static constexpr size_t kGuard = 512;
  size_t count_;
  T* data_ = nullptr;
};

float HostFloat(float x) { return x; }
float HostFloat(Half x) { return __half2float(x); }
float HostFloat(BFloat16 x) { return __bfloat162float(x); }
template <class T>
T Rounded(float x) {
  if constexpr (std::is_same_v<T, Half>)
    return __float2half_rn(x);
  else if constexpr (std::is_same_v<T, BFloat16>)
    return __float2bfloat16_rn(x);
  else
    return x;
}

enum class Kind { kGaussian, kDrift, kIncreasing, kDecreasing, kEqual, kFewValues, kInfinite };

struct Case {
  DType dtype;
  int32_t dim, protect;
  int64_t before;   // departures before the first call, from the slab
  int64_t sources;  // departures of the calls that are slab entries
  int64_t rows;     // that depart after those
  int64_t calls;
  Kind kind = Kind::kGaussian;
  int64_t centre = 0;  // where before == 0: entries that the first departure is centred on; 0: the caller gives a mean
  int32_t heads = 3;
};
std::ostream& operator<<(std::ostream& os, const Case& c) {
  return os << "dtype " << static_cast<int>(c.dtype) << " dim " << c.dim << " protect " << c.protect << " before "
            << c.before << " sources " << c.sources << " rows " << c.rows << " calls " << c.calls << " kind "
            << static_cast<int>(c.kind) << " centre " << c.centre << " heads " << c.heads;
}

// One key per departure, in order.
template <class T>
std::vector<T> Keys(const Case& c, int64_t count, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<T> keys(static_cast<size_t>(count * c.dim));
  std::vector<float> few(static_cast<size_t>(5 * c.dim));
  for (float& x : few) x = normal(rng);
  for (int64_t i = 0; i < count; ++i) {
    const auto age = static_cast<float>(i) / static_cast<float>(std::max<int64_t>(count, 1));
    const auto which = static_cast<int64_t>(rng() % 5);
    for (int64_t d = 0; d < c.dim; ++d) {
      const float one = few[static_cast<size_t>(d)];
      float x = 0;
      switch (c.kind) {
        case Kind::kGaussian:
          x = normal(rng);
          break;
        case Kind::kDrift:
          x = normal(rng) + 3 * std::sin(20 * age + one);
          break;
        case Kind::kIncreasing:
          x = one * (0.1f + 100 * age * age) * (i % 2 == 0 ? 1.0f : -1.0f);
          break;
        case Kind::kDecreasing:
          x = one * (0.1f + 100 * (1 - age)) * (i % 2 == 0 ? 1.0f : -1.0f);
          break;
        case Kind::kEqual:
          x = one;
          break;
        case Kind::kFewValues:
          x = few[static_cast<size_t>(which * c.dim + d)];
          break;
        case Kind::kInfinite:
          x = normal(rng) * (i % 3 == 0 ? 1e19f : i % 3 == 1 ? 1e20f : 1.0f);
          break;
      }
      keys[static_cast<size_t>(i * c.dim + d)] = Rounded<T>(x);
    }
  }
  return keys;
}

// One head stream; entries are named as on the device. A port of src/cpu/protect.cc.
template <class T>
struct Stream {
  int64_t dim, capacity, first_position;
  std::vector<T> slab_key;  // (slots, dim)
  std::vector<int64_t> slab_position;
  std::vector<T> row_key;      // (rows, dim)
  std::vector<int32_t> order;  // entry of every departure
  std::vector<float> mean, sum, score;
  std::vector<int32_t> entry;  // protected
  int64_t weakest = 0;
  uint64_t ordinal = 0;
  float last_score = 0;

  const T* Key(int32_t e) const { return e < 0 ? &slab_key[static_cast<size_t>(-1 - e) * dim] : &row_key[e * dim]; }
  int64_t Position(int32_t e) const { return e < 0 ? slab_position[static_cast<size_t>(-1 - e)] : first_position + e; }
  void CentreOn(int64_t count) {
    for (int64_t d = 0; d < dim; ++d) {
      float all = 0;
      for (int64_t i = 0; i < count; ++i) all += HostFloat(Key(order[static_cast<size_t>(i)])[d]);
      mean[static_cast<size_t>(d)] = all / static_cast<float>(count);
    }
  }
  void FindWeakest() {
    weakest = 0;
    for (size_t i = 1; i < entry.size(); ++i) {
      const auto w = static_cast<size_t>(weakest);
      const bool younger = Position(entry[i]) > Position(entry[w]);
      if (score[i] < score[w] || (score[i] == score[w] && younger)) weakest = static_cast<int64_t>(i);
    }
  }
  // The next departure: the loser, or kSkip.
  int32_t Depart() {
    const int32_t e = order[ordinal];
    if (ordinal > 0 && ordinal % 256 == 0) {
      for (size_t d = 0; d < mean.size(); ++d) {
        mean[d] = sum[d] / 256.0f;
        sum[d] = 0;
      }
    }
    ++ordinal;
    float own = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const float x = HostFloat(Key(e)[d]), centred = x - mean[static_cast<size_t>(d)];
      sum[static_cast<size_t>(d)] += x;
      own += centred * centred;
    }
    last_score = own;
    if (static_cast<int64_t>(entry.size()) < capacity) {
      entry.push_back(e);
      score.push_back(own);
      if (static_cast<int64_t>(entry.size()) == capacity) FindWeakest();
      return kSkip;
    }
    const auto w = static_cast<size_t>(weakest);
    if (!(own > score[w])) return e;
    const int32_t loser = entry[w];
    entry[w] = e;
    score[w] = own;
    FindWeakest();
    return loser;
  }
};

// Entries before the rows lie in the slab, in no order; rows [0, skipped) never depart.
constexpr int64_t kSkipped = 3;

template <class T>
Stream<T> MakeStream(const Case& c, std::mt19937& rng) {
  const int64_t old = c.before + c.sources;
  Stream<T> s{.dim = c.dim, .capacity = c.protect, .first_position = int64_t{5'000'000'000}};
  const std::vector<T> keys = Keys<T>(c, old + c.rows, rng);
  std::vector<int32_t> slot(static_cast<size_t>(old));
  std::iota(slot.begin(), slot.end(), 0);
  std::shuffle(slot.begin(), slot.end(), rng);
  s.slab_key.resize(static_cast<size_t>(std::max<int64_t>(old, 1) * c.dim));
  s.slab_position.resize(static_cast<size_t>(std::max<int64_t>(old, 1)));
  for (int64_t i = 0; i < old; ++i) {
    const int32_t to = slot[static_cast<size_t>(i)];
    std::copy_n(&keys[static_cast<size_t>(i * c.dim)], c.dim, &s.slab_key[static_cast<size_t>(to) * c.dim]);
    s.slab_position[static_cast<size_t>(to)] = i < old / 2 ? i : s.first_position - old + i;  // far apart
    s.order.push_back(-1 - to);
  }
  s.row_key.assign(static_cast<size_t>(kSkipped * c.dim), Rounded<T>(NAN));
  s.row_key.insert(s.row_key.end(), keys.begin() + old * c.dim, keys.end());
  for (int64_t i = 0; i < c.rows; ++i) s.order.push_back(static_cast<int32_t>(kSkipped + i));
  s.mean.resize(static_cast<size_t>(c.dim));
  s.sum.resize(static_cast<size_t>(c.dim));
  std::normal_distribution<float> normal;
  for (float& x : s.mean) x = normal(rng);
  if (c.before == 0 && c.centre > 0)
    s.CentreOn(c.centre);
  else
    for (int64_t i = 0; i < c.before; ++i) s.Depart();
  return s;
}

// The same stream on the device.
template <class T>
struct DeviceStream {
  DeviceStream(const Case& c, const Stream<T>& s)
      : slab_key(s.slab_key),
        slab_position(s.slab_position),
        mean(s.mean),
        sum(s.sum),
        score(Size(c.protect)),
        count(std::vector<int32_t>{static_cast<int32_t>(s.entry.size()), static_cast<int32_t>(s.weakest)}),
        entry(Size(c.protect)),
        source(s.order) {
    score.Set(s.score);
    entry.Set(s.entry);
    if (c.before == 0 && c.centre > 0) mean.Poison();  // the first call finds it
  }
  static size_t Size(int64_t count) { return static_cast<size_t>(count); }
  Array<T> slab_key;
  Array<int64_t> slab_position;
  Array<float> mean, sum, score;
  Array<int32_t> count, entry, source;
};

template <class T>
bool SameBits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}
template <class T>
std::vector<T> Begin(const std::vector<T>& x, size_t count) {
  return std::vector<T>(x.begin(), x.begin() + static_cast<int64_t>(count));
}

class AdmitTest : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0)
      GTEST_SKIP() << "NO NVIDIA GPU ON THIS MACHINE: THIS TEST DID NOT RUN";
  }
};

template <class T>
class Runner {
 public:
  Runner(const Case& c, uint32_t seed)
      : c_(c), rng_(seed), rows_(static_cast<size_t>((kSkipped + c.rows) * RowStride())) {
    for (int32_t h = 0; h < c.heads; ++h) streams_.push_back(MakeStream<T>(c, rng_));
    for (const Stream<T>& s : streams_) devices_.push_back(std::make_unique<DeviceStream<T>>(c, s));
    std::vector<T> rows(static_cast<size_t>((kSkipped + c.rows) * RowStride()), Rounded<T>(NAN));
    for (int32_t h = 0; h < c.heads; ++h)
      for (int64_t r = 0; r < kSkipped + c.rows; ++r)
        std::copy_n(&streams_[static_cast<size_t>(h)].row_key[static_cast<size_t>(r * c.dim)], c.dim,
                    &rows[static_cast<size_t>(r * RowStride() + KvHead(h) * HeadStride())]);
    rows_.Set(rows);
  }

  void Run() {
    const int64_t all = c_.sources + c_.rows;
    std::vector<int64_t> cuts{0, all};
    for (int64_t i = 1; i < c_.calls; ++i) cuts.push_back(Below(all + 1));
    if (c_.calls > 3) cuts.push_back(std::clamp<int64_t>(512 - c_.before, 0, all));  // between two runs
    std::sort(cuts.begin(), cuts.end());
    for (size_t i = 0; i + 1 < cuts.size() && !testing::Test::HasFailure(); ++i) Call(cuts[i], cuts[i + 1] - cuts[i]);
    for (int32_t h = 0; h < c_.heads && !testing::Test::HasFailure(); ++h) CompareState(h);
  }

 private:
  int64_t Below(int64_t bound) { return static_cast<int64_t>(rng_() % static_cast<uint64_t>(bound)); }
  int64_t HeadStride() const { return c_.dim + 16; }
  int64_t RowStride() const { return HeadStride() * (c_.heads + 1); }
  int32_t KvHead(int32_t h) const { return c_.heads - h; }  // head 0 of k stays NaN

  struct Results {
    Results(int64_t count, size_t snapshots, const Case& c)
        : scores(Size(count)),
          run_means(Size((count / 256 + 4) * c.dim)),
          loser(Size(count)),
          snapshot(snapshots * Size(c.protect)) {}
    static size_t Size(int64_t count) { return static_cast<size_t>(count); }
    Array<float> scores, run_means;
    Array<int32_t> loser, snapshot;
  };

  std::vector<int32_t> SnapshotTimes(int64_t count) {
    std::vector<int32_t> at;
    for (int64_t n = Below(50); n > 0; --n) at.push_back(static_cast<int32_t>(Below(count + 1)));
    if (rng_() % 2 == 0) at.insert(at.end(), {0, static_cast<int32_t>(count)});
    std::sort(at.begin(), at.end());
    return at;
  }

  // Departures [from, from + count) of those that the calls see.
  void Call(int64_t from, int64_t count) {
    SCOPED_TRACE(testing::Message() << "departures " << from << " .. " << from + count);
    const std::vector<int32_t> times = SnapshotTimes(count);
    const Array<int32_t> snapshot_at(times);
    std::vector<std::unique_ptr<Results>> results;
    std::vector<AdmitHead> heads;
    for (int32_t h = 0; h < c_.heads; ++h) {
      results.push_back(std::make_unique<Results>(count, times.size(), c_));
      const DeviceStream<T>& d = *devices_[static_cast<size_t>(h)];
      const Results& r = *results.back();
      heads.push_back({.slab_key = d.slab_key.data(),
                       .slab_position = d.slab_position.data(),
                       .mean = d.mean.data(),
                       .sum = d.sum.data(),
                       .score = d.score.data(),
                       .protected_count = d.count.data(),
                       .protected_index = d.entry.data(),
                       .source = d.source.data() + c_.before + std::min(from, c_.sources),
                       .scores = r.scores.data(),
                       .run_means = r.run_means.data(),
                       .loser = r.loser.data(),
                       .snapshots = r.snapshot.data(),
                       .protect = c_.protect,
                       .kv_head = KvHead(h)});
    }
    const Array<AdmitHead> device_heads(heads);
    const AdmitArgs args{.heads = device_heads.data(),
                         .head_count = c_.heads,
                         .key_dim = c_.dim,
                         .protect = c_.protect,
                         .dtype = c_.dtype,
                         .k = {rows_.data(), RowStride(), HeadStride(), c_.dtype},
                         .first = c_.before + from,
                         .count = count,
                         .source_count = std::max<int64_t>(0, c_.sources - from),
                         .centre = c_.before + from == 0 && count > 0 ? c_.centre : 0,
                         .first_row = kSkipped + std::max<int64_t>(0, from - c_.sources),
                         .first_position = streams_[0].first_position,
                         .snapshot_at = snapshot_at.data(),
                         .snapshots = static_cast<int32_t>(times.size())};
    AdmitScore(args, nullptr);
    AdmitSelect(args, nullptr);
    CHECK_CUDA(cudaGetLastError());
    CHECK_CUDA(cudaDeviceSynchronize());
    for (int32_t h = 0; h < c_.heads && !testing::Test::HasFailure(); ++h)
      Compare(h, *results[static_cast<size_t>(h)], count, times);
  }

  void Compare(int32_t h, const Results& r, int64_t count, const std::vector<int32_t>& times) {
    Stream<T>& s = streams_[static_cast<size_t>(h)];
    const std::vector<float> scores = r.scores.Get();
    const std::vector<int32_t> loser = r.loser.Get(), snapshot = r.snapshot.Get();
    r.run_means.Get();  // for its guard
    size_t next = 0;
    for (int64_t i = 0; i <= count; ++i) {
      for (; next < times.size() && times[next] == i; ++next) {
        const int32_t* got = &snapshot[next * static_cast<size_t>(c_.protect)];
        ASSERT_EQ(std::memcmp(got, s.entry.data(), s.entry.size() * sizeof(int32_t)), 0)
            << "head " << h << " snapshot " << next << " after " << i;
      }
      if (i == count) break;
      const int32_t expected = s.Depart();
      const float got = scores[static_cast<size_t>(i)];
      ASSERT_EQ(std::memcmp(&got, &s.last_score, sizeof(float)), 0)
          << "head " << h << " departure " << i << ": score " << got << ", expected " << s.last_score;
      ASSERT_EQ(loser[static_cast<size_t>(i)], expected) << "head " << h << " departure " << i;
    }
    ASSERT_EQ(next, times.size());
  }

  void CompareState(int32_t h) {
    const Stream<T>& s = streams_[static_cast<size_t>(h)];
    const DeviceStream<T>& d = *devices_[static_cast<size_t>(h)];
    const size_t held = s.entry.size();
    EXPECT_TRUE(SameBits(d.mean.Get(), s.mean)) << "mean of head " << h;
    EXPECT_TRUE(SameBits(d.sum.Get(), s.sum)) << "sum of head " << h;
    EXPECT_TRUE(SameBits(Begin(d.score.Get(), held), s.score)) << "scores of head " << h;
    EXPECT_TRUE(SameBits(Begin(d.entry.Get(), held), s.entry)) << "entries of head " << h;
    const std::vector<int32_t> count = d.count.Get();
    EXPECT_EQ(count[0], static_cast<int32_t>(held));
    if (count[0] == c_.protect) EXPECT_EQ(count[1], static_cast<int32_t>(s.weakest));
  }

  const Case c_;
  std::mt19937 rng_;
  Array<T> rows_;
  std::vector<Stream<T>> streams_;
  std::vector<std::unique_ptr<DeviceStream<T>>> devices_;
};

void Check(const Case& c, uint32_t seed) {
  SCOPED_TRACE(testing::Message() << c << " seed " << seed);
  WithType(c.dtype, [&](auto type) { Runner<decltype(type)>(c, seed).Run(); });
}

TEST_F(AdmitTest, SameAsOneByOne) {
  uint32_t seed = 1;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16})
    for (const int32_t dim : {64, 80, 96, 128, 192, 256})
      for (const int32_t protect : {1, 7, 197, 788}) {
        Check({dtype, dim, protect, 300, 130, 3000, 6}, seed++);
        if (HasFailure()) return;
      }
}

TEST_F(AdmitTest, Adversarial) {
  uint32_t seed = 1000;
  for (const Kind kind :
       {Kind::kDrift, Kind::kIncreasing, Kind::kDecreasing, Kind::kEqual, Kind::kFewValues, Kind::kInfinite})
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16})
      for (const int32_t protect : {1, 7, 33, 197, 256, 257, 788, 3000}) {
        if (kind == Kind::kInfinite && dtype == DType::kF16) continue;  // it has no such numbers
        Check({dtype, 64, protect, 200, 500, 8000, 5, kind}, seed++);
        if (HasFailure()) return;
      }
}

TEST_F(AdmitTest, FromTheBeginning) {
  uint32_t seed = 2000;
  for (const int64_t centre : {0, 1, 5, 255, 1000})
    for (const int32_t protect : {1, 40, 500})
      for (const int64_t calls : {1, 2, 20}) {
        Check({DType::kBF16, 128, protect, 0, 0, 4000, calls, Kind::kDrift, centre}, seed++);
        Check({DType::kF32, 80, protect, 0, 700, 1500, calls, Kind::kGaussian, centre}, seed++);
        if (HasFailure()) return;
      }
}

TEST_F(AdmitTest, ShortCalls) {
  for (uint32_t seed = 3000; seed < 3060 && !HasFailure(); ++seed) {
    std::mt19937 rng(seed);
    const auto below = [&](uint32_t n) { return static_cast<int64_t>(rng() % n); };
    const Case c{DType::kBF16,
                 128,
                 static_cast<int32_t>(1 + below(60)),
                 below(1100),
                 below(40),
                 1 + below(700),
                 1 + below(60),
                 static_cast<Kind>(below(6)),
                 below(40),
                 static_cast<int32_t>(1 + below(5))};
    Check({c.dtype, c.dim, c.protect, c.before, c.sources, c.rows, c.calls, c.kind,
           std::min(c.centre, c.sources + c.rows), c.heads},
          seed);
  }
}

TEST_F(AdmitTest, Long) {
  Check({DType::kBF16, 128, 197, 77, 100, 40000, 3, Kind::kDrift}, 4000);
  Check({DType::kF16, 80, 3000, 0, 100, 40000, 4, Kind::kFewValues, 64}, 4001);
  Check({DType::kF32, 64, 3000, 0, 0, 40000, 2, Kind::kIncreasing, 64, 1}, 4002);
  Check({DType::kF32, 256, 788, 9000, 0, 40000, 1, Kind::kGaussian, 0, 2}, 4003);
  Check({DType::kBF16, 64, 8192, 0, 500, 40000, 3, Kind::kGaussian, 500, 2}, 4004);
  Check({DType::kBF16, 64, 10241, 0, 500, 30000, 3, Kind::kFewValues, 500, 2}, 4005);  // beyond shared memory
  Check({DType::kBF16, 64, 12000, 9000, 500, 30000, 3, Kind::kGaussian, 0, 2}, 4006);
  Check({DType::kBF16, 64, 197, 0, 0, 300000, 2, Kind::kDrift, 64, 2}, 4007);
}

// ---- speed; nothing is asserted ----

void Time(int32_t heads, int32_t protect, int64_t count) {
  constexpr int32_t kDim = 128;
  Array<BFloat16> keys(static_cast<size_t>(heads * count * kDim));
  FillKernel<<<4096, 256>>>(keys.data(), heads * count * kDim);
  const auto per_head = [&](int64_t n) { return static_cast<size_t>(heads * n); };
  const int64_t means = (count / 256 + 4) * kDim, snapshots = count / 1024;
  std::vector<int32_t> times(static_cast<size_t>(snapshots));
  for (size_t i = 0; i < times.size(); ++i) times[i] = static_cast<int32_t>(i * 1024);
  Array<int32_t> at(times), entry(per_head(protect)), loser(per_head(count)), counts(per_head(2)),
      snapshot(per_head(protect * snapshots));
  Array<float> mean(per_head(kDim)), sum(per_head(kDim)), score(per_head(protect)), scores(per_head(count)),
      run_means(per_head(means));
  std::vector<AdmitHead> host;
  for (int64_t h = 0; h < heads; ++h)
    host.push_back({.slab_key = nullptr,
                    .slab_position = nullptr,
                    .mean = mean.data() + h * kDim,
                    .sum = sum.data() + h * kDim,
                    .score = score.data() + h * protect,
                    .protected_count = counts.data() + 2 * h,
                    .protected_index = entry.data() + h * protect,
                    .source = nullptr,
                    .scores = scores.data() + h * count,
                    .run_means = run_means.data() + h * means,
                    .loser = loser.data() + h * count,
                    .snapshots = snapshot.data() + h * protect * snapshots,
                    .protect = protect,
                    .kv_head = static_cast<int32_t>(h)});
  const Array<AdmitHead> device(host);
  const AdmitArgs args{.heads = device.data(),
                       .head_count = heads,
                       .key_dim = kDim,
                       .protect = protect,
                       .dtype = DType::kBF16,
                       .k = {keys.data(), heads * kDim, kDim, DType::kBF16},
                       .first = 0,
                       .count = count,
                       .source_count = 0,
                       .centre = 256,
                       .first_row = 0,
                       .first_position = 0,
                       .snapshot_at = at.data(),
                       .snapshots = static_cast<int32_t>(snapshots)};
  cudaEvent_t begin, end;
  CHECK_CUDA(cudaEventCreate(&begin));
  CHECK_CUDA(cudaEventCreate(&end));
  std::vector<float> ms;
  for (int run = 0; run < 7; ++run) {
    CHECK_CUDA(cudaMemset(counts.data(), 0, per_head(2) * sizeof(int32_t)));
    CHECK_CUDA(cudaMemset(sum.data(), 0, per_head(kDim) * sizeof(float)));
    CHECK_CUDA(cudaEventRecord(begin));
    AdmitScore(args, nullptr);
    AdmitSelect(args, nullptr);
    CHECK_CUDA(cudaEventRecord(end));
    CHECK_CUDA(cudaEventSynchronize(end));
    float elapsed = 0;
    CHECK_CUDA(cudaEventElapsedTime(&elapsed, begin, end));
    ms.push_back(elapsed);
  }
  CHECK_CUDA(cudaGetLastError());
  CHECK_CUDA(cudaEventDestroy(begin));
  CHECK_CUDA(cudaEventDestroy(end));
  std::sort(ms.begin(), ms.end());
  const double gigabytes = 1e-9 * static_cast<double>(heads * count * kDim) * sizeof(BFloat16);
  std::printf("%d heads, dim %d, bf16, protect %d, %lld departures: median %.3f ms, best %.3f (%.0f GB/s of keys)\n",
              heads, kDim, protect, static_cast<long long>(count), ms[ms.size() / 2], ms[0], gigabytes / ms[0] * 1000);
}

TEST_F(AdmitTest, Speed) {
  Time(8, 197, 32768);
  Time(32, 197, 32768);
  Time(32, 788, 32768);
  Time(32, 3000, 32768);
  Time(32, 197, 524288);
  Time(32, 788, 524288);
}

}  // namespace
}  // namespace express::cuda
