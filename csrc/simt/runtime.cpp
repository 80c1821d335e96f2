// Runs the blocks of a launch one after the other, the threads of a block as fibers that take turns.
#include "simt/runtime.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "simt/block.h"

namespace simt {

thread_local const Place* place = nullptr;

Machine& machine() {
  static thread_local Machine m;
  return m;
}

Options& options() { return machine().options; }

Findings take_findings() {
  Machine& m = machine();
  m.findings.races = m.races();
  m.clear_races();
  return std::exchange(m.findings, Findings());
}

void launch_blocks(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  machine().launch(grid, block, shared_bytes, kernel);
}

unsigned char* shared_memory() { return machine().shared(); }
int lane_id() { return machine().running().index & 31; }
void barrier(int id, int count, Site site) { machine().barrier(id, count, site); }
void warp_collective(WarpOp op, uint32_t mask, void* arguments, Site site) {
  machine().warp_collective(op, mask, arguments, site);
}
void copy_async(void* to, const void* from, int bytes, bool valid, Site site) {
  machine().copy_async({to, from, bytes, valid, site});
}
void commit_async() { machine().commit_async(); }
void wait_async(int groups_left) { machine().wait_async(groups_left); }
void note_atomic(const void* p, size_t bytes, const void* pc) {
  Machine& m = machine();
  if (m.is_running()) m.access(m.running(), p, bytes, Access::atomic, {nullptr, 0, pc});
}

namespace {

std::string named(const dim3& b) {
  return "(" + std::to_string(b.x) + "," + std::to_string(b.y) + "," + std::to_string(b.z) + ")";
}
std::string named(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

void fiber_main() {
  Machine& m = machine();
  m.running().fiber.arrived();
  m.kernel()();
  m.end_of_fiber();
}

}  // namespace

void Machine::launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (running_) throw Error("a kernel was launched from within a kernel");
  if (!options.refusal.empty()) throw Error(options.refusal);
  if (threads == 0 || threads > 1024)
    throw Error("a block of " + std::to_string(threads) + " threads; it has 1 to 1024");
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw Error("a grid of " + named(grid) + " blocks; it has up to 2147483647, 65535 and 65535");
  constexpr size_t kLargest = 227 << 10;  // sm_90 and sm_100; sm_80 has 163 KiB, which the resource table checks
  if (shared_bytes > kLargest) throw Error(std::to_string(shared_bytes) + " bytes of shared memory; no card has them");
  kernel_ = &kernel;
  random_.seed(options.seed);
  detector_.begin_launch();
  uint32_t number = 0;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) run_block(grid, block, {x, y, z}, number++, shared_bytes);
}

void Machine::run_block(dim3 grid, dim3 block, dim3 index, uint32_t number, size_t shared_bytes) {
  // Exact size, so that AddressSanitizer sees one byte too far; filled with what is a NaN in bf16 and float32.
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1)) != 0) throw std::bad_alloc();
  shared_ = static_cast<unsigned char*>(memory);
  shared_bytes_ = shared_bytes;
  memset(shared_, 0xff, shared_bytes);
  block_number_ = number;
  if (options.races) detector_.begin_block(shared_, shared_bytes);
  start_threads(grid, block, index);
  error_.clear();
  run_threads();
  running_ = nullptr;
  place = nullptr;
  add_up_banks();
  free(shared_);
  shared_ = nullptr;
  if (!error_.empty()) throw Error("block " + named(index) + ": " + error_);
}

void Machine::start_threads(dim3 grid, dim3 block, dim3 index) {
  const int count = static_cast<int>(block.x * block.y * block.z);
  threads_.clear();
  threads_.resize(count);
  alive_ = count;
  for (Barrier& b : barriers_) b = Barrier();
  for (int t = 0; t < count; t++) {
    Thread& thread = threads_[t];
    const unsigned u = static_cast<unsigned>(t);
    thread.index = t;
    thread.place = {{u % block.x, u / block.x % block.y, u / (block.x * block.y)}, index, block, grid};
    if (options.races) {
      thread.clock.assign(count, 0);
      thread.clock[t] = 1;
    }
    thread.fiber.prepare(stacks_.at(t), fiber_main);
  }
}

void Machine::run_threads() {
  std::vector<int> order(threads_.size());
  std::iota(order.begin(), order.end(), 0);
  if (options.order == Order::reverse) std::reverse(order.begin(), order.end());
  while (alive_ && error_.empty()) {
    if (options.order == Order::random) std::shuffle(order.begin(), order.end(), random_);
    bool any = false;
    for (int t : order) {
      if (threads_[t].state != State::ready) continue;
      any = true;
      running_ = &threads_[t];
      place = &running_->place;
      running_->fiber.enter();
      if (!error_.empty()) return;
    }
    if (!any) error_ = stuck();
  }
}

