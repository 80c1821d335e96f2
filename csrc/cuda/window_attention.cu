// window_attention: SAM's attention with decomposed relative positions, in windows of the grid or over all of it.
//
// A block takes 64 queries of one window and head: 4 warps, 16 rows each, which share the keys and values of a stage
// (64 keys, two stages of cp.async). A position outside the grid reads the padding's row instead, so nothing is
// gathered before. The terms q . rel_h[i_q - i_k + w - 1] and q . rel_w[...] are two small products of the same queries
// with the tables, done first through the same buffers: the tables come as a sum of two bf16 (2^-17 of float32), and
// what a query can meet is kept in shared memory as 64 rows of 2 w float32, from where each score adds its two terms.
// No bias of w^4 values is ever formed. The softmax stays in registers.
//
// Bytes: q, k, v once from HBM (a window's keys are read by its tiles from L2), the result once: 8 C a position. FLOPs:
// 4 w^2 C a position, and 4 (2 w - 1) C for the terms, twice. 64 x 64 global, 12 heads of 64: 51.5 GFLOP and 25 MB;
// floor on an A100 0.17 ms, compute. Windows of 14: 2.9 GFLOP, 20 us.
#include <algorithm>
#include <stdexcept>

#include "cuda/attention_tile.h"

namespace pagelens::cuda {
namespace {

using namespace attention;

constexpr int kWarps = 4, kThreads = 32 * kWarps, kRows = 16 * kWarps, kStage = 64;

struct Window {
  const bf16* base;  // of the view
  int top, left;     // of the window in the grid
  uint32_t inverse;  // inverse_of(size)
};

// p / size for 0 <= p < size^2 as a product: exact, since p * (inverse * size - 2^24) <= size^3 stays below 2^24, and
// without overflow, since p * inverse <= size * 2^24 + size^2 does below 2^32 (sizes up to 128).
__device__ inline uint32_t inverse_of(int size) { return (1u << 24) / static_cast<uint32_t>(size) + 1u; }
__device__ inline int row_of(int p, uint32_t inverse) {
  return static_cast<int>((static_cast<uint32_t>(p) * inverse) >> 24);
}

// q, k or v (part 0, 1, 2) of one head at position p of the window; the padding's outside the grid.
__device__ inline const bf16* value_at(const WindowAttentionArgs& a, const Window& w, int p, int part, int head) {
  const int row_in_window = row_of(p, w.inverse), width = a.heads * a.head_dim;
  const int y = w.top + row_in_window, x = w.left + p - row_in_window * a.size;
  const bool inside = y < a.grid && x < a.grid;
  const bf16* row = inside ? w.base + (static_cast<int64_t>(y) * a.grid + x) * 3 * width : a.pad_qkv;
  return row + part * width + head * a.head_dim;
}

// Starts the copies of 64 rows of D values: row r from source(r), or zeros where that is null.
template <int D, class Source>
__device__ inline void load_rows(const Source& source, unsigned char* to) {
  constexpr int kChunks = D / 8;
#pragma unroll 2
  for (int i = threadIdx.x; i < kStage * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bf16* from = source.at(row);
    simt::cp_async16(to + swizzled<D>(row, chunk), from ? from + chunk * 8 : source.any, from != nullptr);
  }
}

struct TableRows {
  const bf16* any;
  int first, rows, d;
  __device__ const bf16* at(int r) const {
    return first + r < rows ? any + static_cast<int64_t>(first + r) * d : nullptr;
  }
};

struct WindowRows {
  const WindowAttentionArgs& a;
  const Window& w;
  int first, part, head;
  const bf16* any;
  __device__ const bf16* at(int r) const {
    const int p = first + r;
    return p < a.size * a.size ? value_at(a, w, p, part, head) : nullptr;
  }
};

// A row's terms in shared memory: c < size is the term of key row c, size + c that of key column c. Rows lie 8 banks
// apart and those of the upper half of a group of 8 one further, so that a warp that reads keys 2 t of rows g meets no
// bank twice.
SIMT_BOTH constexpr int row_stride(int size) { return (2 * size + 1 + 23) / 32 * 32 + 8; }
__device__ inline float* terms_of(float* terms, int row, int size) {
  return terms + row * row_stride(size) + ((row >> 2) & 1);
}

// Each warp's products of 16 queries with 32 rows of a table, before they are shifted by their queries' own places:
// rows 8 banks apart, so that half a warp that stores pairs (a phase) meets no bank twice.
constexpr int kStrip = 32, kStripStride = kStrip + 8, kStripBytes = kRows * kStripStride * 4;

// The products of a strip of 32 table rows from `first` on become terms: key c of a query at `at` is what it has with
// row at - c + size - 1. Stored from the accumulators, rows shifted by different amounts would meet in a bank; here a
// warp takes one row at a time, whose terms lie together.
__device__ inline void shift_strip(const float* strip, const WindowAttentionArgs& a, int axis, int first,
                                   int first_query, float* terms) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, query = first_query + warp * 16;
  int y = query / a.size, x = query - y * a.size;
  float row[16];  // all loads first: each store may be to what the next load reads, as far as the compiler knows
#pragma unroll
  for (int r = 0; r < 16; r++) row[r] = strip[r * kStripStride + lane];
#pragma unroll
  for (int r = 0; r < 16; r++) {
    const int key = (axis ? x : y) - (first + lane) + a.size - 1;
    if (key >= 0 && key < a.size) terms_of(terms, warp * 16 + r, a.size)[axis * a.size + key] = row[r];
    if (++x == a.size) x = 0, y++;
  }
}

// Two stages of keys and values; the tables take the first of them, the strips what follows.
SIMT_BOTH constexpr int shared_of_stages(int d) {
  const int stage = 4 * kStage * d;
  return stage + (stage > kStripBytes ? stage : kStripBytes);
}

// `stage` has room for 64 rows of both parts of a table, `strips` kStripBytes.
template <int D>
__device__ inline void relative_terms(const WindowAttentionArgs& a, const uint32_t (&q)[D / 16][4], int first_query,
                                      unsigned char* stage, float* strips, float* terms) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, warp = threadIdx.x >> 5;
  const int rows = 2 * a.size - 1;
  float* strip = strips + warp * 16 * kStripStride;
  for (int axis = 0; axis < 2; axis++) {
    const bf16* const tables[2] = {axis ? a.rel_w_high : a.rel_h_high, axis ? a.rel_w_low : a.rel_h_low};
    for (int first = 0; first < rows; first += kStage) {
      for (int part = 0; part < 2; part++)
        load_rows<D>(TableRows{tables[part], first, rows, D}, stage + part * kStage * D * 2);
      simt::cp_async_commit();
      simt::cp_async_wait<0>();
      __syncthreads();
      for (int begin = 0; begin < kStage && first + begin < rows; begin += kStrip) {
#pragma unroll 1
        for (int piece = 0; piece < kStrip; piece += 16) {
          float s[2][4] = {};
          add_scores<D>(q, stage + kStage * D * 2, begin + piece, s);  // the smaller parts first
          add_scores<D>(q, stage, begin + piece, s);
#pragma unroll
          for (int n = 0; n < 2; n++)
#pragma unroll
            for (int h = 0; h < 2; h++)
              *reinterpret_cast<uint64_t*>(strip + (g + 8 * h) * kStripStride + piece + 8 * n + 2 * t) =
                  simt::two_floats(s[n][2 * h], s[n][2 * h + 1]);
        }
        __syncwarp();
        shift_strip(strip, a, axis, first + begin, first_query, terms);
        __syncwarp();  // before the next products overwrite the strip
      }
      __syncthreads();  // before the next rows overwrite these
    }
  }
}

