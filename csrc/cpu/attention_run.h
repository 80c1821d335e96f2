// Attention over the paged cache on the kernels of attention_bf16.h or attention_int8.h: which rows and keys an item
// has.
//
// Many query rows of a sequence: an item is 32 of them with one key/value head, and walks all keys. Few rows
// (decoding): an item is one chunk of keys with some heads, in the order of the cache's memory, and what the items of a
// sequence found is merged afterwards.
//
// Every query row goes through the same operations in the same order, whatever stands beside it: keys in groups of 16
// from the start of the sequence, groups in chunks of kChunk, each chunk a softmax of its own, chunks merged in order.
// A decode whose chunks run on several threads has the bits of a row of a prefill.
#pragma once
#include <algorithm>
#include <utility>

#include "cpu/attention_softmax.h"
#include "cpu/kv_layout.h"
#include "cpu/parallel.h"

#ifdef PAGELENS_ISA_AVX512_BF16
namespace pagelens::PAGELENS_ISA {

constexpr int64_t kTileQueries = 32;
constexpr int64_t kFewQueries = 4;
constexpr int64_t kMaxFastDim = 512;

// f<R>(first) for rows in steps of at most `Most`.
template <int Most, class F>
PAGELENS_INLINE void in_steps(int64_t rows, F&& f) {
  int64_t row = 0;
  for (; row + Most <= rows; row += Most) f(std::integral_constant<int, Most>{}, row);
  if constexpr (Most > 1) {
    if (row < rows) in_steps<Most - 1>(rows - row, [&](auto r, int64_t i) { f(r, row + i); });
  }
}

template <class Cache>
struct Attention16 {
  using T = typename Cache::Element;
  const AttentionArgs& a;
  int64_t group = a.num_heads / a.num_kv_heads;
  int64_t dim = a.head_dim;
  int64_t words = Cache::query_words(dim);
  KVBlock<T> layout{a.block_size, a.num_kv_heads, a.head_dim};

  int64_t queries(int64_t s) const { return a.query_starts[s + 1] - a.query_starts[s]; }
  // Position of query row `row` of a sequence.
  int64_t position(int64_t s, int64_t row) const { return a.context_lens[s] - queries(s) + row; }

  const bf16* query(int64_t s, int64_t row, int64_t head) const {
    return static_cast<const bf16*>(a.q.data) + (a.query_starts[s] + row) * a.q.stride + head * dim;
  }

  // ---- keys and values of a chunk
  // Where a group of 16 keys of one head lies.
  struct Group {
    const T *keys, *values;
    const float *key_scales, *value_scales;
  };
  // Groups can be read where they lie; else a chunk of one head is first copied to scratch.
  bool in_place() const { return a.block_size % kGroup == 0; }

  Group group_at(int64_t s, int64_t start, int64_t head) const {
    const int64_t block = a.block_tables[s * a.max_blocks + start / a.block_size], token = start % a.block_size;
    const int64_t at = layout.start(block, head) + token * dim, scale = layout.scale_at(block, head, token);
    return {static_cast<const T*>(a.keys) + at, static_cast<const T*>(a.values) + at,
            a.key_scales ? a.key_scales + scale : nullptr, a.key_scales ? a.value_scales + scale : nullptr};
  }

  // Scratch for the copy of a chunk: keys, values, scales of both.
  static constexpr int64_t copied_bytes(int64_t dim) { return 2 * kChunk * (dim * int64_t{sizeof(T)} + 4); }
  int64_t copied_elements() const { return copied_bytes(dim) / int64_t{sizeof(T)}; }

  void copy_chunk(int64_t s, int64_t start, int64_t count, int64_t head, T* to) const {
    const KVBlock<T> whole{kChunk, 1, dim};
    T* values = to + kChunk * dim;
    float* scales = reinterpret_cast<float*>(values + kChunk * dim);
    for (int64_t t = 0; t < count; t++) {
      const int64_t block = a.block_tables[s * a.max_blocks + (start + t) / a.block_size];
      const int64_t token = (start + t) % a.block_size, base = layout.start(block, head);
      const auto key = layout.key(token), value = layout.value(token), k = whole.key(t), v = whole.value(t);
      const T* from = static_cast<const T*>(a.keys) + base + key.first;
      for (int64_t i = 0; i < dim / KVBlock<T>::E; i++) std::memcpy(to + k.first + i * k.step, from + i * key.step, 4);
      from = static_cast<const T*>(a.values) + base + value.first;
      for (int64_t i = 0; i < dim; i++) values[v.first + i * v.step] = from[i * value.step];
      if (a.key_scales) {
        scales[t] = a.key_scales[layout.scale_at(block, head, token)];
        scales[kChunk + t] = a.value_scales[layout.scale_at(block, head, token)];
      }
    }
  }

