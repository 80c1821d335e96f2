// swiglu_ffn, moe_routing, grouped_gemm and moe_ffn, against double precision.
#include "tests/weights.h"

using namespace pagelens;
using namespace pagelens::tests;

namespace {

// Products of products: a rounded input of `down` may fall on the other side of a tie.
double tolerance(const Recipe& recipe, DType dtype) {
  if (recipe.activation != ActivationFormat::plain) return 0.02;
  return dtype == DType::f32 ? 2e-5 : 4e-3;
}

void check_swiglu(const Recipe& recipe, DType dtype, int64_t rows, int64_t width, int64_t inner, bool with_residual,
                  int64_t gap) {
  Random random(static_cast<uint64_t>(rows * 31 + width * 7 + inner));
  const TestSwiglu ffn = make_swiglu(random, recipe, width, inner, dtype);
  const Matrix x = Matrix::random(random, rows, width, dtype, gap, 2.0);
  const Matrix residual = Matrix::random(random, rows, width, dtype, gap);
  Expected expected;
  for (int64_t r = 0; r < rows; r++) {
    const std::vector<double> y = ffn.apply(row_of(x, r), dtype);
    for (int64_t c = 0; c < width; c++) expected.push_back(y[c] + (with_residual ? residual.at(r, c) : 0.0));
  }
  check_kernel(
      std::string("swiglu_ffn ") + recipe.name + " " + name_of(dtype) + " " + std::to_string(rows),
      [&] { return Matrix(rows, width, dtype, gap); }, expected, tolerance(recipe, dtype),
      [&](ThreadPool& pool, Matrix& out) {
        SwigluArgs args{};
        args.x = x.view();
        args.ffn = ffn.packed;
        if (with_residual) args.residual = residual.view();
        args.out = out.view();
        kernels().swiglu_ffn(pool, args);
      });
}

// The k largest scores of a row, lowest id first among equals.
void route(const std::vector<double>& logits, int64_t k, bool renormalize, double scale, std::vector<int32_t>* ids,
           std::vector<double>* weights) {
  std::vector<double> scores(logits.size());
  const double top = *std::max_element(logits.begin(), logits.end());
  double total = 0.0, chosen = 0.0;
  for (size_t e = 0; e < logits.size(); e++) total += scores[e] = std::exp(logits[e] - top);
  std::vector<int32_t> order(logits.size());
  for (size_t e = 0; e < logits.size(); e++) order[e] = static_cast<int32_t>(e);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  for (int64_t j = 0; j < k; j++) chosen += scores[order[j]] / total;
  for (int64_t j = 0; j < k; j++) {
    ids->push_back(order[j]);
    weights->push_back(scores[order[j]] / total / (renormalize ? chosen : 1.0) * scale);
  }
}

struct RoutingMemory {
  Memory ids, weights, offsets, permutation;
  RoutingMemory(int64_t tokens, int64_t experts, int64_t k)
      : ids(static_cast<size_t>(tokens * k * 4)),
        weights(static_cast<size_t>(tokens * k * 4)),
        offsets(static_cast<size_t>(experts + 1) * 4),
        permutation(static_cast<size_t>(tokens * k * 4)) {}
};

void check_routing(int64_t tokens, int64_t experts, int64_t k, bool renormalize, int64_t gap) {
  Random random(static_cast<uint64_t>(tokens * 100 + experts));
  Matrix logits = Matrix::random(random, tokens, experts, DType::f32, gap, 3.0);
  for (int64_t t = 0; t < tokens && experts > 2; t++) logits.set(t, 2, logits.at(t, 1));  // a tie
  each_setting("moe_routing " + std::to_string(tokens), [&](ThreadPool& pool, const std::string& setting) {
    const RoutingMemory m(tokens, experts, k);
    RoutingArgs args{};
    args.logits = logits.view();
    args.top_k = k, args.renormalize = renormalize, args.scale = 1.5f;
    args.expert_ids = m.ids.as<int32_t>(), args.weights = m.weights.as<float>();
    args.offsets = m.offsets.as<int32_t>(), args.permutation = m.permutation.as<int32_t>();
    kernels().moe_routing(pool, args);
    std::vector<int32_t> ids;
    std::vector<double> weights;
    for (int64_t t = 0; t < tokens; t++) route(row_of(logits, t), k, renormalize, 1.5, &ids, &weights);
    bool good = args.offsets[0] == 0 && args.offsets[experts] == tokens * k;
    for (int64_t i = 0; i < tokens * k; i++)
      good &= args.expert_ids[i] == ids[i] && std::fabs(args.weights[i] - weights[i]) < 1e-5;
    for (int64_t e = 0; e < experts; e++)
      for (int32_t i = args.offsets[e]; i < args.offsets[e + 1]; i++)
        good &= args.expert_ids[args.permutation[i]] == e &&
                (i == args.offsets[e] || args.permutation[i] > args.permutation[i - 1]);
    expect(good, setting);
  });
}

struct TestMoe {
  TestLinear router;
  std::vector<TestSwiglu> experts;
  std::vector<PackedSwiglu> packed_experts;
  TestSwiglu shared;
  PackedMoe packed{};

