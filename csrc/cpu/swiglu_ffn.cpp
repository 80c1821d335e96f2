#include "cpu/linear.h"
#include "cpu/swiglu.h"

namespace pagelens::PAGELENS_ISA {

void swiglu_ffn(ThreadPool& pool, const SwigluArgs& args) {
  const PackedSwiglu& ffn = args.ffn;
  const int64_t stride = product_stride(ffn);
  // float is room enough for both dtypes
  void* product = pool.shared<float>(0, args.x.rows * stride);
  const Problem up{{args.x.data, args.x.stride, args.x.dtype, nullptr, 1}, ffn.gate_up, args.x.rows};
  const Cut c = cut(up);
  gemm(
      pool, &up, 1, c.count(), [&](int64_t i) { return block_at(up, c, 0, i); },
      [&](const Block&, int64_t row, int count, int64_t panel, const float* sums) {
        finish_gate_up(product, args.x.dtype, stride, row, count, panel, sums);
      });
  const Rows h{product, args.x.rows, ffn.inner, stride, args.x.dtype};
  linear(pool, {h, ffn.down, Activation::none, args.residual, args.out});
}

}  // namespace pagelens::PAGELENS_ISA