  Group copied_group(const T* copied, int64_t g) const {
    const T* values = copied + kChunk * dim;
    const float* scales = a.key_scales ? reinterpret_cast<const float*>(values + kChunk * dim) : nullptr;
    const int64_t at = g * kGroup;
    return {copied + at * dim, values + at * dim, scales ? scales + at : nullptr,
            scales ? scales + kChunk + at : nullptr};
  }

  // The groups of a chunk that begins at `start` and has `count` keys of this sequence.
  void find_groups(int64_t s, int64_t start, int64_t count, int64_t head, T* copied, Group* groups) const {
    if (!in_place()) copy_chunk(s, start, count, head, copied);
    for (int64_t g = 0; g * kGroup < count; g++)
      groups[g] = in_place() ? group_at(s, start + g * kGroup, head) : copied_group(copied, g);
  }

  // ---- steps of rows: q [rows][words], p [rows][kChunk], o [rows][dim]
  void score_rows(const uint32_t* q, int64_t rows, const Group& g, float* p) const {
    in_steps<Cache::kScoreRows>(rows, [&](auto r, int64_t row) {
      Cache::template scores<r()>(q + row * words, g.keys, g.key_scales, dim, a.scale, p + row * kChunk);
    });
  }

  // The values of group g of a chunk of which row r sees seen[r] keys.
  void add_group(const float* p, int64_t rows, int64_t g, const T* values, const int64_t* seen, float* o) const {
    const auto in_group = [&](int64_t r) { return std::clamp<int64_t>(seen[r] - g * kGroup, 0, kGroup); };
    int64_t row = 0;
    while (row < rows) {
      const int64_t n = in_group(row);
      int64_t end = row + 1;
      while (end < rows && in_group(end) == n) end++;
      if (n > 0)
        in_steps<Cache::kValueRows>(end - row, [&](auto r, int64_t i) {
          Cache::template add_values<r()>(p + (row + i) * kChunk, g, values, n, dim, o + (row + i) * dim);
        });
      row = end;
    }
  }

  void put_row(int64_t s, int64_t row, int64_t head, const float* o, float sum) const {
    bf16* out = static_cast<bf16*>(a.out.data) + (a.query_starts[s] + row) * a.out.stride + head * dim;
    for (int64_t i = 0; i < dim; i += W) store(out + i, load(o + i) / sum);
  }

  // ---- many rows
  static constexpr int64_t kStepRows = 6;  // whose scores lie in scratch together
  int64_t tile_floats() const {
    return kTileQueries * group * (words + dim + 2) + kStepRows * (kChunk + dim) + copied_bytes(dim) / 4;
  }

  // The tile's rows are query row * group + head of the group.
  void run_tile(int64_t s, int64_t first, int64_t count, int64_t head, float* scratch) const {
    const int64_t rows = count * group, last = position(s, first + count - 1);
    const auto take = [&](int64_t floats) { return std::exchange(scratch, scratch + floats); };
    T* copied = reinterpret_cast<T*>(take(copied_bytes(dim) / 4));
    uint32_t* q = reinterpret_cast<uint32_t*>(take(rows * words));
    float *all = take(rows * dim), *p = take(kStepRows * kChunk), *o = take(kStepRows * dim);
    float *largest = take(rows), *sum = take(rows);
    for (int64_t r = 0; r < rows; r++) {
      Cache::load_query(query(s, first + r / group, head * group + r % group), dim, q + r * words);
      largest[r] = -__builtin_inff(), sum[r] = 0.0f;
    }
    std::memset(all, 0, static_cast<size_t>(rows * dim) * 4);
    for (int64_t chunk = 0; chunk <= last; chunk += kChunk) {
      Group groups[kChunkGroups];
      find_groups(s, chunk, std::min(last - chunk + 1, kChunk), head, copied, groups);
      const auto seen_by = [&](int64_t r) {
        return std::clamp<int64_t>(position(s, first + r / group) - chunk + 1, 0, kChunk);
      };
      int64_t row = 0;
      while (row < rows && seen_by(row) == 0) row++;
      for (; row < rows; row += kStepRows) {
        const int64_t n = std::min(rows - row, kStepRows);
        int64_t seen[kStepRows];
        for (int64_t r = 0; r < n; r++) seen[r] = seen_by(row + r);
        float tops[kStepRows], sums[kStepRows];
        step(q + row * words, n, groups, seen, p, {o, tops, sums});
        for (int64_t r = 0; r < n; r++)
          merge_chunk(o + r * dim, tops[r], sums[r], dim, all + (row + r) * dim, largest + row + r, sum + row + r);
      }
    }
    for (int64_t r = 0; r < rows; r++) put_row(s, first + r / group, head * group + r % group, all + r * dim, sum[r]);
  }

