// Products with quantised weights: values are unpacked to whole numbers (exact in bfloat16), a tile multiplies them,
// and each group's sums are scaled into the totals.
//
// Every output is sum over g upwards of scale_g * (sum over k upwards of x_k q_k - zero_g * X_g), X_g = the sum of x in
// the group: one order for any number of rows, so batch invariance holds as for plain weights.
#pragma once
#include <algorithm>
#include <cmath>

#include "cpu/tile.h"

namespace pagelens::PAGELENS_ISA {

constexpr float kSmallestScale = 0x1p-126f;  // of activations: smaller ones count as 0
constexpr int64_t kSlab = 128;               // of K unpacked at a time: at most 16 KB, which stay in the first cache

// Floats that a quantised weight wants beside a packed row: its scale if activations are quantised, then each X_g.
PAGELENS_INLINE int64_t side_floats(const PackedLinear& w) {
  return (w.activation != ActivationFormat::plain ? 1 : 0) + (w.zeros ? w.scale_groups() : 0);
}
PAGELENS_INLINE int64_t quantized_scratch(int64_t rows) { return 2 * rows * kPanel + kSlab * kPanel; }

// ---- one word of a panel as numbers --------------------------------------------------------------------------------
// Number i (0..7 of int4, 0..3 of the others) of each lane's word, see kernels.h.
template <Format F>
PAGELENS_INLINE vf number(vu word, int i) {
  if constexpr (F == Format::int4) {
    const vi q = (vi)(word >> (4 * (i / 2) + 16 * (i % 2)) & 15u);
    return __builtin_convertvector(q, vf) - 8.0f;
  } else if constexpr (F == Format::int8) {
    const int shift = 24 - 8 * (i / 2) - 16 * (i % 2);
    return __builtin_convertvector((vi)(word << shift) >> 24, vf);
  } else {
    // E4M3: the exponent moves from bias 7 to 127. Below 2^-6 the number is m * 2^-9, computed without subnormals,
    // which a host may have switched off.
    const vu byte = word >> (8 * (i / 2) + 16 * (i % 2));
    const vf normal = (vf)(((byte & 0x7fu) << 20) + (120u << 23));
    const vf small = (normal - 0.0078125f) * 2.0f;
    const vf size = ((byte & 0x78u) == 0u) ? small : normal;
    return (vf)((vu)size | (byte & 0x80u) << 24);
  }
}

// k0..k1 (multiples of the numbers in a word) of a panel -> floats [k1-k0][32].
template <Format F>
inline void unpack_floats(const uint32_t* words, int64_t count, float* to) {
  constexpr int N = F == Format::int4 ? 8 : 4;
  for (int64_t g = 0; g < count; g++, words += kPanel, to += N * kPanel)
    for (int v = 0; v < kPanel; v += W) {
      const vu word = load_as<vu>(words + v);
      PAGELENS_UNROLL for (int i = 0; i < N; i++) store(to + i * kPanel + v, number<F>(word, i));
    }
}

#ifdef PAGELENS_ISA_AVX512_BF16
// The bfloat16 of q - 8 for the lower 4 bits of a lane; bit 4, which belongs to the next number, must not matter.
PAGELENS_INLINE __m512i int4_table() {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; i++) table[i] = narrow(static_cast<float>(i % 16 - 8));
  return _mm512_load_si512(table);
}

// The same as pairs of bfloat16 [(k1-k0)/2][32].
template <Format F>
inline void unpack_pairs(const uint32_t* words, int64_t count, uint32_t* to) {
  if constexpr (F == Format::int4) {
    const __m512i table = int4_table();
    for (int64_t g = 0; g < count; g++, words += kPanel, to += 4 * kPanel)
      for (int v = 0; v < kPanel; v += W) {
        const __m512i word = _mm512_loadu_si512(words + v);
        _mm512_storeu_si512(to + v, _mm512_permutexvar_epi16(word, table));
        _mm512_storeu_si512(to + kPanel + v, _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4), table));
        _mm512_storeu_si512(to + 2 * kPanel + v, _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 8), table));
        _mm512_storeu_si512(to + 3 * kPanel + v, _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 12), table));
      }
  } else {
    for (int64_t g = 0; g < count; g++, words += kPanel, to += 2 * kPanel)
      for (int v = 0; v < kPanel; v += W) {
        const vu word = load_as<vu>(words + v);
        PAGELENS_UNROLL for (int i = 0; i < 2; i++) {
          const vu pair = (vu)number<F>(word, 2 * i) >> 16 | ((vu)number<F>(word, 2 * i + 1) & 0xffff0000u);
          std::memcpy(to + i * kPanel + v, &pair, sizeof pair);
        }
      }
  }
}
#endif

