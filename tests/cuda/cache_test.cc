// CUDA caches against CPU caches: the same tokens, the same draws, the same entries.
#include <algorithm>
#include <string>

#include "tests/cuda/testing.h"

namespace express {
namespace {

Config SmallConfig(DType dtype) {
  Config c;
  c.layers = 2;
  c.query_heads = 8;
  c.kv_heads = 2;
  c.key_dim = c.value_dim = 64;
  c.dtype = dtype;
  c.budget = 160;
  c.prefill_block = 64;
  c.seed = 11;
  c.head_budgets = HeadBudgets::kFixed;
  c.threads = 2;
  return c;
}

struct Pair {
  Config config, gpu_config;
  ExpressCache cpu, gpu;
  Pair(const Config& c, cudaStream_t stream) : config(c), gpu_config(c) {
    gpu_config.device_type = DeviceType::kCuda;
    gpu_config.stream = stream;
    EXPECT_OK(ExpressCache::Create(config, &cpu));
    EXPECT_OK(ExpressCache::Create(gpu_config, &gpu));
  }
};

// Heads whose entries agree, of all; weights and counts must agree in every head.
void Compare(Pair& pair, int64_t tokens, int* same, int* all) {
  for (int32_t layer = 0; layer < pair.config.layers; ++layer)
    for (int32_t head = 0; head < pair.config.kv_heads; ++head) {
      const Held a = Export(pair.cpu, pair.config, layer, head, DeviceType::kCpu);
      const Held b = Export(pair.gpu, pair.config, layer, head, DeviceType::kCuda);
      ASSERT_EQ(a.log_weight, b.log_weight) << "layer " << layer << " head " << head;
      EXPECT_EQ(WeightSum(b), static_cast<double>(tokens));
      ++*all;
      *same += a == b;
    }
}

Config Variant(int i, DType dtype) {
  Config c = SmallConfig(dtype);
  switch (i) {
    case 1:
      c.protected_entries = 0;
      c.window = 32;
      break;
    case 2:
      c.schedule = Schedule::kRounds;
      c.protected_entries = 8;
      c.window = 24;
      c.gamma = 0;
      c.tau = 1;
      break;
    case 3:
      c.halving = Halving::kCoin;
      c.window = 16;
      c.protected_entries = 20;
      break;
    case 4:
      c.sinks = 0;
      c.window = 0;
      c.protected_entries = 0;
      c.budget = 400;  // long lists
      break;
    case 5:
      c.budget = 1200;
      c.window = 32;
      c.protected_entries = 300;
      break;
    default:
      break;
  }
  return c;
}

class CacheTest : public CudaTest {};

TEST_F(CacheTest, AppendsAsTheCpuDoes) {
  std::mt19937 rng(1);
  int same = 0, all = 0;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kI8})
    for (int variant = 0; variant < 6; ++variant) {
      const Config c = Variant(variant, dtype);
      Pair pair(c, stream_);
      constexpr int64_t kTokens = 2500;
      Mirror k({kTokens, c.kv_heads, c.key_dim}, dtype), v({kTokens, c.kv_heads, c.value_dim}, dtype);
      k.Fill(rng);
      v.Fill(rng);
      for (int64_t at = 0; at < kTokens;) {
        // Single tokens step by step through the layers, and longer pieces.
        const int64_t n = std::min<int64_t>(kTokens - at, rng() % 4 == 0 ? 1 + rng() % 200 : 1);
        for (int32_t layer = 0; layer < c.layers; ++layer) {
          ASSERT_OK(pair.cpu.Append(layer, k.Cpu(at, n), v.Cpu(at, n)));
          ASSERT_OK(pair.gpu.Append(layer, k.Gpu(at, n), v.Gpu(at, n)));
        }
        at += n;
      }
      Compare(pair, kTokens, &same, &all);
    }
  std::printf("%d of %d heads hold the same entries as on the CPU\n", same, all);
  EXPECT_GE(same, all * 9 / 10);
}

