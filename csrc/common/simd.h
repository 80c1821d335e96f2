// Vectors of float for the instruction set that this file is compiled for, over the vector extension of GCC and Clang.
//
// Everything lies in namespace pagelens::PAGELENS_ISA: an inline function with one name and different bodies in
// different objects would let the linker choose the wrong one.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

#if defined(__x86_64__)
  #include <immintrin.h>
#endif

#if defined(__clang__)
  #define PAGELENS_UNROLL _Pragma("unroll")
#else
  #define PAGELENS_UNROLL _Pragma("GCC unroll 32")
#endif
#define PAGELENS_INLINE static inline __attribute__((always_inline))

namespace pagelens::PAGELENS_ISA {

#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
constexpr int W = 16;  // floats a vector
#elif defined(PAGELENS_ISA_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

// Whether sums may be cut and ordered as is fastest for the call at hand. False in every normal build: what is true of
// csrc/free_order is compiled by benchmarks/bench_invariance.py alone, to measure what the fixed order costs.
#ifdef PAGELENS_FREE_ORDER
constexpr bool kFreeOrder = true;
#else
constexpr bool kFreeOrder = false;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint16_t bf16;

PAGELENS_INLINE vf splat(float x) { return x - (vf){}; }
PAGELENS_INLINE vu splat_bits(uint32_t x) { return x - (vu){}; }

template <class T>
PAGELENS_INLINE T load_as(const void* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// ---- one element
PAGELENS_INLINE float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
PAGELENS_INLINE bf16 narrow(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>(u >> 16 | 0x40);
  return static_cast<bf16>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
PAGELENS_INLINE float get(const float* p) { return *p; }
PAGELENS_INLINE float get(const bf16* p) { return widen(*p); }
PAGELENS_INLINE void put(float* p, float x) { *p = x; }
PAGELENS_INLINE void put(bf16* p, float x) { *p = narrow(x); }

// ---- a vector
PAGELENS_INLINE vf load(const float* p) { return load_as<vf>(p); }
PAGELENS_INLINE vf load(const bf16* p) {
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);  // GCC 12 converts in two halves
#else
  return (vf)(__builtin_convertvector(load_as<vh>(p), vu) << 16);
#endif
}
// p[at[0]], p[at[1]], ...
PAGELENS_INLINE vf gather(const float* p, const int32_t* at) {
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  return (vf)_mm512_i32gather_ps(_mm512_loadu_si512(at), p, 4);
#else
  vf x;
  for (int i = 0; i < W; i++) x[i] = p[at[i]];
  return x;
#endif
}
PAGELENS_INLINE void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }
// Round to nearest, ties to even; a NaN stays one (adding the rounding term could turn it into a zero). The instruction
// for it would make subnormal numbers zero.
PAGELENS_INLINE void store(bf16* p, vf x) {
  const vu u = (vu)x;
#ifdef PAGELENS_ISA_AVX512_BF16
  const __mmask16 small = _mm512_testn_epi32_mask((__m512i)u, _mm512_set1_epi32(0x7f800000));
  if (__builtin_expect(!_mm512_mask_test_epi32_mask(small, (__m512i)u, _mm512_set1_epi32(0x7fffffff)), 1)) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(p, &rounded, sizeof rounded);
    return;
  }
#endif
  const vu rounded = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  const vu quiet = u >> 16 | 0x40u;
  const vh h = __builtin_convertvector((vu)(((u & 0x7fffffffu) > 0x7f800000u) ? quiet : rounded), vh);
  std::memcpy(p, &h, sizeof h);
}

