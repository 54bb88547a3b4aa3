// Observed budgets on a GPU: masses and budgets as on the CPU, and arrays that move within their memory.
#include <algorithm>
#include <memory>

#include "src/cache/budgets.h"
#include "tests/cuda/testing.h"

namespace express {
namespace {

Config ObservedConfig(DType dtype, int64_t mean) {
  Config c;
  c.layers = 2;
  c.query_heads = 6;
  c.kv_heads = 3;
  c.key_dim = c.value_dim = 64;
  c.dtype = dtype;
  c.budget = mean;
  c.prefill_block = 64;
  c.seed = 5;
  c.threads = 2;
  c.head_budgets = HeadBudgets::kObserved;
  return c;
}

// Queries, keys and values of every layer; heads look far to different degrees.
struct Inputs {
  Config config;
  int64_t tokens;
  std::vector<std::unique_ptr<Mirror>> q, k, v;
  Inputs(const Config& c, int64_t n, unsigned seed) : config(c), tokens(n) {
    std::mt19937 rng(seed);
    for (int32_t layer = 0; layer < c.layers; ++layer) {
      q.push_back(std::make_unique<Mirror>(std::vector<int64_t>{n, c.query_heads, c.key_dim}, c.dtype));
      k.push_back(std::make_unique<Mirror>(std::vector<int64_t>{n, c.kv_heads, c.key_dim}, c.dtype));
      v.push_back(std::make_unique<Mirror>(std::vector<int64_t>{n, c.kv_heads, c.value_dim}, c.dtype));
      k.back()->Fill(rng);
      v.back()->Fill(rng);
      FillQueries(layer, rng);
    }
  }
  // Head g's queries are its own keys, more or less of them: more attention to the token itself, less to all others.
  void FillQueries(int32_t layer, std::mt19937& rng) {
    const std::vector<float> keys = k[static_cast<size_t>(layer)]->Floats();
    std::vector<float> x;
    std::normal_distribution<float> normal(0, 1);
    const int32_t group = config.query_heads / config.kv_heads;
    for (int64_t t = 0; t < tokens; ++t)
      for (int32_t h = 0; h < config.query_heads; ++h) {
        const int64_t g = h / group;
        const float self = 0.25f * static_cast<float>((g + layer) % 4);
        for (int32_t i = 0; i < config.key_dim; ++i)
          x.push_back(self * keys[static_cast<size_t>((t * config.kv_heads + g) * config.key_dim + i)] +
                      0.3f * normal(rng));
      }
    Mirror& to = *q[static_cast<size_t>(layer)];
    cpu::Convert(x.data(), DType::kF32, to.host(), to.dtype(), to.count());
    to.Upload();
  }
};

// A cache on one of the devices, and what it needs to be fed.
class Fed {
 public:
  Fed(const Inputs& inputs, DeviceType device, cudaStream_t stream)
      : inputs_(inputs),
        config_(inputs.config),
        out_({inputs.tokens, config_.query_heads, config_.value_dim}, config_.dtype) {
    config_.device_type = device;
    if (device == DeviceType::kCuda) config_.stream = stream;
    // What creation finds is not zeros.
    void* poison = nullptr;
    int64_t bytes = 0;
    EXPECT_OK(ExpressCache::Size(config_, &bytes, nullptr));
    if (on_gpu()) {
      EXPECT_EQ(cudaMalloc(&poison, static_cast<size_t>(bytes)), cudaSuccess);
      EXPECT_EQ(cudaMemset(poison, 0xFF, static_cast<size_t>(bytes)), cudaSuccess);
      EXPECT_EQ(cudaFree(poison), cudaSuccess);
    }
    EXPECT_OK(ExpressCache::Create(config_, &cache));
    int64_t now = 0;
    EXPECT_OK(cache.Bytes(&now));
    EXPECT_EQ(now, bytes);
    if (on_gpu()) {
      EXPECT_OK(cache.WorkspaceSize(inputs.tokens, &workspace_.bytes));
      EXPECT_EQ(cudaMalloc(&workspace_.data, workspace_.bytes), cudaSuccess);
      EXPECT_EQ(cudaMemset(workspace_.data, 0xFF, workspace_.bytes), cudaSuccess);
    }
  }
  ~Fed() { cudaFree(workspace_.data); }
  Fed(const Fed&) = delete;
  Fed& operator=(const Fed&) = delete;

