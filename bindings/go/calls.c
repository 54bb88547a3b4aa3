#include "calls.h"

#include <stdlib.h>
#include <string.h>

/* The message belongs to this thread, until its next failure. Without memory for it there is none; the status stays. */
static result of(express_status status, int64_t value) {
  result r = {(int32_t)status, NULL, value};
  if (status == EXPRESS_STATUS_OK) return r;
  const char *message = express_last_error();
  const size_t bytes = strlen(message) + 1;
  r.message = malloc(bytes);
  if (r.message != NULL) memcpy(r.message, message, bytes);
  return r;
}

/* The tensor, in the room given; NULL of one that is left out. */
static const express_tensor *tensor(const view *at, void *data, express_tensor *room) {
  const express_tensor t = {at->address != 0 ? (void *)(uintptr_t)at->address : data,
                            at->device_type,
                            at->device_id,
                            at->dtype,
                            at->ndim,
                            at->shape,
                            at->strides};
  *room = t;
  return at->present ? room : NULL;
}

static express_cache *of_c(const handle *cache) { return (express_cache *)(uintptr_t)cache; }

static void set_arrays(express_config *config, const float *head_share, const express_head_setting *head_settings,
                       const float *rope_frequencies) {
  config->head_share = head_share;
  config->head_settings = head_settings;
  config->rope_frequencies = rope_frequencies;
}

result call_config_init(express_config *config) {
  return of(express_config_init(config, (uint32_t)sizeof(*config)), 0);
}

sized call_size(express_config config, const float *head_share, const express_head_setting *head_settings,
                const float *rope_frequencies) {
  sized s;
  memset(&s, 0, sizeof(s));
  set_arrays(&config, head_share, head_settings, rope_frequencies);
  s.result = of(express_size(&config, &s.bytes, &s.mean_entries), 0);
  return s;
}

created call_create(express_config config, const float *head_share, const express_head_setting *head_settings,
                    const float *rope_frequencies) {
  created c;
  express_cache *cache = NULL;
  memset(&c, 0, sizeof(c));
  set_arrays(&config, head_share, head_settings, rope_frequencies);
  c.result = of(express_create(&config, &cache), 0);
  c.cache = (handle *)cache;
  return c;
}

void call_destroy(handle *cache) {
  express_cache *own = of_c(cache);
  express_destroy(&own);
}

result call_reset(handle *cache) { return of(express_reset(of_c(cache)), 0); }

result call_append(handle *cache, int32_t layer, view k, uint8_t *k_data, view v, uint8_t *v_data) {
  express_tensor tk, tv;
  return of(express_append(of_c(cache), layer, tensor(&k, k_data, &tk), tensor(&v, v_data, &tv)), 0);
}

result call_append_all(handle *cache, view k, uint8_t *k_data, view v, uint8_t *v_data) {
  express_tensor tk, tv;
  return of(express_append_all(of_c(cache), tensor(&k, k_data, &tk), tensor(&v, v_data, &tv)), 0);
}

result call_attend(const handle *cache, int32_t layer, view q, uint8_t *q_data, view out, uint8_t *out_data, view lse,
                   uint8_t *lse_data) {
  express_tensor tq, to, tl;
  return of(express_attend(of_c(cache), layer, tensor(&q, q_data, &tq), tensor(&out, out_data, &to),
                           tensor(&lse, lse_data, &tl)),
            0);
}

result call_append_batch(handle **caches, int64_t count, int32_t layer, view k, uint8_t *k_data, view v,
                         uint8_t *v_data) {
  express_tensor tk, tv;
  return of(express_append_batch((express_cache *const *)caches, count, layer, tensor(&k, k_data, &tk),
                                 tensor(&v, v_data, &tv)),
            0);
}

result call_attend_batch(handle **caches, int64_t count, int32_t layer, view q, uint8_t *q_data, view out,
                         uint8_t *out_data, view lse, uint8_t *lse_data) {
  express_tensor tq, to, tl;
  return of(express_attend_batch((const express_cache *const *)caches, count, layer, tensor(&q, q_data, &tq),
                                 tensor(&out, out_data, &to), tensor(&lse, lse_data, &tl)),
            0);
}

result call_set_stream(handle *cache, uint64_t stream) {
  return of(express_set_stream(of_c(cache), (void *)(uintptr_t)stream), 0);
}

result call_step_prepare(handle *cache, int64_t n) { return of(express_step_prepare(of_c(cache), n), 0); }

result call_step_cancel(handle *cache) { return of(express_step_cancel(of_c(cache)), 0); }

result call_workspace_size(const handle *cache, int64_t n) {
  size_t bytes = 0;
  const express_status status = express_workspace_size(of_c(cache), n, &bytes);
  return of(status, (int64_t)bytes);
}

