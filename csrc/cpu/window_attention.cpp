// SAM's attention, in windows or over a whole grid, and CLIP's, which is a grid of one row without relative positions.
//
// Queries lie in the lanes and scores are K Q^T: the softmax needs no sum across lanes, the relative columns start a
// score's accumulator, and the relative rows join the argument of the exponential. Keys go by once, in tiles of one
// grid row, so that no score outlives its tile and a 64x64 grid needs no more memory than its keys and values.
//
// A lane's weights are relative to a top that is raised only when an exponent exceeds it by kSlack: e^8 is far from
// every limit, and in most tiles nothing needs to be rescaled.
#include <algorithm>
#include <cmath>

#include "cpu/attention_tile.h"
#include "cpu/parallel.h"

namespace pagelens::PAGELENS_ISA {
namespace {

constexpr int64_t kBlockKeys = 128;    // weights that wait for their product with the values, about
constexpr int64_t kTaskQueries = 384;  // of one window and head; other tasks pack its keys and values again
constexpr int kMaxLanes = kQueryVectors * W;
constexpr int kValueWidth = kValueVectors * W;
constexpr float kSlack = 8.0f;

PAGELENS_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class T, bool kPairs>
struct Attention {
  static constexpr int64_t kWord = kPairs ? 2 : 1;  // values a word
  static constexpr float kUnit = kExponentUnit<kPairs>;

  const WindowAttentionArgs& a;
  int64_t windows_down = (a.grid_rows + a.window_rows - 1) / a.window_rows;
  int64_t windows_across = (a.grid_cols + a.window_cols - 1) / a.window_cols;
  int64_t words = (a.head_dim + kWord - 1) / kWord;  // of a row of queries, keys or tables
  int64_t dim = round_up(a.head_dim, kValueWidth);   // of a row of values and results
  int64_t cols = round_up(a.window_cols, kWord);     // keys of a grid row; one beyond the window weighs nothing
  int64_t keys = a.window_rows * cols;
  int64_t block_keys = choose_block();
  int64_t side = std::max(a.window_rows, a.window_cols);
  const uint32_t *table_h = nullptr, *table_w = nullptr;  // [parts][2 * side - 1][words]
  int parts_h = 0, parts_w = 0;

  // Blocks of equal size, of whole grid rows where these are short.
  int64_t choose_block() const {
    const int64_t blocks = (keys + kBlockKeys - 1) / kBlockKeys;
    return round_up((keys + blocks - 1) / blocks, cols <= kBlockKeys / 4 ? cols : int64_t{kKeysATile});
  }

  // Scratch of one thread; every part starts on a line of 64 bytes.
  struct Scratch {
    uint32_t *key, *value;  // [keys][words], [keys / kWord][dim]
    uint32_t* q;            // [pitch][lanes]
    uint32_t* rows;         // [W][pitch]: some queries
    float *rel_h, *rel_w;   // [window_rows][lanes] in units of the exponent, [cols][lanes] in units of a score
    float* table;           // [2 * side - 1 + window][lanes]: a table's products before each lane takes its own
    float* scores;          // [kKeysATile][lanes]
    uint32_t* p;            // [block_keys / kWord][lanes]
    float* o;               // [lanes][dim]
    float *top, *sum, *factor;
  };
  int64_t lay_out(Scratch& s, uint32_t* memory) const {
    int64_t at = 0;
    const auto take = [&](auto*& part, int64_t count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(memory + at);
      at += round_up(count, 16);
    };
    take(s.key, keys * words);
    take(s.value, keys / kWord * dim);
    take(s.q, pitch() * kMaxLanes);
    take(s.rows, W * pitch());
    take(s.rel_h, a.window_rows * kMaxLanes);
    take(s.rel_w, cols * kMaxLanes);
    take(s.table, (2 * side - 1) * kMaxLanes);
    take(s.scores, kKeysATile * kMaxLanes);
    take(s.p, block_keys / kWord * kMaxLanes);
    take(s.o, kMaxLanes * dim);
    take(s.top, kMaxLanes);
    take(s.sum, kMaxLanes);
    take(s.factor, kMaxLanes);
    return at;
  }

  int64_t pitch() const { return round_up(words, W); }

  // One head in one window.
  struct Problem {
    int64_t view, row, col;  // of the window's first position
    int64_t rows, cols;      // of the window that lie in the grid
    int64_t head;
  };
  Problem problem(int64_t i) const {
    Problem p;
    p.head = i % a.num_heads;
    i /= a.num_heads;
    p.col = i % windows_across * a.window_cols;
    i /= windows_across;
    p.row = i % windows_down * a.window_rows;
    p.view = i / windows_down;
    p.rows = std::min(a.window_rows, a.grid_rows - p.row);
    p.cols = std::min(a.window_cols, a.grid_cols - p.col);
    return p;
  }