std::string Machine::stuck() const {
  std::map<std::string, int> where;
  for (const Thread& t : threads_) {
    if (t.state == State::ended) where["ended"]++;
    if (t.state == State::at_barrier) where["wait at the barrier of " + named(t.site)]++;
    if (t.state == State::in_warp_op) where["wait for their warp at " + named(t.site)]++;
  }
  std::string text = "deadlock:";
  for (const auto& [what, count] : where) text += " " + std::to_string(count) + " threads " + what + ";";
  text.pop_back();
  return text;
}

void Machine::fail(const std::string& message) {
  error_ = "thread " + std::to_string(running_->index) + ": " + message;
  running_->fiber.leave(true);
  std::abort();
}

void Machine::yield() { running_->fiber.leave(false); }

void Machine::end_of_fiber() {
  if (!running_->open.empty() || !running_->groups.empty())
    fail("ended without waiting for its cp.async of " +
         named((running_->groups.empty() ? running_->open : running_->groups[0]).front().site));
  running_->state = State::ended;
  alive_--;
  // A barrier of all threads does not count those that have ended.
  if (alive_ && barriers_[0].arrived == alive_) release(0);
  running_->fiber.leave(true);
}

void Machine::barrier(int id, int count, Site site) {
  if (id < 0 || id > 15) fail("barrier " + std::to_string(id) + " at " + named(site) + "; there are 0 to 15");
  if (count != -1 && (count <= 0 || count % 32 || count > static_cast<int>(threads_.size())))
    fail("a barrier for " + std::to_string(count) + " threads at " + named(site) +
         "; it takes a multiple of 32, at most the block");
  Barrier& b = barriers_[id];
  if (b.arrived && b.expected != count)
    fail("barrier " + std::to_string(id) + " at " + named(site) +
         " is for another number of threads than that of its first arrival");
  // Threads that meet at two __syncthreads work on a card, and have taken different ways: a kernel that is wrong.
  if (b.arrived && count == -1 && !(b.first == site))
    fail("threads of a block wait at different __syncthreads, at " + named(b.first) + " and at " + named(site));
  if (!b.arrived) b.first = site;
  b.expected = count;
  running_->site = site;
  running_->barrier_id = id;
  running_->state = State::at_barrier;
  b.arrived++;
  if (b.arrived >= (count == -1 ? alive_ : count))
    release(id);
  else
    yield();
}

void Machine::release(int id) {
  barriers_[id] = Barrier();
  std::vector<Thread*> together;
  for (Thread& t : threads_)
    if (t.state == State::at_barrier && t.barrier_id == id) {
      t.state = State::ready;
      t.epoch += id == 0;
      together.push_back(&t);
    }
  order(together);
}

void Machine::order(const std::vector<Thread*>& together) {
  if (!options.races) return;
  Clock seen(threads_.size(), 0);
  for (const Thread* t : together)
    for (size_t i = 0; i < seen.size(); i++) seen[i] = std::max(seen[i], t->clock[i]);
  for (Thread* t : together) {
    t->clock = seen;
    t->clock[t->index]++;
  }
}

void Machine::access(Thread& thread, const void* p, size_t bytes, Access kind, const Where& where) {
  if (!options.races || !error_.empty()) return;
  const auto* byte = static_cast<const unsigned char*>(p);
  const unsigned char* stack = thread.fiber.stack();
  if (byte >= stack && byte < stack + FiberStacks::kBytes) return;  // its own local variables
  findings.accesses++;
  detector_.access({block_number_, thread.index, &thread.clock}, p, bytes, kind, where);
  if (byte >= shared_ && byte < shared_ + shared_bytes_) count_banks(thread, p, bytes, where);
}

void Machine::copy_async(const AsyncCopy& copy) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  if (address(copy.to) % copy.bytes || address(copy.from) % copy.bytes)
    fail("cp.async at " + named(copy.site) + " is not aligned to " + std::to_string(copy.bytes) + " bytes");
  const auto* to = static_cast<const unsigned char*>(copy.to);
  if (to < shared_ || to + copy.bytes > shared_ + shared_bytes_)
    fail("cp.async at " + named(copy.site) + " writes outside shared memory");
  const Where where{copy.site.file, copy.site.line, nullptr};
  access(*running_, copy.to, copy.bytes, Access::write, where);
  if (copy.valid) access(*running_, copy.from, copy.bytes, Access::read, where);
  if (options.races) detector_.set_in_flight(copy.to, copy.bytes, running_->index);
  running_->open.push_back(copy);
}

void Machine::commit_async() {
  running_->groups.push_back(std::move(running_->open));
  running_->open.clear();
}

// As late as the wait allows: a wait for too few groups leaves poison where the kernel reads.
void Machine::wait_async(int groups_left) {
  while (static_cast<int>(running_->groups.size()) > groups_left) {
    for (const AsyncCopy& copy : running_->groups.front()) {
      if (options.races) detector_.clear_in_flight(copy.to, copy.bytes);
      if (copy.valid)
        memcpy(copy.to, copy.from, copy.bytes);
      else
        memset(copy.to, 0, copy.bytes);
    }
    running_->groups.erase(running_->groups.begin());
  }
}

}  // namespace simt
