// conv_downsample: SAM's neck and the two stride-2 convolutions, each an implicit GEMM: row = output pixel, k = (tap,
// channel). cp.async fetches 16 bytes of the pixel that a tap reads, zeros outside the map, so there is no im2col
// buffer.
//
// Six launches: conv 1x1, LayerNorm, conv 3x3, LayerNorm, conv 3x3 / 2, conv 3x3 / 2. The tile is that of grouped_gemm
// (64 pixels x 128 channels, 64 k deep).
//
// Why the stride-2 convolutions are two kernels: the second reads 3 x 3 of the first's pixels, all 512 channels. A
// block of 8 x 8 results needs 17 x 17 of them, 289 x 512 x 2 bytes = 296 KB, more than an SM has (163 KB on sm_80, 227
// KB on sm_90); 4 x 4 results need 9 x 9 = 83 KB, but then 81 / 64 of the first convolution is done twice at the
// borders and only 16 rows of mma share each of the 9.4 MB of weights of the second. Written out, the map is 1 MB (32 x
// 32 x 512) and stays in L2: 2 MB of L2 traffic against 4.8 GFLOP, 0.5 us against 15 us. Likewise LayerNorm's row (256
// float32) would need two tiles of 128 columns in one block; its launch reads and writes 6 MB from L2, some 2 us.
//
// Bytes for a 64 x 64 x 768 map: 6.3 MB in, 1.2 + 1.2 + 2.4 + 9.4 MB of weights, 0.5 MB out. FLOPs: 1.6 + 4.8 + 2.4
// + 2.4 = 11.3 GFLOP; floor on an A100 36 us, compute (21 MB: 11 us).
#include <stdexcept>

#include "cuda/gemm_tile.h"

namespace pagelens::cuda {
namespace {

using namespace tile;

struct Conv {
  const bf16 *x, *weight;  // [views, side, side, channels]; [filters, taps * channels], k = tap * channels + channel
  int views, side, channels, filters, taps, stride, out_side;
};

// The loads of one thread: 4 pixels, one chunk of each, and its rows of the weights.
struct ConvLoader {
  static constexpr int kPixels = 64 * 8 / kThreads, kWeights = kTileN * 8 / kThreads;
  const bf16* view[kPixels];  // null past the last pixel
  int y[kPixels], x[kPixels];
  int first, chunk;

  __device__ void begin(const Conv& c, int pixel0, int pixels) {
    first = threadIdx.x >> 3;
    chunk = threadIdx.x & 7;
    const int per_view = c.out_side * c.out_side;
#pragma unroll
    for (int i = 0; i < kPixels; i++) {
      const int p = pixel0 + first + 16 * i, in_view = p % per_view;
      view[i] = p < pixels ? c.x + static_cast<int64_t>(p / per_view) * c.side * c.side * c.channels : nullptr;
      y[i] = in_view / c.out_side * c.stride;
      x[i] = in_view % c.out_side * c.stride;
    }
  }

