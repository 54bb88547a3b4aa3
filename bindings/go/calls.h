/* The C ABI as cgo takes it best, one function for each of express.h that can fail.
 *
 * A tensor comes as a description by value and a pointer to bytes beside it: no Go pointer lies in memory that C is given, and
 * nothing has to be allocated for a call. Results come by value for the same reason. The message of a failure is copied in
 * the call that failed: the next call of a goroutine may be on another thread. */
#ifndef EXPRESS_GO_CALLS_H_
#define EXPRESS_GO_CALLS_H_

#include <express.h>

/* An express_cache: of a complete type, in which cgo sees that there are no pointers. To one that it knows nothing about, it
 * allocates memory in every call. */
typedef struct handle {
  uint8_t opaque;
} handle;

/* An express_tensor without its data. `address` is its data on a device; on the CPU it is 0 and the pointer comes beside. */
typedef struct view {
  uint64_t address;
  int32_t device_type, device_id, dtype, ndim;
  int32_t present; /* 0: NULL is passed instead of the tensor */
  int64_t shape[4], strides[4];
} view;

/* `message` is NULL or to be freed. */
typedef struct result {
  int32_t status;
  char *message;
  int64_t value;
} result;

typedef struct created {
  result result;
  handle *cache;
} created;

typedef struct sized {
  result result;
  int64_t bytes, mean_entries;
} sized;

typedef struct counted {
  result result;
  express_stats stats;
} counted;

result call_config_init(express_config *config);
/* The arrays of a config come beside it, too. */
sized call_size(express_config config, const float *head_share, const express_head_setting *head_settings,
                const float *rope_frequencies);
created call_create(express_config config, const float *head_share, const express_head_setting *head_settings,
                    const float *rope_frequencies);
void call_destroy(handle *cache);
result call_reset(handle *cache);

result call_append(handle *cache, int32_t layer, view k, uint8_t *k_data, view v, uint8_t *v_data);
result call_append_all(handle *cache, view k, uint8_t *k_data, view v, uint8_t *v_data);
result call_attend(const handle *cache, int32_t layer, view q, uint8_t *q_data, view out, uint8_t *out_data, view lse,
                   uint8_t *lse_data);
result call_append_batch(handle **caches, int64_t count, int32_t layer, view k, uint8_t *k_data, view v,
                         uint8_t *v_data);
result call_attend_batch(handle **caches, int64_t count, int32_t layer, view q, uint8_t *q_data, view out,
                         uint8_t *out_data, view lse, uint8_t *lse_data);
result call_set_stream(handle *cache, uint64_t stream);
result call_step_prepare(handle *cache, int64_t n);
result call_step_cancel(handle *cache);
result call_workspace_size(const handle *cache, int64_t n);
result call_prefill(handle *cache, int32_t layer, view q, uint8_t *q_data, view k, uint8_t *k_data, view v,
                    uint8_t *v_data, view out, uint8_t *out_data, view lse, uint8_t *lse_data, uint64_t workspace,
                    uint64_t bytes);
result call_compress(handle *cache, int32_t layer, int64_t tokens);
result call_rollback(handle *cache, int64_t tokens);
result call_rollback_available(const handle *cache);
result call_entries(const handle *cache, int32_t layer, int32_t kv_head);
result call_export(const handle *cache, int32_t layer, int32_t kv_head, view k, uint8_t *k_data, view v,
                   uint8_t *v_data, view log_weight, uint8_t *log_weight_data, view position, uint8_t *position_data);
result call_save_size(const handle *cache);
result call_save(const handle *cache, uint8_t *data, uint64_t bytes);
result call_load(handle *cache, const uint8_t *data, uint64_t bytes);
result call_copy(handle *cache, const handle *from);
result call_compress_kv_workspace(express_config config, const float *head_share,
                                  const express_head_setting *head_settings, const float *rope_frequencies);
/* Without a workspace, one is taken for the call from the host's memory. */
result call_compress_kv(express_config config, const float *head_share, const express_head_setting *head_settings,
                        const float *rope_frequencies, view k, uint8_t *k_data, view v, uint8_t *v_data, view out_k,
                        uint8_t *out_k_data, view out_v, uint8_t *out_v_data, view log_weight, uint8_t *log_weight_data,
                        view position, uint8_t *position_data, uint64_t workspace, uint64_t bytes);
counted call_get_stats(const handle *cache, int32_t layer);
result call_bytes(const handle *cache);

#endif /* EXPRESS_GO_CALLS_H_ */
