// Every error of the C ABI: its code, a message that names the argument, and a cache that is as it was.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "capi/express.h"

namespace {

constexpr int64_t kTokens = 120;

// A small cache with tokens in it, and well-formed tensors to spoil.
class Errors : public ::testing::Test {
 protected:
  void SetUp() override {
    config = express_config EXPRESS_CONFIG_INIT;
    config.layers = 2;
    config.query_heads = 4;
    config.kv_heads = 2;
    config.key_dim = 8;
    config.value_dim = 4;
    config.budget = 48;
    config.threads = 1;
    config.validate = 1;
    for (size_t i = 0; i < data.size(); ++i) data[i] = std::sin(static_cast<float>(i));
    ASSERT_EQ(express_create(&config, &cache), EXPRESS_STATUS_OK) << express_last_error();
    ASSERT_EQ(express_append(cache, 0, &k, &v), EXPRESS_STATUS_OK) << express_last_error();
  }
  void TearDown() override {
    express_destroy(&cache);
    EXPECT_EQ(cache, nullptr);
    express_destroy(&cache);
    express_destroy(nullptr);
  }

  // What layer 0, head 0 holds.
  std::vector<float> Snapshot() {
    int64_t count = 0;
    EXPECT_EQ(express_entries(cache, 0, 0, &count), EXPRESS_STATUS_OK);
    std::vector<float> held(static_cast<size_t>(count * (8 + 4 + 1)));
    int64_t rows_k[] = {count, 8}, rows_v[] = {count, 4};
    express_tensor hk = {held.data(), EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 2, rows_k, nullptr};
    express_tensor hv = {held.data() + count * 8, EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 2, rows_v, nullptr};
    express_tensor hw = {held.data() + count * 12, EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 1, rows_k, nullptr};
    EXPECT_EQ(express_export(cache, 0, 0, &hk, &hv, &hw, nullptr, &count), EXPRESS_STATUS_OK);
    return held;
  }

  // The call fails with this status and a message that contains `names`; cache and output are as they were.
  void Expect(express_status status, const char* names, const std::function<express_status()>& call) {
    const std::vector<float> before = Snapshot();
    const std::vector<float> output_before = output;
    EXPECT_EQ(call(), status) << names << ": " << express_last_error();
    EXPECT_NE(std::string(express_last_error()).find(names), std::string::npos) << express_last_error();
    EXPECT_TRUE(before == Snapshot()) << names;
    EXPECT_EQ(std::memcmp(output.data(), output_before.data(), output.size() * sizeof(float)), 0) << names;
  }
  void ExpectConfig(express_status status, const char* names, const std::function<void(express_config&)>& spoil) {
    express_config c = config;
    spoil(c);
    express_cache* created = reinterpret_cast<express_cache*>(this);
    EXPECT_EQ(express_create(&c, &created), status) << names << ": " << express_last_error();
    EXPECT_EQ(created, nullptr);
    EXPECT_NE(std::string(express_last_error()).find(names), std::string::npos) << express_last_error();
  }

