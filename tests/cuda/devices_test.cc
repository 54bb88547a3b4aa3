// Two devices, and two streams of one device, work independently: driven from one thread and from two, whatever device is
// current, and to the same bits as one device alone.
#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include "tests/cuda/testing.h"

namespace express {
namespace {

constexpr int64_t kPrompt = 300, kTokens = 900, kRows = 64, kCaptured = 200;

Config TestConfig() {
  Config c;
  c.layers = 2;
  c.query_heads = 8;
  c.kv_heads = 2;
  c.key_dim = c.value_dim = 64;
  c.dtype = DType::kBF16;
  c.budget = 160;
  c.prefill_block = 64;
  c.seed = 5;
  c.device_type = DeviceType::kCuda;
  return c;
}

// A cache on one device with its stream and tensors there, and a sequence that it is taken through in steps.
class Sequence {
 public:
  // The numbers are those of `seed`, on whatever device.
  Sequence(int32_t device, uint32_t seed) : config_(TestConfig()) {
    EXPECT_EQ(cudaSetDevice(device), cudaSuccess);
    EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
    config_.device_id = device;
    config_.stream = stream_;
    EXPECT_OK(ExpressCache::Create(config_, &cache_));
    std::mt19937 rng(seed);
    const auto make = [&](int64_t rows, int32_t heads) {
      return std::make_unique<Mirror>(std::vector<int64_t>{rows, heads, 64}, config_.dtype);
    };
    q_ = make(kPrompt, config_.query_heads), out_ = make(kPrompt, config_.query_heads);
    k_ = make(kPrompt, config_.kv_heads), v_ = make(kPrompt, config_.kv_heads);
    one_k_ = make(1, config_.kv_heads), one_v_ = make(1, config_.kv_heads);
    for (Mirror* m : {q_.get(), k_.get(), v_.get()}) m->Fill(rng);
    size_t bytes = 0;
    EXPECT_OK(cache_.WorkspaceSize(kPrompt, &bytes));
    workspace_ = std::make_unique<Mirror>(std::vector<int64_t>{static_cast<int64_t>(bytes / 4 + 1)}, DType::kF32);
    bytes_ = bytes;
  }
  ~Sequence() {
    EXPECT_EQ(cudaSetDevice(config_.device_id), cudaSuccess);
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    if (exec_ != nullptr) cudaGraphExecDestroy(exec_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
    cache_ = ExpressCache();
    EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
  }
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;

  Mirror::Part On(Mirror& mirror, int64_t first, int64_t rows) const {
    Mirror::Part part = mirror.Gpu(first, rows);
    part.tensor.device_id = config_.device_id;
    return part;
  }

  // Step 0 is a prompt; then tokens, the last kCaptured of them replayed from a graph. Nothing here waits but where steps are
  // prepared.
  static constexpr int64_t kSteps = 1 + kTokens;
  void Step(int64_t step) {
    if (step == 0) return Prompt();
    const int64_t token = step - 1;
    if (token < kTokens - kCaptured) return Token(token % kRows);
    if (token == kTokens - kCaptured) Capture();
    if ((token - (kTokens - kCaptured)) % 50 == 0) {
      EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
      EXPECT_OK(cache_.StepPrepare(50));
    }
    Copy(*one_k_, *k_, token % kRows);
    Copy(*one_v_, *v_, token % kRows);
    EXPECT_EQ(cudaGraphLaunch(exec_, stream_), cudaSuccess);
  }

  struct Result {
    std::vector<uint16_t> out;
    std::vector<char> saved;
    bool operator==(const Result&) const = default;
  };
  Result Finish() {
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    Result result;
    result.out = out_->Raw<uint16_t>();
    result.saved = Saved(cache_);
    return result;
  }
  void Load(const Result& from) { EXPECT_OK(cache_.Load(from.saved.data(), from.saved.size())); }
  void Token(int64_t row) {
    for (int32_t layer = 0; layer < config_.layers; ++layer) {
      EXPECT_OK(cache_.Append(layer, On(*k_, row, 1), On(*v_, row, 1)));
      EXPECT_OK(cache_.Attend(layer, On(*q_, row, 1), On(*out_, row + layer * kRows, 1)));
    }
  }

  ExpressCache& cache() { return cache_; }
  const Config& config() const { return config_; }
  Mirror& q() { return *q_; }
  Mirror& k() { return *k_; }
  Mirror& v() { return *v_; }
  Mirror& out() { return *out_; }
  Workspace workspace() { return {workspace_->device(), bytes_}; }

 private:
  void Prompt() {
    const Workspace scratch = workspace();
    for (int32_t layer = 0; layer < config_.layers; ++layer)
      EXPECT_OK(cache_.Prefill(layer, On(*q_, 0, kPrompt), On(*k_, 0, kPrompt), On(*v_, 0, kPrompt),
                               On(*out_, 0, kPrompt), nullptr, &scratch));
  }
  void Capture() {
    EXPECT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    for (int32_t layer = 0; layer < config_.layers; ++layer) {
      EXPECT_OK(cache_.Append(layer, On(*one_k_, 0, 1), On(*one_v_, 0, 1)));
      EXPECT_OK(cache_.Attend(layer, On(*q_, layer, 1), On(*out_, 200 + layer, 1)));
    }
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph_), cudaSuccess);
    EXPECT_EQ(cudaGraphInstantiate(&exec_, graph_, 0), cudaSuccess);
  }
  void Copy(Mirror& to, Mirror& from, int64_t row) {
    const auto bytes = static_cast<size_t>(to.count() * 2);
    EXPECT_EQ(cudaMemcpyAsync(to.device(), static_cast<char*>(from.device()) + static_cast<size_t>(row) * bytes, bytes,
                              cudaMemcpyDeviceToDevice, stream_),
              cudaSuccess);
  }