  // Tokens [begin, end) of the inputs: prompts of `chunk` tokens, or one by one.
  void Feed(int64_t begin, int64_t end, int64_t chunk) {
    for (int64_t at = begin; at < end; at += chunk)
      for (int32_t layer = 0; layer < config_.layers; ++layer) Call(layer, at, std::min(chunk, end - at));
  }
  void Call(int32_t layer, int64_t at, int64_t n) {
    const auto part = [&](Mirror& m) { return m.On(config_.device_type, at, n); };
    const auto l = static_cast<size_t>(layer);
    if (n > 1) {
      ASSERT_OK(cache.Prefill(layer, part(*inputs_.q[l]), part(*inputs_.k[l]), part(*inputs_.v[l]), part(out_), nullptr,
                              on_gpu() ? &workspace_ : nullptr));
    } else {
      ASSERT_OK(cache.Append(layer, part(*inputs_.k[l]), part(*inputs_.v[l])));
      ASSERT_OK(cache.Attend(layer, part(*inputs_.q[l]), part(out_)));
    }
  }
  std::vector<char> Saved() const { return express::Saved(cache); }
  // As save.cc writes them.
  std::vector<cache::Observed> Observed() const {
    const std::vector<char> data = Saved();
    const auto heads = static_cast<size_t>(config_.layers * config_.kv_heads);
    std::vector<cache::Observed> seen(heads);
    std::memcpy(seen.data(), data.data() + 40 + heads * sizeof(int64_t), heads * sizeof(cache::Observed));
    return seen;
  }
  std::vector<int64_t> Entries() const {
    std::vector<int64_t> entries;
    for (int32_t layer = 0; layer < config_.layers; ++layer)
      for (int32_t g = 0; g < config_.kv_heads; ++g) {
        entries.push_back(0);
        EXPECT_OK(cache.Entries(layer, g, &entries.back()));
      }
    return entries;
  }
  Held Export(int32_t layer, int32_t g) const { return express::Export(cache, config_, layer, g, config_.device_type); }
  // Every entry is the token it says it is (position % rows of the inputs), the weights sum to the tokens, the last ones are there.
  void Check(int64_t tokens) const {
    for (int32_t layer = 0; layer < config_.layers; ++layer) {
      const std::vector<float> k = inputs_.k[static_cast<size_t>(layer)]->Floats(),
                               v = inputs_.v[static_cast<size_t>(layer)]->Floats();
      for (int32_t g = 0; g < config_.kv_heads; ++g) {
        const Held held = Export(layer, g);
        ASSERT_EQ(WeightSum(held), static_cast<double>(tokens));
        int64_t wrong = 0;
        const auto compare = [&](const std::vector<float>& got, const std::vector<float>& of, size_t i, int64_t dim) {
          const float* stored = &got[i * static_cast<size_t>(dim)];
          const float* token = &of[static_cast<size_t>((held.position[i] * config_.kv_heads + g) * dim)];
          float largest = 0;
          for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::abs(token[d]));
          const float step = config_.dtype == DType::kI8 ? largest / 254 * (1 + 1.0f / 128) : 0;
          for (int64_t d = 0; d < dim; ++d) wrong += !(std::abs(stored[d] - token[d]) <= step);
        };
        for (size_t i = 0; i < held.position.size(); ++i) {
          compare(held.k, k, i, config_.key_dim);
          compare(held.v, v, i, config_.value_dim);
        }
        ASSERT_EQ(wrong, 0) << "layer " << layer << " head " << g << " at " << tokens;
        std::vector<int64_t> positions = held.position;
        std::sort(positions.begin(), positions.end());
        ASSERT_EQ(std::unique(positions.begin(), positions.end()), positions.end());
        for (int64_t t = std::max<int64_t>(0, tokens - 4); t < tokens; ++t)
          ASSERT_TRUE(std::binary_search(positions.begin(), positions.end(), t)) << t << " of " << tokens;
      }
    }
  }

  bool on_gpu() const { return config_.device_type == DeviceType::kCuda; }
  const Config& config() const { return config_; }
  Mirror& out() { return out_; }
  ExpressCache cache;

