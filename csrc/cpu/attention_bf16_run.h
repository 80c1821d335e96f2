// Bfloat16 attention over the paged cache: which rows and keys an item has, on the block kernel of attention_bf16.h.
//
// Many query rows of a sequence: an item is 32 of them with one key/value head, and walks all keys. Few rows
// (decoding): an item is one chunk of keys with some heads, and what the items of a sequence found is merged
// afterwards.
#pragma once
#include <algorithm>
#include <utility>

#include "cpu/attention_bf16.h"
#include "cpu/parallel.h"

#ifdef PAGELENS_ISA_AVX512_BF16
namespace pagelens::PAGELENS_ISA {

constexpr int64_t kTileQueries = 32;
constexpr int64_t kFewQueries = 4;

struct Bf16Attention {
  const AttentionArgs& a;
  int64_t group = a.num_heads / a.num_kv_heads;
  int64_t dim = a.head_dim;

  int64_t queries(int64_t s) const { return a.query_starts[s + 1] - a.query_starts[s]; }
  // Position of query row `row` of a sequence.
  int64_t position(int64_t s, int64_t row) const { return a.context_lens[s] - queries(s) + row; }

  // What one item works on, in scratch of `floats(rows)` floats: rows of query vectors and their running softmax.
  struct Tile {
    uint32_t *q, *turned, *paired, *high, *low;
    float *o, *p, *largest, *sum;
  };
  int64_t floats(int64_t rows) const { return rows * (dim / 2 + dim + 2) + kBlockKeys * dim + 6 * (kBlockKeys + 32); }
  Tile tile(float* at, int64_t rows) const {
    const auto take = [&](int64_t count) { return std::exchange(at, at + count); };
    const auto words = [&](int64_t count) { return reinterpret_cast<uint32_t*>(take(count)); };
    Tile t;
    t.turned = words(dim / 2 * kBlockKeys);
    t.paired = words(kPairs * dim);
    t.high = words(6 * kPairs);
    t.low = words(6 * kPairs);
    t.p = take(6 * kBlockKeys);
    t.q = words(rows * dim / 2);
    t.o = take(rows * dim);
    t.largest = take(rows);
    t.sum = take(rows);
    return t;
  }

  const bf16* query(int64_t s, int64_t row, int64_t head) const {
    return static_cast<const bf16*>(a.q.data) + (a.query_starts[s] + row) * a.q.stride + head * dim;
  }

  // Rows of the 32 keys from `start` on, null where the sequence has none.
  void find_rows(int64_t s, int64_t start, int64_t kv_head, const bf16** keys, const bf16** values) const {
    const int32_t* block = a.block_tables + s * a.max_blocks + start / a.block_size;
    int64_t offset = start % a.block_size;
    const int64_t count = std::min(a.context_lens[s] - start, kBlockKeys), step = a.num_kv_heads * dim;
    int64_t t = 0;
    while (t < count) {
      const int64_t run = std::min(count - t, a.block_size - offset);
      const int64_t at = ((*block * a.block_size + offset) * a.num_kv_heads + kv_head) * dim;
      const bf16* key = static_cast<const bf16*>(a.keys) + at;
      const bf16* value = static_cast<const bf16*>(a.values) + at;
      for (int64_t i = 0; i < run; i++, t++, key += step, value += step) keys[t] = key, values[t] = value;
      block++, offset = 0;
    }
    for (; t < kBlockKeys; t++) keys[t] = values[t] = nullptr;
  }

  void load_block(int64_t s, int64_t start, int64_t kv_head, const Tile& t) const {
    const bf16 *keys[kBlockKeys], *values[kBlockKeys];
    find_rows(s, start, kv_head, keys, values);
    turn_keys(keys, dim, t.turned);
    pair_values(values, dim, t.paired);
  }

  // Short runs far apart, which the hardware does not fetch ahead.
  void prefetch(int64_t s, int64_t start, int64_t kv_head) const {
    const bf16 *keys[kBlockKeys], *values[kBlockKeys];
    find_rows(s, start, kv_head, keys, values);
    for (int64_t t = 0; t < kBlockKeys && keys[t]; t++)
      for (int64_t i = 0; i < dim; i += 32)
        __builtin_prefetch(keys[t] + i, 0, 2), __builtin_prefetch(values[t] + i, 0, 2);
  }

