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

// max |x| / 127, 1 where that would be subnormal, NaN if x holds a NaN or an infinity.
template <class T>
PAGELENS_INLINE float int8_scale(const T* x, int64_t n) {
  vu largest = vu{};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vu size = (vu)load(x + i) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
  uint32_t most = largest_bits(largest);
  for (; i < n; i++) most = std::max(most, bits_of(get(x + i)) & 0x7fffffffu);
  if (most >= 0x7f800000u) return __builtin_nanf("");
  float size;
  std::memcpy(&size, &most, 4);
  const float scale = size / 127.0f;
  return scale >= kSmallestScale ? scale : 1.0f;
}

// W values in units of scale, rounded to even, as bytes; adds them to `sums`. Where the scale is NaN they do not
// matter.
template <class T>
PAGELENS_INLINE void round_to_bytes(const T* x, vf scale, int8_t* to, vu& sums) {
  const vf y = at_most(at_least(load(x) / scale, -127.0f), 127.0f);
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

// One row into word column r of a tile (`to` and `side` point at that column).
template <class T>
inline void pack_int8_row(const T* x, const PackedLinear& w, int R, uint32_t* to, uint32_t* side) {
  constexpr int64_t kPiece = 16;  // of K at a time; a multiple of W
  const int64_t size = int8_group(w), words = int8_words(w);
  const uint32_t offset = w.format == Format::int4 ? 8 : 128;
  for (int64_t k0 = 0; k0 < w.k; k0 += size, side += 2 * R) {
    const int64_t k1 = k0 + size < w.k ? k0 + size : w.k;
    const float scale = int8_scale(x + k0, k1 - k0);
    vu sums = vu{};
    for (int64_t k = k0; k < k1; k += kPiece) {
      int8_t bytes[kPiece];
      T tail[kPiece];
      const T* from = x + k;
      if (k1 - k < kPiece) {
        std::memset(tail, 0, sizeof tail);
        std::memcpy(tail, from, static_cast<size_t>(k1 - k) * sizeof(T));
        from = tail;
      }
      for (int64_t i = 0; i < kPiece; i += W) round_to_bytes(from + i, splat(scale), bytes + i, sums);
      // Groups are multiples of 8: where one ends in the middle of these words, the next writes the others again.
      uint32_t ordered[4];
      order_bytes(bytes, w.format, ordered);
      const int64_t at = k / 4, count = words - at < 4 ? words - at : 4;
      for (int64_t i = 0; i < count; i++) to[(at + i) * R] = ordered[i];
    }
    std::memcpy(side, &scale, 4);
    side[R] = 0u - offset * sum_bits(sums);
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
