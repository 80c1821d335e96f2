// Bicubic resize of 8-bit RGB with exactly the bytes of Pillow's Image.resize before version 13: each axis on its own,
// horizontal first; weights from the cubic kernel with a = -0.5, stretched when shrinking, rounded to 22 fractional
// bits; the result of each pass rounded to 8 bits. A pass whose size does not change is skipped. The operation order of
// the weights is Pillow's (libImaging/Resample.c), because their rounding decides bytes.
#if defined(__GNUC__) && !defined(__clang__)
  // GCC 12's AVX-512 headers begin from undefined vectors on purpose, and warn of it wherever they are inlined.
  #pragma GCC diagnostic ignored "-Wuninitialized"
  #pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "kernels.h"

#if defined(__AVX2__)
  #include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace pagelens::PAGELENS_ISA {
namespace {

constexpr int kWeightBits = 22;
constexpr int32_t kHalf = 1 << (kWeightBits - 1);
constexpr int64_t kRows = 16;          // rows transposed together by the horizontal pass
constexpr int64_t kLanes = 3 * kRows;  // their three channels side by side
constexpr int64_t kChunk = 64;         // bytes of an output row that the vertical pass keeps in registers

typedef uint8_t Bytes16 __attribute__((vector_size(16)));

// 16 sums. Written out per instruction set because GCC 12 widens bytes through scalar registers when left to itself.
struct Sums {
#if defined(__AVX512F__)
  __m512i a = _mm512_set1_epi32(kHalf);
  void add(const uint8_t* p, int32_t w) {
    const __m512i pixels = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    a = _mm512_add_epi32(a, _mm512_mullo_epi32(pixels, _mm512_set1_epi32(w)));
  }
  void store(uint8_t* p) const {
    const __m512i v = _mm512_max_epi32(_mm512_srai_epi32(a, kWeightBits), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(v));
  }
#elif defined(__AVX2__)
  __m256i a = _mm256_set1_epi32(kHalf), b = _mm256_set1_epi32(kHalf);
  void add(const uint8_t* p, int32_t w) {
    const __m256i weight = _mm256_set1_epi32(w);
    const __m256i lo = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i hi = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8)));
    a = _mm256_add_epi32(a, _mm256_mullo_epi32(lo, weight));
    b = _mm256_add_epi32(b, _mm256_mullo_epi32(hi, weight));
  }
  void store(
      uint8_t* p) const {  // the packs work within 128-bit halves: the permutation puts the quarters back in order
    const __m256i words = _mm256_packs_epi32(_mm256_srai_epi32(a, kWeightBits), _mm256_srai_epi32(b, kWeightBits));
    const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
  }
#else
  int32_t a[16];
  Sums() { std::fill(a, a + 16, kHalf); }
  void add(const uint8_t* p, int32_t w) {
    for (int i = 0; i < 16; ++i) a[i] += p[i] * w;
  }
  void store(uint8_t* p) const {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(std::clamp(a[i] >> kWeightBits, 0, 255));
  }
#endif
};

struct Axis {
  int64_t taps = 0;              // weights stored per output position
  std::vector<int32_t> first;    // first source position
  std::vector<int32_t> count;    // sources used, at most `taps`
  std::vector<int32_t> weights;  // [out][taps]
};

double cubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

Axis plan_axis(int64_t in, int64_t out) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double stretch = std::max(scale, 1.0);
  const double support = 2.0 * stretch, inverse = 1.0 / stretch;
  Axis axis;
  axis.taps = std::min<int64_t>(static_cast<int64_t>(std::ceil(support)) * 2 + 1, in);
  axis.first.resize(out);
  axis.count.resize(out);
  axis.weights.assign(out * axis.taps, 0);
  std::vector<double> w(axis.taps);
  for (int64_t i = 0; i < out; ++i) {
    const double centre = (static_cast<double>(i) + 0.5) * scale;
    const int64_t lo = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
    const int64_t hi = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), in);
    double sum = 0.0;
    for (int64_t j = lo; j < hi; ++j) {
      w[j - lo] = cubic((static_cast<double>(j) - centre + 0.5) * inverse);
      sum += w[j - lo];
    }
    for (int64_t j = 0; j < hi - lo; ++j) {
      const double v = (sum != 0.0 ? w[j] / sum : w[j]) * (1 << kWeightBits);
      axis.weights[i * axis.taps + j] = static_cast<int32_t>(v < 0 ? v - 0.5 : v + 0.5);
    }
    axis.first[i] = static_cast<int32_t>(lo);
    axis.count[i] = static_cast<int32_t>(hi - lo);
  }
  return axis;
}

// dst[0..16*N) = clamp(sum of weights[t] * src[t * stride + 0..16*N)), all N accumulators in registers.
template <int N>
inline void weigh(const uint8_t* src, int64_t stride, const int32_t* weights, int32_t count, uint8_t* dst) {
  Sums sums[N];
  for (int32_t t = 0; t < count; ++t, src += stride)
    for (int v = 0; v < N; ++v) sums[v].add(src + 16 * v, weights[t]);
  for (int v = 0; v < N; ++v) sums[v].store(dst + 16 * v);
}

