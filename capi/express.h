/* express.h - the C ABI of Express, version 1.1 (C99).
 *
 * Express keeps the KV cache of a transformer inside a fixed memory budget, however long the sequence grows, and
 * computes attention over what it keeps. One cache serves one sequence: per layer and KV head it holds a weighted set
 * of keys and values. Tokens are appended; attention over the set is softmax attention with log-weights added to the
 * logits:
 *
 *     out(q) = sum_j w_j^a exp(s<q,k_j>) v_j / sum_j w_j^a exp(s<q,k_j>)      lse(q) = log sum_j w_j^a exp(s<q,k_j>)
 *
 * with s = scale and a = weight_exponent. The weights of the entries held always sum to the number of tokens appended.
 * Method: kernel halving; Gong, Carrell, Dwivedi, Mackey, "Express Language Modeling", arXiv:2606.10944.
 *
 * Errors.   Every fallible call returns an express_status; express_last_error() has a message that names the argument,
 *           what was expected and what came. A call that fails changed nothing, neither the cache nor an output (the one
 *           exception is EXPRESS_STATUS_BROKEN, see there). Nothing throws, aborts, exits or prints.
 * Threads.  Distinct caches are independent. On one cache at most one thread may be in a call that takes a non-const
 *           express_cache, and no other call may run beside it; calls that take a const one may run concurrently. The
 *           library computes on up to config.threads threads (oneTBB), or on the engine's own through
 *           config.parallel_for; results do not depend on their number.
 * Memory.   Everything a cache needs is allocated in one piece by express_create (oneTBB's own pool of threads is not
 *           counted); append, attend, prefill, compress, export and rollback allocate nothing.
 * Tensors.  Views in the shape of DLPack: the caller owns data, shape and strides; the library reads or writes them only
 *           during the call. Inputs and outputs must not overlap. The innermost stride must be 1.
 */
#ifndef EXPRESS_H_
#define EXPRESS_H_

#include <stddef.h>
#include <stdint.h>

#define EXPRESS_VERSION_MAJOR 1
#define EXPRESS_VERSION_MINOR 1
#define EXPRESS_VERSION_PATCH 0

#if defined(__GNUC__) || defined(__clang__)
#define EXPRESS_API __attribute__((visibility("default")))
#define EXPRESS_MUST_USE __attribute__((warn_unused_result))
#else
#define EXPRESS_API
#define EXPRESS_MUST_USE
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------ status and errors ---- */

/* Numbers are pinned: a status keeps its number for ever, new ones are appended. */
typedef enum express_status {
  EXPRESS_STATUS_OK = 0,
  EXPRESS_STATUS_INVALID_ARGUMENT = 1,     /* a null pointer, a value outside its range, an unknown enumerator */
  EXPRESS_STATUS_OUT_OF_RANGE = 2,         /* a layer or KV head that does not exist */
  EXPRESS_STATUS_SHAPE_MISMATCH = 3,       /* ndim, shape or strides of a tensor */
  EXPRESS_STATUS_DTYPE_MISMATCH = 4,       /* a tensor of a type that this argument cannot have */
  EXPRESS_STATUS_DEVICE_MISMATCH = 5,      /* a tensor that lives on another device than the cache */
  EXPRESS_STATUS_NOT_FINITE = 6,           /* NaN or infinity in an input, found because config.validate is on */
  EXPRESS_STATUS_BUDGET_TOO_SMALL = 7,     /* sinks + window + protected + one halving do not fit */
  EXPRESS_STATUS_WOULD_COMPRESS = 8,       /* config.auto_compress is off and the append needs a halving */
  EXPRESS_STATUS_ROLLBACK_UNAVAILABLE = 9, /* more tokens than can be taken back */
  EXPRESS_STATUS_BUFFER_TOO_SMALL = 10,    /* an output or a workspace is smaller than needed */
  EXPRESS_STATUS_SIZE_OVERFLOW = 11,       /* sizes whose product does not fit */
  EXPRESS_STATUS_OUT_OF_MEMORY = 12,       /* the allocation at creation failed */
  EXPRESS_STATUS_UNSUPPORTED = 13, /* well-formed, but not in this build: another device, a reserved enumerator */
  /* The engine's parallel_for did not run every task once. From a mutating call, and from every call after it: the cache
   * accepts only express_reset and express_destroy. From express_attend: only its outputs are incomplete. */
  EXPRESS_STATUS_BROKEN = 14,
  EXPRESS_STATUS_INTERNAL = 15, /* a defect of the library */
  /* Since 1.1. A CUDA call failed: no driver or device, or an error that an earlier kernel of the process left behind. From a
   * call that had begun to work, the cache afterwards accepts only express_reset and express_destroy. */
  EXPRESS_STATUS_DEVICE_ERROR = 16,
  EXPRESS_STATUS_STEPS_PENDING = 17, /* since 1.1: steps were prepared for a graph and have not all been replayed */
  EXPRESS_STATUS_RING_FULL = 18      /* since 1.1: more prepared steps than the ring holds */
} express_status;

