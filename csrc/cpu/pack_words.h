// Rows of 4-byte words side by side, as the tiles of cpu/tile.h take them.
#pragma once
#include "cpu/transpose.h"

namespace pagelens::PAGELENS_ISA {

// to[i * R + r] = word i of rows[r] for i < words; R is at most 16.
inline void pack_words(const void* const* rows, int R, int64_t words, uint32_t* to) {
  int64_t first = 0;
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  const __mmask16 own = static_cast<__mmask16>((1u << R) - 1u);
  for (; first + 16 <= words; first += 16) {
    __m512i x[16];
    PAGELENS_UNROLL for (int r = 0; r < 16; r++) x[r] =
        _mm512_loadu_si512(static_cast<const uint32_t*>(rows[r < R ? r : R - 1]) + first);
    transpose_16(x, [&](int i, __m512i word) { _mm512_mask_storeu_epi32(to + (first + i) * R, own, word); });
  }
#endif
  for (int r = 0; r < R; r++) {
    const char* row = static_cast<const char*>(rows[r]);
    for (int64_t i = first; i < words; i++) to[i * R + r] = load_as<uint32_t>(row + 4 * i);
  }
}

}  // namespace pagelens::PAGELENS_ISA
