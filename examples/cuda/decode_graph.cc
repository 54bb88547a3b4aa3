// Decoding on a GPU with a CUDA graph: one step of all layers is captured once and replayed for every token, also for those
// in which halvings fall due.
//
//     c++ -std=c++17 decode_graph.cc $(pkg-config --cflags --libs express) -I/usr/local/cuda/include -L/usr/local/cuda/lib64 -lcudart
#include <cuda_runtime_api.h>
#include <express.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int32_t kLayers = 2, kQueryHeads = 8, kKvHeads = 2, kDim = 128, kBatch = 4;
constexpr int64_t kBudget = 512, kTokens = 4096, kAhead = 64;

void Check(express_status status, const char* call) {
  if (status == EXPRESS_STATUS_OK) return;
  std::fprintf(stderr, "%s: %s: %s\n", call, express_status_name(status), express_last_error());
  std::exit(1);
}
void Check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", call, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) Check(call, #call)

// One row of heads for each sequence, in device memory.
struct Rows {
  explicit Rows(int64_t heads) : shape{kBatch, heads, kDim} { CHECK(cudaMalloc(&data, Bytes())); }
  size_t Bytes() const { return static_cast<size_t>(kBatch * shape[1] * kDim) * sizeof(float); }
  express_tensor View() const { return {data, EXPRESS_DEVICE_CUDA, 0, EXPRESS_DTYPE_F32, 3, shape, nullptr}; }

  void* data = nullptr;
  int64_t shape[3];
};

// Stands in for the model of this token.
void Fill(const Rows& rows, uint32_t seed, cudaStream_t stream) {
  std::vector<float> values(rows.Bytes() / sizeof(float));
  for (float& x : values) {
    seed = seed * 1664525u + 1013904223u;
    x = static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;
  }
  CHECK(cudaMemcpyAsync(rows.data, values.data(), rows.Bytes(), cudaMemcpyHostToDevice, stream));
}

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("NO NVIDIA GPU ON THIS MACHINE: nothing was decoded\n");
    return 0;
  }
  cudaStream_t stream = nullptr;
  CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));

  express_config config = EXPRESS_CONFIG_INIT;
  config.layers = kLayers;
  config.query_heads = kQueryHeads;
  config.kv_heads = kKvHeads;
  config.key_dim = config.value_dim = kDim;
  config.dtype = EXPRESS_DTYPE_BF16;
  config.device_type = EXPRESS_DEVICE_CUDA;
  config.budget = kBudget;
  config.stream = stream;
  express_cache* caches[kBatch] = {};
  for (int32_t i = 0; i < kBatch; ++i) {
    config.seed = static_cast<uint64_t>(i);
    CHECK(express_create(&config, &caches[i]));
  }

  const Rows q(kQueryHeads), k(kKvHeads), v(kKvHeads), out(kQueryHeads);
  const express_tensor tq = q.View(), tk = k.View(), tv = v.View(), to = out.View();
  const auto all_layers = [&] {
    for (int32_t layer = 0; layer < kLayers; ++layer) {  // a model has its other kernels in between
      CHECK(express_append_batch(caches, kBatch, layer, &tk, &tv));
      CHECK(express_attend_batch(caches, kBatch, layer, &tq, &to, nullptr));
    }
  };
  // Once as it is, so that all kernels are loaded; and once for the graph.
  Fill(q, 1, stream), Fill(k, 2, stream), Fill(v, 3, stream);
  all_layers();
  for (express_cache* cache : caches) CHECK(express_reset(cache));
  cudaGraph_t graph = nullptr;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  all_layers();
  CHECK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t step = nullptr;
  CHECK(cudaGraphInstantiate(&step, graph, 0));

  for (int64_t token = 0; token < kTokens; ++token) {
    if (token % kAhead == 0) {  // plans the coming tokens, once those planned before have run
      CHECK(cudaStreamSynchronize(stream));
      for (express_cache* cache : caches) CHECK(express_step_prepare(cache, kAhead));
    }
    const auto seed = static_cast<uint32_t>(3 * token);
    Fill(q, seed, stream), Fill(k, seed + 1, stream), Fill(v, seed + 2, stream);
    CHECK(cudaGraphLaunch(step, stream));
  }
  CHECK(cudaStreamSynchronize(stream));

  int64_t entries = 0, bytes = 0;
  CHECK(express_entries(caches[0], 0, 0, &entries));
  CHECK(express_bytes(caches[0], &bytes));
  std::printf("%d sequences of %lld tokens: %lld entries per KV head, %lld bytes per sequence\n", kBatch,
              static_cast<long long>(kTokens), static_cast<long long>(entries), static_cast<long long>(bytes));

  CHECK(cudaGraphExecDestroy(step));
  CHECK(cudaGraphDestroy(graph));
  for (express_cache*& cache : caches) express_destroy(&cache);
  for (void* data : {q.data, k.data, v.data, out.data}) CHECK(cudaFree(data));
  CHECK(cudaStreamDestroy(stream));
  return 0;
}
