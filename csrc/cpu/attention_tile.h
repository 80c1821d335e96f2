// The products and the softmax of window_attention, on tiles with queries in the lanes.
//
// Everything is made of 4-byte words, as in cpu/tile.h: a word is one float, or (kPairs) two bfloat16 that one
// instruction multiplies and adds. Of keys and queries the two are neighbours in a row; of values, two keys.
#pragma once
#include "common/simd.h"
#include "cpu/transpose.h"

namespace pagelens::PAGELENS_ISA {

#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
constexpr int kKeysATile = 8;     // x 3 vectors of queries: 24 accumulators
constexpr int kQueryVectors = 3;  // at most, in a block of queries
constexpr int kQueriesATile = 6;  // x 4 vectors of values
constexpr int kValueVectors = 4;
constexpr int kRowsATile = 14;  // x 1 vector of relative positions
#else
constexpr int kKeysATile = 4;
constexpr int kQueryVectors = 2;
constexpr int kQueriesATile = 4;
constexpr int kValueVectors = 2;
constexpr int kRowsATile = 8;
#endif

// The unit of the softmax's exponent: pairs use powers of two, whose exponential is the cheaper one.
template <bool kPairs>
constexpr float kExponentUnit = kPairs ? 1.44269504f : 1.0f;

// Asm for the reasons given in cpu/tile.cpp.
template <bool kPairs>
PAGELENS_INLINE void multiply_add(vf& c, vf x, vf b) {
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  #ifdef PAGELENS_ISA_AVX512_BF16
  if (kPairs) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(x), "v"(b));
    return;
  }
  #endif
  asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(x), "v"(b));
#elif defined(PAGELENS_ISA_AVX2)
  asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(x), "x"(b));
#else
  c = fma(x, b, c);
#endif
}

// Three products of R rows with V vectors, out[r] = (init[r] or 0) + sum over i < n of a(r, i) * b[i]:
// scores  a(r, i) = a[r * stride + i]; rows of b, init and out are V vectors apart
// rows    a(r, i) = a[r * stride + i]; rows of b are `width` apart, those of init and out `apart`
// values  a(r, i) = a[r + i * stride]; all rows are `width` apart
// A leaf that is never inlined: inside larger code GCC 12 spills the accumulators.
enum class Product { scores, rows, values };

template <bool kPairs, Product kind, int R, int V>
__attribute__((noinline)) void product(const uint32_t* a, int64_t stride, const float* b, int64_t width, int64_t n,
                                       const float* init, float* out, int64_t apart) {
  const int64_t a_row = kind == Product::values ? 1 : stride, a_step = kind == Product::values ? stride : 1;
  const int64_t b_row = kind == Product::scores ? V * W : width, ld = kind == Product::rows ? apart : b_row;
  vf c[R][V];
  if (init) {
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < V; v++) c[r][v] =
        load(init + r * ld + v * W);
  } else {
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < V; v++) c[r][v] = vf{};
  }
  for (int64_t i = 0; i < n; i++, a += a_step, b += b_row) {
    vf x[V];
    PAGELENS_UNROLL for (int v = 0; v < V; v++) x[v] = load(b + v * W);
    PAGELENS_UNROLL for (int r = 0; r < R; r++) {
      const vf y = (vf)splat_bits(load_as<uint32_t>(a + r * a_row));
      PAGELENS_UNROLL for (int v = 0; v < V; v++) multiply_add<kPairs>(c[r][v], y, x[v]);
    }
  }
  PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < V; v++)
      store(out + r * ld + v * W, c[r][v]);
}

using ProductFn = void (*)(const uint32_t*, int64_t, const float*, int64_t, int64_t, const float*, float*, int64_t);

template <bool kPairs, Product kind, int R, int V>
PAGELENS_INLINE ProductFn product_fn(int rows) {
  if constexpr (R > 1) {
    if (rows != R) return product_fn<kPairs, kind, R - 1, V>(rows);
  }
  return product<kPairs, kind, R, V>;
}