/* The name of a status, for example "EXPRESS_STATUS_OK"; "EXPRESS_STATUS_UNKNOWN" for a number that is none. Static
 * storage. */
EXPRESS_API const char *express_status_name(express_status status);

/* The message of the last call of this thread that failed; "" before the first. Valid until the thread's next failing
 * call. */
EXPRESS_API const char *express_last_error(void);

/* major * 10000 + minor * 100 + patch of the library that is loaded (the header's: EXPRESS_VERSION_*), and the same as
 * text, "1.1.0". */
EXPRESS_API uint32_t express_version(void);
EXPRESS_API const char *express_version_string(void);

/* ------------------------------------------------------------------------------------------------------ tensors ---- */

/* Element types. 4 to 15 are reserved. */
typedef enum express_dtype {
  EXPRESS_DTYPE_F32 = 0,
  EXPRESS_DTYPE_F16 = 1,  /* IEEE binary16 */
  EXPRESS_DTYPE_BF16 = 2, /* bfloat16 */
  EXPRESS_DTYPE_I8 = 3,   /* since 1.1; config.dtype only, see there: no tensor has it */
  EXPRESS_DTYPE_I64 = 16  /* positions only */
} express_dtype;

/* Devices, numbered as in DLPack. */
typedef enum express_device_type {
  EXPRESS_DEVICE_CPU = 1,
  EXPRESS_DEVICE_CUDA = 2 /* EXPRESS_STATUS_UNSUPPORTED in a library built without it */
} express_device_type;

/* A view of an array. `strides` counts elements, not bytes; NULL means row-major and contiguous. */
typedef struct express_tensor {
  void *data;
  int32_t device_type; /* express_device_type */
  int32_t device_id;
  int32_t dtype; /* express_dtype */
  int32_t ndim;
  const int64_t *shape;   /* (ndim) */
  const int64_t *strides; /* (ndim), or NULL */
} express_tensor;

/* --------------------------------------------------------------------------------------------- configuration ---- */

/* "Let the library decide", in the integer and floating-point fields that say so. Zero means zero. */
#define EXPRESS_AUTO (-1)

typedef enum express_schedule {
  EXPRESS_SCHEDULE_BUDGET = 0, /* halve one level when no slot is free: stays close to the budget */
  EXPRESS_SCHEDULE_ROUNDS = 1  /* the paper's rounds of four: between s and 8 s entries, s a power of two */
} express_schedule;

typedef enum express_halving {
  EXPRESS_HALVING_KERNEL = 0, /* kernel halving */
  EXPRESS_HALVING_COIN = 1    /* a fair coin per pair: uniform sampling, the baseline */
} express_halving;

typedef enum express_head_budgets {
  EXPRESS_HEAD_BUDGETS_AUTO = 0,    /* OBSERVED where it can be (see express_config), else FIXED */
  EXPRESS_HEAD_BUDGETS_FIXED = 1,   /* for the life of the cache: equal, or by head_share or head_settings */
  EXPRESS_HEAD_BUDGETS_OBSERVED = 2 /* follow the attention that heads are seen to pay to far tokens */
} express_head_budgets;

/* Since 1.1: by which score entries are protected; mu is the mean of the keys that departed lately, keys are taken without their rotary
 * positions where rope_frequencies are given. */
