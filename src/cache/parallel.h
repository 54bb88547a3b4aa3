// Threads: oneTBB, or the engine's own through its parallel-for callback.
#ifndef EXPRESS_SRC_CACHE_PARALLEL_H_
#define EXPRESS_SRC_CACHE_PARALLEL_H_

#include <tbb/task_arena.h>

#include <cstdint>
#include <optional>

#include "express/config.h"

namespace express::cache {

class Threads {
 public:
  Threads(int32_t count, ParallelFor parallel_for, void* context);

  int32_t count() const { return count_; }

  // Runs body(i, worker) for every i in [0, count), in any order; concurrent calls have different workers. The body
  // must not throw. False if the engine's parallel_for did not run every i once.
  template <class Body>
  bool Run(int64_t count, const Body& body) const {
    return RunErased(
        count, [](const void* erased, int64_t i, int32_t worker) { (*static_cast<const Body*>(erased))(i, worker); },
        &body);
  }

 private:
  using Erased = void (*)(const void* body, int64_t i, int32_t worker);
  bool RunErased(int64_t count, Erased call, const void* body) const;

  int32_t count_;
  ParallelFor parallel_for_;
  void* context_;
  mutable std::optional<tbb::task_arena> arena_;
};

}  // namespace express::cache

#endif  // EXPRESS_SRC_CACHE_PARALLEL_H_
