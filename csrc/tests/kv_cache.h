// A paged KV-cache for the tests, filled and read an element at a time by the layout that cpu/kv_layout.h describes;
// the formulas are written out here once more, on purpose.
#pragma once
#include "tests/check.h"

namespace pagelens::tests {

enum class CacheKind { f32, bf16, int8 };

class Cache {
 public:
  Cache(CacheKind kind, int64_t blocks, int64_t block_size, int64_t heads, int64_t dim)
      : kind_(kind),
        blocks_(blocks),
        block_size_(block_size),
        heads_(heads),
        dim_(dim),
        bytes_(kind == CacheKind::f32    ? 4
               : kind == CacheKind::bf16 ? 2
                                         : 1),
        keys_(copy_of(std::vector<char>(static_cast<size_t>(blocks * block_size * heads * dim * bytes_)))),
        values_(copy_of(std::vector<char>(static_cast<size_t>(blocks * block_size * heads * dim * bytes_)))),
        key_scales_(copy_of(std::vector<float>(scales(), 0.0f))),
        value_scales_(copy_of(std::vector<float>(scales(), 0.0f))) {}

  void* keys() const { return keys_.as<void>(); }
  void* values() const { return values_.as<void>(); }
  float* key_scales() const { return kind_ == CacheKind::int8 ? key_scales_.as<float>() : nullptr; }
  float* value_scales() const { return kind_ == CacheKind::int8 ? value_scales_.as<float>() : nullptr; }

  double key(int64_t slot, int64_t head, int64_t d) const {
    return read(keys_, key_at(slot, head, d), 128, key_scales_, slot, head);
  }
  double value(int64_t slot, int64_t head, int64_t d) const {
    return read(values_, value_at(slot, head, d), 0, value_scales_, slot, head);
  }
  void fill(Random& random) {
    for (int64_t slot = 0; slot < blocks_ * block_size_; slot++)
      for (int64_t head = 0; head < heads_; head++) {
        if (kind_ == CacheKind::int8) {
          key_scales_.as<float>()[scale_at(slot, head)] = static_cast<float>(random.uniform(0.001, 0.01));
          value_scales_.as<float>()[scale_at(slot, head)] = static_cast<float>(random.uniform(0.001, 0.01));
        }
        for (int64_t d = 0; d < dim_; d++) {
          write(keys_, key_at(slot, head, d), 128, random);
          write(values_, value_at(slot, head, d), 0, random);
        }
      }
  }

 private:
  size_t scales() const { return kind_ == CacheKind::int8 ? static_cast<size_t>(blocks_ * block_size_ * heads_) : 0; }
  int64_t start(int64_t slot, int64_t head) const { return (slot / block_size_ * heads_ + head) * block_size_ * dim_; }
  int64_t scale_at(int64_t slot, int64_t head) const {
    return (slot / block_size_ * heads_ + head) * block_size_ + slot % block_size_;
  }
  int64_t key_at(int64_t slot, int64_t head, int64_t d) const {
    const int64_t token = slot % block_size_, group = token - token % 16, in_word = 4 / bytes_;
    const int64_t tokens = std::min<int64_t>(16, block_size_ - group);
    return start(slot, head) + group * dim_ + (d / in_word * tokens + token - group) * in_word + d % in_word;
  }
  int64_t value_at(int64_t slot, int64_t head, int64_t d) const {
    const int64_t token = slot % block_size_, in_word = 4 / bytes_, group = token - token % in_word;
    const int64_t tokens = std::min<int64_t>(in_word, block_size_ - group);
    return start(slot, head) + group * dim_ + d * tokens + token - group;
  }
  double read(const Memory& memory, int64_t i, int offset, const Memory& scale, int64_t slot, int64_t head) const {
    if (kind_ == CacheKind::f32) return memory.as<float>()[i];
    if (kind_ == CacheKind::bf16) return rounded_from(memory.as<uint16_t>()[i]);
    const int q = offset ? memory.as<uint8_t>()[i] - offset : memory.as<int8_t>()[i];
    return double{scale.as<float>()[scale_at(slot, head)]} * q;
  }
  void write(const Memory& memory, int64_t i, int offset, Random& random) {
    if (kind_ == CacheKind::f32) memory.as<float>()[i] = static_cast<float>(random.uniform(-1.0, 1.0));
    if (kind_ == CacheKind::bf16) memory.as<uint16_t>()[i] = bits_of(random.uniform(-1.0, 1.0));
    if (kind_ == CacheKind::int8)
      memory.as<uint8_t>()[i] = static_cast<uint8_t>(static_cast<int>(random.uniform(-127.0, 127.0)) + offset);
  }
  static double rounded_from(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
  static uint16_t bits_of(double x) {
    const float f = static_cast<float>(rounded(x, DType::bf16));
    uint32_t wide;
    std::memcpy(&wide, &f, 4);
    return static_cast<uint16_t>(wide >> 16);
  }

  CacheKind kind_;
  int64_t blocks_, block_size_, heads_, dim_, bytes_;
  Memory keys_, values_, key_scales_, value_scales_;
};

}  // namespace pagelens::tests
