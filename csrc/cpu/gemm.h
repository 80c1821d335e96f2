// The blocked driver over cpu/tile.h: packs activations, walks the blocks, hands finished sums to an epilogue.
//
// A *problem* is one product (rows x packed weight); a call may hold many (the experts of a MoE layer). The work is cut
// into blocks of (rows, panels); each thread has one contiguous run of blocks and packs the rows of a block once.
#pragma once
#include <algorithm>

#include "common/thread_pool.h"
#include "cpu/int8_product.h"
#include "cpu/pack_words.h"
#include "cpu/quantized_few.h"
#include "cpu/taps.h"
#include "cpu/tile.h"

namespace pagelens::PAGELENS_ISA {

struct Problem {
  Source x;
  PackedLinear weight;
  int64_t rows = 0;
};

constexpr int64_t kGroupsAPass = 384;  // of K: a slab of 48 KB of weights
constexpr int64_t kMaxBlockRows = 12 * kMaxTileRows;
constexpr int64_t kMaxBlockPanels = 8;            // bounds the sums that wait between two passes
constexpr int64_t kFewRowsBlockBytes = 64 << 10;  // weights a chunk when they are read once: small enough to steal

// How one problem is cut.
struct Cut {
  int64_t row_blocks = 0, panel_blocks = 0;
  int64_t count() const { return row_blocks * panel_blocks; }
};

PAGELENS_INLINE Cut cut(const Problem& p) {
  if (p.rows == 0 || p.weight.n == 0) return {};
  const int64_t panels = p.weight.panels();
  int64_t a_block = kMaxBlockPanels;
  if (p.rows <= kMaxTileRows) {
    const int64_t bytes = std::max<int64_t>(p.weight.panel_words() * 4, 1);
    a_block = std::min(a_block, std::max<int64_t>(kFewRowsBlockBytes / bytes, 1));
  }
  const int64_t row_blocks = ceil_div(p.rows, kMaxBlockRows);
  // An even number, where there are several: two threads then have as many, and four nearly.
  return {row_blocks > 1 ? row_blocks + row_blocks % 2 : row_blocks, ceil_div(panels, a_block)};
}

PAGELENS_INLINE Block block_at(const Problem& p, const Cut& c, int32_t problem, int64_t i) {
  const int64_t m = i / c.panel_blocks, n = i % c.panel_blocks, panels = p.weight.panels();
  Block b;
  b.problem = problem;
  b.row = static_cast<int32_t>(p.rows * m / c.row_blocks);
  b.rows = static_cast<int32_t>(p.rows * (m + 1) / c.row_blocks) - b.row;
  b.panel = static_cast<int32_t>(panels * n / c.panel_blocks);
  b.panels = static_cast<int32_t>(panels * (n + 1) / c.panel_blocks) - b.panel;
  return b;
}

// One row into word column r of a tile of R rows.
template <class T>
PAGELENS_INLINE void pack_row_f32(const T* x, int64_t k, int R, float* to) {
  for (int64_t i = 0; i < k; i++) to[i * R] = get(x + i);
}

// Whether the words of x are those that the tile multiplies.
PAGELENS_INLINE bool has_tile_words(const Source& x, const PackedLinear& w) {
  return w.dtype == DType::f32 ? x.dtype == DType::f32 : kBf16Dot;
}

// sides: what quantised rows want beside, or the memory of R gathered rows.
PAGELENS_INLINE void pack_tile(const Source& x, const PackedLinear& w, int64_t row, int R, uint32_t* to, float* sides) {
  if (w.quantized()) {
    pack_quantized_tile(x, w, row, R, to, sides);
    return;
  }
  const void* rows[kMaxTileRows];
  for (int r = 0; r < R; r++) rows[r] = x.taps ? gather_row(*x.taps, row + r, sides + r * w.k) : x.row(row + r);
  if (has_tile_words(x, w)) {
    const int64_t values = w.dtype == DType::f32 ? 1 : 2;
    pack_words(rows, R, w.k / values, to);
    for (int r = 0; w.k % values && r < R; r++) to[w.k / 2 * R + r] = static_cast<const bf16*>(rows[r])[w.k - 1];
    return;
  }
  for (int r = 0; r < R; r++) {
    float* words = reinterpret_cast<float*>(to) + r;
    if (x.dtype == DType::f32) {
      pack_row_f32(static_cast<const float*>(rows[r]), w.k, R, words);
    } else {
      pack_row_f32(static_cast<const bf16*>(rows[r]), w.k, R, words);
    }
    if (w.dtype == DType::bf16 && w.k % 2) words[w.k * R] = 0.0f;
  }
}

// A single row needs no packing where its words already lie as the tile wants them.
PAGELENS_INLINE bool lies_packed(const Source& x, const PackedLinear& w) {
  if (w.quantized())
    return !w.order && !side_floats(w) && w.k % 8 == 0 && x.dtype == w.dtype && tile_dtype(w) == w.dtype;
  if (x.taps) return false;
  return w.dtype == DType::f32 ? x.dtype == DType::f32 : kBf16Dot && w.k % 2 == 0;
}

// The weights that are read after groups g0..g1 of a panel of the block: as many of the next panel, those behind g1 of
// the first, or those of the next block; null at the end.
PAGELENS_INLINE const uint32_t* next_slab(const PackedLinear& w, const Block& b, int64_t panel, int64_t g0,
                                          int64_t g1) {
  const uint32_t* weight = static_cast<const uint32_t*>(w.weight);
  if (panel + 1 < b.panel + b.panels) return weight + (panel + 1) * w.panel_words() + g0 * kPanel;
  if (g1 < w.groups()) return weight + b.panel * w.panel_words() + g1 * kPanel;
  return panel + 1 < w.panels() ? weight + (panel + 1) * w.panel_words() : nullptr;
}

// Tiles of a block of plain weights. The first tile over a slab waits for memory unless an earlier one has fetched it,
// so 5 rows and more are two tiles at least: one tile of 14 rows takes as long as two of 8.
PAGELENS_INLINE int64_t tiles_of(const PackedLinear& w, int64_t rows) {
  const int64_t least = ceil_div(rows, kMaxTileRows);
  return kTileFetches && !w.quantized() && least == 1 && rows > 4 ? 2 : least;
}

// Each of the first two tiles over a slab fetches half of what comes next, spread over its products: fetched before
// them, in one burst, it takes as long as if it were not fetched.
PAGELENS_INLINE Fetch fetch_of_tile(const uint32_t* next, const uint32_t* here, int64_t groups, int64_t t) {
  if (!next || t >= 2) return {here, 0};
  return {next + t * groups * kPanel / 2, 64};
}

template <class Epilogue>
inline void run_block(const Problem& p, const Block& b, const uint32_t* a, float* sums, Epilogue& epilogue) {
  const int64_t words = words_a_row(p.weight), groups = p.weight.groups(), tiles = tiles_of(p.weight, b.rows);
  const int64_t words_a_group = groups ? words / groups : 1;
  const int64_t passes = std::max<int64_t>(ceil_div(groups, b.rows > kMaxTileRows ? kGroupsAPass : groups + 1), 1);
  const uint32_t* weight = static_cast<const uint32_t*>(p.weight.weight);
  for (int64_t pass = 0; pass < passes; pass++) {
    const int64_t g0 = groups * pass / passes, g1 = groups * (pass + 1) / passes;
    for (int64_t panel = b.panel; panel < b.panel + b.panels; panel++) {
      const uint32_t* w = weight + panel * p.weight.panel_words() + g0 * kPanel;
      const uint32_t* next = tiles > 1 ? next_slab(p.weight, b, panel, g0, g1) : nullptr;
      for (int64_t t = 0; t < tiles; t++) {
        fetch_part(next, (g1 - g0) * kPanel * 4, t, tiles);
        const int64_t r0 = tile_start(b.rows, tiles, t);
        const int R = static_cast<int>(tile_start(b.rows, tiles, t + 1) - r0);
        float* acc = sums + (passes > 1 ? ((panel - b.panel) * b.rows + r0) * kPanel : 0);
        tile_fn(p.weight.dtype, R)(a + r0 * words + g0 * words_a_group * R, w, g1 - g0, acc, pass == 0,
                                   fetch_of_tile(next, w, g1 - g0, t));
        if (pass + 1 == passes) epilogue(b, b.row + r0, R, panel, acc);
      }
    }
  }
}

// ---- rows that are rounded to 8 bits --------------------------------------------------------------------------------
// Few rows are rounded once for all threads and blocks. A thread that has a block of many rounds them as it packs those
// of plain weights: what it rounds stays in its second cache.
constexpr int64_t kFewRoundedRows = 32;
constexpr int kRoundedRows = 7;                   // the pool's shared scratch of this
constexpr int64_t kRoundHere = int64_t{1} << 13;  // of K over all rows: fewer are not worth waking a thread

PAGELENS_INLINE bool rounds_before(const Problem& p) { return runs_int8(p.weight) && p.rows <= kFewRoundedRows; }

// Where the rounded rows of each problem lie.
struct RoundedRows {
  uint32_t* words = nullptr;
  const int64_t* at = nullptr;  // of each problem, in words

