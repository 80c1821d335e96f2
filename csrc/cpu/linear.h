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

template <class Out, class Res>
inline void finish_rows(const LinearArgs& a, int64_t row, int count, int64_t panel, const float* sums) {
  const int64_t column = panel * kPanel;
  const int n = static_cast<int>(a.weight.n - column < kPanel ? a.weight.n - column : kPanel);
  const float* bias = a.weight.bias ? a.weight.bias + column : nullptr;
  Out* out = static_cast<Out*>(a.out.data) + row * a.out.stride + column;
  const Res* residual =
      a.residual.data ? static_cast<const Res*>(a.residual.data) + row * a.residual.stride + column : nullptr;
  for (int r = 0; r < count; r++, sums += kPanel, out += a.out.stride) {
    finish_columns(sums, bias, a.activation, residual, out, n);
    if (residual) residual += a.residual.stride;
  }
}

// Rows row..row+count of one panel into `out`, whose row r is out row r. Residual and out may be the same matrix.
inline void finish_linear(const LinearArgs& a, int64_t row, int count, int64_t panel, const float* sums) {
  if (a.out.dtype != DType::f32) {
    finish_rows<bf16, bf16>(a, row, count, panel, sums);
  } else if (a.x.dtype == DType::f32) {
    finish_rows<float, float>(a, row, count, panel, sums);
  } else {
    finish_rows<float, bf16>(a, row, count, panel, sums);
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
