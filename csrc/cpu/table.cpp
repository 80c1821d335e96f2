#include "cpu/kernels.h"

namespace pagelens::PAGELENS_ISA {

const KernelTable& table() {
  static const KernelTable filled = {
      rms_norm,
      resize_rgb_u8,
  };
  return filled;
}

}  // namespace pagelens::PAGELENS_ISA
