// The CPU kernels as the bindings see them: argument structs, and one table of function pointers per instruction set.
//
// Each source in csrc/cpu is compiled once per set, inside namespace pagelens::PAGELENS_ISA. Kernels get pointers,
// sizes and strides (in elements) that the caller has checked; they do not throw once a job runs. Sizes of 0 are
// allowed. The formulas are those of the contract, engine/ops/__init__.py.
#pragma once
#include <cstddef>
#include <cstdint>

namespace pagelens {

class ThreadPool;

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };  // f16: scales only
enum class Format : int { plain = 0, int4 = 1, int8 = 2, fp8 = 3 };
enum class ActivationFormat : int { plain = 0, int8 = 1, fp8 = 2 };
enum class Activation : int { none = 0, gelu = 1, quick_gelu = 2, silu = 3 };

// A matrix with contiguous rows; `stride` is the distance of two rows.
struct Rows {
  void* data = nullptr;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t stride = 0;
  DType dtype = DType::f32;
};

// weight [n, k] packed for every instruction set alike: [ceil(n/32)] panels of [words][32] 4-byte words. A plain word
// is one float32, or two bfloat16 (k even in the low half; an odd k is padded with 0). bias: [panels*32] float32 or
// null.
//
// Quantised: W[n, order[k]] = (q[n, k] - zero[n, g]) * scale[n, g], g = k / group_size. A word holds, of one column,
// 8 int4 (q + 8; the even k in the low half, 4 bits each, the odd k in the high half) or 4 int8 or fp8 (even k in the
// bytes 0 and 1, odd k in the bytes 2 and 3); the padding is 0. scales, zeros: [panels][G][32]. order: [k] or null.
// group_size is a multiple of 8, or there is one group.
//
// activation_group: inputs that share a scale when they are rounded; 0: those of a whole row. If not 0, it is a
// multiple of 8 up to kMaxActivationGroup, `activation` is int8, the weight is int4 or int8 without zeros and order,
// and it has the same groups or one scale a row.
constexpr int64_t kMaxActivationGroup = 65536;  // sums of a group of products of 8 bits fit into 32
struct PackedLinear {
  const void* weight = nullptr;
  const float* bias = nullptr;
  int64_t n = 0;
  int64_t k = 0;
  DType dtype = DType::f32;  // of the activations, and of plain weights
  Format format = Format::plain;
  ActivationFormat activation = ActivationFormat::plain;  // how each row of x is rounded first
  DType scale_dtype = DType::f32;
  int64_t group_size = 1;
  int64_t activation_group = 0;
  const void* scales = nullptr;
  const int16_t* zeros = nullptr;
  const int32_t* order = nullptr;

  bool quantized() const { return format != Format::plain; }
  int64_t panels() const { return (n + 31) / 32; }
  // k in one word of a panel
  int64_t k_a_word() const { return format == Format::int4 ? 8 : quantized() ? 4 : dtype == DType::f32 ? 1 : 2; }
  // Words a column of a panel; for plain weights these are the groups of a tile (cpu/tile.h).
  int64_t groups() const { return (k + k_a_word() - 1) / k_a_word(); }
  int64_t panel_words() const { return groups() * 32; }
  int64_t scale_groups() const { return quantized() ? (k + group_size - 1) / group_size : 0; }
};

// SwiGLU feed-forward: in gate_up panel p holds gate rows 16p..16p+15, then the same up rows (both padded with zeros).
struct PackedSwiglu {
  PackedLinear gate_up;  // n = 2 * 16 * ceil(inner/16)
  PackedLinear down;     // k = inner
  int64_t inner = 0;
};

// Experts of one size, one after another.
struct PackedMoe {
  PackedLinear router;  // float32
  const PackedSwiglu* experts = nullptr;
  int64_t num_experts = 0;
  const PackedSwiglu* shared = nullptr;  // or null
};

struct NormArgs {
  Rows x, out;
  const void* weight;  // dtype of x
  const void* bias;    // dtype of x; layer_norm only
  float eps;
};

struct EmbeddingArgs {
  const int32_t* ids;
  Rows table, out;
};

struct LinearArgs {
  Rows x;
  PackedLinear weight;
  Activation activation;
  Rows residual;  // data null: none
  Rows out;       // float32 or bfloat16
};

