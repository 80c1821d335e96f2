#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
  #include <sanitizer/asan_interface.h>
  #include <sanitizer/common_interface_defs.h>
#endif

// simt_switch(save, to): stores the stack pointer at *save after pushing the registers that a callee must keep, and
// continues from the stack `to`, which was left the same way or was laid out by Fiber::prepare.
extern "C" void simt_switch(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch, .-simt_switch
)");
#else
  #error "csrc/simt knows how to switch stacks on x86-64 and aarch64 only"
#endif

namespace simt {

FiberStacks::~FiberStacks() {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (unsigned char* stack : stacks_) munmap(stack - page, kBytes + page);
}

unsigned char* FiberStacks::at(size_t index) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  while (stacks_.size() <= index) {
    void* memory = mmap(nullptr, kBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);
    stacks_.push_back(static_cast<unsigned char*>(memory) + page);
  }
  return stacks_[index];
}

void Fiber::prepare(unsigned char* stack, void (*f)()) {
  *this = Fiber();
  stack_ = stack;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, FiberStacks::kBytes);  // of the fiber that used it before
#endif
  auto* top = reinterpret_cast<uint64_t*>(stack + FiberStacks::kBytes);
#if defined(__x86_64__)
  // Popped registers, then the address that `ret` takes; one word above keeps the stack pointer at 8 modulo 16 where f
  // begins, as after a call.
  uint64_t* sp = top - 8;
  memset(sp, 0, 8 * sizeof *sp);
  sp[6] = reinterpret_cast<uint64_t>(f);
#else
  uint64_t* sp = top - 20;
  memset(sp, 0, 20 * sizeof *sp);
  sp[11] = reinterpret_cast<uint64_t>(f);  // x30
#endif
  saved_ = sp;
}

void Fiber::enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&fake_main_, stack_, FiberStacks::kBytes);
#endif
  simt_switch(&saved_main_, saved_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_main_, nullptr, nullptr);
#endif
}

void Fiber::leave([[maybe_unused]] bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_, main_bottom_, main_size_);
#endif
  simt_switch(&saved_, saved_main_);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_, nullptr, nullptr);
#endif
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &main_bottom_, &main_size_);
#endif
}

}  // namespace simt
