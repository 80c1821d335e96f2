// What the test programs of the kernels share: exact heap memory, matrices, and the loop over instruction sets and
// threads. A program returns 0, or prints what failed and returns 1; a sanitizer ends it by itself.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "common/thread_pool.h"
#include "cpu/kernels.h"

namespace pagelens::tests {

inline int failures = 0;
inline int checks = 0;

inline void expect(bool good, const std::string& what) {
  checks++;
  if (good) return;
  if (++failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

inline int finish(const char* program) {
  std::printf("%s: %d checks, %d failed\n", program, checks, failures);
  return failures || !checks ? 1 : 0;
}

// xorshift64*: the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint32_t next() {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545f4914f6cdd1du) >> 32);
  }
  int64_t below(int64_t n) { return next() % n; }
  double uniform(double low, double high) { return low + (high - low) * (next() / 4294967296.0); }

 private:
  uint64_t state_;
};

// `bytes` bytes that end where the heap block ends, `lead` bytes behind a 64-byte line: AddressSanitizer sees a read of
// one more, and a kernel that counts on aligned rows fails.
class Memory {
 public:
  explicit Memory(size_t bytes, size_t lead = 0) : bytes_(bytes) {
    void* base = nullptr;
    if (posix_memalign(&base, 64, lead + bytes + (lead + bytes == 0))) std::abort();
    base_ = base;
    data_ = static_cast<char*>(base) + lead;
    std::memset(data_, 0, bytes);
  }
  ~Memory() { std::free(base_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  Memory(Memory&& other) noexcept : base_(other.base_), data_(other.data_), bytes_(other.bytes_) {
    other.base_ = nullptr;
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* base_;
  char* data_;
  size_t bytes_;
};

template <class T>
Memory copy_of(const std::vector<T>& values) {
  Memory memory(values.size() * sizeof(T));
  if (!values.empty()) std::memcpy(memory.as<char>(), values.data(), memory.bytes());
  return memory;
}

inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline uint16_t to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

// What `value` is in a dtype.
inline double rounded(double value, DType dtype) {
  const float f = static_cast<float>(value);
  return dtype == DType::f32 ? f : from_bf16(to_bf16(f));
}

// Rows of one dtype, `gap` elements apart beyond their columns. The gaps hold NaN: what reads one spoils its result,
// and what writes one is found by `gaps_are_whole`.
class Matrix {
 public:
  Matrix(int64_t rows, int64_t cols, DType dtype, int64_t gap = 0)
      : rows_(rows),
        cols_(cols),
        stride_(cols + gap),
        dtype_(dtype),
        memory_(static_cast<size_t>((rows ? (rows - 1) * stride_ + cols : 0) * bytes_of(dtype)),
                static_cast<size_t>(bytes_of(dtype))) {
    for (int64_t r = 0; r + 1 < rows; r++)
      for (int64_t c = cols; c < stride_; c++) put(r * stride_ + c, NAN);
  }
  static Matrix random(Random& random, int64_t rows, int64_t cols, DType dtype, int64_t gap = 0, double size = 1.0) {
    Matrix m(rows, cols, dtype, gap);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < cols; c++) m.set(r, c, random.uniform(-size, size));
    return m;
  }
  static Matrix full(int64_t rows, int64_t cols, DType dtype, double value, int64_t gap = 0) {
    Matrix m(rows, cols, dtype, gap);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < cols; c++) m.set(r, c, value);
    return m;
  }
  int64_t rows() const { return rows_; }
  int64_t cols() const { return cols_; }
  DType dtype() const { return dtype_; }
  void* data() const { return memory_.as<char>(); }
  Rows view() const { return {data(), rows_, cols_, stride_, dtype_}; }
  double at(int64_t r, int64_t c) const { return get(r * stride_ + c); }
  void set(int64_t r, int64_t c, double value) { put(r * stride_ + c, value); }
  bool gaps_are_whole() const {
    for (int64_t r = 0; r + 1 < rows_; r++)
      for (int64_t c = cols_; c < stride_; c++)
        if (!std::isnan(get(r * stride_ + c))) return false;
    return true;
  }
  bool same_bits(const Matrix& other) const {
    for (int64_t r = 0; r < rows_; r++)
      if (std::memcmp(row(r), other.row(r), static_cast<size_t>(cols_ * bytes_of(dtype_)))) return false;
    return true;
  }

 private:
  const char* row(int64_t r) const { return memory_.as<char>() + r * stride_ * bytes_of(dtype_); }
  void put(int64_t i, double value) {
    const float f = static_cast<float>(value);
    if (dtype_ == DType::f32) {
      memory_.as<float>()[i] = f;
    } else {
      memory_.as<uint16_t>()[i] = to_bf16(f);
    }
  }
  double get(int64_t i) const {
    return dtype_ == DType::f32 ? memory_.as<float>()[i] : from_bf16(memory_.as<uint16_t>()[i]);
  }

  int64_t rows_, cols_, stride_;
  DType dtype_;
  Memory memory_;
};

// A result in double precision, row-major.
using Expected = std::vector<double>;

// |out - expected| <= absolute + relative * |expected|; bfloat16 results have half a unit of 8 bits more.
inline void expect_close(const std::string& what, const Matrix& out, const Expected& expected, double absolute,
                         double relative = 0.0) {
  if (out.dtype() == DType::bf16) relative += 1.0 / 256;
  double worst = 0.0;
  int64_t at = -1;
  for (int64_t r = 0; r < out.rows(); r++)
    for (int64_t c = 0; c < out.cols(); c++) {
      const double want = expected[static_cast<size_t>(r * out.cols() + c)];
      const double over = std::fabs(out.at(r, c) - want) / (absolute + relative * std::fabs(want));
      if (!(over <= worst)) worst = over, at = r * out.cols() + c;  // a NaN counts
      if (std::isnan(over)) r = out.rows(), c = out.cols();
    }
  if (at >= 0 && !(worst <= 1.0)) {
    const double got = out.at(at / out.cols(), at % out.cols()), want = expected[static_cast<size_t>(at)];
    expect(false, what + ": element " + std::to_string(at) + " is " + std::to_string(got) + ", expected " +
                      std::to_string(want));
  } else {
    expect(true, what);
  }
  expect(out.gaps_are_whole(), what + ": wrote between two rows");
}

// The instruction sets to test: those of the command line, or all that this CPU has.
inline std::vector<std::string>& isas() {
  static std::vector<std::string> names = supported_isas();
  return names;
}

inline void choose_isas(int argc, char** argv) {
  if (argc > 1) isas().assign(argv + 1, argv + argc);
}

inline const std::vector<int>& thread_counts() {
  static const std::vector<int> counts = {1, 2, 3};
  return counts;
}

// Calls f(pool, name of the setting) for every instruction set and number of threads, with a fresh pool: scratch that
// an earlier call left would hide a use beyond what this one asked for.
inline void each_setting(const std::string& what, const std::function<void(ThreadPool&, const std::string&)>& f) {
  for (const std::string& name : isas()) {
    set_isa(name);
    for (const int threads : thread_counts()) {
      ThreadPool pool(threads);
      const auto held = pool.lock();
      f(pool, what + " [" + name + ", threads " + std::to_string(threads) + "]");
    }
  }
}

// Runs a kernel that writes a matrix like `blank` (a copy of it each time) under every setting. The results must be
// close to `expected`, and of one instruction set the same bits for any number of threads.
inline void check_kernel(const std::string& what, const std::function<Matrix()>& blank, const Expected& expected,
                         double absolute, const std::function<void(ThreadPool&, Matrix&)>& kernel,
                         double relative = 0.0) {
  std::vector<Matrix> first;  // of this instruction set, with one thread
  each_setting(what, [&](ThreadPool& pool, const std::string& setting) {
    Matrix out = blank();
    kernel(pool, out);
    expect_close(setting, out, expected, absolute, relative);
    if (pool.num_threads() == thread_counts().front()) {
      first.clear();
      first.push_back(std::move(out));
    } else {
      expect(out.same_bits(first.front()), setting + ": other bits than with one thread");
    }
  });
}

inline const char* name_of(DType dtype) { return dtype == DType::f32 ? "f32" : "bf16"; }

}  // namespace pagelens::tests
