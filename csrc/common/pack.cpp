#include "common/pack.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

namespace pagelens {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLine = 64;
constexpr size_t kSharedBlock = size_t{64} << 20;  // of small buffers; one of kOwnBlock bytes and more has its own
constexpr size_t kOwnBlock = size_t{16} << 20;

int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

size_t lines(int64_t bytes) { return (static_cast<size_t>(bytes) + kLine - 1) / kLine * kLine; }

// The memory of a block is taken from the system when it is first touched, one huge page at a time.
std::shared_ptr<char> new_block(size_t bytes) {
  void* memory = nullptr;
  const size_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  if (posix_memalign(&memory, kHugePage, whole)) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  madvise(memory, whole, MADV_HUGEPAGE);
#endif
  return {static_cast<char*>(memory), &std::free};
}

// The block that takes the next small buffer, for as long as a buffer lies in it.
struct OpenBlock {
  std::mutex mutex;
  std::weak_ptr<char> memory;
  size_t used = 0;
} open_block;

// The row that column c of a panel holds, or null.
const char* row_of(const RowSource& source, int64_t panel, int64_t c, int64_t row_bytes) {
  const bool second = source.second && c >= 16;
  const int64_t row = source.second ? panel * 16 + c % 16 : panel * 32 + c;
  if (row >= source.rows) return nullptr;
  return static_cast<const char*>(second ? source.second : source.first) + row * row_bytes;
}

// Word g of a row, of which `bytes` bytes of 4 exist.
uint32_t plain_word(const char* row, int64_t g, int64_t row_bytes) {
  uint32_t w = 0;
  std::memcpy(&w, row + 4 * g, static_cast<size_t>(std::min<int64_t>(4, row_bytes - 4 * g)));
  return w;
}

uint32_t int4_word(const char* row, int64_t g, int64_t k) {
  uint32_t w = 0;
  for (int64_t i = 0; i < 8 && 8 * g + i < k; i++) {
    const uint32_t nibble = static_cast<uint32_t>(row[8 * g + i] + 8) & 15u;
    w |= nibble << (4 * (i / 2) + 16 * (i % 2));
  }
  return w;
}

uint32_t byte_word(const char* row, int64_t g, int64_t k) {
  uint32_t w = 0;
  for (int64_t i = 0; i < 4 && 4 * g + i < k; i++)
    w |= static_cast<uint32_t>(static_cast<uint8_t>(row[4 * g + i])) << (8 * (i / 2) + 16 * (i % 2));
  return w;
}

// word(row, g) of every column of every panel.
template <class Word>
void fill(ThreadPool& pool, const PackedLinear& packed, const RowSource& source, int64_t row_bytes, Word&& word) {
  constexpr int64_t kGroups = 64;  // a strip of 32 rows is read while its destination is in the cache
  const int64_t groups = packed.groups();
  uint32_t* to = static_cast<uint32_t*>(const_cast<void*>(packed.weight));
  pool.run(packed.panels(), [&](int64_t panel, int) {
    uint32_t* base = to + panel * packed.panel_words();
    for (int64_t g0 = 0; g0 < groups; g0 += kGroups) {
      const int64_t g1 = std::min(g0 + kGroups, groups);
      for (int64_t c = 0; c < 32; c++) {
        const char* row = row_of(source, panel, c, row_bytes);
        for (int64_t g = g0; g < g1; g++) base[g * 32 + c] = row ? word(row, g) : 0;
      }
    }
  });
}

// [rows, G] of elements of `bytes` bytes -> [panels][G][32].
void fill_groups(const PackedLinear& packed, const RowSource& source, int64_t bytes, void* to) {
  const int64_t groups = packed.scale_groups();
  char* out = static_cast<char*>(to);
  for (int64_t panel = 0; panel < packed.panels(); panel++)
    for (int64_t c = 0; c < 32; c++) {
      const char* row = row_of(source, panel, c, groups * bytes);
      for (int64_t g = 0; g < groups; g++) {
        char* at = out + ((panel * groups + g) * 32 + c) * bytes;
        if (row) {
          std::memcpy(at, row + g * bytes, static_cast<size_t>(bytes));
        } else {
          std::memset(at, 0, static_cast<size_t>(bytes));
        }
      }
    }
}

float bias_value(const void* bias, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(bias)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(bias)[i]) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

void fill_bias(const PackedLinear& packed, const void* bias, DType dtype) {
  if (!packed.bias) return;
  float* to = const_cast<float*>(packed.bias);
  for (int64_t i = 0; i < packed.panels() * 32; i++) to[i] = i < packed.n ? bias_value(bias, dtype, i) : 0.0f;
}

}  // namespace

