#include <cstring>

#include "common/simd.h"
#include "cpu/parallel.h"

namespace pagelens::PAGELENS_ISA {

int64_t embedding(ThreadPool& pool, const EmbeddingArgs& a) {
  for (int64_t n = 0; n < a.out.rows; n++)
    if (a.ids[n] < 0 || a.ids[n] >= a.table.rows) return n;
  const int64_t bytes = a.table.dtype == DType::f32 ? 4 : 2;
  for_rows(pool, a.out.rows, a.out.cols, [&](int64_t n) {
    std::memcpy(static_cast<char*>(a.out.data) + n * a.out.stride * bytes,
                static_cast<const char*>(a.table.data) + a.ids[n] * a.table.stride * bytes, a.out.cols * bytes);
  });
  return -1;
}

}  // namespace pagelens::PAGELENS_ISA
