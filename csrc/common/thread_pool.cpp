#include "common/thread_pool.h"

#include <pthread.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace pagelens {
namespace {

// Workers do not exist in a child process after fork(). The child's copy of this count tells a pool that it is stale.
std::atomic<uint64_t> forks{0};

uint64_t register_fork_handler() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
  return forks.load();
}

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Workers spin between two ops, and while a token is chosen and the next step prepared (0.2-0.4 ms with caches full of
// weights): a job that has to wake a sleeping thread takes 15-20 us longer. Then they sleep.
constexpr auto kSpin = std::chrono::microseconds(500);

template <class Ready>
bool spin_until(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 64; i++) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

}  // namespace

void* Buffer::at_least(size_t bytes) {
  if (bytes <= size_) return data_;
  release();
  const size_t rounded = (bytes + 63) / 64 * 64;
  void* fresh = std::aligned_alloc(64, rounded);
  if (!fresh) throw std::bad_alloc();
  std::memset(fresh, 0, rounded);
  data_ = fresh;
  size_ = rounded;
  return data_;
}

void Buffer::release() {
  std::free(data_);
  data_ = nullptr;
  size_ = 0;
}

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads), fork_generation_(register_fork_handler()) {
  if (num_threads < 1 || num_threads > kMaxThreads)
    throw std::invalid_argument("num_threads=" + std::to_string(num_threads) + " must be between 1 and " +
                                std::to_string(kMaxThreads));
  ranges_.reset(new Range[num_threads]);
  local_.reset(new Buffer[num_threads]);
}

size_t ThreadPool::scratch_bytes() const {
  size_t total = 0;
  for (const Buffer& buffer : shared_) total += buffer.size();
  for (int t = 0; t < num_threads_; t++) total += local_[t].size();
  return total;
}

void ThreadPool::reserve_local(size_t bytes) {
  for (int t = 0; t < num_threads_; t++) local_[t].at_least(bytes);
}

std::unique_lock<std::mutex> ThreadPool::lock() {
  // Before the mutex: in a forked child it may be held for ever by a thread that is not there.
  if (forks.load() != fork_generation_)
    throw PoolClosed(
        "this process was forked after the thread pool was made, and threads do not survive a fork; "
        "make the engine in the process that uses it");
  std::unique_lock<std::mutex> held(user_);
  if (closed_) throw PoolClosed("the thread pool is closed; make a new engine");
  return held;
}

void ThreadPool::close() {
  if (forks.load() != fork_generation_) {
    // The handles name threads of the parent: joining them would never return, destroying them would terminate, and
    // destroying a condition variable on which they slept would wait for them. So all of it is leaked.
    if (!threads_.empty()) new std::vector<std::thread>(std::move(threads_));
    threads_.clear();
    bed_.release();
    closed_ = true;
    return;
  }
  std::unique_lock<std::mutex> held(user_);
  closed_ = true;
  {
    std::lock_guard<std::mutex> guard(bed_->mutex);
    stop_.store(true);
    generation_.fetch_add(1);
  }
  bed_->wake.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  for (Buffer& buffer : shared_) buffer.release();
  for (int t = 0; t < num_threads_; t++) local_[t].release();
}

void ThreadPool::start() {
  for (int t = static_cast<int>(threads_.size()) + 1; t < num_threads_; t++)
    threads_.emplace_back([this, t] { loop(t); });
}

void ThreadPool::dispatch(int64_t chunks, Call call, void* context) {
  if (static_cast<int>(threads_.size()) + 1 < num_threads_) start();
  call_ = call;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  for (int t = 0; t < num_threads_; t++) {
    const uint64_t begin = static_cast<uint64_t>(chunks * t / num_threads_);
    const uint64_t end = static_cast<uint64_t>(chunks * (t + 1) / num_threads_);
    ranges_[t].ticket.store(end << 32 | begin, std::memory_order_release);
  }
  generation_.fetch_add(1);
  if (asleep_.load()) {
    {
      std::lock_guard<std::mutex> guard(bed_->mutex);
    }  // a worker that is about to sleep has either seen the new count or waits
    bed_->wake.notify_all();
  }
  work(0);
  const auto all_done = [&] { return done_.load(std::memory_order_acquire) == static_cast<uint32_t>(chunks); };
  while (!spin_until(all_done)) std::this_thread::yield();
}

void ThreadPool::work(int thread) {
  uint32_t mine = 0;
  for (int i = 0; i < num_threads_; i++) {
    std::atomic<uint64_t>& ticket = ranges_[(thread + i) % num_threads_].ticket;
    for (;;) {
      const uint64_t taken = ticket.fetch_add(1, std::memory_order_acq_rel);
      const uint64_t chunk = taken & 0xffffffffu, end = taken >> 32;
      if (chunk >= end) break;
      call_(context_, static_cast<int64_t>(chunk), thread);
      mine++;
    }
  }
  if (mine) done_.fetch_add(mine, std::memory_order_release);
}

void ThreadPool::loop(int thread) {
  uint32_t seen = 0;
  const auto changed = [&] { return generation_.load() != seen; };  // ordered with asleep_
  while (!stop_.load()) {
    if (!spin_until(changed)) {
      std::unique_lock<std::mutex> guard(bed_->mutex);
      asleep_.fetch_add(1);
      bed_->wake.wait(guard, changed);
      asleep_.fetch_sub(1);
    }
    seen = generation_.load(std::memory_order_acquire);
    if (!stop_.load()) work(thread);
  }
}

}  // namespace pagelens
