// patch_embed and conv_downsample, against double precision.
#include "tests/weights.h"

using namespace pagelens;
using namespace pagelens::tests;

namespace {

void check_patches(DType dtype, int64_t batch, int64_t channels, int64_t side, int64_t patch, int64_t n) {
  Random random(static_cast<uint64_t>(side * 10 + n));
  const int64_t grid = side / patch, k = channels * patch * patch;
  const TestLinear weight = make_linear(random, {"patches"}, n, k, dtype, true);
  const Matrix pixels = Matrix::random(random, batch * channels * side, side, dtype);
  Expected expected;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t y = 0; y < grid; y++)
      for (int64_t x = 0; x < grid; x++) {
        std::vector<double> row, sums;
        for (int64_t c = 0; c < channels; c++)
          for (int64_t i = 0; i < patch * patch; i++)
            row.push_back(pixels.at((b * channels + c) * side + y * patch + i / patch, x * patch + i % patch));
        weight.multiply(row, &sums);
        expected.insert(expected.end(), sums.begin(), sums.end());
      }
  check_kernel(
      std::string("patch_embed ") + name_of(dtype) + " " + std::to_string(side),
      [&] { return Matrix(batch * grid * grid, n, dtype); }, expected, 2e-5,
      [&](ThreadPool& pool, Matrix& out) {
        PatchEmbedArgs args{};
        args.pixels = pixels.data();
        args.batch = batch, args.channels = channels, args.height = args.width = side, args.patch = patch;
        args.weight = weight.packed;
        args.out = out.view();
        kernels().patch_embed(pool, args);
      });
}

// Channels last, 3 x 3, padded by 1.
Matrix convolve(const Matrix& x, int64_t side, int64_t stride, const TestLinear& weight, DType dtype) {
  const int64_t out_side = (side - 1) / stride + 1, channels = x.cols();
  Matrix out(out_side * out_side, weight.packed.n, dtype);
  for (int64_t y = 0; y < out_side; y++)
    for (int64_t z = 0; z < out_side; z++) {
      std::vector<double> row, sums;
      for (int64_t i = 0; i < 9; i++) {
        const int64_t from_y = y * stride + i / 3 - 1, from_z = z * stride + i % 3 - 1;
        const bool inside = from_y >= 0 && from_y < side && from_z >= 0 && from_z < side;
        for (int64_t c = 0; c < channels; c++) row.push_back(inside ? x.at(from_y * side + from_z, c) : 0.0);
      }
      weight.multiply(row, &sums);
      for (int64_t c = 0; c < weight.packed.n; c++) out.set(y * out_side + z, c, sums[c]);
    }
  return out;
}

Matrix norm(const Matrix& x, const Matrix& weight, const Matrix& bias, double eps, DType dtype) {
  Matrix out(x.rows(), x.cols(), dtype);
  for (int64_t r = 0; r < x.rows(); r++) {
    double mean = 0.0, variance = 0.0;
    for (int64_t c = 0; c < x.cols(); c++) mean += x.at(r, c) / x.cols();
    for (int64_t c = 0; c < x.cols(); c++) variance += std::pow(x.at(r, c) - mean, 2.0) / x.cols();
    for (int64_t c = 0; c < x.cols(); c++)
      out.set(r, c, (x.at(r, c) - mean) / std::sqrt(variance + eps) * weight.at(0, c) + bias.at(0, c));
  }
  return out;
}

void check_neck(DType dtype, int64_t batch, int64_t grid, int64_t channels, int64_t f, int64_t f2, int64_t f3,
                int64_t gap) {
  Random random(static_cast<uint64_t>(grid * 10 + channels));
  const TestLinear conv1 = make_linear(random, {"conv1"}, f, channels, dtype, false);
  const TestLinear conv2 = make_linear(random, {"conv2"}, f, 9 * f, dtype, false);
  const TestLinear down1 = make_linear(random, {"down1"}, f2, 9 * f, dtype, false);
  const TestLinear down2 = make_linear(random, {"down2"}, f3, 9 * f2, dtype, false);
  const Matrix w1 = Matrix::random(random, 1, f, DType::f32), b1 = Matrix::random(random, 1, f, DType::f32);
  const Matrix w2 = Matrix::random(random, 1, f, DType::f32), b2 = Matrix::random(random, 1, f, DType::f32);
  const Matrix x = Matrix::random(random, batch * grid * grid, channels, dtype, gap);
  const int64_t half = (grid + 1) / 2, quarter = (half + 1) / 2;
  Expected expected;
  for (int64_t view = 0; view < batch; view++) {
    Matrix first(grid * grid, f, DType::f32);
    for (int64_t r = 0; r < grid * grid; r++) {
      std::vector<double> sums;
      conv1.multiply(row_of(x, view * grid * grid + r), &sums);
      for (int64_t c = 0; c < f; c++) first.set(r, c, sums[c]);
    }
    const Matrix normed = norm(first, w1, b1, 1e-6, dtype);
    const Matrix again = norm(convolve(normed, grid, 1, conv2, DType::f32), w2, b2, 1e-6, dtype);
    const Matrix out = convolve(convolve(again, grid, 2, down1, dtype), half, 2, down2, DType::f32);
    for (int64_t r = 0; r < quarter * quarter; r++)
      for (int64_t c = 0; c < f3; c++) expected.push_back(out.at(r, c));
  }
  check_kernel(
      std::string("conv_downsample ") + name_of(dtype) + " " + std::to_string(grid),
      [&] { return Matrix(batch * quarter * quarter, f3, dtype, gap); }, expected, dtype == DType::f32 ? 1e-4 : 2e-2,
      [&](ThreadPool& pool, Matrix& out) {
        ConvDownsampleArgs args{};
        args.x = x.view(), args.out = out.view();
        args.batch = batch, args.grid = grid, args.eps = 1e-6f;
        args.neck.conv1 = conv1.packed, args.neck.conv2 = conv2.packed;
        args.neck.down1 = down1.packed, args.neck.down2 = down2.packed;
        args.neck.norm1_weight = static_cast<float*>(w1.data()), args.neck.norm1_bias = static_cast<float*>(b1.data());
        args.neck.norm2_weight = static_cast<float*>(w2.data()), args.neck.norm2_bias = static_cast<float*>(b2.data());
        kernels().conv_downsample(pool, args);
      });
}

}  // namespace

int main(int argc, char** argv) {
  choose_isas(argc, argv);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    check_patches(dtype, 0, 3, 8, 4, 5);
    check_patches(dtype, 1, 1, 3, 3, 1);
    check_patches(dtype, 2, 3, 20, 4, 33);
    check_patches(dtype, 1, 3, 64, 16, 96);
    check_patches(dtype, 1, 3, 42, 14, 70);
    check_neck(dtype, 0, 4, 8, 8, 8, 8, 0);
    check_neck(dtype, 1, 1, 3, 2, 1, 5, 0);
    check_neck(dtype, 2, 5, 12, 9, 7, 33, 0);
    check_neck(dtype, 1, 8, 32, 16, 24, 40, 3);
    check_neck(dtype, 1, 14, 24, 33, 20, 36, 0);
  }
  return finish("convolutions");
}
