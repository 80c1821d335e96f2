#include <cmath>

#include "common/simd.h"
#include "cpu/parallel.h"

namespace pagelens::PAGELENS_ISA {
namespace {

// softmax with the C library's expf on one row: this is 128 values a token, and its rounding then does not depend on
// the instruction set, so that all sets choose the same experts from the same logits.
void scores_of(const float* logits, int64_t n, float* scores) {
  float largest = logits[0];
  for (int64_t e = 1; e < n; e++) largest = logits[e] > largest ? logits[e] : largest;
  double total = 0.0;
  for (int64_t e = 0; e < n; e++) {
    scores[e] = std::exp(logits[e] - largest);
    total += scores[e];
  }
  for (int64_t e = 0; e < n; e++) scores[e] = static_cast<float>(scores[e] / total);
}

// The lowest id that ids[0..count-1] does not hold: what is left to choose when scores are NaN.
int64_t lowest_free(const int32_t* ids, int64_t count) {
  for (int64_t e = 0;; e++) {
    bool taken = false;
    for (int64_t i = 0; i < count; i++) taken |= ids[i] == e;
    if (!taken) return e;
  }
}

void route_row(const RoutingArgs& a, const float* logits, float* scores, int32_t* ids, float* weights) {
  const int64_t n = a.logits.cols;
  scores_of(logits, n, scores);
  float total = 0.0f;
  for (int64_t j = 0; j < a.top_k; j++) {
    int64_t best = -1;
    float top = -1.0f;  // what a chosen score is replaced by
    for (int64_t e = 0; e < n; e++)
      if (scores[e] > top) best = e, top = scores[e];  // > : the lowest id wins a tie
    if (best < 0) best = lowest_free(ids, j);
    ids[j] = static_cast<int32_t>(best);
    weights[j] = scores[best];
    total += weights[j];
    scores[best] = -1.0f;
  }
  for (int64_t j = 0; j < a.top_k; j++) weights[j] = (a.renormalize ? weights[j] / total : weights[j]) * a.scale;
}

}  // namespace

void moe_routing(ThreadPool& pool, const RoutingArgs& args) {
  const int64_t tokens = args.logits.rows, experts = args.logits.cols, k = args.top_k;
  pool.reserve_local(static_cast<size_t>(experts) * sizeof(float));
  constexpr int64_t kTokensAChunk = 16;
  pool.run((tokens + kTokensAChunk - 1) / kTokensAChunk, [&](int64_t chunk, int thread) {
    const int64_t end = (chunk + 1) * kTokensAChunk < tokens ? (chunk + 1) * kTokensAChunk : tokens;
    for (int64_t t = chunk * kTokensAChunk; t < end; t++)
      route_row(args, static_cast<const float*>(args.logits.data) + t * args.logits.stride,
                static_cast<float*>(pool.local(thread)), args.expert_ids + t * k, args.weights + t * k);
  });

  // A counting sort: stable, so the rows of an expert stand in the order of their tokens.
  int32_t* offsets = args.offsets;
  for (int64_t e = 0; e <= experts; e++) offsets[e] = 0;
  for (int64_t i = 0; i < tokens * k; i++) offsets[args.expert_ids[i] + 1]++;
  for (int64_t e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
  for (int64_t i = 0; i < tokens * k; i++) args.permutation[offsets[args.expert_ids[i]]++] = static_cast<int32_t>(i);
  for (int64_t e = experts; e > 0; e--) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

}  // namespace pagelens::PAGELENS_ISA
