// moe_routing: softmax, the top_k best experts of each token, and the tokens sorted by expert, in one launch.
//
// One block of 32 warps. A warp owns a contiguous range of tokens and takes them one at a time: lane l holds the logits
// of experts l, l + 32, ..., a round of shuffles finds the maximum (the lower id wins a tie), top_k rounds choose. Lane
// l counts in registers how often the warp chose those experts. One pass over shared memory [warps][experts] turns the
// counts into first positions (exclusive sums over experts, and over warps within an expert), which go back to those
// lanes; each warp walks its tokens again and gives each choice the next place of its expert. Within an expert the
// order is that of warps, then of tokens: stable, and without atomics, so that the result does not depend on timing. A
// histogram in shared memory would take some 50 instructions a token less, and have lanes whose experts share a bank
// wait for each other.
//
// Bytes: 4 tokens experts in, 4 (3 tokens top_k + experts + 1) out, and the ids once more. FLOPs: some 5 tokens
// experts. Floor: 512 tokens of 128 experts read 262 KB, 0.2 us on an A100. For a decode the launch (a few us) is
// the cost; that is why it is one. For a prompt it is the instructions, some 800 of a warp a token on one
// multiprocessor, 75 us for 512: more of them would need a grid-wide order of the counts, a second launch.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/kernels.h"
#include "simt/simt.h"

namespace pagelens::cuda {
namespace {

constexpr int kWarps = 32, kThreads = 32 * kWarps;
constexpr uint32_t kAll = ~0u;
constexpr float kTaken = -1.0f;  // below every score

struct Best {
  float score;
  int id;
};

// The larger score; among equals, and when a score is NaN, the lower id. Every lane gets the warp's.
__device__ inline Best best_of_warp(Best mine) {
#pragma unroll
  for (int d = 16; d; d >>= 1) {
    const float score = __shfl_xor_sync(kAll, mine.score, d);
    const int id = __shfl_xor_sync(kAll, mine.id, d);
    if (score > mine.score || (score == mine.score && id < mine.id)) mine = {score, id};
  }
  return mine;
}

// Scores of one token: score[r] is that of expert lane + 32 r; experts that do not exist are taken.
template <int kRounds>
__device__ inline void softmax(const float* logits, int experts, float (&score)[kRounds]) {
  const int lane = threadIdx.x & 31;
  float largest = -INFINITY, total = 0.0f;
#pragma unroll
  for (int r = 0; r < kRounds; r++) {
    score[r] = lane + 32 * r < experts ? logits[lane + 32 * r] : -INFINITY;
    largest = fmaxf(largest, score[r]);
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, d));
#pragma unroll
  for (int r = 0; r < kRounds; r++) {
    score[r] = lane + 32 * r < experts ? expf(score[r] - largest) : 0.0f;
    total += score[r];
  }
#pragma unroll
  for (int d = 16; d; d >>= 1) total += __shfl_xor_sync(kAll, total, d);
#pragma unroll
  for (int r = 0; r < kRounds; r++) score[r] = lane + 32 * r < experts ? score[r] / total : kTaken;
}

// The best expert that is left. Where no score can be compared (NaN) it is the lowest id that is left.
template <int kRounds>
__device__ inline Best choose(float (&score)[kRounds], int experts) {
  const int lane = threadIdx.x & 31;
  Best mine{kTaken, 1 << 30};
#pragma unroll
  for (int r = 0; r < kRounds; r++)
    if (score[r] > mine.score) mine = {score[r], lane + 32 * r};
  Best best = best_of_warp(mine);
  if (best.id >= experts) {
    int lowest = 1 << 30;
#pragma unroll
    for (int r = kRounds - 1; r >= 0; r--)
      if (!(score[r] == kTaken)) lowest = lane + 32 * r;
#pragma unroll
    for (int d = 16; d; d >>= 1) lowest = min(lowest, __shfl_xor_sync(kAll, lowest, d));
    best = {NAN, lowest};
  }
#pragma unroll
  for (int r = 0; r < kRounds; r++)
    if (lane + 32 * r == best.id) score[r] = kTaken;
  return best;
}

// Numbers of experts live in lanes: lane l holds those of experts l, l + 32, ... What is held for expert `id`, which
// may differ between lanes; 0 for -1.
template <int kRounds>
__device__ inline int held_for(const int (&held)[kRounds], int id) {
  int found = 0;
#pragma unroll
  for (int r = 0; r < kRounds; r++) {
    const int value = __shfl_sync(kAll, held[r], id & 31);
    if (id >> 5 == r) found = value;
  }
  return found;
}

// One more for each expert that a lane names; the ids differ, -1 is none.
template <int kRounds>
__device__ inline void count_choices(int (&held)[kRounds], int id) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int r = 0; r < kRounds; r++) held[r] += __reduce_or_sync(kAll, id >> 5 == r ? 1u << (id & 31) : 0u) >> lane & 1;
}