TEST_F(CacheTest, AttendsAsTheCpuDoes) {
  std::mt19937 rng(2);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kI8})
    for (const int32_t dim : {64, 80, 96, 128, 192, 256})
      for (const int32_t group : {1, 4, 6, 16}) {
        Config c = SmallConfig(dtype);
        c.layers = 1;
        c.key_dim = dim;
        c.value_dim = dim == 192 && group == 4 ? 128 : dim;
        c.query_heads = c.kv_heads * group;
        c.halving = Halving::kCoin;  // the same entries on both, whatever rounding
        c.budget = 100 + static_cast<int64_t>(rng() % 500);
        Pair pair(c, stream_);
        const int64_t tokens = static_cast<int64_t>(rng() % 900);
        Mirror k({tokens + 1, c.kv_heads, c.key_dim}, dtype), v({tokens + 1, c.kv_heads, c.value_dim}, dtype);
        k.Fill(rng);
        v.Fill(rng);
        ASSERT_OK(pair.cpu.Append(0, k.Cpu(0, tokens), v.Cpu(0, tokens)));
        ASSERT_OK(pair.gpu.Append(0, k.Gpu(0, tokens), v.Gpu(0, tokens)));
        const int64_t n = 1 + static_cast<int64_t>(rng() % 5);
        Mirror q({n, c.query_heads, dim}, dtype), lse({n, c.query_heads}, DType::kF32);
        Mirror out({n, c.query_heads, c.value_dim}, DType::kF32);
        q.Fill(rng);
        ASSERT_OK(pair.cpu.Attend(0, q.Cpu(), out.Cpu(), lse.Cpu().get()));
        out.Upload();
        lse.Upload();
        const std::vector<float> expected = out.Floats(), expected_lse = lse.Floats();
        out.Poison();
        lse.Poison();
        ASSERT_OK(pair.gpu.Attend(0, q.Gpu(), out.Gpu(), lse.Gpu().get()));
        ASSERT_CUDA(cudaStreamSynchronize(stream_));
        const std::vector<float> got = out.Floats(), got_lse = lse.Floats();
        if (tokens == 0) {
          EXPECT_EQ(got, expected);
          continue;
        }
        const double tolerance = dtype == DType::kF32 ? 1e-5 : dtype == DType::kF16 ? 1e-3 : 8e-3;
        const double error = RelativeError(got, expected);
        EXPECT_LT(error, tolerance) << "dim " << dim << " group " << group << " tokens " << tokens;  // NaN fails
        EXPECT_FALSE(std::isnan(error));
        EXPECT_LT(RelativeError(got_lse, expected_lse), 1e-3);
        out.Poison();
        ASSERT_OK(pair.gpu.Attend(0, q.Gpu(), out.Gpu()));
        ASSERT_CUDA(cudaStreamSynchronize(stream_));
        EXPECT_EQ(out.Floats(), got);  // to the bit
      }
}

TEST_F(CacheTest, PrefillsAsTheCpuDoes) {
  std::mt19937 rng(3);
  int same = 0, all = 0;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kI8})
    for (int variant = 0; variant < 7; ++variant) {
      Config c = Variant(variant, dtype);
      if (variant == 5) c.key_dim = c.value_dim = 128, c.prefill_block = 256;
      // Of prompts and of first chunks, some are short for all heads, some for no head, here some for one head only.
      const std::vector<HeadSetting> settings(static_cast<size_t>(c.layers * c.kv_heads / 2), {.budget = 300});
      std::vector<HeadSetting> uneven;
      for (const HeadSetting& setting : settings) uneven.insert(uneven.end(), {setting, {.budget = 900}});
      if (variant == 6) c.head_settings = uneven;
      Pair pair(c, stream_);
      const int64_t tokens = 3000;
      Mirror k({tokens, c.kv_heads, c.key_dim}, dtype), v({tokens, c.kv_heads, c.value_dim}, dtype);
      Mirror q({tokens, c.query_heads, c.key_dim}, dtype), out({tokens, c.query_heads, c.value_dim}, dtype);
      Mirror lse({tokens, c.query_heads}, DType::kF32);
      for (Mirror* m : {&q, &k, &v}) m->Fill(rng);
      // The prompt in chunks of any length, in every layer.
      for (int32_t layer = 0; layer < c.layers; ++layer) {
        out.Poison();
        lse.Poison();
        std::vector<int64_t> cuts{0};
        const int64_t first = variant == 6 ? 2000 : 2 * c.budget + 37;
        while (cuts.back() < tokens) {
          const int64_t n = layer == 0 ? static_cast<int64_t>(1 + rng() % 1500) : cuts.size() == 1 ? first : tokens;
          cuts.push_back(std::min<int64_t>(tokens, cuts.back() + n));
        }
        for (size_t i = 0; i + 1 < cuts.size(); ++i) {
          const int64_t at = cuts[i], n = cuts[i + 1] - at;
          ASSERT_OK(
              pair.cpu.Prefill(layer, q.Cpu(at, n), k.Cpu(at, n), v.Cpu(at, n), out.Cpu(at, n), lse.Cpu(at, n).get()));
        }
        out.Upload();
        lse.Upload();
        const std::vector<float> expected = out.Floats(), expected_lse = lse.Floats();
        out.Poison();
        lse.Poison();
        for (size_t i = 0; i + 1 < cuts.size(); ++i) {
          const int64_t at = cuts[i], n = cuts[i + 1] - at;
          size_t bytes = 0;
          ASSERT_OK(pair.gpu.WorkspaceSize(n, &bytes));
          void* scratch = nullptr;
          ASSERT_CUDA(cudaMalloc(&scratch, bytes));
          ASSERT_CUDA(cudaMemsetAsync(scratch, 0xFF, bytes, stream_));
          const Workspace workspace{scratch, bytes};
          ASSERT_OK(pair.gpu.Prefill(layer, q.Gpu(at, n), k.Gpu(at, n), v.Gpu(at, n), out.Gpu(at, n),
                                     lse.Gpu(at, n).get(), &workspace));
          ASSERT_CUDA(cudaStreamSynchronize(stream_));
          ASSERT_CUDA(cudaFree(scratch));
        }
        const double error = RelativeError(out.Floats(), expected),
                     lse_error = RelativeError(lse.Floats(), expected_lse);
        // A near-tie decided otherwise changes what later queries see, a little.
        // And in 8 bits the CPU sees the tokens before a block as they are stored, not as they came.
        const double tolerance = dtype == DType::kF32 ? 2e-3 : dtype == DType::kI8 ? 4e-2 : 2e-2;
        EXPECT_LT(error, tolerance) << "variant " << variant << " layer " << layer;
        EXPECT_FALSE(std::isnan(error) || std::isnan(lse_error));
        EXPECT_LT(lse_error, 1e-2);
      }
      Compare(pair, tokens, &same, &all);
    }
  std::printf("%d of %d heads hold the same entries as on the CPU\n", same, all);
  EXPECT_GE(same, all * 9 / 10);
}

