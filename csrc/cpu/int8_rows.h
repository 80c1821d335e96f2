// Activations rounded to 8 bits, in groups along K, for the products of cpu/int8_product.h.
//
// A tile of R rows is [words][R] words of 4 signed bytes in the order of the weights' bytes, then for each group R
// scales (float) and R starts (int32): the bytes of weights are taken unsigned, 128 (int4: 8) too large, so a sum
// begins with minus that times the sum of the group's activations.
#pragma once
#include "cpu/quantized.h"

namespace pagelens::PAGELENS_ISA {

// Whether a weight is multiplied as whole numbers. Sums of longer groups would not fit into 32 bits.
PAGELENS_INLINE bool runs_int8(const PackedLinear& w) {
  return w.activation == ActivationFormat::int8 && (w.format == Format::int4 || w.format == Format::int8) && !w.zeros &&
         !w.order && (w.scale_groups() <= 1 || w.activation_group == w.group_size) &&
         (w.activation_group || w.k <= kMaxActivationGroup);
}

PAGELENS_INLINE int64_t int8_group(const PackedLinear& w) { return w.activation_group ? w.activation_group : w.k; }
PAGELENS_INLINE int64_t int8_groups(const PackedLinear& w) { return w.k ? (w.k - 1) / int8_group(w) + 1 : 0; }
// Words of a row of rounded activations.
PAGELENS_INLINE int64_t int8_words(const PackedLinear& w) { return w.groups() * (w.format == Format::int4 ? 2 : 1); }
PAGELENS_INLINE int64_t int8_row_words(const PackedLinear& w) { return int8_words(w) + 2 * int8_groups(w); }

PAGELENS_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}
PAGELENS_INLINE uint32_t largest_bits(vu x) {
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  return _mm512_reduce_max_epu32((__m512i)x);
#else
  uint32_t most = 0;
  for (int i = 0; i < W; i++) most = std::max<uint32_t>(most, x[i]);
  return most;
#endif
}
PAGELENS_INLINE uint32_t sum_bits(vu x) {
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  return static_cast<uint32_t>(_mm512_reduce_add_epi32((__m512i)x));
#else
  uint32_t sum = 0;
  for (int i = 0; i < W; i++) sum += x[i];
  return sum;
#endif
}

// The bits of max |x|; those of an infinity or more if x holds one or a NaN.
template <class T>
PAGELENS_INLINE uint32_t largest_size(const T* x, int64_t n) {
  vu largest = vu{};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vu size = (vu)load(x + i) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  uint32_t most = largest_bits(largest);
  for (; i < n; i++) most = std::max(most, bits_of(get(x + i)) & 0x7fffffffu);
  return most;
}

#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
PAGELENS_INLINE uint32_t largest_size(const bf16* x, int64_t n) {
  const __m512i size = _mm512_set1_epi16(0x7fff);
  __m512i largest = _mm512_setzero_si512();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) largest = _mm512_max_epu16(largest, _mm512_and_si512(_mm512_loadu_si512(x + i), size));
  if (i < n) {
    const __m512i rest = _mm512_maskz_loadu_epi16((1u << (n - i)) - 1u, x + i);
    largest = _mm512_max_epu16(largest, _mm512_and_si512(rest, size));
  }
  return largest_bits(
      (vu)_mm512_max_epu16(_mm512_slli_epi32(largest, 16), _mm512_and_si512(largest, _mm512_set1_epi32(-65536))));
}
#endif

constexpr int kScalesAtOnce = 16;  // a multiple of W

// From the bits of max |x| of each group: scale = max / 127, 1 where that would be subnormal, NaN if the group holds a
// NaN or an infinity; and its inverse.
PAGELENS_INLINE void int8_scales(const uint32_t* most, float* scales, float* inverses) {
  for (int i = 0; i < kScalesAtOnce; i += W) {
    const vu bits = load_as<vu>(most + i);
    const vf scale = (vf)bits / 127.0f, used = scale >= kSmallestScale ? scale : splat(1.0f);
    const vf known = bits >= 0x7f800000u ? splat(__builtin_nanf("")) : used;
    store(scales + i, known);
    store(inverses + i, 1.0f / known);
  }
}

// W values in units of scale, rounded to even, as bytes; adds them to `sums`. Where the scale is NaN they do not
// matter; else no value is beyond 127, not after rounding.
template <class T>
PAGELENS_INLINE void round_to_bytes(const T* x, vf scale, vf inverse, int8_t* to, vu& sums) {
  const vf value = load(x);
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  // The quotient, rounded once as by a division (Markstein), which takes ten times as long. max / 2 is a tie.
  const vf near = value * inverse, y = fma(fma(-near, scale, value), inverse, near);
#else
  const vf y = value / scale;
  (void)inverse;
#endif
  const vu whole = (vu)(y + 12582912.0f) - 0x4b400000u;  // 1.5 * 2^23: what is added to it is rounded into the low bits
  sums += whole;
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)whole);
  std::memcpy(to, &bytes, sizeof bytes);
