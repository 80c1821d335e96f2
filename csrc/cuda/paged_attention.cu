// paged_attention: causal attention over the paged cache with grouped queries, split over the keys.
//
// A tile is 16 rows of mma: rows are (query, head of the group) pairs of one sequence and one kv head, so that at
// decode a group of 8 or 16 query heads reads its keys once and fills half or all of the tile. A block takes one tile
// and one split of kSplit keys. Its 4 warps take pieces of 16 keys in turn, each with its own running maximum, sum and
// output, two stages of cp.async deep; at the end they merge through shared memory in the order of warps. With more
// than one split the block writes its maximum, sum and unnormalised output, and a second launch merges the splits in
// their order. A tile has the splits that its keys need; the grid has those of the longest context that is possible,
// and the rest of it ends at once. Splits stand at fixed multiples of kSplit keys, whatever else is in the batch: a
// row's bits do not depend on it. The scratch of all tiles would be gigabytes for a prompt in a table of 40,960 keys:
// the two launches take as many tiles as fit kMostScratch, and are repeated for the rest.
//
// P goes into the second product as two bf16 parts. Fragments and swizzle: attention_tile.h.
//
// Bytes at decode: 4 context kv_heads head_dim (keys and values once, bf16) for each sequence. FLOPs: 4 context heads
// head_dim. (16, 8, 128) at 4096: 16.8 MB, 34 MFLOP; floor on an A100 (1.9 TB/s) 8.8 us, memory. Prefill works through
// the same tiles but re-reads keys for every 16 rows; the Triton kernel is the one for it.
#include <algorithm>
#include <stdexcept>

#include "cuda/attention_tile.h"

namespace pagelens::cuda {
namespace {

using namespace attention;

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16, kPiece = 16, kSplit = 256, kStages = 2;

struct Tile {
  int sequence, first_row, rows_left;  // rows of the sequence from this tile on
  int context, queries, first_query;
  int end;  // keys that any of its rows sees

  __device__ int splits() const { return max(1, (end + kSplit - 1) / kSplit); }
};

// A number -> the tile of 16 rows, counted through the sequences; false past the last.
__device__ inline bool find_tile(const PagedAttentionArgs& a, int index, int group, Tile& tile) {
  for (int s = 0; s < a.sequences; s++) {
    const int first = a.query_starts[s], queries = a.query_starts[s + 1] - first;
    const int tiles = (queries * group + kRows - 1) / kRows;
    if (index < tiles) {
      const int row = index * kRows, left = queries * group - row, context = a.context_lens[s];
      const int last_query = (row + min(kRows, left) - 1) / group;
      tile = {s, row, left, context, queries, first, context - queries + last_query + 1};
      return true;
    }
    index -= tiles;
  }
  return false;
}

// Starts the copies of one piece: kPiece keys and values of this kv head, zeros past the context.
template <int D>
__device__ inline void load_piece(const PagedAttentionArgs& a, const Tile& tile, int kv_head, int first_key,
                                  int end_key, unsigned char* keys, unsigned char* values) {
  constexpr int kChunks = D / 8;
  const int lane = threadIdx.x & 31;
  const int32_t* table = a.block_tables + static_cast<int64_t>(tile.sequence) * a.table_width;
#pragma unroll
  for (int i = lane; i < kPiece * kChunks; i += 32) {
    const int row = i / kChunks, chunk = i % kChunks, key = first_key + row;
    const bool valid = key < end_key;
    const int64_t slot =
        valid ? static_cast<int64_t>(table[key / a.block_size]) * a.block_size + key % a.block_size : 0;
    const int64_t offset = (slot * a.kv_heads + kv_head) * D + chunk * 8;
    simt::cp_async16(keys + swizzled<D>(row, chunk), a.keys + offset, valid);
    simt::cp_async16(values + swizzled<D>(row, chunk), a.values + offset, valid);
  }
  simt::cp_async_commit();
}

// One piece of keys into the running softmax. last_key[h]: the last key that row g + 8 h sees.
template <int D>
__device__ inline void take_piece(const uint32_t (&q)[D / 16][4], unsigned char* keys, unsigned char* values,
                                  int first_key, const int (&last_key)[2], float scale, Running<D>& run) {
  const int t = threadIdx.x & 3;
  float s[2][4] = {};
  add_scores<D>(q, keys, 0, s);
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int key = first_key + 8 * n + 2 * t + (e & 1);
      s[n][e] = key <= last_key[e >> 1] ? s[n][e] * scale : -INFINITY;
    }
  soften<D>(s, run);
  // P as the sum of two bf16, so that its rounding (2^-17) does not show in a bf16 result; decode waits for memory, not
  // for the second product.
  uint32_t p[4], rest[4];
  round_weights(s, p, rest);
  add_values<D, true>(p, rest, values, 0, run);
}

// What a warp, or a split, knows of 16 rows: [2][16] maximum and sum, then [16][D + kPad] output, in floats. With the
// padding 4 rows of 8 floats, which a half warp stores at once, lie in 32 different banks.
constexpr int kHead = 2 * kRows, kPad = 8;
SIMT_BOTH constexpr int record_size(int d) { return kHead + kRows * (d + kPad); }

template <int D>
__device__ inline void put_down(const Running<D>& run, float* to) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float sum = sum_of_row(run.sum[h]);
    if (t == 0) {
      to[g + 8 * h] = run.largest[h];
      to[kRows + g + 8 * h] = sum;
    }
#pragma unroll
    for (int n = 0; n < D / 8; n++)
      *reinterpret_cast<uint64_t*>(to + kHead + (g + 8 * h) * (D + kPad) + 8 * n + 2 * t) =
          simt::two_floats(run.out[n][2 * h], run.out[n][2 * h + 1]);
  }
}

