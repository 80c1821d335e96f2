// qk_norm_rope_store: RMSNorm of each q and k head, rotate-half RoPE, and the new keys and values to their slots.
//
// One warp a head of one token; a lane holds pairs of neighbours (2 i, 2 i + 1) of the lower half and their partners in
// the upper half, so that every access is 4 bytes and a head of 128 is one access a half. The sum of squares is a tree
// of shuffles in a fixed order: a row's bits do not depend on its neighbours. Values are copied as they are.
//
// Bytes for a token of (heads, kv_heads, d) = (16, 8, 128): 8 KB of qkv in, 4 KB of q and 4 KB of cache out, 0.5 KB of
// cos and sin (shared by the token's warps in L1). FLOPs: some 6 a value, nothing. Floor on an A100 (1.9 TB/s): 8.6 ns
// a token, 4.4 us for 512; below that the launch is the cost.
#include <stdexcept>

#include "cuda/kernels.h"
#include "simt/simt.h"

namespace pagelens::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kMaxHeadDim = 256;
constexpr int kPairs = kMaxHeadDim / 2 / 64;  // pairs of one half that a lane holds

__device__ inline uint32_t load_pair(const bf16* p) { return *reinterpret_cast<const uint32_t*>(p); }
__device__ inline void store_pair(bf16* p, float low, float high) {
  *reinterpret_cast<uint32_t*>(p) = simt::pack_bf16(low, high);
}

__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int d = 16; d; d >>= 1) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

__device__ inline void norm_rope(const bf16* x, const bf16* weight, float eps, const float* cos, const float* sin,
                                 int d, bf16* out) {
  const int lane = threadIdx.x & 31, half = d / 2;
  float low[kPairs][2], high[kPairs][2], squares = 0.0f;
#pragma unroll
  for (int r = 0; r < kPairs; r++) {
    const int i = 2 * (lane + 32 * r);
    const bool inside = i < half;
    const uint32_t a = inside ? load_pair(x + i) : 0u, b = inside ? load_pair(x + half + i) : 0u;
    low[r][0] = simt::low_bf16(a), low[r][1] = simt::high_bf16(a);
    high[r][0] = simt::low_bf16(b), high[r][1] = simt::high_bf16(b);
#pragma unroll
    for (int h = 0; h < 2; h++) squares += low[r][h] * low[r][h] + high[r][h] * high[r][h];
  }
  float inverse = 1.0f;
  if (weight) inverse = 1.0f / sqrtf(sum_of_warp(squares) / static_cast<float>(d) + eps);
#pragma unroll
  for (int r = 0; r < kPairs; r++) {
    const int i = 2 * (lane + 32 * r);
    if (i >= half) continue;
    float rotated_low[2], rotated_high[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float a = low[r][h], b = high[r][h];
      if (weight) {
        a *= inverse * simt::to_float(weight[i + h]);
        b *= inverse * simt::to_float(weight[half + i + h]);
      }
      rotated_low[h] = a * cos[i + h] - b * sin[i + h];
      rotated_high[h] = b * cos[i + h] + a * sin[i + h];
    }
    store_pair(out + i, rotated_low[0], rotated_low[1]);
    store_pair(out + half + i, rotated_high[0], rotated_high[1]);
  }
}

__global__ void __launch_bounds__(kThreads) store(const QkNormRopeStoreArgs a) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, d = a.head_dim, of_token = a.heads + 2 * a.kv_heads;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (item >= static_cast<int64_t>(a.tokens) * of_token) return;
  const int token = static_cast<int>(item / of_token), head = static_cast<int>(item % of_token);
  const int position = a.positions[token], place = a.slots[token];
  if (position < 0 || position >= a.num_positions || place < 0 || place >= a.num_slots) return;
  const bf16* x = a.qkv + token * a.qkv_stride + static_cast<int64_t>(head) * d;
  const float* cos = a.cos + static_cast<int64_t>(position) * (d / 2);
  const float* sin = a.sin + static_cast<int64_t>(position) * (d / 2);
  const int64_t slot = static_cast<int64_t>(place) * a.kv_heads;
  if (head < a.heads) {
    norm_rope(x, a.q_norm, a.eps, cos, sin, d, a.out + (static_cast<int64_t>(token) * a.heads + head) * d);
  } else if (head < a.heads + a.kv_heads) {
    norm_rope(x, a.k_norm, a.eps, cos, sin, d, a.keys + (slot + head - a.heads) * d);
  } else {
    uint32_t* to = reinterpret_cast<uint32_t*>(a.values + (slot + head - a.heads - a.kv_heads) * d);
    const uint32_t* from = reinterpret_cast<const uint32_t*>(x);
    for (int i = lane; i < d / 2; i += 32) to[i] = from[i];
  }
}

}  // namespace

void qk_norm_rope_store(const QkNormRopeStoreArgs& a, Stream stream) {
  if (a.head_dim % 4 || a.head_dim < 4 || a.head_dim > kMaxHeadDim || a.qkv_stride % 2)
    throw std::invalid_argument("qk_norm_rope_store takes a head_dim of 4 to 256, a multiple of 4, and an even stride");
  const int64_t items = static_cast<int64_t>(a.tokens) * (a.heads + 2 * a.kv_heads);
  simt::launch(store, dim3(static_cast<unsigned>(ceil_div(items, kWarps))), dim3(kThreads), 0, stream, a);
}

}  // namespace pagelens::cuda