TEST_F(CacheTest, AppendsGoOnAfterAPrefill) {
  std::mt19937 rng(4);
  int same = 0, all = 0;
  for (int variant = 0; variant < 12; ++variant) {
    const Config c = Variant(variant % 6, variant < 6 ? DType::kBF16 : DType::kI8);
    Pair pair(c, stream_);
    constexpr int64_t kTokens = 1500;
    Mirror k({kTokens, c.kv_heads, c.key_dim}, c.dtype), v({kTokens, c.kv_heads, c.value_dim}, c.dtype);
    Mirror q({kTokens, c.query_heads, c.key_dim}, c.dtype), out({kTokens, c.query_heads, c.value_dim}, c.dtype);
    for (Mirror* m : {&q, &k, &v}) m->Fill(rng);
    size_t bytes = 0;
    ASSERT_OK(pair.gpu.WorkspaceSize(kTokens, &bytes));
    void* scratch = nullptr;
    ASSERT_CUDA(cudaMalloc(&scratch, bytes));
    const Workspace workspace{scratch, bytes};
    for (int64_t at = 0; at < kTokens;) {
      const bool prefill = rng() % 5 == 0;
      const int64_t n = std::min<int64_t>(kTokens - at, prefill ? 1 + rng() % 300 : 1);
      for (int32_t layer = 0; layer < c.layers; ++layer) {
        ASSERT_OK(pair.cpu.Append(layer, k.Cpu(at, n), v.Cpu(at, n)));
        if (prefill) {
          ASSERT_OK(
              pair.gpu.Prefill(layer, q.Gpu(at, n), k.Gpu(at, n), v.Gpu(at, n), out.Gpu(at, n), nullptr, &workspace));
        } else {
          ASSERT_OK(pair.gpu.Append(layer, k.Gpu(at, n), v.Gpu(at, n)));
        }
      }
      at += n;
    }
    Compare(pair, kTokens, &same, &all);
    ASSERT_CUDA(cudaFree(scratch));
  }
  std::printf("%d of %d heads hold the same entries as on the CPU\n", same, all);
  EXPECT_GE(same, all * 9 / 10);
}

