// A fiber: one CUDA thread's stack, switched to and from by hand (about a tenth of the cost of ucontext).
#pragma once
#include <cstddef>
#include <vector>

namespace simt {

// Stacks are made once and used again. Each has a page below it that may not be touched, so that an overflow crashes
// at once instead of writing into its neighbour.
class FiberStacks {
 public:
  static constexpr size_t kBytes = 256 << 10;
  FiberStacks() = default;
  ~FiberStacks();
  FiberStacks(const FiberStacks&) = delete;
  FiberStacks& operator=(const FiberStacks&) = delete;
  unsigned char* at(size_t index);  // lowest usable byte

 private:
  std::vector<unsigned char*> stacks_;
};

// The two sides of a switch. `enter` starts or continues a fiber and returns when it calls `leave`.
class Fiber {
 public:
  // The first `enter` calls f(), which must never return: it ends with leave(true).
  void prepare(unsigned char* stack, void (*f)());
  void enter();
  void leave(bool for_good);
  // The first thing that f does.
  void arrived();

  const unsigned char* stack() const { return stack_; }

 private:
  unsigned char* stack_ = nullptr;
  void* saved_ = nullptr;       // stack pointer of the fiber
  void* saved_main_ = nullptr;  // stack pointer of whoever entered
  void* fake_ = nullptr;        // AddressSanitizer's view of both stacks
  void* fake_main_ = nullptr;
  const void* main_bottom_ = nullptr;
  size_t main_size_ = 0;
};

}  // namespace simt