WeightBuffer::WeightBuffer(size_t bytes) : size_(bytes) {
  if (bytes == 0) return;
  if (bytes >= kOwnBlock) {
    block_ = new_block(bytes);
    data_ = block_.get();
    return;
  }
  std::lock_guard<std::mutex> guard(open_block.mutex);
  block_ = open_block.memory.lock();
  if (!block_ || bytes > kSharedBlock - open_block.used) {
    block_ = new_block(kSharedBlock);
    open_block.memory = block_;
    open_block.used = 0;
  }
  data_ = block_.get() + open_block.used;
  open_block.used += lines(static_cast<int64_t>(bytes));
}

namespace {

PackedLinear lay_out(const LinearShape& shape, char* memory, size_t* size) {
  PackedLinear p;
  p.n = shape.n, p.k = shape.k, p.dtype = shape.dtype;
  p.format = shape.format, p.activation = shape.activation;
  p.scale_dtype = shape.scale_dtype, p.group_size = shape.group_size;
  p.activation_group = shape.activation_group;
  size_t at = 0;
  const auto next = [&](int64_t bytes) {
    char* here = memory ? memory + at : nullptr;
    at += lines(bytes);
    return here;
  };
  p.weight = next(p.panels() * p.panel_words() * 4);
  const int64_t scales = p.panels() * p.scale_groups() * 32;
  if (p.quantized()) p.scales = next(scales * element_bytes(p.scale_dtype));
  if (shape.has_zeros) p.zeros = reinterpret_cast<const int16_t*>(next(scales * 2));
  if (shape.has_order) p.order = reinterpret_cast<const int32_t*>(next(p.k * 4));
  if (shape.has_bias) p.bias = reinterpret_cast<const float*>(next(p.panels() * 128));
  *size = at;
  return p;
}

}  // namespace

PackedLinear place(const LinearShape& shape, char* memory) {
  size_t size;
  return lay_out(shape, memory, &size);
}

size_t packed_bytes(const LinearShape& shape) {
  size_t size;
  lay_out(shape, nullptr, &size);
  return size;
}

void pack_plain(ThreadPool& pool, const PackedLinear& packed, const RowSource& weight, const void* bias,
                DType bias_dtype) {
  const int64_t row_bytes = packed.k * element_bytes(packed.dtype);
  fill(pool, packed, weight, row_bytes,
       [row_bytes](const char* row, int64_t g) { return plain_word(row, g, row_bytes); });
  fill_bias(packed, bias, bias_dtype);
}

void pack_quantized(ThreadPool& pool, const PackedLinear& packed, const RowSource& values, const RowSource& scales,
                    const RowSource& zeros, const int32_t* order, const void* bias, DType bias_dtype) {
  const int64_t k = packed.k;
  if (packed.format == Format::int4) {
    fill(pool, packed, values, k, [k](const char* row, int64_t g) { return int4_word(row, g, k); });
  } else {
    fill(pool, packed, values, k, [k](const char* row, int64_t g) { return byte_word(row, g, k); });
  }
  fill_groups(packed, scales, element_bytes(packed.scale_dtype), const_cast<void*>(packed.scales));
  if (packed.zeros) fill_groups(packed, zeros, 2, const_cast<int16_t*>(packed.zeros));
  if (packed.order) std::copy_n(order, k, const_cast<int32_t*>(packed.order));
  fill_bias(packed, bias, bias_dtype);
}

}  // namespace pagelens