result call_prefill(handle *cache, int32_t layer, view q, uint8_t *q_data, view k, uint8_t *k_data, view v,
                    uint8_t *v_data, view out, uint8_t *out_data, view lse, uint8_t *lse_data, uint64_t workspace,
                    uint64_t bytes) {
  express_tensor tq, tk, tv, to, tl;
  const express_workspace scratch = {(void *)(uintptr_t)workspace, (size_t)bytes};
  return of(
      express_prefill(of_c(cache), layer, tensor(&q, q_data, &tq), tensor(&k, k_data, &tk), tensor(&v, v_data, &tv),
                      tensor(&out, out_data, &to), tensor(&lse, lse_data, &tl), &scratch),
      0);
}

result call_compress(handle *cache, int32_t layer, int64_t tokens) {
  int64_t achieved = 0;
  const express_status status = express_compress(of_c(cache), layer, tokens, &achieved);
  return of(status, achieved);
}

result call_rollback(handle *cache, int64_t tokens) { return of(express_rollback(of_c(cache), tokens), 0); }

result call_rollback_available(const handle *cache) {
  int64_t tokens = 0;
  const express_status status = express_rollback_available(of_c(cache), &tokens);
  return of(status, tokens);
}

result call_entries(const handle *cache, int32_t layer, int32_t kv_head) {
  int64_t count = 0;
  const express_status status = express_entries(of_c(cache), layer, kv_head, &count);
  return of(status, count);
}

result call_export(const handle *cache, int32_t layer, int32_t kv_head, view k, uint8_t *k_data, view v,
                   uint8_t *v_data, view log_weight, uint8_t *log_weight_data, view position, uint8_t *position_data) {
  express_tensor tk, tv, tw, tp;
  int64_t count = 0;
  const express_status status =
      express_export(of_c(cache), layer, kv_head, tensor(&k, k_data, &tk), tensor(&v, v_data, &tv),
                     tensor(&log_weight, log_weight_data, &tw), tensor(&position, position_data, &tp), &count);
  return of(status, count);
}

result call_save_size(const handle *cache) {
  size_t bytes = 0;
  const express_status status = express_save_size(of_c(cache), &bytes);
  return of(status, (int64_t)bytes);
}

result call_save(const handle *cache, uint8_t *data, uint64_t bytes) {
  return of(express_save(of_c(cache), data, (size_t)bytes), 0);
}

result call_load(handle *cache, const uint8_t *data, uint64_t bytes) {
  return of(express_load(of_c(cache), data, (size_t)bytes), 0);
}

result call_copy(handle *cache, const handle *from) { return of(express_copy(of_c(cache), of_c(from)), 0); }

result call_compress_kv_workspace(express_config config, const float *head_share,
                                  const express_head_setting *head_settings, const float *rope_frequencies) {
  size_t bytes = 0;
  express_status status;
  set_arrays(&config, head_share, head_settings, rope_frequencies);
  status = express_compress_kv_workspace(&config, &bytes);
  return of(status, (int64_t)bytes);
}

result call_compress_kv(express_config config, const float *head_share, const express_head_setting *head_settings,
                        const float *rope_frequencies, view k, uint8_t *k_data, view v, uint8_t *v_data, view out_k,
                        uint8_t *out_k_data, view out_v, uint8_t *out_v_data, view log_weight, uint8_t *log_weight_data,
                        view position, uint8_t *position_data, uint64_t workspace, uint64_t bytes) {
  express_tensor tk, tv, tok, tov, tw, tp;
  express_workspace scratch = {(void *)(uintptr_t)workspace, (size_t)bytes};
  void *taken = NULL;
  result r;
  int64_t count = 0;
  express_status status;
  set_arrays(&config, head_share, head_settings, rope_frequencies);
  if (workspace == 0 && config.device_type == EXPRESS_DEVICE_CPU) {
    status = express_compress_kv_workspace(&config, &scratch.bytes);
    if (status != EXPRESS_STATUS_OK) return of(status, 0);
    scratch.bytes = (scratch.bytes + 63) / 64 * 64;
    scratch.data = taken = aligned_alloc(64, scratch.bytes);
    if (taken == NULL) {
      const result none = {EXPRESS_STATUS_OUT_OF_MEMORY, strdup("workspace: no memory for it"), 0};
      return none;
    }
  }
  status =
      express_compress_kv(&config, tensor(&k, k_data, &tk), tensor(&v, v_data, &tv), tensor(&out_k, out_k_data, &tok),
                          tensor(&out_v, out_v_data, &tov), tensor(&log_weight, log_weight_data, &tw),
                          tensor(&position, position_data, &tp), &count, &scratch);
  r = of(status, count);
  free(taken);
  return r;
}

counted call_get_stats(const handle *cache, int32_t layer) {
  counted c;
  memset(&c, 0, sizeof(c));
  c.stats.struct_size = (uint32_t)sizeof(c.stats);
  c.result = of(express_get_stats(of_c(cache), layer, &c.stats), 0);
  return c;
}

result call_bytes(const handle *cache) {
  int64_t bytes = 0;
  const express_status status = express_bytes(of_c(cache), &bytes);
  return of(status, bytes);
}
