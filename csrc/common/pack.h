// Weights into the layout of cpu/kernels.h; the same for every instruction set.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "common/thread_pool.h"
#include "cpu/kernels.h"

namespace pagelens {

// Memory of packed weights, in huge pages where the system has them. Small buffers share a block for that: read cold
// from pages of 4 KiB, a matrix of 2 MiB takes about twice as long.
class WeightBuffer {
 public:
  explicit WeightBuffer(size_t bytes);  // throws std::bad_alloc
  // Memory of somebody else, who keeps it for as long as this object lives.
  WeightBuffer(char* data, size_t bytes) : data_(data), size_(bytes) {}
  WeightBuffer(const WeightBuffer&) = delete;
  WeightBuffer& operator=(const WeightBuffer&) = delete;
  char* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
  std::shared_ptr<char> block_;  // what owns the memory, if anything here does
};

// Everything but the numbers of a packed linear layer. Its parts lie one after another in one piece of memory, each on
// a 64-byte line: weight, scales, zeros, order, bias.
struct LinearShape {
  int64_t n = 0, k = 0;
  DType dtype = DType::f32;
  bool has_bias = false;
  Format format = Format::plain;
  ActivationFormat activation = ActivationFormat::plain;
  DType scale_dtype = DType::f32;
  int64_t group_size = 1;
  bool has_zeros = false, has_order = false;
  int64_t activation_group = 0;
};

size_t packed_bytes(const LinearShape& shape);
PackedLinear place(const LinearShape& shape, char* memory);  // `memory` is on a 64-byte line

// Rows of a matrix. With `second`, columns 0..15 of a panel are rows of `first`, columns 16..31 the same rows of
// `second` (gate and up). Columns behind the last row are zeros.
struct RowSource {
  const void* first = nullptr;
  const void* second = nullptr;  // null: all rows are of `first`
  int64_t rows = 0;              // of each
};

// Both write to where `packed` points.
// weight: [rows, k] contiguous of packed.dtype; bias: [n] of `bias_dtype` or null.
void pack_plain(ThreadPool& pool, const PackedLinear& packed, const RowSource& weight, const void* bias,
                DType bias_dtype);
// values: [rows, k] bytes (int4: -8..7 as int8); scales: [rows, G] of packed.scale_dtype; zeros: [rows, G] int16.
void pack_quantized(ThreadPool& pool, const PackedLinear& packed, const RowSource& values, const RowSource& scales,
                    const RowSource& zeros, const int32_t* order, const void* bias, DType bias_dtype);

}  // namespace pagelens