 private:
  const Inputs& inputs_;
  Config config_;
  Mirror out_;
  Workspace workspace_{};
};

class ObservedTest : public CudaTest {
 protected:
  void ExpectSame(const Fed& a, const Fed& b, int* same, int* all) {
    for (int32_t layer = 0; layer < a.config().layers; ++layer)
      for (int32_t g = 0; g < a.config().kv_heads; ++g) {
        const Held x = a.Export(layer, g), y = b.Export(layer, g);
        ASSERT_EQ(x.log_weight, y.log_weight) << "layer " << layer << " head " << g;
        ++*all;
        *same += x == y;
      }
  }
};

TEST_F(ObservedTest, MassesAsOnTheCpu) {
  double worst = 0;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kI8})
    for (const int32_t dim : {64, 80, 128, 192, 256})
      for (const int32_t group : {1, 4, 20})
        for (const int64_t chunk : {1, 32, 1000}) {
          if (dtype != DType::kBF16 && (dim == 80 || dim == 192 || group == 20)) continue;
          Config c = ObservedConfig(dtype, 128);
          c.kv_heads = 2;
          c.query_heads = 2 * group;
          c.key_dim = dim;
          c.value_dim = dim == 192 ? 128 : dim;
          const Inputs inputs(c, 112, static_cast<unsigned>(dim + group));
          Fed cpu(inputs, DeviceType::kCpu, stream_), gpu(inputs, DeviceType::kCuda, stream_);
          cpu.Feed(0, 112, chunk);
          gpu.Feed(0, 112, chunk);
          const auto a = cpu.Observed(), b = gpu.Observed();
          for (size_t h = 0; h < a.size(); ++h) {
            ASSERT_EQ(a[h].tokens, b[h].tokens) << "dim " << dim << " group " << group << " chunk " << chunk;
            ASSERT_GE(a[h].tokens, 3u);
            const double x = static_cast<double>(a[h].far) / static_cast<double>(a[h].tokens) / cache::kFarUnit,
                         y = static_cast<double>(b[h].far) / static_cast<double>(b[h].tokens) / cache::kFarUnit;
            if (dtype != DType::kI8) worst = std::max(worst, std::abs(x - y) / x);
            // Of a prompt in 8 bits the CPU sees the tokens of the block at hand as they came.
            const double tolerance = dtype == DType::kI8 && chunk > 1 ? 5e-3 : 2e-4;
            EXPECT_NEAR(x, y, tolerance * x)
                << "dim " << dim << " group " << group << " chunk " << chunk << " head " << h;
            EXPECT_GT(x, 0.001);
          }
        }
  std::printf("masses differ by at most %.1e of themselves\n", worst);
}

TEST_F(ObservedTest, BudgetsAsOnTheCpu) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8})
    for (const int64_t chunk : {1, 16, 64}) {
      const Config c = ObservedConfig(dtype, 128);
      const Inputs inputs(c, 1100, 3);
      Fed cpu(inputs, DeviceType::kCpu, stream_), gpu(inputs, DeviceType::kCuda, stream_);
      for (int64_t at = 0; at < 1024; at += 64) {
        cpu.Feed(at, at + 64, chunk);
        gpu.Feed(at, at + 64, chunk);
        if (at % 256 == 192) gpu.Check(at + 64);
      }
      const auto a = cpu.Entries(), b = gpu.Entries();
      for (size_t h = 0; h < a.size(); ++h) EXPECT_NEAR(static_cast<double>(a[h]), static_cast<double>(b[h]), 4);
      EXPECT_GT(*std::max_element(b.begin(), b.end()), 2 * *std::min_element(b.begin(), b.end()));
      int64_t bytes = 0, before = 0;
      ASSERT_OK(ExpressCache::Size(gpu.config(), &before, nullptr));
      ASSERT_OK(gpu.cache.Bytes(&bytes));
      EXPECT_EQ(bytes, before);
      Stats stats;
      ASSERT_OK(gpu.cache.GetStats(kAllLayers, &stats));
      EXPECT_LE(stats.entries_budget, 128 * 6);
      EXPECT_GT(stats.entries_budget, 128 * 6 - 6);
    }
}

