// Scores without rotary positions on CUDA: caches with fair coins, which hold nothing that depends on rounding but scores and means, are
// the CPU's to the bit when saved, scores and means included.
#include <algorithm>

#include "tests/cuda/testing.h"

namespace express {
namespace {

struct Rotary {
  explicit Rotary(int32_t pairs) {
    for (int32_t i = 0; i < pairs; ++i)
      frequency.push_back(std::pow(10000.0f, -static_cast<float>(i) / static_cast<float>(pairs)));
  }
  std::vector<float> frequency;
};

Config SmallConfig(DType dtype, const Rotary& rotary, RopeLayout layout) {
  Config c;
  c.layers = 2;
  c.query_heads = 4;
  c.kv_heads = 2;
  c.key_dim = c.value_dim = 64;
  c.dtype = dtype;
  c.budget = 200;
  c.sinks = 3;
  c.window = 40;
  c.protected_entries = 60;
  c.prefill_block = 64;
  c.halving = Halving::kCoin;
  c.head_budgets = HeadBudgets::kFixed;
  c.protection_score = ProtectionScore::kEnergyValue;
  c.rope_frequencies = rotary.frequency;
  c.rope_layout = layout;
  c.threads = 2;
  return c;
}

// How many bytes differ, where all should be the same.
int64_t Different(const std::vector<char>& a, const std::vector<char>& b) {
  if (a.size() != b.size()) return -1;
  int64_t count = 0;
  for (size_t i = 0; i < a.size(); ++i) count += a[i] != b[i];
  return count;
}

class RotaryTest : public CudaTest {
 protected:
  Config OnGpu(Config c) const {
    c.device_type = DeviceType::kCuda;
    c.stream = stream_;
    return c;
  }
  // A prompt, or a piece of one, into one layer.
  void Prefill(ExpressCache& gpu, int32_t layer, Mirror& q, Mirror& k, Mirror& v, Mirror& out, int64_t at, int64_t n) {
    size_t bytes = 0;
    ASSERT_OK(gpu.WorkspaceSize(n, &bytes));
    void* scratch = nullptr;
    ASSERT_CUDA(cudaMalloc(&scratch, bytes));
    ASSERT_CUDA(cudaMemsetAsync(scratch, 0xFF, bytes, stream_));
    const Workspace workspace{scratch, bytes};
    ASSERT_OK(gpu.Prefill(layer, q.Gpu(at, n), k.Gpu(at, n), v.Gpu(at, n), out.Gpu(at, n), nullptr, &workspace));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    ASSERT_CUDA(cudaFree(scratch));
  }
};

struct Shape {
  int32_t key_dim, value_dim, pairs;
};
constexpr Shape kShapes[] = {{64, 64, 32}, {80, 80, 10}, {96, 96, 48}, {128, 128, 64}, {192, 128, 32}, {256, 256, 0}};

TEST_F(RotaryTest, StepsAndPromptsAsOnTheCpu) {
  std::mt19937 rng(1);
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kI8})
    for (const Shape& shape : kShapes)
      for (const RopeLayout layout : {RopeLayout::kHalves, RopeLayout::kInterleaved}) {
        SCOPED_TRACE(testing::Message() << "dtype " << static_cast<int>(dtype) << " dims " << shape.key_dim << " "
                                        << shape.value_dim << " layout " << static_cast<int>(layout));
        const Rotary rotary(shape.pairs);
        Config c = SmallConfig(dtype, rotary, layout);
        c.key_dim = shape.key_dim;
        c.value_dim = shape.value_dim;
        if (shape.pairs > 0 && (shape.key_dim / 16 + static_cast<int32_t>(layout)) % 2 == 0)
          c.protection_score = ProtectionScore::kEnergy;
        constexpr int64_t kTokens = 1400;
        Mirror k({kTokens, c.kv_heads, c.key_dim}, dtype), v({kTokens, c.kv_heads, c.value_dim}, dtype);
        Mirror q({kTokens, c.query_heads, c.key_dim}, dtype), out({kTokens, c.query_heads, c.value_dim}, dtype);
        for (Mirror* m : {&q, &k, &v}) m->Fill(rng);
        ExpressCache cpu, steps, prompt;
        ASSERT_OK(ExpressCache::Create(c, &cpu));
        ASSERT_OK(ExpressCache::Create(OnGpu(c), &steps));
        ASSERT_OK(ExpressCache::Create(OnGpu(c), &prompt));
        // Single tokens and pieces; and pieces of a prompt, the first one short of the budget or beyond, with tokens between.
        for (int64_t at = 0; at < kTokens;) {
          const int64_t n = std::min<int64_t>(kTokens - at, rng() % 3 == 0 ? 1 + rng() % 500 : 1);
          for (int32_t layer = 0; layer < c.layers; ++layer) {
            ASSERT_OK(cpu.Append(layer, k.Cpu(at, n), v.Cpu(at, n)));
            ASSERT_OK(steps.Append(layer, k.Gpu(at, n), v.Gpu(at, n)));
            if (n > 1)
              Prefill(prompt, layer, q, k, v, out, at, n);
            else
              ASSERT_OK(prompt.Append(layer, k.Gpu(at, n), v.Gpu(at, n)));
          }
          at += n;
        }
        const std::vector<char> expected = Saved(cpu);
        EXPECT_EQ(Different(Saved(steps), expected), 0);
        EXPECT_EQ(Different(Saved(prompt), expected), 0);
        ASSERT_OK(steps.Load(expected.data(), expected.size()));
        ASSERT_OK(cpu.Load(expected.data(), expected.size()));
        Config other = OnGpu(c);
        other.protection_score =
            c.protection_score == ProtectionScore::kEnergy ? ProtectionScore::kEnergyValue : ProtectionScore::kEnergy;
        ExpressCache energy;
        ASSERT_OK(ExpressCache::Create(other, &energy));
        EXPECT_EQ(energy.Load(expected.data(), expected.size()).code(), StatusCode::kInvalidArgument);
        if (HasFailure()) return;
      }
}

