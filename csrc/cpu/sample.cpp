// The next token of each row of logits, as draw() in engine/ops/reference_sampling.py chooses it.
//
// A row is read once for the largest logit of every block of 64; from there on most rows need a few blocks only. Where
// the whole distribution counts, tokens are not sorted: their weights are added up in buckets of falling weight, and
// only the bucket in which a sum is reached is sorted. All sums run in one order, in double precision and without fused
// operations, so every instruction set chooses the same token.
#include <algorithm>
#include <cmath>

#include "common/simd.h"
#include "common/thread_pool.h"

namespace pagelens::PAGELENS_ISA {
namespace {

typedef double vd __attribute__((vector_size(8 * W)));
typedef uint64_t vq __attribute__((vector_size(8 * W)));

constexpr int64_t kBlock = 64;         // logits with one maximum
constexpr int64_t kSortAll = 2048;     // so few candidates are sorted
constexpr int kKeyBits = 6;            // of the fraction: 64 buckets an octave of weights
constexpr int64_t kBuckets = 64 << 6;  // the last holds all weights below 2^-64
constexpr uint16_t kLeftOut = 0xffff;

struct Candidate {
  double weight;
  int32_t token;
};
// Falling weights, the lowest token first among equals.
bool before(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

// Of one thread, for rows of `vocabulary` logits.
struct Scratch {
  float* most;            // of each block
  Candidate* candidates;  // [vocabulary]
  double* weights;        // [vocabulary, up to whole blocks]
  uint16_t* keys;
  double* sums;  // of each bucket

  static int64_t blocks(int64_t vocabulary) { return (vocabulary + kBlock - 1) / kBlock; }
  static size_t bytes(int64_t vocabulary, bool draws) {
    const size_t n = static_cast<size_t>(blocks(vocabulary) * kBlock);
    if (!draws) return n / kBlock * 4 + 64;
    return n / kBlock * 4 + 64 + n * (sizeof(Candidate) + 8 + 2) + static_cast<size_t>(kBuckets) * 8;
  }
  Scratch(void* memory, int64_t vocabulary) {
    const int64_t n = blocks(vocabulary) * kBlock;
    most = static_cast<float*>(memory);
    char* rest = static_cast<char*>(memory) + (n / kBlock * 4 + 63) / 64 * 64;
    candidates = reinterpret_cast<Candidate*>(rest);
    weights = reinterpret_cast<double*>(candidates + n);
    sums = weights + n;
    keys = reinterpret_cast<uint16_t*>(sums + kBuckets);
  }
};

// e^x for x <= 0, within 3e-16 of it; 0 below -708.
PAGELENS_INLINE vd exp_of(vd x) {
  const vd y = x < -708.0 ? vd{} : x;
  const vd shifted = y * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52
  const vd n = shifted - 6755399441055744.0;
  // ln 2 in two pieces; the first has 21 zeros at its end, so that its product with n is exact
  const vd r = (y - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  vd p = vd{} + 1.0 / 6227020800.0;
  const double c[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
                      1.0 / 120,       1.0 / 24,       1.0 / 6,       0.5,          1.0,         1.0};
  PAGELENS_UNROLL for (int i = 0; i < 13; i++) p = p * r + c[i];
  const vd scale = (vd)(((vq)shifted << 52) + 0x3ff0000000000000u);
  return x < -708.0 ? vd{} : p * scale;
}

PAGELENS_INLINE v4 larger_fold(vf x) {  // lanes i, i+4, i+8, ...: the largest
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256((__m512)x), _mm512_extractf32x8_ps((__m512)x, 1));
  return (v4)_mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif defined(PAGELENS_ISA_AVX2)
  return (v4)_mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
#else
  return x;
#endif
}

// The largest lane of each of four vectors, in registers (largest_lane goes through memory).
PAGELENS_INLINE v4 largest_each(const vf (&x)[4]) {
  const v4 a = larger_fold(x[0]), b = larger_fold(x[1]), c = larger_fold(x[2]), d = larger_fold(x[3]);
  const v4 rows[4] = {
      {a[0], b[0], c[0], d[0]}, {a[1], b[1], c[1], d[1]}, {a[2], b[2], c[2], d[2]}, {a[3], b[3], c[3], d[3]}};
  const v4 low = rows[0] > rows[1] ? rows[0] : rows[1], high = rows[2] > rows[3] ? rows[2] : rows[3];
  return low > high ? low : high;
}

// Largest logit of each block into `most`; of the row, NaN if it holds one.
float row_maximum(const float* row, int64_t vocabulary, float* most) {
  vu sizes = vu{};  // largest magnitudes, as bits: those of NaN are above infinity's
  float top = -INFINITY;
  int64_t first = 0;
  for (; first + 4 * kBlock <= vocabulary; first += 4 * kBlock) {
    vf m[4];
    PAGELENS_UNROLL for (int b = 0; b < 4; b++) {
      m[b] = splat(-INFINITY);
      PAGELENS_UNROLL for (int64_t i = 0; i < kBlock; i += W) {
        const vf x = load(row + first + b * kBlock + i);
        const vu size = (vu)x & 0x7fffffffu;
        sizes = size > sizes ? size : sizes;
        m[b] = larger(x, m[b]);
      }
    }
    const v4 largest = largest_each(m);
    std::memcpy(most + first / kBlock, &largest, sizeof largest);
  }
  bool has_nan = any_lane((vi)(sizes > 0x7f800000u));
  for (; first < vocabulary; first += kBlock) {
    float largest = -INFINITY;
    for (int64_t i = first; i < std::min(first + kBlock, vocabulary); i++) {
      has_nan |= std::isnan(row[i]);
      largest = row[i] > largest ? row[i] : largest;
    }
    most[first / kBlock] = largest;
  }
  for (int64_t b = 0; b < Scratch::blocks(vocabulary); b++) top = most[b] > top ? most[b] : top;
  return has_nan ? NAN : top;
}

int32_t first_of(float value, const float* row, int64_t vocabulary, const float* most) {
  int64_t i = 0;
  while (most[i / kBlock] != value) i += kBlock;
  while (i < vocabulary && row[i] != value) i++;
  return static_cast<int32_t>(i);
}

// The top_k largest logits (`weight` holds the logit), any order; minus infinity is left out. Returns their number.
int64_t largest_logits(const float* row, int64_t vocabulary, int64_t top_k, const Scratch& s) {
  const int64_t blocks = Scratch::blocks(vocabulary);
  float least = -INFINITY;  // at least top_k logits are as large as this: the maxima of so many blocks
  if (top_k <= blocks) {
    float* order = reinterpret_cast<float*>(s.weights);
    std::copy(s.most, s.most + blocks, order);
    std::nth_element(order, order + (top_k - 1), order + blocks, [](float a, float b) { return a > b; });
    least = order[top_k - 1];
  }
  int64_t count = 0;
  for (int64_t b = 0; b < blocks; b++) {
    if (!(s.most[b] >= least)) continue;
    const int64_t end = std::min((b + 1) * kBlock, vocabulary);
    for (int64_t i = b * kBlock; i < end; i++)
      if (row[i] >= least && row[i] > -INFINITY) s.candidates[count++] = {row[i], static_cast<int32_t>(i)};
  }
  if (count > top_k) {
    std::nth_element(s.candidates, s.candidates + top_k, s.candidates + count, before);
    count = top_k;
  }
  return count;
}

// The candidate at which the running sum exceeds `goal` (`reaches`: is at least as large), from `sum` on; the last one
// if none does. Leaves the sum up to and with it.
int64_t walk(const Candidate* c, int64_t count, double goal, bool reaches, double* sum) {
  for (int64_t i = 0; i < count; i++) {
    *sum += c[i].weight;
    if (reaches ? *sum >= goal : *sum > goal) return i;
  }
  return count - 1;
}

// uniform * sum, which rounding may not lift to the sum itself: no candidate would exceed it.
double goal_below(double sum, double uniform) { return std::min(uniform * sum, std::nextafter(sum, 0.0)); }

// Of candidates 0..count, at least one, whose weights are known.
int32_t draw_sorted(Candidate* c, int64_t count, const SampleCut& cut) {
  std::sort(c, c + count, before);
  double total = 0.0;
  for (int64_t i = 0; i < count; i++) total += c[i].weight;
  double kept = total;
  if (cut.top_p < 1.0) {
    kept = 0.0;
    count = walk(c, count, cut.top_p * total, true, &kept) + 1;
  }
  double sum = 0.0;
  return c[walk(c, count, goal_below(kept, cut.uniform), false, &sum)].token;
}

int32_t draw_of_few(const float* row, int64_t vocabulary, float top, const SampleCut& cut, const Scratch& s) {
  const int64_t found = largest_logits(row, vocabulary, static_cast<int64_t>(cut.top_k), s);
  int64_t count = 0;
  for (int64_t i = 0; i < found; i += W) {
    vf x = splat(-INFINITY);
    for (int64_t j = 0; j < W && i + j < found; j++) x[j] = static_cast<float>(s.candidates[i + j].weight);
    const vd weight = exp_of(__builtin_convertvector(x - top, vd) / cut.temperature);
    for (int64_t j = 0; j < W && i + j < found; j++)
      if (weight[j] > 0.0 && weight[j] >= cut.min_p) s.candidates[count++] = {weight[j], s.candidates[i + j].token};
  }
  return draw_sorted(s.candidates, count, cut);
}

// Weights of the whole row, and their bucket; adds up the buckets. Returns the number of candidates.
int64_t weigh_all(const float* row, int64_t vocabulary, float top, const SampleCut& cut, const Scratch& s) {
  std::fill(s.sums, s.sums + kBuckets, 0.0);
  int64_t count = 0;
  constexpr uint64_t kOne = uint64_t{0x3ff0000000000000u} >> (52 - kKeyBits);
  for (int64_t first = 0; first < vocabulary; first += W) {
    vf x = splat(-INFINITY);
    if (first + W <= vocabulary) {
      x = load(row + first);
    } else {
      for (int64_t i = 0; first + i < vocabulary; i++) x[i] = row[first + i];
    }
    const vd weight = exp_of(__builtin_convertvector(x - top, vd) / cut.temperature);
    std::memcpy(s.weights + first, &weight, sizeof weight);
    const vq key = kOne - ((vq)weight >> (52 - kKeyBits));
    for (int i = 0; i < W; i++) {
      const bool kept = weight[i] > 0.0 && weight[i] >= cut.min_p;
      const uint16_t bucket = key[i] < kBuckets ? static_cast<uint16_t>(key[i]) : static_cast<uint16_t>(kBuckets - 1);
      s.keys[first + i] = kept ? bucket : kLeftOut;
      if (kept) s.sums[bucket] += weight[i], count++;
    }
  }
  return count;
}

// The candidates of a bucket, sorted. Returns their number.
int64_t gather(uint16_t bucket, int64_t vocabulary, const Scratch& s) {
  int64_t count = 0;
  for (int64_t first = 0; first < vocabulary; first += kBlock) {
    const int64_t end = std::min(first + kBlock, vocabulary);
    int hits = 0;
    for (int64_t i = first; i < end; i++) hits += s.keys[i] == bucket;
    if (!hits) continue;
    for (int64_t i = first; i < end; i++)
      if (s.keys[i] == bucket) s.candidates[count++] = {s.weights[i], static_cast<int32_t>(i)};
  }
  std::sort(s.candidates, s.candidates + count, before);
  return count;
}

// Where a running sum over all candidates passes `goal`, as in `walk`; `sum` is left up to and with that token.
int32_t walk_buckets(double goal, bool reaches, int64_t vocabulary, const Scratch& s, double* sum) {
  int64_t last = 0;  // the last bucket that is not empty
  double reached = 0.0;
  for (int64_t b = 0; b < kBuckets; b++) {
    if (s.sums[b] == 0.0) continue;
    last = b;
    *sum = reached;  // of the buckets before this one
    reached += s.sums[b];
    if (reaches ? reached >= goal : reached > goal) break;
  }
  const int64_t count = gather(static_cast<uint16_t>(last), vocabulary, s);
  return s.candidates[walk(s.candidates, count, goal, reaches, sum)].token;
}

int32_t draw_of_all(const float* row, int64_t vocabulary, float top, const SampleCut& cut, const Scratch& s) {
  const int64_t count = weigh_all(row, vocabulary, top, cut, s);
  if (count <= kSortAll) {
    int64_t found = 0;
    for (int64_t i = 0; i < vocabulary; i++)
      if (s.keys[i] != kLeftOut) s.candidates[found++] = {s.weights[i], static_cast<int32_t>(i)};
    return draw_sorted(s.candidates, found, cut);
  }
  double total = 0.0, kept = 0.0, sum = 0.0;
  for (int64_t b = 0; b < kBuckets; b++) total += s.sums[b];
  kept = total;
  if (cut.top_p < 1.0) walk_buckets(cut.top_p * total, true, vocabulary, s, &kept);
  return walk_buckets(goal_below(kept, cut.uniform), false, vocabulary, s, &sum);
}

int32_t sample_row(const float* row, int64_t vocabulary, const SampleCut& cut, const Scratch& s) {
  const float top = row_maximum(row, vocabulary, s.most);
  if (!std::isfinite(top)) return -1;
  if (cut.temperature == 0.0) return first_of(top, row, vocabulary, s.most);
  if (cut.top_k > 0.0 && cut.top_k < static_cast<double>(vocabulary)) return draw_of_few(row, vocabulary, top, cut, s);
  return draw_of_all(row, vocabulary, top, cut, s);
}

}  // namespace

void sample(ThreadPool& pool, const SampleArgs& a) {
  bool draws = false;
  for (int64_t r = 0; r < a.logits.rows; r++) draws |= a.cuts[r].temperature != 0.0;
  pool.reserve_local(Scratch::bytes(a.logits.cols, draws));
  pool.run(a.logits.rows, [&](int64_t r, int thread) {
    const float* row = static_cast<const float*>(a.logits.data) + r * a.logits.stride;
    a.tokens[r] = sample_row(row, a.logits.cols, a.cuts[r], Scratch(pool.local(thread), a.logits.cols));
  });
}

}  // namespace pagelens::PAGELENS_ISA