typedef enum express_protection_score {
  EXPRESS_PROTECTION_SCORE_AUTO =
      0, /* ENERGY_VALUE with rope_frequencies and a mean of 640 entries or more, else ENERGY */
  EXPRESS_PROTECTION_SCORE_ENERGY = 1,      /* |k - mu|^2; without rope_frequencies what 1.0 did */
  EXPRESS_PROTECTION_SCORE_ENERGY_VALUE = 2 /* |k - mu|^2 |v| */
} express_protection_score;

/* Since 1.1: which elements of a key are turned together, of 2 n that are (n = rope_frequency_count). */
typedef enum express_rope_layout {
  EXPRESS_ROPE_LAYOUT_HALVES = 0,     /* pair i is elements (i, n + i): Llama, Qwen, GPT-NeoX, Hugging Face's models */
  EXPRESS_ROPE_LAYOUT_INTERLEAVED = 1 /* (2 i, 2 i + 1): GPT-J, Meta's own Llama code */
} express_rope_layout;

typedef enum express_budget_unit {
  EXPRESS_BUDGET_ENTRIES = 0, /* budget = entries per KV head, the mean over all layers and KV heads */
  EXPRESS_BUDGET_BYTES = 1    /* budget = bytes of the whole cache; the largest entry budget that fits is used */
} express_budget_unit;

/* Runs body(task, i, worker) for every i in [0, count), in any order, on any threads, and returns when all are done.
 * `worker` is in [0, config.threads) and no two concurrent calls of body may have the same one. */
typedef void (*express_parallel_for)(void *context, int64_t count, void (*body)(void *task, int64_t i, int32_t worker),
                                     void *task);

/* The setting of one (layer, KV head), or of all KV heads of one layer. */
typedef struct express_head_setting {
  int64_t budget;            /* entries, everything included */
  int64_t sinks;             /* the first tokens, kept exactly; EXPRESS_AUTO: config.sinks */
  int64_t window;            /* the last tokens, kept exactly; EXPRESS_AUTO: from the budget, see config.window */
  int64_t protected_entries; /* EXPRESS_AUTO: from the budget, see config.protected_entries */
} express_head_setting;

/* struct_size comes first and must be sizeof(express_config). Fields are only ever appended; those beyond the caller's
 * struct_size take their defaults, and a non-zero tail that this library does not know is refused. Start from
 * EXPRESS_CONFIG_INIT or express_config_init and set at least layers, query_heads, kv_heads, the head dims and budget.
 */
