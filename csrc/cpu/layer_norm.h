// LayerNorm of one row; the weights may have another type than the row, and the result than both.
#pragma once
#include <cmath>

#include "common/simd.h"

namespace pagelens::PAGELENS_ISA {

// Two passes: the sum of squared differences does not cancel as a sum of squares minus a square would.
template <class X, class Weight, class Out>
inline void layer_norm_row(const X* x, const Weight* weight, const Weight* bias, Out* out, int64_t n, float eps) {
  const int64_t whole = n / W * W;
  vf total = vf{};
  for (int64_t i = 0; i < whole; i += W) total = total + load(x + i);
  float mean = sum_lanes(total);
  for (int64_t i = whole; i < n; i++) mean += get(x + i);
  mean /= static_cast<float>(n);

  vf squares = vf{};
  for (int64_t i = 0; i < whole; i += W) {
    const vf d = load(x + i) - mean;
    squares = fma(d, d, squares);
  }
  float variance = sum_lanes(squares);
  for (int64_t i = whole; i < n; i++) variance += (get(x + i) - mean) * (get(x + i) - mean);

  const float inverse = 1.0f / std::sqrt(variance / static_cast<float>(n) + eps);
  for (int64_t i = 0; i < whole; i += W)
    store(out + i, (load(x + i) - mean) * inverse * load(weight + i) + load(bias + i));
  for (int64_t i = whole; i < n; i++) put(out + i, (get(x + i) - mean) * inverse * get(weight + i) + get(bias + i));
}

}  // namespace pagelens::PAGELENS_ISA
