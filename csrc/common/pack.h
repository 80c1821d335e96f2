// Weights into the layout of cpu/kernels.h; the same for every instruction set.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "common/thread_pool.h"
#include "cpu/kernels.h"

namespace pagelens {

// Memory of packed weights. Blocks of 4 MiB and more ask for huge pages: a decode step reads them all once.
class WeightBuffer {
 public:
  explicit WeightBuffer(size_t bytes);  // throws std::bad_alloc
  ~WeightBuffer();
  WeightBuffer(const WeightBuffer&) = delete;
  WeightBuffer& operator=(const WeightBuffer&) = delete;
  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// weight: [n, k] contiguous, bias: [n] of `bias_dtype` or null; `to`: room for packed_bytes(n, k, dtype, bias).
size_t packed_bytes(int64_t n, int64_t k, DType dtype, bool with_bias);
PackedLinear pack_linear(ThreadPool& pool, const void* weight, const void* bias, DType bias_dtype, int64_t n, int64_t k,
                         DType dtype, char* to);
// gate, up: [inner, k] contiguous -> a packed linear of 32 * ceil(inner/16) rows, see PackedSwiglu.
PackedLinear pack_gate_up(ThreadPool& pool, const void* gate, const void* up, int64_t inner, int64_t k, DType dtype,
                          char* to);

}  // namespace pagelens