typedef struct express_config {
  uint32_t struct_size;

  /* The model. */
  int32_t layers;      /* >= 1 */
  int32_t query_heads; /* of one layer; a multiple of kv_heads */
  int32_t kv_heads;    /* of one layer */
  int32_t key_dim;     /* head dimension of queries and keys, 1 .. 1024 */
  int32_t value_dim;   /* head dimension of values, 1 .. 1024 */
  double scale;        /* softmax scale, > 0; EXPRESS_AUTO: 1 / sqrt(key_dim) */
  /* express_dtype of the stored keys and values: F32, F16, BF16 or I8; arithmetic is always float32. I8:
   * every key and every value is a row of 8-bit codes with one scale, max |x| / 127 rounded up to bfloat16, so x is off by half
   * of that at most; an entry takes key_dim + value_dim + 4 bytes. What goes in and comes out stays F32, F16 or BF16. One NaN or
   * infinity makes its whole row NaN. */
  int32_t dtype;
  int32_t device_type; /* express_device_type */
  int32_t device_id;   /* 0 on the CPU */

  /* Global index of layer 0 and of KV head 0: a model that is split over processes draws the same random numbers as the
   * whole one. */
  int32_t first_layer;
  int32_t first_kv_head;

  /* The budget: entries per KV head, the mean over all layers and heads, or bytes of the whole cache. */
  int32_t budget_unit; /* express_budget_unit */
  int64_t budget;

  /* Kept exactly, with weight 1: the first tokens; the last tokens; and, among those that left the window, the ones that
   * stand out most, by protection_score. EXPRESS_AUTO divides each head's budget: its base (5/16 of the mean budget) goes
   * to the window; of what it has beyond, 60 % to the window, 28 % to protected entries and 12 % to the weighted coreset;
   * with observed budgets and a mean below 1024 entries 70 % and 30 %, and the coreset is the smallest there can be.
   * The most recent token is always exact, also with window 0. */
  int64_t sinks;
  int64_t window;            /* or EXPRESS_AUTO */
  int64_t protected_entries; /* or EXPRESS_AUTO */
  int64_t rollback_reserve;  /* how many tokens express_rollback can always take back */

  /* Budgets that differ by head. head_share: every KV head gets the base, and what remains of the mean budget is shared
   * out in proportion to these (finite, >= 0; good shares: the squared attention mass on far tokens). head_settings:
   * explicit budgets, instead of budget and head_share. Counts: 0, layers, or layers * kv_heads, layer-major. Both arrays
   * are copied. */
  const float *head_share;
  int64_t head_share_count;
  const express_head_setting *head_settings;
  int64_t head_settings_count;

  /* The method. The defaults are the measured best. The paper's own setting, for which its error bound is proven, is
   * weight_exponent 1, gamma 0, tau 1, protected_entries 0, schedule ROUNDS. */
  int32_t schedule; /* express_schedule */
  int32_t halving;  /* express_halving */
  /* alpha in [0, 1]: attention uses alpha * log w. EXPRESS_AUTO: 0.25 where head_budgets comes to OBSERVED with a mean below 1024
   * entries, whose coresets are the smallest, else 0.5. */
  double weight_exponent;
  double gamma; /* in [0, 1]: key kernel, 0 exponential (paper) to 1 Gaussian */
  double tau;   /* >= 0: scale of the halving thresholds; smaller is greedier */
  double delta; /* in (0, 1): failure probability of the halving */

  /* The budget schedule, over the B' slots of the coreset. */
  double level_fraction; /* c in (0, 1): population of a level over that of the level above */
  int64_t level_floor;   /* a level is halved at so many entries or more; EXPRESS_AUTO: max(2, min(64, B'/16)) */
  int64_t max_levels;    /* levels alive at once, >= 2; EXPRESS_AUTO: max(2, min(B'/4, B'/(2 level_floor))) */

  uint64_t seed; /* of all random choices */

  /* Running. */
  int32_t prefill_block; /* queries of one block share the cache of its start; blocks begin at absolute multiples */
  int32_t auto_compress; /* 0: an append that needs a halving is refused; express_compress must make room first */
  int32_t validate;      /* 1: refuse NaN and infinity in every input tensor */
  int32_t threads;       /* threads to compute on, >= 1; EXPRESS_AUTO: one per hardware thread */
  express_parallel_for parallel_for; /* NULL: oneTBB; otherwise threads must say how many workers it has */
  void *parallel_for_context;

  /* Since 1.1. CUDA caches: the cudaStream_t that calls enqueue on until express_set_stream; NULL: the default stream. */
  void *stream;

  /* Since 1.1. express_head_budgets. OBSERVED: all heads begin with the mean budget B. For every 16th token from B/2 up to 7/8 B
   * express_attend and express_prefill note how much of its attention each KV head pays to tokens more than B/2 back. At 15/16 B tokens
   * the total is shared out anew: every KV head gets 5/16 B, and what remains goes in proportion to the third power of that share; at
   * most 2 n entries at n tokens, and 8 B, go to one head, so that it is done once more at 2 B and at 4 B tokens. Heads that would get
   * about as much (within a factor of 2) get the same, their mean. It happens in the memory that the cache has, at the beginning of a
   * call that appends (on CUDA also of express_step_prepare) and when all layers stand at the same number of tokens. Needs more than one (layer, KV head), automatic window and protected_entries, no head_share or
   * head_settings, schedule BUDGET and auto_compress. What is kept then depends on the queries too, on which heads one cache holds, and
   * on where calls stand in the stream: prefill a prompt in chunks of at most B tokens, all layers of one before the next; behind a
   * longer one budgets are settled late.
   * AUTO: OBSERVED on the CPU where the above and the budget allow it and first_layer and first_kv_head are 0, else FIXED. Set FIXED
   * where what is kept must depend on counts and keys alone, and in all processes that a model's heads or layers are split over.
   * Programs compiled before this field was there get FIXED. express_stats tells which it is. */
  int32_t head_budgets;

  /* Since 1.1. express_protection_score, and the rotary positions of the model's keys, which it needs to take them off for scoring (what
   * is stored and attended to stays as it came). rope_frequencies: by how many radians each pair of elements is turned from one token to
   * the next, finite and at most pi in magnitude, rope_theta^(-2 i / (2 n)) in a plain model; n = rope_frequency_count of them, 0 ..
   * key_dim / 2, for the first 2 n elements of every key, in all layers and heads alike; copied. A token's position is its index in the
   * cache's stream; a constant more makes no difference. None (NULL and 0, the default): not known, or the model has no rotary
   * positions; keys are scored as they come. Give none where a model's frequencies differ by layer, change with the
   * length, or positions are not counted token by token. With them the better entries are kept (measured: bench/results/quality). */
  int32_t protection_score;
  const float *rope_frequencies;
  int64_t rope_frequency_count;
  int32_t rope_layout; /* express_rope_layout */
  int32_t reserved;    /* 0 */
} express_config;