// One prompt with many runs of departures to a block, far from its beginning, and one that is compressed at once.
TEST_F(RotaryTest, LongPrompts) {
  std::mt19937 rng(2);
  for (const DType dtype : {DType::kBF16, DType::kI8, DType::kF32}) {
    SCOPED_TRACE(static_cast<int>(dtype));
    const Rotary rotary(24);
    Config c = SmallConfig(dtype, rotary, RopeLayout::kHalves);
    c.layers = 1;
    c.budget = 700;
    c.protected_entries = 300;
    constexpr int64_t kTokens = 40000;
    Mirror k({kTokens, c.kv_heads, c.key_dim}, dtype), v({kTokens, c.kv_heads, c.value_dim}, dtype);
    Mirror q({kTokens, c.query_heads, c.key_dim}, dtype), out({kTokens, c.query_heads, c.value_dim}, dtype);
    for (Mirror* m : {&q, &k, &v}) m->Fill(rng);
    ExpressCache cpu, gpu, copied;
    ASSERT_OK(ExpressCache::Create(c, &cpu));
    ASSERT_OK(ExpressCache::Create(OnGpu(c), &gpu));
    ASSERT_OK(ExpressCache::Create(OnGpu(c), &copied));
    ASSERT_OK(cpu.Append(0, k.Cpu(), v.Cpu()));
    Prefill(gpu, 0, q, k, v, out, 0, kTokens);
    const std::vector<char> expected = Saved(cpu);
    EXPECT_EQ(Different(Saved(gpu), expected), 0);
    ASSERT_OK(copied.Copy(gpu));
    EXPECT_EQ(Different(Saved(copied), expected), 0);

    Mirror ok({c.kv_heads, c.budget, c.key_dim}, dtype), ov({c.kv_heads, c.budget, c.value_dim}, dtype);
    Mirror w({c.kv_heads, c.budget}, DType::kF32), p({c.kv_heads, c.budget}, DType::kI64);
    size_t bytes = 0;
    int64_t count = 0;
    ASSERT_OK(ExpressCache::CompressKvWorkspace(OnGpu(c), &bytes));
    void* scratch = nullptr;
    ASSERT_CUDA(cudaMalloc(&scratch, bytes));
    ASSERT_OK(ExpressCache::CompressKv(OnGpu(c), k.Gpu(), v.Gpu(), ok.Gpu(), ov.Gpu(), w.Gpu(), p.Gpu().get(), &count,
                                       {scratch, bytes}));
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    ASSERT_CUDA(cudaFree(scratch));
    const std::vector<int64_t> positions = p.Raw<int64_t>();
    for (int32_t g = 0; g < c.kv_heads; ++g) {
      std::vector<int64_t> held = Export(cpu, c, 0, g, DeviceType::kCpu).position;
      std::vector<int64_t> kept(positions.begin() + g * c.budget, positions.begin() + g * c.budget + count);
      std::sort(held.begin(), held.end());
      std::sort(kept.begin(), kept.end());
      EXPECT_TRUE(held == kept);
    }
  }
}