  Config config_;
  cudaStream_t stream_ = nullptr;
  ExpressCache cache_;
  std::unique_ptr<Mirror> q_, k_, v_, out_, one_k_, one_v_, workspace_;
  size_t bytes_ = 0;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

Sequence::Result Alone(int32_t device, uint32_t seed) {
  Sequence sequence(device, seed);
  for (int64_t step = 0; step < Sequence::kSteps; ++step) sequence.Step(step);
  return sequence.Finish();
}

class DevicesTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (IsSkipped()) return;
    int count = 0;
    ASSERT_CUDA(cudaGetDeviceCount(&count));
    if (count < 2) GTEST_SKIP() << "FEWER THAN TWO NVIDIA GPUS ON THIS MACHINE: THIS TEST DID NOT RUN";
    cudaDeviceProp properties[2];
    for (int i = 0; i < 2; ++i) ASSERT_CUDA(cudaGetDeviceProperties(&properties[i], i));
    alike_ = std::strcmp(properties[0].name, properties[1].name) == 0;
  }
  void TearDown() override {
    if (!IsSkipped()) {
      EXPECT_EQ(cudaSetDevice(0), cudaSuccess);
    }
    CudaTest::TearDown();
  }
  bool alike_ = false;  // the same kernels, so the same bits
};

TEST_F(DevicesTest, DrivenFromOneThread) {
  const Sequence::Result expected[2] = {Alone(0, 1), Alone(0, 2)};
  EXPECT_FALSE(expected[0] == expected[1]);
  std::mt19937 rng(3);
  Sequence zero(0, 1), one(1, 2);
  Sequence* sequences[2] = {&zero, &one};
  for (int64_t step[2] = {}; step[0] < Sequence::kSteps || step[1] < Sequence::kSteps;) {
    auto which = static_cast<int>(rng() % 2);
    if (step[which] == Sequence::kSteps) which = 1 - which;
    // Capture and copies of tokens are the caller's: there its device is current. Calls of the library need not care.
    const bool eager = step[which] < 1 + kTokens - kCaptured;
    const int current = eager ? static_cast<int>(rng() % 2) : which;
    ASSERT_CUDA(cudaSetDevice(current));
    sequences[which]->Step(step[which]++);
    int after = -1;
    ASSERT_CUDA(cudaGetDevice(&after));
    ASSERT_EQ(after, current);
  }
  for (int i = 0; i < 2; ++i) {
    const Sequence::Result got = sequences[i]->Finish();
    EXPECT_TRUE(!alike_ || got == expected[i]) << "device " << i;
  }
}

TEST_F(DevicesTest, DrivenFromTwoThreads) {
  const Sequence::Result expected[2] = {Alone(0, 1), Alone(0, 2)};
  Sequence::Result got[2];
  std::vector<std::thread> threads;
  for (int i = 0; i < 2; ++i) threads.emplace_back([&got, i] { got[i] = Alone(i, static_cast<uint32_t>(i + 1)); });
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 2; ++i) EXPECT_TRUE(!alike_ || got[i] == expected[i]) << "device " << i;
}

