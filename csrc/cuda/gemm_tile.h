// The tile product of grouped_gemm: C [kTileM, 128] += A [rows, k] W [128 rows, k]^T for one block of 4 warps, with A
// in bf16 and W in bf16, int8 or int4.
//
// Two stages of cp.async, 64 k deep. A lies in rows of 128 bytes, swizzled in 16-byte chunks (chunk ^ row & 7); so does
// W in bf16. Quantised W is stored in the order in which lanes want it (pack_quantized in engine/ops/cuda.py): of 16 k,
// lane t of a quad gets k = 2t, 2t+1, 2t+8, 2t+9, which is both registers of a B fragment. For int8 these are 4 bytes
// in a row, 64 bytes for 64 k; for int4 the bytes of two such steps of 16 share 4 bytes, 32 bytes for 64 k. Values
// become bf16 exactly; the sums of a group of 32 (int4) or 64 (int8) k are scaled in float32, so that W counts as it is
// defined.
//
// Every output sums over k in one order, 16 at a time, whatever the tile's height: a row has the same bits in any
// batch.
#pragma once
#include "cuda/kernels.h"
#include "simt/simt.h"

namespace pagelens::cuda::tile {

constexpr int kThreads = 128, kTileN = 128, kDepth = 64, kStages = 2;

// kTileM 64: warps 2 x 2, 32 x 64 each. kTileM 16: warps 1 x 4, 16 x 32 each.
template <int kTileM>
struct Shape {
  static constexpr int kWarpsM = kTileM == 64 ? 2 : 1, kWarpsN = 4 / kWarpsM;
  static constexpr int kM = kTileM / kWarpsM / 16, kN = kTileN / kWarpsN / 8;  // fragments of a warp
};

template <WeightKind kKind>
constexpr int kRowBytes = kKind == WeightKind::bf16   ? 128
                          : kKind == WeightKind::int8 ? 64
                                                      : 32;  // of 64 k
template <WeightKind kKind>
constexpr int kGroup = kKind == WeightKind::int4 ? 32 : 64;

template <int kTileM, WeightKind kKind>
constexpr int kStageBytes = kTileM * 128 + kTileN * kRowBytes<kKind>;

// Chunk c of row r. Rows shorter than the 128 bytes of the banks are swizzled so that 8 rows, 4 bytes each, of one
// column (a quad's fragment loads) lie in different banks as far as they can.
template <int kBytes>
__device__ inline int swizzled(int row, int chunk) {
  constexpr int kChunks = kBytes / 16;
  const int mask = kChunks == 8 ? row & 7 : kChunks == 4 ? (row >> 1) & 3 : (row >> 2) & 1;
  return row * kBytes + ((chunk ^ mask) << 4);
}

// Where a block's operands lie. Row r of A is a_row(r), null past the tile's rows; W has rows w, w + w_stride, ...
// bytes.
struct Source {
  const unsigned char* w;
  int64_t w_stride;  // bytes
  int w_rows, k;
};

template <int kTileM>
struct Sums {
  float c[Shape<kTileM>::kM][Shape<kTileM>::kN][4];
};

// The loads of one thread: fixed rows, so that a step only moves the column. Addresses of A are found once a tile.
template <int kTileM, WeightKind kKind>
struct Loader {
  static constexpr int kA = kTileM * 8 / kThreads, kW = kTileN * kRowBytes<kKind> / 16 / kThreads;
  static constexpr int kChunks = kRowBytes<kKind> / 16;
  const bf16* a[kA];
  const unsigned char* w;
  int64_t w_step;
  int a_to, w_to, w_rows, chunk, column_of_w, k;

  template <class Row>
  __device__ void begin(const Source& s, const Row& a_row) {
    const int first = threadIdx.x >> 3;
    chunk = threadIdx.x & 7;
#pragma unroll
    for (int i = 0; i < kA; i++) a[i] = a_row(first + 16 * i);
    a_to = swizzled<128>(first, chunk);
    const int row = threadIdx.x / kChunks;
    w = s.w + row * s.w_stride + threadIdx.x % kChunks * 16;
    w_step = s.w_stride * (kThreads / kChunks);
    w_rows = s.w_rows - row;
    column_of_w = static_cast<int>(threadIdx.x % kChunks) * 8;
    w_to = swizzled<kRowBytes<kKind>>(row, threadIdx.x % kChunks);
    k = s.k;
  }