#else
  for (int j = 0; j < W; j++) to[j] = static_cast<int8_t>(whole[j]);
#endif
}

// 16 bytes of successive k as four words: each 8 in the order 0 4 1 5, 2 6 3 7 for int4 (the low, then the high halves
// of a packed word's bytes), 0 2 1 3, 4 6 5 7 for int8.
PAGELENS_INLINE void order_bytes(const int8_t* from, Format format, uint32_t (&to)[4]) {
#if defined(PAGELENS_ISA_AVX2) || defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  const __m128i order = format == Format::int4 ? _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
                                               : _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(load_as<__m128i>(from), order));
#else
  static constexpr int8_t kInt4[8] = {0, 4, 1, 5, 2, 6, 3, 7}, kInt8[8] = {0, 2, 1, 3, 4, 6, 5, 7};
  const int8_t* order = format == Format::int4 ? kInt4 : kInt8;
  int8_t bytes[16];
  for (int i = 0; i < 16; i++) bytes[i] = from[i / 8 * 8 + order[i % 8]];
  std::memcpy(to, bytes, sizeof bytes);
#endif
}

// n values in units of scale into word column r of a tile (`to` points at its first word, `left` words are behind it);
// returns their sum.
template <class T>
PAGELENS_INLINE uint32_t pack_int8_group(const T* x, int64_t n, float scale, float inverse, Format format, int R,
                                         uint32_t* to, int64_t left) {
  constexpr int64_t kPiece = 16;  // of K at a time; a multiple of W
  vu sums = vu{};
  for (int64_t k = 0; k < n; k += kPiece) {
    int8_t bytes[kPiece];
    T tail[kPiece];
    const T* from = x + k;
    if (n - k < kPiece) {
      std::memset(tail, 0, sizeof tail);
      std::memcpy(tail, from, static_cast<size_t>(n - k) * sizeof(T));
      from = tail;
    }
    for (int64_t i = 0; i < kPiece; i += W) round_to_bytes(from + i, splat(scale), splat(inverse), bytes + i, sums);
    // Groups are multiples of 8: where one ends in the middle of these words, the next writes the others again.
    uint32_t ordered[4];
    order_bytes(bytes, format, ordered);
    const int64_t at = k / 4, count = left - at < 4 ? left - at : 4;
    for (int64_t i = 0; i < count; i++) to[(at + i) * R] = ordered[i];
  }
  return sum_bits(sums);
}

// One row into word column r of a tile (`to` and `side` point at that column). The scales of several groups are found
// together: one by one, each would wait for two divisions.
template <class T>
inline void pack_int8_row(const T* x, const PackedLinear& w, int R, uint32_t* to, uint32_t* side) {
  const int64_t size = int8_group(w), words = int8_words(w);
  const uint32_t offset = w.format == Format::int4 ? 8 : 128;
  for (int64_t k0 = 0; k0 < w.k; k0 += kScalesAtOnce * size) {
    uint32_t most[kScalesAtOnce] = {};
    float scales[kScalesAtOnce], inverses[kScalesAtOnce];
    const int64_t end = std::min(w.k, k0 + kScalesAtOnce * size);
    for (int64_t k = k0; k < end; k += size) most[(k - k0) / size] = largest_size(x + k, std::min(size, end - k));
    int8_scales(most, scales, inverses);
    for (int64_t k = k0, g = 0; k < end; k += size, g++, side += 2 * R) {
      const uint32_t sum = pack_int8_group(x + k, std::min(size, end - k), scales[g], inverses[g], w.format, R,
                                           to + k / 4 * R, words - k / 4);
      std::memcpy(side, scales + g, 4);
      side[R] = 0u - offset * sum;
    }
  }
}

// Rows row..row+R of x as a tile.
PAGELENS_INLINE void pack_int8_tile(const Source& x, const PackedLinear& w, int64_t row, int R, uint32_t* to) {
  uint32_t* side = to + int8_words(w) * R;
  for (int r = 0; r < R; r++) {
    if (x.dtype == DType::f32) {
      pack_int8_row(static_cast<const float*>(x.row(row + r)), w, R, to + r, side + r);
    } else {
      pack_int8_row(static_cast<const bf16*>(x.row(row + r)), w, R, to + r, side + r);
    }
  }
}

}  // namespace pagelens::PAGELENS_ISA
