// No call but creation, destruction and reset waits for the device or takes memory: proved twice. The linker puts counters
// in place of the runtime's functions that do so (see tests/CMakeLists.txt); and calls return while their stream is held up.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <map>
#include <string>
#include <thread>

#include "tests/cuda/testing.h"

namespace {

std::map<std::string, int>* g_calls = nullptr;  // counts, while not null
void Count(const char* name) {
  if (g_calls != nullptr) ++(*g_calls)[name];
}

}  // namespace

extern "C" {
#define EXPRESS_COUNTED(name, parameters, arguments) \
  cudaError_t __real_##name parameters;              \
  cudaError_t __wrap_##name parameters {             \
    Count(#name);                                    \
    return __real_##name arguments;                  \
  }
EXPRESS_COUNTED(cudaMalloc, (void** data, size_t size), (data, size))
EXPRESS_COUNTED(cudaMallocAsync, (void** data, size_t size, cudaStream_t stream), (data, size, stream))
EXPRESS_COUNTED(cudaMallocHost, (void** data, size_t size), (data, size))
EXPRESS_COUNTED(cudaHostAlloc, (void** data, size_t size, unsigned flags), (data, size, flags))
EXPRESS_COUNTED(cudaFree, (void* data), (data))
EXPRESS_COUNTED(cudaFreeAsync, (void* data, cudaStream_t stream), (data, stream))
EXPRESS_COUNTED(cudaFreeHost, (void* data), (data))
EXPRESS_COUNTED(cudaDeviceSynchronize, (), ())
EXPRESS_COUNTED(cudaStreamSynchronize, (cudaStream_t stream), (stream))
EXPRESS_COUNTED(cudaEventSynchronize, (cudaEvent_t event), (event))
EXPRESS_COUNTED(cudaMemcpy, (void* to, const void* from, size_t size, cudaMemcpyKind kind), (to, from, size, kind))
EXPRESS_COUNTED(cudaMemcpyAsync, (void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream),
                (to, from, size, kind, stream))
EXPRESS_COUNTED(cudaMemset, (void* to, int value, size_t size), (to, value, size))
#undef EXPRESS_COUNTED
}

namespace express {
namespace {

// The device waits here until it is let go, or for twenty seconds.
class Gate {
 public:
  void Close(cudaStream_t stream) { EXPECT_EQ(cudaLaunchHostFunc(stream, &Gate::Wait, this), cudaSuccess); }
  void Open() { open_ = true; }
  bool timed_out() const { return timed_out_; }