// From the same masses on both devices come the same budgets, and then the same entries, from settling to settling.
TEST_F(ObservedTest, ContentsAsOnTheCpu) {
  int same = 0, all = 0;
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16, DType::kI8})
    for (const int64_t mean : {48, 128, 320}) {
      Config c = ObservedConfig(dtype, mean);
      if (mean == 320) c.layers = 3, c.rollback_reserve = 8;
      static constexpr float kFrequencies[] = {1, 0.7f, 0.5f, 0.2f, 0.1f, 0.01f, 0.001f, 0};
      if (mean == 128) c.rope_frequencies = kFrequencies;
      const int64_t tokens = 6 * mean, saved = mean - mean / 16;
      const Inputs inputs(c, tokens, static_cast<unsigned>(mean));
      Fed cpu(inputs, DeviceType::kCpu, stream_), gpu(inputs, DeviceType::kCuda, stream_);
      cpu.Feed(0, mean - mean / 8, 8);
      for (int64_t at = mean - mean / 8; at < saved; ++at) cpu.Feed(at, at + 1, 1);
      const std::vector<char> data = cpu.Saved();
      gpu.Feed(0, 3 * mean, 16);  // has other budgets by then
      ASSERT_OK(gpu.cache.Load(data.data(), data.size()));
      EXPECT_EQ(gpu.Saved(), data);
      for (int64_t at = saved; at < tokens;) {
        const int64_t n = std::min<int64_t>(tokens - at, at % 3 == 0 ? 1 : 37);
        cpu.Feed(at, at + n, n);
        gpu.Feed(at, at + n, n);
        at += n;
        ASSERT_EQ(cpu.Entries(), gpu.Entries()) << "mean " << mean << " at " << at;
      }
      gpu.Check(tokens);
      ExpectSame(cpu, gpu, &same, &all);
    }
  std::printf("%d of %d heads hold the same entries as on the CPU\n", same, all);
  EXPECT_GE(same, all * 9 / 10);
}

TEST_F(ObservedTest, SavedLoadedAndCopiedCachesGoOn) {
  for (const int64_t before : {50, 100, 113, 119, 121, 130, 260, 700}) {
    SCOPED_TRACE(before);
    const Config c = ObservedConfig(DType::kBF16, 128);
    const Inputs inputs(c, before + 400, 9);
    Fed gpu(inputs, DeviceType::kCuda, stream_), loaded(inputs, DeviceType::kCuda, stream_);
    Fed copied(inputs, DeviceType::kCuda, stream_), cpu(inputs, DeviceType::kCpu, stream_);
    gpu.Feed(0, before, 10);
    loaded.Feed(0, 450, 30);
    copied.Feed(0, before / 2, 1);
    ASSERT_OK(copied.cache.Copy(gpu.cache));
    const std::vector<char> data = gpu.Saved();
    EXPECT_EQ(copied.Saved(), data);
    ASSERT_OK(cpu.cache.Load(data.data(), data.size()));
    EXPECT_EQ(cpu.Saved(), data);
    ASSERT_OK(loaded.cache.Load(data.data(), data.size()));
    EXPECT_EQ(loaded.Saved(), data);
    for (Fed* fed : {&gpu, &loaded, &copied}) {
      fed->Feed(before, before + 200, 1);
      fed->Feed(before + 200, before + 400, 50);
      fed->Check(before + 400);
    }
    EXPECT_EQ(loaded.Saved(), gpu.Saved());
    EXPECT_EQ(copied.Saved(), gpu.Saved());
  }
}

TEST_F(ObservedTest, ResetIsAsNew) {
  const Config c = ObservedConfig(DType::kBF16, 128);
  const Inputs inputs(c, 900, 11);
  Fed gpu(inputs, DeviceType::kCuda, stream_);
  gpu.Feed(0, 900, 20);
  const std::vector<char> first = gpu.Saved();
  ASSERT_OK(gpu.cache.Reset());
  gpu.Feed(0, 900, 20);
  EXPECT_EQ(gpu.Saved(), first);
}