TEST_F(CacheTest, CompressesAsTheCpuDoes) {
  std::mt19937 rng(5);
  int same = 0, all = 0;
  for (const auto& [tokens, dtype] : {std::pair<int64_t, DType>{1, DType::kBF16},
                                      {100, DType::kBF16},
                                      {5000, DType::kBF16},
                                      {40000, DType::kBF16},
                                      {100, DType::kI8},
                                      {5000, DType::kI8},
                                      {40000, DType::kI8}}) {
    Config c = SmallConfig(dtype);
    c.layers = 1;
    Config gpu = c;
    gpu.device_type = DeviceType::kCuda;
    gpu.stream = stream_;
    Mirror k({tokens, c.kv_heads, c.key_dim}, c.dtype), v({tokens, c.kv_heads, c.value_dim}, c.dtype);
    k.Fill(rng);
    v.Fill(rng);
    const int64_t capacity = c.budget + 3;
    Held held[2][2];
    for (int device = 0; device < 2; ++device) {
      Mirror ok({c.kv_heads, capacity, c.key_dim}, c.dtype), ov({c.kv_heads, capacity, c.value_dim}, c.dtype);
      Mirror w({c.kv_heads, capacity}, DType::kF32), p({c.kv_heads, capacity}, DType::kI64);
      size_t bytes = 0;
      int64_t count = 0;
      if (device == 0) {
        ASSERT_OK(ExpressCache::CompressKvWorkspace(c, &bytes));
        std::vector<char> scratch(bytes + 64);
        void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) / 64 * 64);
        ASSERT_OK(ExpressCache::CompressKv(c, k.Cpu(), v.Cpu(), ok.Cpu(), ov.Cpu(), w.Cpu(), p.Cpu().get(), &count,
                                           {aligned, bytes}));
        for (Mirror* m : {&ok, &ov, &w, &p}) m->Upload();
      } else {
        ASSERT_OK(ExpressCache::CompressKvWorkspace(gpu, &bytes));
        void* scratch = nullptr;
        ASSERT_CUDA(cudaMalloc(&scratch, bytes));
        ASSERT_CUDA(cudaMemsetAsync(scratch, 0xFF, bytes, stream_));
        ASSERT_OK(ExpressCache::CompressKv(gpu, k.Gpu(), v.Gpu(), ok.Gpu(), ov.Gpu(), w.Gpu(), p.Gpu().get(), &count,
                                           {scratch, bytes}));
        ASSERT_CUDA(cudaStreamSynchronize(stream_));
        ASSERT_CUDA(cudaFree(scratch));
      }
      const auto keys = ok.Floats(), weights = w.Floats();
      const auto positions = p.Raw<int64_t>();
      for (int g = 0; g < 2; ++g)
        for (int64_t i = 0; i < count; ++i) {
          held[device][g].position.push_back(positions[static_cast<size_t>(g * capacity + i)]);
          held[device][g].log_weight.push_back(weights[static_cast<size_t>(g * capacity + i)]);
          held[device][g].k.push_back(keys[static_cast<size_t>((g * capacity + i) * c.key_dim)]);
        }
    }
    for (int g = 0; g < 2; ++g) {
      EXPECT_EQ(held[0][g].log_weight, held[1][g].log_weight);
      EXPECT_EQ(WeightSum(held[1][g]), static_cast<double>(tokens));
      ++all;
      same += held[0][g] == held[1][g];
    }
  }
  std::printf("%d of %d heads keep the same entries as on the CPU\n", same, all);
  EXPECT_GE(same, all * 3 / 4);
}

// One step of a model: every layer appends and attends.
void Step(ExpressCache& cache, const Config& c, Mirror& k, Mirror& v, Mirror& q, Mirror& out, int64_t row) {
  for (int32_t layer = 0; layer < c.layers; ++layer) {
    ASSERT_OK(cache.Append(layer, k.Gpu(row, 1), v.Gpu(row, 1)));
    ASSERT_OK(cache.Attend(layer, q.Gpu(row, 1), out.Gpu(layer, 1)));
  }
}

