// Activation functions on vectors, to float32 accuracy.
#pragma once
#include "common/simd.h"

namespace pagelens::PAGELENS_ISA {

// 1 / x for 1 <= x <= 2^126, to 1e-7. A division costs as much as ten other operations.
PAGELENS_INLINE vf reciprocal(vf x) {
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  const vf r = (vf)_mm512_rcp14_ps((__m512)x);
  return fma(fma(-x, r, splat(1.0f)), r, r);
#else
  return 1.0f / x;
#endif
}

// x / (1 + e^-ax)
PAGELENS_INLINE vf sigmoid_times(vf x, float a) {
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  const vf z = x * -a, limited = at_most(z, 87.33f);  // e^87.33 < 2^126
  const vf y = x * reciprocal(exp(limited) + 1.0f);
  return z > 87.33f ? x * 0.0f : y;
#else
  return x / (exp(x * -a) + 1.0f);
#endif
}
PAGELENS_INLINE vf silu(vf x) { return sigmoid_times(x, 1.0f); }
PAGELENS_INLINE vf quick_gelu(vf x) { return sigmoid_times(x, 1.702f); }

// x * Phi(x), the erf form. Phi(-y) = e^(-y^2/2) * P(1 / (1 + 0.3 y)) for y >= 0; P is a minimax fit to
// erfcx(y/sqrt 2)/2 on 0..13.2 (relative error 3e-8 before rounding). For x > 0: x - x*Phi(-x), which does not cancel.
PAGELENS_INLINE vf gelu(vf x) {
  const float c[] = {-0.005662035662680864f, 0.06792174279689789f,   -0.23565047979354858f, 0.31315121054649353f,
                     -0.14316989481449127f,  0.17632122337818146f,   0.08370767533779144f,  0.12412063032388687f,
                     0.11924097687005997f,   1.8954315237351693e-05f};
  const vf y = at_most(x < 0.0f ? -x : x, 20.0f);  // Phi(-20) is 0 in float32; infinity times 0 would be NaN
  const vf t = reciprocal(fma(y, splat(0.3f), splat(1.0f)));
  vf p = splat(c[0]);
  PAGELENS_UNROLL for (int i = 1; i < 10; i++) p = fma(p, t, splat(c[i]));
  const vf tail = y * (p * exp(y * y * -0.5f));  // y * Phi(-y)
  return x < 0.0f ? -tail : x - tail;
}

// The same to 5e-6, for results that keep 8 bits.
PAGELENS_INLINE vf gelu_8bit(vf x) {
#ifdef PAGELENS_ISA_AVX512_BF16
  const vf y = (vf)_mm512_min_ps(_mm512_set1_ps(20.0f), _mm512_abs_ps((__m512)x));
  const vf t = reciprocal(fma(y, splat(0.3f), splat(1.0f)));
  vf p = splat(-0.08464212715625763f);
  const float c[] = {0.24075302481651306f, -0.048910073935985565f, 0.16496358811855316f,
                     0.10662516206502914f, 0.12129048258066177f,   -8.099224942270666e-05f};
  PAGELENS_UNROLL for (int i = 0; i < 6; i++) p = fma(p, t, splat(c[i]));
  // 2^z, z = -y^2/2 log2 e: a minimax fit of 2^f on 0..1 for f = z - floor(z)
  const vf z = y * (y * -0.72134752f), f = (vf)_mm512_reduce_ps((__m512)z, 1);
  vf e = fma(f, splat(0.0135341605f), splat(0.0520114749f));
  e = fma(e, f, splat(0.241442748f));
  e = fma(e, f, splat(0.693003836f));
  e = fma(e, f, splat(1.00000259f));
  const vf tail = y * (p * (vf)_mm512_scalef_ps((__m512)e, (__m512)z));
  return (vf)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x) - tail;
#else
  return gelu(x);
#endif
}

template <class Out>
PAGELENS_INLINE vf activate(vf x, Activation kind) {
  switch (kind) {
    case Activation::gelu:
      return sizeof(Out) == 2 ? gelu_8bit(x) : gelu(x);
    case Activation::quick_gelu:
      return quick_gelu(x);
    case Activation::silu:
      return silu(x);
    default:
      return x;
  }
}

}  // namespace pagelens::PAGELENS_ISA
