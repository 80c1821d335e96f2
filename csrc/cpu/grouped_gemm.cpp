// The experts of a MoE layer for any number of tokens: gate/up of all experts in one job, down in a second, and a third
// that adds a token's terms in the order of its slots. The shared expert runs along as one more expert with every
// token.
#include "cpu/linear.h"
#include "cpu/parallel.h"
#include "cpu/swiglu.h"

namespace pagelens::PAGELENS_ISA {
namespace {

enum Scratch { kProducts, kTerms, kProblems, kBlocks, kLogits, kRouting, kChosen };

// The terms of so many tokens are kept at a time (float32 [tokens * (top_k + 1), C]).
constexpr int64_t kTermBytes = int64_t{64} << 20;

int64_t padded_columns(const PackedMoe& moe) { return moe.experts[0].down.panels() * kPanel; }

// One chunk of tokens, first..first+count, and the rows of each expert among them.
struct Chunk {
  const GroupedArgs* args;
  int64_t first, count;
  const int32_t* offsets;      // of this chunk
  const int32_t* permutation;  // flat indices n*k+j, n counted in the whole call

  int64_t flat_base() const { return first * args->top_k; }
};

struct Plan {
  Problem* up;
  Problem* down;
  int64_t num_problems = 0;
  int64_t product_bytes = 0;
};

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Problems of the experts that have rows, products one after another; the shared expert is the last.
Plan plan(ThreadPool& pool, const Chunk& c) {
  const GroupedArgs& a = *c.args;
  const int64_t most = a.moe.num_experts + 1, bytes = element_bytes(a.x.dtype);
  Plan p;
  p.up = pool.shared<Problem>(kProblems, 2 * most);
  p.down = p.up + most;
  int64_t total = 0;
  for (int64_t e = 0; e < a.moe.num_experts; e++)
    total += (c.offsets[e + 1] - c.offsets[e]) * product_stride(a.moe.experts[e]) * bytes;
  if (a.with_shared) total += c.count * product_stride(*a.moe.shared) * bytes;
  char* products = pool.shared<char>(kProducts, total);
  const auto add = [&](const PackedSwiglu& ffn, const Source& x, int64_t rows) {
    const int64_t stride = product_stride(ffn);
    p.up[p.num_problems] = {x, ffn.gate_up, rows};
    p.down[p.num_problems] = {{products + p.product_bytes, stride, a.x.dtype, nullptr, 1}, ffn.down, rows};
    p.num_problems++;
    p.product_bytes += rows * stride * bytes;
  };
  for (int64_t e = 0; e < a.moe.num_experts; e++)
    if (const int64_t rows = c.offsets[e + 1] - c.offsets[e])
      add(a.moe.experts[e], {a.x.data, a.x.stride, a.x.dtype, c.permutation + c.offsets[e], a.top_k}, rows);
  if (a.with_shared) {
    const char* x = static_cast<const char*>(a.x.data) + c.first * a.x.stride * bytes;
    add(*a.moe.shared, {x, a.x.stride, a.x.dtype, nullptr, 1}, c.count);
  }
  return p;
}

template <class Epilogue>
void run_all(ThreadPool& pool, const Problem* problems, int64_t count, Epilogue&& epilogue) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; i++) total += cut(problems[i]).count();
  Block* blocks = pool.shared<Block>(kBlocks, total);
  Block* next = blocks;
  for (int64_t i = 0; i < count; i++) {
    const Cut c = cut(problems[i]);
    for (int64_t j = 0; j < c.count(); j++) *next++ = block_at(problems[i], c, static_cast<int32_t>(i), j);
  }
  gemm(pool, problems, count, total, [&](int64_t i) { return blocks[i]; }, epilogue);
}

// out[n] = sum over j of weight_j * term_j, then the shared expert's term, then the residual.
template <class Res, class Out>
void combine_row(const float* terms, const float* weights, int64_t k, int64_t stride, const float* shared,
                 const Res* residual, Out* out, int64_t n) {
  for (int64_t c = 0; c < n; c += W) {
    vf total = vf{};
    for (int64_t j = 0; j < k; j++) total = fma(splat(weights[j]), load(terms + j * stride + c), total);
    if (shared) total = total + load(shared + c);
    if (c + W <= n) {
      if (residual) total = total + load(residual + c);
      store(out + c, total);
      continue;
    }
    float lane[W];
    store(lane, total);
    for (int64_t i = 0; c + i < n; i++) put(out + c + i, residual ? lane[i] + get(residual + c + i) : lane[i]);
  }
}

void combine(ThreadPool& pool, const Chunk& c, const float* terms, int64_t stride) {
  const GroupedArgs& a = *c.args;
  const int64_t k = a.top_k;
  for_rows(pool, c.count, a.out.cols * (k + 1), [&](int64_t i) {
    const int64_t n = c.first + i;
    const float* own = terms + i * k * stride;
    const float* shared = a.with_shared ? terms + (c.count * k + i) * stride : nullptr;
    const float* weights = a.weights + n * k;
    const int64_t to = n * a.out.stride, from = n * a.residual.stride;
    if (a.out.dtype == DType::f32) {
      const float* residual = a.residual.data ? static_cast<const float*>(a.residual.data) + from : nullptr;
      combine_row(own, weights, k, stride, shared, residual, static_cast<float*>(a.out.data) + to, a.out.cols);
    } else {
      const bf16* residual = a.residual.data ? static_cast<const bf16*>(a.residual.data) + from : nullptr;
      combine_row(own, weights, k, stride, shared, residual, static_cast<bf16*>(a.out.data) + to, a.out.cols);
    }
  });
}

