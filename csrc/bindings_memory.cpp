// Packed weights of a file in memory of their own.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "bindings.h"
#include "common/pack.h"

namespace py = pybind11;

namespace pagelens {
namespace {

struct CopiedWeights {
  std::shared_ptr<WeightBuffer> memory;
};

CopiedWeights copy_weights(ThreadPool& pool, uint64_t address, size_t num_bytes) {
  constexpr size_t kPiece = size_t{2} << 20;  // a huge page
  const char* from = reinterpret_cast<const char*>(address);
  return locked(pool, [&] {
    CopiedWeights copy{std::make_shared<WeightBuffer>(num_bytes)};
    char* to = copy.memory->data();
    pool.run(static_cast<int64_t>((num_bytes + kPiece - 1) / kPiece), [&](int64_t i, int) {
      const size_t at = static_cast<size_t>(i) * kPiece;
      std::memcpy(to + at, from + at, std::min(kPiece, num_bytes - at));
    });
    return copy;
  });
}

}  // namespace

void bind_memory(py::module_& m) {
  py::class_<CopiedWeights>(m, "CopiedWeights")
      .def_property_readonly("address",
                             [](const CopiedWeights& self) { return reinterpret_cast<uint64_t>(self.memory->data()); })
      .def_property_readonly("num_bytes", [](const CopiedWeights& self) { return self.memory->size(); });
  m.def("copy_weights", &copy_weights);
}

}  // namespace pagelens
