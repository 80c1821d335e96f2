// Products of rounded activations with int8 and int4 weights, in whole numbers.
//
// Every output is sum over groups upwards of float(exact sum of the group) * scale, added by fma: scale is that of the
// activations times that of the weights where these have groups, else the weight's scale comes last. One order for any
// number of rows, so batch invariance holds as for plain weights.
#pragma once
#include "cpu/int8_rows.h"

namespace pagelens::PAGELENS_ISA {

// x 2 vectors of sums and as many of totals fill the registers.
#if defined(PAGELENS_ISA_AVX512_BF16)
constexpr int kInt8TileRows = 7;
#elif defined(PAGELENS_ISA_AVX512)
constexpr int kInt8TileRows = 4;
#else
constexpr int kInt8TileRows = 2;
#endif
constexpr int kInt8Vectors = 2;  // of a panel in one pass over K

// Fetching int4 weights ahead, measured with a panel in one pass: several rows take so long for a line that the loads
// which the core has under way do not keep memory busy. No gain with int8, which has half the work for a byte.
constexpr bool kFetches = W == 16;
constexpr int64_t kFetchWords = 1024;  // 4 KiB

// sum + u8 . s8 of each lane's four bytes. The set avx512_bf16 has VNNI; elsewhere products are made in 16 bits, where
// all of them fit, and their pairs in 32.
PAGELENS_INLINE vi plus_dots(vi sum, vu u8, vu x) {
#if defined(PAGELENS_ISA_AVX512)
  const __m512i low = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8);
  const vi even = (vi)_mm512_madd_epi16((__m512i)(u8 & 0x00ff00ffu), low);
  return sum + even + (vi)_mm512_madd_epi16(_mm512_srli_epi16((__m512i)u8, 8), _mm512_srai_epi16((__m512i)x, 8));
#elif defined(PAGELENS_ISA_AVX2)
  const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8);
  const vi even = (vi)_mm256_madd_epi16((__m256i)(u8 & 0x00ff00ffu), low);
  return sum + even + (vi)_mm256_madd_epi16(_mm256_srli_epi16((__m256i)u8, 8), _mm256_srai_epi16((__m256i)x, 8));
#else
  typedef int16_t half __attribute__((vector_size(4 * W)));
  const vi even = (vi)((half)(u8 & 0x00ff00ffu) * ((half)(x << 8) >> 8));
  const vi odd = (vi)((half)(u8 >> 8 & 0x00ff00ffu) * ((half)x >> 8));
  return sum + (((vi)((vu)even << 16) >> 16) + (even >> 16)) + (((vi)((vu)odd << 16) >> 16) + (odd >> 16));
#endif
}

// sum += u8 . x. A macro, and no intrinsic: a cast or a reference of an array's element keeps GCC 12 from holding the
// array in registers.
#if defined(PAGELENS_ISA_AVX512_BF16)
  #define PAGELENS_ADD_DOTS(sum, u8, x) asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u8), "v"(x))
#else
  #define PAGELENS_ADD_DOTS(sum, u8, x) sum = plus_dots(sum, u8, x)
#endif

// The unsigned bytes of a word of weights: of int4 the low (p = 0), then the high halves.
template <Format F>
PAGELENS_INLINE vu unsigned_bytes(vu word, int p) {
  if (F == Format::int8) return word ^ 0x80808080u;
  return (p ? word >> 4 : word) & 0x0f0f0f0fu;
}

