// The host side of simt.h: CUDA's names on the runtime of runtime.h. Functions that must know where in the kernel they
// were called take a Site, filled in by the compiler.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "simt/types.h"

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace simt {

struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
  bool operator==(const Site& other) const { return file == other.file && line == other.line; }
};

struct Place {
  dim3 thread, block, block_size, grid_size;
};
extern thread_local const Place* place;  // of the running CUDA thread

enum class WarpOp { shuffle, reduce_or, sync, mma, ldmatrix, ldmatrix_trans };

struct ShuffleArgs {
  uint32_t in, out;
  int source;  // lane
};
struct ReduceArgs {
  uint32_t in, out;
};
struct MmaArgs {
  float* d;
  const uint32_t *a, *b;
};
struct LdmatrixArgs {
  uint32_t* out;
  const void* row;
};

unsigned char* shared_memory();
int lane_id();
void barrier(int id, int count, Site site);  // count -1: all threads that have not ended
void warp_collective(WarpOp op, uint32_t mask, void* arguments, Site site);
void copy_async(void* to, const void* from, int bytes, bool valid, Site site);
void commit_async();
void wait_async(int groups_left);
void note_atomic(const void* p, size_t bytes, const void* pc);
void launch_blocks(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

template <class T>
T shuffle(uint32_t mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 4 && std::is_trivially_copyable_v<T>, "shuffles move 4-byte values");
  ShuffleArgs args{0, 0, source};
  memcpy(&args.in, &value, 4);
  warp_collective(WarpOp::shuffle, mask, &args, site);
  memcpy(&value, &args.out, 4);
  return value;
}

inline uint32_t reduce_or(uint32_t mask, uint32_t value, Site site) {
  ReduceArgs args{value, 0};
  warp_collective(WarpOp::reduce_or, mask, &args, site);
  return args.out;
}
inline uint32_t ballot(uint32_t mask, bool vote, Site site) {
  return reduce_or(mask, static_cast<uint32_t>(vote) << lane_id(), site);
}

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  MmaArgs args{d, a, b};
  warp_collective(WarpOp::mma, ~0u, &args, site);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  LdmatrixArgs args{r, row};
  warp_collective(WarpOp::ldmatrix, ~0u, &args, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Site site = Site::here()) {
  LdmatrixArgs args{r, row};
  warp_collective(WarpOp::ldmatrix_trans, ~0u, &args, site);
}
inline void cp_async16(void* to, const void* from, bool valid = true, Site site = Site::here()) {
  copy_async(to, from, 16, valid, site);
}
inline void cp_async_commit() { commit_async(); }
template <int N>
void cp_async_wait() {
  wait_async(N);
}
inline void named_barrier(int id, int count, Site site = Site::here()) { barrier(id, count, site); }

inline int multiprocessors() { return 3; }  // few and odd, so that blocks of persistent kernels take several tiles

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream, A... arguments) {
  launch_blocks(grid, block, shared_bytes, [&] { kernel(static_cast<P>(arguments)...); });
}

}  // namespace simt

#define threadIdx (::simt::place->thread)
#define blockIdx (::simt::place->block)
#define blockDim (::simt::place->block_size)
#define gridDim (::simt::place->grid_size)

inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::barrier(0, -1, site); }
inline void __syncwarp(uint32_t mask = ~0u, simt::Site site = simt::Site::here()) {
  simt::warp_collective(simt::WarpOp::sync, mask, nullptr, site);
}
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, simt::Site site = simt::Site::here()) {
  return simt::shuffle(mask, value, source & 31, site);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, simt::Site site = simt::Site::here()) {
  return simt::shuffle(mask, value, simt::lane_id() ^ bits, site);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int distance, simt::Site site = simt::Site::here()) {
  const int lane = simt::lane_id();
  return simt::shuffle(mask, value, lane < distance ? lane : lane - distance, site);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int distance, simt::Site site = simt::Site::here()) {
  const int lane = simt::lane_id();
  return simt::shuffle(mask, value, lane + distance > 31 ? lane : lane + distance, site);
}
inline uint32_t __ballot_sync(uint32_t mask, bool vote, simt::Site site = simt::Site::here()) {
  return simt::ballot(mask, vote, site);
}
inline bool __any_sync(uint32_t mask, bool vote, simt::Site site = simt::Site::here()) {
  return simt::ballot(mask, vote, site) != 0;
}
inline bool __all_sync(uint32_t mask, bool vote, simt::Site site = simt::Site::here()) {
  return simt::ballot(mask, vote, site) == mask;
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value, simt::Site site = simt::Site::here()) {
  return simt::reduce_or(mask, value, site);
}

// Blocks run one after the other in one OS thread, so plain arithmetic is atomic; the race detector is told.
// The attribute keeps the compiler's own access hooks out, which would report them as plain accesses.
#define SIMT_UNCHECKED __attribute__((no_sanitize("thread"), noinline))
template <class T>
SIMT_UNCHECKED T atomicAdd(T* p, T value) {
  simt::note_atomic(p, sizeof(T), __builtin_return_address(0));
  const T old = *p;
  *p = old + value;
  return old;
}
template <class T>
SIMT_UNCHECKED T atomicMax(T* p, T value) {
  simt::note_atomic(p, sizeof(T), __builtin_return_address(0));
  const T old = *p;
  *p = old < value ? value : old;
  return old;
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline uint32_t __float_as_uint(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
inline float __uint_as_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
