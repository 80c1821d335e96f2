// The device side of simt.h: thin wrappers over PTX, for sm_80 and newer. Fragment layouts are those of the PTX ISA:
// with g = lane / 4 and t = lane % 4, register r of A holds (row g + 8 (r & 1), columns 2t + 8 (r >> 1) + {0, 1}),
// register r of B holds (k = 2t + 8 r + {0, 1}, n = g), and element e of C and D is (row g + 8 (e >> 1), column
// 2t + (e & 1)).
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "simt/types.h"

namespace simt {

// Dynamic shared memory of the block, aligned to 128 bytes.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char simt_shared[];
  return simt_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x & 31u); }

// D += A B for one warp: A 16 x 16 and B 16 x 8 in bf16, D in float32.
__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory; lanes 8j .. 8j+7 give the row addresses of matrix j, each
// aligned to 16 bytes. Lane i gets elements 2 (i % 4) + {0, 1} of row i / 4; `_trans` gets the transposed matrix's.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts the copy of 16 bytes from global to shared memory, both aligned to 16; if not `valid`, writes zeros and reads
// nothing (`from` must still be a legal address).
__device__ __forceinline__ void cp_async16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's committed groups are unfinished. Other threads see them after a barrier.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// A barrier of its own for `count` threads (a multiple of 32), id 1..15; 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// For the simulator only (host.h).
__device__ __forceinline__ void next_round() {}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

// Of the current device: how many blocks a persistent kernel starts goes by it.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "asking for the device");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "asking for multiprocessors");
  return count;
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...); throws std::runtime_error if the launch is refused.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, A... arguments) {
  if (!grid.x || !grid.y || !grid.z) return;
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {  // each time: the answer is the current device's
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess)
      check(error, ("asking for " + std::to_string(shared_bytes) + " bytes of shared memory").c_str());
  }
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(arguments)...);
  check(cudaGetLastError(), "launching a kernel");
}

}  // namespace simt
