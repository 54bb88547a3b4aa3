// Bytes: what is reported is what is allocated, a budget in bytes is met exactly, and nothing is allocated after
// creation.
#include <gtest/gtest.h>
#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "tests/cache/testing.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define EXPRESS_COUNTS_ALLOCATIONS 0  // the sanitizer owns malloc
#else
#define EXPRESS_COUNTS_ALLOCATIONS 1
namespace {
std::atomic<int64_t> allocations{0};
std::atomic<int64_t> allocated_bytes{0};
}  // namespace
extern "C" {
void* __libc_malloc(size_t);
void* __libc_memalign(size_t, size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* malloc(size_t bytes) {
  ++allocations;
  allocated_bytes += static_cast<int64_t>(bytes);
  return __libc_malloc(bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  ++allocations;
  allocated_bytes += static_cast<int64_t>(bytes);
  return __libc_memalign(alignment, bytes);
}
void* calloc(size_t count, size_t bytes) {
  ++allocations;
  allocated_bytes += static_cast<int64_t>(count * bytes);
  return __libc_calloc(count, bytes);
}
void* realloc(void* memory, size_t bytes) {
  ++allocations;
  return __libc_realloc(memory, bytes);
}
}
#endif

namespace express {
namespace {

Config Profile(Config c) {
  static const std::vector<float> share = {1, 3, 0, 2};
  c.head_share = share;
  return c;
}

// The fewest bytes that hold a legal cache, as the refusal of fewer says.
int64_t SmallestBytes(Config c) {
  c.budget_unit = BudgetUnit::kBytes;
  c.budget = 1000;
  const Status status = ExpressCache::Size(c, nullptr, nullptr);
  EXPECT_EQ(status.code(), StatusCode::kBudgetTooSmall);
  return std::stoll(status.message().substr(status.message().find("at least ") + 9));
}

TEST(Bytes, ABudgetInBytesIsTheLargestThatFits) {
  for (const bool profile : {false, true})
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kI8})
      for (const int64_t more_bytes : {0, 1, 5'000, 12'345, 1'000'000}) {
        Config c = SmallConfig();
        c.dtype = dtype;
        if (profile) c = Profile(c);
        const int64_t bytes = SmallestBytes(c) + more_bytes;
        c.budget_unit = BudgetUnit::kBytes;
        c.budget = bytes;
        int64_t solved = 0, mean = 0;
        ASSERT_OK(ExpressCache::Size(c, &solved, &mean));
        EXPECT_LE(solved, bytes);
        // No larger one fits, and this one takes what was said.
        c.budget_unit = BudgetUnit::kEntries;
        for (int64_t more = 0; more < 200; ++more) {
          c.budget = mean + more;
          int64_t size = 0;
          ASSERT_OK(ExpressCache::Size(c, &size, nullptr));
          if (more == 0) {
            EXPECT_EQ(size, solved);
          } else {
            EXPECT_GT(size, bytes) << mean << " + " << more;
          }
        }
      }
}

TEST(Bytes, TooFewBytesAreRefusedWithTheSmallestNumberThatWorks) {
  Config c = SmallConfig();
  c.budget_unit = BudgetUnit::kBytes;
  c.budget = SmallestBytes(c);
  EXPECT_OK(ExpressCache::Size(c, nullptr, nullptr));
  --c.budget;
  EXPECT_EQ(ExpressCache::Size(c, nullptr, nullptr).code(), StatusCode::kBudgetTooSmall);
}

// An entry in 8 bits is its codes and two scales of two bytes.
TEST(Bytes, AnEntryInEightBits) {
  const auto of = [](DType dtype, int64_t budget) {
    Config c = SmallConfig();
    c.dtype = dtype;
    c.budget = budget;
    int64_t bytes = 0;
    EXPECT_OK(ExpressCache::Size(c, &bytes, nullptr));
    return bytes;
  };
  const Config c = SmallConfig();
  const int64_t dims = c.key_dim + c.value_dim, entries = c.layers * c.kv_heads * 1024;
  EXPECT_EQ(of(DType::kBF16, 1024) - of(DType::kI8, 1024), entries * (2 * dims - (dims + 4)));
}

// One head may get nearly all of the budget.
TEST(Bytes, ABudgetInBytesWithUnevenShares) {
  static const std::vector<float> share = {1, 1, 1, 5000};
  Config c = SmallConfig();
  c.head_share = share;
  c.budget_unit = BudgetUnit::kBytes;
  c.budget = 1 << 20;
  int64_t bytes = 0, mean = 0;
  ASSERT_OK(ExpressCache::Size(c, &bytes, &mean));
  EXPECT_LE(bytes, c.budget);
  EXPECT_GT(mean, 1000);
}

TEST(Bytes, BytesNeverChange) {
  const Config c = SmallConfig();
  int64_t said = 0, bytes = 0;
  ASSERT_OK(ExpressCache::Size(c, &said, nullptr));
  ExpressCache cache;
  ASSERT_OK(ExpressCache::Create(c, &cache));
  const Stream s(c, 2000);
  for (int64_t n = 0; n < s.n; n += 100) {
    ASSERT_OK(cache.Bytes(&bytes));
    ASSERT_EQ(bytes, said);
    ASSERT_OK(Append(cache, c, 0, s, n, n + 100));
  }
}

#if EXPRESS_COUNTS_ALLOCATIONS
TEST(Bytes, CreationAllocatesWhatIsReportedAndNothingIsAllocatedLater) {
  for (int kind = 0; kind < 5; ++kind) {
    Config c = SmallConfig();
    c.schedule = kind == 0 ? Schedule::kRounds : Schedule::kBudget;
    c.head_budgets = kind == 2 || kind == 4 ? HeadBudgets::kObserved : HeadBudgets::kFixed;
    c.dtype = kind >= 3 ? DType::kI8 : DType::kF32;
    c.budget = 500;
    c.rollback_reserve = 4;
    const Stream s(c, 3000);
    int64_t said = 0;
    ASSERT_OK(ExpressCache::Size(c, &said, nullptr));
    const struct mallinfo2 before = mallinfo2();
    ExpressCache cache;
    ASSERT_OK(ExpressCache::Create(c, &cache));
    const struct mallinfo2 after = mallinfo2();
    const auto taken =
        static_cast<int64_t>(after.uordblks + after.hblkhd) - static_cast<int64_t>(before.uordblks + before.hblkhd);
    EXPECT_GE(taken, said);
    EXPECT_LE(taken, said + 2 * 4096);  // the allocator's own page and header

    Output out{std::vector<float>(static_cast<size_t>(s.n * c.query_heads * c.value_dim)), {}};
    const int64_t shape_q[] = {s.n, c.query_heads, c.key_dim}, shape_o[] = {s.n, c.query_heads, c.value_dim};
    const int64_t shape_k[] = {s.n, c.kv_heads, c.key_dim}, shape_v[] = {s.n, c.kv_heads, c.value_dim};
    const auto tensor = [](const std::vector<float>& data, const int64_t* shape) {
      return Tensor{const_cast<float*>(data.data()), DeviceType::kCpu, 0, DType::kF32, 3, shape, nullptr};
    };
    const Tensor q = tensor(s.q, shape_q), k = tensor(s.k, shape_k), v = tensor(s.v, shape_v),
                 o = tensor(out.out, shape_o);
    const auto work = [&] {
      bool ok = cache.Prefill(0, q, k, v, o).ok() && cache.Prefill(1, q, k, v, o).ok() && cache.Attend(0, q, o).ok();
      ok =
          ok && cache.Prefill(0, q, k, v, o).ok() && cache.Append(1, k, v).ok();  // observed budgets are settled before
      return ok && cache.Compress(kAllLayers, 3).ok() && cache.Rollback(2).ok() && cache.Reset().ok();
    };
    ASSERT_TRUE(work());  // the first time Highway looks at the processor
    const int64_t count = allocations;
    ASSERT_TRUE(work());
    EXPECT_EQ(allocations - count, 0) << "shape messages included: CheckTensor must not build strings on success";
  }
}
#endif

// Bytes beside keys and values, as a share of them, with one thread and with more.
void ExpectBeside(Config c, double one_thread, int32_t many, double many_threads) {
  const auto entries = static_cast<double>(int64_t{c.layers} * c.kv_heads * c.budget * (c.key_dim + c.value_dim) * 2);
  const auto beside = [&](int32_t threads) {
    int64_t bytes = 0;
    c.threads = threads;
    EXPECT_OK(ExpressCache::Size(c, &bytes, nullptr));
    return (static_cast<double>(bytes) - entries) / entries;
  };
  EXPECT_LE(beside(1), one_thread);
  EXPECT_LE(beside(many), many_threads);
}

Config Bfloat16Config(int32_t layers, int32_t query_heads, int32_t kv_heads, int32_t dim) {
  Config c;
  c.layers = layers;
  c.query_heads = query_heads;
  c.kv_heads = kv_heads;
  c.key_dim = c.value_dim = dim;
  c.dtype = DType::kBF16;
  c.budget = 1024;
  return c;
}

std::vector<float> UnevenShares(size_t heads) {
  std::vector<float> share(heads);
  for (size_t i = 0; i < heads; ++i) share[i] = static_cast<float>(i * 37 % 64 * (i * 37 % 64));
  return share;
}

// Keys and values are nearly all of a cache of a usual size.
TEST(BytesTest, LittleBesideTheEntries) {
  Config c = Bfloat16Config(32, 32, 8, 128);
  const std::vector<float> share = UnevenShares(256);
  c.head_budgets = HeadBudgets::kFixed;
  ExpectBeside(c, 0.027, 17, 0.047);  // the eight heads of a layer share their plan
  c.head_share = share;
  ExpectBeside(c, 0.053, 17, 0.081);
  c.head_share = {};
  c.head_budgets = HeadBudgets::kObserved;
  ExpectBeside(c, 0.056, 17, 0.085);
}

// A small one is the worst case: each thread has room for a halving and for a prompt's block of its own.
TEST(BytesTest, BesideTheEntriesOfASmallCache) {
  Config c = Bfloat16Config(8, 6, 2, 64);
  const std::vector<float> share = UnevenShares(16);
  c.head_budgets = HeadBudgets::kFixed;
  ExpectBeside(c, 0.095, 8, 0.24);
  c.head_share = share;
  ExpectBeside(c, 0.134, 8, 0.347);
  c.head_share = {};
  c.head_budgets = HeadBudgets::kObserved;
  ExpectBeside(c, 0.147, 8, 0.365);
}

}  // namespace
}  // namespace express
