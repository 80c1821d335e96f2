// Relative positions of window_attention along one side of a window: products of queries with rows of a table.
//
// All queries of one grid row (or column) need the same rows of its table, one for each grid row (column) of keys. So
// the table lies in columns, last row first: the positions of a query are neighbours and ascend with the keys, and some
// queries are multiplied with vectors of positions in one tile.
#pragma once
#include <algorithm>

#include "cpu/attention_tile.h"

namespace pagelens::PAGELENS_ISA {

template <bool kPairs>
struct RelativeTable {
  int64_t size = 0;      // of the window's side
  int64_t head_dim = 0;  // of a row of the table
  int parts = 0;
  const float* columns = nullptr;  // [parts][words][reach]

  int64_t words() const { return kPairs ? (head_dim + 1) / 2 : head_dim; }
  // Positions of a query, as whole tiles of vectors: two or more vectors that are no full tile count as one.
  int64_t breadth() const {
    const int64_t vectors = (size + W - 1) / W, rest = vectors % kValueVectors;
    return (rest > 1 ? vectors + kValueVectors - rest : vectors) * W;
  }
  int64_t reach() const { return (size - 1 + breadth() + W - 1) / W * W; }
  int64_t packed_words() const { return 2 * words() * reach(); }

  // table: [2 * size - 1, head_dim]. Pairs hold it in two parts, value and rest, each rounded; the rest of a table that
  // was bfloat16 is zero and is left out.
  void pack(const float* table, uint32_t* to) {
    const int64_t width = reach(), rows = 2 * size - 1;
    std::fill(to, to + packed_words(), 0u);
    bool rest = false;
    for (int64_t r = 0; r < rows; r++) {
      const float* from = table + r * head_dim;
      uint32_t *high = to + rows - 1 - r, *low = high + words() * width;
      for (int64_t i = 0; i < head_dim; i++) {
        if constexpr (kPairs) {
          const bf16 value = narrow(from[i]), left = narrow(from[i] - widen(value));
          high[i / 2 * width] |= static_cast<uint32_t>(value) << i % 2 * 16;
          low[i / 2 * width] |= static_cast<uint32_t>(left) << i % 2 * 16;
          rest |= (left & 0x7fff) != 0;
        } else {
          std::memcpy(high + i * width, from + i, sizeof(float));
        }
      }
    }
    parts = rest ? 2 : 1;
    columns = reinterpret_cast<const float*>(to);
  }

  // to[i][k] = q[i] . table[place - k + size - 1], k < size, for `count` queries of one place; rows of q are `pitch`
  // apart, those of `to` `apart`. What follows in a row of `to`, up to the breadth, is written, too.
  void multiply(int64_t place, const uint32_t* q, int64_t pitch, int64_t count, float* to, int64_t apart) const {
    for (int part = 0; part < parts; part++) {
      const float* b = columns + part * words() * reach() + size - 1 - place;
      const auto tiles = [&](auto product_of, int64_t most, int64_t k) {
        const int64_t tiles = (count + most - 1) / most;
        for (int64_t t = 0; t < tiles; t++) {
          const int64_t i = count * t / tiles, n = count * (t + 1) / tiles - i;
          float* out = to + i * apart + k;
          product_of(static_cast<int>(n))(q + i * pitch, pitch, b + k, reach(), words(), part ? out : nullptr, out,
                                          apart);
        }
      };
      int64_t k = 0;
      for (; k + kValueVectors * W <= breadth(); k += kValueVectors * W)
        tiles([](int n) { return product_fn<kPairs, Product::rows, kQueriesATile, kValueVectors>(n); }, kQueriesATile,
              k);
      if (k < breadth())
        tiles([](int n) { return product_fn<kPairs, Product::rows, kRowsATile, 1>(n); }, kRowsATile, k);
    }
  }
};

}  // namespace pagelens::PAGELENS_ISA