#define EXPRESS_CONFIG_INIT                                                                                          \
  {                                                                                                                  \
    (uint32_t)sizeof(express_config), 1, 1, 1, 64, 64, EXPRESS_AUTO, EXPRESS_DTYPE_F32, EXPRESS_DEVICE_CPU, 0, 0, 0, \
        EXPRESS_BUDGET_ENTRIES, 1024, 4, EXPRESS_AUTO, EXPRESS_AUTO, 0, NULL, 0, NULL, 0, EXPRESS_SCHEDULE_BUDGET,   \
        EXPRESS_HALVING_KERNEL, EXPRESS_AUTO, 1.0, 0.1, 0.5, 0.6, EXPRESS_AUTO, EXPRESS_AUTO, 0, 256, 1, 0,          \
        EXPRESS_AUTO, NULL, NULL, NULL, EXPRESS_HEAD_BUDGETS_AUTO, EXPRESS_PROTECTION_SCORE_AUTO, NULL, 0,           \
        EXPRESS_ROPE_LAYOUT_HALVES, 0                                                                                \
  }

/* The same as a function, for languages without the macro: fills the first struct_size bytes of *config with the
 * defaults. Refuses a struct_size that no version of the library had. */
EXPRESS_API EXPRESS_MUST_USE express_status express_config_init(express_config *config, uint32_t struct_size);

/* ---------------------------------------------------------------------------------------- creation and its size ---- */

typedef struct express_cache express_cache;

/* What express_create(config) would take, without taking it: bytes in all, and the mean entries per KV head. Either
 * output may be NULL. A cache never takes more later, however long the sequence. */
EXPRESS_API EXPRESS_MUST_USE express_status express_size(const express_config *config, int64_t *bytes,
                                                         int64_t *mean_entries);

/* Creates an empty cache; *cache is NULL after a failure. The config and the arrays it points to are copied. */
EXPRESS_API EXPRESS_MUST_USE express_status express_create(const express_config *config, express_cache **cache);

/* Frees the cache and sets *cache to NULL. NULL and a pointer to NULL are fine. */
EXPRESS_API void express_destroy(express_cache **cache);

/* Forgets all tokens, keeps the memory; the cache is as new, and mended if it was broken. */
EXPRESS_API EXPRESS_MUST_USE express_status express_reset(express_cache *cache);

/* -------------------------------------------------------------------------------------------- streaming: decode ---- */

/* Ingests n tokens into one layer; n may be 0.
 *   k: (n, kv_heads, key_dim)      F32, F16 or BF16, converted to the cache's dtype
 *   v: (n, kv_heads, value_dim)
 * A single token may pay for a halving of up to 0.4 B' entries; amortised, the work per token is O(B' log B'). */
EXPRESS_API EXPRESS_MUST_USE express_status express_append(express_cache *cache, int32_t layer, const express_tensor *k,
                                                           const express_tensor *v);

/* The same for all layers at once; fails as a whole.
 *   k: (layers, n, kv_heads, key_dim)
 *   v: (layers, n, kv_heads, value_dim) */
