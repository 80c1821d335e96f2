#include "cpu/linear.h"

namespace pagelens::PAGELENS_ISA {

void linear(ThreadPool& pool, const LinearArgs& args) {
  const Problem problem{{args.x.data, args.x.stride, args.x.dtype, nullptr, 1}, args.weight, args.x.rows};
  const Cut c = cut(problem);
  gemm(
      pool, &problem, 1, c.count(), [&](int64_t i) { return block_at(problem, c, 0, i); },
      [&](const Block&, int64_t row, int count, int64_t panel, const float* sums) {
        finish_linear(args, row, count, panel, sums);
      });
}

}  // namespace pagelens::PAGELENS_ISA