template <Format F>
inline void unpack(DType tile, const uint32_t* words, int64_t count, uint32_t* slab) {
#ifdef PAGELENS_ISA_AVX512_BF16
  if (tile == DType::bf16) {
    unpack_pairs<F>(words, count, slab);
    return;
  }
#endif
  (void)tile;
  unpack_floats<F>(words, count, reinterpret_cast<float*>(slab));
}

PAGELENS_INLINE void unpack(const PackedLinear& w, int64_t panel, int64_t k0, int64_t k1, uint32_t* slab) {
  const int64_t a_word = w.k_a_word(), first = k0 / a_word, last = std::min(ceil_div(k1, a_word), w.groups());
  const uint32_t* words = static_cast<const uint32_t*>(w.weight) + panel * w.panel_words() + first * kPanel;
  const DType tile = tile_dtype(w);
  if (w.format == Format::int4) {
    unpack<Format::int4>(tile, words, last - first, slab);
  } else if (w.format == Format::int8) {
    unpack<Format::int8>(tile, words, last - first, slab);
  } else {
    unpack<Format::fp8>(tile, words, last - first, slab);
  }
}

// ---- scales --------------------------------------------------------------------------------------------------------
PAGELENS_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest < 0x400u) return (sign ? -1.0f : 1.0f) * static_cast<float>(rest) * 5.9604644775390625e-8f;  // 2^-24
  const uint32_t bias = (rest < 0x7c00u ? 127u - 15u : 255u - 31u) << 23;  // infinity and NaN stay what they are
  const uint32_t bits = sign | ((rest << 13) + bias);
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// One vector of scales from element `at` on.
PAGELENS_INLINE vf scales_at(const PackedLinear& w, int64_t at) {
  if (w.scale_dtype == DType::f32) return load(static_cast<const float*>(w.scales) + at);
  if (w.scale_dtype == DType::bf16) return load(static_cast<const bf16*>(w.scales) + at);
  const uint16_t* halves = static_cast<const uint16_t*>(w.scales) + at;
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  return (vf)_mm512_cvtph_ps(load_as<__m256i>(halves));
#else
  vf scales;
  for (int i = 0; i < W; i++) scales[i] = half_to_float(halves[i]);
  return scales;
#endif
}

// The 32 scales of group g of a panel.
PAGELENS_INLINE void load_scales(const PackedLinear& w, int64_t panel, int64_t g, float* to) {
  const int64_t at = (panel * w.scale_groups() + g) * kPanel;
  for (int v = 0; v < kPanel; v += W) store(to + v, scales_at(w, at + v));
}