// 16 x 16 bytes, rows to columns. Interleaving rows i and i+8 four times moves the row index into the byte index.
inline void transpose16(const uint8_t* const* from, uint8_t* const* to) {
  Bytes16 a[16], b[16];
  for (int i = 0; i < 16; ++i) std::memcpy(&a[i], from[i], 16);
  for (int stage = 0; stage < 4; ++stage) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = __builtin_shufflevector(a[i], a[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      b[2 * i + 1] =
          __builtin_shufflevector(a[i], a[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::memcpy(a, b, sizeof a);
  }
  for (int i = 0; i < 16; ++i) std::memcpy(to[i], &a[i], 16);
}

// turned[x][row] = lines[row][x] for 16 rows of `bytes` bytes.
void turn(const uint8_t* const* lines, uint8_t* turned, int64_t bytes) {
  int64_t x = 0;
  for (; x + 16 <= bytes; x += 16) {
    const uint8_t* from[16];
    uint8_t* to[16];
    for (int i = 0; i < 16; ++i) from[i] = lines[i] + x, to[i] = turned + (x + i) * kRows;
    transpose16(from, to);
  }
  for (; x < bytes; ++x)
    for (int64_t r = 0; r < kRows; ++r) turned[x * kRows + r] = lines[r][x];
}

// The first `rows` rows of turned[x][row] back to lines of `bytes` bytes each.
void turn_back(const uint8_t* turned, uint8_t* dst, int64_t rows, int64_t bytes) {
  int64_t x = 0;
  if (rows == kRows) {
    for (; x + 16 <= bytes; x += 16) {
      const uint8_t* from[16];
      uint8_t* to[16];
      for (int i = 0; i < 16; ++i) from[i] = turned + (x + i) * kRows, to[i] = dst + i * bytes + x;
      transpose16(from, to);
    }
  }
  for (; x < bytes; ++x)
    for (int64_t r = 0; r < rows; ++r) dst[r * bytes + x] = turned[x * kRows + r];
}

// Rows are taken 16 at a time and transposed to [x][channel][row], so that the taps of a pixel are contiguous blocks of
// 48 bytes and the inner loop has no strides; short last blocks repeat their last row.
void horizontal(const uint8_t* src, int64_t rows, int64_t in, uint8_t* dst, int64_t out, const Axis& axis) {
  std::vector<uint8_t> turned(in * kLanes), result(out * kLanes);
  for (int64_t y = 0; y < rows; y += kRows) {
    const int64_t n = std::min(kRows, rows - y);
    const uint8_t* lines[kRows];
    for (int64_t r = 0; r < kRows; ++r) lines[r] = src + (y + std::min(r, n - 1)) * in * 3;
    turn(lines, turned.data(), in * 3);
    for (int64_t x = 0; x < out; ++x)
      weigh<kLanes / 16>(&turned[axis.first[x] * kLanes], kLanes, &axis.weights[x * axis.taps], axis.count[x],
                         &result[x * kLanes]);
    turn_back(result.data(), dst + y * out * 3, n, out * 3);
  }
}

void vertical(const uint8_t* src, int64_t width, uint8_t* dst, int64_t out, const Axis& axis) {
  for (int64_t y = 0; y < out; ++y) {
    const uint8_t* top = src + axis.first[y] * width;
    const int32_t* weights = &axis.weights[y * axis.taps];
    const int32_t count = axis.count[y];
    uint8_t* line = dst + y * width;
    int64_t x = 0;
    for (; x + kChunk <= width; x += kChunk) weigh<kChunk / 16>(top + x, width, weights, count, line + x);
    for (; x < width; ++x) {
      int32_t acc = kHalf;
      for (int32_t t = 0; t < count; ++t) acc += top[t * width + x] * weights[t];
      line[x] = static_cast<uint8_t>(std::clamp(acc >> kWeightBits, 0, 255));
    }
  }
}

}  // namespace

// src [src_h, src_w, 3], dst [dst_h, dst_w, 3], both contiguous and not overlapping, all sizes at least 1.
void resize_rgb_u8(const uint8_t* src, int64_t src_h, int64_t src_w, uint8_t* dst, int64_t dst_h, int64_t dst_w) {
  if (src_w == dst_w && src_h == dst_h) {
    std::memcpy(dst, src, static_cast<size_t>(src_h) * src_w * 3);
    return;
  }
  if (src_h == dst_h) {
    horizontal(src, src_h, src_w, dst, dst_w, plan_axis(src_w, dst_w));
    return;
  }
  const Axis down = plan_axis(src_h, dst_h);
  if (src_w == dst_w) {
    vertical(src, src_w * 3, dst, dst_h, down);
    return;
  }
  std::vector<uint8_t> middle(static_cast<size_t>(src_h) * dst_w * 3);
  horizontal(src, src_h, src_w, middle.data(), dst_w, plan_axis(src_w, dst_w));
  vertical(middle.data(), dst_w * 3, dst, dst_h, down);
}

}  // namespace pagelens::PAGELENS_ISA