  // R rows that all see the first n keys of the block.
  template <int R>
  void step(const Tile& t, int64_t row, int64_t n) const {
    score_rows<R>(t.q + row * dim / 2, t.turned, dim / 2, a.scale, t.p);
    for (int r = 0; r < R; r++)
      soften_block(t.p + r * kBlockKeys, n, t.o + (row + r) * dim, dim, t.largest + row + r, t.sum + row + r,
                   t.high + r * kPairs, t.low + r * kPairs);
    add_all_pairs<R>(t.high, t.low, t.paired, n / 2, dim, t.o + row * dim);
    if (n % 2) add_odd<R>(t, row, n / 2);
  }

  // The same where no other rows read the block: values go straight from the cache to the product.
  template <int R>
  void step_alone(const Tile& t, int64_t row, int64_t n, const bf16* const* values) const {
    score_rows<R>(t.q + row * dim / 2, t.turned, dim / 2, a.scale, t.p);
    for (int r = 0; r < R; r++)
      soften_block(t.p + r * kBlockKeys, n, t.o + (row + r) * dim, dim, t.largest + row + r, t.sum + row + r,
                   t.high + r * kPairs, t.low + r * kPairs);
    float* o = t.o + row * dim;
    dim == 128 ? add_rows<R, 8>(t.high, t.low, values, n / 2, dim, o)
               : add_rows<R, 4>(t.high, t.low, values, n / 2, dim, o);
    if (n % 2 == 0) return;
    for (int64_t i = 0; i < dim; i += 32) {  // the last key's words, as pair_values makes them
      const __m512i x = _mm512_loadu_si512(values[n - 1] + i), nothing = _mm512_setzero_si512();
      _mm512_storeu_si512(t.paired + (n / 2) * dim + i, _mm512_unpacklo_epi16(x, nothing));
      _mm512_storeu_si512(t.paired + (n / 2) * dim + i + 16, _mm512_unpackhi_epi16(x, nothing));
    }
    add_odd<R>(t, row, n / 2);
  }

  bool runs_alone(int64_t s) const { return queries(s) == 1 && group <= 3 && (dim == 64 || dim == 128); }

  void run_alone(int64_t s, int64_t start, int64_t kv_head, int64_t row, const Tile& t) const {
    const bf16 *keys[kBlockKeys], *values[kBlockKeys];
    find_rows(s, start, kv_head, keys, values);
    turn_keys(keys, dim, t.turned);
    const int64_t n = std::min(position(s, 0) - start + 1, kBlockKeys);
    if (group == 1) {
      step_alone<1>(t, row, n, values);
    } else if (group == 2) {
      step_alone<2>(t, row, n, values);
    } else {
      step_alone<3>(t, row, n, values);
    }
  }

  // The last key without its neighbour, which is not to be seen: a NaN there must not come in as 0 times NaN.
  template <int R>
  void add_odd(const Tile& t, int64_t row, int64_t pair) const {
    uint32_t alone[kMaxOddDim];
    for (int64_t i = 0; i < dim; i++) alone[i] = t.paired[pair * dim + i] & 0xffffu;
    uint32_t high[R * kPairs], low[R * kPairs];
    for (int r = 0; r < R; r++)
      high[r * kPairs] = t.high[r * kPairs + pair], low[r * kPairs] = t.low[r * kPairs + pair];
    add_all_pairs<R>(high, low, alone, 1, dim, t.o + row * dim);
  }
  static constexpr int64_t kMaxOddDim = 512;

  // Rows first..first+count of the tile, all of which see n keys.
  void steps(const Tile& t, int64_t first, int64_t count, int64_t n) const {
    int64_t row = first;
    for (; row + 3 <= first + count; row += 3) step<3>(t, row, n);
    if (first + count - row == 2) step<2>(t, row, n);
    if (first + count - row == 1) step<1>(t, row, n);
  }

  void clear(const Tile& t, int64_t rows) const {
    std::memset(t.o, 0, static_cast<size_t>(rows * dim) * 4);
    for (int64_t r = 0; r < rows; r++) t.largest[r] = -__builtin_inff(), t.sum[r] = 0.0f;
  }

  void put_row(int64_t s, int64_t row, int64_t head, const float* o, float sum) const {
    bf16* out = static_cast<bf16*>(a.out.data) + (a.query_starts[s] + row) * a.out.stride + head * dim;
    for (int64_t i = 0; i < dim; i += 32) {
      vf first, second;
      ordered(o + i, &first, &second);
      store(out + i, first / sum);
      store(out + i + W, second / sum);
    }
  }