EXPRESS_API EXPRESS_MUST_USE express_status express_append_all(express_cache *cache, const express_tensor *k,
                                                               const express_tensor *v);

/* Attention of n queries over everything the layer holds (no causal mask among them). Read-only; may run concurrently.
 *   q:   (n, query_heads, key_dim)     F32, F16 or BF16
 *   out: (n, query_heads, value_dim)   F32, F16 or BF16
 *   lse: (n, query_heads)              F32, or NULL
 * Query head h uses KV head h / (query_heads / kv_heads). Over an empty layer out = 0 and lse = -inf. lse includes the
 * tempered weights, so that results over disjoint sets of tokens can be merged by it. */
EXPRESS_API EXPRESS_MUST_USE express_status express_attend(const express_cache *cache, int32_t layer,
                                                           const express_tensor *q, const express_tensor *out,
                                                           const express_tensor *lse);

/* ---------------------------------------------------------------------------------- streaming: many sequences ---- */

/* Since 1.1. express_append of one token, and express_attend of one query token, for each of `count` caches (distinct, of
 * equal layers, heads, dims, dtype, device and scale; budgets and lengths may differ; on CUDA of one weight_exponent and all on one
 * stream). The arrays of pointers are read during the call only.
 *   k: (count, kv_heads, key_dim)        v: (count, kv_heads, value_dim)
 *   q: (count, query_heads, key_dim)     out: (count, query_heads, value_dim)     lse: (count, query_heads) F32, or NULL
 * append fails as a whole. On CUDA the work of all caches is a few kernel launches, whatever their number. */
EXPRESS_API EXPRESS_MUST_USE express_status express_append_batch(express_cache *const *caches, int64_t count,
                                                                 int32_t layer, const express_tensor *k,
                                                                 const express_tensor *v);
EXPRESS_API EXPRESS_MUST_USE express_status express_attend_batch(const express_cache *const *caches, int64_t count,
                                                                 int32_t layer, const express_tensor *q,
                                                                 const express_tensor *out, const express_tensor *lse);

/* ----------------------------------------------------------------------------------- CUDA: streams and graphs ---- */

/* On CUDA every call enqueues on the cache's stream and returns: no call but express_create, express_destroy,
 * express_reset, express_save and express_load synchronises, and nothing is allocated on the device after creation. (With observed
 * budgets one call in a cache's life waits for what was observed, if the host is further ahead of the device than B/16 tokens.)
 * Tensors are device memory, every row of k, v, q and out aligned to 16 bytes; they must live until the stream has passed
 * the call. Concurrent express_attend calls on one cache must be on one stream.
 *
 * Since 1.1. The stream (cudaStream_t) of later calls. The caller orders it after work of this cache on the old one. On the
 * CPU: EXPRESS_STATUS_UNSUPPORTED. */
EXPRESS_API EXPRESS_MUST_USE express_status express_set_stream(express_cache *cache, void *stream);

/* Since 1.1. CUDA graphs: which slots a token takes and what is halved depends on counts, so the host plans it. While the
 * stream is being captured, express_append (and express_append_batch) of one token only records kernels that read their
 * operations from a ring on the device; express_step_prepare plans the coming n tokens of all layers into that ring, on the
 * cache's stream, outside of the capture. Capture one step (for every layer in order: append, attend), then: prepare n,
 * replay n times, and again. Eager calls that change the cache need all prepared steps to have run (else
 * EXPRESS_STATUS_STEPS_PENDING: synchronise the stream, or cancel); a ring without room for n more steps is
 * EXPRESS_STATUS_RING_FULL; the ring holds at least 64 steps once its steps have run. A replay that was not prepared changes
 * nothing and breaks the cache (EXPRESS_STATUS_BROKEN from the next call that notices). On the CPU both calls do nothing.
 * Observed budgets are settled by express_step_prepare if they are due and all steps prepared before have run; n steps that reach past
 * a settling put it off to the next call. A graph stays valid when budgets change.
 *
 * express_step_cancel: the caller has synchronised the stream; prepared steps that were not replayed are taken back. */
