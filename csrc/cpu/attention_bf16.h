// Scores and weighted values of a bfloat16 cache on dot-product instructions, straight from the cache's layout.
//
// The softmax weights are split into two bfloat16 numbers, high and low, so that they keep 16 bits and the result is as
// exact as float32 arithmetic would have it, to the output's rounding.
#pragma once
#include "cpu/attention_softmax.h"
#include "cpu/kv_layout.h"

#ifdef PAGELENS_ISA_AVX512_BF16
namespace pagelens::PAGELENS_ISA {

  #define PAGELENS_DOT(acc, x, y) asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(x), "v"(y))
  #define PAGELENS_DOT_SPLAT(acc, x, at) asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(x), "m"(*(at)))

struct Bf16Cache {
  using Element = bf16;
  static constexpr int kScoreRows = 6, kValueRows = 3;  // rows that share a load, as many as registers allow

  // A query row is its dim/2 words as they come.
  static int64_t query_words(int64_t dim) { return dim / 2; }
  static void load_query(const bf16* row, int64_t dim, uint32_t* q) {
    std::memcpy(q, row, static_cast<size_t>(dim) * sizeof(bf16));
  }

  // p[r][0..15] = scale * q[r] . key, for R query rows and the 16 keys of a group; rows of p are kChunk apart. The
  // words of a row are summed in four chains.
  template <int R>
  static __attribute__((noinline)) void scores(const uint32_t* q, const bf16* keys, const float*, int64_t dim,
                                               float scale, float* p) {
    const int64_t words = dim / 2;
    vf c[R][4];
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int e = 0; e < 4; e++) c[r][e] = vf{};
    for (int64_t i = 0; i < words; i += 4, keys += 4 * 2 * kGroup) {
      PAGELENS_UNROLL for (int e = 0; e < 4; e++) {
        const vf k = load_as<vf>(keys + e * 2 * kGroup);
        PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_DOT_SPLAT(c[r][e], k, q + r * words + i + e);
      }
    }
    PAGELENS_UNROLL for (int r = 0; r < R; r++)
        store(p + r * kChunk, ((c[r][0] + c[r][1]) + (c[r][2] + c[r][3])) * scale);
  }

  // The row p of a chunk's scores, of which n keys are seen, becomes weights: high words of 64 pairs, then low ones.
  static void weigh(float* p, int64_t n, const float* const*, float* largest, float* sum) {
    vf e[kChunkGroups];
    exponentials(p, n, e, largest, sum);
    uint32_t* words = reinterpret_cast<uint32_t*>(p);
    PAGELENS_UNROLL for (int g = 0; g < kChunkGroups; g += 2) {
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)e[g + 1], (__m512)e[g]);
      const vf a = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(rounded)), 16);
      const vf b = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(rounded, 1)), 16);
      _mm512_storeu_si512(words + g * 8, rounded);
      _mm512_storeu_si512(words + 64 + g * 8, (__m512i)_mm512_cvtne2ps_pbh((__m512)(e[g + 1] - b), (__m512)(e[g] - a)));
    }
  }

  // o[r] += weights . values of the group's first n keys, pairs in ascending order. The other key of a last pair is
  // not touched: a NaN there must not come in as 0 times NaN.
  template <int R>
  static void add_values(const float* p, int64_t group, const bf16* values, int64_t n, int64_t dim, float* o) {
    const uint32_t* weights = reinterpret_cast<const uint32_t*>(p) + group * 8;
    int64_t i = 0;
    for (; i + 128 <= dim; i += 128) add_columns<R, 8>(weights, values + 2 * i, n, dim, o + i);
    for (; i + 64 <= dim; i += 64) add_columns<R, 4>(weights, values + 2 * i, n, dim, o + i);
    for (; i < dim; i += 32) add_columns<R, 2>(weights, values + 2 * i, n, dim, o + i);
  }

  // The sums of a chunk are as they should be.
  static void finish(const float*, int64_t, float*) {}

 private:
  template <int R, int NV>
  static __attribute__((noinline)) void add_columns(const uint32_t* weights, const bf16* values, int64_t n, int64_t dim,
                                                    float* o) {
    vf c[R][NV];
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++) c[r][v] =
        load(o + r * dim + v * W);
    int64_t t = 0;
    for (; t < n / 2; t++, values += 2 * dim) PAGELENS_UNROLL for (int v = 0; v < NV; v++) {
        const vf x = load_as<vf>(values + v * 2 * W);
        PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_DOT_SPLAT(c[r][v], x, weights + r * kChunk + t);
        PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_DOT_SPLAT(c[r][v], x, weights + 64 + r * kChunk + t);
      }
    if (n % 2) PAGELENS_UNROLL for (int v = 0; v < NV; v++) {
        const vu x = load_as<vu>(values + v * 2 * W) & 0xffffu;
        PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_DOT_SPLAT(c[r][v], x, weights + r * kChunk + t);
        PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_DOT_SPLAT(c[r][v], x, weights + 64 + r * kChunk + t);
      }
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++)
        store(o + r * dim + v * W, c[r][v]);
  }
};

}  // namespace pagelens::PAGELENS_ISA
#endif
