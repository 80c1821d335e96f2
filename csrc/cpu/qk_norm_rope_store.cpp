#include <cmath>

#include "common/simd.h"
#include "cpu/kv_layout.h"
#include "cpu/parallel.h"

namespace pagelens::PAGELENS_ISA {
namespace {

constexpr int kMaxHeadDim = 512;

// One head: optional RMSNorm, then the rotation of the pairs (i, i + D/2).
template <class T>
void norm_rope(const T* x, const T* weight, float eps, const float* cos, const float* sin, int64_t d, float* rotated) {
  float value[kMaxHeadDim];
  for (int64_t i = 0; i < d; i++) value[i] = get(x + i);
  if (weight) {
    const float inverse = 1.0f / std::sqrt(sum_of_squares(value, d) / static_cast<float>(d) + eps);
    for (int64_t i = 0; i < d; i++) value[i] = value[i] * inverse * get(weight + i);
  }
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; i++) {
    rotated[i] = value[i] * cos[i] - value[half + i] * sin[i];
    rotated[half + i] = value[half + i] * cos[i] + value[i] * sin[i];
  }
}

// Writes rows of float into a cache of activations.
template <class T>
struct PlainStore {
  const RopeArgs& a;
  KVBlock<T> layout{a.block_size, a.num_kv_heads, a.head_dim};

  void key(int64_t slot, int64_t head, const float* row) const {
    T rounded[kMaxHeadDim];
    for (int64_t i = 0; i < a.head_dim; i++) put(rounded + i, row[i]);
    put_key(static_cast<T*>(a.keys) + layout.start(slot / a.block_size, head), layout, slot % a.block_size, rounded);
  }
  void value(int64_t slot, int64_t head, const T* row) const {
    put_value(static_cast<T*>(a.values) + layout.start(slot / a.block_size, head), layout, slot % a.block_size, row);
  }
};

// Writes rows of float into an int8 cache.
template <class T>
struct Int8Store {
  const RopeArgs& a;
  KVBlock<uint8_t> layout{a.block_size, a.num_kv_heads, a.head_dim};

  void key(int64_t slot, int64_t head, const float* row) const {
    const int64_t block = slot / a.block_size, token = slot % a.block_size;
    int8_t q[kMaxHeadDim];
    a.key_scales[layout.scale_at(block, head, token)] = quantize_row(row, a.head_dim, q);
    uint8_t bytes[kMaxHeadDim];
    for (int64_t i = 0; i < a.head_dim; i++) bytes[i] = static_cast<uint8_t>(q[i] + kKeyOffset);
    put_key(static_cast<uint8_t*>(a.keys) + layout.start(block, head), layout, token, bytes);
  }
  void value(int64_t slot, int64_t head, const T* row) const {
    const int64_t block = slot / a.block_size, token = slot % a.block_size;
    float raised[kMaxHeadDim];
    for (int64_t i = 0; i < a.head_dim; i++) raised[i] = get(row + i);
    int8_t q[kMaxHeadDim];
    a.value_scales[layout.scale_at(block, head, token)] = quantize_row(raised, a.head_dim, q);
    put_value(static_cast<uint8_t*>(a.values) + layout.start(block, head), layout, token,
              reinterpret_cast<const uint8_t*>(q));
  }
};

template <class T, class Store>
void run(ThreadPool& pool, const RopeArgs& a, const Store& store) {
  const int64_t d = a.head_dim, h = a.num_heads, k = a.num_kv_heads;
  for_rows(pool, a.qkv.rows, a.qkv.cols, [&](int64_t n) {
    const T* row = static_cast<const T*>(a.qkv.data) + n * a.qkv.stride;
    const float* cos = a.cos + a.positions[n] * (d / 2);
    const float* sin = a.sin + a.positions[n] * (d / 2);
    T* q = static_cast<T*>(a.out.data) + n * a.out.stride;
    float rotated[kMaxHeadDim];
    for (int64_t i = 0; i < h; i++) {
      norm_rope(row + i * d, static_cast<const T*>(a.q_norm), a.eps, cos, sin, d, rotated);
      for (int64_t j = 0; j < d; j++) put(q + i * d + j, rotated[j]);
    }
    for (int64_t i = 0; i < k; i++) {
      norm_rope(row + (h + i) * d, static_cast<const T*>(a.k_norm), a.eps, cos, sin, d, rotated);
      store.key(a.slots[n], i, rotated);
      store.value(a.slots[n], i, row + (h + k + i) * d);
    }
  });
}

template <class T>
void run_into(ThreadPool& pool, const RopeArgs& a) {
  a.key_scales ? run<T>(pool, a, Int8Store<T>{a}) : run<T>(pool, a, PlainStore<T>{a});
}

}  // namespace

int64_t qk_norm_rope_store(ThreadPool& pool, const RopeArgs& a) {
  for (int64_t n = 0; n < a.qkv.rows; n++)
    if (a.positions[n] < 0 || a.positions[n] >= a.num_positions || a.slots[n] < 0 ||
        a.slots[n] >= a.num_blocks * a.block_size)
      return n;
  a.qkv.dtype == DType::f32 ? run_into<float>(pool, a) : run_into<bf16>(pool, a);
  return -1;
}

}  // namespace pagelens::PAGELENS_ISA
