// Rounds weights to 8 or 4 bits, bit for bit as quantize() in engine/quantization.py, which has the rule and its
// reasons.
#include <atomic>
#include <cmath>

#include "common/simd.h"
#include "common/thread_pool.h"
#include "cpu/parallel.h"

namespace pagelens::PAGELENS_ISA {
namespace {

constexpr int kGroup = 32;
constexpr float kPlaces[] = {-8.0f, 7.0f,   -8.5f,  7.5f,   -9.0f, 8.0f, -7.0f,
                             -7.5f, -8.25f, -7.75f, -8.75f, 7.25f, 7.75f};  // INT4_PLACES

// To the nearest whole number, ties to even, for |x| < 2^22: the sum with 1.5 * 2^23 has no room for a fraction.
PAGELENS_INLINE vf round_even(vf x) { return (x + 12582912.0f) - 12582912.0f; }

// 0 for a scale of 0, and for one so small that its inverse is infinite.
PAGELENS_INLINE float inverse_of(float scale) {
  const float inverse = 1.0f / scale;
  return std::isfinite(inverse) ? inverse : 0.0f;
}

// whole[i] = clamp(round(x[i] / scale)), i < 32.
PAGELENS_INLINE void round_group(const float* x, float scale, float* whole) {
  const vf inverse = splat(inverse_of(scale));
  PAGELENS_UNROLL for (int v = 0; v < kGroup; v += W)
      store(whole + v, at_most(at_least(round_even(load(x + v) * inverse), -8.0f), 7.0f));
}

// In double precision, as in Python: the order of the sum then does not decide between two candidates.
typedef double vd __attribute__((vector_size(8 * W)));

PAGELENS_INLINE double squared_error(const float* x, const float* whole, float scale) {
  vd sum = vd{};
  PAGELENS_UNROLL for (int v = 0; v < kGroup; v += W) {
    const vd error = __builtin_convertvector(load(whole + v) * scale - load(x + v), vd);
    sum += error * error;
  }
  double total = 0.0;
  for (int i = 0; i < W; i++) total += sum[i];
  return total;
}

// The scale of a group of 32 (padded with zeros), rounded to bfloat16.
float int4_scale(const float* x) {
  float extreme = x[0];
  for (int i = 1; i < kGroup; i++)
    if (std::fabs(x[i]) > std::fabs(extreme)) extreme = x[i];
  float best = 0.0f, whole[kGroup];
  double least = INFINITY;
  for (const float place : kPlaces) {
    const float scale = widen(narrow(extreme / place));
    round_group(x, scale, whole);
    const double error = squared_error(x, whole, scale);
    if (error < least) best = scale, least = error;
  }
  return best;
}

template <class T>
void int4_row(const T* row, int64_t k, int8_t* values, bf16* scales) {
  for (int64_t k0 = 0; k0 < k; k0 += kGroup) {
    const int64_t count = k - k0 < kGroup ? k - k0 : kGroup;
    float x[kGroup] = {}, whole[kGroup];
    for (int64_t i = 0; i < count; i++) x[i] = get(row + k0 + i);
    const float scale = int4_scale(x);
    round_group(x, scale, whole);
    scales[k0 / kGroup] = narrow(scale);
    for (int64_t i = 0; i < count; i++) values[k0 + i] = static_cast<int8_t>(whole[i]);
  }
}

template <class T>
void int8_row(const T* row, int64_t k, int8_t* values, float* scale) {
  float largest = 0.0f;
  for (int64_t i = 0; i < k; i++) largest = std::fmax(largest, std::fabs(get(row + i)));
  *scale = largest / 127.0f;
  const float inverse = inverse_of(*scale);
  for (int64_t i = 0; i < k; i++) {
    const float whole = std::nearbyint(get(row + i) * inverse);
    values[i] = static_cast<int8_t>(whole < -127.0f ? -127.0f : whole > 127.0f ? 127.0f : whole);
  }
}

template <class T>
bool is_finite(const T* row, int64_t k) {
  float sum = 0.0f;  // 0 times infinity or NaN is NaN, and so is the sum from there on
  for (int64_t i = 0; i < k; i++) sum += get(row + i) * 0.0f;
  return sum == 0.0f;
}

template <class T>
int64_t run(ThreadPool& pool, const QuantizeArgs& a) {
  const int64_t k = a.weight.cols, groups = (k + kGroup - 1) / kGroup;
  std::atomic<int64_t> bad{-1};
  for_rows(pool, a.weight.rows, k * 8, [&](int64_t r) {
    const T* row = static_cast<const T*>(a.weight.data) + r * a.weight.stride;
    if (!is_finite(row, k)) {
      bad = r;
    } else if (a.format == Format::int4) {
      int4_row(row, k, a.values + r * k, static_cast<bf16*>(a.scales) + r * groups);
    } else {
      int8_row(row, k, a.values + r * k, static_cast<float*>(a.scales) + r);
    }
  });
  return bad;
}

}  // namespace

int64_t quantize(ThreadPool& pool, const QuantizeArgs& args) {
  return args.weight.dtype == DType::f32 ? run<float>(pool, args) : run<bf16>(pool, args);
}

}  // namespace pagelens::PAGELENS_ISA
