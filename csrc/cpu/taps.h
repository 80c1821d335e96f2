// Convolution as a product of gathered rows: row i is what lies under the kernel at output position i. Rows are
// gathered when a tile is packed; no matrix of them is ever made.
#pragma once
#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"

namespace pagelens::PAGELENS_ISA {

// Channels last: [height, width, channels], a row is [kernel, kernel, channels], zeros outside the image.
// Planes: [image, channels, height, width], a row is [channels, kernel, kernel]; no padding.
struct Taps {
  const void* data = nullptr;
  DType dtype = DType::f32;
  bool planes = false;
  int64_t height = 0, width = 0, channels = 0;
  int64_t kernel = 1, stride = 1, padding = 0;

  int64_t out_height() const { return (height + 2 * padding - kernel) / stride + 1; }
  int64_t out_width() const { return (width + 2 * padding - kernel) / stride + 1; }
};

static inline void* gather_row(const Taps& t, int64_t i, void* row) {
  const int64_t bytes = t.dtype == DType::f32 ? 4 : 2;
  const char* data = static_cast<const char*>(t.data);
  char* to = static_cast<char*>(row);
  const int64_t x = i % t.out_width() * t.stride - t.padding;
  const int64_t y = i / t.out_width() % t.out_height() * t.stride - t.padding;
  if (t.planes) {
    const int64_t image = i / (t.out_width() * t.out_height());
    for (int64_t c = 0; c < t.channels; c++) {
      const char* plane = data + ((image * t.channels + c) * t.height + y) * t.width * bytes;
      for (int64_t k = 0; k < t.kernel; k++, to += t.kernel * bytes)
        std::memcpy(to, plane + (k * t.width + x) * bytes, t.kernel * bytes);
    }
    return row;
  }
  // Columns first..last of the kernel lie inside.
  const int64_t first = std::max<int64_t>(-x, 0), last = std::min(t.width - x, t.kernel), pixel = t.channels * bytes;
  for (int64_t k = 0; k < t.kernel; k++, to += t.kernel * pixel) {
    if (y + k < 0 || y + k >= t.height || first >= last) {
      std::memset(to, 0, t.kernel * pixel);
      continue;
    }
    std::memset(to, 0, first * pixel);
    std::memcpy(to + first * pixel, data + ((y + k) * t.width + x + first) * pixel, (last - first) * pixel);
    std::memset(to + last * pixel, 0, (t.kernel - last) * pixel);
  }
  return row;
}

}  // namespace pagelens::PAGELENS_ISA
