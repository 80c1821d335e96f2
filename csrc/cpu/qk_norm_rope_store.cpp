#include <cmath>

#include "common/simd.h"
#include "cpu/parallel.h"

namespace pagelens::PAGELENS_ISA {
namespace {

constexpr int kMaxHeadDim = 512;

// One head: optional RMSNorm, then the rotation of the pairs (i, i + D/2).
template <class T>
void norm_rope(const T* x, const T* weight, float eps, const float* cos, const float* sin, int64_t d, T* out) {
  float value[kMaxHeadDim];
  for (int64_t i = 0; i < d; i++) value[i] = get(x + i);
  if (weight) {
    const float inverse = 1.0f / std::sqrt(sum_of_squares(value, d) / static_cast<float>(d) + eps);
    for (int64_t i = 0; i < d; i++) value[i] = value[i] * inverse * get(weight + i);
  }
  const int64_t half = d / 2;
  float rotated[kMaxHeadDim];
  for (int64_t i = 0; i < half; i++) {
    rotated[i] = value[i] * cos[i] - value[half + i] * sin[i];
    rotated[half + i] = value[half + i] * cos[i] + value[i] * sin[i];
  }
  for (int64_t i = 0; i < d; i++) put(out + i, rotated[i]);
}

template <class T>
void run(ThreadPool& pool, const RopeArgs& a) {
  const int64_t d = a.head_dim, h = a.num_heads, k = a.num_kv_heads;
  for_rows(pool, a.qkv.rows, a.qkv.cols, [&](int64_t n) {
    const T* row = static_cast<const T*>(a.qkv.data) + n * a.qkv.stride;
    const float* cos = a.cos + a.positions[n] * (d / 2);
    const float* sin = a.sin + a.positions[n] * (d / 2);
    T* q = static_cast<T*>(a.out.data) + n * a.out.stride;
    for (int64_t i = 0; i < h; i++)
      norm_rope(row + i * d, static_cast<const T*>(a.q_norm), a.eps, cos, sin, d, q + i * d);
    T* key = static_cast<T*>(a.keys) + a.slots[n] * k * d;
    for (int64_t i = 0; i < k; i++)
      norm_rope(row + (h + i) * d, static_cast<const T*>(a.k_norm), a.eps, cos, sin, d, key + i * d);
    std::memcpy(static_cast<T*>(a.values) + a.slots[n] * k * d, row + (h + k) * d, k * d * sizeof(T));
  });
}

}  // namespace

int64_t qk_norm_rope_store(ThreadPool& pool, const RopeArgs& a) {
  for (int64_t n = 0; n < a.qkv.rows; n++)
    if (a.positions[n] < 0 || a.positions[n] >= a.num_positions || a.slots[n] < 0 || a.slots[n] >= a.num_slots)
      return n;
  a.qkv.dtype == DType::f32 ? run<float>(pool, a) : run<bf16>(pool, a);
  return -1;
}

}  // namespace pagelens::PAGELENS_ISA
