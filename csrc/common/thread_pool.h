// The thread pool of the CPU kernels, and the scratch memory that they reuse from call to call.
//
// A job is `chunks` calls of one function. Each thread owns one contiguous range of chunks (so that it reads one linear
// stream of weights) and, when that is done, takes chunks of the others. A range is one ticket word (end << 32 | next)
// taken by fetch_add; the caller waits for chunks, not for threads, so a late worker that holds no chunk costs nothing.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace pagelens {

// The pool was closed, or made before this process was forked.
struct PoolClosed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What was asked for, and what to do; Python makes a MemoryError of it.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(size_t bytes)
      : text_("the system gives no " + std::to_string((bytes + (1 << 20) - 1) >> 20) +
              " MiB to the native kernels; use a smaller batch, fewer bits a weight, or a machine with more memory") {}
  const char* what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};

// Memory that only grows; aligned to 64 bytes, zeroed when it is made.
class Buffer {
 public:
  Buffer() = default;
  ~Buffer() { release(); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* at_least(size_t bytes);  // throws OutOfMemory; old contents are lost when it grows
  void release();
  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

class ThreadPool {
 public:
  static constexpr int kMaxThreads = 256;
  static constexpr int kShared = 8;  // scratch buffers that all threads see

  // Starts no thread: that happens in the first run() that needs one. Throws std::invalid_argument
  // outside 1..kMaxThreads.
  explicit ThreadPool(int num_threads);
  ~ThreadPool() { close(); }
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }
  size_t scratch_bytes() const;

  // Ends the threads and frees the scratch memory; a later use is an error. May be called twice.
  void close();

  // One user at a time: hold this lock while using run() and the scratch memory.
  // Throws PoolClosed.
  std::unique_lock<std::mutex> lock();

  // Calls f(chunk, thread) for each chunk in 0..chunks-1 and returns when all are done. f must not throw.
  template <class F>
  void run(int64_t chunks, F&& f) {
    if (chunks <= 0) return;
    if (num_threads_ == 1 || chunks == 1) {
      for (int64_t i = 0; i < chunks; i++) f(i, 0);
      return;
    }
    using Function = std::remove_reference_t<F>;
    dispatch(
        chunks, [](void* context, int64_t chunk, int thread) { (*static_cast<Function*>(context))(chunk, thread); },
        const_cast<void*>(static_cast<const void*>(&f)));
  }

  // Scratch memory. Reserve before run(): a worker cannot report that memory has run out.
  template <class T>
  T* shared(int which, int64_t count) {
    return static_cast<T*>(shared_[which].at_least(static_cast<size_t>(count) * sizeof(T)));
  }
  void reserve_local(size_t bytes);  // the same size for every thread
  void* local(int thread) const { return local_[thread].data(); }

 private:
  using Call = void (*)(void*, int64_t, int);
  struct alignas(128) Range {
    std::atomic<uint64_t> ticket{0};
  };

  void dispatch(int64_t chunks, Call call, void* context);
  void work(int thread);
  void loop(int thread);
  void start();

  const int num_threads_;
  const uint64_t fork_generation_;
  std::mutex user_;
  bool closed_ = false;
  std::vector<std::thread> threads_;
  std::unique_ptr<Range[]> ranges_;
  Call call_ = nullptr;
  void* context_ = nullptr;
  alignas(128) std::atomic<uint32_t> done_{0};
  alignas(128) std::atomic<uint32_t> generation_{0};
  std::atomic<int> asleep_{0};
  std::atomic<bool> stop_{false};
  struct Bed {
    std::mutex mutex;
    std::condition_variable wake;
  };
  std::unique_ptr<Bed> bed_ = std::make_unique<Bed>();  // where workers sleep
  Buffer shared_[kShared];
  std::unique_ptr<Buffer[]> local_;
};

}  // namespace pagelens
