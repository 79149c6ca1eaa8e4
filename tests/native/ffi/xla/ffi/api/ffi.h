// As much of XLA's foreign functions as few_rows.cc names, so that it is compiled with sanitizers and without JAX.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace xla::ffi {

enum DataType { F32, BF16, F16, S8, F64 };

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

template <DataType type, int rank>
struct Buffer : AnyBuffer {
  float* typed_data() const { return static_cast<float*>(data); }
};

template <class T>
struct Result {
  T* held;
  T* operator->() const { return held; }
};

struct Error {
  std::string said;
  static Error Success() { return {}; }
  static Error InvalidArgument(std::string what) { return {std::move(what)}; }
};

}  // namespace xla::ffi

#define XLA_FFI_DEFINE_HANDLER_SYMBOL(...)