// W rows of `words` words, `pitch` apart, as columns: to[i * L + r] = from[r * pitch + i]. Whole vectors are read and
// written: `from` has words up to a multiple of W, and `to` rows for them.
PAGELENS_INLINE void transpose_rows(const uint32_t* from, int64_t pitch, int64_t words, uint32_t* to, int64_t L) {
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  for (int64_t i = 0; i < words; i += 16) {
    __m512i rows[16];
    PAGELENS_UNROLL for (int j = 0; j < 16; j++) rows[j] = _mm512_loadu_si512(from + j * pitch + i);
    transpose_16(rows, to + i * L, L);
  }
#else
  for (int64_t i = 0; i < words; i++)
    for (int r = 0; r < W; r++) to[i * L + r] = from[r * pitch + i];
#endif
}

// The same for floats, times `unit`.
PAGELENS_INLINE void transpose_rows(const float* from, int64_t pitch, int64_t count, float unit, float* to, int64_t L) {
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  for (int64_t i = 0; i < count; i += 16) {
    __m512i rows[16];
    PAGELENS_UNROLL for (int j = 0; j < 16; j++) rows[j] = _mm512_loadu_si512(from + j * pitch + i);
    transpose_16(rows, [&](int k, __m512i x) { store(to + (i + k) * L, (vf)x * unit); });
  }
#else
  for (int64_t i = 0; i < count; i++)
    for (int r = 0; r < W; r++) to[i * L + r] = from[r * pitch + i] * unit;
#endif
}

// 2^x for the weights of pairs, which keep 8 bits: relative error below 7.6e-5.
PAGELENS_INLINE vf exp2_8bit(vf x) {
#ifdef PAGELENS_ISA_AVX512_BF16
  // f = x - floor(x); a minimax fit of 2^f on 0..1
  const vf f = (vf)_mm512_reduce_ps((__m512)x, 1);
  vf p = fma(f, splat(0.0780244585f), splat(0.226067247f));
  p = fma(p, f, splat(0.695833509f));
  p = fma(p, f, splat(0.99992522f));
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
#else
  return x;
#endif
}

// Two vectors of weights as bfloat16 pairs, `even` in the low halves.
PAGELENS_INLINE vu pair_up(vf even, [[maybe_unused]] vf odd) {
#ifdef PAGELENS_ISA_AVX512_BF16
  alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (vu)_mm512_permutexvar_epi16(_mm512_load_si512(order), halves);
#else
  return (vu)even;
#endif
}

// scores: [keys][V vectors]. The exponents are scores * scale + offset. Raises `top` of the lanes whose largest
// exponent exceeds it by more than `slack`; returns whether any did, and `factor`, e^(old top - new top).
template <bool kPairs, int V>
__attribute__((noinline)) bool raise_top(const float* scores, int keys, float scale, const float* offset, float slack,
                                         float* top, float* factor) {
  vf reached[V];
  bool any = false;
  PAGELENS_UNROLL for (int v = 0; v < V; v++) {
    vf most = load(scores + v * W);
    for (int r = 1; r < keys; r++) most = larger(load(scores + (r * V + v) * W), most);
    reached[v] = fma(most, splat(scale), load(offset + v * W));
    any |= any_lane(reached[v] > load(top + v * W) + slack);
  }
  if (!any) return false;
  for (int v = 0; v < V; v++) {
    const vf old = load(top + v * W), raised = reached[v] > old + slack ? reached[v] : old;
    store(factor + v * W, exp((old - raised) * (1.0f / kExponentUnit<kPairs>)));
    store(top + v * W, raised);
  }
  return true;
}