  // ---- many rows
  // The tile's rows are query row * group + head of the group; behind them, `all` holds what the chunks before gave.
  void run_tile(int64_t s, int64_t first, int64_t count, int64_t kv_head, const Tile& t, const Tile& all) const {
    const int64_t rows = count * group, last = position(s, first + count - 1);
    for (int64_t r = 0; r < rows; r++)
      std::memcpy(t.q + r * dim / 2, query(s, first + r / group, kv_head * group + r % group),
                  static_cast<size_t>(dim) * 2);
    clear(all, rows);
    for (int64_t chunk = 0; chunk <= last; chunk += kChunk) {
      clear(t, rows);
      for (int64_t start = chunk; start <= last && start < chunk + kChunk; start += kBlockKeys) {
        load_block(s, start, kv_head, t);
        if (start + kBlockKeys <= last) prefetch(s, start + kBlockKeys, kv_head);
        run_rows(s, first, count, start, t);
      }
      for (int64_t r = 0; r < rows; r++)
        if (position(s, first + r / group) >= chunk)
          merge_chunk(t.o + r * dim, t.largest[r], t.sum[r], dim, all.o + r * dim, all.largest + r, all.sum + r);
    }
    for (int64_t r = 0; r < rows; r++)
      put_row(s, first + r / group, kv_head * group + r % group, all.o + r * dim, all.sum[r]);
  }

  // A block for all rows: those that see all of it together, the others query row by query row.
  void run_rows(int64_t s, int64_t first, int64_t count, int64_t start, const Tile& t) const {
    int64_t row = 0;
    for (; row < count; row++) {
      const int64_t n = position(s, first + row) - start + 1;
      if (n >= kBlockKeys) break;
      if (n > 0) steps(t, row * group, group, n);
    }
    if (row < count) steps(t, row * group, (count - row) * group, kBlockKeys);
  }

  // ---- few rows
  struct Part {
    int64_t sequence, chunk, first_head, heads;  // key/value heads
  };
  int64_t partial_floats() const { return dim + 2; }

  // A chunk of keys for all query rows of a sequence; results [heads * group][queries] of (o, largest, sum).
  void run_part(const Part& part, const Tile& t, float* results) const {
    const int64_t s = part.sequence, n = queries(s), each = group * n, rows = part.heads * each;
    for (int64_t r = 0; r < rows; r++)
      std::memcpy(t.q + r * dim / 2, query(s, r % n, part.first_head * group + r / n), static_cast<size_t>(dim) * 2);
    clear(t, rows);
    const int64_t begin = part.chunk * kChunk, end = std::min<int64_t>(begin + kChunk, a.context_lens[s]);
    for (int64_t start = begin; start < end; start += kBlockKeys)
      for (int64_t h = 0; h < part.heads; h++) {
        if (h + 1 < part.heads) {
          prefetch(s, start, part.first_head + h + 1);
        } else if (start + kBlockKeys < end) {
          prefetch(s, start + kBlockKeys, part.first_head);
        }
        if (runs_alone(s)) {
          run_alone(s, start, part.first_head + h, h * each, t);
          continue;
        }
        load_block(s, start, part.first_head + h, t);
        run_queries(s, start, h * each, t);
      }
    for (int64_t r = 0; r < rows; r++, results += partial_floats()) {
      std::memcpy(results, t.o + r * dim, static_cast<size_t>(dim) * 4);
      results[dim] = t.largest[r];
      results[dim + 1] = t.sum[r];
    }
  }

  // The rows of one key/value head from `row` on: head of the group * queries + query row.
  void run_queries(int64_t s, int64_t start, int64_t row, const Tile& t) const {
    const int64_t n = queries(s);
    if (n == 1) {
      steps(t, row, group, std::min(position(s, 0) - start + 1, kBlockKeys));
      return;
    }
    for (int64_t r = 0; r < group * n; r++) {
      const int64_t seen = std::min(position(s, r % n) - start + 1, kBlockKeys);
      if (seen > 0) step<1>(t, row + r, seen);
    }
  }

