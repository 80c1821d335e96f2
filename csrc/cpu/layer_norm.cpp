#include "cpu/layer_norm.h"

#include "cpu/parallel.h"

namespace pagelens::PAGELENS_ISA {
namespace {

template <class T>
void run(ThreadPool& pool, const NormArgs& a) {
  for_rows(pool, a.x.rows, a.x.cols, [&](int64_t row) {
    layer_norm_row(static_cast<const T*>(a.x.data) + row * a.x.stride, static_cast<const T*>(a.weight),
                   static_cast<const T*>(a.bias), static_cast<T*>(a.out.data) + row * a.out.stride, a.x.cols, a.eps);
  });
}

}  // namespace

void layer_norm(ThreadPool& pool, const NormArgs& args) {
  args.x.dtype == DType::f32 ? run<float>(pool, args) : run<bf16>(pool, args);
}

}  // namespace pagelens::PAGELENS_ISA