struct RopeArgs {
  Rows qkv;
  const int32_t* positions;
  const int32_t* slots;
  const float *cos, *sin;  // [num_positions, head_dim/2]
  int64_t num_positions;
  void *keys, *values;               // layout: cpu/kv_layout.h; of the dtype of qkv, or int8
  float *key_scales, *value_scales;  // of an int8 cache, else null
  int64_t num_blocks, block_size;
  int64_t num_heads, num_kv_heads, head_dim;
  const void *q_norm, *k_norm;  // [head_dim], dtype of qkv, or null
  float eps;
  Rows out;  // [N, num_heads * head_dim]
};

struct AttentionArgs {
  Rows q, out;  // [N, num_heads * head_dim]
  const void *keys, *values;
  const float *key_scales, *value_scales;  // of an int8 cache, else null
  int64_t num_blocks, block_size, num_heads, num_kv_heads, head_dim;
  const int32_t* block_tables;
  int64_t max_blocks;  // columns of block_tables
  const int32_t *query_starts, *context_lens;
  int64_t num_sequences;
  float scale;
};

// Attention in the windows of a grid; with a grid and a window of one row it is plain attention over a sequence.
struct WindowAttentionArgs {
  Rows qkv, out;  // [batch * grid_rows * grid_cols, 3 * heads * head_dim] q | k | v, and one third as wide
  int64_t batch, grid_rows, grid_cols;
  int64_t window_rows, window_cols;
  int64_t num_heads, head_dim;
  const void* pad;             // [3 * heads * head_dim], what a position outside the grid holds
  const float *rel_h, *rel_w;  // [2 * window_rows - 1, head_dim], [2 * window_cols - 1, head_dim], or null
};

// Patches without overlap: pixels [batch, channels, height, width] contiguous, weight [n, channels * patch * patch].
struct PatchEmbedArgs {
  const void* pixels;
  int64_t batch, channels, height, width, patch;
  PackedLinear weight;  // with bias, of the pixels' dtype
  Rows out;             // [batch * (height / patch) * (width / patch), n]
};

// A convolution's weight is [n, kernel row, kernel column, channel]. The norms are float32.
struct PackedNeck {
  PackedLinear conv1, conv2, down1, down2;
  const float *norm1_weight, *norm1_bias, *norm2_weight, *norm2_bias;
};

struct ConvDownsampleArgs {
  Rows x;  // [batch * grid * grid, channels]
  int64_t batch, grid;
  PackedNeck neck;
  float eps;
  Rows out;  // [batch * q * q, n of down2], q = grid halved twice, rounded up
};

struct SwigluArgs {
  Rows x;
  PackedSwiglu ffn;
  Rows residual, out;
};

struct RoutingArgs {
  Rows logits;  // float32 [N, E]
  int64_t top_k;
  bool renormalize;
  float scale;
  int32_t* expert_ids;   // [N, k]
  float* weights;        // [N, k]
  int32_t* offsets;      // [E+1]
  int32_t* permutation;  // [N*k]
};

struct GroupedArgs {
  Rows x;
  PackedMoe moe;
  int64_t top_k;
  const int32_t *expert_ids, *offsets, *permutation;
  const float* weights;
  bool with_shared;
  Rows residual, out;
};

struct MoeArgs {
  Rows x;
  PackedMoe moe;
  int64_t top_k;
  bool renormalize;
  float scale;
  Rows residual, out;
};

// weight [n, k] -> values [n, k]; scales: int4 bfloat16 [n, ceil(k/32)], int8 float32 [n]. Returns a row with a NaN or
// an infinity, or -1.
struct QuantizeArgs {
  Rows weight;
  Format format;
  int8_t* values;
  void* scales;
};

// What is multiplied: float32, bfloat16 or 8-bit integers.
enum class ProbeKind : int { f32 = 0, bf16 = 1, int8 = 2 };

// How a row's next token is chosen; see `sample` in the contract.
struct SampleCut {
  double temperature, top_k, top_p, min_p, uniform;
};

struct SampleArgs {
  Rows logits;  // float32, at least one column
  const SampleCut* cuts;
  int32_t* tokens;
};

