// Arrays on the device and pairs of caches, one on the CPU and one on the GPU, for the tests of CUDA caches.
#ifndef EXPRESS_TESTS_CUDA_TESTING_H_
#define EXPRESS_TESTS_CUDA_TESTING_H_

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "src/cpu/kernels.h"
#include "tests/testing.h"

namespace express {

#define ASSERT_CUDA(expression) ASSERT_EQ(expression, cudaSuccess) << #expression

// Skips, loudly, where there is no GPU.
class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0)
      GTEST_SKIP() << "NO NVIDIA GPU ON THIS MACHINE: THIS TEST DID NOT RUN";
    ASSERT_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  }
  void TearDown() override {
    if (stream_ == nullptr) return;
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    EXPECT_EQ(cudaStreamDestroy(stream_), cudaSuccess);
  }
  cudaStream_t stream_ = nullptr;
};

// A tensor on the host and on the device, poisoned with NaN until it is set. No tensor has 8 bits: where a cache has them, these are
// bf16.
class Mirror {
 public:
  Mirror(std::vector<int64_t> shape, DType dtype)
      : shape_(std::move(shape)), dtype_(dtype == DType::kI8 ? DType::kBF16 : dtype) {
    count_ = 1;
    for (const int64_t size : shape_) count_ *= size;
    host_.resize(static_cast<size_t>(count_ * SizeOf(dtype_)) + 16);
    std::memset(host_.data(), 0xFF, host_.size());
    EXPECT_EQ(cudaMalloc(&device_, host_.size()), cudaSuccess);
    Upload();
  }
  ~Mirror() { cudaFree(device_); }
  Mirror(const Mirror&) = delete;
  Mirror& operator=(const Mirror&) = delete;

  // Waits: a copy from pageable memory may return before it is done, and no other stream waits for it.
  void Upload() {
    EXPECT_EQ(cudaMemcpy(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  void Download() { EXPECT_EQ(cudaMemcpy(host_.data(), device_, host_.size(), cudaMemcpyDeviceToHost), cudaSuccess); }
  void Poison() {
    std::memset(host_.data(), 0xFF, host_.size());
    Upload();
  }
  // Gaussian, rounded to the type.
  void Fill(std::mt19937& rng, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> x(static_cast<size_t>(count_));
    for (float& y : x) y = normal(rng);
    cpu::Convert(x.data(), DType::kF32, host_.data(), dtype_, count_);
    Upload();
  }
  std::vector<float> Floats() {
    Download();
    std::vector<float> x(static_cast<size_t>(count_));
    cpu::Convert(host_.data(), dtype_, x.data(), DType::kF32, count_);
    return x;
  }
  template <class T>
  std::vector<T> Raw() {
    Download();
    const T* data = reinterpret_cast<const T*>(host_.data());
    return std::vector<T>(data, data + count_);
  }

  // Rows [first, first + rows) along the leading dimension.
  struct Part {
    Tensor tensor;
    std::vector<int64_t> shape;
    operator const Tensor&() {
      tensor.shape = shape.data();
      return tensor;
    }
    const Tensor* get() {
      tensor.shape = shape.data();
      return &tensor;
    }
  };
  Part On(DeviceType device, int64_t first, int64_t rows) {
    Part part{{}, shape_};
    part.shape[0] = rows;
    char* base = device == DeviceType::kCpu ? host_.data() : static_cast<char*>(device_);
    part.tensor = {base + first * count_ / shape_[0] * SizeOf(dtype_),
                   device,
                   0,
                   dtype_,
                   static_cast<int32_t>(shape_.size()),
                   nullptr,
                   nullptr};
    return part;
  }
  Part Gpu(int64_t first, int64_t rows) { return On(DeviceType::kCuda, first, rows); }
  Part Gpu() { return Gpu(0, shape_[0]); }
  Part Cpu(int64_t first, int64_t rows) { return On(DeviceType::kCpu, first, rows); }
  Part Cpu() { return Cpu(0, shape_[0]); }
  void* device() const { return device_; }
  void* host() { return host_.data(); }
  int64_t count() const { return count_; }
  DType dtype() const { return dtype_; }

 private:
  std::vector<int64_t> shape_;
  DType dtype_;
  int64_t count_;
  std::vector<char> host_;
  void* device_ = nullptr;
};

inline double RelativeError(const std::vector<float>& x, const std::vector<float>& reference) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += std::pow(static_cast<double>(x[i]) - static_cast<double>(reference[i]), 2);
    norm += std::pow(static_cast<double>(reference[i]), 2);
  }
  return std::sqrt(difference / norm);
}

// What one head holds, by slot.
struct Held {
  std::vector<float> k, v, log_weight;
  std::vector<int64_t> position;
  bool operator==(const Held&) const = default;
};

inline Held Export(const ExpressCache& cache, const Config& c, int32_t layer, int32_t head, DeviceType device) {
  int64_t count = 0;
  EXPECT_OK(cache.Entries(layer, head, &count));
  const int64_t rows = std::max<int64_t>(count, 1);
  const DType type = c.dtype == DType::kI8 ? DType::kF32 : c.dtype;  // in which a code times its scale is exact
  Mirror k({rows, c.key_dim}, type), v({rows, c.value_dim}, type), w({rows}, DType::kF32), p({rows}, DType::kI64);
  int64_t exported = 0;
  if (device == DeviceType::kCpu) {
    EXPECT_OK(cache.Export(layer, head, k.Cpu(), v.Cpu(), w.Cpu().get(), p.Cpu().get(), &exported));
    for (Mirror* m : {&k, &v, &w, &p}) m->Upload();
  } else {
    EXPECT_OK(cache.Export(layer, head, k.Gpu(), v.Gpu(), w.Gpu().get(), p.Gpu().get(), &exported));
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  EXPECT_EQ(exported, count);
  Held held{k.Floats(), v.Floats(), w.Floats(), p.Raw<int64_t>()};
  if (count == 0) held = Held();
  return held;
}

inline double WeightSum(const Held& held) {
  double sum = 0;
  for (const float w : held.log_weight) sum += std::round(std::exp(static_cast<double>(w)));
  return sum;
}

inline Config SmallConfig(DType dtype) {
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

}  // namespace express

#endif  // EXPRESS_TESTS_CUDA_TESTING_H_
