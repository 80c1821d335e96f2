#include "cpu/linear.h"

namespace pagelens::PAGELENS_ISA {

void linear(ThreadPool& pool, const LinearArgs& args) {
  linear_of(pool, {args.x.data, args.x.stride, args.x.dtype}, args);
}

}  // namespace pagelens::PAGELENS_ISA
