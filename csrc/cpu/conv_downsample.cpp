// SAM's neck and two halvings. Views go one by one: one has rows enough for every thread, and the scratch stays that of
// one. The norms read float32 sums; every stage but these is rounded to the activations' dtype.
#include "cpu/layer_norm.h"
#include "cpu/linear.h"
#include "cpu/parallel.h"

namespace pagelens::PAGELENS_ISA {
namespace {

template <class T>
void norm(ThreadPool& pool, const Rows& x, const float* weight, const float* bias, float eps, const Rows& out) {
  for_rows(pool, x.rows, x.cols, [&](int64_t row) {
    layer_norm_row(static_cast<const float*>(x.data) + row * x.stride, weight, bias,
                   static_cast<T*>(out.data) + row * out.stride, x.cols, eps);
  });
}

// 3 x 3, padded by 1, over an image of `rows.cols` channels.
Taps taps_3x3(const Rows& rows, int64_t side, int64_t stride) {
  return {rows.data, rows.dtype, false, side, side, rows.cols, 3, stride, 1};
}

template <class T>
void run(ThreadPool& pool, const ConvDownsampleArgs& a) {
  const PackedNeck& neck = a.neck;
  const DType dtype = a.x.dtype;
  const int64_t pixels = a.grid * a.grid, half = (a.grid + 1) / 2, quarter = (half + 1) / 2;
  const int64_t f = neck.conv1.n, f2 = neck.down1.n;
  const Rows sums{pool.shared<float>(0, pixels * f), pixels, f, f, DType::f32};
  const Rows y{pool.shared<T>(1, pixels * f), pixels, f, f, dtype};
  const Rows z{pool.shared<T>(2, half * half * f2), half * half, f2, f2, dtype};
  for (int64_t view = 0; view < a.batch; view++) {
    const Rows x{static_cast<T*>(a.x.data) + view * pixels * a.x.stride, pixels, a.x.cols, a.x.stride, dtype};
    const Rows out{static_cast<T*>(a.out.data) + view * quarter * quarter * a.out.stride, quarter * quarter, a.out.cols,
                   a.out.stride, dtype};
    linear(pool, {x, neck.conv1, Activation::none, {}, sums});
    norm<T>(pool, sums, neck.norm1_weight, neck.norm1_bias, a.eps, y);
    convolve(pool, taps_3x3(y, a.grid, 1), neck.conv2, sums);
    norm<T>(pool, sums, neck.norm2_weight, neck.norm2_bias, a.eps, y);
    convolve(pool, taps_3x3(y, a.grid, 2), neck.down1, z);
    convolve(pool, taps_3x3(z, half, 2), neck.down2, out);
  }
}

}  // namespace

void conv_downsample(ThreadPool& pool, const ConvDownsampleArgs& args) {
  args.x.dtype == DType::f32 ? run<float>(pool, args) : run<bf16>(pool, args);
}

}  // namespace pagelens::PAGELENS_ISA
