/* Where there is no NVIDIA GPU, nor a driver: the library loads, caches on the CPU work, and asking for one on CUDA is
 * refused with a status and a message, however often. Uses the installed header alone. */
#include <express.h>
#include <stdio.h>
#include <string.h>

enum { KV_HEADS = 2, DIM = 64, TOKENS = 300 };

static int failures = 0;

static void expect(const char *call, express_status expected, express_status got) {
  if (expected == got) return;
  ++failures;
  fprintf(stderr, "%s: expected %s, got %s (%s)\n", call, express_status_name(expected), express_status_name(got),
          express_last_error());
}

/* Refused, and the message names the field. */
static void expect_refused(const char *call, express_status expected, express_status got) {
  expect(call, expected, got);
  if (strstr(express_last_error(), "config.device_type") != NULL) return;
  ++failures;
  fprintf(stderr, "%s: the message should name config.device_type: %s\n", call, express_last_error());
}

static void use_cpu(void) {
  static float k[KV_HEADS * DIM], out[KV_HEADS * DIM];
  const int64_t shape[3] = {1, KV_HEADS, DIM};
  const express_tensor k_view = {k, EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape, NULL};
  const express_tensor out_view = {out, EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape, NULL};
  express_config config = EXPRESS_CONFIG_INIT;
  express_cache *cache = NULL;
  int i;
  config.query_heads = config.kv_heads = KV_HEADS;
  config.key_dim = config.value_dim = DIM;
  config.budget = 128;
  expect("express_create on the CPU", EXPRESS_STATUS_OK, express_create(&config, &cache));
  if (cache == NULL) return;
  for (i = 0; i < TOKENS * KV_HEADS * DIM; ++i) {
    k[i % (KV_HEADS * DIM)] = (float)(i * 31 % 97) / 97;
    if ((i + 1) % (KV_HEADS * DIM) != 0) continue;
    expect("express_append", EXPRESS_STATUS_OK, express_append(cache, 0, &k_view, &k_view));
  }
  expect("express_attend", EXPRESS_STATUS_OK, express_attend(cache, 0, &k_view, &out_view, NULL));
  expect("express_set_stream on the CPU", EXPRESS_STATUS_UNSUPPORTED, express_set_stream(cache, NULL));
  if (!(out[0] > 0 && out[0] < 1)) {
    ++failures;
    fprintf(stderr, "attention gives %g\n", (double)out[0]);
  }
  express_destroy(&cache);
}

int main(void) {
  express_config config = EXPRESS_CONFIG_INIT;
  express_status refusal;
  int i;
  config.query_heads = config.kv_heads = KV_HEADS;
  config.key_dim = config.value_dim = DIM;
  config.device_type = EXPRESS_DEVICE_CUDA;
  use_cpu();
  for (i = 0; i < 2; ++i) {
    int64_t bytes = 0;
    size_t workspace = 0;
    express_cache *cache = (express_cache *)&config;
    refusal = express_create(&config, &cache);
    if (refusal == EXPRESS_STATUS_OK) {
      express_destroy(&cache);
      printf("An NVIDIA GPU is here: nothing to refuse\n");
      return failures != 0 ? 1 : 77;
    }
    expect_refused("express_create on CUDA", EXPECTED_STATUS, refusal);
    if (cache != NULL) {
      ++failures;
      fprintf(stderr, "express_create failed and left a cache\n");
    }
    expect_refused("express_size on CUDA", EXPECTED_STATUS, express_size(&config, &bytes, NULL));
    expect_refused("express_compress_kv_workspace on CUDA", EXPECTED_STATUS,
                   express_compress_kv_workspace(&config, &workspace));
  }
  use_cpu();
  if (failures == 0) printf("%s: %s\n", express_status_name(EXPECTED_STATUS), express_last_error());
  return failures != 0;
}