  int64_t grid_row(const Problem& p, int64_t row, int64_t col) const {
    return (p.view * a.grid_rows + p.row + row) * a.grid_cols + p.col + col;
  }

  // part: 0 query, 1 key, 2 value
  const T* source(const Problem& p, int64_t row, int64_t col, int64_t part) const {
    const int64_t at = (part * a.num_heads + p.head) * a.head_dim;
    if (row >= p.rows || col >= p.cols) return static_cast<const T*>(a.pad) + at;
    return static_cast<const T*>(a.qkv.data) + grid_row(p, row, col) * a.qkv.stride + at;
  }

  // The next head's part of a row: a head's rows are short runs, each on a page of its own, which the hardware does not
  // fetch ahead.
  void prefetch_next(const T* from) const {
    const char* next = reinterpret_cast<const char*>(from + a.head_dim);
    for (int64_t i = 0; i < a.head_dim * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(next + i, 0, 2);
  }

  void load_words(const T* from, uint32_t* to) const {
    prefetch_next(from);
    if constexpr (kPairs) {
      int64_t i = 0;
      for (; 2 * (i + W) <= a.head_dim; i += W) {
        const vu pairs = load_as<vu>(from + 2 * i);
        std::memcpy(to + i, &pairs, sizeof pairs);
      }
      if (a.head_dim % 2) to[words - 1] = 0;
      if (2 * i < a.head_dim) std::memcpy(to + i, from + 2 * i, (a.head_dim - 2 * i) * sizeof(T));
    } else {
      widen_row(from, reinterpret_cast<float*>(to), a.head_dim);
    }
  }

  static void widen_row(const T* from, float* to, int64_t n) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, load(from + i));
    for (; i < n; i++) to[i] = get(from + i);
  }

  // `odd` may be null.
  void load_values(const T* even, const T* odd, uint32_t* __restrict to) const {
    prefetch_next(even);
    if (odd) prefetch_next(odd);
    if constexpr (kPairs) {
      if (odd) {
        for (int64_t i = 0; i < a.head_dim; i++) to[i] = even[i] | static_cast<uint32_t>(odd[i]) << 16;
      } else {
        for (int64_t i = 0; i < a.head_dim; i++) to[i] = even[i];
      }
    } else {
      widen_row(even, reinterpret_cast<float*>(to), a.head_dim);
    }
    std::fill(to + a.head_dim, to + dim, 0u);
  }

  void load_keys(const Problem& p, const Scratch& s) const {
    for (int64_t r = 0; r < a.window_rows; r++) {
      for (int64_t c = 0; c < cols; c++) {
        uint32_t* key = s.key + (r * cols + c) * words;
        if (c < a.window_cols) {
          load_words(source(p, r, c, 1), key);
        } else {
          std::fill(key, key + words, 0u);
        }
      }
      for (int64_t c = 0; c < cols; c += kWord) {
        const T* odd = kPairs && c + 1 < a.window_cols ? source(p, r, c + 1, 2) : nullptr;
        load_values(source(p, r, c, 2), odd, s.value + (r * cols + c) / kWord * dim);
      }
    }
  }

  // Queries `first`..`first + count` of the problem's own grid positions; the lanes beyond repeat the last.
  template <int V>
  struct Lanes {
    int64_t row[V * W], col[V * W];
    Lanes(const Problem& p, int64_t first, int64_t count) {
      for (int64_t lane = 0; lane < V * W; lane++) {
        const int64_t q = first + std::min(lane, count - 1);
        row[lane] = q / p.cols;
        col[lane] = q % p.cols;
      }
    }
  };

  template <int V>
  void load_queries(const Problem& p, const Lanes<V>& lanes, const Scratch& s) const {
    for (int64_t lane = 0; lane < V * W; lane += W) {
      for (int64_t i = 0; i < W; i++)
        load_words(source(p, lanes.row[lane + i], lanes.col[lane + i], 0), s.rows + i * pitch());
      transpose_rows(s.rows, pitch(), words, s.q + lane, V * W);
    }
  }

