// The innermost product: R rows of activations times one panel of 32 packed columns.
//
// Every output has one float32 accumulator, and K runs upwards: its bits depend on its own row and column alone, not on
// R, on the other rows, on how K was cut or on the thread. That is the batch invariance of the contract; keep it.
#pragma once
#include "common/simd.h"

namespace pagelens::PAGELENS_ISA {

constexpr int kPanel = 32;
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
constexpr int kMaxTileRows = 14;  // x 2 vectors = 28 accumulators, 2 of weights, 1 broadcast: 31 of 32 registers
#elif defined(PAGELENS_ISA_AVX2)
constexpr int kMaxTileRows = 6;  // x 2 vectors, twice over the panel
#else
constexpr int kMaxTileRows = 4;
#endif

#ifdef PAGELENS_ISA_AVX512_BF16
constexpr bool kBf16Dot =
    true;  // bfloat16 activations stay pairs; elsewhere they are widened once, when a tile is packed
#else
constexpr bool kBf16Dot = false;
#endif

// What the tile of a weight multiplies: pairs of bfloat16, or floats.
PAGELENS_INLINE DType tile_dtype(const PackedLinear& w) {
  return w.dtype == DType::bf16 && (kBf16Dot || !w.quantized()) ? DType::bf16 : DType::f32;
}

// 4-byte words of packed activations a row has for a weight.
PAGELENS_INLINE int64_t words_a_row(const PackedLinear& w) {
  if (w.quantized()) return (w.k + 7) / 8 * (tile_dtype(w) == DType::bf16 ? 4 : 8);
  return w.dtype == DType::bf16 && !kBf16Dot ? 2 * w.groups() : w.groups();
}

// Whether tiles fetch what comes next while they multiply. AVX2 has no register left for the pointer: it spilled a sum.
constexpr bool kTileFetches = W == 16;

// What such a tile fetches into the second cache: a line a group of K, `step` bytes apart. Where nothing is to be
// fetched, a line that is read anyway and a step of 0: that costs less than a branch.
struct Fetch {
  const void* from;
  int64_t step;
};

// a: packed rows [words][R]; w: `groups` groups of one panel; acc: [R][32], overwritten if `first`, else added to.
using TileFn = void (*)(const void* a, const void* w, int64_t groups, float* acc, bool first, const Fetch& fetch);
TileFn tile_fn(DType weight_dtype, int rows);  // 1 <= rows <= kMaxTileRows

// Rows of a matrix, or those that `index` names: row i is base + (index ? index[i] / divisor : i) * stride. With `taps`
// there is no matrix: a row is gathered when a tile is packed (cpu/taps.h).
struct Source {
  const void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::f32;
  const int32_t* index = nullptr;
  int64_t divisor = 1;
  const struct Taps* taps = nullptr;

  const void* row(int64_t i) const {
    const int64_t at = (index ? index[i] / divisor : i) * stride;
    return static_cast<const char*>(data) + at * (dtype == DType::f32 ? 4 : 2);
  }
};

struct Block {
  int32_t problem = 0;
  int32_t row = 0, rows = 0;
  int32_t panel = 0, panels = 0;
};

PAGELENS_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of tile t of `tiles` in a block: as equal as they can be.
PAGELENS_INLINE int64_t tile_start(int64_t rows, int64_t tiles, int64_t t) { return rows * t / tiles; }

// Where tiles do not: fetches part t of `parts` of the weights that come next, before tile t. Null: nothing comes next.
PAGELENS_INLINE void fetch_part(const void* next, int64_t bytes, int64_t t, int64_t parts) {
  if (kTileFetches || !next) return;
  const char* from = static_cast<const char*>(next);
  for (int64_t i = bytes * t / parts & ~int64_t{63}; i < bytes * (t + 1) / parts; i += 64)
    __builtin_prefetch(from + i, 0, 2);
}

}  // namespace pagelens::PAGELENS_ISA
