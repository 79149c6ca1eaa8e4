// As much of XLA's foreign functions as few_rows.cc names, so that it is compiled with sanitizers and without JAX.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

namespace xla::ffi {

enum DataType { F32, BF16, F16, S8, F64, S32 };

// Threads that live until the pool does, each for one task.
class ThreadPool {
 public:
  explicit ThreadPool(int64_t threads) : threads_(threads) {}
  ThreadPool(const ThreadPool& other) : threads_(other.threads_) {}
  ~ThreadPool() {
    for (std::thread& one : running_) one.join();
  }
  int64_t num_threads() const { return threads_; }
  void Schedule(std::function<void()> task) { running_.emplace_back(std::move(task)); }

 private:
  int64_t threads_;
  std::vector<std::thread> running_;
};

struct AnyBuffer {
  std::vector<int64_t> shape;
  void* data;
  DataType type;
  const std::vector<int64_t>& dimensions() const { return shape; }
  void* untyped_data() const { return data; }
  DataType element_type() const { return type; }
};

template <DataType kind, int rank>
struct Buffer : AnyBuffer {
  using Number = std::conditional_t<kind == S32, int32_t, float>;
  Number* typed_data() const { return static_cast<Number*>(data); }
  size_t element_count() const {
    size_t count = 1;
    for (int64_t size : shape) count *= size;
    return count;
  }
};

template <class T>
struct Result {
  T* held;
  T* operator->() const { return held; }
};

struct Error {
  std::string said;
  bool failure() const { return !said.empty(); }
  static Error Success() { return {}; }
  static Error InvalidArgument(std::string what) { return {std::move(what)}; }
};

}  // namespace xla::ffi

#define XLA_FFI_DEFINE_HANDLER_SYMBOL(...)