void run_chunk(ThreadPool& pool, const Chunk& c) {
  const GroupedArgs& a = *c.args;
  const int64_t stride = padded_columns(a.moe), k = a.top_k;
  float* terms = pool.shared<float>(kTerms, c.count * (k + (a.with_shared ? 1 : 0)) * stride);
  const Plan p = plan(pool, c);
  const DType dtype = a.x.dtype;
  run_all(pool, p.up, p.num_problems, [&](const Block& b, int64_t row, int count, int64_t panel, const float* sums) {
    const Source& product = p.down[b.problem].x;
    finish_gate_up(const_cast<void*>(product.data), dtype, product.stride, row, count, panel, sums);
  });
  run_all(pool, p.down, p.num_problems, [&](const Block& b, int64_t row, int count, int64_t panel, const float* sums) {
    const int32_t* flat = p.up[b.problem].x.index;
    for (int r = 0; r < count; r++) {
      const int64_t term = flat ? flat[row + r] - c.flat_base() : c.count * k + row + r;
      std::memcpy(terms + term * stride + panel * kPanel, sums + r * kPanel, kPanel * sizeof(float));
    }
  });
  combine(pool, c, terms, stride);
}

// A routing made elsewhere is checked: wrong offsets or a wrong permutation would write outside the terms.
int64_t first_bad_row(const GroupedArgs& a) {
  const int64_t flat = a.x.rows * a.top_k;
  if (a.offsets[0] != 0 || a.offsets[a.moe.num_experts] != flat) return 0;
  for (int64_t e = 0; e < a.moe.num_experts; e++) {
    if (a.offsets[e + 1] < a.offsets[e] || a.offsets[e + 1] > flat) return a.offsets[e];
    for (int64_t i = a.offsets[e]; i < a.offsets[e + 1]; i++) {
      const int32_t at = a.permutation[i];
      if (at < 0 || at >= flat || a.expert_ids[at] != e) return i;
      if (i > a.offsets[e] && at <= a.permutation[i - 1]) return i;
    }
  }
  return -1;
}

void run_all_tokens(ThreadPool& pool, const GroupedArgs& args) {
  const int64_t tokens = args.x.rows, k = args.top_k, experts = args.moe.num_experts;
  const int64_t at_once =
      std::max<int64_t>(kTermBytes / std::max<int64_t>(4 * padded_columns(args.moe) * (k + 1), 1), 1);
  if (tokens <= at_once) {
    if (tokens > 0) run_chunk(pool, {&args, 0, tokens, args.offsets, args.permutation});
    return;
  }
  for (int64_t first = 0; first < tokens; first += at_once) {
    const int64_t count = std::min(at_once, tokens - first);
    int32_t* offsets = pool.shared<int32_t>(kChosen, experts + 1 + count * k);
    int32_t* permutation = offsets + experts + 1;
    // Rows of an expert stand in the order of their tokens, so those of this chunk are a run.
    offsets[0] = 0;
    for (int64_t e = 0; e < experts; e++) {
      const int32_t* begin = args.permutation + args.offsets[e];
      const int32_t* end = args.permutation + args.offsets[e + 1];
      begin = std::lower_bound(begin, end, static_cast<int32_t>(first * k));
      end = std::lower_bound(begin, end, static_cast<int32_t>((first + count) * k));
      std::copy(begin, end, permutation + offsets[e]);
      offsets[e + 1] = offsets[e] + static_cast<int32_t>(end - begin);
    }
    run_chunk(pool, {&args, first, count, offsets, permutation});
  }
}

}  // namespace

int64_t grouped_gemm(ThreadPool& pool, const GroupedArgs& args) {
  const int64_t bad = first_bad_row(args);
  if (bad < 0) run_all_tokens(pool, args);
  return bad;
}

void moe_ffn(ThreadPool& pool, const MoeArgs& args) {
  const int64_t tokens = args.x.rows, k = args.top_k, experts = args.moe.num_experts;
  float* logits = pool.shared<float>(kLogits, tokens * experts);
  const Rows scores{logits, tokens, experts, experts, DType::f32};
  linear(pool, {args.x, args.moe.router, Activation::none, {}, scores});

  int32_t* ids = pool.shared<int32_t>(kRouting, 3 * tokens * k + experts + 1);
  int32_t* permutation = ids + tokens * k;
  float* weights = reinterpret_cast<float*>(permutation + tokens * k);
  int32_t* offsets = permutation + 2 * tokens * k;
  moe_routing(pool, {scores, k, args.renormalize, args.scale, ids, weights, offsets, permutation});
  run_all_tokens(pool, {args.x, args.moe, k, ids, offsets, permutation, weights, args.moe.shared != nullptr,
                        args.residual, args.out});
}

}  // namespace pagelens::PAGELENS_ISA
