// The CUDA kernels' entry points: device addresses and sizes in, work enqueued on the stream, nothing returned. The
// same sources run on a CPU (csrc/simt). What each computes is the ops contract (engine/ops/__init__.py); sizes that an
// entry point cannot take throw std::invalid_argument.
#pragma once
#include <cstdint>
#include <string>

#include "simt/types.h"

namespace pagelens::cuda {

using simt::bf16;
using simt::Stream;

// The devices that the driver has: how many, and in words what this thread's current one is or why there is none. No
// error is left behind.
struct Devices {
  int count;
  std::string words;
};
Devices devices();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// logits [tokens, experts] float32 -> expert_ids, weights [tokens, top_k]; offsets [experts + 1]; permutation
// [tokens * top_k].
struct MoeRoutingArgs {
  const float* logits;
  int tokens, experts, top_k;
  bool renormalize;
  float scale;
  int32_t* expert_ids;
  float* weights;
  int32_t* offsets;
  int32_t* permutation;
};
constexpr int kMaxExperts = 256, kMaxTopK = 32;
void moe_routing(const MoeRoutingArgs& args, Stream stream);

// qkv [tokens, (heads + 2 kv_heads) * head_dim], row stride in elements -> out [tokens, heads, head_dim], and the
// slots' rows of keys and values [num_slots, kv_heads, head_dim]. Nothing is written for a token whose position or slot
// is outside its table.
struct QkNormRopeStoreArgs {
  const bf16* qkv;
  int64_t qkv_stride;
  int tokens, heads, kv_heads, head_dim, num_positions, num_slots;
  const int32_t *positions, *slots;
  const float *cos, *sin;       // [num_positions, head_dim / 2]
  const bf16 *q_norm, *k_norm;  // [head_dim] or null
  float eps;
  bf16 *keys, *values, *out;
};
void qk_norm_rope_store(const QkNormRopeStoreArgs& args, Stream stream);

// q, out [tokens, heads, head_dim]; keys, values [blocks, block_size, kv_heads, head_dim]; block_tables [sequences,
// table_width]; query_starts [sequences + 1]; context_lens [sequences]. `partial` is scratch of
// paged_attention_scratch(args) floats.
struct PagedAttentionArgs {
  const bf16 *q, *keys, *values;
  int heads, kv_heads, head_dim, block_size;
  const int32_t *block_tables, *query_starts, *context_lens;
  int sequences, table_width;
  int tokens, longest_context;  // the latter at least the longest of context_lens: sizes of the grid
  float scale;
  float* partial;
  bf16* out;
};
int64_t paged_attention_scratch(const PagedAttentionArgs& args);
void paged_attention(const PagedAttentionArgs& args, Stream stream);

// qkv [views, grid, grid, 3 * heads * head_dim], pad_qkv [3 * heads * head_dim]; the relative tables [2 size - 1,
// head_dim] as a sum of two bf16 -> out [views, grid, grid, heads * head_dim]. `across` windows of `size` cover the
// grid.
struct WindowAttentionArgs {
  const bf16 *qkv, *pad_qkv;
  const bf16 *rel_h_high, *rel_h_low, *rel_w_high, *rel_w_low;
  int views, grid, size, across, heads, head_dim;
  float scale;
  bf16* out;
};
void window_attention(const WindowAttentionArgs& args, Stream stream);

// x [views, side, side, width] -> out [views, side / 4, side / 4, down2], sides rounded up. Weights of the 3x3
// convolutions are [filters, 9 * channels] with k = tap * channels + channel. Scratch: sums [views, side, side, neck]
// float32, map [views, side, side, neck], half_map [views, side / 2, side / 2, down1].
struct ConvDownsampleArgs {
  const bf16* x;
  int views, side, width, neck, down1, down2;
  const bf16 *conv1_weight, *norm1_weight, *norm1_bias, *conv2_weight, *norm2_weight, *norm2_bias, *down1_weight,
      *down2_weight;
  float eps;
  float* sums;
  bf16 *map, *half_map, *out;
};
void conv_downsample(const ConvDownsampleArgs& args, Stream stream);

// The routed experts. x [tokens, width] bf16 -> y [tokens, width] float32. gate_up [experts, 2 * inner, width]: rows
// 2 i and 2 i + 1 are row i of gate and of up; down [experts, width, inner]. Weights are bf16, int8 or int4; see
// grouped_gemm.cu for the layout of scales. hidden [tokens * top_k, inner] bf16 and parts [tokens * top_k, width]
// float32 are scratch.
enum class WeightKind { bf16, int8, int4 };
struct GroupedGemmArgs {
  const bf16* x;
  int tokens, width, inner, experts, top_k;
  WeightKind kind;
  const void *gate_up, *down;
  const float *gate_up_scales, *down_scales;  // null for bf16
  const int32_t *offsets, *permutation;
  const float* weights;  // [tokens, top_k]
  bf16* hidden;
  float* parts;
  float* y;
};
void grouped_gemm(const GroupedGemmArgs& args, Stream stream);

}  // namespace pagelens::cuda