  // to[k][lane] = unit * q[lane] . table[place[lane] - k + size - 1]. All table rows that some lane needs are
  // multiplied with all lanes, and each lane takes its own: a tenth more work than the scores alone.
  template <int V>
  void relative(const uint32_t* table, int parts, int64_t size, const int64_t* place, float unit, const Scratch& s,
                float* to) const {
    constexpr int L = V * W;
    const auto [low, high] = std::minmax_element(place, place + L);
    const int64_t first = *low, count = *high - first + size;
    for (int part = 0; part < parts; part++) {
      const uint32_t* rows = table + (part * (2 * side - 1) + first) * words;
      for (int64_t r = 0; r < count; r += kKeysATile) {
        const int n = static_cast<int>(std::min<int64_t>(kKeysATile, count - r));
        float* out = s.table + r * L;
        product_fn<kPairs, Product::scores, kKeysATile, V>(n)(rows + r * words, words, reinterpret_cast<float*>(s.q), L,
                                                              words, part ? out : nullptr, out);
      }
    }
    int32_t from[L];
    for (int lane = 0; lane < L; lane++) from[lane] = static_cast<int32_t>((place[lane] - first + size - 1) * L + lane);
    for (int64_t k = 0; k < size; k++)
      for (int lane = 0; lane < L; lane += W) store(to + k * L + lane, gather(s.table - k * L, from + lane) * unit);
  }

  // o[lane] (+)= weights of `count` keys from `first` on times their values.
  template <int V>
  void add_values(const Scratch& s, int64_t first, int64_t count, bool begin) const {
    constexpr int L = V * W;
    for (int64_t d = 0; d < dim; d += kValueWidth) {
      const float* value = reinterpret_cast<const float*>(s.value) + first / kWord * dim + d;
      constexpr int kTiles = (L + kQueriesATile - 1) / kQueriesATile;
      for (int t = 0; t < kTiles; t++) {
        const int lane = L * t / kTiles, n = L * (t + 1) / kTiles - lane;
        float* o = s.o + lane * dim + d;
        product_fn<kPairs, Product::values, kQueriesATile, kValueVectors>(n)(s.p + lane, L, value, dim, count / kWord,
                                                                             begin ? nullptr : o, o);
      }
    }
  }

  void rescale(const Scratch& s, int lanes) const {
    for (int lane = 0; lane < lanes; lane++) {
      s.sum[lane] *= s.factor[lane];
      if (s.factor[lane] == 1.0f) continue;
      for (int64_t d = 0; d < dim; d += W) store(s.o + lane * dim + d, load(s.o + lane * dim + d) * s.factor[lane]);
    }
  }