TEST_F(CacheTest, GraphReplayEqualsEagerCalls) {
  for (const auto& [schedule, dtype] : {std::pair{Schedule::kBudget, DType::kBF16},
                                        {Schedule::kRounds, DType::kBF16},
                                        {Schedule::kBudget, DType::kI8}}) {
    std::mt19937 rng(6);
    Config c = SmallConfig(dtype);
    c.layers = 3;
    c.schedule = schedule;
    if (schedule == Schedule::kRounds) c.window = 24, c.protected_entries = 8;
    c.device_type = DeviceType::kCuda;
    c.stream = stream_;
    ExpressCache eager, graphed;
    ASSERT_OK(ExpressCache::Create(c, &eager));
    ASSERT_OK(ExpressCache::Create(c, &graphed));
    constexpr int64_t kRows = 64, kTokens = 4000;
    Mirror k({kRows, c.kv_heads, c.key_dim}, c.dtype), v({kRows, c.kv_heads, c.value_dim}, c.dtype);
    Mirror q({kRows, c.query_heads, c.key_dim}, c.dtype);
    Mirror one_k({1, c.kv_heads, c.key_dim}, c.dtype), one_v({1, c.kv_heads, c.value_dim}, c.dtype);
    Mirror one_q({1, c.query_heads, c.key_dim}, c.dtype);
    Mirror a({c.layers, c.query_heads, c.value_dim}, c.dtype), b({c.layers, c.query_heads, c.value_dim}, c.dtype);
    for (Mirror* m : {&q, &k, &v}) m->Fill(rng);
    // Some tokens before, so that the graph does not begin at zero.
    for (int64_t t = 0; t < 10; ++t) {
      Step(eager, c, k, v, q, a, t);
      Step(graphed, c, k, v, q, b, t);
    }
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    ASSERT_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
    Step(graphed, c, one_k, one_v, one_q, b, 0);
    ASSERT_CUDA(cudaStreamEndCapture(stream_, &graph));
    ASSERT_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    const auto copy = [&](Mirror& to, Mirror& from, int64_t row, int64_t bytes) {
      ASSERT_CUDA(cudaMemcpyAsync(to.device(), static_cast<char*>(from.device()) + row * bytes,
                                  static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream_));
    };
    int64_t left = 0, differences = 0;
    for (int64_t t = 10; t < kTokens; ++t) {
      const int64_t row = t * 7 % kRows;
      if (left == 0) {
        left = 1 + static_cast<int64_t>(rng() % 64);
        ASSERT_CUDA(cudaStreamSynchronize(stream_));  // the host may look at the progress
        ASSERT_OK(graphed.StepPrepare(left));
      }
      copy(one_k, k, row, c.kv_heads * c.key_dim * 2);
      copy(one_v, v, row, c.kv_heads * c.value_dim * 2);
      copy(one_q, q, row, c.query_heads * c.key_dim * 2);
      ASSERT_CUDA(cudaGraphLaunch(exec, stream_));
      --left;
      Step(eager, c, k, v, q, a, row);
      if (t % 50 == 0 || t > kTokens - 20) {
        ASSERT_CUDA(cudaStreamSynchronize(stream_));
        differences += a.Raw<uint16_t>() != b.Raw<uint16_t>();
      }
    }
    EXPECT_EQ(differences, 0);
    // Unused steps are refused, cancelled, and then eager calls go on.
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    if (left == 0) ASSERT_OK(graphed.StepPrepare(left = 5));
    const Status status = graphed.Append(0, k.Gpu(0, 1), v.Gpu(0, 1));
    EXPECT_EQ(status.code(), StatusCode::kStepsPending) << status.message();
    ASSERT_OK(graphed.StepCancel());
    for (int64_t t = 0; t < 200; ++t) {
      Step(eager, c, k, v, q, a, t % kRows);
      Step(graphed, c, k, v, q, b, t % kRows);
    }
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    EXPECT_EQ(a.Raw<uint16_t>(), b.Raw<uint16_t>());
    for (int32_t layer = 0; layer < c.layers; ++layer)
      EXPECT_EQ(Export(eager, c, layer, 1, DeviceType::kCuda), Export(graphed, c, layer, 1, DeviceType::kCuda));
    // A full ring is a status and changes nothing; a replay too many is noticed.
    const Status full = graphed.StepPrepare(100000);
    EXPECT_EQ(full.code(), StatusCode::kRingFull) << full.message();
    EXPECT_EQ(Export(eager, c, 0, 0, DeviceType::kCuda), Export(graphed, c, 0, 0, DeviceType::kCuda));
    ASSERT_CUDA(cudaGraphLaunch(exec, stream_));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    EXPECT_EQ(graphed.Append(0, k.Gpu(0, 1), v.Gpu(0, 1)).code(), StatusCode::kBroken);
    ASSERT_OK(graphed.Reset());
    EXPECT_OK(graphed.Append(0, k.Gpu(0, 1), v.Gpu(0, 1)));
    cudaGraphExecDestroy(exec);
    cudaGraphDestroy(graph);
  }
}