  // Columns k0 .. k0 + 63. Rows 16 (or 8) apart share the swizzle, so that the places are a constant apart.
  __device__ void load(unsigned char* stage, int k0) const {
    const bool a_inside = k0 + chunk * 8 < k;
#pragma unroll
    for (int i = 0; i < kA; i++) {
      const bool valid = a_inside && a[i];
      simt::cp_async16(stage + a_to + i * 16 * 128, valid ? a[i] + k0 + chunk * 8 : reinterpret_cast<const bf16*>(w),
                       valid);
    }
    constexpr int kApart = kThreads / kChunks;
    unsigned char* to = stage + kTileM * 128 + w_to;
    const int column = k0 / kDepth * kRowBytes<kKind>;
    // A row of W ends with zeros up to a multiple of 64 k if it is quantised; in bf16 the column is checked.
    const bool inside = kKind != WeightKind::bf16 || k0 + column_of_w < k;
#pragma unroll
    for (int i = 0; i < kW; i++) {
      const bool valid = inside && i * kApart < w_rows;
      simt::cp_async16(to + i * kApart * kRowBytes<kKind>, valid ? w + i * w_step + column : w, valid);
    }
    simt::cp_async_commit();
  }
};

// Four bytes (two k pairs) of int8 as the two bf16 registers of a B fragment.
__device__ inline void widen_int8(uint32_t q, uint32_t (&b)[2]) {
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float low = static_cast<float>(static_cast<int8_t>(q >> (16 * r)));
    const float high = static_cast<float>(static_cast<int8_t>(q >> (16 * r + 8)));
    b[r] = simt::pack_bf16(low, high);
  }
}

// Half of four bytes of int4 (nibbles hold value + 8): step 0 is in the low nibbles, step 1 in the high ones.
__device__ inline void widen_int4(uint32_t q, int step, uint32_t (&b)[2]) {
  const uint32_t n = (q >> (4 * step)) & 0x0f0f0f0fu;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    // 0x4300 | n is the bf16 128 + n: subtracting 136 leaves n - 8, exactly.
    const float low = simt::to_float(bf16{static_cast<uint16_t>(0x4300u | ((n >> (16 * r)) & 0xffu))}) - 136.0f;
    const float high = simt::to_float(bf16{static_cast<uint16_t>(0x4300u | ((n >> (16 * r + 8)) & 0xffu))}) - 136.0f;
    b[r] = simt::pack_bf16(low, high);
  }
}

// B fragments of k-step `step` (16 k) for all columns of the warp.
template <int kTileM, WeightKind kKind>
__device__ inline void load_weights(const unsigned char* w, int warp_n, int step, uint32_t (&b)[Shape<kTileM>::kN][2]) {
  constexpr int kN = Shape<kTileM>::kN;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  if constexpr (kKind == WeightKind::bf16) {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t r[4];
      const int row = (warp_n * kN + n) * 8 + (lane & 7) + ((lane >> 4) << 3);
      simt::ldmatrix_x4(r, w + swizzled<128>(row, 2 * step + ((lane >> 3) & 1)));
      b[n][0] = r[0], b[n][1] = r[1], b[n + 1][0] = r[2], b[n + 1][1] = r[3];
    }
  } else {
#pragma unroll
    for (int n = 0; n < kN; n++) {
      const int row = (warp_n * kN + n) * 8 + g;
      constexpr bool kFour = kKind == WeightKind::int4;
      const int chunk = kFour ? step >> 1 : step;
      const uint32_t q = *reinterpret_cast<const uint32_t*>(w + swizzled<kRowBytes<kKind>>(row, chunk) + 4 * t);
      if constexpr (kFour)
        widen_int4(q, step & 1, b[n]);
      else
        widen_int8(q, b[n]);
    }
  }
}

// One stage: 64 k, into `sums`; for quantised weights each group's sums times scale(column, group in stage).
template <int kTileM, WeightKind kKind, class Scale>
__device__ inline void multiply(const unsigned char* stage, int warp_m, int warp_n, const Scale& scale,
                                Sums<kTileM>& sums) {
  constexpr int kM = Shape<kTileM>::kM, kN = Shape<kTileM>::kN;
  constexpr bool kScaled = kKind != WeightKind::bf16;
  constexpr int kSteps = kScaled ? kGroup<kKind> / 16 : kDepth / 16;
  const int lane = threadIdx.x & 31;
  const unsigned char* w = stage + kTileM * 128;
#pragma unroll
  for (int group = 0; group < kDepth / 16 / kSteps; group++) {
    Sums<kTileM> partial;
    if constexpr (kScaled) {
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int n = 0; n < kN; n++)
#pragma unroll
          for (int e = 0; e < 4; e++) partial.c[m][n][e] = 0.0f;
    }
    Sums<kTileM>& into = kScaled ? partial : sums;
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      const int step = group * kSteps + s;
      uint32_t a[kM][4], b[kN][2];
#pragma unroll
      for (int m = 0; m < kM; m++)
        simt::ldmatrix_x4(a[m], stage + swizzled<128>((warp_m * kM + m) * 16 + (lane & 15), 2 * step + (lane >> 4)));
      load_weights<kTileM, kKind>(w, warp_n, step, b);
#pragma unroll
      for (int m = 0; m < kM; m++)
#pragma unroll
        for (int n = 0; n < kN; n++) simt::mma_bf16(into.c[m][n], a[m], b[n]);
    }
    if constexpr (kScaled) {
#pragma unroll
      for (int n = 0; n < kN; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const float factor = scale((warp_n * kN + n) * 8 + 2 * (lane & 3) + e, group);
#pragma unroll
          for (int m = 0; m < kM; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) sums.c[m][n][2 * h + e] += partial.c[m][n][2 * h + e] * factor;
        }
    }
  }
}

}  // namespace pagelens::cuda::tile
