// One block of 32 keys of bfloat16 attention on dot-product instructions: scores, running softmax, weighted values.
//
// Keys are turned so that 16 of them lie in the lanes: a score needs no sum across lanes. Values lie as pairs of keys.
// The softmax weights are split into two bfloat16 numbers, high and low, so that they keep 16 bits and the result is as
// exact as float32 arithmetic would have it, to the output's rounding.
//
// Every query row goes through the same operations in the same order, whatever stands beside it: keys in blocks of 32
// from the start of the sequence, blocks in chunks of kChunk, each chunk a running softmax of its own, chunks merged in
// order. A decode whose chunks run on several threads has the bits of a row of a prefill.
#pragma once
#include "common/simd.h"
#include "cpu/transpose.h"

#ifdef PAGELENS_ISA_AVX512_BF16
namespace pagelens::PAGELENS_ISA {

constexpr int64_t kBlockKeys = 32;
constexpr int64_t kChunk = 128;  // keys; enough work to share, few enough to share a depth of some hundreds
constexpr int64_t kPairs = kBlockKeys / 2;

  #define PAGELENS_DOT(acc, x, y) asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y))
  #define PAGELENS_DOT_SPLAT(acc, x, at) asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(x), "m"(*(at)))

// ---- a block in the layout of the products -------------------------------------------------------------------------
// at[t]: the rows of 32 keys, null from the first that is not there. turned: [dim/2][32] words, zeros for those.
inline void turn_keys(const bf16* const* at, int64_t dim, uint32_t* turned) {
  for (int64_t half = 0; half < 2; half++)
    for (int64_t i = 0; i < dim; i += 32) {
      __m512i rows[16];
      PAGELENS_UNROLL for (int t = 0; t < 16; t++) {
        const bf16* row = at[half * 16 + t];
        rows[t] = row ? _mm512_loadu_si512(row + i) : _mm512_setzero_si512();
      }
      transpose_16(rows, turned + i / 2 * kBlockKeys + half * 16, kBlockKeys);
    }
}

// paired: [16][dim] words, key 2t in the low half and 2t + 1 in the high half of each. Columns lie as unpacking leaves
// them: of every 32 first 0..3, 8..11, 16..19, 24..27, then the others. Sums keep that order until `ordered`.
inline void pair_values(const bf16* const* at, int64_t dim, uint32_t* paired) {
  for (int64_t t = 0; t < kPairs; t++, paired += dim) {
    const bf16 *x = at[2 * t], *y = at[2 * t + 1];
    for (int64_t i = 0; i < dim; i += 32) {
      const __m512i a = x ? _mm512_loadu_si512(x + i) : _mm512_setzero_si512();
      const __m512i b = y ? _mm512_loadu_si512(y + i) : _mm512_setzero_si512();
      _mm512_storeu_si512(paired + i, _mm512_unpacklo_epi16(a, b));
      _mm512_storeu_si512(paired + i + 16, _mm512_unpackhi_epi16(a, b));
    }
  }
}

// 32 sums at `o` in the order of their columns.
PAGELENS_INLINE void ordered(const float* o, vf* first, vf* second) {
  const __m512 a = _mm512_loadu_ps(o), b = _mm512_loadu_ps(o + 16);
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  *first = (vf)_mm512_permutex2var_ps(a, low, b);
  *second = (vf)_mm512_permutex2var_ps(a, high, b);
}

// ---- products ------------------------------------------------------------------------------------------------------
// p[r][32] = scale * q[r] . key, q: [R][dim/2] words. Even and odd words are summed apart and then added.
template <int R>
__attribute__((noinline)) void score_rows(const uint32_t* q, const uint32_t* turned, int64_t words, float scale,
                                          float* p) {
  vf c[R][2][2];
  PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int h = 0; h < 2; h++) c[r][0][h] = c[r][1][h] =
      vf{};
  for (int64_t i = 0; i < words; i += 2, turned += 64) {
    vf k[2][2];
    PAGELENS_UNROLL for (int e = 0; e < 2; e++) PAGELENS_UNROLL for (int h = 0; h < 2; h++) k[e][h] =
        load_as<vf>(turned + e * 32 + h * 16);
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int e = 0; e < 2; e++)
        PAGELENS_UNROLL for (int h = 0; h < 2; h++) PAGELENS_DOT_SPLAT(c[r][e][h], k[e][h], q + r * words + i + e);
  }
  PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int h = 0; h < 2; h++)
      store(p + r * kBlockKeys + h * W, (c[r][0][h] + c[r][1][h]) * scale);
}