TEST_F(CacheTest, SavedOnOneDeviceLoadedOnTheOther) {
  std::mt19937 rng(12);
  for (int variant = 0; variant < 12; ++variant) {
    SCOPED_TRACE(variant);
    const Config c = Variant(variant % 6, variant < 6 ? DType::kBF16 : DType::kI8);
    constexpr int64_t kTokens = 900;
    Mirror k({kTokens, c.kv_heads, c.key_dim}, c.dtype), v({kTokens, c.kv_heads, c.value_dim}, c.dtype);
    k.Fill(rng);
    v.Fill(rng);
    Pair pair(c, stream_);
    ExpressCache gpu;  // with tokens of another stream, so that two streams meet in a copy
    cudaStream_t other = nullptr;
    ASSERT_CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
    Config other_config = pair.gpu_config;
    other_config.stream = other;
    ASSERT_OK(ExpressCache::Create(other_config, &gpu));
    for (int32_t layer = 0; layer < c.layers; ++layer) {
      ASSERT_OK(pair.gpu.Append(layer, k.Gpu(0, 500), v.Gpu(0, 500)));
      ASSERT_OK(gpu.Append(layer, k.Gpu(100, 77), v.Gpu(100, 77)));
    }
    const std::vector<char> data = Saved(pair.gpu);
    ASSERT_OK(pair.cpu.Load(data.data(), data.size()));
    EXPECT_EQ(Saved(pair.cpu), data);
    ASSERT_OK(gpu.Copy(pair.gpu));
    ASSERT_OK(pair.gpu.Reset());
    ASSERT_OK(pair.gpu.Load(data.data(), data.size()));
    EXPECT_EQ(Saved(gpu), data);
    for (int32_t layer = 0; layer < c.layers; ++layer)
      for (ExpressCache* one : {&pair.gpu, &gpu})
        ASSERT_OK(one->Append(layer, k.Gpu(500, kTokens - 500), v.Gpu(500, kTokens - 500)));
    ASSERT_CUDA(cudaDeviceSynchronize());
    for (int32_t layer = 0; layer < c.layers; ++layer)
      EXPECT_EQ(Export(gpu, c, layer, 1, DeviceType::kCuda), Export(pair.gpu, c, layer, 1, DeviceType::kCuda));
    gpu = ExpressCache();
    ASSERT_CUDA(cudaStreamDestroy(other));
  }
}

TEST_F(CacheTest, BatchesEqualSingleCalls) {
  std::mt19937 rng(7);
  constexpr int64_t kCaches = 9, kSteps = 600;
  std::vector<ExpressCache> single(kCaches), batched(kCaches);
  std::vector<ExpressCache*> pointers;
  std::vector<const ExpressCache*> const_pointers;
  Config c = SmallConfig(DType::kF16);
  c.device_type = DeviceType::kCuda;
  c.stream = stream_;
  for (size_t i = 0; i < kCaches; ++i) {
    c.budget = 80 + 40 * static_cast<int64_t>(i);
    c.seed = i;
    ASSERT_OK(ExpressCache::Create(c, &single[i]));
    ASSERT_OK(ExpressCache::Create(c, &batched[i]));
    pointers.push_back(&batched[i]);
    const_pointers.push_back(&batched[i]);
  }
  Mirror k({kCaches, c.kv_heads, c.key_dim}, c.dtype), v({kCaches, c.kv_heads, c.value_dim}, c.dtype);
  Mirror q({kCaches, c.query_heads, c.key_dim}, c.dtype);
  Mirror a({kCaches, c.query_heads, c.value_dim}, DType::kF32), b({kCaches, c.query_heads, c.value_dim}, DType::kF32);
  for (int64_t step = 0; step < kSteps; ++step) {
    if (step % 10 == 0) {
      ASSERT_CUDA(cudaStreamSynchronize(stream_));
      for (Mirror* m : {&q, &k, &v}) m->Fill(rng);
    }
    for (int32_t layer = 0; layer < c.layers; ++layer) {
      ASSERT_OK(ExpressCache::AppendBatch(pointers, layer, k.Gpu(), v.Gpu()));
      ASSERT_OK(ExpressCache::AttendBatch(const_pointers, layer, q.Gpu(), b.Gpu()));
      for (int64_t i = 0; i < kCaches; ++i) {
        ASSERT_OK(single[static_cast<size_t>(i)].Append(layer, k.Gpu(i, 1), v.Gpu(i, 1)));
        ASSERT_OK(single[static_cast<size_t>(i)].Attend(layer, q.Gpu(i, 1), a.Gpu(i, 1)));
      }
    }
    if (step % 50 == 49) {
      ASSERT_CUDA(cudaStreamSynchronize(stream_));
      const double error = RelativeError(b.Floats(), a.Floats());
      EXPECT_LT(error, 1e-3);
      EXPECT_FALSE(std::isnan(error));
    }
  }
  for (size_t i = 0; i < kCaches; ++i)
    EXPECT_EQ(Export(single[i], c, 1, 1, DeviceType::kCuda), Export(batched[i], c, 1, 1, DeviceType::kCuda));
  pointers[3] = pointers[5];
  EXPECT_EQ(ExpressCache::AppendBatch(pointers, 0, k.Gpu(), v.Gpu()).code(), StatusCode::kInvalidArgument);
}

