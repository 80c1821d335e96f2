// What the attention kernels share: 16 queries of one warp against 16 keys at a time, with the running softmax of
// Milakov and Gimelshein (2018) in registers.
//
// Rows of shared memory are D bf16, swizzled in 16-byte chunks so that ldmatrix meets no bank twice. Queries are A
// fragments in registers; keys are B as they lie (ldmatrix), values are B transposed (ldmatrix.trans); the fragments of
// the scores are, once rounded, A fragments of the second product as they stand. Lane (g, t) = (lane / 4, lane % 4)
// holds columns 8 n + 2 t + {0, 1} of rows g and g + 8.
#pragma once
#include "cuda/kernels.h"
#include "simt/simt.h"

namespace pagelens::cuda::attention {

constexpr uint32_t kAll = ~0u;

// Byte offset of 16-byte chunk c of row r. The mask stays within the power of two that divides the chunks of a row.
template <int D>
__device__ inline int swizzled(int r, int c) {
  constexpr int kChunks = D / 8;
  const int mask = kChunks % 8 == 0 ? r & 7 : kChunks % 4 == 0 ? (r >> 1) & 3 : (r >> 2) & 1;
  return (r * kChunks + (c ^ mask)) * 16;
}

// The running softmax of rows g and g + 8: sums are of this lane's columns only, until the end.
template <int D>
struct Running {
  float largest[2], sum[2], out[D / 8][4];
};

template <int D>
__device__ inline void begin(Running<D>& run) {
#pragma unroll
  for (int h = 0; h < 2; h++) run.largest[h] = -INFINITY, run.sum[h] = 0.0f;
#pragma unroll
  for (int n = 0; n < D / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) run.out[n][e] = 0.0f;
}

// The A fragments of 16 query rows; row(r) is the address of row r's D values, or null for a row of zeros.
template <int D, class Row>
__device__ inline void load_queries(const Row& row, uint32_t (&q)[D / 16][4]) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const bf16* x = row(g + 8 * half);
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
      for (int upper = 0; upper < 2; upper++)
        q[k][half + 2 * upper] = x ? *reinterpret_cast<const uint32_t*>(x + 16 * k + 8 * upper + 2 * t) : 0u;
  }
}

// s += q . keys for 16 keys, `keys` being the first of their swizzled rows; first_row says which (it is a multiple of
// 16).
template <int D>
__device__ inline void add_scores(const uint32_t (&q)[D / 16][4], const unsigned char* keys, int first_row,
                                  float (&s)[2][4]) {
  const int lane = threadIdx.x & 31, row = first_row + (lane & 7) + ((lane >> 4) << 3);
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t b[4];  // keys 0..7 of columns 0..7 and 8..15, then keys 8..15
    simt::ldmatrix_x4(b, keys + swizzled<D>(row, 2 * k + ((lane >> 3) & 1)));
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
    simt::mma_bf16(s[0], q[k], low);
    simt::mma_bf16(s[1], q[k], high);
  }
}

// Logits (-inf where a row does not see a key) become weights relative to the running maximum; what was summed before
// is scaled to it.
template <int D>
__device__ inline void soften(float (&s)[2][4], Running<D>& run) {
  float factor[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float largest = run.largest[h];
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) largest = fmaxf(largest, s[n][2 * h + e]);
    largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, 2));
    // A row that has seen no key yet keeps -inf; 0 instead of it in the exponents gives 0 and not NaN.
    const float base = largest == -INFINITY ? 0.0f : largest;
    factor[h] = expf(run.largest[h] - base);
    run.largest[h] = largest;
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        s[n][2 * h + e] = expf(s[n][2 * h + e] - base);
        sum += s[n][2 * h + e];
      }
    run.sum[h] = run.sum[h] * factor[h] + sum;
  }
#pragma unroll
  for (int n = 0; n < D / 8; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) run.out[n][e] *= factor[e >> 1];
}

// The weights as A fragments, rounded to bf16; `rest`, if wanted, is what the rounding left.
__device__ inline void round_weights(const float (&s)[2][4], uint32_t (&p)[4], uint32_t* rest) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float x = s[i >> 1][2 * (i & 1)], y = s[i >> 1][2 * (i & 1) + 1];
    p[i] = simt::pack_bf16(x, y);
    if (rest) rest[i] = simt::pack_bf16(x - simt::low_bf16(p[i]), y - simt::high_bf16(p[i]));
  }
}

// out += p . values (and rest . values) for the same 16 keys.
template <int D, bool kRest>
__device__ inline void add_values(const uint32_t (&p)[4], const uint32_t (&rest)[4], const unsigned char* values,
                                  int first_row, Running<D>& run) {
  const int lane = threadIdx.x & 31, row = first_row + (lane & 7) + ((lane >> 3) & 1) * 8;
#pragma unroll
  for (int n = 0; n < D / 16; n++) {
    uint32_t b[4];  // keys 0..7 and 8..15 of columns 0..7, then of columns 8..15
    simt::ldmatrix_x4_trans(b, values + swizzled<D>(row, 2 * n + (lane >> 4)));
    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
    if constexpr (kRest) {
      simt::mma_bf16(run.out[2 * n], rest, low);
      simt::mma_bf16(run.out[2 * n + 1], rest, high);
    }
    simt::mma_bf16(run.out[2 * n], p, low);
    simt::mma_bf16(run.out[2 * n + 1], p, high);
  }
}

// The sum of a row over the four lanes that hold it.
__device__ inline float sum_of_row(float sum) {
  sum += __shfl_xor_sync(kAll, sum, 1);
  return sum + __shfl_xor_sync(kAll, sum, 2);
}

}  // namespace pagelens::cuda::attention
