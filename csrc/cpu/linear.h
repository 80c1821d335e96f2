// The epilogue of a linear layer: bias, activation, residual, one rounding.
#pragma once
#include "cpu/activation.h"
#include "cpu/gemm.h"

namespace pagelens::PAGELENS_ISA {

// n <= 32 columns; where n < 32 the row ends inside the panel, and whole vectors would run over its end.
template <class Out, class Res>
PAGELENS_INLINE void finish_columns(const float* sums, const float* bias, Activation activation, const Res* residual,
                                    Out* out, int n) {
  Res tail_residual[kPanel];
  Out tail_out[kPanel];
  const bool whole = n == kPanel;
  if (!whole && residual) {
    std::memset(tail_residual, 0, sizeof tail_residual);
    std::memcpy(tail_residual, residual, n * sizeof(Res));
    residual = tail_residual;
  }
  Out* to = whole ? out : tail_out;
  for (int v = 0; v < kPanel; v += W) {
    vf y = load(sums + v);
    if (bias) y = y + load(bias + v);
    y = activate<Out>(y, activation);
    if (residual) y = y + load(residual + v);
    store(to + v, y);
  }
  if (!whole) std::memcpy(out, tail_out, n * sizeof(Out));
}

// Rows row..row+count of one panel into `out`, whose row r is out row r. Residual and out may be the same matrix.
inline void finish_linear(const LinearArgs& a, int64_t row, int count, int64_t panel, const float* sums) {
  const int64_t column = panel * kPanel;
  const int n = static_cast<int>(a.weight.n - column < kPanel ? a.weight.n - column : kPanel);
  const float* bias = a.weight.bias ? a.weight.bias + column : nullptr;
  for (int r = 0; r < count; r++, sums += kPanel) {
    const int64_t to = (row + r) * a.out.stride + column, from = (row + r) * a.residual.stride + column;
    float* out32 = static_cast<float*>(a.out.data) + to;
    bf16* out16 = static_cast<bf16*>(a.out.data) + to;
    const float* res32 = a.residual.data ? static_cast<const float*>(a.residual.data) + from : nullptr;
    const bf16* res16 = a.residual.data ? static_cast<const bf16*>(a.residual.data) + from : nullptr;
    if (a.out.dtype == DType::f32) {
      a.x.dtype == DType::f32 ? finish_columns(sums, bias, a.activation, res32, out32, n)
                              : finish_columns(sums, bias, a.activation, res16, out32, n);
    } else {
      finish_columns(sums, bias, a.activation, res16, out16, n);
    }
  }
}

// The layer on rows from `source`; of args.x only the number of rows and the dtype count.
inline void linear_of(ThreadPool& pool, const Source& source, const LinearArgs& args) {
  const Problem problem{source, args.weight, args.x.rows};
  const Cut c = cut(problem);
  gemm(
      pool, &problem, 1, c.count(), [&](int64_t i) { return block_at(problem, c, 0, i); },
      [&](const Block&, int64_t row, int count, int64_t panel, const float* sums) {
        finish_linear(args, row, count, panel, sums);
      });
}

// The same on the rows that `taps` gathers, without activation or residual.
inline void convolve(ThreadPool& pool, const Taps& taps, const PackedLinear& weight, const Rows& out) {
  Source source;
  source.dtype = taps.dtype;
  source.taps = &taps;
  linear_of(pool, source, {{nullptr, out.rows, weight.k, 0, taps.dtype}, weight, Activation::none, {}, out});
}

}  // namespace pagelens::PAGELENS_ISA
