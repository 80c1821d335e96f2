// grouped_gemm: the routed experts of a mixture, gate+up with SwiGLU, then down, then the weighted sum a token.
//
// Three launches. Blocks are persistent: block b takes tiles b, b + grid, ... of all experts' tiles (64 or 16 rows by
// 128 columns, an expert's rows being those of `permutation` between its offsets), so that one grid serves a single
// token and a full prompt, and no expert needs its own launch. Rows 2 i and 2 i + 1 of gate_up are gate and up: both
// sums of a hidden value are in one lane, SwiGLU is done in registers and rounded to bf16 once. The down tiles multiply
// by the routing weight and write each (token, j) pair's own row of `parts`; the third launch adds a token's rows in
// the order j = 0 .. top_k-1. No atomics: a row's bits do not depend on timing or on its neighbours.
//
// Tiles of 16 rows serve up to 16 rows an expert on average (decode), 64 above. Tile and weight formats: gemm_tile.h.
//
// Bytes: 6 width inner for each expert that is hit (bf16; 3 int8, 1.7 int4), activations little. FLOPs: 6 tokens top_k
// width inner. 30B-A3B (2048, 768, 8 of 128): one token 75 MB in bf16, floor on an A100 40 us, memory; 512 tokens hit
// all experts: 1.2 GB and 39 GFLOP, 0.64 ms memory, 0.12 ms compute.
#include <stdexcept>

#include "cuda/gemm_tile.h"

