#include "src/cache/parallel.h"

#include <tbb/info.h>
#include <tbb/parallel_for.h>
#include <tbb/partitioner.h>

#include <algorithm>
#include <atomic>

namespace express::cache {

Threads::Threads(int32_t count, ParallelFor parallel_for, void* context)
    : count_(count), parallel_for_(parallel_for), context_(context) {
  // More than the machine has would make oneTBB print a warning.
  if (parallel_for == nullptr && count > 1) arena_.emplace(std::min(count, tbb::info::default_concurrency()));
}

bool Threads::RunErased(int64_t count, Erased call, const void* body) const {
  if (count <= 1 || count_ == 1) {
    for (int64_t i = 0; i < count; ++i) call(body, i, 0);
    return true;
  }
  if (parallel_for_ != nullptr) {
    struct Counted {
      Erased call;
      const void* body;
      int64_t count;
      int32_t workers;
      std::atomic<int64_t> calls{0};
    } counted{call, body, count, count_};
    parallel_for_(
        context_, count,
        [](void* data, int64_t i, int32_t worker) {
          auto& c = *static_cast<Counted*>(data);
          if (i < 0 || i >= c.count || worker < 0 || worker >= c.workers) return;
          c.call(c.body, i, worker);
          c.calls.fetch_add(1);
        },
        &counted);
    return counted.calls.load() == count;
  }
  // oneTBB orders the calls; the counter says so to a thread sanitizer, which does not see into oneTBB.
  std::atomic<int64_t> calls;
  calls.store(0, std::memory_order_release);
  arena_->execute([&] {
    tbb::parallel_for(
        int64_t{0}, count,
        [&](int64_t i) {
          static_cast<void>(calls.load(std::memory_order_acquire));
          call(body, i, tbb::this_task_arena::current_thread_index());
          calls.fetch_add(1, std::memory_order_release);
        },
        tbb::simple_partitioner());
  });
  return calls.load(std::memory_order_acquire) == count;
}

}  // namespace express::cache
