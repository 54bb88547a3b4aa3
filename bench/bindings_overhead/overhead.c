/* The cost of a call in C: overhead CALLS prints nanoseconds of a step (append and attend of one token in a tiny cache) and of
 * express_bytes, then the sum of the last output and the halvings, by which the languages are seen to do the same. */
#define _POSIX_C_SOURCE 199309L
#include <express.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { DIM = 16, BUDGET = 16 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void check(express_status status) {
  if (status == EXPRESS_STATUS_OK) return;
  fprintf(stderr, "%s\n", express_last_error());
  exit(1);
}

int main(int argc, char **argv) {
  const long calls = argc == 2 ? atol(argv[1]) : 0;
  static float q[DIM], k[DIM], v[DIM], out[DIM];
  const int64_t shape[] = {1, 1, DIM};
  const express_tensor tq = {q, EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape, NULL};
  const express_tensor tk = {k, EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape, NULL};
  const express_tensor tv = {v, EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape, NULL};
  const express_tensor to = {out, EXPRESS_DEVICE_CPU, 0, EXPRESS_DTYPE_F32, 3, shape, NULL};
  express_config config = EXPRESS_CONFIG_INIT;
  express_stats stats = EXPRESS_STATS_INIT;
  express_cache *cache = NULL;
  int64_t bytes = 0;
  double start, step, look, sum = 0;
  long i;
  config.key_dim = config.value_dim = DIM;
  config.budget = BUDGET;
  config.threads = 1;
  check(express_create(&config, &cache));
  for (i = 0; i < DIM; ++i) {
    q[i] = (float)(i * 5 % 7) / 7;
    k[i] = (float)(i * 3 % 5) / 5;
    v[i] = (float)(i * 7 % 11) / 11;
  }
  start = now();
  for (i = 0; i < calls; ++i) {
    check(express_append(cache, 0, &tk, &tv));
    check(express_attend(cache, 0, &tq, &to, NULL));
  }
  step = now() - start;
  start = now();
  for (i = 0; i < calls; ++i) check(express_bytes(cache, &bytes));
  look = now() - start;
  for (i = 0; i < DIM; ++i) sum += out[i];
  check(express_get_stats(cache, 0, &stats));
  printf("%.1f %.1f %.4f %lld\n", step / (double)calls, look / (double)calls, sum, (long long)stats.halvings);
  express_destroy(&cache);
  return 0;
}
