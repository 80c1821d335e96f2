#include "common/pack.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <new>

namespace pagelens {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// One 4-byte word of a row: group g.
inline uint32_t word(const char* row, int64_t g, int64_t k, DType dtype) {
  uint32_t w = 0;
  if (dtype == DType::f32) {
    std::memcpy(&w, row + 4 * g, 4);
  } else {
    std::memcpy(&w, row + 4 * g, 2 * g + 1 < k ? 4 : 2);
  }
  return w;
}

// Panel column c is the row source(panel, c), or zeros where that is null.
template <class Source>
void fill(ThreadPool& pool, int64_t panels, int64_t groups, int64_t k, DType dtype, uint32_t* to, Source&& source) {
  constexpr int64_t kGroups = 64;  // a strip of 32 rows x 256 bytes is read while its destination is in the cache
  pool.run(panels, [&](int64_t panel, int) {
    uint32_t* base = to + panel * groups * 32;
    for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
      const int64_t g1 = g0 + kGroups < groups ? g0 + kGroups : groups;
      for (int64_t c = 0; c < 32; c++) {
        const char* row = source(panel, c);
        for (int64_t g = g0; g < g1; g++) base[g * 32 + c] = row ? word(row, g, k, dtype) : 0;
      }
    }
  });
}

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

float bias_value(const void* bias, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(bias)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(bias)[i]) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

}  // namespace

WeightBuffer::WeightBuffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  void* memory = nullptr;
  if (posix_memalign(&memory, bytes >= 2 * kHugePage ? kHugePage : 64, bytes)) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (bytes >= 2 * kHugePage) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  data_ = static_cast<char*>(memory);
}

WeightBuffer::~WeightBuffer() { std::free(data_); }

size_t packed_bytes(int64_t n, int64_t k, DType dtype, bool with_bias) {
  PackedLinear shape;
  shape.n = n, shape.k = k, shape.dtype = dtype;
  return static_cast<size_t>(shape.panels()) * (static_cast<size_t>(shape.panel_words()) * 4 + (with_bias ? 128 : 0));
}

PackedLinear pack_linear(ThreadPool& pool, const void* weight, const void* bias, DType bias_dtype, int64_t n, int64_t k,
                         DType dtype, char* to) {
  PackedLinear packed;
  packed.n = n, packed.k = k, packed.dtype = dtype, packed.weight = to;
  const char* rows = static_cast<const char*>(weight);
  const int64_t row_bytes = k * element_bytes(dtype);
  fill(pool, packed.panels(), packed.groups(), k, dtype, reinterpret_cast<uint32_t*>(to),
       [&](int64_t panel, int64_t c) {
         const int64_t row = panel * 32 + c;
         return row < n ? rows + row * row_bytes : nullptr;
       });
  if (bias) {
    float* padded = reinterpret_cast<float*>(to + static_cast<size_t>(packed.panels() * packed.panel_words()) * 4);
    for (int64_t i = 0; i < packed.panels() * 32; i++) padded[i] = i < n ? bias_value(bias, bias_dtype, i) : 0.0f;
    packed.bias = padded;
  }
  return packed;
}

PackedLinear pack_gate_up(ThreadPool& pool, const void* gate, const void* up, int64_t inner, int64_t k, DType dtype,
                          char* to) {
  PackedLinear packed;
  packed.n = (inner + 15) / 16 * 32, packed.k = k, packed.dtype = dtype, packed.weight = to;
  const int64_t row_bytes = k * element_bytes(dtype);
  fill(pool, packed.panels(), packed.groups(), k, dtype, reinterpret_cast<uint32_t*>(to),
       [&](int64_t panel, int64_t c) {
         const char* rows = static_cast<const char*>(c < 16 ? gate : up);
         const int64_t row = panel * 16 + c % 16;
         return row < inner ? rows + row * row_bytes : nullptr;
       });
  return packed;
}

}  // namespace pagelens
