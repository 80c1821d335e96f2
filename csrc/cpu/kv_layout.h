// How a block of the paged KV-cache lies in memory: in the order in which attention reads it.
//
// A layer's keys are [num_blocks][num_kv_heads][block_size * head_dim] elements, and so are its values: the heads of a
// block lie one after another, so that a decode reads one long run. Within a head, elements of several tokens are
// interleaved. A word is 4 bytes: one float32, two bfloat16 or four int8.
//
// keys    groups of 16 tokens; in a group [word of the row][token], a word holding neighbours of one row: 16 scores
//         are the lanes of a vector, without a sum across lanes
// values  groups of as many tokens as a word has elements; in a group [column][token]
//
// The last group of a head has fewer tokens where block_size is no multiple; no element is added. All instruction sets
// have the same layout. An int8 cache has a float32 scale a row, [num_blocks][num_kv_heads][block_size]; a value is
// q * scale, q in -127..127. Values hold q, keys q + 128 (one factor of VPDPBUSD is unsigned). A row with a NaN or an
// infinity has the scale NaN.
#pragma once
#include <cmath>

#include "common/simd.h"

namespace pagelens::PAGELENS_ISA {

constexpr int64_t kKeyGroup = 16;
constexpr uint8_t kKeyOffset = 128;

template <class T>
constexpr int64_t kWordElements = static_cast<int64_t>(4 / sizeof(T));

// Where rows of one head in one block go. T: float, bf16 or uint8_t (int8).
template <class T>
struct KVBlock {
  static constexpr int64_t E = kWordElements<T>;
  int64_t block_size, num_heads, dim;  // dim is a multiple of E

  int64_t start(int64_t block, int64_t head) const { return (block * num_heads + head) * block_size * dim; }
  int64_t scale_at(int64_t block, int64_t head, int64_t token) const {
    return (block * num_heads + head) * block_size + token;
  }

  // Key of a token: word i of its row begins at element first + i * step, E elements long.
  struct Words {
    int64_t first, step;
  };
  Words key(int64_t token) const {
    const int64_t group = token / kKeyGroup * kKeyGroup;
    const int64_t width = block_size - group < kKeyGroup ? block_size - group : kKeyGroup;
    return {group * dim + (token - group) * E, width * E};
  }
  // Value of a token: column i of its row is element first + i * step.
  Words value(int64_t token) const {
    const int64_t group = token / E * E;
    const int64_t width = block_size - group < E ? block_size - group : E;
    return {group * dim + (token - group), width};
  }
};

template <class T>
PAGELENS_INLINE void put_key(T* head, const KVBlock<T>& block, int64_t token, const T* row) {
  const auto at = block.key(token);
  const int64_t words = block.dim / KVBlock<T>::E;
  for (int64_t i = 0; i < words; i++) std::memcpy(head + at.first + i * at.step, row + i * KVBlock<T>::E, 4);
}

// Only this row's elements are written: its neighbours in a word may be written by another thread.
template <class T>
PAGELENS_INLINE void put_value(T* head, const KVBlock<T>& block, int64_t token, const T* row) {
  const auto at = block.value(token);
  T* to = head + at.first;
  int64_t i = 0;
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  if (sizeof(T) == 2 && at.step == 2) {
    for (; i + 32 <= block.dim; i += 32)
      for (int64_t half = 0; half < 32; half += 16)
        _mm512_mask_storeu_epi16(to + (i + half) * 2, 0x55555555u,
                                 _mm512_cvtepu16_epi32(load_as<__m256i>(row + i + half)));
  }
#endif
  for (; i < block.dim; i++) to[i * at.step] = row[i];
}

PAGELENS_INLINE vf magnitude(vf x) { return (vf)((vu)x & 0x7fffffffu); }
PAGELENS_INLINE vi not_finite(vf magnitude) { return (magnitude > 3.4028234e38f) | (magnitude != magnitude); }

// Rounds a row of floats to int8 and returns its scale: the largest magnitude / 127, 0 if that magnitude is below
// 1e-30, or NaN.
PAGELENS_INLINE float quantize_row(const float* x, int64_t n, int8_t* q) {
  vf tops = vf{};
  vi bad = vi{};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf size = magnitude(load(x + i));
    bad |= not_finite(size);
    tops = larger(size, tops);
  }
  bool finite = !any_lane(bad);
  float largest = largest_lane(tops);
  for (; i < n; i++) {
    const float size = std::fabs(x[i]);
    finite &= size <= 3.4028234e38f;
    largest = size > largest ? size : largest;
  }
  if (!finite || largest < 1e-30f) {
    std::memset(q, 0, static_cast<size_t>(n));
    return finite ? 0.0f : __builtin_nanf("");
  }
  const float inverse = 127.0f / largest;
  for (i = 0; i < n; i++) {  // 1.5 * 2^23: rounds to the nearest integer, ties to even
    const float shifted = x[i] * inverse + 12582912.0f;
    q[i] = static_cast<int8_t>(shifted - 12582912.0f);
  }
  return largest / 127.0f;
}

}  // namespace pagelens::PAGELENS_ISA
