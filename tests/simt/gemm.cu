// The example of docs/simt.md: C [M, N] float32 = A [M, K] W [N, K]^T in bf16. Tiles of 64 x 64 x 32, four warps in a
// 2 x 2 square, two stages of cp.async, rows of 64 bytes swizzled so that ldmatrix meets no bank twice.
#include "simt/simt.h"

using namespace simt;

namespace {

constexpr int kTile = 64, kDepth = 32, kStages = 2, kRowBytes = kDepth * 2, kThreads = 128;

__device__ inline unsigned char* piece(unsigned char* tile, int row, int chunk) {
  return tile + row * kRowBytes + (chunk ^ ((row >> 1) & 3)) * 16;
}

__device__ inline void load_tile(unsigned char* tile, const bf16* x, int row0, int rows, int k0, int depth) {
  for (int i = threadIdx.x; i < kTile * 4; i += kThreads) {
    const int row = i >> 2, chunk = i & 3;
    const bool valid = row0 + row < rows && k0 + chunk * 8 < depth;
    cp_async16(piece(tile, row, chunk), valid ? x + static_cast<size_t>(row0 + row) * depth + k0 + chunk * 8 : x,
               valid);
  }
}

__device__ inline void multiply(float (&sums)[2][4][4], unsigned char* a, unsigned char* b, int warp_m, int warp_n) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int k = 0; k < kDepth / 16; k++) {
    uint32_t fragment_a[2][4], fragment_b[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
      ldmatrix_x4(fragment_a[i], piece(a, warp_m * 32 + i * 16 + (lane & 15), k * 2 + (lane >> 4)));
#pragma unroll
    for (int j = 0; j < 2; j++)
      ldmatrix_x4(fragment_b[j],
                  piece(b, warp_n * 32 + j * 16 + (lane & 7) + ((lane >> 4) << 3), k * 2 + ((lane >> 3) & 1)));
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t pair[2] = {fragment_b[j >> 1][(j & 1) * 2], fragment_b[j >> 1][(j & 1) * 2 + 1]};
        mma_bf16(sums[i][j], fragment_a[i], pair);
      }
  }
}

__global__ void __launch_bounds__(kThreads)
    gemm(const bf16* __restrict__ a, const bf16* __restrict__ w, float* __restrict__ c, int m, int n, int k) {
  unsigned char* tile_a = shared_memory();
  unsigned char* tile_w = tile_a + kStages * kTile * kRowBytes;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warp_m = warp >> 1, warp_n = warp & 1;
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile, steps = (k + kDepth - 1) / kDepth;
  const auto load = [&](int step) {
    const int stage = step & 1;
    load_tile(tile_a + stage * kTile * kRowBytes, a, m0, m, step * kDepth, k);
    load_tile(tile_w + stage * kTile * kRowBytes, w, n0, n, step * kDepth, k);
    cp_async_commit();
  };
  float sums[2][4][4] = {};
  load(0);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) {
      load(step + 1);
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();
    const int stage = step & 1;
    multiply(sums, tile_a + stage * kTile * kRowBytes, tile_w + stage * kTile * kRowBytes, warp_m, warp_n);
    __syncthreads();  // before the next load overwrites the stage
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int row = m0 + warp_m * 32 + i * 16 + (lane >> 2) + (e >> 1) * 8;
        const int col = n0 + warp_n * 32 + j * 8 + (lane & 3) * 2 + (e & 1);
        if (row < m && col < n) c[static_cast<size_t>(row) * n + col] = sums[i][j][e];
      }
}

}  // namespace

// k is a multiple of 8.
void run_gemm(const bf16* a, const bf16* w, float* c, int m, int n, int k, Stream stream) {
  const dim3 grid((n + kTile - 1) / kTile, (m + kTile - 1) / kTile);
  launch(gemm, grid, dim3(kThreads), 2 * kStages * kTile * kRowBytes, stream, a, w, c, m, n, k);
}
