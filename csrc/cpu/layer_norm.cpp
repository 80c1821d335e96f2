#include <cmath>

#include "common/simd.h"
#include "cpu/parallel.h"

namespace pagelens::PAGELENS_ISA {
namespace {

// Two passes: the sum of squared differences does not cancel as a sum of squares minus a square would.
template <class T>
void norm_row(const T* x, const T* weight, const T* bias, T* out, int64_t n, float eps) {
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

template <class T>
void run(ThreadPool& pool, const NormArgs& a) {
  for_rows(pool, a.x.rows, a.x.cols, [&](int64_t row) {
    norm_row(static_cast<const T*>(a.x.data) + row * a.x.stride, static_cast<const T*>(a.weight),
             static_cast<const T*>(a.bias), static_cast<T*>(a.out.data) + row * a.out.stride, a.x.cols, a.eps);
  });
}

}  // namespace

void layer_norm(ThreadPool& pool, const NormArgs& args) {
  args.x.dtype == DType::f32 ? run<float>(pool, args) : run<bf16>(pool, args);
}

}  // namespace pagelens::PAGELENS_ISA
