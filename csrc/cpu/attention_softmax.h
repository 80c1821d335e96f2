// The softmax of one chunk of keys, and how chunks are merged: for attention whose scores lie in vectors.
#pragma once
#include "common/simd.h"

#ifdef PAGELENS_ISA_AVX512_BF16
namespace pagelens::PAGELENS_ISA {

constexpr int64_t kChunk = 128;  // keys; enough work to share, few enough to share a depth of some hundreds
constexpr int64_t kGroup = 16;   // keys; the lanes of a vector
constexpr int kChunkGroups = 8;

// e^x for x <= 0, relative error below 2e-7; a NaN stays one.
PAGELENS_INLINE vf exp_negative(vf x) {
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-104.0f), (__m512)x);  // the second of the two if one is NaN
  const __m512 n = _mm512_roundscale_ps(y * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf r = fma((vf)n, splat(-1.42860677e-6f), fma((vf)n, splat(-0.693145752f), (vf)y));  // ln 2 in two pieces
  vf p = splat(1.0f / 5040);
  const float c[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  PAGELENS_UNROLL for (int i = 0; i < 7; i++) p = fma(p, r, splat(c[i]));
  return (vf)_mm512_scalef_ps((__m512)p, n);
}

PAGELENS_INLINE float exp_negative(float x) { return _mm512_cvtss_f32((__m512)exp_negative(splat(x))); }

// Scores p[kChunk] of which the first n keys are seen -> e[8] = e^(p - largest), zeros for the others. What lies in p
// behind the seen keys does not matter. In free order `largest` comes with that of the keys before, and never falls.
PAGELENS_INLINE void exponentials(const float* p, int64_t n, vf (&e)[kChunkGroups], float* largest, float* sum) {
  const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
  __mmask16 seen[kChunkGroups];
  __m512 x[kChunkGroups], tops[4];
  PAGELENS_UNROLL for (int g = 0; g < kChunkGroups; g++) {
    const int64_t rest = n - g * kGroup;
    seen[g] = static_cast<__mmask16>(rest >= kGroup ? 0xffffu : rest <= 0 ? 0u : (1u << rest) - 1u);
    x[g] = _mm512_mask_loadu_ps(nothing, seen[g], p + g * kGroup);
  }
  PAGELENS_UNROLL for (int g = 0; g < 4; g++) tops[g] = _mm512_max_ps(x[g], x[g + 4]);
  float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3])));
  if (kFreeOrder) top = *largest > top ? *largest : top;
  PAGELENS_UNROLL for (int g = 0; g < kChunkGroups; g++) e[g] =
      (vf)_mm512_maskz_mov_ps(seen[g], (__m512)exp_negative((vf)x[g] - top));
  *largest = top;
  *sum = sum_lanes(((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7])));
}

// (largest, sum, o) of a chunk into those of the chunks before it.
inline void merge_chunk(const float* o, float largest, float sum, int64_t dim, float* all_o, float* all_largest,
                        float* all_sum) {
  const float top = largest > *all_largest ? largest : *all_largest;
  const float before = exp_negative(*all_largest - top), now = exp_negative(largest - top);
  for (int64_t i = 0; i < dim; i += W) store(all_o + i, fma(load(o + i), splat(now), load(all_o + i) * before));
  *all_sum = sum * now + *all_sum * before;
  *all_largest = top;
}

}  // namespace pagelens::PAGELENS_ISA
#endif