  express_config config;
  express_cache* cache = nullptr;
  std::vector<float> data = std::vector<float>(static_cast<size_t>(2 * kTokens * 4 * 8));
  std::vector<float> output = std::vector<float>(static_cast<size_t>(kTokens * 4 * 8), 7.0f);
  int64_t shape_q[3] = {kTokens, 4, 8}, shape_k[3] = {kTokens, 2, 8}, shape_v[3] = {kTokens, 2, 4},
          shape_o[3] = {kTokens, 4, 4}, shape_lse[2] = {kTokens, 4};
  express_tensor q = {data.data(), EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape_q, nullptr};
  express_tensor k = {data.data(), EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape_k, nullptr};
  express_tensor v = {data.data(), EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape_v, nullptr};
  express_tensor o = {output.data(), EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape_o, nullptr};
  express_tensor lse = {output.data(), EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 2, shape_lse, nullptr};
};

// AUTO is the default, a program from before the field was there gets FIXED, and stats tell.
TEST_F(Errors, HeadBudgetsOfTheCaller) {
  const auto came_to = [&](int32_t head_budgets, uint32_t struct_size) {
    express_config c = config;
    c.head_budgets = head_budgets;
    c.struct_size = struct_size;
    express_cache* created = nullptr;
    EXPECT_EQ(express_create(&c, &created), EXPRESS_STATUS_OK) << express_last_error();
    express_stats stats = EXPRESS_STATS_INIT;
    EXPECT_EQ(express_get_stats(created, EXPRESS_AUTO, &stats), EXPRESS_STATUS_OK);
    express_destroy(&created);
    return stats.head_budgets;
  };
  const uint32_t size = sizeof(express_config);
  EXPECT_EQ(config.head_budgets, EXPRESS_HEAD_BUDGETS_AUTO);
  EXPECT_EQ(came_to(EXPRESS_HEAD_BUDGETS_AUTO, size), EXPRESS_HEAD_BUDGETS_OBSERVED);
  EXPECT_EQ(came_to(EXPRESS_HEAD_BUDGETS_OBSERVED, size), EXPRESS_HEAD_BUDGETS_OBSERVED);
  EXPECT_EQ(came_to(EXPRESS_HEAD_BUDGETS_FIXED, size), EXPRESS_HEAD_BUDGETS_FIXED);
  EXPECT_EQ(came_to(EXPRESS_HEAD_BUDGETS_AUTO, offsetof(express_config, stream)), EXPRESS_HEAD_BUDGETS_FIXED);
}

TEST_F(Errors, ConfigFields) {
  const auto bad = EXPRESS_STATUS_INVALID_ARGUMENT;
  ExpectConfig(bad, "struct_size", [](express_config& c) { c.struct_size = 8; });
  ExpectConfig(bad, "layers", [](express_config& c) { c.layers = 0; });
  ExpectConfig(bad, "kv_heads", [](express_config& c) { c.kv_heads = -3; });
  ExpectConfig(bad, "query_heads", [](express_config& c) { c.query_heads = 3; });
  ExpectConfig(bad, "key_dim", [](express_config& c) { c.key_dim = 1025; });
  ExpectConfig(bad, "value_dim", [](express_config& c) { c.value_dim = 0; });
  ExpectConfig(bad, "scale", [](express_config& c) { c.scale = 0; });
  ExpectConfig(bad, "scale", [](express_config& c) { c.scale = NAN; });
  ExpectConfig(bad, "dtype", [](express_config& c) { c.dtype = 99; });
  ExpectConfig(EXPRESS_STATUS_UNSUPPORTED, "dtype", [](express_config& c) { c.dtype = 4; });
  // Dims of 8 and 4, or no device at all: tests/package/no_gpu.c has the status of each.
  ExpectConfig(bad, "device_type", [](express_config& c) { c.device_type = 3; });
  ExpectConfig(bad, "device_type", [](express_config& c) { c.device_type = 0; });
  ExpectConfig(bad, "device_id", [](express_config& c) { c.device_id = 1; });
  ExpectConfig(bad, "first_layer", [](express_config& c) { c.first_layer = -1; });
  ExpectConfig(bad, "first_kv_head", [](express_config& c) { c.first_kv_head = -1; });
  ExpectConfig(bad, "budget_unit", [](express_config& c) { c.budget_unit = 2; });
  ExpectConfig(bad, "budget", [](express_config& c) { c.budget = 0; });
  ExpectConfig(bad, "budget", [](express_config& c) { c.budget = int64_t{1} << 50; });
  ExpectConfig(bad, "sinks", [](express_config& c) { c.sinks = -1; });
  ExpectConfig(bad, "window", [](express_config& c) { c.window = -2; });
  ExpectConfig(bad, "protected_entries", [](express_config& c) { c.protected_entries = -2; });
  ExpectConfig(bad, "rollback_reserve", [](express_config& c) { c.rollback_reserve = -1; });
  ExpectConfig(bad, "head_share_count", [](express_config& c) {
    c.head_share_count = 3;
    c.head_share = reinterpret_cast<float*>(&c);
  });
  ExpectConfig(bad, "head_share", [](express_config& c) { c.head_share_count = 2; });
  static const float negative[] = {1, -1};
  ExpectConfig(bad, "head_share[1]", [](express_config& c) {
    c.head_share_count = 2;
    c.head_share = negative;
  });
  static const express_head_setting settings[] = {{48, -1, -1, -1}, {48, -1, -5, -1}};
  ExpectConfig(bad, "head_settings[2]", [](express_config& c) {
    c.head_settings_count = 2;
    c.head_settings = settings;
  });
  ExpectConfig(bad, "schedule", [](express_config& c) { c.schedule = 7; });
  ExpectConfig(bad, "halving", [](express_config& c) { c.halving = -1; });
  ExpectConfig(bad, "weight_exponent", [](express_config& c) { c.weight_exponent = 1.5; });
  ExpectConfig(bad, "gamma", [](express_config& c) { c.gamma = -0.1; });
  ExpectConfig(bad, "tau", [](express_config& c) { c.tau = NAN; });
  ExpectConfig(bad, "delta", [](express_config& c) { c.delta = 1; });
  ExpectConfig(bad, "level_fraction", [](express_config& c) { c.level_fraction = 0; });
  ExpectConfig(bad, "level_floor", [](express_config& c) { c.level_floor = 1; });
  ExpectConfig(bad, "level_floor", [](express_config& c) { c.level_floor = 4000; });
  ExpectConfig(bad, "max_levels", [](express_config& c) { c.max_levels = 1000; });
  ExpectConfig(bad, "prefill_block", [](express_config& c) { c.prefill_block = 0; });
  ExpectConfig(bad, "head_budgets", [](express_config& c) { c.head_budgets = 3; });
  ExpectConfig(bad, "protection_score", [](express_config& c) { c.protection_score = 3; });
  ExpectConfig(bad, "rope_layout", [](express_config& c) { c.rope_layout = 2; });
  ExpectConfig(bad, "rope_frequency_count", [](express_config& c) { c.rope_frequency_count = -1; });
  ExpectConfig(bad, "rope_frequencies", [](express_config& c) { c.rope_frequency_count = 1; });
  static const float frequencies[600] = {1, 4, NAN};
  ExpectConfig(bad, "rope_frequency_count", [](express_config& c) {
    c.rope_frequencies = frequencies;
    c.rope_frequency_count = c.key_dim / 2 + 1;
  });
  ExpectConfig(bad, "rope_frequencies[1]", [](express_config& c) {
    c.rope_frequencies = frequencies;
    c.rope_frequency_count = 2;
  });
  ExpectConfig(bad, "rope_frequencies[0]", [](express_config& c) {
    c.rope_frequencies = frequencies + 2;
    c.rope_frequency_count = 1;
  });
  ExpectConfig(bad, "reserved", [](express_config& c) { c.reserved = 1; });
  ExpectConfig(bad, "auto_compress", [](express_config& c) { c.auto_compress = 2; });
  ExpectConfig(bad, "auto_compress", [](express_config& c) {
    c.auto_compress = 0;
    c.schedule = EXPRESS_SCHEDULE_ROUNDS;
  });
  ExpectConfig(bad, "validate", [](express_config& c) { c.validate = -1; });
  ExpectConfig(bad, "threads", [](express_config& c) { c.threads = 0; });
  ExpectConfig(EXPRESS_STATUS_BUDGET_TOO_SMALL, "budget", [](express_config& c) { c.budget = 9; });
  ExpectConfig(EXPRESS_STATUS_BUDGET_TOO_SMALL, "budget", [](express_config& c) {
    c.window = 40;
    c.protected_entries = 0;
  });
  ExpectConfig(EXPRESS_STATUS_BUDGET_TOO_SMALL, "budget", [](express_config& c) {
    c.budget_unit = EXPRESS_BUDGET_BYTES;
    c.budget = 100;
  });
  ExpectConfig(EXPRESS_STATUS_SIZE_OVERFLOW, "kv_heads",
               [](express_config& c) { c.layers = c.kv_heads = c.query_heads = 1 << 20; });
  ExpectConfig(EXPRESS_STATUS_OUT_OF_MEMORY, "bytes", [](express_config& c) {
    c.budget = int64_t{1} << 29;
    c.key_dim = c.value_dim = 1024;
    c.layers = c.kv_heads = c.query_heads = 16;
  });
}

TEST_F(Errors, ATailOfTheConfigThatIsNotKnownIsRefusedUnlessZero) {
  struct {
    express_config c;
    int64_t more;
  } longer = {config, 0};
  longer.c.struct_size = sizeof(longer);
  express_cache* created = nullptr;
  EXPECT_EQ(express_create(&longer.c, &created), EXPRESS_STATUS_OK);
  express_destroy(&created);
  longer.more = 1;
  EXPECT_EQ(express_create(&longer.c, &created), EXPRESS_STATUS_UNSUPPORTED);
  EXPECT_EQ(express_config_init(&longer.c, 12), EXPRESS_STATUS_INVALID_ARGUMENT);
  EXPECT_EQ(express_config_init(nullptr, sizeof(express_config)), EXPRESS_STATUS_INVALID_ARGUMENT);
}

TEST_F(Errors, NullPointers) {
  const auto bad = EXPRESS_STATUS_INVALID_ARGUMENT;
  int64_t count = 0;
  size_t bytes = 0;
  express_stats stats = EXPRESS_STATS_INIT;
  express_cache* none = nullptr;
  Expect(bad, "config", [&] { return express_create(nullptr, &none); });
  Expect(bad, "cache", [&] { return express_create(&config, nullptr); });
  Expect(bad, "config", [&] { return express_size(nullptr, &count, &count); });
  Expect(bad, "cache", [&] { return express_reset(nullptr); });
  Expect(bad, "cache", [&] { return express_append(nullptr, 0, &k, &v); });
  Expect(bad, "k:", [&] { return express_append(cache, 0, nullptr, &v); });
  Expect(bad, "v:", [&] { return express_append(cache, 0, &k, nullptr); });
  Expect(bad, "k:", [&] { return express_append_all(cache, nullptr, &v); });
  Expect(bad, "q:", [&] { return express_attend(cache, 0, nullptr, &o, nullptr); });
  Expect(bad, "out:", [&] { return express_attend(cache, 0, &q, nullptr, nullptr); });
  Expect(bad, "q:", [&] { return express_prefill(cache, 0, nullptr, &k, &v, &o, nullptr, nullptr); });
  Expect(bad, "out:", [&] { return express_prefill(cache, 0, &q, &k, &v, nullptr, nullptr, nullptr); });
  Expect(bad, "bytes:", [&] { return express_workspace_size(cache, 4, nullptr); });
  Expect(bad, "n:", [&] { return express_workspace_size(cache, -4, &bytes); });
  Expect(bad, "cache", [&] { return express_compress(nullptr, 0, 4, nullptr); });
  Expect(bad, "cache", [&] { return express_rollback(nullptr, 0); });
  Expect(bad, "tokens:", [&] { return express_rollback_available(cache, nullptr); });
  Expect(bad, "count:", [&] { return express_entries(cache, 0, 0, nullptr); });
  Expect(bad, "count:", [&] { return express_export(cache, 0, 0, &k, &v, nullptr, nullptr, nullptr); });
  Expect(bad, "stats:", [&] { return express_get_stats(cache, 0, nullptr); });
  Expect(bad, "stats.struct_size", [&] {
    stats.struct_size = 4;
    return express_get_stats(cache, 0, &stats);
  });
  Expect(bad, "bytes:", [&] { return express_bytes(cache, nullptr); });
  Expect(bad, "bytes:", [&] { return express_save_size(cache, nullptr); });
  Expect(bad, "data:", [&] { return express_save(cache, nullptr, 1 << 20); });
  Expect(bad, "data:", [&] { return express_load(cache, nullptr, 1 << 20); });
  Expect(bad, "bytes:", [&] { return express_load(cache, &count, sizeof(count)); });
  Expect(bad, "cache", [&] { return express_copy(nullptr, cache); });
  Expect(bad, "from:", [&] { return express_copy(cache, nullptr); });
  Expect(bad,
         "workspace:", [&] { return express_compress_kv(&config, &k, &v, &k, &v, &lse, nullptr, &count, nullptr); });
}

TEST_F(Errors, LayersAndHeads) {
  int64_t count = 0;
  express_stats stats = EXPRESS_STATS_INIT;
  for (int32_t layer : {-1, 2, 1 << 30}) {
    Expect(EXPRESS_STATUS_OUT_OF_RANGE, "layer", [&] { return express_append(cache, layer, &k, &v); });
    Expect(EXPRESS_STATUS_OUT_OF_RANGE, "layer", [&] { return express_attend(cache, layer, &q, &o, nullptr); });
    Expect(EXPRESS_STATUS_OUT_OF_RANGE, "layer",
           [&] { return express_prefill(cache, layer, &q, &k, &v, &o, nullptr, nullptr); });
    Expect(EXPRESS_STATUS_OUT_OF_RANGE, "layer", [&] { return express_entries(cache, layer, 0, &count); });
    if (layer != EXPRESS_AUTO) {
      Expect(EXPRESS_STATUS_OUT_OF_RANGE, "layer", [&] { return express_compress(cache, layer, 1, &count); });
      Expect(EXPRESS_STATUS_OUT_OF_RANGE, "layer", [&] { return express_get_stats(cache, layer, &stats); });
    }
  }
  Expect(EXPRESS_STATUS_OUT_OF_RANGE, "kv_head", [&] { return express_entries(cache, 0, 2, &count); });
  Expect(EXPRESS_STATUS_OUT_OF_RANGE, "kv_head", [&] { return express_entries(cache, 0, -1, &count); });
}

TEST_F(Errors, ShapesStridesTypesAndDevices) {
  const auto append = [&](const express_tensor& kk, const express_tensor& vv) {
    return [&] { return express_append(cache, 0, &kk, &vv); };
  };
  const auto shape = EXPRESS_STATUS_SHAPE_MISMATCH;
  express_tensor t = k;
  t.ndim = 2;
  Expect(shape, "k.ndim", append(t, v));
  t = k;
  t.shape = nullptr;
  Expect(EXPRESS_STATUS_INVALID_ARGUMENT, "k.shape", append(t, v));
  t = k;
  t.data = nullptr;
  Expect(EXPRESS_STATUS_INVALID_ARGUMENT, "k.data", append(t, v));
  t = k;
  t.data = reinterpret_cast<char*>(data.data()) + 1;
  Expect(EXPRESS_STATUS_INVALID_ARGUMENT, "k.data", append(t, v));
  for (const auto& wrong : std::vector<std::vector<int64_t>>{{kTokens, 3, 8}, {kTokens, 2, 7}, {-1, 2, 8}}) {
    t = k;
    t.shape = wrong.data();
    Expect(shape, "k.shape", append(t, v));
  }
  const int64_t fewer[] = {kTokens - 1, 2, 4};
  t = v;
  t.shape = fewer;
  Expect(shape, "v.shape", append(k, t));
  const int64_t inner[] = {32, 16, 2}, negative[] = {-16, 8, 1}, huge[] = {int64_t{1} << 61, 8, 1};
  t = k;
  t.strides = inner;
  Expect(shape, "k.strides[2]", append(t, v));
  t.strides = negative;
  Expect(shape, "k.strides[0]", append(t, v));
  t.strides = huge;
  Expect(EXPRESS_STATUS_SIZE_OVERFLOW, "k", append(t, v));
  t = k;
  for (const int32_t dtype : {EXPRESS_DTYPE_I64, EXPRESS_DTYPE_I8}) {
    t.dtype = dtype;
    Expect(EXPRESS_STATUS_DTYPE_MISMATCH, "k.dtype", append(t, v));
  }
  t = v;
  t.dtype = 55;
  Expect(EXPRESS_STATUS_DTYPE_MISMATCH, "v.dtype", append(k, t));
  t = k;
  t.device_type = EXPRESS_DEVICE_CUDA;
  Expect(EXPRESS_STATUS_DEVICE_MISMATCH, "k", append(t, v));
  t = k;
  t.device_id = 2;
  Expect(EXPRESS_STATUS_DEVICE_MISMATCH, "k", append(t, v));

  t = o;
  t.shape = shape_q;
  Expect(shape, "out.shape", [&] { return express_attend(cache, 0, &q, &t, nullptr); });
  Expect(shape, "out.shape", [&] { return express_prefill(cache, 0, &q, &k, &v, &t, nullptr, nullptr); });
  t = lse;
  t.dtype = EXPRESS_DTYPE_F16;
  Expect(EXPRESS_STATUS_DTYPE_MISMATCH, "lse.dtype", [&] { return express_attend(cache, 0, &q, &o, &t); });
  Expect(EXPRESS_STATUS_DTYPE_MISMATCH, "lse.dtype",
         [&] { return express_prefill(cache, 0, &q, &k, &v, &o, &t, nullptr); });
  const int64_t other[] = {kTokens, 4, 9};
  t = q;
  t.shape = other;
  Expect(shape, "q.shape", [&] { return express_attend(cache, 0, &t, &o, nullptr); });
  Expect(shape, "k.ndim", [&] { return express_append_all(cache, &k, &v); });
}

TEST_F(Errors, NaNAndInfinityWhenValidateIsOn) {
  const auto prefill = [&] { return express_prefill(cache, 0, &q, &k, &v, &o, nullptr, nullptr); };
  for (const float poison : {NAN, INFINITY, -INFINITY}) {
    const float good = data[40];
    data[40] = poison;
    Expect(EXPRESS_STATUS_NOT_FINITE, "k", [&] { return express_append(cache, 0, &k, &v); });
    Expect(EXPRESS_STATUS_NOT_FINITE, "k", prefill);
    Expect(EXPRESS_STATUS_NOT_FINITE, "q", [&] { return express_attend(cache, 0, &q, &o, nullptr); });
    data[40] = good;
  }
  EXPECT_EQ(prefill(), EXPRESS_STATUS_OK) << express_last_error();  // a failed call does not stop the next
}

TEST_F(Errors, BuffersRollbackAndOneShot) {
  int64_t count = 0, small_k[] = {3, 8}, small_v[] = {3, 4};
  express_tensor tk = o, tv = o;
  tk.ndim = tv.ndim = 2;
  tk.shape = small_k;
  tv.shape = small_v;
  Expect(EXPRESS_STATUS_BUFFER_TOO_SMALL, "k.shape",
         [&] { return express_export(cache, 0, 0, &tk, &tv, nullptr, nullptr, &count); });
  Expect(EXPRESS_STATUS_ROLLBACK_UNAVAILABLE, "tokens", [&] { return express_rollback(cache, 1); });
  Expect(EXPRESS_STATUS_INVALID_ARGUMENT, "tokens", [&] { return express_rollback(cache, -1); });
  Expect(EXPRESS_STATUS_INVALID_ARGUMENT, "tokens", [&] { return express_compress(cache, 0, -1, nullptr); });

  express_config one = config;
  size_t bytes = 0;
  Expect(EXPRESS_STATUS_INVALID_ARGUMENT, "layers", [&] { return express_compress_kv_workspace(&one, &bytes); });
  one.layers = 1;
  ASSERT_EQ(express_compress_kv_workspace(&one, &bytes), EXPRESS_STATUS_OK) << express_last_error();
  std::vector<char> memory(bytes + 64);
  char* aligned = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  std::vector<float> out(2 * 48 * 13);
  int64_t shape_ok[] = {2, 48, 8}, shape_ov[] = {2, 48, 4}, shape_ow[] = {2, 48};
  express_tensor ok = {out.data(), EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape_ok, nullptr};
  express_tensor ov = {out.data() + 2 * 48 * 8, EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape_ov, nullptr};
  express_tensor ow = {out.data() + 2 * 48 * 12, EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 2, shape_ow, nullptr};
  express_workspace workspace = {aligned, bytes};
  const auto compress = [&] { return express_compress_kv(&one, &k, &v, &ok, &ov, &ow, nullptr, &count, &workspace); };
  EXPECT_EQ(compress(), EXPRESS_STATUS_OK) << express_last_error();
  EXPECT_LE(count, 48);
  workspace.bytes = bytes - 1;
  Expect(EXPRESS_STATUS_BUFFER_TOO_SMALL, "workspace.bytes", compress);
  workspace = {aligned + 8, bytes};
  Expect(EXPRESS_STATUS_INVALID_ARGUMENT, "workspace.data", compress);
  workspace = {aligned, bytes};
  shape_ok[1] = shape_ov[1] = shape_ow[1] = 47;
  Expect(EXPRESS_STATUS_BUFFER_TOO_SMALL, "out_k.shape", compress);
}

TEST_F(Errors, AppendsThatMayNotCompress) {
  express_destroy(&cache);
  config.auto_compress = 0;
  ASSERT_EQ(express_create(&config, &cache), EXPRESS_STATUS_OK);
  Expect(EXPRESS_STATUS_WOULD_COMPRESS, "auto_compress", [&] { return express_append(cache, 0, &k, &v); });
  Expect(EXPRESS_STATUS_WOULD_COMPRESS, "auto_compress",
         [&] { return express_prefill(cache, 0, &q, &k, &v, &o, nullptr, nullptr); });
}

// A parallel_for that leaves out the last task once `lazy` is set.
bool lazy = false;
void LazyFor(void*, int64_t count, void (*body)(void*, int64_t, int32_t), void* task) {
  for (int64_t i = 0; i < count - (lazy ? 1 : 0); ++i) body(task, i, 0);
}

TEST_F(Errors, AParallelForThatDoesTooLittleBreaksTheCacheUntilReset) {
  express_destroy(&cache);
  config.threads = 2;
  config.parallel_for = LazyFor;
  ASSERT_EQ(express_create(&config, &cache), EXPRESS_STATUS_OK);
  ASSERT_EQ(express_append(cache, 0, &k, &v), EXPRESS_STATUS_OK);
  lazy = true;
  EXPECT_EQ(express_prefill(cache, 0, &q, &k, &v, &o, nullptr, nullptr), EXPRESS_STATUS_BROKEN);
  lazy = false;
  int64_t count = 0;
  EXPECT_EQ(express_append(cache, 0, &k, &v), EXPRESS_STATUS_BROKEN);
  EXPECT_EQ(express_attend(cache, 0, &q, &o, nullptr), EXPRESS_STATUS_BROKEN);
  EXPECT_EQ(express_entries(cache, 0, 0, &count), EXPRESS_STATUS_BROKEN);
  EXPECT_EQ(express_rollback(cache, 0), EXPRESS_STATUS_BROKEN);
  EXPECT_EQ(express_compress(cache, 0, 1, nullptr), EXPRESS_STATUS_BROKEN);
  ASSERT_EQ(express_reset(cache), EXPRESS_STATUS_OK);
  EXPECT_EQ(express_append(cache, 0, &k, &v), EXPRESS_STATUS_OK);
  EXPECT_EQ(express_entries(cache, 0, 0, &count), EXPRESS_STATUS_OK);
}

TEST(Status, NamesAreComplete) {
  for (int i = 0; i <= EXPRESS_STATUS_RING_FULL; ++i)
    EXPECT_EQ(std::string(express_status_name(static_cast<express_status>(i))).rfind("EXPRESS_STATUS_", 0), 0u);
  EXPECT_STREQ(express_status_name(static_cast<express_status>(EXPRESS_STATUS_RING_FULL + 1)),
               "EXPRESS_STATUS_UNKNOWN");
  EXPECT_STREQ(express_status_name(static_cast<express_status>(-1)), "EXPRESS_STATUS_UNKNOWN");
  const uint32_t version = express_version();
  EXPECT_EQ(
      std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." + std::to_string(version % 100),
      express_version_string());
}

}  // namespace