namespace pagelens::cuda {
namespace {

using namespace tile;

struct Work {
  int expert, first, rows, column;  // first: the tile's first row in the permuted order
};

// Tile `index` of all experts; false past the last. Tiles of one expert follow each other, its columns last, so that
// neighbours in the grid share rows of W in L2.
template <int kTileM>
__device__ inline bool find_work(const int32_t* offsets, int experts, int columns, int64_t index, Work& work) {
  const int across = (columns + kTileN - 1) / kTileN;
  for (int e = 0; e < experts; e++) {
    const int rows = offsets[e + 1] - offsets[e], down = (rows + kTileM - 1) / kTileM;
    const int64_t tiles = static_cast<int64_t>(down) * across;
    if (index < tiles) {
      const int row = static_cast<int>(index % down) * kTileM;
      work = {e, offsets[e] + row, rows - row, static_cast<int>(index / down) * kTileN};
      return true;
    }
    index -= tiles;
  }
  return false;
}

template <int kTileM, WeightKind kKind>
struct Operand {
  const unsigned char* w;  // of the expert and the tile's first column
  const float* scales;     // [columns, groups]
  int columns_left, groups;
};

template <int kTileM, WeightKind kKind>
__device__ inline Operand<kTileM, kKind> operand(const void* weights, const float* scales, const Work& work,
                                                 int columns, int k) {
  const int64_t row = static_cast<int64_t>(work.expert) * columns + work.column;
  const int blocks = (k + kDepth - 1) / kDepth;
  const int64_t stride = kKind == WeightKind::bf16 ? int64_t{2} * k : int64_t{blocks} * kRowBytes<kKind>;
  const int groups = blocks * (kDepth / kGroup<kKind>);
  const float* first_scale = kKind == WeightKind::bf16 ? nullptr : scales + row * groups;
  return {static_cast<const unsigned char*>(weights) + row * stride, first_scale, columns - work.column, groups};
}

// The tile's sums over k.
template <int kTileM, WeightKind kKind, class Row>
__device__ inline void product(const Operand<kTileM, kKind>& w, int k, const Row& a_row, Sums<kTileM>& sums) {
  unsigned char* shared = simt::shared_memory();
  const int warp = threadIdx.x >> 5, warp_m = warp / Shape<kTileM>::kWarpsN, warp_n = warp % Shape<kTileM>::kWarpsN;
  const int64_t stride =
      kKind == WeightKind::bf16 ? int64_t{2} * k : int64_t{(k + kDepth - 1) / kDepth} * kRowBytes<kKind>;
  Loader<kTileM, kKind> loader;
  loader.begin(Source{w.w, stride, w.columns_left, k}, a_row);
#pragma unroll
  for (int m = 0; m < Shape<kTileM>::kM; m++)
#pragma unroll
    for (int n = 0; n < Shape<kTileM>::kN; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums.c[m][n][e] = 0.0f;
  loader.load(shared, 0);
  for (int k0 = 0, stage = 0; k0 < k; k0 += kDepth, stage ^= 1) {
    if (k0 + kDepth < k) {
      loader.load(shared + (stage ^ 1) * kStageBytes<kTileM, kKind>, k0 + kDepth);
      simt::cp_async_wait<1>();
    } else {
      simt::cp_async_wait<0>();
    }
    __syncthreads();
    const auto scale = [&](int column, int group) {
      return column < w.columns_left ? w.scales[static_cast<int64_t>(column) * w.groups + k0 / kGroup<kKind> + group]
                                     : 0.0f;
    };
    multiply<kTileM, kKind>(shared + stage * kStageBytes<kTileM, kKind>, warp_m, warp_n, scale, sums);
    __syncthreads();  // before the next loads overwrite the stage
  }
}

// visit(row in tile, column in tile, sum of the even column, sum of the odd one) for this thread's outputs.
template <int kTileM, class Visit>
__device__ inline void for_pairs(const Sums<kTileM>& sums, const Visit& visit) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int warp_m = warp / Shape<kTileM>::kWarpsN, warp_n = warp % Shape<kTileM>::kWarpsN;
#pragma unroll
  for (int m = 0; m < Shape<kTileM>::kM; m++)
#pragma unroll
    for (int n = 0; n < Shape<kTileM>::kN; n++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        visit((warp_m * Shape<kTileM>::kM + m) * 16 + (lane >> 2) + 8 * h,
              (warp_n * Shape<kTileM>::kN + n) * 8 + 2 * (lane & 3), sums.c[m][n][2 * h], sums.c[m][n][2 * h + 1]);
}

__device__ inline float swiglu(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

template <int kTileM, WeightKind kKind>
__global__ void __launch_bounds__(kThreads) gate_up(const GroupedGemmArgs a) {
  Work work;
  for (int64_t i = blockIdx.x; find_work<kTileM>(a.offsets, a.experts, 2 * a.inner, i, work); i += gridDim.x) {
    const auto row = [&](int r) -> const bf16* {
      if (r >= work.rows) return nullptr;
      return a.x + static_cast<int64_t>(a.permutation[work.first + r] / a.top_k) * a.width;
    };
    Sums<kTileM> sums;
    product<kTileM, kKind>(operand<kTileM, kKind>(a.gate_up, a.gate_up_scales, work, 2 * a.inner, a.width), a.width,
                           row, sums);
    for_pairs<kTileM>(sums, [&](int r, int column, float gate, float up) {
      const int i = (work.column + column) / 2;
      if (r < work.rows && i < a.inner)
        a.hidden[static_cast<int64_t>(work.first + r) * a.inner + i] = simt::to_bf16(swiglu(gate, up));
    });
  }
}

template <int kTileM, WeightKind kKind>
__global__ void __launch_bounds__(kThreads) down(const GroupedGemmArgs a) {
  Work work;
  for (int64_t i = blockIdx.x; find_work<kTileM>(a.offsets, a.experts, a.width, i, work); i += gridDim.x) {
    const auto row = [&](int r) -> const bf16* {
      return r < work.rows ? a.hidden + static_cast<int64_t>(work.first + r) * a.inner : nullptr;
    };
    Sums<kTileM> sums;
    product<kTileM, kKind>(operand<kTileM, kKind>(a.down, a.down_scales, work, a.width, a.inner), a.inner, row, sums);
    for_pairs<kTileM>(sums, [&](int r, int column, float even, float odd) {
      const int c = work.column + column;
      if (r >= work.rows || c >= a.width) return;
      const int flat = a.permutation[work.first + r];
      float* to = a.parts + static_cast<int64_t>(flat) * a.width + c;
      to[0] = a.weights[flat] * even;
      if (c + 1 < a.width) to[1] = a.weights[flat] * odd;
    });
  }
}

__global__ void __launch_bounds__(256) add_parts(const GroupedGemmArgs a) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i >= static_cast<int64_t>(a.tokens) * a.width) return;
  const int64_t token = i / a.width, column = i % a.width;
  float sum = 0.0f;
  for (int j = 0; j < a.top_k; j++) sum += a.parts[(token * a.top_k + j) * a.width + column];
  a.y[i] = sum;
}

template <int kTileM, WeightKind kKind>
void run(const GroupedGemmArgs& a, Stream stream) {
  const size_t shared = size_t{kStages} * kStageBytes<kTileM, kKind>;
  const unsigned blocks = static_cast<unsigned>(2 * simt::multiprocessors());
  simt::launch(gate_up<kTileM, kKind>, dim3(blocks), dim3(kThreads), shared, stream, a);
  simt::launch(down<kTileM, kKind>, dim3(blocks), dim3(kThreads), shared, stream, a);
  const unsigned sums = static_cast<unsigned>(ceil_div(static_cast<int64_t>(a.tokens) * a.width, 256));
  simt::launch(add_parts, dim3(sums), dim3(256), 0, stream, a);
}

template <WeightKind kKind>
void run_kind(const GroupedGemmArgs& a, Stream stream) {
  if (static_cast<int64_t>(a.tokens) * a.top_k <= int64_t{16} * a.experts)
    run<16, kKind>(a, stream);
  else
    run<64, kKind>(a, stream);
}

}  // namespace

void grouped_gemm(const GroupedGemmArgs& a, Stream stream) {
  if (a.width % 8 || a.inner % 8) throw std::invalid_argument("grouped_gemm takes widths that are multiples of 8");
  if (!a.tokens) return;
  switch (a.kind) {
    case WeightKind::bf16:
      return run_kind<WeightKind::bf16>(a, stream);
    case WeightKind::int8:
      return run_kind<WeightKind::int8>(a, stream);
    case WeightKind::int4:
      return run_kind<WeightKind::int4>(a, stream);
  }
}

}  // namespace pagelens::cuda
