// What holds of CUDA caches with no CPU cache beside them: graphs, batches, streams, errors, long streams of tokens.
#include <algorithm>
#include <string>

#include "tests/cuda/testing.h"

namespace express {
namespace {

class DeviceCacheTest : public CudaTest {};

// One step of a model: every layer appends and attends.
void Step(ExpressCache& cache, const Config& c, Mirror& k, Mirror& v, Mirror& q, Mirror& out, int64_t row) {
  for (int32_t layer = 0; layer < c.layers; ++layer) {
    ASSERT_OK(cache.Append(layer, k.Gpu(row, 1), v.Gpu(row, 1)));
    ASSERT_OK(cache.Attend(layer, q.Gpu(row, 1), out.Gpu(layer, 1)));
  }
}

// The second prompt of a length is not planned any more: what was recorded of the first one serves. Lengths of one span, of several,
// and of more than are recorded; heads of one kind, and of two.
TEST_F(DeviceCacheTest, PromptsFromARecordingAreTheSame) {
  std::mt19937 rng(12);
  for (const int64_t tokens : {1500, 9000, 30000, 34000})
    for (const bool two_kinds : {false, true}) {
      SCOPED_TRACE(testing::Message() << tokens << " tokens, kinds " << 1 + two_kinds);
      Config c = SmallConfig(DType::kBF16);
      const std::vector<float> shares = {1, 2, 2, 1};
      if (two_kinds) c.head_share = shares;
      c.device_type = DeviceType::kCuda;
      c.stream = stream_;
      ExpressCache cache;
      ASSERT_OK(ExpressCache::Create(c, &cache));
      Mirror k({tokens, c.kv_heads, c.key_dim}, c.dtype), v({tokens, c.kv_heads, c.value_dim}, c.dtype);
      Mirror q({tokens, c.query_heads, c.key_dim}, c.dtype), out({tokens, c.query_heads, c.value_dim}, c.dtype);
      for (Mirror* m : {&q, &k, &v}) m->Fill(rng);
      Workspace workspace{};
      ASSERT_OK(cache.WorkspaceSize(tokens, &workspace.bytes));
      ASSERT_CUDA(cudaMalloc(&workspace.data, workspace.bytes));
      std::vector<char> saved[3];
      std::vector<float> outputs[3];
      for (int round = 0; round < 3; ++round) {
        ASSERT_CUDA(cudaMemsetAsync(workspace.data, 0xFF, workspace.bytes, stream_));
        ASSERT_OK(cache.Reset());
        for (int32_t layer = 0; layer < c.layers; ++layer) {
          out.Poison();
          ASSERT_OK(cache.Prefill(layer, q.Gpu(), k.Gpu(), v.Gpu(), out.Gpu(), nullptr, &workspace));
        }
        saved[round] = Saved(cache);
        outputs[round] = out.Floats();
      }
      ASSERT_CUDA(cudaFree(workspace.data));
      for (int round = 1; round < 3; ++round) {
        EXPECT_TRUE(saved[round] == saved[0]);
        EXPECT_TRUE(outputs[round] == outputs[0]);
      }
    }
}

TEST_F(DeviceCacheTest, GraphReplayEqualsEagerCalls) {
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

TEST_F(DeviceCacheTest, BatchesEqualSingleCalls) {
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

TEST_F(DeviceCacheTest, ErrorsNameTheArgumentAndChangeNothing) {
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

TEST_F(DeviceCacheTest, LongStreamKeepsTheSumOfWeights) {
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

TEST_F(DeviceCacheTest, TwoStreamsWorkSideBySide) {
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