// o[r] += sum over pairs t upwards of (high + low weights)[r][t] . paired[t], 16 * NV columns of `dim`.
template <int R, int NV>
__attribute__((noinline)) void add_pairs(const uint32_t* high, const uint32_t* low, const uint32_t* paired,
                                         int64_t pairs, int64_t dim, float* o) {
  vf c[R][NV];
  PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++) c[r][v] =
      load(o + r * dim + v * W);
  for (int64_t t = 0; t < pairs; t++, paired += dim) PAGELENS_UNROLL for (int v = 0; v < NV; v++) {
      const vf x = load_as<vf>(paired + v * W);
      PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_DOT_SPLAT(c[r][v], x, high + r * kPairs + t);
      PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_DOT_SPLAT(c[r][v], x, low + r * kPairs + t);
    }
  PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++)
      store(o + r * dim + v * W, c[r][v]);
}

template <int R>
PAGELENS_INLINE void add_all_pairs(const uint32_t* high, const uint32_t* low, const uint32_t* paired, int64_t pairs,
                                   int64_t dim, float* o) {
  int64_t i = 0;
  for (; i + 128 <= dim; i += 128) add_pairs<R, 8>(high, low, paired + i, pairs, dim, o + i);
  for (; i + 64 <= dim; i += 64) add_pairs<R, 4>(high, low, paired + i, pairs, dim, o + i);
  for (; i < dim; i += 32) add_pairs<R, 2>(high, low, paired + i, pairs, dim, o + i);
}

// The same as add_pairs of pair_values' words, for rows so few that the words are not worth storing. dim = 16 * NV.
template <int R, int NV>
__attribute__((noinline)) void add_rows(const uint32_t* high, const uint32_t* low, const bf16* const* at, int64_t pairs,
                                        int64_t dim, float* o) {
  vf c[R][NV];
  PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++) c[r][v] =
      load(o + r * dim + v * W);
  for (int64_t t = 0; t < pairs; t++) {
    const bf16 *x = at[2 * t], *y = at[2 * t + 1];
    PAGELENS_UNROLL for (int v = 0; v < NV; v += 2) {
      const __m512i a = _mm512_loadu_si512(x + v * W), b = _mm512_loadu_si512(y + v * W);
      const __m512i words[2] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
      PAGELENS_UNROLL for (int e = 0; e < 2; e++) {
        PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_DOT_SPLAT(c[r][v + e], words[e], high + r * kPairs + t);
        PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_DOT_SPLAT(c[r][v + e], words[e], low + r * kPairs + t);
      }
    }
  }
  PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++)
      store(o + r * dim + v * W, c[r][v]);
}

// ---- softmax -------------------------------------------------------------------------------------------------------
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

// p[32] becomes e^(p - largest) of its first n keys as high and low words; o, largest and sum go on with them.
PAGELENS_INLINE void soften_block(const float* p, int64_t n, float* o, int64_t dim, float* largest, float* sum,
                                  uint32_t* high, uint32_t* low) {
  const uint32_t seen = n >= kBlockKeys ? ~0u : (1u << n) - 1u;
  const __m512 nothing = _mm512_set1_ps(-__builtin_inff());
  const __m512 a = _mm512_mask_loadu_ps(nothing, static_cast<__mmask16>(seen), p);
  const __m512 b = _mm512_mask_loadu_ps(nothing, static_cast<__mmask16>(seen >> 16), p + W);
  const float before = *largest, found = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
  const float top = found > before ? found : before;
  const vf ea = exp_negative((vf)a - top), eb = exp_negative((vf)b - top);
  if (top != before) {
    const float factor = exp_negative(before - top);
    for (int64_t i = 0; i < dim; i += W) store(o + i, load(o + i) * factor);
    *sum *= factor;
    *largest = top;
  }
  *sum += sum_lanes(ea + eb);
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)eb, (__m512)ea);
  const vf ra = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded)), 16);
  const vf rb = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1)), 16);
  _mm512_storeu_si512(high, rounded);
  _mm512_storeu_si512(low, (__m512i)_mm512_cvtne2ps_pbh((__m512)(eb - rb), (__m512)(ea - ra)));
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
