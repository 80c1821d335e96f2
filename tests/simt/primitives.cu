// Small kernels, each for one thing that the runtime does or finds. `run_primitive` runs them by name.
#include <string>

#include "simt/simt.h"

using namespace simt;

namespace {

constexpr uint32_t kAll = ~0u;

// out[t] = sum over the warp, by shuffles; then the block's sum by shared memory.
__global__ void block_sum(const int* x, int* out) {
  int* partial = reinterpret_cast<int*>(shared_memory());
  int v = x[threadIdx.x];
  for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(kAll, v, d);
  if ((threadIdx.x & 31) == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  int total = 0;
  for (unsigned i = 0; i < blockDim.x / 32; i++) total += partial[i];
  out[threadIdx.x] = total;
}

__global__ void shuffles(const int*, int* out) {
  const int lane = lane_id();
  int* mine = out + threadIdx.x * 7;
  mine[0] = __shfl_up_sync(kAll, lane, 3);
  mine[1] = __shfl_down_sync(kAll, lane, 3);
  mine[2] = __shfl_sync(kAll, lane, 40);  // modulo 32
  mine[3] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  mine[4] = __any_sync(kAll, lane == 5) * 2 + __all_sync(kAll, lane < 32);
  mine[5] = lane < 16 ? __shfl_xor_sync(0xffffu, lane, 1) : -1;
  mine[6] = static_cast<int>(__reduce_or_sync(kAll, lane % 3 == 0 ? 1u << (lane / 3) : 0u));
}

__global__ void partial_barrier(const int* x, int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 64) {
    named_barrier(1, 64);
    out[threadIdx.x] = shared[63 - threadIdx.x];
  }
  __syncthreads();
  if (threadIdx.x >= 64) out[threadIdx.x] = shared[0];
}

__global__ void add_up(const int* x, int* out) { atomicAdd(out, x[blockIdx.x * blockDim.x + threadIdx.x]); }

// ---- what must be found ----
__global__ void no_barrier(const int* x, int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = x[threadIdx.x];
  out[threadIdx.x] = shared[threadIdx.x ^ 32];
}
__global__ void shuffle_is_no_barrier(const int* x, int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = x[threadIdx.x];
  __shfl_sync(kAll, 0, 0);
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
__global__ void warp_sync_is_enough(const int* x, int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
__global__ void warp_sync_is_too_little(const int* x, int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  out[threadIdx.x] = shared[threadIdx.x ^ 32];
}
__global__ void blocks_write_one_place(const int* x, int* out) { out[threadIdx.x] = x[threadIdx.x]; }
__global__ void blocks_read_what_one_writes(const int* x, int* out) {
  if (blockIdx.x == 0) out[threadIdx.x] = x[threadIdx.x];
  if (blockIdx.x == 1) out[threadIdx.x + 128] = out[threadIdx.x];
}
__global__ void atomic_and_plain(const int* x, int* out) {
  if (threadIdx.x == 0)
    out[0] = x[0];
  else
    atomicAdd(out, 1);
}
__global__ void half_a_barrier(const int*, int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}
__global__ void two_barriers(const int*, int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
  __syncthreads();
}
__global__ void diverged_shuffle(const int*, int* out) {
  if (threadIdx.x & 1)
    out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
  else
    out[threadIdx.x] = __shfl_xor_sync(kAll, 2, 1);
}
__global__ void shuffle_from_outside(const int*, int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1, 20);
}
__global__ void misaligned_ldmatrix(const int*, int* out) {
  uint32_t r[4];
  ldmatrix_x4(r, shared_memory() + 8 + 16 * lane_id());
  out[threadIdx.x] = static_cast<int>(r[0]);
}
__global__ void early_read(const int* x, int* out) {
  cp_async16(shared_memory() + 16 * threadIdx.x, x + 4 * threadIdx.x);
  cp_async_commit();
  out[threadIdx.x] = reinterpret_cast<int*>(shared_memory())[4 * threadIdx.x];
  cp_async_wait<0>();
}
__global__ void never_waits(const int* x, int*) {
  cp_async16(shared_memory() + 16 * threadIdx.x, x + 4 * threadIdx.x);
  cp_async_commit();
}
__global__ void shared_overflow(const int* x, int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void column_store(const int* x, int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x * 32] = x[threadIdx.x];  // all lanes in one bank
  out[threadIdx.x] = shared[threadIdx.x * 32];
}
__global__ void masked_rows(const int* x, int* out) {  // no round of the loop has two lanes in a bank
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int lane = threadIdx.x;
  shared[lane] = x[lane];
  for (int r = 0; r < 8; r++) {
    const int v = shared[lane];
    if (lane < 4 * (r + 1)) shared[32 + r * 33 + lane] = v;
  }
  out[lane] = shared[lane];
}

__global__ void pivots(const int* x, int* out) {  // round r: lanes 0..r store into bank r: r extra cycles
  int* shared = reinterpret_cast<int*>(shared_memory());
  const int lane = threadIdx.x, v = x[lane];
  for (int r = 0; r < 32; r++) {
    if (lane == r) shared[lane] = v;
    __syncwarp();
    if (lane <= r) shared[32 + r + 32 * lane] = v;
    __syncwarp();
  }
  out[lane] = shared[lane];
}

}  // namespace

struct Primitive {
  const char* name;
  void (*kernel)(const int*, int*);
  int blocks, threads, shared_bytes;
};

const Primitive kPrimitives[] = {
    {"block_sum", block_sum, 1, 128, 16},
    {"shuffles", shuffles, 1, 64, 0},
    {"partial_barrier", partial_barrier, 1, 128, 512},
    {"add_up", add_up, 3, 64, 0},
    {"no_barrier", no_barrier, 1, 64, 256},
    {"shuffle_is_no_barrier", shuffle_is_no_barrier, 1, 32, 128},
    {"warp_sync_is_enough", warp_sync_is_enough, 1, 64, 256},
    {"warp_sync_is_too_little", warp_sync_is_too_little, 1, 64, 256},
    {"blocks_write_one_place", blocks_write_one_place, 2, 32, 0},
    {"blocks_read_what_one_writes", blocks_read_what_one_writes, 2, 32, 0},
    {"atomic_and_plain", atomic_and_plain, 1, 32, 0},
    {"half_a_barrier", half_a_barrier, 1, 64, 0},
    {"two_barriers", two_barriers, 1, 64, 0},
    {"diverged_shuffle", diverged_shuffle, 1, 32, 0},
    {"shuffle_from_outside", shuffle_from_outside, 1, 32, 0},
    {"misaligned_ldmatrix", misaligned_ldmatrix, 1, 32, 1024},
    {"early_read", early_read, 1, 32, 512},
    {"never_waits", never_waits, 1, 32, 512},
    {"shared_overflow", shared_overflow, 1, 32, 128},
    {"column_store", column_store, 1, 32, 4096},
    {"pivots", pivots, 1, 32, 8192},
    {"masked_rows", masked_rows, 1, 32, 2048},
};

bool run_primitive(const std::string& name, const int* x, int* out) {
  if (name == "grid_too_tall") {
    launch(block_sum, dim3(1, 65536), dim3(32), 4, nullptr, x, out);
    return true;
  }
  for (const Primitive& p : kPrimitives)
    if (name == p.name) {
      launch(p.kernel, dim3(p.blocks), dim3(p.threads), p.shared_bytes, nullptr, x, out);
      return true;
    }
  return false;
}