// A function that returns a number returns -1, or the first row (paged_attention: sequence, grouped_gemm: flat index)
// whose id, position, slot or block is outside its table, or whose cut is outside its ranges; nothing is written then.
struct KernelTable {
  int64_t (*embedding)(ThreadPool&, const EmbeddingArgs&);
  void (*linear)(ThreadPool&, const LinearArgs&);
  void (*rms_norm)(ThreadPool&, const NormArgs&);
  void (*layer_norm)(ThreadPool&, const NormArgs&);
  int64_t (*qk_norm_rope_store)(ThreadPool&, const RopeArgs&);
  int64_t (*paged_attention)(ThreadPool&, const AttentionArgs&);
  void (*swiglu_ffn)(ThreadPool&, const SwigluArgs&);
  void (*moe_routing)(ThreadPool&, const RoutingArgs&);
  int64_t (*grouped_gemm)(ThreadPool&, const GroupedArgs&);
  void (*moe_ffn)(ThreadPool&, const MoeArgs&);
  void (*window_attention)(ThreadPool&, const WindowAttentionArgs&);
  void (*patch_embed)(ThreadPool&, const PatchEmbedArgs&);
  void (*conv_downsample)(ThreadPool&, const ConvDownsampleArgs&);
  int64_t (*quantize)(ThreadPool&, const QuantizeArgs&);
  int64_t (*sample)(ThreadPool&, const SampleArgs&);
  void (*resize_rgb_u8)(const uint8_t*, int64_t, int64_t, uint8_t*, int64_t, int64_t);
  void (*probe_read)(ThreadPool&, const char*, int64_t);
  double (*probe_arithmetic)(ThreadPool&, ProbeKind, int64_t);
};

#define PAGELENS_DECLARE_TABLE(isa) \
  namespace isa {                   \
  const KernelTable& table();       \
  }
PAGELENS_DECLARE_TABLE(portable)
PAGELENS_DECLARE_TABLE(avx2)
PAGELENS_DECLARE_TABLE(avx512)
PAGELENS_DECLARE_TABLE(avx512_bf16)
PAGELENS_DECLARE_TABLE(portable_free)  // these four only where setup.py is asked for them (PAGELENS_FREE_ORDER)
PAGELENS_DECLARE_TABLE(avx2_free)
PAGELENS_DECLARE_TABLE(avx512_free)
PAGELENS_DECLARE_TABLE(avx512_bf16_free)
#undef PAGELENS_DECLARE_TABLE

#ifdef PAGELENS_ISA
namespace PAGELENS_ISA {
int64_t embedding(ThreadPool& pool, const EmbeddingArgs& args);
void linear(ThreadPool& pool, const LinearArgs& args);
void rms_norm(ThreadPool& pool, const NormArgs& args);
void layer_norm(ThreadPool& pool, const NormArgs& args);
int64_t qk_norm_rope_store(ThreadPool& pool, const RopeArgs& args);
int64_t paged_attention(ThreadPool& pool, const AttentionArgs& args);
void swiglu_ffn(ThreadPool& pool, const SwigluArgs& args);
void moe_routing(ThreadPool& pool, const RoutingArgs& args);
int64_t grouped_gemm(ThreadPool& pool, const GroupedArgs& args);
void moe_ffn(ThreadPool& pool, const MoeArgs& args);
void window_attention(ThreadPool& pool, const WindowAttentionArgs& args);
void patch_embed(ThreadPool& pool, const PatchEmbedArgs& args);
void conv_downsample(ThreadPool& pool, const ConvDownsampleArgs& args);
int64_t quantize(ThreadPool& pool, const QuantizeArgs& args);
int64_t sample(ThreadPool& pool, const SampleArgs& args);

// RGB bytes [src_h, src_w, 3] -> [dst_h, dst_w, 3], both contiguous: exactly Pillow's bicubic resize (before version
// 13).
void resize_rgb_u8(const uint8_t* src, int64_t src_h, int64_t src_w, uint8_t* dst, int64_t dst_h, int64_t dst_w);

// Reads `bytes` bytes once, a multiple of 2^20, each thread one linear stream of its own.
void probe_read(ThreadPool& pool, const char* data, int64_t bytes);
// Multiplies and adds in registers; returns the number of multiplications and additions (at least `rounds` times 12
// instructions of them).
double probe_arithmetic(ThreadPool& pool, ProbeKind kind, int64_t rounds);
}  // namespace PAGELENS_ISA
#endif

}  // namespace pagelens