  const uint32_t* of(int64_t problem, int64_t row, const PackedLinear& w) const {
    return words + at[problem] + row * int8_row_words(w);
  }
};

// Whether b's rows are a's: the same single row, rounded alike (the experts of one token).
PAGELENS_INLINE bool same_rounded_row(const Problem& a, const Problem& b) {
  return a.rows == 1 && b.rows == 1 && runs_int8(a.weight) && a.x.dtype == b.x.dtype && a.x.row(0) == b.x.row(0) &&
         a.weight.k == b.weight.k && a.weight.format == b.weight.format &&
         a.weight.activation_group == b.weight.activation_group;
}

// Rounds the rows of the problems that want it, tile by tile of each block as run_int8_block takes them.
inline RoundedRows round_rows(ThreadPool& pool, const Problem* problems, int64_t count) {
  int64_t total = 0, elements = 0, used = 0;
  for (int64_t i = 0; i < count; i++)
    if (rounds_before(problems[i])) total += problems[i].rows * int8_row_words(problems[i].weight), used++;
  if (used == 0) return {};
  // [count] places in words, [count + 1] first tasks (a task is a tile), then the rows.
  int64_t* at = pool.shared<int64_t>(kRoundedRows, 2 * count + 9 + (total + 1) / 2);
  int64_t* tasks = at + count;
  uint32_t* words = reinterpret_cast<uint32_t*>(tasks + count + 1);
  int64_t next = 0;
  tasks[0] = 0;
  for (int64_t i = 0; i < count; i++) {
    const Problem& p = problems[i];
    at[i] = next, tasks[i + 1] = tasks[i];
    if (!rounds_before(p)) continue;
    if (i > 0 && same_rounded_row(problems[i - 1], p)) {
      at[i] = at[i - 1];
      continue;
    }
    const int64_t row_blocks = cut(p).row_blocks;
    if (row_blocks) tasks[i + 1] += row_blocks * ceil_div(ceil_div(p.rows, row_blocks), kInt8TileRows);
    next += p.rows * int8_row_words(p.weight), elements += p.rows * p.weight.k;
  }
  const auto round_tile = [&](int64_t task, int) {
    const int64_t i = std::upper_bound(tasks, tasks + count + 1, task) - tasks - 1;
    const Problem& p = problems[i];
    const Cut c = cut(p);
    const int64_t a_block = (tasks[i + 1] - tasks[i]) / c.row_blocks, own = task - tasks[i];
    const Block b = block_at(p, c, static_cast<int32_t>(i), own / a_block * c.panel_blocks);
    const int64_t tiles = ceil_div(b.rows, kInt8TileRows), t = own % a_block;
    if (t >= tiles) return;
    const int64_t r0 = b.row + tile_start(b.rows, tiles, t), r1 = b.row + tile_start(b.rows, tiles, t + 1);
    pack_int8_tile(p.x, p.weight, r0, static_cast<int>(r1 - r0), words + at[i] + r0 * int8_row_words(p.weight));
  };
  if (elements <= kRoundHere) {
    for (int64_t task = 0; task < tasks[count]; task++) round_tile(task, 0);
  } else {
    pool.run(tasks[count], round_tile);
  }
  return {words, at};
}

// Rounds a block's rows, tile by tile as run_int8_block takes them.
PAGELENS_INLINE void pack_int8_block(const Problem& p, const Block& b, uint32_t* to) {
  const int64_t tiles = ceil_div(b.rows, kInt8TileRows), words = int8_row_words(p.weight);
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t r0 = tile_start(b.rows, tiles, t), r1 = tile_start(b.rows, tiles, t + 1);
    pack_int8_tile(p.x, p.weight, b.row + r0, static_cast<int>(r1 - r0), to + r0 * words);
  }
}

