// 16 x 16 words turned in registers.
#pragma once
#include "common/simd.h"

#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
namespace pagelens::PAGELENS_ISA {

// Hands word i of all rows to put(i, words), once for each i < 16, in no special order.
template <class Put>
PAGELENS_INLINE void transpose_16(const __m512i (&rows)[16], Put&& put) {
  __m512i a[16], b[16];
  PAGELENS_UNROLL for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  PAGELENS_UNROLL for (int i = 0; i < 16; i += 4) PAGELENS_UNROLL for (int j = 0; j < 2; j++) {
    b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + 2 + j]);
    b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + 2 + j]);
  }
  // b[4q + c]: of rows 4q..4q+3 the words c, c + 4, c + 8, c + 12, one in each 128-bit lane
  PAGELENS_UNROLL for (int c = 0; c < 4; c++) {
    const __m512i even = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), odd = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
    const __m512i even2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88);
    const __m512i odd2 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
    put(c, _mm512_shuffle_i32x4(even, even2, 0x88));
    put(c + 4, _mm512_shuffle_i32x4(odd, odd2, 0x88));
    put(c + 8, _mm512_shuffle_i32x4(even, even2, 0xdd));
    put(c + 12, _mm512_shuffle_i32x4(odd, odd2, 0xdd));
  }
}

// Word i of row j becomes to[i * pitch + j].
PAGELENS_INLINE void transpose_16(const __m512i (&rows)[16], uint32_t* to, int64_t pitch) {
  transpose_16(rows, [&](int i, __m512i words) { _mm512_storeu_si512(to + i * pitch, words); });
}

}  // namespace pagelens::PAGELENS_ISA
#endif
