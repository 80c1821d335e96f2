#include "cpu/kernels.h"

namespace pagelens::PAGELENS_ISA {

const KernelTable& table() {
  static const KernelTable filled = {
      embedding,       linear,      rms_norm,     layer_norm,    qk_norm_rope_store, paged_attention,
      swiglu_ffn,      moe_routing, grouped_gemm, moe_ffn,       window_attention,   patch_embed,
      conv_downsample, quantize,    sample,       resize_rgb_u8, probe_read,         probe_arithmetic,
  };
  return filled;
}

}  // namespace pagelens::PAGELENS_ISA