  // What a chunk gives each row: o [rows][dim], the largest score, the sum of the weights.
  struct Results {
    float *o, *largest, *sum;
  };

  // A chunk for rows that see seen[r] of its keys, not less than the rows before them, and at least one.
  void step(const uint32_t* q, int64_t rows, const Group* groups, const int64_t* seen, float* p,
            const Results& out) const {
    const int64_t most = seen[rows - 1];
    const float* value_scales[kChunkGroups] = {};
    for (int64_t g = 0; g * kGroup < most; g++) {
      score_rows(q, rows, groups[g], p + g * kGroup);
      value_scales[g] = groups[g].value_scales;
    }
    for (int64_t r = 0; r < rows; r++)
      Cache::weigh(p + r * kChunk, seen[r], value_scales, out.largest + r, out.sum + r);
    std::memset(out.o, 0, static_cast<size_t>(rows * dim) * 4);
    for (int64_t g = 0; g * kGroup < most; g++) add_group(p, rows, g, groups[g].values, seen, out.o);
    for (int64_t r = 0; r < rows; r++) Cache::finish(p + r * kChunk, dim, out.o + r * dim);
  }

  // ---- few rows
  struct Part {
    int64_t sequence, begin, first_head, heads;  // keys from a multiple of kGroup on; key/value heads
  };
  int64_t part_floats(int64_t rows) const {
    return rows * (words + kChunk + 2) + (in_place() ? 0 : a.num_kv_heads * copied_bytes(dim) / 4);
  }
  static constexpr int64_t result_floats(int64_t dim) { return dim + 2; }  // a row
  Results results(float* at, int64_t rows) const { return {at, at + rows * dim, at + rows * (dim + 1)}; }

  // f(head, group, where it lies) for the groups of `count` keys of some heads, head by head within a block: the order
  // of memory. `copied` holds chunks that cannot be read in place.
  template <class F>
  void each_group(const Part& part, int64_t count, const T* copied, F&& f) const {
    const int64_t begin = part.begin, groups = (count + kGroup - 1) / kGroup;
    if (!in_place()) {
      for (int64_t h = 0; h < part.heads; h++)
        for (int64_t g = 0; g < groups; g++) f(h, g, copied_group(copied + h * copied_elements(), g));
      return;
    }
    int64_t start = 0, end = (a.block_size - begin % a.block_size) / kGroup;
    for (; start < groups; start = end, end += a.block_size / kGroup) {
      const Group first = group_at(part.sequence, begin + start * kGroup, part.first_head);
      for (int64_t h = 0; h < part.heads; h++)
        for (int64_t g = start; g < std::min(end, groups); g++) {
          const int64_t token = h * a.block_size + (g - start) * kGroup;
          f(h, g,
            Group{first.keys + token * dim, first.values + token * dim,
                  first.key_scales ? first.key_scales + token : nullptr,
                  first.key_scales ? first.value_scales + token : nullptr});
        }
    }
  }

