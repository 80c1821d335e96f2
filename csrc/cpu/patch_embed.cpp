#include "cpu/linear.h"

namespace pagelens::PAGELENS_ISA {

void patch_embed(ThreadPool& pool, const PatchEmbedArgs& a) {
  convolve(pool, {a.pixels, a.weight.dtype, true, a.height, a.width, a.channels, a.patch, a.patch, 0}, a.weight, a.out);
}

}  // namespace pagelens::PAGELENS_ISA
