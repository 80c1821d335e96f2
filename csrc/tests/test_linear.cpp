// linear: every format of a weight, one to many rows, epilogues, strides; against products in double precision.
#include "tests/weights.h"

using namespace pagelens;
using namespace pagelens::tests;

namespace {

double activate(double x, Activation kind) {
  if (kind == Activation::gelu) return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
  if (kind == Activation::quick_gelu) return x / (1.0 + std::exp(-1.702 * x));
  if (kind == Activation::silu) return x / (1.0 + std::exp(-x));
  return x;
}

struct Case {
  int64_t rows, n, k;
  bool bias = false, residual = false;
  Activation activation = Activation::none;
  DType out = DType::bf16;
  int64_t gap = 0;
};

constexpr Case kCases[] = {
    {1, 1, 1},
    {0, 40, 24},
    {3, 0, 16},
    {2, 33, 0, true},
    {1, 64, 128},
    {1, 70, 333, true, true, Activation::silu},
    {2, 31, 7, true, false, Activation::gelu, DType::f32, 3},
    {3, 96, 40, false, true, Activation::quick_gelu, DType::bf16, 5},
    {4, 130, 264, true, true, Activation::none, DType::f32, 1},
    {5, 257, 96, false, false, Activation::none, DType::f32},
    {7, 64, 72, true},
    {8, 64, 512, false, true},
    {13, 40, 200, true, true, Activation::none, DType::bf16, 7},
    {14, 96, 65, false, false, Activation::gelu},
    {15, 33, 160, true},
    {29, 100, 129, true, true, Activation::silu, DType::f32, 9},
    {47, 288, 448, false, true},
    {175, 70, 136, true, false, Activation::none, DType::f32},
    {200, 290, 850, true, true, Activation::quick_gelu, DType::bf16, 2},
    {1, 2200, 264, false, false, Activation::none, DType::f32},
};

void check(const Case& c, const Recipe& recipe, DType dtype) {
  Random random(static_cast<uint64_t>(c.rows * 1000003 + c.n * 1009 + c.k));
  const TestLinear weight = make_linear(random, recipe, c.n, c.k, dtype, c.bias);
  const DType out_dtype = dtype == DType::f32 ? DType::f32 : c.out;
  const Matrix x = Matrix::random(random, c.rows, c.k, dtype, c.gap);
  const Matrix residual = Matrix::random(random, c.rows, c.n, dtype, c.gap);
  Expected expected;
  double size = 0.1;
  for (int64_t r = 0; r < c.rows; r++) {
    std::vector<double> sums;
    weight.multiply(row_of(x, r), &sums, &size);
    for (int64_t n = 0; n < c.n; n++)
      expected.push_back(activate(sums[n], c.activation) + (c.residual ? residual.at(r, n) : 0.0));
  }
  const std::string what = std::string("linear ") + recipe.name + " " + name_of(dtype) + " " + std::to_string(c.rows) +
                           " x " + std::to_string(c.n) + " x " + std::to_string(c.k);
  // A rounded input may fall on the other side of a tie than here: a step of the grid times a weight.
  const bool rounds = weight.packed.activation != ActivationFormat::plain;
  const double absolute = 2e-5 * size + (rounds && c.k ? 2.0 / 127 / std::sqrt(static_cast<double>(c.k)) : 0.0);
  check_kernel(
      what, [&] { return Matrix(c.rows, c.n, out_dtype, c.gap); }, expected, absolute,
      [&](ThreadPool& pool, Matrix& out) {
        LinearArgs args{};
        args.x = x.view();
        args.weight = weight.packed;
        args.activation = c.activation;
        if (c.residual) args.residual = residual.view();
        args.out = out.view();
        kernels().linear(pool, args);
      });
}

// `out` may be `residual`.
void check_in_place() {
  Random random(7);
  const TestLinear weight = make_linear(random, recipes()[0], 50, 30, DType::bf16, false);
  const Matrix x = Matrix::random(random, 6, 30, DType::bf16);
  Expected expected;
  for (int64_t r = 0; r < 6; r++) {
    std::vector<double> sums;
    weight.multiply(row_of(x, r), &sums);
    for (const double sum : sums) expected.push_back(sum + 0.5);
  }
  check_kernel(
      "linear in place", [] { return Matrix::full(6, 50, DType::bf16, 0.5, 3); }, expected, 1e-4,
      [&](ThreadPool& pool, Matrix& out) {
        LinearArgs args{};
        args.x = x.view();
        args.weight = weight.packed;
        args.residual = args.out = out.view();
        kernels().linear(pool, args);
      });
}

}  // namespace

int main(int argc, char** argv) {
  choose_isas(argc, argv);
  for (const Recipe& recipe : recipes())
    for (const DType dtype : {DType::f32, DType::bf16})
      for (const Case& c : kCases) check(c, recipe, dtype);
  check_in_place();
  return finish("linear");
}