  // A chunk of keys for all query rows of a sequence; the results, [heads * group][queries], are those of all heads, of
  // which some are filled in.
  void run_part(const Part& part, float* scratch, const Results& all) const {
    const int64_t s = part.sequence, n = queries(s), each = group * n, rows = part.heads * each;
    const int64_t begin = part.begin, count = std::min<int64_t>(a.context_lens[s] - begin, kChunk);
    const auto take = [&](int64_t floats) { return std::exchange(scratch, scratch + floats); };
    T* copied = reinterpret_cast<T*>(take(in_place() ? 0 : part.heads * copied_bytes(dim) / 4));
    int64_t* seen = reinterpret_cast<int64_t*>(take(2 * rows));
    float* p = take(rows * kChunk);
    uint32_t* q = reinterpret_cast<uint32_t*>(take(rows * words));
    const int64_t first_row = part.first_head * each;
    for (int64_t r = 0; r < rows; r++) {
      Cache::load_query(query(s, r % n, (first_row + r) / n), dim, q + r * words);
      seen[r] = std::clamp<int64_t>(position(s, r % n) - begin + 1, 0, count);
    }
    if (!in_place())
      for (int64_t h = 0; h < part.heads; h++)
        copy_chunk(s, begin, count, part.first_head + h, copied + h * copied_elements());
    each_group(part, count, copied, [&](int64_t h, int64_t g, const Group& at) {
      score_rows(q + h * each * words, each, at, p + h * each * kChunk + g * kGroup);
    });
    const Results out{all.o + first_row * dim, all.largest + first_row, all.sum + first_row};
    weigh_part(part, p, each, seen, count, copied, out);
    std::memset(out.o, 0, static_cast<size_t>(rows * dim) * 4);
    each_group(part, count, copied, [&](int64_t h, int64_t g, const Group& at) {
      add_group(p + h * each * kChunk, each, g, at.values, seen, out.o + h * each * dim);
    });
    for (int64_t r = 0; r < rows; r++) Cache::finish(p + r * kChunk, dim, out.o + r * dim);
  }

  void weigh_part(const Part& part, float* p, int64_t each, const int64_t* seen, int64_t count, const T* copied,
                  const Results& out) const {
    for (int64_t h = 0; h < part.heads; h++) {
      const float* value_scales[kChunkGroups] = {};
      if (a.value_scales)
        each_group({part.sequence, part.begin, part.first_head + h, 1}, count, copied + h * copied_elements(),
                   [&](int64_t, int64_t g, const Group& at) { value_scales[g] = at.value_scales; });
      for (int64_t r = h * each; r < (h + 1) * each; r++)
        Cache::weigh(p + r * kChunk, seen[r], value_scales, out.largest + r, out.sum + r);
    }
  }

  // Query row r of a sequence from the parts of its chunks, `stride` floats apart.
  void merge_row(int64_t s, int64_t r, const float* parts, int64_t stride, float* o) const {
    const int64_t n = queries(s), own = position(s, r % n), rows = n * a.num_heads;
    std::memset(o, 0, static_cast<size_t>(dim) * 4);
    float largest = -__builtin_inff(), sum = 0.0f;
    for (int64_t chunk = 0; chunk * kChunk <= own; chunk++, parts += stride) {
      const Results part = results(const_cast<float*>(parts), rows);
      merge_chunk(part.o + r * dim, part.largest[r], part.sum[r], dim, o, &largest, &sum);
    }
    put_row(s, r % n, r / n, o, sum);
  }
};

inline int64_t chunks_of(const AttentionArgs& a, int64_t s) { return (a.context_lens[s] + kChunk - 1) / kChunk; }

// Groups of 16 keys from a chunk on.
inline int64_t groups_of(const AttentionArgs& a, int64_t s, int64_t chunk) {
  return (a.context_lens[s] - chunk * kChunk + kGroup - 1) / kGroup;
}

// The last sequence with before[stride * s] <= i.
inline int64_t sequence_of(const int64_t* before, int64_t stride, int64_t num_sequences, int64_t i) {
  int64_t low = 0, high = num_sequences;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (before[stride * middle] <= i ? low : high) = middle;
  }
  return low;
}

