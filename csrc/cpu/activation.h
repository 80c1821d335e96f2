// Activation functions on vectors, to float32 accuracy.
#pragma once
#include "common/simd.h"

namespace pagelens::PAGELENS_ISA {

PAGELENS_INLINE vf silu(vf x) { return x / (exp(-x) + 1.0f); }
PAGELENS_INLINE vf quick_gelu(vf x) { return x / (exp(x * -1.702f) + 1.0f); }

// x * Phi(x), the erf form. Phi(-y) = e^(-y^2/2) * P(1 / (1 + 0.3 y)) for y >= 0; P is a minimax fit to
// erfcx(y/sqrt 2)/2 on 0..13.2 (relative error 3e-8 before rounding). For x > 0: x - x*Phi(-x), which does not cancel.
PAGELENS_INLINE vf gelu(vf x) {
  const float c[] = {-0.005662035662680864f, 0.06792174279689789f,   -0.23565047979354858f, 0.31315121054649353f,
                     -0.14316989481449127f,  0.17632122337818146f,   0.08370767533779144f,  0.12412063032388687f,
                     0.11924097687005997f,   1.8954315237351693e-05f};
  const vf y = at_most(x < 0.0f ? -x : x, 20.0f);  // Phi(-20) is 0 in float32; infinity times 0 would be NaN
  const vf t = 1.0f / fma(y, splat(0.3f), splat(1.0f));
  vf p = splat(c[0]);
  PAGELENS_UNROLL for (int i = 1; i < 10; i++) p = fma(p, t, splat(c[i]));
  const vf tail = y * (p * exp(y * y * -0.5f));  // y * Phi(-y)
  return x < 0.0f ? -tail : x - tail;
}

PAGELENS_INLINE vf activate(vf x, Activation kind) {
  switch (kind) {
    case Activation::gelu:
      return gelu(x);
    case Activation::quick_gelu:
      return quick_gelu(x);
    case Activation::silu:
      return silu(x);
    default:
      return x;
  }
}

}  // namespace pagelens::PAGELENS_ISA