// The merge of `count` such records, `stride` floats apart, for one row and column.
struct Merged {
  float largest, sum, out;
};
__device__ inline Merged merge(const float* records, int64_t stride, int count, int row, int column, int d) {
  float largest = -INFINITY;
  for (int i = 0; i < count; i++) largest = fmaxf(largest, records[i * stride + row]);
  const float base = largest == -INFINITY ? 0.0f : largest;
  Merged m{largest, 0.0f, 0.0f};
  for (int i = 0; i < count; i++) {
    const float* record = records + i * stride;
    const float factor = expf(record[row] - base);
    m.sum += factor * record[kRows + row];
    m.out += factor * record[kHead + row * (d + kPad) + column];
  }
  return m;
}

__device__ inline bf16* place_of(const PagedAttentionArgs& a, const Tile& tile, int kv_head, int group, int row) {
  const int flat = tile.first_row + row;
  const int64_t query = tile.first_query + flat / group, head = kv_head * group + flat % group;
  return a.out + (query * a.heads + head) * a.head_dim;
}

template <int D>
__global__ void __launch_bounds__(kThreads) attend(const PagedAttentionArgs a, int first_tile, int splits) {
  constexpr int kPieceBytes = kPiece * D * 2, kWarpBytes = kStages * 2 * kPieceBytes;
  constexpr int kRecord = record_size(D);
  const int group = a.heads / a.kv_heads, kv_head = blockIdx.z, split = blockIdx.x;
  const int lane = threadIdx.x & 31, g = lane >> 2;
  // By a shuffle, so that the compiler sees one value for the warp: it takes the loop's shuffles for diverged
  // otherwise, and calls a function of 8 bytes of stack for them on sm_89.
  const int warp = __shfl_sync(kAll, static_cast<int>(threadIdx.x >> 5), 0);
  Tile tile;
  if (!find_tile(a, first_tile + static_cast<int>(blockIdx.y), group, tile) || split >= tile.splits()) return;

  int last_key[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int row = g + 8 * h;
    const int query = (tile.first_row + min(row, tile.rows_left - 1)) / group;
    last_key[h] = tile.context - tile.queries + query;
  }
  const int first_key = split * kSplit, end_key = min(first_key + kSplit, tile.end);

  Running<D> run;
  begin<D>(run);
  uint32_t q[D / 16][4];
  const auto query_row = [&](int row) -> const bf16* {
    const int flat = tile.first_row + row;
    const int64_t query = tile.first_query + flat / group, head = kv_head * group + flat % group;
    return row < tile.rows_left ? a.q + (query * a.heads + head) * D : nullptr;
  };
  load_queries<D>(query_row, q);

  unsigned char* mine = simt::shared_memory() + warp * kWarpBytes;
  const int pieces = end_key > first_key ? (end_key - first_key + kPiece - 1) / kPiece : 0;
  const auto load = [&](int piece, int stage) {
    unsigned char* at = mine + stage * 2 * kPieceBytes;
    load_piece<D>(a, tile, kv_head, first_key + piece * kPiece, end_key, at, at + kPieceBytes);
  };
  if (warp < pieces) load(warp, 0);
  int stage = 0;
  for (int piece = warp; piece < pieces; piece += kWarps, stage ^= 1) {
    if (piece + kWarps < pieces) {
      load(piece + kWarps, stage ^ 1);
      simt::cp_async_wait<1>();
    } else {
      simt::cp_async_wait<0>();
    }
    __syncwarp();  // the other lanes' copies
    unsigned char* at = mine + stage * 2 * kPieceBytes;
    take_piece<D>(q, at, at + kPieceBytes, first_key + piece * kPiece, last_key, a.scale, run);
    __syncwarp();  // before the next copies into this stage
  }
  __syncthreads();  // shared memory changes its use
  float* records = reinterpret_cast<float*>(simt::shared_memory());
  put_down<D>(run, records + warp * kRecord);
  __syncthreads();

  const int rows = min(kRows, tile.rows_left);
  float* partial = a.partial + ((static_cast<int64_t>(blockIdx.y) * a.kv_heads + kv_head) * splits + split) * kRecord;
  for (int i = threadIdx.x; i < rows * D; i += kThreads) {
    const int row = i / D, column = i % D;
    const Merged m = merge(records, kRecord, kWarps, row, column, D);
    if (splits == 1) {
      simt::put(place_of(a, tile, kv_head, group, row) + column, m.out / m.sum);
    } else {
      partial[kHead + row * (D + kPad) + column] = m.out;
      if (column == 0) {
        partial[row] = m.largest;
        partial[kRows + row] = m.sum;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) merge_splits(const PagedAttentionArgs a, int first_tile, int splits) {
  const int group = a.heads / a.kv_heads, kv_head = blockIdx.y, d = a.head_dim, record = record_size(d);
  Tile tile;
  if (!find_tile(a, first_tile + static_cast<int>(blockIdx.x), group, tile)) return;
  const float* records = a.partial + (static_cast<int64_t>(blockIdx.x) * a.kv_heads + kv_head) * splits * record;
  const int rows = min(kRows, tile.rows_left);
  for (int i = threadIdx.x; i < rows * d; i += kThreads) {
    const Merged m = merge(records, record, tile.splits(), i / d, i % d, d);
    simt::put(place_of(a, tile, kv_head, group, i / d) + i % d, m.out / m.sum);
  }
}

constexpr int64_t kMostScratch = int64_t{32} << 20;  // floats, if that is room for one tile
constexpr int64_t kMostTiles = 65535;                // of a launch: the limit of a grid's y

struct Plan {
  int64_t tiles, at_once;  // at least those there are; those of a pair of launches
  int splits;              // of a tile at most

  explicit Plan(const PagedAttentionArgs& a)
      : tiles(ceil_div(static_cast<int64_t>(a.tokens) * (a.heads / a.kv_heads), kRows) + a.sequences),
        splits(static_cast<int>(std::max<int64_t>(1, ceil_div(a.longest_context, kSplit)))) {
    const int64_t that_fit = splits > 1 ? std::max<int64_t>(1, kMostScratch / floats_of_tile(a)) : kMostTiles;
    at_once = std::min({tiles, that_fit, kMostTiles});
  }
  int64_t floats_of_tile(const PagedAttentionArgs& a) const {
    return static_cast<int64_t>(a.kv_heads) * splits * record_size(a.head_dim);
  }
};

template <int D>
void run(const PagedAttentionArgs& a, Stream stream) {
  const Plan plan(a);
  const unsigned splits = static_cast<unsigned>(plan.splits), heads = static_cast<unsigned>(a.kv_heads);
  const size_t loads = size_t{kWarps} * kStages * 2 * kPiece * D * 2;
  const size_t records = sizeof(float) * kWarps * record_size(D);
  for (int64_t first = 0; first < plan.tiles; first += plan.at_once) {
    const unsigned tiles = static_cast<unsigned>(std::min(plan.at_once, plan.tiles - first));
    simt::launch(attend<D>, dim3(splits, tiles, heads), dim3(kThreads), std::max(loads, records), stream, a, first,
                 plan.splits);
    if (splits > 1) simt::launch(merge_splits, dim3(tiles, heads), dim3(kThreads), 0, stream, a, first, plan.splits);
  }
}

}  // namespace

int64_t paged_attention_scratch(const PagedAttentionArgs& a) {
  const Plan plan(a);
  return plan.splits > 1 ? plan.at_once * plan.floats_of_tile(a) : 0;
}

void paged_attention(const PagedAttentionArgs& a, Stream stream) {
  if (a.heads % a.kv_heads) throw std::invalid_argument("paged_attention: heads must be a multiple of kv_heads");
  if (!a.tokens) return;
  switch (a.head_dim) {
    case 16:
      return run<16>(a, stream);
    case 32:
      return run<32>(a, stream);
    case 64:
      return run<64>(a, stream);
    case 96:
      return run<96>(a, stream);
    case 128:
      return run<128>(a, stream);
  }
  throw std::invalid_argument("paged_attention takes a head_dim of 16, 32, 64, 96 or 128");
}

}  // namespace pagelens::cuda