EXPRESS_API EXPRESS_MUST_USE express_status express_step_prepare(express_cache *cache, int64_t n);
EXPRESS_API EXPRESS_MUST_USE express_status express_step_cancel(express_cache *cache);

/* ------------------------------------------------------------------------------------------- streaming: prefill ---- */

/* Scratch of the caller's. */
typedef struct express_workspace {
  void *data;
  size_t bytes;
} express_workspace;

/* How many bytes of workspace express_prefill of n tokens needs: 0 on the CPU. */
EXPRESS_API EXPRESS_MUST_USE express_status express_workspace_size(const express_cache *cache, int64_t n,
                                                                   size_t *bytes);

/* Causal attention of n new tokens over the layer's cache and themselves, and their append, in one call.
 *   q, out, lse as in express_attend; k, v as in express_append; the same n in all
 *   workspace: may be NULL when none is needed
 * Tokens are taken in blocks that begin at absolute multiples of config.prefill_block: a query attends to what the layer
 * held when its block (or this call) began, and exactly to the tokens of its block up to its own. Short prompts are one block:
 * n tokens that begin an empty layer, n < 4096 and at most three times the KV head's budget, where budgets are fixed. Else a prompt in
 * chunks that end at multiples of prefill_block, the first of them no such short one above the budget, gives the results of the prompt
 * whole. Any cut leaves the same cache. (Both with fixed budgets of heads; observed ones are settled between calls.) */
EXPRESS_API EXPRESS_MUST_USE express_status express_prefill(express_cache *cache, int32_t layer,
                                                            const express_tensor *q, const express_tensor *k,
                                                            const express_tensor *v, const express_tensor *out,
                                                            const express_tensor *lse,
                                                            const express_workspace *workspace);

/* ---------------------------------------------------------------------------- compression ahead of need, rollback ---- */

/* Halves now, off the critical path, until every KV head of the layer (EXPRESS_AUTO: of every layer) can take `tokens`
 * more tokens without a halving, or until half of its coreset's slots are free. *achieved (may be NULL) receives how many
 * all of them now take. Under the schedule of rounds halvings are due at fixed counts: the call only reports.
 * Halving early changes what is kept later: the cache then depends on where the calls stand in the stream. */
EXPRESS_API EXPRESS_MUST_USE express_status express_compress(express_cache *cache, int32_t layer, int64_t tokens,
                                                             int64_t *achieved);

/* Drops the last `tokens` tokens of every layer; ROLLBACK_UNAVAILABLE beyond express_rollback_available. No halving,
 * admission or draw is undone: what had left the window stays compressed. */
EXPRESS_API EXPRESS_MUST_USE express_status express_rollback(express_cache *cache, int64_t tokens);
EXPRESS_API EXPRESS_MUST_USE express_status express_rollback_available(const express_cache *cache, int64_t *tokens);

/* --------------------------------------------------------------------------------- taking the weighted cache out ---- */

/* The number of entries that a KV head holds now. */
EXPRESS_API EXPRESS_MUST_USE express_status express_entries(const express_cache *cache, int32_t layer, int32_t kv_head,
                                                            int64_t *count);

/* Copies the weighted cache of one KV head out, in no particular order.
 *   k: (capacity, key_dim)     F32, F16 or BF16
 *   v: (capacity, value_dim)   F32, F16 or BF16
 *   log_weight: (capacity)     F32, or NULL
 *   position:   (capacity)     I64, or NULL: the index in the stream of the token that the entry was
 * capacity must be at least express_entries. *count receives the number of entries; rows beyond it are left alone. */
EXPRESS_API EXPRESS_MUST_USE express_status express_export(const express_cache *cache, int32_t layer, int32_t kv_head,
                                                           const express_tensor *k, const express_tensor *v,
                                                           const express_tensor *log_weight,
                                                           const express_tensor *position, int64_t *count);

/* ------------------------------------------------------------------------------------------------ save and fork ---- */