// Weights e^(exponent - top) of `keys` keys into p (a word a key, or a word two keys), added to `sum`.
template <bool kPairs, int V>
__attribute__((noinline)) void soften(const float* scores, int keys, float scale, const float* offset, const float* top,
                                      float* sum, uint32_t* p) {
  PAGELENS_UNROLL for (int v = 0; v < V; v++) {
    const vf by = load(offset + v * W) - load(top + v * W);
    vf total = load(sum + v * W);
    const auto exponent = [&](int r) { return fma(load(scores + (r * V + v) * W), splat(scale), by); };
    if (kPairs) {
      for (int r = 0; r < keys; r += 2) {
        const vf even = exp2_8bit(exponent(r)), odd = r + 1 < keys ? exp2_8bit(exponent(r + 1)) : vf{};
        total = total + (even + odd);
        const vu pair = pair_up(even, odd);
        std::memcpy(p + (r / 2 * V + v) * W, &pair, sizeof pair);
      }
    } else {
      for (int r = 0; r < keys; r++) {
        const vf weight = exp(exponent(r));
        total = total + weight;
        std::memcpy(p + (r * V + v) * W, &weight, sizeof weight);
      }
    }
    store(sum + v * W, total);
  }
}

// One tile of keys: keys [R][words], query [words][V vectors]; the rest as in product, raise_top and soften.
struct KeyTile {
  const uint32_t* key;
  const float* query;
  int64_t words;
  const float* init;
  float scale, slack;
  const float *offset, *top;
  float *sum, *scores;
  uint32_t* p;
};

#ifdef PAGELENS_ISA_AVX512_BF16
// The scores of an even number of keys and their weights without a way through memory: what raise_top and soften would
// do, with the same bits, if no top has to be raised. Otherwise the scores are stored and the answer is false.
template <int R, int V>
__attribute__((noinline)) bool weigh_keys(const KeyTile& t) {
  const uint32_t* a = t.key;
  const float *b = t.query, *init = t.init;
  const int64_t words = t.words;
  vf c[R][V];
  if (init) {
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < V; v++) c[r][v] =
        load(init + (r * V + v) * W);
  } else {
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < V; v++) c[r][v] = vf{};
  }
  for (int64_t i = 0; i < words; i++, a++, b += V * W) {
    vf x[V];
    PAGELENS_UNROLL for (int v = 0; v < V; v++) x[v] = load(b + v * W);
    PAGELENS_UNROLL for (int r = 0; r < R; r++) {
      const vf y = (vf)splat_bits(load_as<uint32_t>(a + r * words));
      PAGELENS_UNROLL for (int v = 0; v < V; v++) multiply_add<true>(c[r][v], y, x[v]);
    }
  }
  const vf scale = splat(t.scale);
  __mmask16 above = 0;
  PAGELENS_UNROLL for (int v = 0; v < V; v++) {
    __m512 most = (__m512)c[0][v];
    PAGELENS_UNROLL for (int r = 1; r < R; r++) most = _mm512_max_ps((__m512)c[r][v], most);
    const vf reached = fma((vf)most, scale, load(t.offset + v * W));
    above |= _mm512_cmp_ps_mask((__m512)reached, (__m512)(load(t.top + v * W) + t.slack), _CMP_GT_OQ);
  }
  if (above) {
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < V; v++)
        store(t.scores + (r * V + v) * W, c[r][v]);
    return false;
  }
  PAGELENS_UNROLL for (int v = 0; v < V; v++) {
    const vf by = load(t.offset + v * W) - load(t.top + v * W);
    vf total = load(t.sum + v * W);
    PAGELENS_UNROLL for (int r = 0; r < R; r += 2) {
      const vf even = exp2_8bit(fma(c[r][v], scale, by)), odd = exp2_8bit(fma(c[r + 1][v], scale, by));
      total = total + (even + odd);
      const vu pair = pair_up(even, odd);
      std::memcpy(t.p + (r / 2 * V + v) * W, &pair, sizeof pair);
    }
    store(t.sum + v * W, total);
  }
  return true;
}
#endif

// weigh_keys for 2, 4, ... keys; false where there are no pairs.
template <int V, int R = kKeysATile>
PAGELENS_INLINE bool weigh([[maybe_unused]] int keys, [[maybe_unused]] const KeyTile& tile) {
#ifdef PAGELENS_ISA_AVX512_BF16
  if constexpr (R > 2) {
    if (keys != R) return weigh<V, R - 2>(keys, tile);
  }
  return weigh_keys<R, V>(tile);
#else
  return false;
#endif
}

}  // namespace pagelens::PAGELENS_ISA