TEST_F(CacheTest, RollbackAndCompressAsOnTheCpu) {
  std::mt19937 rng(8);
  Config c = SmallConfig(DType::kF32);
  c.rollback_reserve = 12;
  Pair pair(c, stream_);
  Mirror k({400, c.kv_heads, c.key_dim}, c.dtype), v({400, c.kv_heads, c.value_dim}, c.dtype);
  k.Fill(rng);
  v.Fill(rng);
  int64_t tokens = 0;
  for (int i = 0; i < 300; ++i) {
    const int64_t n = 1 + static_cast<int64_t>(rng() % 9), at = static_cast<int64_t>(rng() % 390);
    for (int32_t layer = 0; layer < c.layers; ++layer) {
      ASSERT_OK(pair.cpu.Append(layer, k.Cpu(at, n), v.Cpu(at, n)));
      ASSERT_OK(pair.gpu.Append(layer, k.Gpu(at, n), v.Gpu(at, n)));
    }
    tokens += n;
    int64_t available = 0, gpu_available = 0, room = 0, gpu_room = 0;
    ASSERT_OK(pair.cpu.RollbackAvailable(&available));
    ASSERT_OK(pair.gpu.RollbackAvailable(&gpu_available));
    ASSERT_EQ(available, gpu_available);
    const int64_t back = available > 0 ? static_cast<int64_t>(rng() % static_cast<uint64_t>(available)) : 0;
    ASSERT_OK(pair.cpu.Rollback(back));
    ASSERT_OK(pair.gpu.Rollback(back));
    tokens -= back;
    if (i % 10 != 0) continue;
    ASSERT_OK(pair.cpu.Compress(kAllLayers, 20, &room));
    ASSERT_OK(pair.gpu.Compress(kAllLayers, 20, &gpu_room));
    ASSERT_EQ(room, gpu_room);
  }
  int same = 0, all = 0;
  Compare(pair, tokens, &same, &all);
  EXPECT_GE(same, all - 1);
}

TEST_F(CacheTest, ErrorsNameTheArgumentAndChangeNothing) {
  Config c = SmallConfig(DType::kBF16);
  c.device_type = DeviceType::kCuda;
  c.stream = stream_;
  const auto refused = [&](auto change, StatusCode code, const char* text) {
    Config bad = c;
    change(bad);
    ExpressCache cache;
    const Status status = ExpressCache::Create(bad, &cache);
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
  };
  refused([](Config& x) { x.device_id = 1000; }, StatusCode::kInvalidArgument, "device_id");
  refused([](Config& x) { x.key_dim = x.value_dim = 72; }, StatusCode::kUnsupported, "key_dim");
  refused([](Config& x) { x.value_dim = 128; }, StatusCode::kUnsupported, "value_dim");
  refused([](Config& x) { x.validate = true; }, StatusCode::kUnsupported, "validate");
  refused([](Config& x) { x.prefill_block = 100; }, StatusCode::kUnsupported, "prefill_block");
  refused([](Config& x) { x.budget = int64_t{1} << 23, x.layers = 64; }, StatusCode::kOutOfMemory, "memory");

  ExpressCache cache;
  ASSERT_OK(ExpressCache::Create(c, &cache));
  Mirror k({4, c.kv_heads, c.key_dim}, c.dtype), v({4, c.kv_heads, c.value_dim}, c.dtype);
  std::mt19937 rng(9);
  k.Fill(rng);
  v.Fill(rng);
  ASSERT_OK(cache.Append(0, k.Gpu(), v.Gpu()));
  ASSERT_OK(cache.Append(1, k.Gpu(), v.Gpu()));
  const auto expect = [&](const Status& status, StatusCode code, const char* text) {
    EXPECT_EQ(status.code(), code) << status.message();
    EXPECT_NE(status.message().find(text), std::string::npos) << status.message();
  };
  expect(cache.Append(0, k.Cpu(), v.Gpu()), StatusCode::kDeviceMismatch, "k");
  Mirror::Part lie = k.Cpu();  // says CUDA, is on the host
  lie.tensor.device_type = DeviceType::kCuda;
  expect(cache.Append(0, lie, v.Gpu()), StatusCode::kDeviceMismatch, "k.data");
  Mirror::Part odd = k.Gpu(0, 3);
  odd.tensor.data = static_cast<char*>(odd.tensor.data) + 2;
  expect(cache.Append(0, odd, v.Gpu(0, 3)), StatusCode::kInvalidArgument, "k.data");
  Mirror q({4, c.query_heads, c.key_dim}, c.dtype), out({4, c.query_heads, c.value_dim}, DType::kF32);
  expect(cache.Prefill(0, q.Gpu(), k.Gpu(), v.Gpu(), out.Gpu()), StatusCode::kDtypeMismatch, "out.dtype");
  Mirror out16({4, c.query_heads, c.value_dim}, c.dtype);
  expect(cache.Prefill(0, q.Gpu(), k.Gpu(), v.Gpu(), out16.Gpu()), StatusCode::kInvalidArgument, "workspace");
  const Held held = Export(cache, c, 0, 0, DeviceType::kCuda);
  EXPECT_EQ(held.position, (std::vector<int64_t>{0, 1, 2, 3}));
  // In the middle of a step the layers differ.
  ASSERT_OK(cache.Append(0, k.Gpu(0, 1), v.Gpu(0, 1)));
  int64_t available = 0;
  expect(cache.RollbackAvailable(&available), StatusCode::kStepsPending, "middle of a step");
  ASSERT_OK(cache.Append(1, k.Gpu(0, 1), v.Gpu(0, 1)));
  EXPECT_OK(cache.RollbackAvailable(&available));
  EXPECT_EQ(cudaGetLastError(), cudaSuccess);
}