  __device__ void load(const Conv& c, int filter0, unsigned char* stage, int k0) const {
    const int depth = c.taps * c.channels, k = k0 + chunk * 8, tap = k / c.channels, channel = k - tap * c.channels;
    const int dy = c.taps == 9 ? tap / 3 - 1 : 0, dx = c.taps == 9 ? tap % 3 - 1 : 0;
#pragma unroll
    for (int i = 0; i < kPixels; i++) {
      const int yy = y[i] + dy, xx = x[i] + dx;
      const bool valid = k < depth && view[i] && yy >= 0 && yy < c.side && xx >= 0 && xx < c.side;
      const bf16* from = valid ? view[i] + (static_cast<int64_t>(yy) * c.side + xx) * c.channels + channel : c.x;
      simt::cp_async16(stage + swizzled<128>(first, chunk) + i * 16 * 128, from, valid);
    }
    unsigned char* to = stage + 64 * 128 + swizzled<128>(first, chunk);
#pragma unroll
    for (int i = 0; i < kWeights; i++) {
      const int filter = filter0 + first + 16 * i;
      const bool valid = k < depth && filter < c.filters;
      simt::cp_async16(to + i * 16 * 128, valid ? c.weight + static_cast<int64_t>(filter) * depth + k : c.weight,
                       valid);
    }
    simt::cp_async_commit();
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) conv(const Conv c, T* out) {
  const int pixels = c.views * c.out_side * c.out_side, depth = c.taps * c.channels;
  const int pixel0 = blockIdx.x * 64, filter0 = blockIdx.y * kTileN;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  constexpr int kBytes = kStageBytes<64, WeightKind::bf16>;
  unsigned char* shared = simt::shared_memory();
  ConvLoader loader;
  loader.begin(c, pixel0, pixels);
  Sums<64> sums;
#pragma unroll
  for (int m = 0; m < Shape<64>::kM; m++)
#pragma unroll
    for (int n = 0; n < Shape<64>::kN; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums.c[m][n][e] = 0.0f;
  const auto no_scale = [](int, int) { return 1.0f; };
  loader.load(c, filter0, shared, 0);
  for (int k0 = 0, stage = 0; k0 < depth; k0 += kDepth, stage ^= 1) {
    if (k0 + kDepth < depth) {
      loader.load(c, filter0, shared + (stage ^ 1) * kBytes, k0 + kDepth);
      simt::cp_async_wait<1>();
    } else {
      simt::cp_async_wait<0>();
    }
    __syncthreads();
    multiply<64, WeightKind::bf16>(shared + stage * kBytes, warp / 2, warp % 2, no_scale, sums);
    __syncthreads();  // before the next loads overwrite the stage
  }
#pragma unroll
  for (int m = 0; m < Shape<64>::kM; m++)
#pragma unroll
    for (int n = 0; n < Shape<64>::kN; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int pixel = pixel0 + (warp / 2 * Shape<64>::kM + m) * 16 + (lane >> 2) + 8 * (e >> 1);
        const int filter = filter0 + (warp % 2 * Shape<64>::kN + n) * 8 + 2 * (lane & 3) + (e & 1);
        if (pixel < pixels && filter < c.filters)
          simt::put(out + static_cast<int64_t>(pixel) * c.filters + filter, sums.c[m][n][e]);
      }
}

// LayerNorm of float32 rows, a warp each: mean, then the mean of squares about it, both as trees of shuffles.
__global__ void __launch_bounds__(kThreads)
    layer_norm(const float* x, const bf16* weight, const bf16* bias, float eps, int rows, int width, bf16* out) {
  const int row = blockIdx.x * (kThreads / 32) + static_cast<int>(threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= rows) return;
  x += static_cast<int64_t>(row) * width;
  float sum = 0.0f, squares = 0.0f;
  for (int i = lane; i < width; i += 32) sum += x[i];
#pragma unroll
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  const float mean = sum / static_cast<float>(width);
  for (int i = lane; i < width; i += 32) squares += (x[i] - mean) * (x[i] - mean);
#pragma unroll
  for (int d = 16; d; d >>= 1) squares += __shfl_xor_sync(~0u, squares, d);
  const float inverse = 1.0f / sqrtf(squares / static_cast<float>(width) + eps);
  for (int i = lane; i < width; i += 32)
    out[static_cast<int64_t>(row) * width + i] =
        simt::to_bf16((x[i] - mean) * inverse * simt::to_float(weight[i]) + simt::to_float(bias[i]));
}

template <class T>
void run(const Conv& c, T* out, Stream stream) {
  const int64_t pixels = static_cast<int64_t>(c.views) * c.out_side * c.out_side;
  const dim3 grid(static_cast<unsigned>(ceil_div(pixels, 64)), static_cast<unsigned>(ceil_div(c.filters, kTileN)));
  simt::launch(conv<T>, grid, dim3(kThreads), size_t{kStages} * kStageBytes<64, WeightKind::bf16>, stream, c, out);
}

}  // namespace

void conv_downsample(const ConvDownsampleArgs& a, Stream stream) {
  if (a.width % 8 || a.neck % 8 || a.down1 % 8)
    throw std::invalid_argument("conv_downsample takes channels that are multiples of 8");
  if (!a.views) return;
  const int half = (a.side + 1) / 2, quarter = (half + 1) / 2, rows = a.views * a.side * a.side;
  const auto norm = [&](const bf16* weight, const bf16* bias) {
    simt::launch(layer_norm, dim3(static_cast<unsigned>(ceil_div(rows, kThreads / 32))), dim3(kThreads), 0, stream,
                 a.sums, weight, bias, a.eps, rows, a.neck, a.map);
  };
  run(Conv{a.x, a.conv1_weight, a.views, a.side, a.width, a.neck, 1, 1, a.side}, a.sums, stream);
  norm(a.norm1_weight, a.norm1_bias);
  run(Conv{a.map, a.conv2_weight, a.views, a.side, a.neck, a.neck, 9, 1, a.side}, a.sums, stream);
  norm(a.norm2_weight, a.norm2_bias);
  run(Conv{a.map, a.down1_weight, a.views, a.side, a.neck, a.down1, 9, 2, half}, a.half_map, stream);
  run(Conv{a.half_map, a.down2_weight, a.views, half, a.down1, a.down2, 9, 2, quarter}, a.out, stream);
}

}  // namespace pagelens::cuda
