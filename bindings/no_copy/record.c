/* Shows what pointers the C ABI is given: loaded before libexpress (LD_PRELOAD), it appends a line to the file named by
 * EXPRESS_POINTERS for every call below, "express_attend q out lse" with the tensors' data in hexadecimal (0: no tensor), and
 * passes the call on. Each binding's test compares the lines with the addresses of its own arrays: nothing was copied. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <express.h>
#include <stdio.h>
#include <stdlib.h>

static void record(const char *call, int count, const express_tensor *const *tensors) {
  const char *path = getenv("EXPRESS_POINTERS");
  FILE *file = path != NULL ? fopen(path, "a") : NULL;
  int i;
  if (file == NULL) return;
  fprintf(file, "%s", call);
  for (i = 0; i < count; ++i)
    fprintf(file, " %llx", tensors[i] != NULL ? (unsigned long long)(uintptr_t)tensors[i]->data : 0ULL);
  fprintf(file, "\n");
  fclose(file);
}

/* POSIX has data and function pointers of one form; ISO C has no cast for it. */
static void *next(const char *name) {
  void *found = dlsym(RTLD_NEXT, name);
  if (found == NULL) abort();
  return found;
}

express_status express_append(express_cache *cache, int32_t layer, const express_tensor *k, const express_tensor *v) {
  express_status (*call)(express_cache *, int32_t, const express_tensor *, const express_tensor *);
  const express_tensor *const tensors[] = {k, v};
  *(void **)&call = next("express_append");
  record("express_append", 2, tensors);
  return call(cache, layer, k, v);
}

express_status express_attend(const express_cache *cache, int32_t layer, const express_tensor *q,
                              const express_tensor *out, const express_tensor *lse) {
  express_status (*call)(const express_cache *, int32_t, const express_tensor *, const express_tensor *,
                         const express_tensor *);
  const express_tensor *const tensors[] = {q, out, lse};
  *(void **)&call = next("express_attend");
  record("express_attend", 3, tensors);
  return call(cache, layer, q, out, lse);
}

express_status express_prefill(express_cache *cache, int32_t layer, const express_tensor *q, const express_tensor *k,
                               const express_tensor *v, const express_tensor *out, const express_tensor *lse,
                               const express_workspace *workspace) {
  express_status (*call)(express_cache *, int32_t, const express_tensor *, const express_tensor *,
                         const express_tensor *, const express_tensor *, const express_tensor *,
                         const express_workspace *);
  const express_tensor *const tensors[] = {q, k, v, out, lse};
  *(void **)&call = next("express_prefill");
  record("express_prefill", 5, tensors);
  return call(cache, layer, q, k, v, out, lse, workspace);
}
