// The prefill kernels against attention in double precision, straight from what kernels.h says a query sees.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <limits>
#include <ostream>
#include <sstream>
#include <thread>

#include "src/cuda/kernels.h"
#include "tests/cuda/testing.h"

namespace express::cuda {
namespace {

enum class Kind { kPlain, kSharp, kEqualKeys, kLoudLast, kRising };

struct Case {
  DType dtype;
  int32_t key_dim, value_dim, kv_heads, group;
  int64_t tokens, first_position;
  int32_t block, capacity, sinks, tail;
  Kind kind;
};
std::ostream& operator<<(std::ostream& os, const Case& c) {
  return os << "dtype " << static_cast<int>(c.dtype) << " dims " << c.key_dim << ", " << c.value_dim << " heads "
            << c.kv_heads << " x " << c.group << " tokens " << c.tokens << " from " << c.first_position << " block "
            << c.block << " capacity " << c.capacity << " sinks " << c.sinks << " tail " << c.tail << " kind "
            << static_cast<int>(c.kind);
}

// Rounding to the storage type: of a probability, and of an output.
double Unit(DType dtype) {
  return dtype == DType::kF32 ? std::ldexp(1, -20) : std::ldexp(1, dtype == DType::kF16 ? -11 : -8);
}

template <class T>
T* Upload(const std::vector<T>& x, std::vector<void*>& taken) {
  void* data = nullptr;
  EXPECT_EQ(cudaMalloc(&data, std::max<size_t>(1, x.size()) * sizeof(T)), cudaSuccess);
  EXPECT_EQ(cudaMemcpy(data, x.data(), x.size() * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  taken.push_back(data);
  return static_cast<T*>(data);
}

// A prompt and its far lists. What nobody may read is NaN, or an index far outside; one row before and one behind the
// outputs, and one head behind every row's, must stay as they are.
struct Prompt {
  Prompt(const Case& which, uint32_t seed)
      : c(which),
        rng(seed),
        slab_rows(c.capacity + 8),
        q({c.tokens, c.kv_heads * c.group, c.key_dim}, c.dtype),
        k({c.tokens, c.kv_heads, c.key_dim}, c.dtype),
        v({c.tokens, c.kv_heads, c.value_dim}, c.dtype),
        slab_key({c.kv_heads, slab_rows, c.key_dim}, c.dtype),
        slab_value({c.kv_heads, slab_rows, c.value_dim}, c.dtype),
        out({c.tokens + 2, OutHeads(), c.value_dim}, c.dtype),
        lse({c.tokens + 2, OutHeads()}, DType::kF32) {
    const float loud = c.kind == Kind::kSharp ? 300.0f : 1.0f;
    q.Fill(rng, loud);
    k.Fill(rng, c.kind == Kind::kSharp ? 30.0f : 1.0f);
    v.Fill(rng);
    slab_key.Fill(rng, loud > 1 ? 30.0f : 1.0f);
    slab_value.Fill(rng);
    Shape();
    const int64_t base = c.first_position / c.block;
    blocks = (c.first_position + c.tokens - 1) / c.block - base + 1;
    std::vector<char> used(static_cast<size_t>(c.kv_heads * slab_rows));
    for (int32_t g = 0; g < c.kv_heads; ++g) lists.push_back(FarLists(g, used));
    Poison(slab_key, c.key_dim, used);
    Poison(slab_value, c.value_dim, used);
    for (int32_t g = 0; g < c.kv_heads; ++g) {
      const Lists& l = lists[static_cast<size_t>(g)];
      heads.push_back({.slab_key = At(slab_key, g * slab_rows * c.key_dim),
                       .slab_value = At(slab_value, g * slab_rows * c.value_dim),
                       .far_index = Upload(l.index, taken),
                       .far_bias = Upload(l.bias, taken),
                       .far_count = Upload(l.count, taken),
                       .far_capacity = c.capacity,
                       .sinks = c.sinks,
                       .tail = c.tail});
    }
    const auto rows = [&](Mirror& m, int64_t heads_of, int64_t dim, int64_t first) {
      return Rows{At(m, first * heads_of * dim), heads_of * dim, dim, c.dtype};
    };
    const int64_t query_heads = int64_t{c.kv_heads} * c.group;
    args = {.heads = Upload(heads, taken),
            .kv_heads = c.kv_heads,
            .group = c.group,
            .key_dim = c.key_dim,
            .value_dim = c.value_dim,
            .dtype = c.dtype,
            .q = rows(q, query_heads, c.key_dim, 0),
            .k = rows(k, c.kv_heads, c.key_dim, 0),
            .v = rows(v, c.kv_heads, c.value_dim, 0),
            .out = rows(out, OutHeads(), c.value_dim, 1),
            .lse = static_cast<float*>(lse.device()) + OutHeads(),
            .lse_row_stride = OutHeads(),
            .lse_head_stride = 1,
            .tokens = c.tokens,
            .first_position = c.first_position,
            .block = c.block,
            .block_offset = static_cast<int32_t>(c.first_position % c.block),
            .first_block = 0,
            .blocks = blocks,
            .scale = 1.0f / std::sqrt(static_cast<float>(c.key_dim))};
  }
  ~Prompt() {
    for (void* data : taken) cudaFree(data);
  }
  Prompt(const Prompt&) = delete;
  Prompt& operator=(const Prompt&) = delete;

  int64_t OutHeads() const { return int64_t{c.kv_heads} * c.group + 1; }

  // The launch of blocks [first_block, first_block + count) alone.
  PrefillArgs Part(int64_t first_block, int64_t count) {
    std::vector<PrefillHead> of_part = heads;
    for (PrefillHead& head : of_part) {
      head.far_index += first_block * c.capacity;
      head.far_bias += first_block * c.capacity;
      head.far_count += first_block;
    }
    PrefillArgs part = args;
    part.heads = Upload(of_part, taken);
    part.first_block = first_block;
    part.blocks = count;
    return part;
  }

  void* At(Mirror& m, int64_t element) const { return static_cast<char*>(m.device()) + element * SizeOf(c.dtype); }

  // Keys of the kinds that are not random.
  void Shape() {
    if (c.kind == Kind::kPlain || c.kind == Kind::kSharp) return;
    std::vector<float> x = k.Floats();
    const int64_t row = int64_t{c.kv_heads} * c.key_dim;
    for (int64_t t = 0; t < c.tokens; ++t)
      for (int64_t i = 0; i < row; ++i) {
        float& key = x[static_cast<size_t>(t * row + i)];
        if (c.kind == Kind::kEqualKeys) key = x[static_cast<size_t>(i)];
        if (c.kind == Kind::kLoudLast && t % 61 == 60) key *= 40;
        if (c.kind == Kind::kRising) key *= 1 + 0.1f * static_cast<float>(t);
      }
    cpu::Convert(x.data(), DType::kF32, k.host(), c.dtype, k.count());
    k.Upload();
  }

  struct Lists {
    std::vector<int32_t> index, count;
    std::vector<float> bias;
  };
  Lists FarLists(int32_t g, std::vector<char>& used) {
    const auto size = static_cast<size_t>(blocks * c.capacity);
    Lists l{std::vector<int32_t>(size, std::numeric_limits<int32_t>::max() / 2),
            {},
            std::vector<float>(size, std::numeric_limits<float>::quiet_NaN())};
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t start = Start(b);
      const auto count = static_cast<int32_t>(rng() % 4 == 0   ? 0
                                              : rng() % 4 == 0 ? static_cast<uint32_t>(c.capacity)
                                                               : rng() % (static_cast<uint32_t>(c.capacity) + 1));
      l.count.push_back(count);
      for (int32_t i = 0; i < count; ++i) {
        const auto at = static_cast<size_t>(b * c.capacity + i);
        const bool of_prompt = start > 0 && rng() % 2 == 0;
        const auto slot = static_cast<int32_t>(rng() % static_cast<uint32_t>(c.capacity));
        l.index[at] = of_prompt ? static_cast<int32_t>(rng() % static_cast<uint32_t>(start)) : -1 - slot;
        l.bias[at] = static_cast<float>(rng() % 1000) / 150.0f;
        if (!of_prompt) used[static_cast<size_t>(g * slab_rows + slot)] = 1;
      }
    }
    return l;
  }
  void Poison(Mirror& slab, int32_t dim, const std::vector<char>& used) const {
    std::vector<float> x = slab.Floats();
    for (size_t i = 0; i < x.size(); ++i)
      if (used[i / static_cast<size_t>(dim)] == 0) x[i] = std::numeric_limits<float>::quiet_NaN();
    cpu::Convert(x.data(), DType::kF32, slab.host(), c.dtype, slab.count());
    slab.Upload();
  }

  int64_t Start(int64_t b) const { return std::max<int64_t>(0, b * c.block - c.first_position % c.block); }

  const Case c;
  std::mt19937 rng;
  int64_t slab_rows, blocks = 0;
  Mirror q, k, v, slab_key, slab_value, out, lse;
  std::vector<Lists> lists;
  std::vector<PrefillHead> heads;
  std::vector<void*> taken;
  PrefillArgs args{};
};

struct Expected {
  std::vector<double> out,
      spread;  // spread: the same sum of |values|, which rounded probabilities err in proportion to
  std::vector<double> lse;
  std::vector<double> largest;  // |logit| that a query sees
};

Expected Reference(Prompt& p) {
  const Case& c = p.c;
  const int64_t query_heads = int64_t{c.kv_heads} * c.group;
  const std::vector<float> q = p.q.Floats(), k = p.k.Floats(), v = p.v.Floats(), slab_key = p.slab_key.Floats(),
                           slab_value = p.slab_value.Floats();
  const auto rows = static_cast<size_t>(c.tokens * query_heads);
  Expected e;
  e.out.resize(rows * static_cast<size_t>(c.value_dim));
  e.spread.resize(e.out.size());
  e.lse.resize(rows);
  e.largest.resize(rows);
  const auto one = [&](int64_t t, int64_t h) {
    const int64_t g = h / c.group, b = (c.first_position + t) / c.block - c.first_position / c.block;
    const int64_t start = p.Start(b), position = c.first_position + start;
    const int64_t begin =
        std::clamp<int64_t>(std::max<int64_t>(c.sinks, position - c.tail) - c.first_position, 0, start);
    const Prompt::Lists& l = p.lists[static_cast<size_t>(g)];
    struct Seen {
      const float *key, *value;
      double logit;
    };
    std::vector<Seen> seen;
    const auto see = [&](int64_t index, double bias) {
      const float* key = index < 0 ? &slab_key[static_cast<size_t>((g * p.slab_rows - 1 - index) * c.key_dim)]
                                   : &k[static_cast<size_t>((index * c.kv_heads + g) * c.key_dim)];
      const float* value = index < 0 ? &slab_value[static_cast<size_t>((g * p.slab_rows - 1 - index) * c.value_dim)]
                                     : &v[static_cast<size_t>((index * c.kv_heads + g) * c.value_dim)];
      double dot = 0;
      for (int32_t i = 0; i < c.key_dim; ++i)
        dot += static_cast<double>(q[static_cast<size_t>((t * query_heads + h) * c.key_dim + i)]) *
               static_cast<double>(key[i]);
      seen.push_back({key, value, dot * static_cast<double>(p.args.scale) + bias});
    };
    for (int64_t i = 0; i < l.count[static_cast<size_t>(b)]; ++i) {
      const auto at = static_cast<size_t>(b * c.capacity + i);
      see(l.index[at], static_cast<double>(l.bias[at]));
    }
    for (int64_t i = begin; i <= t; ++i) see(i, 0);
    double top = -std::numeric_limits<double>::infinity(), sum = 0;
    const auto row = static_cast<size_t>(t * query_heads + h);
    for (const Seen& s : seen)
      top = std::max(top, s.logit), e.largest[row] = std::max(e.largest[row], std::abs(s.logit));
    for (const Seen& s : seen) sum += std::exp(s.logit - top);
    e.lse[row] = top + std::log(sum);
    for (const Seen& s : seen)
      for (int32_t i = 0; i < c.value_dim; ++i) {
        const double share = std::exp(s.logit - top) / sum * static_cast<double>(s.value[i]);
        const size_t at = row * static_cast<size_t>(c.value_dim) + static_cast<size_t>(i);
        e.out[at] += share;
        e.spread[at] += std::abs(share);
      }
  };
  std::atomic<int64_t> next = 0;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i)
    threads.emplace_back([&] {
      for (int64_t r = next++; r < static_cast<int64_t>(rows); r = next++) one(r / query_heads, r % query_heads);
    });
  for (std::thread& thread : threads) thread.join();
  return e;
}

std::vector<Case> Cases() {
  std::mt19937 rng(11);
  const auto any = [&](int64_t low, int64_t high) {
    return low + static_cast<int64_t>(rng() % static_cast<uint64_t>(high - low + 1));
  };
  std::vector<Case> cases;
  const auto add = [&](DType dtype, int32_t key_dim, int32_t value_dim, Kind kind) {
    const bool from_zero = rng() % 3 == 0;
    cases.push_back({dtype, key_dim, value_dim, static_cast<int32_t>(any(1, 3)), rng() % 2 == 0 ? 1 : 4, any(1, 600),
                     from_zero ? 0 : any(0, 1500), 64 << any(0, 3), static_cast<int32_t>(any(1, 400)),
                     static_cast<int32_t>(any(0, 8)), static_cast<int32_t>(any(1, 200)), kind});
  };
  constexpr Kind kKinds[] = {Kind::kPlain, Kind::kSharp, Kind::kEqualKeys, Kind::kLoudLast, Kind::kRising};
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    for (const int32_t dim : {64, 128})
      for (const Kind kind : kKinds)
        for (int i = 0; i < 3; ++i) add(dtype, dim, dim, kind);
    for (const auto& [key_dim, value_dim] : {std::pair{80, 80}, {96, 96}, {192, 192}, {192, 128}, {256, 256}})
      for (const Kind kind : {Kind::kPlain, Kind::kRising}) add(dtype, key_dim, value_dim, kind);
  }
  for (const int32_t dim : {64, 256})
    for (const Kind kind : kKinds) add(DType::kF32, dim, dim, kind);
  return cases;
}

// Numbers of multiprocessors that kernels are told of: few make blocks of threads take many jobs one after the other.
struct Way {
  int32_t capability, multiprocessors;
  bool in_parts;  // in launches of some blocks each
};

// Largest errors over what they may be.
struct Errors {
  double out = 0, lse = 0;
};
Errors Compare(Prompt& p, const Expected& e) {
  const Case& c = p.c;
  const std::vector<float> out = p.out.Floats(), lse = p.lse.Floats();
  const auto heads = static_cast<size_t>(c.kv_heads * c.group), dim = static_cast<size_t>(c.value_dim);
  Errors errors;
  size_t written = 0;
  for (int64_t t = -1; t <= c.tokens; ++t)
    for (size_t h = 0; h <= heads; ++h) {
      const size_t at = static_cast<size_t>(t + 1) * (heads + 1) + h;
      const bool inside = t >= 0 && t < c.tokens && h < heads;
      if (!inside) {
        written += !std::isnan(lse[at]);
        for (size_t i = 0; i < dim; ++i) written += !std::isnan(out[at * dim + i]);
        continue;
      }
      const size_t row = static_cast<size_t>(t) * heads + h;
      const double logits = std::ldexp(e.largest[row], -19);  // sums of products in f32
      const auto raise = [](double& error, double off) { error = std::isnan(off) ? 1e30 : std::max(error, off); };
      raise(errors.lse, std::abs(static_cast<double>(lse[at]) - e.lse[row]) / (1e-3 + logits));
      for (size_t i = 0; i < dim; ++i) {
        const double expected = e.out[row * dim + i], spread = e.spread[row * dim + i];
        const double allowed = 2 * Unit(c.dtype) * (std::abs(expected) + spread) + logits * spread + 1e-6;
        raise(errors.out, std::abs(static_cast<double>(out[at * dim + i]) - expected) / allowed);
      }
    }
  EXPECT_EQ(written, 0u) << "numbers around the outputs have been written";
  return errors;
}

// What a launch writes, against what it should.
template <class Launch>
Errors CompareAfter(Prompt& p, const Expected& e, cudaStream_t stream, const Launch& launch) {
  p.out.Poison();
  p.lse.Poison();
  launch();
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  const Errors errors = Compare(p, e);
  EXPECT_LT(errors.out, 1);
  EXPECT_LT(errors.lse, 1);
  return errors;
}

// As the device does it, and as it would do it if it were older, or smaller.
TEST_F(CudaTest, PrefillKernelsAgreeWithAttentionInDouble) {
  cudaDeviceProp device;
  ASSERT_CUDA(cudaGetDeviceProperties(&device, 0));
  const int32_t own = device.major * 10 + device.minor, all = device.multiProcessorCount;
  double worst = 0;
  uint32_t seed = 1;
  for (const Case& c : Cases()) {
    SCOPED_TRACE(testing::Message() << c);
    Prompt p(c, seed++);
    const Expected e = Reference(p);
    for (const Way& way : {Way{80, all, false}, {80, all, true}, {own, all, false}, {own, 1, false}, {own, 2, true}}) {
      SCOPED_TRACE(testing::Message() << "compute capability " << way.capability << ", " << way.multiprocessors
                                      << " multiprocessors, in parts: " << way.in_parts);
      const Errors errors = CompareAfter(p, e, stream_, [&] {
        for (int64_t first = 0, count; first < p.blocks; first += count) {
          count = way.in_parts ? std::min<int64_t>(1 + static_cast<int64_t>(p.rng() % 4), p.blocks - first) : p.blocks;
          Prefill(p.Part(first, count), way.capability, way.multiprocessors, stream_);
        }
      });
      worst = std::max(worst, errors.out);
    }
  }
  std::printf("  largest error: %.2f of what rounding allows\n", worst);
}

// Nothing is far, and blocks do not matter: every query sees all rows up to its own.
PrefillArgs OnlyRows(Prompt& p, int32_t spare) {
  for (Prompt::Lists& l : p.lists) std::fill(l.count.begin(), l.count.end(), 0);
  PrefillArgs args = p.args;
  args.heads = nullptr;
  args.block = static_cast<int32_t>(p.c.tokens);
  args.blocks = 1;
  args.spare = spare;
  return args;
}
TEST_F(CudaTest, PromptsOfWhichNothingIsFar) {
  cudaDeviceProp device;
  ASSERT_CUDA(cudaGetDeviceProperties(&device, 0));
  const int32_t own = device.major * 10 + device.minor, all = device.multiProcessorCount;
  uint32_t seed = 900;
  for (Case c : Cases()) {
    c.first_position = 0;
    c.sinks = 0;
    c.tail = static_cast<int32_t>(c.tokens);
    SCOPED_TRACE(testing::Message() << c);
    Prompt p(c, seed++);
    OnlyRows(p, 0);
    const Expected e = Reference(p);
    struct Launch {
      int32_t capability, multiprocessors, spare;
    };
    for (const Launch& launch : {Launch{80, all, 0},
                                 {own, all, 0},
                                 {own, 1, 0},
                                 {own, 7, 2},
                                 {own, 2, 5},
                                 {own, all, PrefillArgs::kJobByJob}}) {
      SCOPED_TRACE(testing::Message() << "compute capability " << launch.capability << ", " << launch.multiprocessors
                                      << " multiprocessors, to spare " << launch.spare);
      CompareAfter(p, e, stream_,
                   [&] { Prefill(OnlyRows(p, launch.spare), launch.capability, launch.multiprocessors, stream_); });
    }
  }
}

// Few and small, for tools that look at every access.
TEST_F(CudaTest, PrefillOfAFewTokens) {
  cudaDeviceProp device;
  ASSERT_CUDA(cudaGetDeviceProperties(&device, 0));
  uint32_t seed = 500;
  for (const int32_t dim : {64, 128}) {
    Prompt p({DType::kBF16, dim, dim, 1, 2, 300, 70, 64, 150, 4, 100, Kind::kPlain}, seed++);
    const Expected e = Reference(p);
    for (const int32_t capability : {80, device.major * 10 + device.minor}) {
      SCOPED_TRACE(testing::Message() << "compute capability " << capability);
      CompareAfter(p, e, stream_, [&] {
        Prefill(p.Part(0, 2), capability, 1, stream_);
        Prefill(p.Part(2, p.blocks - 2), capability, 1, stream_);
      });
    }
    Prompt rows({DType::kBF16, dim, dim, 2, 2, 300, 0, 64, 1, 0, 300, Kind::kPlain}, seed++);
    const PrefillArgs args = OnlyRows(rows, 0);
    const Expected of_rows = Reference(rows);
    CompareAfter(rows, of_rows, stream_, [&] { Prefill(args, device.major * 10 + device.minor, 5, stream_); });
  }
}

}  // namespace
}  // namespace express::cuda