  // All keys for V vectors of queries.
  template <int V>
  void attend(const Scratch& s) const {
    constexpr int L = V * W;
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.head_dim)) * kUnit;
    std::fill(s.top, s.top + L, -1e30f);
    std::fill(s.sum, s.sum + L, 0.0f);
    std::fill(s.o, s.o + L * dim, 0.0f);
    int64_t first = 0, waiting = 0;  // keys whose weights are in p
    const auto flush = [&] {
      if (waiting) add_values<V>(s, first, waiting, first == 0);
      first += waiting;
      waiting = 0;
    };
    for (int64_t r = 0; r < a.window_rows; r++) {
      const float* rel_h = s.rel_h + r * L;
      for (int64_t c = 0; c < cols; c += kKeysATile) {
        const int n = static_cast<int>(std::min<int64_t>(kKeysATile, cols - c));
        const int real = static_cast<int>(std::min<int64_t>(n, a.window_cols - c));
        if (waiting + n > block_keys) flush();
        const KeyTile tile{s.key + (r * cols + c) * words,
                           reinterpret_cast<float*>(s.q),
                           words,
                           a.rel_w ? s.rel_w + c * L : nullptr,
                           scale,
                           kSlack * kUnit,
                           rel_h,
                           s.top,
                           s.sum,
                           s.scores,
                           s.p + waiting / kWord * L};
        const bool pairs = kPairs && n == real && n % 2 == 0;
        if (pairs && weigh<V>(n, tile)) {
          waiting += n;
          continue;
        }
        if (!pairs)
          product_fn<kPairs, Product::scores, kKeysATile, V>(n)(tile.key, words, tile.query, L, words, tile.init,
                                                                s.scores);
        if (raise_top<kPairs, V>(s.scores, real, scale, rel_h, kSlack * kUnit, s.top, s.factor)) {
          flush();
          rescale(s, L);
        }
        soften<kPairs, V>(s.scores, real, scale, rel_h, s.top, s.sum, s.p + waiting / kWord * L);
        waiting += n;
      }
    }
    flush();
  }

  template <int V>
  void run_queries(const Problem& p, int64_t first, int64_t count, const Scratch& s) const {
    const Lanes<V> lanes(p, first, count);
    load_queries<V>(p, lanes, s);
    if (a.rel_h) {
      relative<V>(table_h, parts_h, a.window_rows, lanes.row, kUnit, s, s.rel_h);
      relative<V>(table_w, parts_w, a.window_cols, lanes.col, std::sqrt(static_cast<float>(a.head_dim)), s, s.rel_w);
    } else {
      std::fill(s.rel_h, s.rel_h + a.window_rows * V * W, 0.0f);
    }
    attend<V>(s);
    for (int64_t lane = 0; lane < count; lane++) {
      T* out = static_cast<T*>(a.out.data) + grid_row(p, lanes.row[lane], lanes.col[lane]) * a.out.stride +
               p.head * a.head_dim;
      const float* o = s.o + lane * dim;
      const float inverse = 1.0f / s.sum[lane];
      int64_t d = 0;
      for (; d + W <= a.head_dim; d += W) store(out + d, load(o + d) * inverse);
      for (; d < a.head_dim; d++) put(out + d, o[d] * inverse);
    }
  }

  // Vectors low..high of the problem's queries, in blocks as equal as they can be.
  void run_vectors(const Problem& p, int64_t low, int64_t high, const Scratch& s) const {
    const int64_t blocks = (high - low + kQueryVectors - 1) / kQueryVectors, queries = p.rows * p.cols;
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t v0 = low + (high - low) * b / blocks, v1 = low + (high - low) * (b + 1) / blocks;
      const int64_t count = std::min(v1 * W, queries) - v0 * W;
      if (v1 - v0 == 1) run_queries<1>(p, v0 * W, count, s);
      if (v1 - v0 == 2) run_queries<2>(p, v0 * W, count, s);
      if constexpr (kQueryVectors > 2) {
        if (v1 - v0 == 3) run_queries<3>(p, v0 * W, count, s);
      }
    }
  }

  // A table as words. Pairs hold a float32 table in two parts, value and rest, each rounded; the rest of a table that
  // was bfloat16 is zero and is left out.
  int pack_table(const float* table, int64_t rows, uint32_t* to) const {
    bool rest = false;
    for (int64_t r = 0; r < rows; r++) {
      const float* from = table + r * a.head_dim;
      uint32_t *high = to + r * words, *low = high + (2 * side - 1) * words;
      if constexpr (kPairs) {
        for (int64_t i = 0; i < words; i++) high[i] = low[i] = 0;
        for (int64_t i = 0; i < a.head_dim; i++) {
          const bf16 value = narrow(from[i]), left = narrow(from[i] - widen(value));
          high[i / 2] |= static_cast<uint32_t>(value) << i % 2 * 16;
          low[i / 2] |= static_cast<uint32_t>(left) << i % 2 * 16;
          rest |= (left & 0x7fff) != 0;
        }
      } else {
        std::memcpy(high, from, words * sizeof(float));
      }
    }
    return rest ? 2 : 1;
  }

  void pack_tables(ThreadPool& pool) {
    const int64_t size = 2 * (2 * side - 1) * words;
    uint32_t* tables = pool.shared<uint32_t>(0, 2 * size);
    table_h = tables;
    table_w = tables + size;
    parts_h = pack_table(a.rel_h, 2 * a.window_rows - 1, tables);
    parts_w = pack_table(a.rel_w, 2 * a.window_cols - 1, tables + size);
  }

  void run(ThreadPool& pool) {
    if (a.rel_h) pack_tables(pool);
    Scratch measured;
    pool.reserve_local(static_cast<size_t>(lay_out(measured, nullptr)) * 4);
    const int64_t problems = a.batch * windows_down * windows_across * a.num_heads;
    const int64_t most = std::min(a.window_rows, a.grid_rows) * std::min(a.window_cols, a.grid_cols);
    const int64_t tasks = (most + kTaskQueries - 1) / kTaskQueries;
    int64_t have[ThreadPool::kMaxThreads];  // the problem whose keys and values a thread holds
    std::fill(have, have + ThreadPool::kMaxThreads, int64_t{-1});
    pool.run(problems * tasks, [&](int64_t i, int thread) {
      Scratch s;
      lay_out(s, static_cast<uint32_t*>(pool.local(thread)));
      const Problem p = problem(i / tasks);
      const int64_t vectors = (p.rows * p.cols + W - 1) / W, part = i % tasks;
      const int64_t low = vectors * part / tasks, high = vectors * (part + 1) / tasks;
      if (low == high) return;
      if (have[thread] != i / tasks) load_keys(p, s);
      have[thread] = i / tasks;
      run_vectors(p, low, high, s);
    });
  }
};

}  // namespace

void window_attention(ThreadPool& pool, const WindowAttentionArgs& a) {
  if (a.out.rows == 0 || a.out.cols == 0) return;
  if (a.qkv.dtype == DType::f32) {
    Attention<float, false>{a}.run(pool);
  } else {
#ifdef PAGELENS_ISA_AVX512_BF16
    Attention<bf16, true>{a}.run(pool);
#else
    Attention<bf16, false>{a}.run(pool);
#endif
  }
}

}  // namespace pagelens::PAGELENS_ISA
