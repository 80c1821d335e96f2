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
#include "cpu/relative_positions.h"

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
  int64_t tasks = 0, task_lanes = 0;  // of a problem, and the most vectors of queries of one, in lanes
  RelativeTable<kPairs> table_h{a.window_rows, a.head_dim}, table_w{a.window_cols, a.head_dim};

  // Blocks of equal size, of whole grid rows where these are short.
  int64_t choose_block() const {
    const int64_t blocks = (keys + kBlockKeys - 1) / kBlockKeys;
    return round_up((keys + blocks - 1) / blocks, cols <= kBlockKeys / 4 ? cols : int64_t{kKeysATile});
  }

  // Scratch of one thread; every part starts on a line of 64 bytes.
  struct Scratch {
    uint32_t *key, *value;  // [keys][words], [keys / kWord][dim]
    uint32_t* q;            // [pitch][lanes]
    uint32_t* rows;         // [task_lanes][pitch]: a task's queries
    float *by_h, *by_w;     // [task_lanes][breadth]: their products with the tables
    float *rel_h, *rel_w;   // [breadth][lanes] in units of the exponent, in units of a score
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
    take(s.rows, task_lanes * pitch());
    take(s.by_h, a.rel_h ? task_lanes * table_h.breadth() : 0);
    take(s.by_w, a.rel_h ? task_lanes * table_w.breadth() : 0);
    take(s.rel_h, table_h.breadth() * kMaxLanes);
    take(s.rel_w, a.rel_h ? table_w.breadth() * kMaxLanes : 0);
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

  // A head's part of a row is short and on a page of its own, and the hardware does not fetch it ahead.
  void fetch(const T* from) const {
    const char* at = reinterpret_cast<const char*>(from);
    for (int64_t i = 0; i < a.head_dim * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(at + i, 0, 2);
  }

  // What a task reads and is not fetched yet: so many queries, keys and values of its problem from (row, col) on.
  struct Ahead {
    Problem p;
    int64_t row, col, queries, keys;
  };
  Ahead ahead(int64_t task) const {
    const Problem p = problem(task / tasks);
    const int64_t part = task % tasks, first = task_begin(p, part);
    return {p, first / p.cols, first % p.cols, task_begin(p, part + 1) - first, part ? 0 : p.rows * p.cols};
  }
  // The first query of a problem's part; `tasks` parts, of whole vectors.
  int64_t task_begin(const Problem& p, int64_t part) const {
    const int64_t vectors = (p.rows * p.cols + W - 1) / W;
    return std::min(vectors * part / tasks * W, p.rows * p.cols);
  }

  void fetch_position(Ahead& f) const {
    if (f.queries <= 0 && f.keys <= 0) return;
    const T* from = source(f.p, f.row, f.col, 0);
    if (f.queries-- > 0) fetch(from);
    if (f.keys-- > 0) {
      fetch(from + a.num_heads * a.head_dim);
      fetch(from + 2 * a.num_heads * a.head_dim);
    }
    if (++f.col == f.p.cols) f.col = 0, f.row++;
  }

  void load_words(const T* from, uint32_t* to) const {
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

  // The task's queries, `count` of the problem's own grid positions from `first` on; zeros up to whole vectors.
  void load_queries(const Problem& p, int64_t first, int64_t count, const Scratch& s) const {
    for (int64_t i = 0; i < count; i++)
      load_words(source(p, (first + i) / p.cols, (first + i) % p.cols, 0), s.rows + i * pitch());
    std::fill(s.rows + count * pitch(), s.rows + round_up(count, W) * pitch(), 0u);
  }

  // The task's queries by grid rows, then by grid columns: those of one have the same place in the table.
  void relatives(const Problem& p, int64_t first, int64_t count, const Scratch& s) const {
    const int64_t height = table_h.breadth(), width = table_w.breadth(), lanes = round_up(count, W);
    for (int64_t i = 0; i < count;) {
      const int64_t row = (first + i) / p.cols, n = std::min((row + 1) * p.cols - first, count) - i;
      table_h.multiply(row, s.rows + i * pitch(), pitch(), n, s.by_h + i * height, height);
      i += n;
    }
    for (int64_t i = 0; i < std::min(p.cols, count); i++)
      table_w.multiply((first + i) % p.cols, s.rows + i * pitch(), p.cols * pitch(), (count - i + p.cols - 1) / p.cols,
                       s.by_w + i * width, p.cols * width);
    std::fill(s.by_h + count * height, s.by_h + lanes * height, 0.0f);
    std::fill(s.by_w + count * width, s.by_w + lanes * width, 0.0f);
  }

  // o[lane] (+)= weights of `count` keys from `first` on times their values.
  template <int V>
  void add_values(const Scratch& s, int queries, int64_t first, int64_t count, bool begin) const {
    constexpr int L = V * W;
    for (int64_t d = 0; d < dim; d += kValueWidth) {
      const float* value = reinterpret_cast<const float*>(s.value) + first / kWord * dim + d;
      const int tiles = (queries + kQueriesATile - 1) / kQueriesATile;
      for (int t = 0; t < tiles; t++) {
        const int lane = queries * t / tiles, n = queries * (t + 1) / tiles - lane;
        float* o = s.o + lane * dim + d;
        product_fn<kPairs, Product::values, kQueriesATile, kValueVectors>(n)(s.p + lane, L, value, dim, count / kWord,
                                                                             begin ? nullptr : o, o, dim);
      }
    }
  }

  // Of `lanes` queries the first `filled` have something in o.
  void rescale(const Scratch& s, int lanes, int filled) const {
    for (int lane = 0; lane < lanes; lane += W) store(s.sum + lane, load(s.sum + lane) * load(s.factor + lane));
    for (int lane = 0; lane < filled; lane++) {
      if (s.factor[lane] == 1.0f) continue;
      for (int64_t d = 0; d < dim; d += W) store(s.o + lane * dim + d, load(s.o + lane * dim + d) * s.factor[lane]);
    }
  }

  // All keys for V vectors of queries, of which `queries` are real; meanwhile `next` is fetched.
  template <int V>
  void attend(const Scratch& s, int queries, Ahead& next) const {
    constexpr int L = V * W;
    const float scale = 1.0f / std::sqrt(static_cast<float>(a.head_dim)) * kUnit;
    std::fill(s.top, s.top + L, -1e30f);
    std::fill(s.sum, s.sum + L, 0.0f);
    int64_t first = 0, waiting = 0;  // keys whose weights are in p
    const auto flush = [&] {
      if (waiting) add_values<V>(s, queries, first, waiting, first == 0);
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
        for (int i = 0; i < 2; i++) fetch_position(next);  // a window of 14 x 14 has 196, and 140 tiles
        if (pairs && weigh<V>(n, tile)) {
          waiting += n;
          continue;
        }
        if (!pairs)
          product_fn<kPairs, Product::scores, kKeysATile, V>(n)(tile.key, words, tile.query, L, words, tile.init,
                                                                s.scores, L);
        if (raise_top<kPairs, V>(s.scores, real, scale, rel_h, kSlack * kUnit, s.top, s.factor)) {
          flush();
          rescale(s, L, first > 0 ? queries : 0);
        }
        soften<kPairs, V>(s.scores, real, scale, rel_h, s.top, s.sum, s.p + waiting / kWord * L);
        waiting += n;
      }
    }
    flush();
  }

  // The task's queries `at`..`at + count`, of which the first is query `first` of the problem.
  template <int V>
  void run_queries(const Problem& p, int64_t first, int64_t at, int64_t count, const Scratch& s, Ahead& next) const {
    constexpr int L = V * W;
    for (int lane = 0; lane < L; lane += W)
      transpose_rows(s.rows + (at + lane) * pitch(), pitch(), words, s.q + lane, L);
    if (a.rel_h) {
      const int64_t height = table_h.breadth(), width = table_w.breadth();
      const float root = std::sqrt(static_cast<float>(a.head_dim));
      for (int lane = 0; lane < L; lane += W) {
        transpose_rows(s.by_h + (at + lane) * height, height, a.window_rows, kUnit, s.rel_h + lane, L);
        transpose_rows(s.by_w + (at + lane) * width, width, a.window_cols, root, s.rel_w + lane, L);
      }
    } else {
      std::fill(s.rel_h, s.rel_h + a.window_rows * L, 0.0f);
    }
    attend<V>(s, static_cast<int>(count), next);
    for (int64_t lane = 0; lane < count; lane++) {
      const int64_t q = first + at + lane;
      T* out = static_cast<T*>(a.out.data) + grid_row(p, q / p.cols, q % p.cols) * a.out.stride + p.head * a.head_dim;
      const float* o = s.o + lane * dim;
      const float inverse = 1.0f / s.sum[lane];
      int64_t d = 0;
      for (; d + W <= a.head_dim; d += W) store(out + d, load(o + d) * inverse);
      for (; d < a.head_dim; d++) put(out + d, o[d] * inverse);
    }
  }

  // A part of the problem's queries, in blocks as equal as they can be.
  void run_part(const Problem& p, int64_t part, const Scratch& s, Ahead next) const {
    const int64_t first = task_begin(p, part), queries = task_begin(p, part + 1) - first;
    const int64_t vectors = (queries + W - 1) / W, blocks = (vectors + kQueryVectors - 1) / kQueryVectors;
    load_queries(p, first, queries, s);
    if (a.rel_h) relatives(p, first, queries, s);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t v0 = vectors * b / blocks, v1 = vectors * (b + 1) / blocks;
      const int64_t count = std::min(v1 * W, queries) - v0 * W;
      // Queries alone are soon fetched; keys that stream through the cache would drive them out again.
      Ahead none{p, 0, 0, 0, 0}, &fetched = next.keys > 0 || b + 1 == blocks ? next : none;
      if (v1 - v0 == 1) run_queries<1>(p, first, v0 * W, count, s, fetched);
      if (v1 - v0 == 2) run_queries<2>(p, first, v0 * W, count, s, fetched);
      if constexpr (kQueryVectors > 2) {
        if (v1 - v0 == 3) run_queries<3>(p, first, v0 * W, count, s, fetched);
      }
    }
  }

  void pack_tables(ThreadPool& pool) {
    const int64_t height = table_h.packed_words();
    uint32_t* memory = pool.shared<uint32_t>(0, height + table_w.packed_words());
    table_h.pack(a.rel_h, memory);
    table_w.pack(a.rel_w, memory + height);
  }

  void run(ThreadPool& pool) {
    if (a.rel_h) pack_tables(pool);
    const int64_t problems = a.batch * windows_down * windows_across * a.num_heads;
    const int64_t most = std::min(a.window_rows, a.grid_rows) * std::min(a.window_cols, a.grid_cols);
    tasks = (most + kTaskQueries - 1) / kTaskQueries;
    task_lanes = (round_up(most, W) / W + tasks - 1) / tasks * W;
    Scratch measured;
    pool.reserve_local(static_cast<size_t>(lay_out(measured, nullptr)) * 4);
    int64_t have[ThreadPool::kMaxThreads];  // the problem whose keys and values a thread holds
    std::fill(have, have + ThreadPool::kMaxThreads, int64_t{-1});
    pool.run(problems * tasks, [&](int64_t i, int thread) {
      Scratch s;
      lay_out(s, static_cast<uint32_t*>(pool.local(thread)));
      const Problem p = problem(i / tasks);
      if (task_begin(p, i % tasks) == task_begin(p, i % tasks + 1)) return;
      if (have[thread] != i / tasks) load_keys(p, s);
      have[thread] = i / tasks;
      run_part(p, i % tasks, s, i + 1 < problems * tasks ? ahead(i + 1) : Ahead{p, 0, 0, 0, 0});
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