// One step of a cache as a graph: its rows of q, k, v and out lie at fixed places.
class Replay {
 public:
  Replay(const Inputs& inputs, Fed& fed, cudaStream_t stream) : inputs_(inputs), stream_(stream) {
    const Config& c = inputs.config;
    for (int32_t layer = 0; layer < c.layers; ++layer)
      for (const int32_t heads : {c.query_heads, c.kv_heads, c.kv_heads, c.query_heads})
        rows_.push_back(std::make_unique<Mirror>(std::vector<int64_t>{1, heads, c.key_dim}, c.dtype));
    EXPECT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), cudaSuccess);
    for (int32_t layer = 0; layer < c.layers; ++layer) {
      EXPECT_OK(fed.cache.Append(layer, row(layer, 1).Gpu(), row(layer, 2).Gpu()));
      EXPECT_OK(fed.cache.Attend(layer, row(layer, 0).Gpu(), row(layer, 3).Gpu()));
    }
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph_), cudaSuccess);
    EXPECT_EQ(cudaGraphInstantiate(&exec_, graph_, 0), cudaSuccess);
  }
  ~Replay() {
    cudaGraphExecDestroy(exec_);
    cudaGraphDestroy(graph_);
  }
  Replay(const Replay&) = delete;
  Replay& operator=(const Replay&) = delete;

  // Of token t of the inputs.
  void Step(int64_t t) {
    for (int32_t layer = 0; layer < inputs_.config.layers; ++layer) {
      const auto l = static_cast<size_t>(layer);
      const Mirror* from[] = {inputs_.q[l].get(), inputs_.k[l].get(), inputs_.v[l].get()};
      for (int i = 0; i < 3; ++i) {
        const int64_t bytes = row(layer, i).count() * SizeOf(row(layer, i).dtype());
        ASSERT_CUDA(cudaMemcpyAsync(row(layer, i).device(), static_cast<char*>(from[i]->device()) + t * bytes,
                                    static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream_));
      }
    }
    ASSERT_CUDA(cudaGraphLaunch(exec_, stream_));
  }
  Mirror& row(int32_t layer, int i) { return *rows_[static_cast<size_t>(4 * layer + i)]; }

 private:
  const Inputs& inputs_;
  cudaStream_t stream_;
  std::vector<std::unique_ptr<Mirror>> rows_;  // q, k, v, out of every layer
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

// A graph captured before anything was settled, or after, is replayed across all settlings.
TEST_F(ObservedTest, GraphsStayValid) {
  constexpr int64_t kTokens = 900;
  for (const DType dtype : {DType::kBF16, DType::kF32, DType::kI8})
    for (const int64_t captured_at : {20, 300}) {
      const Config c = ObservedConfig(dtype, 128);
      const Inputs inputs(c, kTokens, 13);
      Fed eager(inputs, DeviceType::kCuda, stream_), graphed(inputs, DeviceType::kCuda, stream_);
      eager.Feed(0, captured_at, 1);
      graphed.Feed(0, captured_at, 1);
      Replay replay(inputs, graphed, stream_);
      // Prepared up to where something is due, so that both settle at the same tokens.
      const std::vector<int64_t> due{112, 120, 256, 512, kTokens};
      double worst = 0;
      for (int64_t t = captured_at, left = 0; t < kTokens; ++t, --left) {
        if (left == 0) {
          left = std::min<int64_t>(50, *std::upper_bound(due.begin(), due.end(), t) - t);
          ASSERT_CUDA(cudaStreamSynchronize(stream_));
          ASSERT_OK(graphed.cache.StepPrepare(left));
        }
        replay.Step(t);
        for (int32_t layer = 0; layer < c.layers; ++layer) eager.Call(layer, t, 1);
        if (t % 40 != 0 && left > 2) continue;
        ASSERT_CUDA(cudaStreamSynchronize(stream_));
        // Of the last layer, whose outputs are the last to be written; shares of work are cut otherwise in a graph.
        const std::vector<float> all = eager.out().Floats(), got = replay.row(c.layers - 1, 3).Floats();
        const auto begin = all.begin() + static_cast<std::ptrdiff_t>(static_cast<size_t>(t) * got.size());
        const std::vector<float> expected(begin, begin + static_cast<std::ptrdiff_t>(got.size()));
        const double error = RelativeError(got, expected);
        EXPECT_FALSE(std::isnan(error));
        worst = std::max(worst, error);
      }
      EXPECT_LT(worst, dtype == DType::kF32 ? 1e-5 : 8e-3);
      ASSERT_CUDA(cudaStreamSynchronize(stream_));
      EXPECT_EQ(graphed.Entries(), eager.Entries());
      EXPECT_EQ(graphed.Saved(), eager.Saved());
      graphed.Check(kTokens);
    }
}