  TestMoe(Random& random, const Recipe& recipe, int64_t count, int64_t width, int64_t inner, DType dtype,
          bool with_shared) {
    router = make_linear(random, {"router"}, count, width, DType::f32, false);
    for (int64_t e = 0; e < count; e++) {
      experts.push_back(make_swiglu(random, recipe, width, inner, dtype));
      packed_experts.push_back(experts.back().packed);
    }
    if (with_shared) shared = make_swiglu(random, recipe, width, 2 * inner, dtype);
    packed.router = router.packed;
    packed.experts = packed_experts.data();
    packed.num_experts = count;
    packed.shared = with_shared ? &shared.packed : nullptr;
  }
};

struct MoeCase {
  int64_t tokens, experts, k, width, inner;
  bool renormalize, shared, residual;
  int64_t gap;
};

constexpr MoeCase kMoeCases[] = {
    {0, 4, 2, 32, 16, true, true, true, 0},  {1, 5, 1, 24, 8, false, false, false, 0},
    {1, 8, 3, 72, 40, true, true, true, 0},  {3, 6, 6, 33, 17, true, true, false, 4},
    {7, 9, 2, 64, 48, false, true, true, 1}, {19, 4, 2, 40, 24, true, false, true, 0},
    {50, 8, 3, 96, 33, true, true, true, 3},
};

void check_moe(const Recipe& recipe, DType dtype, const MoeCase& c) {
  Random random(static_cast<uint64_t>(c.tokens * 17 + c.experts));
  const TestMoe moe(random, recipe, c.experts, c.width, c.inner, dtype, c.shared);
  const Matrix x = Matrix::random(random, c.tokens, c.width, dtype, c.gap, 2.0);
  const Matrix residual = Matrix::random(random, c.tokens, c.width, dtype, c.gap);
  Expected routed, expected;
  for (int64_t t = 0; t < c.tokens; t++) {
    std::vector<double> logits, weights, sum(static_cast<size_t>(c.width), 0.0);
    std::vector<int32_t> ids;
    moe.router.multiply(row_of(x, t), &logits);
    route(logits, c.k, c.renormalize, 1.25, &ids, &weights);
    for (int64_t j = 0; j < c.k; j++) {
      const std::vector<double> y = moe.experts[ids[j]].apply(row_of(x, t), dtype);
      for (int64_t i = 0; i < c.width; i++) sum[i] += weights[j] * y[i];
    }
    routed.insert(routed.end(), sum.begin(), sum.end());
    if (c.shared) {
      const std::vector<double> y = moe.shared.apply(row_of(x, t), dtype);
      for (int64_t i = 0; i < c.width; i++) sum[i] += y[i];
    }
    for (int64_t i = 0; i < c.width; i++) expected.push_back(sum[i] + (c.residual ? residual.at(t, i) : 0.0));
  }
  const std::string what = std::string(recipe.name) + " " + name_of(dtype) + " " + std::to_string(c.tokens);
  check_kernel(
      "moe_ffn " + what, [&] { return Matrix(c.tokens, c.width, dtype, c.gap); }, expected,
      2 * tolerance(recipe, dtype),
      [&](ThreadPool& pool, Matrix& out) {
        MoeArgs args{};
        args.x = x.view();
        args.moe = moe.packed;
        args.top_k = c.k, args.renormalize = c.renormalize, args.scale = 1.25f;
        if (c.residual) args.residual = residual.view();
        args.out = out.view();
        kernels().moe_ffn(pool, args);
      });
  check_kernel(
      "grouped_gemm " + what, [&] { return Matrix(c.tokens, c.width, DType::f32, c.gap); }, routed,
      2 * tolerance(recipe, dtype),
      [&](ThreadPool& pool, Matrix& out) {
        const RoutingMemory m(c.tokens, c.experts, c.k);
        Matrix logits(c.tokens, c.experts, DType::f32);
        for (int64_t t = 0; t < c.tokens; t++) {
          std::vector<double> row;
          moe.router.multiply(row_of(x, t), &row);
          for (int64_t e = 0; e < c.experts; e++) logits.set(t, e, row[e]);
        }
        RoutingArgs routing{};
        routing.logits = logits.view();
        routing.top_k = c.k, routing.renormalize = c.renormalize, routing.scale = 1.25f;
        routing.expert_ids = m.ids.as<int32_t>(), routing.weights = m.weights.as<float>();
        routing.offsets = m.offsets.as<int32_t>(), routing.permutation = m.permutation.as<int32_t>();
        kernels().moe_routing(pool, routing);
        GroupedArgs args{};
        args.x = x.view();
        args.moe = moe.packed;
        args.top_k = c.k;
        args.expert_ids = m.ids.as<int32_t>(), args.offsets = m.offsets.as<int32_t>();
        args.permutation = m.permutation.as<int32_t>(), args.weights = m.weights.as<float>();
        args.out = out.view();
        expect(kernels().grouped_gemm(pool, args) == -1, "grouped_gemm refused a good routing");
        if (c.tokens > 1) {
          std::swap(m.permutation.as<int32_t>()[0], m.permutation.as<int32_t>()[c.tokens * c.k - 1]);
          Matrix untouched = Matrix::full(c.tokens, c.width, DType::f32, 3.0);
          args.out = untouched.view();
          expect(kernels().grouped_gemm(pool, args) >= 0 && untouched.at(0, 0) == 3.0,
                 "grouped_gemm took a routing that is not sorted");
        }
      });
}

}  // namespace

int main(int argc, char** argv) {
  choose_isas(argc, argv);
  check_routing(0, 4, 2, true, 0);
  check_routing(1, 1, 1, false, 0);
  check_routing(5, 7, 7, true, 3);
  check_routing(70, 64, 6, false, 0);
  for (const Recipe& recipe : recipes()) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      check_swiglu(recipe, dtype, 0, 32, 16, false, 0);
      check_swiglu(recipe, dtype, 1, 40, 24, true, 0);
      check_swiglu(recipe, dtype, 2, 33, 1, false, 3);
      check_swiglu(recipe, dtype, 6, 64, 88, true, 5);
      check_swiglu(recipe, dtype, 31, 96, 50, true, 0);
      if (recipe.order || recipe.zeros) continue;  // a mixture is not packed from these formats here
      for (const MoeCase& c : kMoeCases) check_moe(recipe, dtype, c);
    }
  }
  return finish("experts");
}
