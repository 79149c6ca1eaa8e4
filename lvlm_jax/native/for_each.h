// Work on the threads that XLA lends to a call.

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

// Calls item(0) ... item(count - 1) on the pool's threads and on this one, which does them all where no other is free.
template <class Item>
void ForEach(ffi::ThreadPool& pool, int64_t count, const Item& item) {
  struct Progress {
    std::atomic<int64_t> taken{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  // A helper that comes too late finds nothing to take, and must not look at `item`, which is gone by then.
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
