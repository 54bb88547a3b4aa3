/* Decoding far beyond the budget: a cache of 256 entries per KV head, on average, takes 4096 tokens, one by one, as a decoder would.
 *
 *     cc -std=c99 decode_loop.c $(pkg-config --cflags --libs express) -lm -o decode_loop
 */
#include <express.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { LAYERS = 2, QUERY_HEADS = 4, KV_HEADS = 2, DIM = 64, BUDGET = 256, TOKENS = 4096 };
enum { ALL = LAYERS * KV_HEADS * BUDGET }; /* entries, which heads share out by what they are seen to look at */

static void check(express_status status, const char *call) {
  if (status == EXPRESS_STATUS_OK) return;
  fprintf(stderr, "%s: %s: %s\n", call, express_status_name(status), express_last_error());
  exit(1);
}

/* A view of a contiguous array on the CPU. */
static express_tensor view(void *data, express_dtype dtype, int32_t ndim, const int64_t *shape) {
  express_tensor tensor = {NULL, EXPRESS_DEVICE_CPU, 0, 0, 0, NULL, NULL};
  tensor.data = data;
  tensor.dtype = (int32_t)dtype;
  tensor.ndim = ndim;
  tensor.shape = shape;
  return tensor;
}

/* Stands in for a model: numbers in [-1, 1). */
static void fill(float *x, int64_t count, uint32_t *state) {
  int64_t i;
  for (i = 0; i < count; ++i) {
    *state = *state * 1664525u + 1013904223u;
    x[i] = (float)(*state >> 8) * (1.0f / 8388608.0f) - 1.0f;
  }
}

/* The weights of the entries of one KV head always add up to the number of tokens seen. */
static int64_t sum_of_weights(const express_cache *cache, int32_t layer, int32_t kv_head, int64_t *entries) {
  static float k[ALL * DIM], v[ALL * DIM], log_weight[ALL];
  const int64_t rows[2] = {ALL, DIM};
  const express_tensor k_out = view(k, EXPRESS_DTYPE_F32, 2, rows);
  const express_tensor v_out = view(v, EXPRESS_DTYPE_F32, 2, rows);
  const express_tensor weight_out = view(log_weight, EXPRESS_DTYPE_F32, 1, rows);
  int64_t sum = 0;
  int64_t i;
  check(express_export(cache, layer, kv_head, &k_out, &v_out, &weight_out, NULL, entries), "express_export");
  for (i = 0; i < *entries; ++i) sum += (int64_t)floor(exp(log_weight[i]) + 0.5);
  return sum;
}

int main(void) {
  static float q[QUERY_HEADS * DIM], k[KV_HEADS * DIM], v[KV_HEADS * DIM], out[QUERY_HEADS * DIM];
  const int64_t query_shape[3] = {1, QUERY_HEADS, DIM}; /* (tokens, query_heads, dim) */
  const int64_t kv_shape[3] = {1, KV_HEADS, DIM};       /* (tokens, kv_heads, dim) */
  const express_tensor q_view = view(q, EXPRESS_DTYPE_F32, 3, query_shape);
  const express_tensor k_view = view(k, EXPRESS_DTYPE_F32, 3, kv_shape);
  const express_tensor v_view = view(v, EXPRESS_DTYPE_F32, 3, kv_shape);
  const express_tensor out_view = view(out, EXPRESS_DTYPE_F32, 3, query_shape);
  express_config config = EXPRESS_CONFIG_INIT;
  express_stats stats = EXPRESS_STATS_INIT;
  express_cache *cache = NULL;
  uint32_t random = 1;
  int wrong = 0;
  int32_t layer, head;
  int64_t token, all = 0;

  config.layers = LAYERS;
  config.query_heads = QUERY_HEADS;
  config.kv_heads = KV_HEADS;
  config.key_dim = DIM;
  config.value_dim = DIM;
  config.budget = BUDGET;
  check(express_create(&config, &cache), "express_create");

  for (token = 0; token < TOKENS; ++token) {
    for (layer = 0; layer < LAYERS; ++layer) {
      fill(q, QUERY_HEADS * DIM, &random);
      fill(k, KV_HEADS * DIM, &random);
      fill(v, KV_HEADS * DIM, &random);
      check(express_append(cache, layer, &k_view, &v_view), "express_append");
      check(express_attend(cache, layer, &q_view, &out_view, NULL), "express_attend");
    }
  }

  for (layer = 0; layer < LAYERS; ++layer) {
    for (head = 0; head < KV_HEADS; ++head) {
      int64_t entries = 0;
      const int64_t weight = sum_of_weights(cache, layer, head, &entries);
      printf("layer %d, KV head %d: %lld tokens in %lld entries, weights add up to %lld\n", (int)layer, (int)head,
             (long long)TOKENS, (long long)entries, (long long)weight);
      wrong += weight != TOKENS;
      all += entries;
    }
  }
  wrong += all > ALL;
  check(express_get_stats(cache, EXPRESS_AUTO, &stats), "express_get_stats");
  printf("%lld bytes, %lld halvings, largest weight %lld\n", (long long)stats.bytes, (long long)stats.halvings,
         (long long)stats.max_weight);
  express_destroy(&cache);
  return wrong != 0;
}