TEST_F(DevicesTest, SequencesMoveAsBytes) {
  Sequence zero(0, 1), one(1, 1);
  zero.Step(0);
  for (int64_t t = 0; t < 100; ++t) zero.Token(t % kRows);
  one.Load(zero.Finish());
  EXPECT_EQ(one.cache().Copy(zero.cache()).code(), StatusCode::kDeviceMismatch);
  for (int64_t t = 100; t < 300; ++t)
    for (Sequence* s : {&zero, &one}) s->Token(t % kRows);
  const Sequence::Result a = zero.Finish(), b = one.Finish();
  EXPECT_TRUE(!alike_ || a.saved == b.saved);
}

TEST_F(DevicesTest, TensorsOfTheOtherDeviceAreRefused) {
  Sequence zero(0, 1), one(1, 2);
  zero.Step(0);
  const Sequence::Result before = zero.Finish();
  const auto lie = [](Mirror::Part part, int32_t device) {
    part.tensor.device_id = device;
    return part;
  };
  const auto refused = [](const Status& status, const char* name) {
    EXPECT_EQ(status.code(), StatusCode::kDeviceMismatch) << status.message();
    EXPECT_NE(std::string(status.message()).find(name), std::string::npos) << status.message();
  };
  const auto k = [&] { return zero.On(zero.k(), 0, 1); };
  const auto v = [&] { return zero.On(zero.v(), 0, 1); };
  // As it is, and with memory of the other device given out for this one's.
  refused(zero.cache().Append(0, one.On(one.k(), 0, 1), v()), "k");
  refused(zero.cache().Append(0, lie(one.On(one.k(), 0, 1), 0), v()), "k");
  refused(zero.cache().Append(0, k(), lie(one.On(one.v(), 0, 1), 0)), "v");
  refused(zero.cache().Attend(0, lie(one.On(one.q(), 0, 1), 0), zero.On(zero.out(), 0, 1)), "q");
  refused(zero.cache().Attend(0, zero.On(zero.q(), 0, 1), lie(one.On(one.out(), 0, 1), 0)), "out");
  const Workspace scratch = one.workspace();
  refused(zero.cache().Prefill(0, zero.On(zero.q(), 0, kPrompt), zero.On(zero.k(), 0, kPrompt),
                               zero.On(zero.v(), 0, kPrompt), zero.On(zero.out(), 0, kPrompt), nullptr, &scratch),
          "workspace");
  ExpressCache* both[] = {&zero.cache(), &one.cache()};
  EXPECT_EQ(ExpressCache::AppendBatch(both, 0, zero.On(zero.k(), 0, 2), zero.On(zero.v(), 0, 2)).code(),
            StatusCode::kInvalidArgument);
  Config absent = zero.config();
  ASSERT_CUDA(cudaGetDeviceCount(&absent.device_id));
  ExpressCache none;
  EXPECT_EQ(ExpressCache::Create(absent, &none).code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(zero.Finish() == before);  // nothing changed
}

// One stream stands still while the other's cache works to the end.
class StreamsTest : public CudaTest {};

TEST_F(StreamsTest, DoNotWaitForEachOther) {
  const Sequence::Result expected = Alone(0, 2);
  std::atomic<bool> open = false;
  std::atomic<bool> timed_out = false;
  struct Gate {
    std::atomic<bool>*open, *timed_out;
  } gate{&open, &timed_out};
  Sequence held(0, 1);
  for (int64_t step = 0; step < 5; ++step) held.Step(step);
  Sequence free(0, 2);
  ASSERT_CUDA(cudaDeviceSynchronize());
  ASSERT_CUDA(cudaLaunchHostFunc(
      static_cast<cudaStream_t>(held.config().stream),
      [](void* data) {
        auto* g = static_cast<Gate*>(data);
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
        while (!*g->open && !*g->timed_out) {
          if (std::chrono::steady_clock::now() > end) *g->timed_out = true;
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        }
      },
      &gate));
  for (int64_t t = 0; t < 20; ++t) held.Token(t);
  for (int64_t step = 0; step < Sequence::kSteps; ++step) free.Step(step);
  const Sequence::Result got = free.Finish();
  EXPECT_FALSE(timed_out) << "a stream waited for another";
  EXPECT_EQ(cudaStreamQuery(static_cast<cudaStream_t>(held.config().stream)), cudaErrorNotReady);
  open = true;
  EXPECT_TRUE(got == expected);
  held.Finish();
}

}  // namespace
}  // namespace express
