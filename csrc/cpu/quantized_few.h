// Products of a few rows with quantised weights: numbers go from the word to the multiplication within registers.
//
// The same sums in the same order as run_quantized_block, so the same bits: what differs is that nothing is unpacked to
// memory, and that two groups are summed side by side (a single chain of dot products waits for its own latency).
#pragma once
#include "cpu/quantized.h"

namespace pagelens::PAGELENS_ISA {

#ifdef PAGELENS_ISA_AVX512_BF16
constexpr int kFewRows = 4;

// Pair i (of 4 for int4, of 2 for the others) of each lane's word as two bfloat16.
template <Format F>
PAGELENS_INLINE vu pair_of(vu word, int i, [[maybe_unused]] __m512i table) {
  if constexpr (F == Format::int4) {
    return (vu)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)word, static_cast<unsigned>(4 * i)), table);
  } else {
    return (vu)number<F>(word, 2 * i) >> 16 | ((vu)number<F>(word, 2 * i + 1) & 0xffff0000u);
  }
}

// acc[g][r][half] = the sums of group g, `words` words long, of R rows. a: packed rows from the first group on.
template <Format F, int R, int G>
PAGELENS_INLINE void sum_groups(const uint32_t* a, const uint32_t* w, int64_t words, __m512i table,
                                vf (&acc)[G][R][2]) {
  constexpr int P = F == Format::int4 ? 4 : 2;
  PAGELENS_UNROLL for (int g = 0; g < G; g++) PAGELENS_UNROLL for (int r = 0; r < R; r++) acc[g][r][0] = acc[g][r][1] =
      vf{};
  for (int64_t i = 0; i < words; i++)
    PAGELENS_UNROLL for (int g = 0; g < G; g++) PAGELENS_UNROLL for (int h = 0; h < 2; h++) {
      const vu word = load_as<vu>(w + (g * words + i) * kPanel + h * W);
      const uint32_t* x = a + (g * words + i) * P * R;
      PAGELENS_UNROLL for (int p = 0; p < P; p++) {
        const vu b = pair_of<F>(word, p, table);
        PAGELENS_UNROLL for (int r = 0; r < R; r++) {
          const vu broadcast = splat_bits(load_as<uint32_t>(x + p * R + r));
          asm("vdpbf16ps %2, %1, %0" : "+v"(acc[g][r][h]) : "v"(broadcast), "v"(b));
        }
      }
    }
}

template <int R>
PAGELENS_INLINE void add_scaled(const PackedLinear& w, int64_t at, const float* sums_of_x, int64_t side, bool first,
                                const vf (&acc)[R][2], vf (&total)[R][2]) {
  PAGELENS_UNROLL for (int h = 0; h < 2; h++) {
    const vf scale = scales_at(w, at + h * W);
    vf zero = vf{};
    if (w.zeros) zero = (vf)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(load_as<__m256i>(w.zeros + at + h * W)));
    PAGELENS_UNROLL for (int r = 0; r < R; r++) {
      const vf part = w.zeros ? fma(zero, splat(-sums_of_x[r * side]), acc[r][h]) : acc[r][h];
      total[r][h] = fma(scale, part, first ? vf{} : total[r][h]);
    }
  }
}

// sums [R][32] of one panel.
template <Format F, int R>
__attribute__((noinline)) void few_rows_panel(const PackedLinear& w, int64_t panel, const uint32_t* a,
                                              const float* sides, float* sums) {
  constexpr int P = F == Format::int4 ? 4 : 2;
  const int64_t groups = w.scale_groups(), side = side_floats(w), sum_at = w.activation != ActivationFormat::plain;
  const int64_t words = w.group_size / w.k_a_word();  // of a whole group
  const uint32_t* weight = static_cast<const uint32_t*>(w.weight) + panel * w.panel_words();
  const __m512i table = F == Format::int4 ? int4_table() : __m512i{};
  vf total[R][2];
  PAGELENS_UNROLL for (int r = 0; r < R; r++) total[r][0] = total[r][1] = vf{};
  const auto add = [&](int64_t g, const vf(&acc)[R][2]) {
    add_scaled<R>(w, (panel * groups + g) * kPanel, sides + sum_at + g, side, g == 0, acc, total);
  };
  int64_t g = 0;
  for (; g + 2 < groups; g += 2) {
    vf acc[2][R][2];
    sum_groups<F, R, 2>(a + g * words * P * R, weight + g * words * kPanel, words, table, acc);
    add(g, acc[0]);
    add(g + 1, acc[1]);
  }
  for (; g < groups; g++) {  // the last one may be shorter
    vf acc[1][R][2];
    const int64_t rest = g + 1 == groups ? w.groups() - g * words : words;
    sum_groups<F, R, 1>(a + g * words * P * R, weight + g * words * kPanel, rest, table, acc);
    add(g, acc[0]);
  }
  PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int h = 0; h < 2; h++) {
    if (w.activation != ActivationFormat::plain) total[r][h] = total[r][h] * sides[r * side];
    store(sums + r * kPanel + h * W, total[r][h]);
  }
}

template <Format F>
PAGELENS_INLINE void few_rows_panel(const PackedLinear& w, int rows, int64_t panel, const uint32_t* a,
                                    const float* sides, float* sums) {
  switch (rows) {
    case 1:
      return few_rows_panel<F, 1>(w, panel, a, sides, sums);
    case 2:
      return few_rows_panel<F, 2>(w, panel, a, sides, sums);
    case 3:
      return few_rows_panel<F, 3>(w, panel, a, sides, sums);
    default:
      return few_rows_panel<F, 4>(w, panel, a, sides, sums);
  }
}

PAGELENS_INLINE bool runs_few_rows(const PackedLinear& w, int64_t rows) {
  return rows <= kFewRows && tile_dtype(w) == DType::bf16 && w.k > 0;
}

template <class Epilogue>
inline void run_few_rows_block(const PackedLinear& w, const Block& b, const uint32_t* a, const float* sides,
                               float* sums, Epilogue& epilogue) {
  for (int64_t panel = b.panel; panel < b.panel + b.panels; panel++) {
    if (w.format == Format::int4) {
      few_rows_panel<Format::int4>(w, b.rows, panel, a, sides, sums);
    } else if (w.format == Format::int8) {
      few_rows_panel<Format::int8>(w, b.rows, panel, a, sides, sums);
    } else {
      few_rows_panel<Format::fp8>(w, b.rows, panel, a, sides, sums);
    }
    epilogue(b, b.row, b.rows, panel, sums);
  }
}
#else
PAGELENS_INLINE bool runs_few_rows(const PackedLinear&, int64_t) { return false; }
template <class Epilogue>
inline void run_few_rows_block(const PackedLinear&, const Block&, const uint32_t*, const float*, float*, Epilogue&) {}
#endif

}  // namespace pagelens::PAGELENS_ISA
