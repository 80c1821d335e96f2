// qk_norm_rope_store, paged_attention and window_attention, against double precision.
#include <algorithm>

#include "tests/check.h"
#include "tests/kv_cache.h"

using namespace pagelens;
using namespace pagelens::tests;

namespace {

// softmax(scores) times rows of values; one head.
void soften(std::vector<double>& scores) {
  const double top = *std::max_element(scores.begin(), scores.end());
  double total = 0.0;
  for (double& s : scores) total += s = std::exp(s - top);
  for (double& s : scores) s /= total;
}

struct Sequence {
  int64_t context, queries;
};

struct PagedCase {
  std::vector<Sequence> sequences;
  int64_t heads, kv_heads, head_dim, block_size;
  int64_t gap = 0;
};

const std::vector<PagedCase>& paged_cases() {
  static const std::vector<PagedCase> cases = {
      {{}, 2, 1, 32, 16},
      {{{1, 1}}, 1, 1, 2, 1},
      {{{5, 1}, {33, 1}, {1, 1}}, 4, 2, 16, 3, 5},
      {{{40, 1}, {97, 1}}, 16, 8, 128, 16},
      {{{65, 1}, {64, 1}}, 6, 2, 64, 32},
      {{{300, 1}}, 8, 1, 64, 16, 2},
      {{{31, 2}, {70, 3}, {9, 4}}, 4, 4, 32, 7},
      {{{50, 50}, {10, 0}, {80, 33}, {17, 1}}, 4, 2, 128, 16, 3},
      {{{37, 37}}, 3, 1, 6, 5},
      {{{700, 5}, {640, 1}}, 4, 2, 32, 16},
      {{{130, 129}}, 10, 10, 32, 16},
  };
  return cases;
}

void check_paged(const PagedCase& c, DType dtype, CacheKind kind) {
  Random random(static_cast<uint64_t>(c.heads * 1000 + c.head_dim));
  const int64_t count = static_cast<int64_t>(c.sequences.size());
  std::vector<int32_t> starts = {0}, contexts, tables;
  int64_t most = 1, blocks = 0;
  for (const Sequence& s : c.sequences) most = std::max(most, (s.context + c.block_size - 1) / c.block_size);
  for (const Sequence& s : c.sequences) {
    starts.push_back(starts.back() + static_cast<int32_t>(s.queries));
    contexts.push_back(static_cast<int32_t>(s.context));
    for (int64_t b = 0; b < most; b++)  // a number that no kernel may follow behind the sequence's blocks
      tables.push_back(b * c.block_size < s.context ? static_cast<int32_t>(blocks++) : -7);
  }
  // Blocks of all sequences lie mixed: from the last of the cache, which ends where the heap block ends, downwards.
  for (int32_t& block : tables)
    if (block >= 0) block = static_cast<int32_t>(blocks - 1 - (block % 2 ? blocks - 1 - block / 2 : block / 2));
  Cache cache(kind, blocks, c.block_size, c.kv_heads, c.head_dim);
  cache.fill(random);
  const Matrix q = Matrix::random(random, starts.back(), c.heads * c.head_dim, dtype, c.gap, 2.0);
  const Memory start_memory = copy_of(starts), context_memory = copy_of(contexts), table_memory = copy_of(tables);
  const double scale = 1.0 / std::sqrt(static_cast<double>(c.head_dim));
  Expected expected;
  for (int64_t s = 0; s < count; s++)
    for (int64_t t = 0; t < c.sequences[s].queries; t++) {
      const int64_t row = starts[s] + t, seen = contexts[s] - c.sequences[s].queries + t + 1;
      for (int64_t h = 0; h < c.heads; h++) {
        const int64_t kv = h / (c.heads / c.kv_heads);
        const auto slot = [&](int64_t i) {
          return tables[s * most + i / c.block_size] * c.block_size + i % c.block_size;
        };
        std::vector<double> scores(static_cast<size_t>(seen), 0.0);
        for (int64_t i = 0; i < seen; i++)
          for (int64_t d = 0; d < c.head_dim; d++)
            scores[i] += q.at(row, h * c.head_dim + d) * cache.key(slot(i), kv, d) * scale;
        soften(scores);
        for (int64_t d = 0; d < c.head_dim; d++) {
          double o = 0.0;
          for (int64_t i = 0; i < seen; i++) o += scores[i] * cache.value(slot(i), kv, d);
          expected.push_back(o);
        }
      }
    }
  const auto call = [&](ThreadPool& pool, Matrix& out, const int32_t* table) {
    AttentionArgs args{};
    args.q = q.view(), args.out = out.view();
    args.keys = cache.keys(), args.values = cache.values();
    args.key_scales = cache.key_scales(), args.value_scales = cache.value_scales();
    args.num_blocks = blocks, args.block_size = c.block_size;
    args.num_heads = c.heads, args.num_kv_heads = c.kv_heads, args.head_dim = c.head_dim;
    args.block_tables = table, args.max_blocks = most;
    args.query_starts = start_memory.as<int32_t>(), args.context_lens = context_memory.as<int32_t>();
    args.num_sequences = count;
    args.scale = static_cast<float>(scale);
    return kernels().paged_attention(pool, args);
  };
  const std::string what = std::string("paged_attention ") + name_of(dtype) +
                           (kind == CacheKind::int8 ? " int8 cache " : " ") + std::to_string(c.heads) + " x " +
                           std::to_string(c.head_dim) + ", " + std::to_string(starts.back()) + " rows";
  check_kernel(
      what, [&] { return Matrix(starts.back(), c.heads * c.head_dim, dtype, c.gap); }, expected,
      dtype == DType::f32 ? 2e-5 : 4e-3,
      [&](ThreadPool& pool, Matrix& out) {
        expect(call(pool, out, table_memory.as<int32_t>()) == -1, what + ": refused");
        if (count == 0) return;
        std::vector<int32_t> wrong = tables;
        wrong[0] = static_cast<int32_t>(blocks);
        const Memory wrong_memory = copy_of(wrong);
        Matrix untouched = Matrix::full(starts.back(), c.heads * c.head_dim, dtype, 3.0);
        expect(call(pool, untouched, wrong_memory.as<int32_t>()) == 0 && untouched.at(0, 0) == 3.0,
               what + ": took a block that does not exist");
      });
}

void check_rope(DType dtype, CacheKind kind, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim, bool norms,
                int64_t gap) {
  Random random(static_cast<uint64_t>(tokens * 10 + dim));
  const int64_t positions = 20, block_size = 6, blocks = (2 * tokens + block_size) / block_size;
  const int64_t slots = blocks * block_size, all = heads + 2 * kv_heads;
  const Matrix qkv = Matrix::random(random, tokens, all * dim, dtype, gap, 2.0);
  const Matrix cos = Matrix::random(random, positions, dim / 2, DType::f32);
  const Matrix sin = Matrix::random(random, positions, dim / 2, DType::f32);
  const Matrix q_norm = Matrix::random(random, 1, dim, dtype), k_norm = Matrix::random(random, 1, dim, dtype);
  std::vector<int32_t> places, targets;
  for (int64_t t = 0; t < tokens; t++) {
    places.push_back(static_cast<int32_t>(t * 7 % positions));
    targets.push_back(static_cast<int32_t>(slots - 1 - 2 * t));
  }
  const Memory place_memory = copy_of(places), target_memory = copy_of(targets);
  const auto head = [&](int64_t t, int64_t h, const Matrix& norm) {
    std::vector<double> x(static_cast<size_t>(dim)), y(static_cast<size_t>(dim));
    double squares = 0.0;
    for (int64_t i = 0; i < dim; i++) x[i] = qkv.at(t, h * dim + i), squares += x[i] * x[i];
    for (int64_t i = 0; norms && i < dim; i++) x[i] *= norm.at(0, i) / std::sqrt(squares / dim + 1e-6);
    for (int64_t i = 0; i < dim / 2; i++) {
      const double c = cos.at(places[t], i), s = sin.at(places[t], i);
      y[i] = x[i] * c - x[i + dim / 2] * s;
      y[i + dim / 2] = x[i + dim / 2] * c + x[i] * s;
    }
    return y;
  };
  Expected queries;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < heads; h++)
      for (const double y : head(t, h, q_norm)) queries.push_back(y);
  const std::string what = std::string("qk_norm_rope_store ") + name_of(dtype) + " " + std::to_string(tokens);
  check_kernel(
      what, [&] { return Matrix(tokens, heads * dim, dtype, gap); }, queries, 1e-5,
      [&](ThreadPool& pool, Matrix& out) {
        const Cache cache(kind, blocks, block_size, kv_heads, dim);
        RopeArgs args{};
        args.qkv = qkv.view(), args.out = out.view();
        args.positions = place_memory.as<int32_t>(), args.slots = target_memory.as<int32_t>();
        args.cos = static_cast<float*>(cos.data()), args.sin = static_cast<float*>(sin.data());
        args.num_positions = positions, args.num_blocks = blocks, args.block_size = block_size;
        args.keys = cache.keys(), args.values = cache.values();
        args.key_scales = cache.key_scales(), args.value_scales = cache.value_scales();
        args.num_heads = heads, args.num_kv_heads = kv_heads, args.head_dim = dim, args.eps = 1e-6f;
        if (norms) args.q_norm = q_norm.data(), args.k_norm = k_norm.data();
        expect(kernels().qk_norm_rope_store(pool, args) == -1, what + ": refused");
        for (int64_t t = 0; t < tokens; t++)
          for (int64_t h = 0; h < kv_heads; h++) {
            const std::vector<double> key = head(t, heads + h, k_norm);
            for (int64_t i = 0; i < dim; i++) {
              const double value = qkv.at(t, (heads + kv_heads + h) * dim + i);
              const double of_key = kind == CacheKind::int8 ? 0.05 : dtype == DType::f32 ? 1e-5 : 0.04;
              const double of_value = kind == CacheKind::int8 ? 0.02 : 1e-9;
              expect(std::fabs(cache.key(targets[t], h, i) - key[i]) <= of_key, what + ": a key");
              expect(std::fabs(cache.value(targets[t], h, i) - value) <= of_value, what + ": a value");
            }
          }
        args.num_blocks = blocks - 1;  // the first row's slot lies outside
        if (tokens) expect(kernels().qk_norm_rope_store(pool, args) == 0, what + ": took a slot outside its table");
      });
}