 private:
  static void CUDART_CB Wait(void* gate) {
    auto* self = static_cast<Gate*>(gate);
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    while (!self->open_) {
      if (std::chrono::steady_clock::now() > end) self->timed_out_ = self->open_ = true;
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  std::atomic<bool> open_ = false, timed_out_ = false;
};

TEST_F(CudaTest, CallsNeitherWaitNorTakeMemory) {
  std::mt19937 rng(3);
  Config c;
  c.layers = 2;
  c.query_heads = 4;
  c.kv_heads = 2;
  c.key_dim = c.value_dim = 64;
  c.budget = 96;
  c.rollback_reserve = 4;
  c.prefill_block = 64;
  c.head_budgets = HeadBudgets::kFixed;
  c.dtype = DType::kBF16;
  c.device_type = DeviceType::kCuda;
  c.stream = stream_;
  constexpr int64_t kPrompt = 700;
  Mirror q({kPrompt, c.query_heads, c.key_dim}, c.dtype), k({kPrompt, c.kv_heads, c.key_dim}, c.dtype);
  Mirror v({kPrompt, c.kv_heads, c.value_dim}, c.dtype), out({kPrompt, c.query_heads, c.value_dim}, c.dtype);
  Mirror export_k({c.budget, c.key_dim}, c.dtype), export_v({c.budget, c.value_dim}, c.dtype);
  for (Mirror* m : {&q, &k, &v}) m->Fill(rng);
  void* scratch = nullptr;
  ExpressCache cache, other;
  size_t bytes = 0;
  // Everything once before it counts: kernels are loaded when they are first used.
  for (const bool counted : {false, true}) {
    ASSERT_OK(ExpressCache::Create(c, &cache));
    ASSERT_OK(ExpressCache::Create(c, &other));
    ASSERT_OK(cache.WorkspaceSize(kPrompt, &bytes));
    if (!counted) {
      ASSERT_CUDA(cudaMalloc(&scratch, bytes));
    }
    ASSERT_CUDA(cudaDeviceSynchronize());
    Gate gate;
    if (counted) gate.Close(stream_);
    std::map<std::string, int> calls;
    g_calls = &calls;
    const Workspace workspace{scratch, bytes};
    ExpressCache* const both[] = {&cache, &other};
    const ExpressCache* const const_both[] = {&cache, &other};
    for (int32_t layer = 0; layer < c.layers; ++layer) {
      EXPECT_OK(cache.Prefill(layer, q.Gpu(), k.Gpu(), v.Gpu(), out.Gpu(), nullptr, &workspace));
      EXPECT_OK(other.Append(layer, k.Gpu(0, 100), v.Gpu(0, 100)));
    }
    for (int64_t t = 0; t < 20; ++t)  // few: a stream holds about a thousand launches
      for (int32_t layer = 0; layer < c.layers; ++layer) {
        EXPECT_OK(ExpressCache::AppendBatch(both, layer, k.Gpu(0, 2), v.Gpu(0, 2)));
        EXPECT_OK(ExpressCache::AttendBatch(const_both, layer, q.Gpu(0, 2), out.Gpu(0, 2)));
      }
    EXPECT_OK(cache.Attend(0, q.Gpu(0, 3), out.Gpu(0, 3)));
    EXPECT_OK(cache.Compress(0, 8));
    EXPECT_OK(cache.Rollback(2));
    int64_t count = 0;
    EXPECT_OK(cache.Export(1, 0, export_k.Gpu(), export_v.Gpu(), nullptr, nullptr, &count));
    EXPECT_OK(cache.StepPrepare(3));
    g_calls = nullptr;
    gate.Open();
    EXPECT_FALSE(gate.timed_out()) << "a call waited for the device";
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    for (const auto& [name, times] : calls)
      if (counted) ADD_FAILURE() << name << " was called " << times << " times";
    cache = ExpressCache();
    other = ExpressCache();
  }
  ASSERT_CUDA(cudaFree(scratch));
}

// Nor does a cache that settles the budgets of its heads, if what it observed has arrived by then; else one call waits for that.
TEST_F(CudaTest, SettlingBudgetsWaitsForNothingButWhatWasObserved) {
  std::mt19937 rng(4);
  Config c;
  c.layers = 2;
  c.query_heads = 4;
  c.kv_heads = 2;
  c.key_dim = c.value_dim = 64;
  c.budget = 128;
  c.dtype = DType::kBF16;
  c.device_type = DeviceType::kCuda;
  c.stream = stream_;
  c.head_budgets = HeadBudgets::kObserved;
  Mirror q({130, c.query_heads, c.key_dim}, c.dtype), k({130, c.kv_heads, c.key_dim}, c.dtype);
  Mirror v({130, c.kv_heads, c.value_dim}, c.dtype), out({130, c.query_heads, c.value_dim}, c.dtype);
  for (Mirror* m : {&q, &k, &v}) m->Fill(rng);
  // KV head 0 looks at everything, KV head 1 at the token itself.
  std::vector<float> queries(static_cast<size_t>(q.count()));
  const std::vector<float> keys = k.Floats();
  for (size_t i = 0; i < queries.size(); ++i) {
    const size_t t = i / 256, h = i / 64 % 4, d = i % 64;
    queries[i] = h < 2 ? 0.0f : 4 * keys[(2 * t + 1) * 64 + d];
  }
  cpu::Convert(queries.data(), DType::kF32, q.host(), c.dtype, q.count());
  q.Upload();
  for (const int run : {0, 1, 2}) {  // to load kernels; counted; without the pause in which the masses arrive
    ExpressCache cache;
    ASSERT_OK(ExpressCache::Create(c, &cache));
    const auto feed = [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        for (int32_t layer = 0; layer < c.layers; ++layer) {
          EXPECT_OK(cache.Append(layer, k.Gpu(t, 1), v.Gpu(t, 1)));
          EXPECT_OK(cache.Attend(layer, q.Gpu(t, 1), out.Gpu(t, 1)));
        }
    };
    feed(0, run == 2 ? 110 : 115);
    ASSERT_CUDA(cudaDeviceSynchronize());
    Gate gate;
    std::map<std::string, int> calls;
    g_calls = &calls;
    if (run == 1) gate.Close(stream_);
    if (run == 2)
      for (int32_t layer = 0; layer < c.layers; ++layer)  // past both moments at once
        EXPECT_OK(cache.Append(layer, k.Gpu(110, 12), v.Gpu(110, 12)));
    feed(run == 2 ? 122 : 115, 125);
    g_calls = nullptr;
    gate.Open();
    EXPECT_FALSE(gate.timed_out()) << "a call waited for the device";
    ASSERT_CUDA(cudaStreamSynchronize(stream_));
    for (const auto& [name, times] : calls)
      if (run == 1) ADD_FAILURE() << name << " was called " << times << " times";
    if (run == 2) {
      EXPECT_LE(calls["cudaEventSynchronize"], 1);
      calls.erase("cudaEventSynchronize");
      EXPECT_TRUE(calls.empty());
    }
    int64_t entries[2] = {};
    for (int32_t g = 0; g < 2; ++g) EXPECT_OK(cache.Entries(0, g, &entries[g]));
    EXPECT_EQ(entries[0], 125);
    EXPECT_LT(entries[1], 64);
  }
}

// The counters count.
TEST_F(CudaTest, CreationIsSeen) {
  Config c;
  c.device_type = DeviceType::kCuda;
  c.key_dim = c.value_dim = 64;
  std::map<std::string, int> calls;
  g_calls = &calls;
  {
    ExpressCache cache;
    EXPECT_OK(ExpressCache::Create(c, &cache));
  }
  g_calls = nullptr;
  EXPECT_GE(calls["cudaMalloc"], 1);
  EXPECT_GE(calls["cudaFree"], 1);
}

}  // namespace
}  // namespace express