// The same graph serves the next sequence; steps prepared past a settling put it off.
TEST_F(ObservedTest, GraphsServeTheNextSequence) {
  constexpr int64_t kTokens = 400;
  const Config c = ObservedConfig(DType::kBF16, 128);
  const Inputs inputs(c, kTokens, 19);
  Fed graphed(inputs, DeviceType::kCuda, stream_);
  graphed.Feed(0, 20, 10);
  Replay replay(inputs, graphed, stream_);
  graphed.Feed(20, 300, 10);
  ASSERT_OK(graphed.cache.Reset());
  for (int64_t t = 0; t < kTokens; ++t) {
    if (t % 64 == 0) {
      ASSERT_CUDA(cudaStreamSynchronize(stream_));
      ASSERT_OK(graphed.cache.StepPrepare(64));
    }
    replay.Step(t);
  }
  ASSERT_CUDA(cudaStreamSynchronize(stream_));
  ASSERT_OK(graphed.cache.StepCancel());
  graphed.Check(kTokens);
  const std::vector<int64_t> entries = graphed.Entries();
  EXPECT_GT(*std::max_element(entries.begin(), entries.end()), *std::min_element(entries.begin(), entries.end()) + 20);
}

TEST_F(ObservedTest, AutoIsFixedOnAGpu) {
  Config c = ObservedConfig(DType::kBF16, 128);
  c.device_type = DeviceType::kCuda;
  for (const HeadBudgets given : {HeadBudgets::kAuto, HeadBudgets::kFixed, HeadBudgets::kObserved}) {
    c.head_budgets = given;
    ExpressCache cache;
    ASSERT_OK(ExpressCache::Create(c, &cache));
    Stats stats;
    ASSERT_OK(cache.GetStats(kAllLayers, &stats));
    EXPECT_EQ(stats.head_budgets, given == HeadBudgets::kAuto ? HeadBudgets::kFixed : given);
  }
}

TEST_F(ObservedTest, BatchesOfCachesOfAnyLength) {
  const Config c = ObservedConfig(DType::kBF16, 96);
  constexpr int64_t kTokens = 500;
  constexpr size_t kCaches = 5;
  const Inputs inputs(c, kTokens + 200, 17);
  std::vector<std::unique_ptr<Fed>> batched, single;
  std::vector<ExpressCache*> pointers;
  std::vector<const ExpressCache*> const_pointers;
  for (size_t i = 0; i < kCaches; ++i) {
    for (auto* caches : {&batched, &single}) {
      caches->push_back(std::make_unique<Fed>(inputs, DeviceType::kCuda, stream_));
      caches->back()->Feed(0, 37 * static_cast<int64_t>(i), 37);
    }
    pointers.push_back(&batched[i]->cache);
    const_pointers.push_back(&batched[i]->cache);
  }
  Mirror k({kCaches, c.kv_heads, c.key_dim}, c.dtype), v({kCaches, c.kv_heads, c.value_dim}, c.dtype);
  Mirror q({kCaches, c.query_heads, c.key_dim}, c.dtype), out({kCaches, c.query_heads, c.value_dim}, c.dtype);
  const auto gather = [&](Mirror& to, Mirror& from, int64_t step) {
    const auto bytes = static_cast<size_t>(to.count() / static_cast<int64_t>(kCaches) * SizeOf(to.dtype()));
    for (size_t i = 0; i < kCaches; ++i)
      ASSERT_CUDA(cudaMemcpyAsync(
          static_cast<char*>(to.device()) + i * bytes,
          static_cast<char*>(from.device()) + static_cast<size_t>(step + 37 * static_cast<int64_t>(i)) * bytes, bytes,
          cudaMemcpyDeviceToDevice, stream_));
  };
  for (int64_t step = 0; step < kTokens; ++step)
    for (int32_t layer = 0; layer < c.layers; ++layer) {
      const auto l = static_cast<size_t>(layer);
      gather(k, *inputs.k[l], step);
      gather(v, *inputs.v[l], step);
      gather(q, *inputs.q[l], step);
      ASSERT_OK(ExpressCache::AppendBatch(pointers, layer, k.Gpu(), v.Gpu()));
      ASSERT_OK(ExpressCache::AttendBatch(const_pointers, layer, q.Gpu(), out.Gpu()));
      for (size_t i = 0; i < kCaches; ++i) single[i]->Call(layer, step + 37 * static_cast<int64_t>(i), 1);
    }
  ASSERT_CUDA(cudaStreamSynchronize(stream_));
  for (size_t i = 0; i < kCaches; ++i) {
    EXPECT_EQ(batched[i]->Saved(), single[i]->Saved()) << i;
    batched[i]->Check(kTokens + 37 * static_cast<int64_t>(i));
  }
}