// sums [R][32] of one panel. kGrouped: weights have a scale for each group, not one a row. A leaf that is never
// inlined, with all loops in it and without std::min: inside larger code, where arrays are handed to a function, and
// where the address of a bound of the loops is taken, GCC 12 holds the sums in memory.
template <Format F, bool kGrouped, int R>
__attribute__((noinline)) void int8_panel(const PackedLinear& packed, const uint32_t* w, int64_t scale_at,
                                          const uint32_t* a, float* out) {
  constexpr int P = F == Format::int4 ? 2 : 1, NV = kInt8Vectors;
  const int64_t words = packed.groups();
  const int64_t a_group = int8_groups(packed) > 1 ? int8_group(packed) / packed.k_a_word() : words;
  const uint32_t* side = a + words * P * R;
  vf total[R][NV];
  PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++) total[r][v] = vf{};
  for (int64_t left = words; left > 0; left -= a_group, side += 2 * R) {
    const int64_t count = a_group < left ? a_group : left;
    vi sums[R][NV];
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++) sums[r][v] =
        static_cast<int32_t>(side[R + r]) - vi{};
    if constexpr (F == Format::int4 && R == 1) {
      // A decode step: high halves are multiplied where they lie, 16 times too large, and shifted once. Of every group
      // one line is fetched ahead, into the next 4 KiB, where the hardware's own fetching starts anew.
      if (kFetches) __builtin_prefetch(w + kFetchWords, 0, 2);
      vi high[NV];
      PAGELENS_UNROLL for (int v = 0; v < NV; v++) high[v] = vi{};
      for (int64_t i = 0; i < count; i++, w += kPanel, a += P) {
        const vu low_x = splat_bits(a[0]), high_x = splat_bits(a[1]);
        PAGELENS_UNROLL for (int v = 0; v < NV; v++) {
          const vu word = load_as<vu>(w + v * W), low_half = word & 0x0f0f0f0fu, high_half = word & 0xf0f0f0f0u;
          PAGELENS_ADD_DOTS(sums[0][v], low_half, low_x);
          PAGELENS_ADD_DOTS(high[v], high_half, high_x);
        }
      }
      PAGELENS_UNROLL for (int v = 0; v < NV; v++) sums[0][v] += high[v] >> 4;
    } else {
      for (int64_t i = 0; i < count; i++, w += kPanel, a += P * R) {
        if (kFetches && F == Format::int4)
          for (int line = 0; line < kPanel; line += 16) __builtin_prefetch(w + kFetchWords + line, 0, 2);
        PAGELENS_UNROLL for (int p = 0; p < P; p++) {
          vu b[NV];
          PAGELENS_UNROLL for (int v = 0; v < NV; v++) b[v] = unsigned_bytes<F>(load_as<vu>(w + v * W), p);
          PAGELENS_UNROLL for (int r = 0; r < R; r++) {
            const vu x = splat_bits(a[p * R + r]);
            PAGELENS_UNROLL for (int v = 0; v < NV; v++) PAGELENS_ADD_DOTS(sums[r][v], b[v], x);
          }
        }
      }
    }
    vf scale[NV];
    PAGELENS_UNROLL for (int v = 0; v < NV; v++) scale[v] = kGrouped ? scales_at(packed, scale_at + v * W) : vf{};
    PAGELENS_UNROLL for (int r = 0; r < R; r++) {
      const vf own = splat(load_as<float>(side + r));
      PAGELENS_UNROLL for (int v = 0; v < NV; v++) total[r][v] =
          fma(__builtin_convertvector(sums[r][v], vf), kGrouped ? scale[v] * own : own, total[r][v]);
    }
    if (kGrouped) scale_at += kPanel;
  }
  PAGELENS_UNROLL for (int v = 0; v < NV; v++) {
    const vf scale = kGrouped || !words ? splat(1.0f) : scales_at(packed, scale_at + v * W);
    PAGELENS_UNROLL for (int r = 0; r < R; r++) store(out + r * kPanel + v * W, total[r][v] * scale);
  }
}

using Int8PanelFn = void (*)(const PackedLinear& packed, const uint32_t* w, int64_t scale_at, const uint32_t* a,
                             float* out);

template <int R = kInt8TileRows>
inline Int8PanelFn int8_panel_fn(const PackedLinear& w, int rows) {
  if constexpr (R > 1)
    if (rows < R) return int8_panel_fn<R - 1>(w, rows);
  const bool grouped = w.scale_groups() > 1;
  if (w.format == Format::int4) return grouped ? int8_panel<Format::int4, true, R> : int8_panel<Format::int4, false, R>;
  return grouped ? int8_panel<Format::int8, true, R> : int8_panel<Format::int8, false, R>;
}

// a: the packed tiles of the block's rows.
template <class Epilogue>
inline void run_int8_block(const PackedLinear& w, const Block& b, const uint32_t* a, float* sums, Epilogue& epilogue) {
  const int64_t words = int8_row_words(w), tiles = ceil_div(b.rows, kInt8TileRows);
  for (int64_t panel = b.panel; panel < b.panel + b.panels; panel++)
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t r0 = tile_start(b.rows, tiles, t);
      const int R = static_cast<int>(tile_start(b.rows, tiles, t + 1) - r0);
      const Int8PanelFn run = int8_panel_fn(w, R);
      const uint32_t* weight = static_cast<const uint32_t*>(w.weight) + panel * w.panel_words();
      for (int v = 0; v < kPanel; v += kInt8Vectors * W)
        run(w, weight + v, panel * w.scale_groups() * kPanel + v, a + r0 * words, sums + v);
      epilogue(b, b.row + r0, R, panel, sums);
    }
}

}  // namespace pagelens::PAGELENS_ISA