// epilogue(block, first row, rows, panel, sums [rows][32]) runs on any thread, once for every row and panel.
template <class BlockAt, class Epilogue>
inline void gemm(ThreadPool& pool, const Problem* problems, int64_t num_problems, int64_t blocks, BlockAt&& at,
                 Epilogue&& epilogue) {
  int64_t words = 0, rows = 0, sides = 0, gathered = 0;
  for (int64_t i = 0; i < num_problems; i++) {
    if (runs_int8(problems[i].weight)) {
      if (!rounds_before(problems[i])) words = std::max(words, int8_row_words(problems[i].weight));
    } else {
      words = std::max(words, words_a_row(problems[i].weight));
      sides = std::max(sides, side_floats(problems[i].weight));
    }
    rows = std::max(rows, std::min(problems[i].rows, kMaxBlockRows));
    if (problems[i].x.taps) gathered = std::max(gathered, problems[i].weight.k * kMaxTileRows);
  }
  const auto line = [](int64_t floats) { return (floats + 15) / 16 * 16; };
  // Of each thread: packed rows, what a quantised weight wants of them beside, sums, scratch of a quantised block.
  const int64_t side_at = line(rows * words), sums_at = side_at + line(std::max(rows * sides, gathered));
  const int64_t sum_floats = std::max(rows * kPanel * kMaxBlockPanels, quantized_scratch(rows));
  pool.reserve_local(static_cast<size_t>(sums_at + sum_floats) * 4);
  struct Packed {
    int32_t problem = -1, row = -1;
  } have[ThreadPool::kMaxThreads];
  const RoundedRows rounded = round_rows(pool, problems, num_problems);

  pool.run(blocks, [&](int64_t i, int thread) {
    const Block b = at(i);
    const Problem& p = problems[b.problem];
    uint32_t* packed = static_cast<uint32_t*>(pool.local(thread));
    float* side = static_cast<float*>(pool.local(thread)) + side_at;
    float* sums = static_cast<float*>(pool.local(thread)) + sums_at;
    const bool is_packed = have[thread].problem == b.problem && have[thread].row == b.row;
    if (rounds_before(p)) {
      run_int8_block(p.weight, b, rounded.of(b.problem, b.row, p.weight), sums, epilogue);
      return;
    }
    if (runs_int8(p.weight)) {
      if (!is_packed) pack_int8_block(p, b, packed);
      have[thread] = {b.problem, b.row};
      run_int8_block(p.weight, b, packed, sums, epilogue);
      return;
    }
    const uint32_t* a = packed;
    if (b.rows == 1 && lies_packed(p.x, p.weight)) {
      a = static_cast<const uint32_t*>(p.x.row(b.row));
    } else if (!is_packed) {
      const int64_t tiles = tiles_of(p.weight, b.rows), width = words_a_row(p.weight);
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t r0 = tile_start(b.rows, tiles, t), r1 = tile_start(b.rows, tiles, t + 1);
        pack_tile(p.x, p.weight, b.row + r0, static_cast<int>(r1 - r0), packed + r0 * width,
                  side + r0 * side_floats(p.weight));
      }
      have[thread] = {b.problem, b.row};
    }
    if (p.weight.quantized() && runs_few_rows(p.weight, b.rows)) {
      run_few_rows_block(p.weight, b, a, side, sums, epilogue);
    } else if (p.weight.quantized()) {
      run_quantized_block(p.weight, b, a, side, sums, epilogue);
    } else {
      run_block(p, b, a, sums, epilogue);
    }
  });
}

}  // namespace pagelens::PAGELENS_ISA
