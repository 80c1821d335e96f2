// Causal attention over the paged cache, for prefill chunks and single rows alike.
//
// An item is (sequence, up to 32 query rows, one key/value head with its group of query heads). Keys go by in ascending
// blocks of 32 positions, counted from the start of the sequence, with a running softmax. Whatever the chunk, the batch
// or the thread, one query row does exactly the same arithmetic; its keys above its own position are never touched.
#include <algorithm>

#include "common/simd.h"
#include "cpu/attention_bf16.h"
#include "cpu/attention_int8.h"
#include "cpu/attention_run.h"
#include "cpu/kv_layout.h"
#include "cpu/parallel.h"
#ifdef PAGELENS_FREE_ORDER
  #include "free_order/attention.h"
#endif

namespace pagelens::PAGELENS_ISA {
namespace {

constexpr int64_t kKeys = 32;                // positions a block
constexpr int64_t kQueries = 32;             // query rows an item
constexpr int kRowsATime = W == 16 ? 4 : 2;  // rows that share a load of keys or values
constexpr int kKeyVectors = 2;               // of scores
constexpr int kVectorsATime = 4;             // of values

// Scratch of one thread; rows of q and o are padded with zeros to whole groups of vectors.
struct Tile {
  float *q, *o;          // [rows][dim]
  float* key;            // [dim][kKeys]
  float* value;          // [kKeys][dim]
  float* p;              // [rows][kKeys]
  float *largest, *sum;  // [rows]
  int64_t dim;

  static int64_t padded(int64_t d) { return (d + kVectorsATime * W - 1) / (kVectorsATime * W) * (kVectorsATime * W); }
  static int64_t floats(int64_t rows, int64_t dim) { return 2 * rows * dim + 2 * kKeys * dim + rows * (kKeys + 2); }
  Tile(float* at, int64_t rows, int64_t padded_dim) : dim(padded_dim) {
    q = at;
    o = q + rows * dim;
    key = o + rows * dim;
    value = key + kKeys * dim;
    p = value + kKeys * dim;
    largest = p + rows * kKeys;
    sum = largest + rows;
  }
};

template <class T>
void widen_row(const T* from, float* to, int64_t d, int64_t padded) {
  int64_t i = 0;
  for (; i + W <= d; i += W) store(to + i, load(from + i));
  for (; i < d; i++) to[i] = get(from + i);
  for (; i < padded; i++) to[i] = 0.0f;
}

float number(const float* p, float, int) { return *p; }
float number(const bf16* p, float, int) { return widen(*p); }
float number(const uint8_t* p, float scale, int offset) {
  return static_cast<float>(static_cast<int8_t>(*p - offset)) * scale;
}

// 16 tokens that lie together as floats: keys to columns of [d][kKeys], values to rows `dim` apart.
void load_group(const float* keys, const float* values, int64_t d, float* key, float* value, int64_t dim) {
  for (int64_t i = 0; i < d; i++) std::memcpy(key + i * kKeys, keys + i * kKeyGroup, kKeyGroup * sizeof(float));
  for (int64_t t = 0; t < kKeyGroup; t++)
    std::memcpy(value + t * dim, values + t * d, static_cast<size_t>(d) * sizeof(float));
}

void load_group(const bf16* keys, const bf16* values, int64_t d, float* key, float* value, int64_t dim) {
  for (int64_t i = 0; i < d; i += 2, keys += 2 * kKeyGroup) PAGELENS_UNROLL for (int t = 0; t < kKeyGroup; t += W) {
      const vu words = load_as<vu>(keys + 2 * t);
      store(key + i * kKeys + t, (vf)(words << 16));
      store(key + (i + 1) * kKeys + t, (vf)(words & 0xffff0000u));
    }
  for (int64_t t = 0; t < kKeyGroup; t += 2, values += 2 * d) {
    int64_t i = 0;
    for (; i + W <= d; i += W) {
      const vu words = load_as<vu>(values + 2 * i);
      store(value + t * dim + i, (vf)(words << 16));
      store(value + (t + 1) * dim + i, (vf)(words & 0xffff0000u));
    }
    for (; i < d; i++) {
      value[t * dim + i] = widen(values[2 * i]);
      value[(t + 1) * dim + i] = widen(values[2 * i + 1]);
    }
  }
}

// p[r][t] = scale * q[r] . key[t] for R rows and all keys of the block; even and odd columns are summed apart. The
// padding of dim is even.
template <int R>
void dot_keys(const float* q, const float* key, int64_t dim, float scale, float* p) {
  for (int64_t t = 0; t < kKeys; t += kKeyVectors * W) {
    vf c[R][kKeyVectors][2] = {};
    for (int64_t i = 0; i < dim; i += 2) {
      PAGELENS_UNROLL for (int e = 0; e < 2; e++) PAGELENS_UNROLL for (int v = 0; v < kKeyVectors; v++) {
        const vf k = load(key + (i + e) * kKeys + t + v * W);
        PAGELENS_UNROLL for (int r = 0; r < R; r++) c[r][v][e] = fma(splat(q[r * dim + i + e]), k, c[r][v][e]);
      }
    }
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < kKeyVectors; v++)
        store(p + r * kKeys + t + v * W, (c[r][v][0] + c[r][v][1]) * scale);
  }
}

// The running softmax of one row over keys 0..n-1 of the block: p becomes e^(p - largest), o and sum are rescaled.
void soften(float* p, int64_t n, float* o, int64_t dim, float* largest, float* total) {
  for (int64_t t = n; t < kKeys; t++) p[t] = -__builtin_inff();
  vf tops = splat(*largest);
  for (int64_t t = 0; t < kKeys; t += W) tops = larger(load(p + t), tops);
  const float top = largest_lane(tops);
  vf added = vf{};
  for (int64_t t = 0; t < kKeys; t += W) {
    const vf e = exp(load(p + t) - top);
    added = added + e;
    store(p + t, e);
  }
  if (top != *largest) {
    float lane[W];
    store(lane, exp(splat(*largest - top)));
    for (int64_t i = 0; i < dim; i += W) store(o + i, load(o + i) * lane[0]);
    *total *= lane[0];
    *largest = top;
  }
  *total += sum_lanes(added);
}

// o[r] += sum over t < n of p[r][t] * value[t], t ascending.
template <int R>
void add_values(const float* p, const float* value, int64_t n, int64_t dim, float* o) {
  for (int64_t i = 0; i < dim; i += kVectorsATime * W) {
    vf c[R][kVectorsATime];
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < kVectorsATime; v++) c[r][v] =
        load(o + r * dim + i + v * W);
    for (int64_t t = 0; t < n; t++) {
      vf x[kVectorsATime];
      PAGELENS_UNROLL for (int v = 0; v < kVectorsATime; v++) x[v] = load(value + t * dim + i + v * W);
      PAGELENS_UNROLL for (int r = 0; r < R; r++) {
        const vf w = splat(p[r * kKeys + t]);
        PAGELENS_UNROLL for (int v = 0; v < kVectorsATime; v++) c[r][v] = fma(w, x[v], c[r][v]);
      }
    }
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < kVectorsATime; v++)
        store(o + r * dim + i + v * W, c[r][v]);
  }
}