  // Row r of a sequence (head * queries + query row) from its chunks, which lie `stride` floats apart.
  void merge_row(int64_t s, int64_t r, const float* results, int64_t stride, float* o) const {
    const int64_t n = queries(s), own = position(s, r % n);
    std::memset(o, 0, static_cast<size_t>(dim) * 4);
    float largest = -__builtin_inff(), sum = 0.0f;
    for (int64_t chunk = 0; chunk * kChunk <= own; chunk++, results += stride)
      merge_chunk(results, results[dim], results[dim + 1], dim, o, &largest, &sum);
    put_row(s, r % n, r / n, o, sum);
  }
};

inline int64_t chunks_of(const AttentionArgs& a, int64_t s) { return (a.context_lens[s] + kChunk - 1) / kChunk; }

// Sequences with few query rows, all together.
inline void run_few(ThreadPool& pool, const Bf16Attention& attention) {
  const AttentionArgs& a = attention.a;
  // Of each sequence: parts and result floats before it, and query rows before it.
  int64_t* before = pool.shared<int64_t>(1, 3 * (a.num_sequences + 1));
  int64_t chunks = 0, most_rows = 0;
  const auto is_few = [&](int64_t s) { return attention.queries(s) > 0 && attention.queries(s) <= kFewQueries; };
  for (int64_t s = 0; s < a.num_sequences; s++) chunks += is_few(s) ? chunks_of(a, s) : 0;
  if (chunks == 0) return;
  // Heads are shared out, too, where there are few chunks.
  const int64_t wanted = 4 * pool.num_threads();
  const int64_t splits = pool.num_threads() == 1 ? 1 : std::min(a.num_kv_heads, (wanted + chunks - 1) / chunks);
  before[0] = before[1] = before[2] = 0;
  for (int64_t s = 0; s < a.num_sequences; s++) {
    const int64_t n = attention.queries(s), rows = n * a.num_heads;
    const bool few = is_few(s);
    before[3 * s + 3] = before[3 * s] + (few ? chunks_of(a, s) * splits : 0);
    before[3 * s + 4] = before[3 * s + 1] + (few ? chunks_of(a, s) * rows * attention.partial_floats() : 0);
    before[3 * s + 5] = before[3 * s + 2] + (few ? rows : 0);
    if (few) most_rows = std::max(most_rows, rows);
  }
  const int64_t* total = before + 3 * a.num_sequences;
  float* results = pool.shared<float>(2, total[1]);
  pool.reserve_local(static_cast<size_t>(attention.floats(most_rows)) * 4);
  const auto sequence_of = [&](int64_t i, int column) {  // the last sequence with before[column] <= i
    int64_t low = 0, high = a.num_sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (before[3 * middle + column] <= i ? low : high) = middle;
    }
    return low;
  };
  pool.run(total[0], [&](int64_t i, int thread) {
    const int64_t s = sequence_of(i, 0), own = i - before[3 * s], split = own % splits;
    const int64_t first = a.num_kv_heads * split / splits, end = a.num_kv_heads * (split + 1) / splits;
    const int64_t rows = attention.queries(s) * a.num_heads;
    float* to = results + before[3 * s + 1] +
                (own / splits * rows + first * attention.group * attention.queries(s)) * attention.partial_floats();
    attention.run_part({s, own / splits, first, end - first},
                       attention.tile(static_cast<float*>(pool.local(thread)), most_rows), to);
  });
  for_rows(pool, total[2], 4 * a.head_dim, [&](int64_t i) {
    const int64_t s = sequence_of(i, 2), r = i - before[3 * s + 2], rows = attention.queries(s) * a.num_heads;
    float o[Bf16Attention::kMaxOddDim];
    attention.merge_row(s, r, results + before[3 * s + 1] + r * attention.partial_floats(),
                        rows * attention.partial_floats(), o);
  });
}

// Sequences with many query rows.
inline void run_many(ThreadPool& pool, const Bf16Attention& attention) {
  const AttentionArgs& a = attention.a;
  int64_t* first_item = pool.shared<int64_t>(1, a.num_sequences + 1);
  first_item[0] = 0;
  for (int64_t s = 0; s < a.num_sequences; s++) {
    const int64_t n = attention.queries(s), tiles = (n + kTileQueries - 1) / kTileQueries;
    first_item[s + 1] = first_item[s] + (n > kFewQueries ? tiles * a.num_kv_heads : 0);
  }
  const int64_t rows = kTileQueries * attention.group, floats = attention.floats(rows);
  if (first_item[a.num_sequences] == 0) return;
  pool.reserve_local(static_cast<size_t>(2 * floats) * 4);
  pool.run(first_item[a.num_sequences], [&](int64_t i, int thread) {
    int64_t s = 0, high = a.num_sequences;
    while (high - s > 1) {
      const int64_t middle = (s + high) / 2;
      (first_item[middle] <= i ? s : high) = middle;
    }
    const int64_t own = i - first_item[s], first = own / a.num_kv_heads * kTileQueries;
    float* scratch = static_cast<float*>(pool.local(thread));
    attention.run_tile(s, first, std::min(kTileQueries, attention.queries(s) - first), own % a.num_kv_heads,
                       attention.tile(scratch, rows), attention.tile(scratch + floats, rows));
  });
}

}  // namespace pagelens::PAGELENS_ISA
#endif