/* Since 1.1. A cache as bytes in the host's memory, to be kept or sent: keys, values, weights, positions and all state, so that a
 * loaded cache goes on exactly as the saved one would have. The configuration is not among them: express_load needs a cache whose
 * model, dtype, budgets, method, seed and first_layer, first_kv_head are those of the saved one (another device, query_heads,
 * weight_exponent, prefill_block, threads are fine; where head_budgets is AUTO, which does not mean the same on all devices, say
 * what express_stats says of the saved one), and takes the place of all that it held. How many bytes there are depends on
 * the configuration alone. On CUDA both calls wait for the stream. Bytes are checked (configuration, checksum) before
 * anything changes; they are trusted beyond that. */
EXPRESS_API EXPRESS_MUST_USE express_status express_save_size(const express_cache *cache, size_t *bytes);
EXPRESS_API EXPRESS_MUST_USE express_status express_save(const express_cache *cache, void *data, size_t bytes);
EXPRESS_API EXPRESS_MUST_USE express_status express_load(express_cache *cache, const void *data, size_t bytes);

/* Since 1.1. Makes `cache` hold what `from` holds: to fork a sequence, or to reorder beams. Both on one device and of configurations
 * that express_load would accept; on CUDA the copy is enqueued on the stream of `cache`, after the work of `from` and before what
 * comes next on its stream. */
EXPRESS_API EXPRESS_MUST_USE express_status express_copy(express_cache *cache, const express_cache *from);

/* ------------------------------------------------------------------------------------------ one-shot compression ---- */

/* Compresses a given cache of n tokens into a weighted one with the config's schedule, sinks, window and protection.
 * config.layers must be 1, and budget (in ENTRIES) is what every head keeps.
 *   k: (n, kv_heads, key_dim)                      v: (n, kv_heads, value_dim)
 *   out_k: (kv_heads, capacity, key_dim)           out_v: (kv_heads, capacity, value_dim)
 *   log_weight: (kv_heads, capacity) F32           position: (kv_heads, capacity) I64, or NULL
 *   capacity >= config.budget                      *count: entries of every KV head
 *   workspace: express_compress_kv_workspace(config) bytes, aligned to 64; no tensor memory is allocated beside it */
EXPRESS_API EXPRESS_MUST_USE express_status express_compress_kv_workspace(const express_config *config, size_t *bytes);
EXPRESS_API EXPRESS_MUST_USE express_status express_compress_kv(const express_config *config, const express_tensor *k,
                                                                const express_tensor *v, const express_tensor *out_k,
                                                                const express_tensor *out_v,
                                                                const express_tensor *log_weight,
                                                                const express_tensor *position, int64_t *count,
                                                                const express_workspace *workspace);

/* --------------------------------------------------------------------------------------------------------- stats ---- */

/* struct_size first, as in express_config; only struct_size bytes are written. */
typedef struct express_stats {
  uint32_t struct_size;
  int32_t head_budgets;   /* since 1.1: what config.head_budgets came to, FIXED or OBSERVED */
  int64_t tokens;         /* tokens seen, less those rolled back; of all layers: the smallest */
  int64_t entries;        /* entries held now, over the KV heads of the layer(s) */
  int64_t entries_peak;   /* the most that were ever held after a call */
  int64_t entries_budget; /* the most that can ever be held */
  int64_t min_weight;     /* smallest and largest weight among the entries; 0 when there are none */
  int64_t max_weight;
  int64_t halvings;        /* since creation or reset, counted once per plan (KV heads of one setting share it) */
  int64_t bytes;           /* of the whole cache, now */
  int64_t bytes_peak;      /* of the whole cache, at most, a prefill workspace of the caller included */
  double compress_seconds; /* time in writes, admissions and halvings, summed over threads */
} express_stats;

#define EXPRESS_STATS_INIT \
  { (uint32_t)sizeof(express_stats), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0.0 }

/* Numbers of one layer, or of all (layer EXPRESS_AUTO). */
EXPRESS_API EXPRESS_MUST_USE express_status express_get_stats(const express_cache *cache, int32_t layer,
                                                              express_stats *stats);

/* Bytes the cache has allocated: constant from creation to destruction, and equal to what express_size said. */
EXPRESS_API EXPRESS_MUST_USE express_status express_bytes(const express_cache *cache, int64_t *bytes);

#ifdef __cplusplus
}
#endif
#endif /* EXPRESS_H_ */