TEST_F(CacheTest, LongStreamKeepsTheSumOfWeights) {
  Config c = SmallConfig(DType::kBF16);
  c.layers = 1;
  c.device_type = DeviceType::kCuda;
  c.stream = stream_;
  c.prefill_block = 512;
  ExpressCache cache;
  ASSERT_OK(ExpressCache::Create(c, &cache));
  std::mt19937 rng(10);
  constexpr int64_t kChunk = 100000, kChunks = 11;
  Mirror k({kChunk, c.kv_heads, c.key_dim}, c.dtype), v({kChunk, c.kv_heads, c.value_dim}, c.dtype);
  Mirror q({kChunk, c.query_heads, c.key_dim}, c.dtype), out({kChunk, c.query_heads, c.value_dim}, c.dtype);
  for (Mirror* m : {&q, &k, &v}) m->Fill(rng);
  size_t bytes = 0;
  ASSERT_OK(cache.WorkspaceSize(kChunk, &bytes));
  void* scratch = nullptr;
  ASSERT_CUDA(cudaMalloc(&scratch, bytes));
  const Workspace workspace{scratch, bytes};
  for (int64_t i = 0; i < kChunks; ++i) {
    ASSERT_OK(cache.Prefill(0, q.Gpu(), k.Gpu(), v.Gpu(), out.Gpu(), nullptr, &workspace));
    for (int64_t t = 0; t < 300; ++t) ASSERT_OK(cache.Append(0, k.Gpu(t, 1), v.Gpu(t, 1)));
    const Held held = Export(cache, c, 0, static_cast<int32_t>(i % 2), DeviceType::kCuda);
    EXPECT_EQ(WeightSum(held), static_cast<double>((i + 1) * (kChunk + 300)));
    std::vector<int64_t> positions = held.position;
    std::sort(positions.begin(), positions.end());
    EXPECT_EQ(std::unique(positions.begin(), positions.end()), positions.end());
    EXPECT_LE(static_cast<int64_t>(positions.size()), c.budget);
  }
  ASSERT_CUDA(cudaFree(scratch));
}

TEST_F(CacheTest, TwoStreamsWorkSideBySide) {
  cudaStream_t other = nullptr;
  ASSERT_CUDA(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  std::mt19937 rng(11);
  Config c = SmallConfig(DType::kBF16);
  c.device_type = DeviceType::kCuda;
  ExpressCache a, b, alone;
  c.stream = stream_;
  ASSERT_OK(ExpressCache::Create(c, &a));
  ASSERT_OK(ExpressCache::Create(c, &alone));
  c.stream = other;
  ASSERT_OK(ExpressCache::Create(c, &b));
  Mirror k({1000, c.kv_heads, c.key_dim}, c.dtype), v({1000, c.kv_heads, c.value_dim}, c.dtype);
  k.Fill(rng);
  v.Fill(rng);
  for (int64_t t = 0; t < 1000; ++t)
    for (int32_t layer = 0; layer < c.layers; ++layer) {
      ASSERT_OK(a.Append(layer, k.Gpu(t, 1), v.Gpu(t, 1)));
      ASSERT_OK(b.Append(layer, k.Gpu(t, 1), v.Gpu(t, 1)));
    }
  for (int32_t layer = 0; layer < c.layers; ++layer) ASSERT_OK(alone.Append(layer, k.Gpu(), v.Gpu()));
  ASSERT_CUDA(cudaStreamSynchronize(other));
  EXPECT_EQ(Export(a, c, 0, 0, DeviceType::kCuda), Export(alone, c, 0, 0, DeviceType::kCuda));
  EXPECT_EQ(Export(b, c, 0, 0, DeviceType::kCuda), Export(alone, c, 0, 0, DeviceType::kCuda));
  ASSERT_OK(b.SetStream(stream_));
  ASSERT_CUDA(cudaStreamDestroy(other));
  EXPECT_OK(b.Append(0, k.Gpu(0, 1), v.Gpu(0, 1)));
}

}  // namespace
}  // namespace express