// Sequences with few query rows, all together.
template <class Cache>
void run_few(ThreadPool& pool, const Attention16<Cache>& attention) {
  const AttentionArgs& a = attention.a;
  // Of each sequence: work (groups of keys of one head) and result floats before it, and query rows before it.
  int64_t* before = pool.shared<int64_t>(1, 3 * (a.num_sequences + 1));
  int64_t chunks = 0, most_rows = 0, most_chunks = 0;
  const auto is_few = [&](int64_t s) { return attention.queries(s) > 0 && attention.queries(s) <= kFewQueries; };
  for (int64_t s = 0; s < a.num_sequences; s++) chunks += is_few(s) ? chunks_of(a, s) : 0;
  if (chunks == 0) return;
  before[0] = before[1] = before[2] = 0;
  for (int64_t s = 0; s < a.num_sequences; s++) {
    const int64_t n = attention.queries(s), rows = n * a.num_heads;
    const bool few = is_few(s);
    before[3 * s + 3] = before[3 * s] + (few ? groups_of(a, s, 0) * a.num_kv_heads : 0);
    before[3 * s + 4] = before[3 * s + 1] + (few ? chunks_of(a, s) * rows * attention.result_floats(a.head_dim) : 0);
    before[3 * s + 5] = before[3 * s + 2] + (few ? rows : 0);
    if (!few) continue;
    most_rows = std::max(most_rows, rows);
    most_chunks = std::max(most_chunks, chunks_of(a, s));
  }
  const int64_t* total = before + 3 * a.num_sequences;
  float* results = pool.shared<float>(2, total[1]);
  pool.reserve_local(static_cast<size_t>(attention.part_floats(most_rows)) * 4);
  const auto part_at = [&](int64_t s, int64_t chunk) {
    return results + before[3 * s + 1] +
           chunk * attention.queries(s) * a.num_heads * attention.result_floats(a.head_dim);
  };
  // An item is a run of the work, all of like size: whole chunks as far as possible, as a thread reads them in one long
  // range, and between two items a chunk is cut at a head.
  const int64_t threads = pool.num_threads(), work = total[0], a_chunk = kChunkGroups * a.num_kv_heads;
  const int64_t items = threads == 1 ? 1 : threads * std::clamp<int64_t>(chunks / (2 * threads), 2, 8);
  struct Place {
    int64_t sequence, chunk, head, groups;  // groups: work of a head
  };
  const auto place_of = [&](int64_t at) {
    const int64_t s = sequence_of(before, 3, a.num_sequences, at), own = at - before[3 * s], chunk = own / a_chunk;
    const int64_t groups = std::min<int64_t>(groups_of(a, s, chunk), kChunkGroups);
    return Place{s, chunk, (own - chunk * a_chunk) / groups, groups};
  };
  const auto begin_of = [&](int64_t item) {  // of a head
    if (item == items) return work;
    const Place place = place_of(work * item / items);
    return before[3 * place.sequence] + place.chunk * a_chunk + place.head * place.groups;
  };
  pool.run(items, [&](int64_t item, int thread) {
    const int64_t end = begin_of(item + 1);
    for (int64_t at = begin_of(item); at < end;) {
      const auto [s, chunk, head, groups] = place_of(at);
      const int64_t heads = std::min(a.num_kv_heads - head, (end - at) / groups);
      attention.run_part({s, chunk * kChunk, head, heads}, static_cast<float*>(pool.local(thread)),
                         attention.results(part_at(s, chunk), attention.queries(s) * a.num_heads));
      at += heads * groups;
    }
  });
  for_rows(pool, total[2], most_chunks * a.head_dim, [&](int64_t i) {
    const int64_t s = sequence_of(before + 2, 3, a.num_sequences, i);
    float o[kMaxFastDim];
    attention.merge_row(s, i - before[3 * s + 2], part_at(s, 0), part_at(s, 1) - part_at(s, 0), o);
  });
}

// Sequences with many query rows.
template <class Attention>
void run_many(ThreadPool& pool, const Attention& attention) {
  const AttentionArgs& a = attention.a;
  int64_t* first_item = pool.shared<int64_t>(1, a.num_sequences + 1);
  first_item[0] = 0;
  for (int64_t s = 0; s < a.num_sequences; s++) {
    const int64_t n = attention.queries(s), tiles = (n + kTileQueries - 1) / kTileQueries;
    first_item[s + 1] = first_item[s] + (n > kFewQueries ? tiles * a.num_kv_heads : 0);
  }
  if (first_item[a.num_sequences] == 0) return;
  pool.reserve_local(static_cast<size_t>(attention.tile_floats()) * 4);
  pool.run(first_item[a.num_sequences], [&](int64_t i, int thread) {
    const int64_t s = sequence_of(first_item, 1, a.num_sequences, i);
    const int64_t own = i - first_item[s], first = own / a.num_kv_heads * kTileQueries;
    attention.run_tile(s, first, std::min(kTileQueries, attention.queries(s) - first), own % a.num_kv_heads,
                       static_cast<float*>(pool.local(thread)));
  });
}

template <class Cache>
void run_fast(ThreadPool& pool, const AttentionArgs& a) {
  const Attention16<Cache> attention{a};
  run_many(pool, attention);
  run_few(pool, attention);
}

}  // namespace pagelens::PAGELENS_ISA
#endif