template <int kRounds>
__global__ void __launch_bounds__(kThreads, 1) route(const MoeRoutingArgs a) {
  int* counts = reinterpret_cast<int*>(simt::shared_memory());  // [warps][experts], then those of the warps before
  int* starts = counts + kWarps * a.experts;                    // [experts + 1]
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int chosen[kRounds] = {};  // how often this warp chose expert lane + 32 r

  const int each = (a.tokens + kWarps - 1) / kWarps;
  const int first = min(warp * each, a.tokens), last = min(first + each, a.tokens);
  for (int t = first; t < last; t++) {
    float score[kRounds];
    softmax<kRounds>(a.logits + static_cast<int64_t>(t) * a.experts, a.experts, score);
    Best mine{0.0f, -1};
    float sum = 0.0f;
    for (int j = 0; j < a.top_k; j++) {
      const Best best = choose<kRounds>(score, a.experts);
      if (lane == j) mine = best;
      sum += best.score;
    }
    if (lane < a.top_k) {
      a.expert_ids[t * a.top_k + lane] = mine.id;
      a.weights[t * a.top_k + lane] = (a.renormalize ? mine.score / sum : mine.score) * a.scale;
    }
    count_choices(chosen, mine.id);
  }
#pragma unroll
  for (int r = 0; r < kRounds; r++)
    if (lane + 32 * r < a.experts) counts[warp * a.experts + lane + 32 * r] = chosen[r];
  __syncthreads();

  for (int e = threadIdx.x; e < a.experts; e += kThreads) {
    int before = 0;
    for (int w = 0; w < kWarps; w++) {
      const int count = counts[w * a.experts + e];
      counts[w * a.experts + e] = before;
      before += count;
    }
    starts[e + 1] = before;
  }
  if (threadIdx.x == 0) starts[0] = 0;
  __syncthreads();
  if (warp == 0) {  // inclusive sum of starts[1 .. experts], 32 at a time
    int carry = 0;
    for (int e0 = 0; e0 < a.experts; e0 += 32) {
      int value = e0 + lane < a.experts ? starts[e0 + lane + 1] : 0;
#pragma unroll
      for (int d = 1; d < 32; d <<= 1) {
        const int left = __shfl_up_sync(kAll, value, d);
        if (lane >= d) value += left;
      }
      value += carry;
      if (e0 + lane < a.experts) starts[e0 + lane + 1] = value;
      carry = __shfl_sync(kAll, value, 31);
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e <= a.experts; e += kThreads) a.offsets[e] = starts[e];

  int place[kRounds];  // of this warp's first choice of expert lane + 32 r
#pragma unroll
  for (int r = 0; r < kRounds; r++) {
    const int e = lane + 32 * r;
    place[r] = e < a.experts ? starts[e] + counts[warp * a.experts + e] : 0;
  }
  for (int t = first; t < last; t++) {
    const int flat = t * a.top_k + lane, id = lane < a.top_k ? a.expert_ids[flat] : -1;  // written by this lane
    const int at = held_for(place, id);
    if (lane < a.top_k) a.permutation[at] = flat;
    count_choices(place, id);
  }
}

}  // namespace

void moe_routing(const MoeRoutingArgs& a, Stream stream) {
  if (a.experts < 1 || a.experts > kMaxExperts) throw std::invalid_argument("moe_routing takes 1 to 256 experts");
  if (a.top_k < 1 || a.top_k > kMaxTopK || a.top_k > a.experts)
    throw std::invalid_argument("moe_routing takes top_k of 1 to 32, at most the experts");
  const int most = (INT32_MAX - kWarps + 1) / a.top_k;  // choices are counted in 32 bits
  if (a.tokens < 0 || a.tokens > most)
    throw std::invalid_argument("moe_routing takes 0 to " + std::to_string(most) + " tokens with this top_k, not " +
                                std::to_string(a.tokens) + "; split the batch");
  const size_t shared = sizeof(int) * (kWarps * a.experts + a.experts + 1);
  const auto kernel = a.experts <= 32 ? route<1> : a.experts <= 64 ? route<2> : a.experts <= 128 ? route<4> : route<8>;
  simt::launch(kernel, dim3(1), dim3(kThreads), shared, stream, a);
}

}  // namespace pagelens::cuda
