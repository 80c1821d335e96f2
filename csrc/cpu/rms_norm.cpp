#include <cmath>

#include "common/simd.h"
#include "common/thread_pool.h"
#include "cpu/parallel.h"

namespace pagelens::PAGELENS_ISA {
namespace {

template <class T>
void norm_row(const T* x, const T* weight, T* out, int64_t n, float eps) {
  constexpr int U = 4;  // independent sums; their number fixes the order of addition
  vf total[U] = {};
  int64_t i = 0;
  for (; i + U * W <= n; i += U * W) PAGELENS_UNROLL for (int u = 0; u < U; u++) {
      const vf v = load(x + i + u * W);
      total[u] = fma(v, v, total[u]);
    }
  for (; i + W <= n; i += W) total[0] = fma(load(x + i), load(x + i), total[0]);
  float squares = sum_lanes((total[0] + total[1]) + (total[2] + total[3]));
  for (; i < n; i++) squares += get(x + i) * get(x + i);

  const float inverse = 1.0f / std::sqrt(squares / static_cast<float>(n) + eps);
  for (i = 0; i + W <= n; i += W) store(out + i, load(x + i) * inverse * load(weight + i));
  for (; i < n; i++) put(out + i, get(x + i) * inverse * get(weight + i));
}

template <class T>
void run(ThreadPool& pool, const NormArgs& a) {
  for_rows(pool, a.x.rows, a.x.cols, [&](int64_t row) {
    norm_row(static_cast<const T*>(a.x.data) + row * a.x.stride, static_cast<const T*>(a.weight),
             static_cast<T*>(a.out.data) + row * a.out.stride, a.x.cols, a.eps);
  });
}

}  // namespace

void rms_norm(ThreadPool& pool, const NormArgs& args) {
  args.x.dtype == DType::f32 ? run<float>(pool, args) : run<bf16>(pool, args);
}

}  // namespace pagelens::PAGELENS_ISA