// Caches of one batch may differ in scores; and replayed steps are what eager ones are.
TEST_F(RotaryTest, BatchesAndGraphs) {
  std::mt19937 rng(3);
  const Rotary rotary(32), partly(20);
  std::vector<Config> configs(3, SmallConfig(DType::kBF16, rotary, RopeLayout::kHalves));
  configs[1].protection_score = ProtectionScore::kEnergy;
  configs[1].rope_frequencies = {};
  configs[2].rope_frequencies = partly.frequency;
  configs[2].rope_layout = RopeLayout::kInterleaved;
  std::vector<ExpressCache> cpu(3), gpu(3);
  std::vector<ExpressCache*> pointers;
  for (size_t i = 0; i < 3; ++i) {
    ASSERT_OK(ExpressCache::Create(configs[i], &cpu[i]));
    ASSERT_OK(ExpressCache::Create(OnGpu(configs[i]), &gpu[i]));
    pointers.push_back(&gpu[i]);
  }
  const Config& c = configs[0];
  Mirror k({3, c.kv_heads, c.key_dim}, c.dtype), v({3, c.kv_heads, c.value_dim}, c.dtype);
  constexpr int64_t kEager = 500, kReplayed = 200;
  for (int64_t t = 0; t < kEager; ++t) {
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    for (Mirror* m : {&k, &v}) m->Fill(rng);
    for (int32_t layer = 0; layer < c.layers; ++layer) {
      ASSERT_OK(ExpressCache::AppendBatch(pointers, layer, k.Gpu(), v.Gpu()));
      for (size_t i = 0; i < 3; ++i)
        ASSERT_OK(cpu[i].Append(layer, k.Cpu(static_cast<int64_t>(i), 1), v.Cpu(static_cast<int64_t>(i), 1)));
    }
  }
  for (size_t i = 0; i < 3; ++i) EXPECT_EQ(Different(Saved(gpu[i]), Saved(cpu[i])), 0) << i;

  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  ASSERT_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
  for (int32_t layer = 0; layer < c.layers; ++layer) ASSERT_OK(gpu[0].Append(layer, k.Gpu(0, 1), v.Gpu(0, 1)));
  ASSERT_CUDA(cudaStreamEndCapture(stream_, &graph));
  ASSERT_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  for (int64_t t = 0; t < kReplayed; ++t) {
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    for (Mirror* m : {&k, &v}) m->Fill(rng);
    ASSERT_OK(gpu[0].StepPrepare(1));
    ASSERT_CUDA(cudaGraphLaunch(exec, stream_));
    for (int32_t layer = 0; layer < c.layers; ++layer) ASSERT_OK(cpu[0].Append(layer, k.Cpu(0, 1), v.Cpu(0, 1)));
  }
  ASSERT_CUDA(cudaStreamSynchronize(stream_));
  EXPECT_EQ(Different(Saved(gpu[0]), Saved(cpu[0])), 0);
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
}

}  // namespace
}  // namespace express
