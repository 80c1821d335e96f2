// How work that is done row by row is given to the threads.
#pragma once
#include <cstdint>

#include "common/thread_pool.h"

namespace pagelens::PAGELENS_ISA {

// Calls f(row) for every row. Few elements stay on the calling thread: waking another costs more than they do.
template <class F>
inline void for_rows(ThreadPool& pool, int64_t rows, int64_t elements_a_row, F&& f) {
  constexpr int64_t kChunkElements = 16384;
  const int64_t per_chunk =
      elements_a_row >= kChunkElements ? 1 : kChunkElements / (elements_a_row > 0 ? elements_a_row : 1);
  const int64_t chunks = (rows + per_chunk - 1) / per_chunk;
  pool.run(chunks, [&](int64_t chunk, int) {
    const int64_t end = (chunk + 1) * per_chunk < rows ? (chunk + 1) * per_chunk : rows;
    for (int64_t row = chunk * per_chunk; row < end; row++) f(row);
  });
}

}  // namespace pagelens::PAGELENS_ISA