// Any settings, any calls.
TEST_F(ObservedTest, RandomCallsKeepWhatTheySay) {
  for (unsigned seed = 0; seed < 14; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 rng(seed);
    const auto pick = [&](int64_t low, int64_t high) {
      return low + static_cast<int64_t>(rng() % static_cast<unsigned>(high - low + 1));
    };
    const DType types[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kI8};
    const int32_t dims[] = {64, 80, 128};
    Config c = ObservedConfig(types[rng() % 4], pick(40, 260));
    c.layers = static_cast<int32_t>(pick(1, 3));
    c.kv_heads = static_cast<int32_t>(c.layers == 1 ? pick(2, 4) : pick(1, 4));
    c.query_heads = c.kv_heads * static_cast<int32_t>(pick(1, 5));
    c.key_dim = c.value_dim = dims[rng() % 3];
    c.rollback_reserve = pick(0, 1) * 5;
    c.seed = seed;
    const int64_t most = 9 * c.budget;
    const Inputs inputs(c, most, seed + 100);
    Fed gpu(inputs, DeviceType::kCuda, stream_), other(inputs, DeviceType::kCuda, stream_);
    int64_t tokens = 0;
    while (tokens < most) {
      switch (pick(0, 9)) {
        case 0:
          if (c.rollback_reserve > 0 && tokens > 8) {
            int64_t available = 0;
            ASSERT_OK(gpu.cache.RollbackAvailable(&available));
            const int64_t back = std::min<int64_t>(3, available);
            ASSERT_OK(gpu.cache.Rollback(back));
            tokens -= back;
          }
          break;
        case 1:
          ASSERT_OK(gpu.cache.Compress(kAllLayers, pick(0, 20)));
          break;
        case 2: {
          const std::vector<char> data = gpu.Saved();
          if (pick(0, 1) == 0) {
            ASSERT_OK(gpu.cache.Load(data.data(), data.size()));
          } else {
            ASSERT_OK(other.cache.Copy(gpu.cache));
            EXPECT_EQ(other.Saved(), data);
            ASSERT_OK(gpu.cache.Copy(other.cache));
          }
          break;
        }
        case 3:
          if (pick(0, 20) == 0) {
            ASSERT_OK(gpu.cache.Reset());
            tokens = 0;
          }
          break;
        case 4:
        case 5: {
          const int64_t n = std::min(most - tokens, pick(2, c.budget));
          gpu.Feed(tokens, tokens + n, n);
          tokens += n;
          break;
        }
        default: {
          const int64_t n = std::min(most - tokens, pick(1, 40));
          gpu.Feed(tokens, tokens + n, 1);
          tokens += n;
        }
      }
      if (HasFatalFailure()) return;
    }
    gpu.Check(tokens);
    if (HasFatalFailure()) return;
  }
}

TEST_F(ObservedTest, BudgetsInBytesHold) {
  Config c = ObservedConfig(DType::kBF16, 128);
  c.device_type = DeviceType::kCuda;
  c.budget_unit = BudgetUnit::kBytes;
  c.budget = 3'000'000;
  int64_t bytes = 0, mean = 0;
  ASSERT_OK(ExpressCache::Size(c, &bytes, &mean));
  EXPECT_LE(bytes, c.budget);
  EXPECT_GT(mean, 128);
}

}  // namespace
}  // namespace express
