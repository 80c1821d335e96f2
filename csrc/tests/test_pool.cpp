// The thread pool alone: every chunk once, stealing, many short jobs, several pools at once, close and misuse.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "tests/check.h"

using namespace pagelens;
using namespace pagelens::tests;

namespace {

constexpr int kThreads[] = {1, 2, 3, 4, 8};

// Every chunk runs once, on a thread that exists, and plain writes of a job are seen after it.
void runs_every_chunk_once() {
  for (const int threads : kThreads) {
    ThreadPool pool(threads);
    const auto held = pool.lock();
    for (const int64_t chunks : {0, 1, 2, 3, 7, 8, 9, 64, 1000}) {
      std::vector<int> times(static_cast<size_t>(chunks), 0);
      std::atomic<int> strangers{0};
      pool.run(chunks, [&](int64_t chunk, int thread) {
        times[static_cast<size_t>(chunk)]++;
        if (thread < 0 || thread >= threads) strangers++;
      });
      bool once = true;
      for (const int n : times) once &= n == 1;
      expect(once, "a chunk ran not exactly once");
      expect(strangers == 0, "a thread number outside the pool");
    }
  }
}

// Jobs that depend on each other's plain writes, back to back: a late worker must never touch an older or newer job.
void many_short_jobs() {
  for (const int threads : kThreads) {
    ThreadPool pool(threads);
    const auto held = pool.lock();
    std::vector<int64_t> values(97, 0);
    constexpr int kJobs = 2000;
    for (int job = 0; job < kJobs; job++) {
      const int64_t chunks = job % 3 == 0 ? 97 : 2 + job % 11;
      pool.run(chunks, [&](int64_t chunk, int) { values[static_cast<size_t>(chunk)] += job; });
    }
    int64_t total = 0, expected = 0;
    for (const int64_t v : values) total += v;
    for (int job = 0; job < kJobs; job++) expected += static_cast<int64_t>(job) * (job % 3 == 0 ? 97 : 2 + job % 11);
    expect(total == expected, "short jobs lost or repeated chunks");
  }
}

// Workers that fell asleep between jobs wake for the next.
void wakes_after_sleep() {
  ThreadPool pool(4);
  const auto held = pool.lock();
  for (int job = 0; job < 20; job++) {
    std::this_thread::sleep_for(std::chrono::microseconds(job % 2 ? 100 : 600));  // around the time that they spin
    std::atomic<int> ran{0};
    pool.run(64, [&](int64_t, int) { ran++; });
    expect(ran == 64, "a job after a pause is incomplete");
  }
}

// Where one range takes long, others take its chunks.
void steals() {
  ThreadPool pool(2);
  const auto held = pool.lock();
  bool stolen = false;
  for (int attempt = 0; attempt < 50 && !stolen; attempt++) {
    std::vector<int> by(64, -1);
    pool.run(64, [&](int64_t chunk, int thread) {
      by[static_cast<size_t>(chunk)] = thread;
      if (chunk < 32) std::this_thread::sleep_for(std::chrono::microseconds(200));
    });
    for (int i = 0; i < 32; i++) stolen |= by[static_cast<size_t>(i)] == 1;
  }
  expect(stolen, "no chunk of a slow range was taken by another thread");
}

// Scratch of a thread is its own during a job; shared scratch is seen by all.
void scratch() {
  ThreadPool pool(3);
  const auto held = pool.lock();
  for (const int64_t count : {16, 100, 5000}) {
    pool.reserve_local(static_cast<size_t>(count) * 4);
    int32_t* sums = pool.shared<int32_t>(0, 40);
    pool.run(40, [&](int64_t chunk, int thread) {
      int32_t* own = static_cast<int32_t*>(pool.local(thread));
      for (int64_t i = 0; i < count; i++) own[i] = static_cast<int32_t>(chunk);
      sums[chunk] = 0;
      for (int64_t i = 0; i < count; i++) sums[chunk] += own[i];
    });
    for (int64_t i = 0; i < 40; i++) expect(sums[i] == i * count, "scratch was shared between two threads");
  }
}

// Users in several threads take turns on one pool; several pools run at once.
void users_and_pools() {
  ThreadPool shared(3);
  std::atomic<int64_t> total{0};
  int64_t guarded = 0;  // not atomic: the pool's lock guards it
  std::vector<std::thread> users;
  for (int user = 0; user < 4; user++)
    users.emplace_back([&, user] {
      ThreadPool own(1 + user);
      for (int job = 0; job < 100; job++) {
        {
          const auto held = shared.lock();
          shared.run(10, [&](int64_t chunk, int) { total += chunk; });
          guarded++;
        }
        const auto held = own.lock();
        own.run(10, [&](int64_t chunk, int) { total += chunk; });
      }
    });
  for (std::thread& user : users) user.join();
  expect(total == int64_t{4} * 100 * 2 * 45, "chunks of several users or pools were lost");
  expect(guarded == 400, "two users had the pool at once");
}

// From within a job: another pool works, and a second pool's job inside the first is complete.
void nested_pools() {
  ThreadPool outer(3), inner(2);
  const auto held = outer.lock();
  std::atomic<int64_t> ran{0};
  outer.run(12, [&](int64_t, int) {
    const auto inner_held = inner.lock();
    inner.run(5, [&](int64_t, int) { ran++; });
  });
  expect(ran == 60, "a job within a job of another pool is incomplete");
}

template <class Error, class F>
bool throws(F&& f) {
  try {
    f();
  } catch (const Error&) {
    return true;
  }
  return false;
}

void start_and_stop() {
  for (int round = 0; round < 40; round++) {
    ThreadPool pool(1 + round % 8);
    if (round % 4) {
      const auto held = pool.lock();
      std::atomic<int> ran{0};
      pool.run(round, [&](int64_t, int) { ran++; });
      expect(ran == round, "a job of a short-lived pool is incomplete");
      pool.reserve_local(100);
    }
    if (round % 2) pool.close();
    if (round % 3 == 0) pool.close();  // twice is allowed
    if (round % 2) {
      expect(throws<PoolClosed>([&] { pool.lock(); }), "a closed pool was locked");
      expect(pool.scratch_bytes() == 0, "a closed pool holds scratch memory");
    }
  }
  for (const int count : {0, -3, ThreadPool::kMaxThreads + 1})
    expect(throws<std::invalid_argument>([&] { ThreadPool pool(count); }), "a wrong number of threads was taken");
}

// close() from another thread waits for the user, who keeps the lock while a job runs.
void closes_under_use() {
  for (int round = 0; round < 20; round++) {
    ThreadPool pool(3);
    std::atomic<bool> running{false};
    std::thread user([&] {
      try {
        for (int job = 0; job < 1000; job++) {
          const auto held = pool.lock();
          pool.run(9, [&](int64_t, int) { running = true; });
        }
      } catch (const PoolClosed&) {
      }
    });
    while (!running) std::this_thread::yield();
    pool.close();
    user.join();
    expect(throws<PoolClosed>([&] { pool.lock(); }), "a closed pool was locked");
  }
}

#if !defined(__SANITIZE_THREAD__)  // ThreadSanitizer cannot follow a fork of several threads
// In a forked child the pool refuses, and its end does not wait for threads that are not there.
void refuses_after_fork() {
  ThreadPool pool(3);
  {
    const auto held = pool.lock();
    pool.run(30, [](int64_t, int) {});
  }
  const pid_t child = fork();
  if (child == 0) {
    const bool refused = throws<PoolClosed>([&] { pool.lock(); });
    pool.close();
    _exit(refused ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child used the pool, or hung");
}
#endif

}  // namespace

int main() {
  runs_every_chunk_once();
  many_short_jobs();
  wakes_after_sleep();
  steals();
  scratch();
  users_and_pools();
  nested_pools();
  start_and_stop();
  closes_under_use();
#if !defined(__SANITIZE_THREAD__)
  refuses_after_fork();
#endif
  return finish("pool");
}