// ---- activations ---------------------------------------------------------------------------------------------------
PAGELENS_INLINE float round_to_fp8(float x) {
  if (std::isnan(x)) return x;  // adding the rounding term could turn it into a zero
  if (std::fabs(x) < 0.015625f) return std::nearbyint(x * 512.0f) * 0.001953125f;  // below 2^-6: steps of 2^-9
  uint32_t u;
  std::memcpy(&u, &x, 4);
  u = (u + 0x7ffffu + (u >> 20 & 1u)) & ~0xfffffu;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// x in units of `scale`, on the grid of the format.
PAGELENS_INLINE float quantize_activation(float x, float scale, ActivationFormat format) {
  if (format == ActivationFormat::plain) return x;
  const float most = format == ActivationFormat::int8 ? 127.0f : 448.0f;
  const float y = std::min(std::max(x / scale, -most), most);
  return format == ActivationFormat::int8 ? std::nearbyint(y) : round_to_fp8(y);
}

template <class T>
inline void pack_quantized_row(const T* x, const PackedLinear& w, int R, uint32_t* to, float* side) {
  float scale = 1.0f;
  if (w.activation != ActivationFormat::plain) {
    float largest = 0.0f;
    for (int64_t i = 0; i < w.k; i++) largest = std::max(largest, std::fabs(get(x + i)));
    const float step = largest / (w.activation == ActivationFormat::int8 ? 127.0f : 448.0f);
    if (step >= kSmallestScale) scale = step;
    *side++ = scale;
  }
  const bool pairs = tile_dtype(w) == DType::bf16;
  const int64_t padded = (w.k + 7) / 8 * 8;
  float sum = 0.0f;
  uint32_t low = 0;
  for (int64_t i = 0; i < padded; i++) {
    const float value = i < w.k ? quantize_activation(get(x + (w.order ? w.order[i] : i)), scale, w.activation) : 0.0f;
    if (w.zeros && i < w.k) {
      sum += value;
      if ((i + 1) % w.group_size == 0 || i + 1 == w.k) side[i / w.group_size] = sum, sum = 0.0f;
    }
    if (!pairs) {
      std::memcpy(to + i * R, &value, 4);
    } else if (i % 2 == 0) {
      low = narrow(value);
    } else {
      to[i / 2 * R] = low | static_cast<uint32_t>(narrow(value)) << 16;
    }
  }
}

PAGELENS_INLINE void pack_quantized_tile(const Source& x, const PackedLinear& w, int64_t row, int R, uint32_t* to,
                                         float* sides) {
  for (int r = 0; r < R; r++, sides += side_floats(w)) {
    if (x.dtype == DType::f32) {
      pack_quantized_row(static_cast<const float*>(x.row(row + r)), w, R, to + r, sides);
    } else {
      pack_quantized_row(static_cast<const bf16*>(x.row(row + r)), w, R, to + r, sides);
    }
  }
}

// ---- the product ---------------------------------------------------------------------------------------------------
// total[r] (+)= scale * (acc[r] - zero * X_g of row r).
PAGELENS_INLINE void add_group(const PackedLinear& w, int64_t panel, int64_t g, int64_t rows, const float* acc,
                               const float* sides, float* total) {
  float scale[kPanel], zero[kPanel];
  load_scales(w, panel, g, scale);
  if (w.zeros)
    for (int c = 0; c < kPanel; c++) zero[c] = w.zeros[(panel * w.scale_groups() + g) * kPanel + c];
  const int64_t side = side_floats(w), sum_at = (w.activation != ActivationFormat::plain ? 1 : 0) + g;
  for (int64_t r = 0; r < rows; r++)
    for (int v = 0; v < kPanel; v += W) {
      vf part = load(acc + r * kPanel + v);
      if (w.zeros) part = fma(load(zero + v), splat(-sides[r * side + sum_at]), part);
      const vf before = g ? load(total + r * kPanel + v) : vf{};
      store(total + r * kPanel + v, fma(load(scale + v), part, before));
    }
}

template <class Epilogue>
inline void run_quantized_block(const PackedLinear& w, const Block& b, const uint32_t* a, const float* sides,
                                float* scratch, Epilogue& epilogue) {
  const int64_t words = words_a_row(w), tiles = ceil_div(b.rows, kMaxTileRows), padded = (w.k + 7) / 8 * 8;
  const DType tile = tile_dtype(w);
  const int64_t k_a_step = tile == DType::bf16 ? 2 : 1;  // of K in one word of packed activations
  float* total = scratch;
  float* acc = total + b.rows * kPanel;
  uint32_t* slab = reinterpret_cast<uint32_t*>(acc + b.rows * kPanel);
  for (int64_t panel = b.panel; panel < b.panel + b.panels; panel++) {
    if (w.k == 0) std::memset(total, 0, static_cast<size_t>(b.rows * kPanel) * 4);
    for (int64_t g = 0; g < w.scale_groups(); g++) {
      const int64_t first = g * w.group_size, end = g + 1 == w.scale_groups() ? padded : first + w.group_size;
      for (int64_t k0 = first; k0 < end; k0 += kSlab) {
        // A word of 4 numbers may end before the padding of the activations, which is made for words of 8.
        const int64_t k1 = std::min({k0 + kSlab, end, w.groups() * w.k_a_word()});
        unpack(w, panel, k0, k1, slab);
        for (int64_t t = 0; t < tiles; t++) {
          const int64_t r0 = tile_start(b.rows, tiles, t);
          const int R = static_cast<int>(tile_start(b.rows, tiles, t + 1) - r0);
          tile_fn(tile, R)(a + r0 * words + k0 / k_a_step * R, slab, (k1 - k0) / k_a_step, acc + r0 * kPanel,
                           k0 == first, {slab, 0});
        }
      }
      add_group(w, panel, g, b.rows, acc, sides, total);
    }
    for (int64_t t = 0; t < tiles; t++) {
      const int64_t r0 = tile_start(b.rows, tiles, t);
      const int R = static_cast<int>(tile_start(b.rows, tiles, t + 1) - r0);
      if (w.activation != ActivationFormat::plain)
        for (int64_t r = r0; r < r0 + R; r++)
          for (int v = 0; v < kPanel; v += W)
            store(total + r * kPanel + v, load(total + r * kPanel + v) * sides[r * side_floats(w)]);
      epilogue(b, b.row + r0, R, panel, total + r0 * kPanel);
    }
  }
}

}  // namespace pagelens::PAGELENS_ISA
