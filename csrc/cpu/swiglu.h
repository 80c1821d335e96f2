// The epilogue of gate/up: a panel of 16 gate and the same 16 up columns becomes 16 columns of silu(gate) * up.
#pragma once
#include "cpu/activation.h"
#include "cpu/gemm.h"

namespace pagelens::PAGELENS_ISA {

// Columns of the product's scratch: whole vectors are stored, and the padding is silu(0) * 0 = 0.
PAGELENS_INLINE int64_t product_stride(const PackedSwiglu& ffn) { return ffn.gate_up.panels() * 16; }

template <class T>
PAGELENS_INLINE void finish_product(const float* sums, T* out) {
  for (int v = 0; v < 16; v += W) store(out + v, silu(load(sums + v)) * load(sums + 16 + v));
}

// Rows row..row+count of one panel, rounded to `dtype`, into product[row][stride].
inline void finish_gate_up(void* product, DType dtype, int64_t stride, int64_t row, int count, int64_t panel,
                           const float* sums) {
  for (int r = 0; r < count; r++, sums += kPanel) {
    const int64_t to = (row + r) * stride + panel * 16;
    if (dtype == DType::f32) {
      finish_product(sums, static_cast<float*>(product) + to);
    } else {
      finish_product(sums, static_cast<bf16*>(product) + to);
    }
  }
}

}  // namespace pagelens::PAGELENS_ISA