struct WindowCase {
  int64_t batch, rows, cols, window_rows, window_cols, heads, dim;
  bool relative;
};

constexpr WindowCase kWindowCases[] = {
    {0, 4, 4, 4, 4, 1, 8, true},       {1, 1, 1, 1, 1, 1, 2, false},     {2, 1, 37, 1, 37, 3, 6, false},
    {1, 1, 257, 1, 257, 2, 64, false}, {1, 5, 5, 5, 5, 1, 7, true},      {1, 7, 7, 3, 3, 2, 16, true},
    {2, 10, 10, 14, 14, 1, 64, true},  {1, 16, 16, 14, 14, 2, 64, true}, {1, 20, 20, 20, 20, 2, 80, true},
    {1, 9, 9, 4, 4, 1, 33, true},
};

void check_window(const WindowCase& c, DType dtype, bool finer_tables) {
  Random random(static_cast<uint64_t>(c.rows * 100 + c.dim));
  const int64_t width = c.heads * c.dim, total = c.batch * c.rows * c.cols;
  const Matrix qkv = Matrix::random(random, total, 3 * width, dtype, 0, 1.5);
  const Matrix pad = Matrix::random(random, 1, 3 * width, dtype);
  const DType table_dtype = finer_tables ? DType::f32 : DType::bf16;
  Matrix rel_h(2 * c.window_rows - 1, c.dim, DType::f32), rel_w(2 * c.window_cols - 1, c.dim, DType::f32);
  for (Matrix* table : {&rel_h, &rel_w})
    for (int64_t r = 0; r < table->rows(); r++)
      for (int64_t d = 0; d < c.dim; d++) table->set(r, d, rounded(random.uniform(-0.3, 0.3), table_dtype));
  const auto part = [&](int64_t view, int64_t y, int64_t x, int64_t column) {
    if (y >= c.rows || x >= c.cols) return pad.at(0, column);
    return qkv.at((view * c.rows + y) * c.cols + x, column);
  };
  Expected expected(static_cast<size_t>(total * width));
  for (int64_t view = 0; view < c.batch; view++)
    for (int64_t y = 0; y < c.rows; y++)
      for (int64_t x = 0; x < c.cols; x++)
        for (int64_t h = 0; h < c.heads; h++) {
          const int64_t y0 = y / c.window_rows * c.window_rows, x0 = x / c.window_cols * c.window_cols;
          std::vector<double> scores(static_cast<size_t>(c.window_rows * c.window_cols), 0.0);
          for (int64_t i = 0; i < c.window_rows; i++)
            for (int64_t j = 0; j < c.window_cols; j++)
              for (int64_t d = 0; d < c.dim; d++) {
                const double q = part(view, y, x, h * c.dim + d);
                double with = part(view, y0 + i, x0 + j, width + h * c.dim + d) / std::sqrt(static_cast<double>(c.dim));
                if (c.relative)
                  with += rel_h.at(y - y0 - i + c.window_rows - 1, d) + rel_w.at(x - x0 - j + c.window_cols - 1, d);
                scores[i * c.window_cols + j] += q * with;
              }
          soften(scores);
          for (int64_t d = 0; d < c.dim; d++) {
            double o = 0.0;
            for (int64_t i = 0; i < c.window_rows; i++)
              for (int64_t j = 0; j < c.window_cols; j++)
                o += scores[i * c.window_cols + j] * part(view, y0 + i, x0 + j, 2 * width + h * c.dim + d);
            expected[((view * c.rows + y) * c.cols + x) * width + h * c.dim + d] = o;
          }
        }
  const std::string what = std::string("window_attention ") + name_of(dtype) + " " + std::to_string(c.rows) + " x " +
                           std::to_string(c.cols) + " in " + std::to_string(c.window_rows);
  check_kernel(
      what, [&] { return Matrix(total, width, dtype); }, expected, dtype == DType::f32 ? 3e-5 : 8e-3,
      [&](ThreadPool& pool, Matrix& out) {
        WindowAttentionArgs args{};
        args.qkv = qkv.view(), args.out = out.view();
        args.batch = c.batch, args.grid_rows = c.rows, args.grid_cols = c.cols;
        args.window_rows = c.window_rows, args.window_cols = c.window_cols;
        args.num_heads = c.heads, args.head_dim = c.dim;
        if (c.relative) {
          args.pad = pad.data();
          args.rel_h = static_cast<float*>(rel_h.data()), args.rel_w = static_cast<float*>(rel_w.data());
        }
        kernels().window_attention(pool, args);
      });
}

}  // namespace

int main(int argc, char** argv) {
  choose_isas(argc, argv);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    for (const CacheKind kind : {dtype == DType::f32 ? CacheKind::f32 : CacheKind::bf16, CacheKind::int8}) {
      const bool int8 = kind == CacheKind::int8;  // its head sizes are multiples of 4
      check_rope(dtype, kind, 0, 2, 1, 8, true, 0);
      check_rope(dtype, kind, 1, 1, 1, int8 ? 4 : 2, false, 0);
      check_rope(dtype, kind, 5, 4, 2, 64, true, 3);
      check_rope(dtype, kind, 40, 3, 3, int8 ? 92 : 90, true, 1);
      check_rope(dtype, kind, 9, 16, 8, 128, false, 0);
      for (const PagedCase& c : paged_cases())
        if (!int8 || c.head_dim % 4 == 0) check_paged(c, dtype, kind);
    }
    for (const WindowCase& c : kWindowCases)
      for (const bool finer : {false, true}) check_window(c, dtype, finer);
  }
  return finish("attention");
}
