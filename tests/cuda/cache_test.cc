// CUDA caches against CPU caches: the same tokens, the same draws, the same entries.
#include <algorithm>

#include "tests/cuda/testing.h"

namespace express {
namespace {

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

}  // namespace
}  // namespace express
