/* The numbers that a binary built against one version of express.h relies on: sizes, offsets, enumerators and defaults.
 * A failure here means that programs built before would break: append instead of changing. C99; also built as C++. */
#include <stdio.h>
#include <string.h>

#include "express.h"

static int failures = 0;

static void expect(int ok, const char *what, long long expected, long long got) {
  if (ok) return;
  ++failures;
  fprintf(stderr, "%s: expected %lld, got %lld\n", what, expected, got);
}

#define EXPECT_NUMBER(expression, number) \
  expect((expression) == (number), #expression, (long long)(number), (long long)(expression))

typedef struct field {
  const char *name;
  size_t offset, size;
  size_t pinned_offset, pinned_size;
} field;

#define FIELD(type, member, pinned_offset, pinned_size) \
  { #type "." #member, offsetof(type, member), sizeof(((type *)0)->member), pinned_offset, pinned_size }

/* The tables name every field: the fields of a struct leave no gap larger than alignment explains, up to its end. */
static void expect_layout(const char *type, const field *fields, size_t count, size_t size, size_t pinned_size) {
  size_t end = 0;
  size_t i;
  for (i = 0; i < count; ++i) {
    const field *f = &fields[i];
    expect(f->offset == f->pinned_offset, f->name, (long long)f->pinned_offset, (long long)f->offset);
    expect(f->size == f->pinned_size, f->name, (long long)f->pinned_size, (long long)f->size);
    expect(f->offset == (end + f->size - 1) / f->size * f->size, "a field before this one is missing from the table",
           (long long)i, 0);
    end = f->offset + f->size;
  }
  expect(size == pinned_size, type, (long long)pinned_size, (long long)size);
  expect((end + 7) / 8 * 8 == size, "fields at the end of a struct are missing from the table", (long long)size,
         (long long)end);
}

#define EXPECT_LAYOUT(type, fields, pinned_size) \
  expect_layout("sizeof(" #type ")", fields, sizeof(fields) / sizeof((fields)[0]), sizeof(type), pinned_size)

static const field kConfig[] = {
    FIELD(express_config, struct_size, 0, 4),
    FIELD(express_config, layers, 4, 4),
    FIELD(express_config, query_heads, 8, 4),
    FIELD(express_config, kv_heads, 12, 4),
    FIELD(express_config, key_dim, 16, 4),
    FIELD(express_config, value_dim, 20, 4),
    FIELD(express_config, scale, 24, 8),
    FIELD(express_config, dtype, 32, 4),
    FIELD(express_config, device_type, 36, 4),
    FIELD(express_config, device_id, 40, 4),
    FIELD(express_config, first_layer, 44, 4),
    FIELD(express_config, first_kv_head, 48, 4),
    FIELD(express_config, budget_unit, 52, 4),
    FIELD(express_config, budget, 56, 8),
    FIELD(express_config, sinks, 64, 8),
    FIELD(express_config, window, 72, 8),
    FIELD(express_config, protected_entries, 80, 8),
    FIELD(express_config, rollback_reserve, 88, 8),
    FIELD(express_config, head_share, 96, 8),
    FIELD(express_config, head_share_count, 104, 8),
    FIELD(express_config, head_settings, 112, 8),
    FIELD(express_config, head_settings_count, 120, 8),
    FIELD(express_config, schedule, 128, 4),
    FIELD(express_config, halving, 132, 4),
    FIELD(express_config, weight_exponent, 136, 8),
    FIELD(express_config, gamma, 144, 8),
    FIELD(express_config, tau, 152, 8),
    FIELD(express_config, delta, 160, 8),
    FIELD(express_config, level_fraction, 168, 8),
    FIELD(express_config, level_floor, 176, 8),
    FIELD(express_config, max_levels, 184, 8),
    FIELD(express_config, seed, 192, 8),
    FIELD(express_config, prefill_block, 200, 4),
    FIELD(express_config, auto_compress, 204, 4),
    FIELD(express_config, validate, 208, 4),
    FIELD(express_config, threads, 212, 4),
    FIELD(express_config, parallel_for, 216, 8),
    FIELD(express_config, parallel_for_context, 224, 8),
    FIELD(express_config, stream, 232, 8),
    FIELD(express_config, head_budgets, 240, 4),
    FIELD(express_config, protection_score, 244, 4),
    FIELD(express_config, rope_frequencies, 248, 8),
    FIELD(express_config, rope_frequency_count, 256, 8),
    FIELD(express_config, rope_layout, 264, 4),
    FIELD(express_config, reserved, 268, 4),
};

static const field kStats[] = {
    FIELD(express_stats, struct_size, 0, 4),   FIELD(express_stats, head_budgets, 4, 4),
    FIELD(express_stats, tokens, 8, 8),        FIELD(express_stats, entries, 16, 8),
    FIELD(express_stats, entries_peak, 24, 8), FIELD(express_stats, entries_budget, 32, 8),
    FIELD(express_stats, min_weight, 40, 8),   FIELD(express_stats, max_weight, 48, 8),
    FIELD(express_stats, halvings, 56, 8),     FIELD(express_stats, bytes, 64, 8),
    FIELD(express_stats, bytes_peak, 72, 8),   FIELD(express_stats, compress_seconds, 80, 8),
};

static const field kTensor[] = {
    FIELD(express_tensor, data, 0, 8),       FIELD(express_tensor, device_type, 8, 4),
    FIELD(express_tensor, device_id, 12, 4), FIELD(express_tensor, dtype, 16, 4),
    FIELD(express_tensor, ndim, 20, 4),      FIELD(express_tensor, shape, 24, 8),
    FIELD(express_tensor, strides, 32, 8),
};

static const field kHeadSetting[] = {
    FIELD(express_head_setting, budget, 0, 8),
    FIELD(express_head_setting, sinks, 8, 8),
    FIELD(express_head_setting, window, 16, 8),
    FIELD(express_head_setting, protected_entries, 24, 8),
};

static const field kWorkspace[] = {
    FIELD(express_workspace, data, 0, 8),
    FIELD(express_workspace, bytes, 8, 8),
};

static void check_enumerators(void) {
  EXPECT_NUMBER(EXPRESS_STATUS_OK, 0);
  EXPECT_NUMBER(EXPRESS_STATUS_INVALID_ARGUMENT, 1);
  EXPECT_NUMBER(EXPRESS_STATUS_OUT_OF_RANGE, 2);
  EXPECT_NUMBER(EXPRESS_STATUS_SHAPE_MISMATCH, 3);
  EXPECT_NUMBER(EXPRESS_STATUS_DTYPE_MISMATCH, 4);
  EXPECT_NUMBER(EXPRESS_STATUS_DEVICE_MISMATCH, 5);
  EXPECT_NUMBER(EXPRESS_STATUS_NOT_FINITE, 6);
  EXPECT_NUMBER(EXPRESS_STATUS_BUDGET_TOO_SMALL, 7);
  EXPECT_NUMBER(EXPRESS_STATUS_WOULD_COMPRESS, 8);
  EXPECT_NUMBER(EXPRESS_STATUS_ROLLBACK_UNAVAILABLE, 9);
  EXPECT_NUMBER(EXPRESS_STATUS_BUFFER_TOO_SMALL, 10);
  EXPECT_NUMBER(EXPRESS_STATUS_SIZE_OVERFLOW, 11);
  EXPECT_NUMBER(EXPRESS_STATUS_OUT_OF_MEMORY, 12);
  EXPECT_NUMBER(EXPRESS_STATUS_UNSUPPORTED, 13);
  EXPECT_NUMBER(EXPRESS_STATUS_BROKEN, 14);
  EXPECT_NUMBER(EXPRESS_STATUS_INTERNAL, 15);
  EXPECT_NUMBER(EXPRESS_STATUS_DEVICE_ERROR, 16);
  EXPECT_NUMBER(EXPRESS_STATUS_STEPS_PENDING, 17);
  EXPECT_NUMBER(EXPRESS_STATUS_RING_FULL, 18);
  EXPECT_NUMBER(EXPRESS_DTYPE_F32, 0);
  EXPECT_NUMBER(EXPRESS_DTYPE_F16, 1);
  EXPECT_NUMBER(EXPRESS_DTYPE_BF16, 2);
  EXPECT_NUMBER(EXPRESS_DTYPE_I8, 3);
  EXPECT_NUMBER(EXPRESS_DTYPE_I64, 16);
  EXPECT_NUMBER(EXPRESS_DEVICE_CPU, 1);
  EXPECT_NUMBER(EXPRESS_DEVICE_CUDA, 2);
  EXPECT_NUMBER(EXPRESS_SCHEDULE_BUDGET, 0);
  EXPECT_NUMBER(EXPRESS_SCHEDULE_ROUNDS, 1);
  EXPECT_NUMBER(EXPRESS_HALVING_KERNEL, 0);
  EXPECT_NUMBER(EXPRESS_HALVING_COIN, 1);
  EXPECT_NUMBER(EXPRESS_HEAD_BUDGETS_AUTO, 0);
  EXPECT_NUMBER(EXPRESS_HEAD_BUDGETS_FIXED, 1);
  EXPECT_NUMBER(EXPRESS_HEAD_BUDGETS_OBSERVED, 2);
  EXPECT_NUMBER(EXPRESS_PROTECTION_SCORE_AUTO, 0);
  EXPECT_NUMBER(EXPRESS_PROTECTION_SCORE_ENERGY, 1);
  EXPECT_NUMBER(EXPRESS_PROTECTION_SCORE_ENERGY_VALUE, 2);
  EXPECT_NUMBER(EXPRESS_ROPE_LAYOUT_HALVES, 0);
  EXPECT_NUMBER(EXPRESS_ROPE_LAYOUT_INTERLEAVED, 1);
  EXPECT_NUMBER(EXPRESS_BUDGET_ENTRIES, 0);
  EXPECT_NUMBER(EXPRESS_BUDGET_BYTES, 1);
  EXPECT_NUMBER(EXPRESS_AUTO, -1);
  EXPECT_NUMBER(sizeof(express_status), sizeof(int));
}

/* Every status has a name that is its enumerator's, so that no number was left out above or in the library. */
static void check_status_names(void) {
  static const char *const names[] = {
      "EXPRESS_STATUS_OK",
      "EXPRESS_STATUS_INVALID_ARGUMENT",
      "EXPRESS_STATUS_OUT_OF_RANGE",
      "EXPRESS_STATUS_SHAPE_MISMATCH",
      "EXPRESS_STATUS_DTYPE_MISMATCH",
      "EXPRESS_STATUS_DEVICE_MISMATCH",
      "EXPRESS_STATUS_NOT_FINITE",
      "EXPRESS_STATUS_BUDGET_TOO_SMALL",
      "EXPRESS_STATUS_WOULD_COMPRESS",
      "EXPRESS_STATUS_ROLLBACK_UNAVAILABLE",
      "EXPRESS_STATUS_BUFFER_TOO_SMALL",
      "EXPRESS_STATUS_SIZE_OVERFLOW",
      "EXPRESS_STATUS_OUT_OF_MEMORY",
      "EXPRESS_STATUS_UNSUPPORTED",
      "EXPRESS_STATUS_BROKEN",
      "EXPRESS_STATUS_INTERNAL",
      "EXPRESS_STATUS_DEVICE_ERROR",
      "EXPRESS_STATUS_STEPS_PENDING",
      "EXPRESS_STATUS_RING_FULL",
      "EXPRESS_STATUS_UNKNOWN",
  };
  int i;
  for (i = 0; i < (int)(sizeof(names) / sizeof(names[0])); ++i) {
    expect(strcmp(express_status_name((express_status)i), names[i]) == 0, names[i], i, i);
  }
}

/* EXPRESS_CONFIG_INIT and express_config_init agree in every field (padding may differ). */
static void check_defaults(void) {
  const express_config from_macro = EXPRESS_CONFIG_INIT;
  const express_stats stats = EXPRESS_STATS_INIT;
  express_config from_function;
  size_t i;
  memset(&from_function, 0xA5, sizeof(from_function));
  EXPECT_NUMBER(express_config_init(&from_function, (uint32_t)sizeof(from_function)), EXPRESS_STATUS_OK);
  EXPECT_NUMBER(from_macro.struct_size, 272);
  EXPECT_NUMBER(stats.struct_size, 88);
  for (i = 0; i < sizeof(kConfig) / sizeof(kConfig[0]); ++i) {
    const field *f = &kConfig[i];
    const int same =
        memcmp((const char *)&from_macro + f->offset, (const char *)&from_function + f->offset, f->size) == 0;
    expect(same, f->name, 1, same);
  }
  EXPECT_NUMBER(from_macro.budget, 1024);
  EXPECT_NUMBER(from_macro.sinks, 4);
  EXPECT_NUMBER(from_macro.prefill_block, 256);
  EXPECT_NUMBER(from_macro.auto_compress, 1);
  EXPECT_NUMBER(from_macro.validate, 0);
}

static void check_version(void) {
  char version[32];
  EXPECT_NUMBER(express_version(),
                (uint32_t)(EXPRESS_VERSION_MAJOR * 10000 + EXPRESS_VERSION_MINOR * 100 + EXPRESS_VERSION_PATCH));
  sprintf(version, "%d.%d.%d", EXPRESS_VERSION_MAJOR, EXPRESS_VERSION_MINOR, EXPRESS_VERSION_PATCH);
  expect(strcmp(version, EXPRESS_PACKAGE_VERSION) == 0, "EXPRESS_VERSION_* against the package's version", 1, 0);
  expect(strcmp(express_version_string(), EXPRESS_PACKAGE_VERSION) == 0, "express_version_string()", 1, 0);
}

int main(void) {
  if (sizeof(void *) != 8) {
    fprintf(stderr, "the pinned numbers are those of 64-bit platforms\n");
    return 77;
  }
  EXPECT_LAYOUT(express_config, kConfig, 272);
  EXPECT_LAYOUT(express_stats, kStats, 88);
  EXPECT_LAYOUT(express_tensor, kTensor, 40);
  EXPECT_LAYOUT(express_head_setting, kHeadSetting, 32);
  EXPECT_LAYOUT(express_workspace, kWorkspace, 16);
  check_enumerators();
  check_status_names();
  check_defaults();
  check_version();
  if (failures == 0) printf("the ABI is as pinned\n");
  return failures != 0;
}
