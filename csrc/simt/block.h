// One thread block while it runs, and the runtime's state in this OS thread. Internal to csrc/simt.
#pragma once
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "simt/fiber.h"
#include "simt/host.h"
#include "simt/race.h"
#include "simt/runtime.h"

namespace simt {

using PlaceKey = std::pair<const void*, int>;  // a code address and 0, or a file name and a line

struct AsyncCopy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
  Site site;
};

// What an instruction touched in shared memory.
struct SharedAccess {
  PlaceKey instruction;
  uintptr_t address;  // within shared memory
  int bytes;
  int epoch;  // collectives of the whole warp before it
};

enum class State { ready, at_barrier, in_warp_op, ended };

struct Thread {
  Place place;
  Fiber fiber;
  State state = State::ready;
  int index = 0;  // in the block
  int barrier_id = 0;
  WarpOp op = WarpOp::sync;
  uint32_t mask = 0;
  void* arguments = nullptr;
  Site site{nullptr, 0};
  std::vector<AsyncCopy> open;                 // cp.async not yet committed
  std::vector<std::vector<AsyncCopy>> groups;  // committed, oldest first
  Clock clock;
  std::vector<SharedAccess> shared_accesses;  // in order
  int epoch = 0;  // collectives of the whole warp so far: what lies between two of them ran between them in all lanes
};

struct LaneAccess {
  int lane;
  uintptr_t address;  // within shared memory
  int bytes;
};

struct Barrier {
  int arrived = 0, expected = 0;
  Site first{};  // where its first thread arrived
};

class Machine {
 public:
  Options options;
  Findings findings;

  void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
  Thread& running() { return *running_; }
  bool is_running() const { return running_ != nullptr; }
  unsigned char* shared() const { return shared_; }
  [[noreturn]] void fail(const std::string& message);  // from a fiber: ends the launch with an Error
  void barrier(int id, int count, Site site);
  void warp_collective(WarpOp op, uint32_t mask, void* arguments, Site site);
  void copy_async(const AsyncCopy& copy);
  void commit_async();
  void wait_async(int groups_left);
  void access(Thread& thread, const void* p, size_t bytes, Access kind, const Where& where);
  void end_of_fiber();
  const std::function<void()>& kernel() const { return *kernel_; }
  const std::vector<std::string>& races() const { return detector_.reports(); }
  void clear_races() { detector_.clear_reports(); }

 private:
  void run_block(dim3 grid, dim3 block, dim3 index, uint32_t number, size_t shared_bytes);
  void start_threads(dim3 grid, dim3 block, dim3 index);
  void run_threads();
  void release(int id);
  void yield();
  std::string stuck() const;
  void order(const std::vector<Thread*>& together);  // each has now seen what all had seen
  void run_collective(Thread* const* lanes, WarpOp op, uint32_t mask);
  void shuffle(Thread* const* lanes, uint32_t mask);
  void ldmatrix(Thread* const* lanes, bool transposed);
  void count_banks(Thread& thread, const void* p, size_t bytes, const Where& where);
  void add_up_banks();

  FiberStacks stacks_;
  std::vector<Thread> threads_;
  Barrier barriers_[16];
  Thread* running_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  unsigned char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  int alive_ = 0;
  uint32_t block_number_ = 0;
  std::mt19937 random_;
  std::string error_;
  RaceDetector detector_;
  std::map<PlaceKey, Where> places_;
};

Machine& machine();  // of this OS thread

// Extra cycles that bank conflicts cost when `lanes` access shared memory in one instruction, and the phases it has.
BankCount bank_conflicts(const std::vector<LaneAccess>& lanes);

}  // namespace simt