struct Item {
  int64_t sequence, first, rows, kv_head;  // query rows first..first+rows of the sequence
};

// T: of queries and results; C: of the cache, T or uint8_t (int8).
template <class T, class C>
struct Attention {
  const AttentionArgs& a;
  int64_t group = a.num_heads / a.num_kv_heads;
  int64_t dim = Tile::padded(a.head_dim);
  KVBlock<C> layout{a.block_size, a.num_kv_heads, a.head_dim};

  int64_t position(const Item& it, int64_t row) const {
    const int64_t queries = a.query_starts[it.sequence + 1] - a.query_starts[it.sequence];
    return a.context_lens[it.sequence] - queries + it.first + row;
  }

  // Query rows are stored group by group: tile row = query row * group + head of the group.
  void load_queries(const Item& it, const Tile& tile) const {
    for (int64_t r = 0; r < it.rows * group; r++) {
      const int64_t n = a.query_starts[it.sequence] + it.first + r / group;
      const int64_t head = it.kv_head * group + r % group;
      widen_row(static_cast<const T*>(a.q.data) + n * a.q.stride + head * a.head_dim, tile.q + r * dim, a.head_dim,
                dim);
      for (int64_t i = 0; i < dim; i++) tile.o[r * dim + i] = 0.0f;
      tile.largest[r] = -__builtin_inff();
      tile.sum[r] = 0.0f;
    }
  }

  // The keys and values start..start+count of the item's head as floats. Columns behind head_dim are zeros in `key`, so
  // that garbage of an earlier call does not meet the zeros of q; in `value` and where there is no key they do not
  // matter.
  void load_keys(const Item& it, const Tile& tile, int64_t start, int64_t count) const {
    const int32_t* blocks = a.block_tables + it.sequence * a.max_blocks;
    if constexpr (sizeof(C) > 1) {
      if (a.block_size % kKeyGroup == 0) {
        for (int64_t t = 0; t < count; t += kKeyGroup) {
          const int64_t token = (start + t) % a.block_size;
          const int64_t at = layout.start(blocks[(start + t) / a.block_size], it.kv_head) + token * a.head_dim;
          load_group(static_cast<const C*>(a.keys) + at, static_cast<const C*>(a.values) + at, a.head_dim, tile.key + t,
                     tile.value + t * dim, dim);
        }
        return;
      }
    }
    for (int64_t t = 0; t < count; t++) {
      const int64_t block = blocks[(start + t) / a.block_size], token = (start + t) % a.block_size;
      const int64_t base = layout.start(block, it.kv_head), scale_at = layout.scale_at(block, it.kv_head, token);
      const float key_scale = a.key_scales ? a.key_scales[scale_at] : 1.0f;
      const float value_scale = a.value_scales ? a.value_scales[scale_at] : 1.0f;
      const auto key = layout.key(token), value = layout.value(token);
      const C* from = static_cast<const C*>(a.keys) + base + key.first;
      for (int64_t i = 0; i < a.head_dim; i += layout.E, from += key.step)
        for (int64_t e = 0; e < layout.E; e++) tile.key[(i + e) * kKeys + t] = number(from + e, key_scale, kKeyOffset);
      from = static_cast<const C*>(a.values) + base + value.first;
      for (int64_t i = 0; i < a.head_dim; i++) tile.value[t * dim + i] = number(from + i * value.step, value_scale, 0);
    }
  }

