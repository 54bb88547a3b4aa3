// Slots of 8 bits on the GPU: the codes and scales of the CPU to the bit, whoever writes them, and nothing that free slots hold.
#include <algorithm>
#include <limits>

#include "tests/cuda/testing.h"

namespace express {
namespace {

Config CodesConfig(int32_t key_dim, int32_t value_dim) {
  Config c;
  c.layers = 1;
  c.query_heads = 4;
  c.kv_heads = 2;
  c.key_dim = key_dim;
  c.value_dim = value_dim;
  c.dtype = DType::kI8;
  c.budget = 200;
  c.prefill_block = 64;
  c.seed = 3;
  c.halving = Halving::kCoin;  // the same entries on both devices, whatever rounding
  c.head_budgets = HeadBudgets::kFixed;
  return c;
}

// Rows of every size, with one large element, with ties, constant, zero, tiny, huge; and if `odd`, some that are not finite.
void FillRows(Mirror& rows, int64_t dim, bool odd, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(rows.count()));
  const float infinity = std::numeric_limits<float>::infinity();
  for (size_t i = 0; i < x.size(); ++i) {
    const auto row = static_cast<int64_t>(i) / dim, at = static_cast<int64_t>(i) % dim;
    const int64_t kind = (row * 7 + row / 11) % 11;
    float y = normal(rng);
    if (kind == 1) y *= std::ldexp(1.0f, static_cast<int>(row % 20) - 10);
    if (kind == 2 && at == row % dim) y *= 1000;
    if (kind == 3) y = static_cast<float>(static_cast<int>(rng() % 509) - 254) / 2;  // scale 1: halves are ties
    if (kind == 3 && at == 0) y = 127;
    if (kind == 4) y = 0.7f;
    if (kind == 5) y = 0;
    if (kind == 6) y *= 1e-38f;
    if (kind == 7) y *= 1e-42f;
    if (kind == 8) y *= rows.dtype() == DType::kF16 ? 1e4f : 1e37f;
    if (kind == 9 && odd && at == row % dim) y = row % 2 == 0 ? infinity : std::nanf("");
    x[i] = y;
  }
  cpu::Convert(x.data(), DType::kF32, rows.host(), rows.dtype(), rows.count());
  rows.Upload();
}

struct Device {
  void* data = nullptr;
  size_t bytes = 0;
  explicit Device(size_t size) : bytes(size) {
    EXPECT_EQ(cudaMalloc(&data, size), cudaSuccess);
    EXPECT_EQ(cudaMemset(data, 0xFF, size), cudaSuccess);
  }
  ~Device() { cudaFree(data); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
};

class CodesTest : public CudaTest {
 protected:
  void Create(const Config& c, ExpressCache* cpu, ExpressCache* gpu) {
    Config device = c;
    device.device_type = DeviceType::kCuda;
    device.stream = stream_;
    ASSERT_OK(ExpressCache::Create(c, cpu));
    ASSERT_OK(ExpressCache::Create(device, gpu));
  }
};

// By append and by prefill, from every type; what is saved on the one device is what is saved on the other.
TEST_F(CodesTest, CodesAndScalesOfTheCpu) {
  std::mt19937 rng(1);
  for (const auto& [key_dim, value_dim] : {std::pair{64, 64}, {80, 80}, {96, 96}, {128, 128}, {192, 128}, {256, 256}})
    for (const DType type : {DType::kF32, DType::kF16, DType::kBF16})
      for (const bool odd : {false, true}) {
        SCOPED_TRACE(testing::Message() << "dims " << key_dim << ", " << value_dim << " type " << static_cast<int>(type)
                                        << " odd " << odd);
        Config c = CodesConfig(key_dim, value_dim);
        if (odd) c.protected_entries = 0;  // NaN has many bits
        ExpressCache cpu, gpu, prompt, unused;
        Create(c, &cpu, &gpu);
        Create(c, &unused, &prompt);
        constexpr int64_t kTokens = 333;
        Mirror k({kTokens, c.kv_heads, key_dim}, type), v({kTokens, c.kv_heads, value_dim}, type);
        Mirror q({kTokens, c.query_heads, key_dim}, type), out({kTokens, c.query_heads, value_dim}, type);
        FillRows(k, key_dim, odd, rng);
        FillRows(v, value_dim, odd, rng);
        q.Fill(rng);
        ASSERT_OK(cpu.Append(0, k.Cpu(), v.Cpu()));
        ASSERT_OK(gpu.Append(0, k.Gpu(), v.Gpu()));
        const std::vector<char> expected = Saved(cpu);
        EXPECT_TRUE(Saved(gpu) == expected);
        size_t bytes = 0;
        ASSERT_OK(prompt.WorkspaceSize(kTokens, &bytes));
        const Device scratch(bytes);
        const Workspace workspace{scratch.data, bytes};
        for (const auto& [at, n] : {std::pair<int64_t, int64_t>{0, 150}, {150, 100}, {250, 83}})
          ASSERT_OK(prompt.Prefill(0, q.Gpu(at, n), k.Gpu(at, n), v.Gpu(at, n), out.Gpu(at, n), nullptr, &workspace));
        EXPECT_TRUE(Saved(prompt) == expected);
        // And back: the codes that were saved are those that are loaded.
        ASSERT_OK(gpu.Reset());
        ASSERT_OK(gpu.Load(expected.data(), expected.size()));
        EXPECT_TRUE(Saved(gpu) == expected);
        EXPECT_EQ(Export(gpu, c, 0, 1, DeviceType::kCuda).position, Export(cpu, c, 0, 1, DeviceType::kCpu).position);
        if (!odd) {
          EXPECT_EQ(Export(gpu, c, 0, 1, DeviceType::kCuda), Export(cpu, c, 0, 1, DeviceType::kCpu));
        }
      }
}

// Kernel halving of lists of all lengths: the survivors are the CPU's, up to near-ties; small, for tools that look at every access.
TEST_F(CodesTest, AFewTokens) {
  std::mt19937 rng(2);
  Config c = CodesConfig(128, 128);
  c.halving = Halving::kKernel;
  c.budget = 100;
  ExpressCache cpu, gpu;
  Create(c, &cpu, &gpu);
  constexpr int64_t kTokens = 400;
  Mirror k({kTokens, c.kv_heads, 128}, c.dtype), v({kTokens, c.kv_heads, 128}, c.dtype);
  Mirror q({kTokens, c.query_heads, 128}, c.dtype), out({kTokens, c.query_heads, 128}, c.dtype);
  for (Mirror* m : {&q, &k, &v}) m->Fill(rng);
  size_t bytes = 0;
  ASSERT_OK(gpu.WorkspaceSize(kTokens, &bytes));
  const Device scratch(bytes);
  const Workspace workspace{scratch.data, bytes};
  const auto take = [&](int64_t at, int64_t n, bool prefill) {
    if (prefill) {
      ASSERT_OK(cpu.Prefill(0, q.Cpu(at, n), k.Cpu(at, n), v.Cpu(at, n), out.Cpu(at, n)));
      ASSERT_OK(gpu.Prefill(0, q.Gpu(at, n), k.Gpu(at, n), v.Gpu(at, n), out.Gpu(at, n), nullptr, &workspace));
    } else {
      ASSERT_OK(cpu.Append(0, k.Cpu(at, n), v.Cpu(at, n)));
      ASSERT_OK(gpu.Append(0, k.Gpu(at, n), v.Gpu(at, n)));
    }
  };
  take(0, 130, true);
  for (int64_t t = 130; t < 180; ++t) take(t, 1, false);
  take(180, 120, true);
  take(300, 100, false);
  int same = 0;
  for (int32_t head = 0; head < 2; ++head) {
    const Held a = Export(cpu, c, 0, head, DeviceType::kCpu), b = Export(gpu, c, 0, head, DeviceType::kCuda);
    EXPECT_EQ(a.log_weight, b.log_weight);
    same += a == b;
  }
  EXPECT_GE(same, 1);
  if (same < 2) return;
  Mirror decoded({1, c.query_heads, 128}, DType::kF32);
  ASSERT_OK(cpu.Attend(0, q.Cpu(7, 1), decoded.Cpu()));
  decoded.Upload();
  const std::vector<float> expected = decoded.Floats();
  decoded.Poison();
  ASSERT_OK(gpu.Attend(0, q.Gpu(7, 1), decoded.Gpu()));
  ASSERT_CUDA(cudaStreamSynchronize(stream_));
  const double error = RelativeError(decoded.Floats(), expected);
  EXPECT_LT(error, 8e-3);
  EXPECT_FALSE(std::isnan(error));
}

// Slots that held NaN once are free, and nobody looks at their scales. A value that is not finite shows, in its heads only.
TEST_F(CodesTest, FreeSlotsAreNotRead) {
  std::mt19937 rng(4);
  for (const auto& [key_dim, value_dim] : {std::pair{64, 64}, {80, 80}, {128, 128}, {192, 128}, {256, 256}})
    for (const int32_t group : {1, 8, 12}) {
      SCOPED_TRACE(testing::Message() << "dims " << key_dim << ", " << value_dim << " group " << group);
      Config c = CodesConfig(key_dim, value_dim);
      c.query_heads = group * c.kv_heads;
      ExpressCache cpu, gpu;
      Create(c, &cpu, &gpu);
      Mirror k({150, c.kv_heads, key_dim}, DType::kF32), v({150, c.kv_heads, value_dim}, DType::kF32);
      ASSERT_OK(gpu.Append(0, k.Gpu(), v.Gpu()));  // as poisoned
      ASSERT_OK(gpu.Reset());
      k.Fill(rng);
      v.Fill(rng);
      const int64_t n = 1 + static_cast<int64_t>(rng() % 100);
      ASSERT_OK(cpu.Append(0, k.Cpu(0, n), v.Cpu(0, n)));
      ASSERT_OK(gpu.Append(0, k.Gpu(0, n), v.Gpu(0, n)));
      Mirror q({3, c.query_heads, key_dim}, DType::kF32), out({3, c.query_heads, value_dim}, DType::kF32);
      Mirror lse({3, c.query_heads}, DType::kF32);
      q.Fill(rng);
      ASSERT_OK(cpu.Attend(0, q.Cpu(), out.Cpu(), lse.Cpu().get()));
      out.Upload();
      lse.Upload();
      const std::vector<float> expected = out.Floats(), expected_lse = lse.Floats();
      out.Poison();
      lse.Poison();
      ASSERT_OK(gpu.Attend(0, q.Gpu(), out.Gpu(), lse.Gpu().get()));
      ASSERT_CUDA(cudaStreamSynchronize(stream_));
      const double error = RelativeError(out.Floats(), expected), lse_error = RelativeError(lse.Floats(), expected_lse);
      EXPECT_LT(error, 8e-3);
      EXPECT_LT(lse_error, 2e-3);
      EXPECT_FALSE(std::isnan(error) || std::isnan(lse_error));
      // One element of the next value of head 0.
      std::vector<float> values = v.Floats();
      values[static_cast<size_t>(n * c.kv_heads * value_dim + 5)] = std::numeric_limits<float>::infinity();
      cpu::Convert(values.data(), DType::kF32, v.host(), DType::kF32, v.count());
      v.Upload();
      ASSERT_OK(gpu.Append(0, k.Gpu(n, 1), v.Gpu(n, 1)));
      ASSERT_OK(gpu.Attend(0, q.Gpu(), out.Gpu()));
      ASSERT_CUDA(cudaStreamSynchronize(stream_));
      const std::vector<float> got = out.Floats();
      for (size_t i = 0; i < got.size(); ++i) {
        const auto head = static_cast<int32_t>(i / static_cast<size_t>(value_dim)) % c.query_heads;
        ASSERT_EQ(std::isnan(got[i]), head < group) << i;
      }
    }
}

// A prompt that is taken in several parts leaves what the same prompt in the same parts leaves, and all that it is to write is written.
TEST_F(CodesTest, LongPrompts) {
  std::mt19937 rng(5);
  Config c = CodesConfig(64, 64);
  c.halving = Halving::kKernel;
  c.prefill_block = 192;  // of which 32K tokens are no multiple
  c.device_type = DeviceType::kCuda;
  c.stream = stream_;
  ExpressCache whole, parts, appended;
  for (ExpressCache* cache : {&whole, &parts, &appended}) ASSERT_OK(ExpressCache::Create(c, cache));
  constexpr int64_t kTokens = 70001, kFirst = 50;
  Mirror k({kTokens, c.kv_heads, 64}, c.dtype), v({kTokens, c.kv_heads, 64}, c.dtype);
  Mirror q({kTokens, c.query_heads, 64}, c.dtype), out({kTokens, c.query_heads, 64}, c.dtype);
  Mirror other({kTokens, c.query_heads, 64}, c.dtype), lse({kTokens, c.query_heads}, DType::kF32);
  for (Mirror* m : {&q, &k, &v}) m->Fill(rng);
  size_t bytes = 0, most = 0;
  ASSERT_OK(whole.WorkspaceSize(kTokens, &bytes));
  ASSERT_OK(whole.WorkspaceSize(int64_t{1} << 22, &most));
  EXPECT_EQ(bytes, most);
  const Device scratch(bytes);
  const Workspace workspace{scratch.data, bytes};
  const auto take = [&](ExpressCache& cache, Mirror& to, int64_t at, int64_t n) {
    ASSERT_OK(
        cache.Prefill(0, q.Gpu(at, n), k.Gpu(at, n), v.Gpu(at, n), to.Gpu(at, n), lse.Gpu(at, n).get(), &workspace));
  };
  take(whole, out, 0, kFirst);
  take(whole, out, kFirst, kTokens - kFirst);
  take(parts, other, 0, kFirst);
  for (int64_t at = kFirst; at < kTokens;) {
    const int64_t end = std::min(kTokens, (at + 32768) / 192 * 192);
    take(parts, other, at, end - at);
    at = end;
  }
  ASSERT_OK(appended.Append(0, k.Gpu(), v.Gpu()));
  ASSERT_CUDA(cudaStreamSynchronize(stream_));
  EXPECT_TRUE(out.Raw<uint16_t>() == other.Raw<uint16_t>());
  const std::vector<float> written = out.Floats(), sums = lse.Floats();
  EXPECT_TRUE(std::all_of(written.begin(), written.end(), [](float x) { return std::isfinite(x); }));
  EXPECT_TRUE(std::all_of(sums.begin(), sums.end(), [](float x) { return std::isfinite(x); }));
  const std::vector<char> saved = Saved(whole);
  EXPECT_TRUE(saved == Saved(parts));
  for (int32_t head = 0; head < c.kv_heads; ++head)
    EXPECT_EQ(Export(whole, c, 0, head, DeviceType::kCuda), Export(appended, c, 0, head, DeviceType::kCuda)) << head;
}

TEST_F(CodesTest, PromptsOfOneType) {
  Config c = CodesConfig(64, 64);
  ExpressCache cpu, gpu;
  Create(c, &cpu, &gpu);
  Mirror k({8, c.kv_heads, 64}, DType::kF16), v({8, c.kv_heads, 64}, DType::kBF16);
  Mirror q({8, c.query_heads, 64}, DType::kF16), out({8, c.query_heads, 64}, DType::kF16);
  const Status status = gpu.Prefill(0, q.Gpu(), k.Gpu(), v.Gpu(), out.Gpu());
  EXPECT_EQ(status.code(), StatusCode::kDtypeMismatch);
  EXPECT_NE(status.message().find("v.dtype"), std::string::npos) << status.message();
  int64_t entries = -1;
  EXPECT_OK(gpu.Entries(0, 0, &entries));
  EXPECT_EQ(entries, 0);
}

}  // namespace
}  // namespace express