// a*b + c: one rounding where the set has such an instruction, two in `portable`.
PAGELENS_INLINE vf fma(vf a, vf b, vf c) {
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(PAGELENS_ISA_AVX2)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// A NaN in `x` survives both.
PAGELENS_INLINE vf at_least(vf x, float limit) { return x < limit ? splat(limit) : x; }
PAGELENS_INLINE vf at_most(vf x, float limit) { return x > limit ? splat(limit) : x; }

// ---- across the lanes, in a fixed order
typedef float v4 __attribute__((vector_size(16)));

PAGELENS_INLINE v4 fold(vf x) {  // lanes i, i+4, i+8, ... added
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  const __m256 half = _mm512_castps512_ps256((__m512)x) + _mm512_extractf32x8_ps((__m512)x, 1);
  return (v4)(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(PAGELENS_ISA_AVX2)
  return (v4)(_mm256_castps256_ps128((__m256)x) + _mm256_extractf128_ps((__m256)x, 1));
#else
  return x;
#endif
}

// Sums of four vectors: result lane i is the sum of x[i]; each is ((0 + 1) + (2 + 3)) of its folded lanes.
PAGELENS_INLINE v4 sum_each(const vf (&x)[4]) {
  v4 r[4] = {fold(x[0]), fold(x[1]), fold(x[2]), fold(x[3])};
#if defined(__x86_64__)
  __m128 a = (__m128)r[0], b = (__m128)r[1], c = (__m128)r[2], d = (__m128)r[3];
  _MM_TRANSPOSE4_PS(a, b, c, d);
  return (v4)((a + b) + (c + d));
#else
  v4 y;
  for (int i = 0; i < 4; i++) y[i] = (r[i][0] + r[i][1]) + (r[i][2] + r[i][3]);
  return y;
#endif
}

PAGELENS_INLINE float sum_lanes(vf x) {
  const v4 r = fold(x);
  return (r[0] + r[1]) + (r[2] + r[3]);
}

PAGELENS_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }  // b if one is NaN
PAGELENS_INLINE float largest_lane(vf x) {
  float lane[W];
  std::memcpy(lane, &x, sizeof x);
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// Whether any lane of a comparison is true.
PAGELENS_INLINE bool any_lane(vi x) {
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(PAGELENS_ISA_AVX2)
  return _mm256_movemask_ps((__m256)x) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < W; i++) all |= x[i];
  return all != 0;
#endif
}

PAGELENS_INLINE float sum_of_squares(const float* x, int64_t n) {
  vf total = vf{};
  int64_t i = 0;
  for (; i + W <= n; i += W) total = fma(load(x + i), load(x + i), total);
  float squares = sum_lanes(total);
  for (; i < n; i++) squares += x[i] * x[i];
  return squares;
}

// e^x, relative error below 2e-7; 0 far below -87.3, infinity far above 88.3.
PAGELENS_INLINE vf exp(vf x) {
  const float c[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  vf p = splat(1.0f / 5040);
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  // Of two numbers the second is taken if one is a NaN.
  const __m512 y = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), (__m512)x));
  const __m512 n = _mm512_roundscale_ps(y * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf r = fma((vf)n, splat(-1.42860677e-6f), fma((vf)n, splat(-0.693145752f), (vf)y));  // ln 2 in two pieces
  PAGELENS_UNROLL for (int i = 0; i < 7; i++) p = fma(p, r, splat(c[i]));
  return (vf)_mm512_scalef_ps((__m512)p, n);
#else
  const vf y = at_most(at_least(x, -87.3f), 88.3f);
  const vf shifted =
      fma(y, splat(1.44269504f), splat(12582912.0f));  // 1.5 * 2^23: rounds to an integer in the low bits
  const vf n = shifted - 12582912.0f;
  // ln 2 in two pieces; the first has 15 bits, so that its product with n is exact without a fused multiply too
  const vf r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), y));
  PAGELENS_UNROLL for (int i = 0; i < 7; i++) p = fma(p, r, splat(c[i]));
  const vf scale = (vf)(((vu)shifted << 23) + 0x3f800000u);
  const vf inside = x > 88.3f ? splat(__builtin_inff()) : p * scale;
  return x < -87.3f ? splat(0.0f) : inside;
#endif
}

}  // namespace pagelens::PAGELENS_ISA