  template <int R>
  void step(const Tile& tile, int64_t row, int64_t n) const {
    float* p = tile.p + row * kKeys;
    dot_keys<R>(tile.q + row * dim, tile.key, dim, a.scale, p);
    for (int r = 0; r < R; r++)
      soften(p + r * kKeys, n, tile.o + (row + r) * dim, dim, tile.largest + row + r, tile.sum + row + r);
    add_values<R>(p, tile.value, n, dim, tile.o + row * dim);
  }

  void run(const Item& it, const Tile& tile) const {
    load_queries(it, tile);
    std::memset(tile.key + a.head_dim * kKeys, 0, static_cast<size_t>((dim - a.head_dim) * kKeys) * sizeof(float));
    const int64_t last = position(it, it.rows - 1), rows = it.rows * group;
    for (int64_t start = 0; start <= last; start += kKeys) {
      load_keys(it, tile, start, std::min(last - start + 1, kKeys));
      int64_t row = 0;
      while (row < rows) {
        const int64_t n = position(it, row / group) - start + 1;
        if (n >= kKeys && row + kRowsATime <= rows) {  // the rows below see at least as much
          step<kRowsATime>(tile, row, kKeys);
          row += kRowsATime;
        } else {
          if (n > 0) step<1>(tile, row, n < kKeys ? n : kKeys);
          row++;
        }
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      const int64_t n = a.query_starts[it.sequence] + it.first + r / group;
      T* out = static_cast<T*>(a.out.data) + n * a.out.stride + (it.kv_head * group + r % group) * a.head_dim;
      for (int64_t i = 0; i < a.head_dim; i++) put(out + i, tile.o[r * dim + i] / tile.sum[r]);
    }
  }
};

template <class T, class C>
void run(ThreadPool& pool, const AttentionArgs& a) {
  const Attention<T, C> attention{a};
  const int64_t rows = kQueries * attention.group, floats = Tile::floats(rows, attention.dim);
  pool.reserve_local(static_cast<size_t>(floats) * sizeof(float));
  // first_item[s]: items of the sequences before s, in query rows tiles x key/value heads
  int64_t* first_item = pool.shared<int64_t>(0, a.num_sequences + 1);
  first_item[0] = 0;
  for (int64_t s = 0; s < a.num_sequences; s++) {
    const int64_t queries = a.query_starts[s + 1] - a.query_starts[s];
    first_item[s + 1] = first_item[s] + (queries + kQueries - 1) / kQueries * a.num_kv_heads;
  }
  pool.run(first_item[a.num_sequences], [&](int64_t i, int thread) {
    int64_t low = 0, high = a.num_sequences;  // the sequence of item i
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_item[middle] <= i ? low : high) = middle;
    }
    const int64_t own = i - first_item[low], queries = a.query_starts[low + 1] - a.query_starts[low];
    const int64_t first = own / a.num_kv_heads * kQueries;
    const Item item{low, first, queries - first < kQueries ? queries - first : kQueries, own % a.num_kv_heads};
    attention.run(item, Tile(static_cast<float*>(pool.local(thread)), rows, attention.dim));
  });
}

}  // namespace

int64_t paged_attention(ThreadPool& pool, const AttentionArgs& a) {
  for (int64_t s = 0; s < a.num_sequences; s++) {
    // In 64 bits: of two arbitrary starts the difference may not fit into 32.
    const int64_t queries = int64_t{a.query_starts[s + 1]} - a.query_starts[s], context = a.context_lens[s];
    if (queries < 0 || context < queries || context > a.max_blocks * a.block_size) return s;
    for (int64_t b = 0; b * a.block_size < context; b++) {
      const int32_t block = a.block_tables[s * a.max_blocks + b];
      if (block < 0 || block >= a.num_blocks) return s;
    }
  }
#ifdef PAGELENS_ISA_AVX512_BF16
  if (a.q.dtype == DType::bf16 && a.head_dim % 32 == 0 && a.head_dim <= kMaxFastDim) {
  #ifdef PAGELENS_FREE_ORDER
    a.key_scales ? run_free<Int8Cache>(pool, a) : run_free<Bf16Cache>(pool, a);
  #else
    a.key_scales ? run_fast<Int8Cache>(pool, a) : run_fast<Bf16Cache>(pool, a);
  #endif
    return -1;
  }
#endif
  if (a.q.dtype == DType::f32) {
    a.key_scales ? run<float, uint8_t>(pool, a) : run<float, float>(pool, a);
  } else {
    a.key_scales ? run<bf16, uint8_t>(pool, a) : run<bf16, bf16>(pool, a);
  }
  return -1;
}

}  // namespace pagelens::PAGELENS_ISA
