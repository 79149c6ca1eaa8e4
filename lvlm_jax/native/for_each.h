// Parallel loops on the thread pool that XLA passes to a custom call.

#ifndef LVLM_JAX_NATIVE_FOR_EACH_H_
#define LVLM_JAX_NATIVE_FOR_EACH_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

// Calls item(0) ... item(count - 1) on the pool's threads and on the calling thread, and returns when all are done. If no
// pool thread is free, the calling thread makes all calls.
template <class Item>
void ForEach(ffi::ThreadPool& pool, int64_t count, const Item& item) {
  struct Progress {
    std::atomic<int64_t> taken{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  // A helper may start after this function has returned. Then no item is left, and it must not touch `item`, a dangling
  // pointer by then.
  auto work = [progress, count, item = &item] {
    for (int64_t i; (i = progress->taken.fetch_add(1)) < count;) {
      (*item)(i);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t helper = std::min(pool.num_threads(), count) - 1; helper > 0; --helper) pool.Schedule(decltype(work)(work));
  work();
  while (progress->done.load(std::memory_order_acquire) < count) std::this_thread::yield();
}

}  // namespace

#endif  // LVLM_JAX_NATIVE_FOR_EACH_H_