template <int D>
__global__ void __launch_bounds__(kThreads, 2) attend(const WindowAttentionArgs a) {
  constexpr int kPart = kStage * D * 2, kStageBytes = 2 * kPart;
  const int positions = a.size * a.size, first_query = blockIdx.x * kRows, head = blockIdx.y;
  const int per_view = a.across * a.across, view = blockIdx.z / per_view, index = blockIdx.z % per_view;
  const int64_t width = static_cast<int64_t>(a.heads) * D, cells = static_cast<int64_t>(a.grid) * a.grid;
  const Window w{a.qkv + view * cells * 3 * width, index / a.across * a.size, index % a.across * a.size,
                 inverse_of(a.size)};
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int my_first = first_query + warp * 16;

  unsigned char* stages = simt::shared_memory();
  float* terms = reinterpret_cast<float*>(stages + shared_of_stages(D));

  uint32_t q[D / 16][4];
  load_queries<D>(
      [&](int row) -> const bf16* {
        return my_first + row < positions ? value_at(a, w, my_first + row, 0, head) : nullptr;
      },
      q);
  relative_terms<D>(a, q, first_query, stages, reinterpret_cast<float*>(stages + kStageBytes), terms);

  const auto load = [&](int first_key, int stage) {
    unsigned char* to = stages + stage * kStageBytes;
    load_rows<D>(WindowRows{a, w, first_key, 1, head, a.pad_qkv}, to);
    load_rows<D>(WindowRows{a, w, first_key, 2, head, a.pad_qkv}, to + kPart);
    simt::cp_async_commit();
  };
  Running<D> run;
  begin<D>(run);
  load(0, 0);
  for (int first = 0, stage = 0; first < positions; first += kStage, stage ^= 1) {
    if (first + kStage < positions) {
      load(first + kStage, stage ^ 1);
      simt::cp_async_wait<1>();
    } else {
      simt::cp_async_wait<0>();
    }
    __syncthreads();
    const unsigned char* keys = stages + stage * kStageBytes;
    for (int piece = 0; piece < kStage && first + piece < positions; piece += 16) {
      float s[2][4] = {};
      add_scores<D>(q, keys, piece, s);
#pragma unroll
      for (int n = 0; n < 2; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int key = first + piece + 8 * n + 2 * t + (e & 1);
          const float* term = terms_of(terms, warp * 16 + g + 8 * (e >> 1), a.size);
          const bool seen = key < positions;
          const int row = row_of(key, w.inverse);
          s[n][e] = seen ? s[n][e] * a.scale + term[row] + term[a.size + key - row * a.size] : -INFINITY;
        }
      soften<D>(s, run);
      uint32_t p[4], rest[4] = {};
      round_weights(s, p, nullptr);
      add_values<D, false>(p, rest, keys + kPart, piece, run);
    }
    __syncthreads();  // before the next loads overwrite the stage
  }

#pragma unroll
  for (int h = 0; h < 2; h++) {
    const float sum = sum_of_row(run.sum[h]);
    const int p = my_first + g + 8 * h;
    const int y = w.top + p / a.size, x = w.left + p % a.size;
    if (p >= positions || y >= a.grid || x >= a.grid) continue;
    bf16* to = a.out + ((view * cells + static_cast<int64_t>(y) * a.grid + x) * width + head * D);
#pragma unroll
    for (int n = 0; n < D / 8; n++)
      *reinterpret_cast<uint32_t*>(to + 8 * n + 2 * t) =
          simt::pack_bf16(run.out[n][2 * h] / sum, run.out[n][2 * h + 1] / sum);
  }
}

template <int D>
void run(const WindowAttentionArgs& a, Stream stream) {
  const size_t shared = shared_of_stages(D) + sizeof(float) * kRows * row_stride(a.size);
  const dim3 grid(static_cast<unsigned>(ceil_div(static_cast<int64_t>(a.size) * a.size, kRows)),
                  static_cast<unsigned>(a.heads), static_cast<unsigned>(a.views * a.across * a.across));
  simt::launch(attend<D>, grid, dim3(kThreads), shared, stream, a);
}

}  // namespace

void window_attention(const WindowAttentionArgs& a, Stream stream) {
  if (a.size < 1 || a.size > 128) throw std::invalid_argument("window_attention takes windows of 1 to 128");
  switch (a.head_dim) {
    case 16:
      return run<16>(a, stream);
    case 32:
      return run<32>(a, stream);
    case 64:
      return run<64>(a, stream);
    case 80:
      return run<80>(a, stream);
  }
  throw std::invalid_argument("window_attention takes a head_dim of 16, 32, 64 or 80");
}

}  // namespace pagelens::cuda
