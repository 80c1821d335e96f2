// What `g++ -fsanitize=thread -c kernel.cu` calls at every access of memory. Linked instead of libtsan.
#include "simt/block.h"

namespace {

void note(const void* p, size_t bytes, simt::Access kind, const void* code) {
  simt::Machine& m = simt::machine();
  if (m.is_running()) m.access(m.running(), p, bytes, kind, {nullptr, 0, code});
}

}  // namespace

#define SIMT_HOOK(bytes)                                                                                          \
  void __tsan_read##bytes(void* p) { note(p, bytes, simt::Access::read, __builtin_return_address(0)); }           \
  void __tsan_write##bytes(void* p) { note(p, bytes, simt::Access::write, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##bytes(void* p) { note(p, bytes, simt::Access::read, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##bytes(void* p) { note(p, bytes, simt::Access::write, __builtin_return_address(0)); }

extern "C" {
SIMT_HOOK(1)
SIMT_HOOK(2)
SIMT_HOOK(4)
SIMT_HOOK(8)
SIMT_HOOK(16)
void __tsan_read_range(void* p, size_t n) { note(p, n, simt::Access::read, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { note(p, n, simt::Access::write, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
