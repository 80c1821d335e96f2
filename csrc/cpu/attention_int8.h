// Scores and weighted values of an int8 cache on VPDPBUSD, straight from the cache's layout.
//
// Queries and softmax weights are rounded to whole numbers too, but to 15 and 16 bits, in two parts of 8: an error far
// below that of the cache. Products of whole numbers are exact, in any order.
#pragma once
#include "cpu/attention_softmax.h"
#include "cpu/kv_layout.h"

#ifdef PAGELENS_ISA_AVX512_BF16
namespace pagelens::PAGELENS_ISA {

// acc += u8 x s8 products of words; the second is one word for all lanes.
  #define PAGELENS_DOT8_SPLAT(acc, x, at) asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(x), "m"(*(at)))
  #define PAGELENS_DOT8(acc, x, y) asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y))

struct Int8Cache {
  using Element = uint8_t;
  static constexpr int kScoreRows = 4, kValueRows = 2;
  static constexpr float kQueryLevels = 127.0f * 128.0f;
  static constexpr float kWeightLevels = 65535.0f;

  // q = (128 * high + low) * scale, both parts int8: [dim/4] words of high parts, as many of low ones, the scale, and
  // what the offset of the keys adds to every product, negated.
  static int64_t query_words(int64_t dim) { return dim / 2 + 2; }
  static void load_query(const bf16* row, int64_t dim, uint32_t* q) {
    int8_t* high = reinterpret_cast<int8_t*>(q);
    int8_t* low = high + dim;
    vf top = vf{};
    bool finite = true;
    for (int64_t i = 0; i < dim; i += W) {
      const vf size = magnitude(load(row + i));
      finite &= !any_lane(not_finite(size));
      top = larger(size, top);
    }
    const float largest = _mm512_reduce_max_ps((__m512)top);
    const float inverse = finite && largest > 1e-30f ? kQueryLevels / largest : 0.0f;
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < dim; i += W) {
      const __m512i whole = _mm512_cvtps_epi32((__m512)(finite ? load(row + i) * inverse : vf{}));
      const __m512i up = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
      const __m512i rest = _mm512_sub_epi32(whole, _mm512_slli_epi32(up, 7));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(high + i), _mm512_cvtepi32_epi8(up));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(low + i), _mm512_cvtepi32_epi8(rest));
      total = _mm512_add_epi32(total, whole);
    }
    const float scale = !finite ? __builtin_nanf("") : inverse > 0.0f ? largest / kQueryLevels : 0.0f;
    const int32_t offset = -static_cast<int32_t>(kKeyOffset) * _mm512_reduce_add_epi32(total);
    std::memcpy(q + dim / 2, &scale, 4);
    std::memcpy(q + dim / 2 + 1, &offset, 4);
  }

  // p[r][0..15] = scale * q[r] . key, for R query rows and the 16 keys of a group; rows of p are kChunk apart.
  template <int R>
  static __attribute__((noinline)) void scores(const uint32_t* q, const uint8_t* keys, const float* key_scales,
                                               int64_t dim, float scale, float* p) {
    const int64_t words = dim / 4, step = query_words(dim);
    __m512i c[R][2][2];
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int e = 0; e < 2; e++) c[r][e][0] = c[r][e][1] =
        _mm512_setzero_si512();
    for (int64_t i = 0; i < words; i += 2, keys += 2 * 4 * kGroup) {
      PAGELENS_UNROLL for (int e = 0; e < 2; e++) {
        const __m512i k = _mm512_loadu_si512(keys + e * 4 * kGroup);
        PAGELENS_UNROLL for (int r = 0; r < R; r++) {
          PAGELENS_DOT8_SPLAT(c[r][e][0], k, q + r * step + i + e);
          PAGELENS_DOT8_SPLAT(c[r][e][1], k, q + r * step + words + i + e);
        }
      }
    }
    const vf scales = load(key_scales);
    PAGELENS_UNROLL for (int r = 0; r < R; r++) {
      const uint32_t* tail = q + r * step + dim / 2;
      const __m512i high = _mm512_slli_epi32(_mm512_add_epi32(c[r][0][0], c[r][1][0]), 7);
      const __m512i low = _mm512_add_epi32(c[r][0][1], c[r][1][1]);
      const __m512i whole =
          _mm512_add_epi32(_mm512_add_epi32(high, low), _mm512_set1_epi32(load_as<int32_t>(tail + 1)));
      store(p + r * kChunk, (vf)_mm512_cvtepi32_ps(whole) * (scales * (load_as<float>(tail) * scale)));
    }
  }

  // The row p of a chunk's scores, of which n keys are seen, becomes weights e^(p - largest) * value scale as whole
  // numbers: 128 bytes of high parts, 128 of low parts, and in the last float what to multiply sums with.
  static void weigh(float* p, int64_t n, const float* const* value_scales, float* largest, float* sum) {
    vf e[kChunkGroups];
    exponentials(p, n, e, largest, sum);
    vf top = vf{};
    PAGELENS_UNROLL for (int g = 0; g < kChunkGroups; g++) {
      const int64_t rest = n - g * kGroup;
      if (rest <= 0) continue;
      const auto seen = static_cast<__mmask16>(rest >= kGroup ? 0xffffu : (1u << rest) - 1u);
      e[g] = e[g] * (vf)_mm512_maskz_loadu_ps(seen, value_scales[g]);
      top = larger(e[g], top);  // not a NaN
    }
    const float most = _mm512_reduce_max_ps((__m512)top);
    const float inverse = most > 1e-30f ? kWeightLevels / most : 0.0f;
    uint8_t* bytes = reinterpret_cast<uint8_t*>(p);
    bool number = true;
    PAGELENS_UNROLL for (int g = 0; g < kChunkGroups; g++) {
      number &= !any_lane(e[g] != e[g]);
      const __m512i whole = _mm512_cvtps_epi32((__m512)(e[g] * inverse));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + g * 16), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes + 128 + g * 16), _mm512_cvtepi32_epi8(whole));
    }
    p[kChunk - 1] = !number ? __builtin_nanf("") : inverse > 0.0f ? most / kWeightLevels : 0.0f;
  }

  // o[r] += weights . values of the group's first n keys. Keys that are not seen weigh 0.
  template <int R>
  static __attribute__((noinline)) void add_values(const float* p, int64_t group, const uint8_t* values, int64_t n,
                                                   int64_t dim, float* o) {
    const uint32_t* weights = reinterpret_cast<const uint32_t*>(p) + group * 4;
    int64_t i = 0;
    for (; i + 64 <= dim; i += 64) add_columns<R, 4>(weights, values + 4 * i, n, dim, p + kChunk - 1, o + i);
    for (; i < dim; i += 32) add_columns<R, 2>(weights, values + 4 * i, n, dim, p + kChunk - 1, o + i);
  }

  // The sums of a chunk from whole numbers to values.
  static void finish(const float* p, int64_t dim, float* o) {
    const float factor = p[kChunk - 1];
    for (int64_t i = 0; i < dim; i += W) store(o + i, load(o + i) * factor);
  }

 private:
  template <int R, int NV>
  static inline __attribute__((always_inline)) void add_columns(const uint32_t* weights, const uint8_t* values,
                                                                int64_t n, int64_t dim, const float* factors,
                                                                float* o) {
    __m512i c[R][NV][2];
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++) c[r][v][0] = c[r][v][1] =
        _mm512_setzero_si512();
    for (int64_t t = 0; 4 * t < n; t++, values += 4 * dim) {
      __m512i w[R][2];
      PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int half = 0; half < 2; half++) w[r][half] =
          (__m512i)splat_bits(weights[r * kChunk + half * 32 + t]);
      PAGELENS_UNROLL for (int v = 0; v < NV; v++) {
        const __m512i x = _mm512_loadu_si512(values + v * 4 * W);
        PAGELENS_UNROLL for (int r = 0; r < R; r++) {
          PAGELENS_DOT8(c[r][v][0], w[r][0], x);
          PAGELENS_DOT8(c[r][v][1], w[r][1], x);
        }
      }
    }
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++) {
      const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(c[r][v][0], 8), c[r][v][1]);
      float* to = o + r * dim + v * W;
      const vf sums = (vf)_mm512_cvtepi32_ps(whole);
      // In free order o goes on from chunk to chunk, each with a factor of its own, and there is no `finish`.
      store(to, kFreeOrder ? fma(sums, splat(factors[r * kChunk]), load(to)) : load(to) + sums);
    }
  }
};

}  // namespace pagelens::PAGELENS_ISA
#endif
