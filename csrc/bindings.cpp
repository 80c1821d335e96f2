// The module pagelens._native: the only file that knows Python. Tensors come as addresses, sizes and strides that
// engine/ops/native.py has checked; the GIL is released while a kernel runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu_features.h"
#include "common/thread_pool.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace pagelens;

namespace {

using Address = uint64_t;  // of a tensor's first element

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (address, rows, cols, row stride in elements, dtype)
using Matrix = std::tuple<Address, int64_t, int64_t, int64_t, int>;

Rows rows(const Matrix& m) {
  return {at<void>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), std::get<3>(m), static_cast<DType>(std::get<4>(m))};
}

// Runs a kernel with the pool locked. The GIL goes first: a thread that waits for the pool must not hold it.
template <class F>
auto locked(ThreadPool& pool, F&& f) {
  py::gil_scoped_release release;
  const auto held = pool.lock();
  return f();
}

using Image = py::array_t<uint8_t, py::array::c_style>;

Image resize_rgb_u8(const Image& src, int64_t dst_h, int64_t dst_w) {
  if (src.ndim() != 3 || src.shape(2) != 3 || src.shape(0) < 1 || src.shape(1) < 1)
    throw std::invalid_argument(
        "resize_rgb_u8 needs a contiguous uint8 array [height, width, 3] with at least one pixel");
  if (dst_h < 1 || dst_w < 1 || dst_h > 65535 || dst_w > 65535 || src.shape(0) > 65535 || src.shape(1) > 65535)
    throw std::invalid_argument("resize_rgb_u8: heights and widths must be between 1 and 65535, got " +
                                std::to_string(src.shape(0)) + " x " + std::to_string(src.shape(1)) + " -> " +
                                std::to_string(dst_h) + " x " + std::to_string(dst_w));
  Image dst({dst_h, dst_w, static_cast<int64_t>(3)});
  const uint8_t* from = src.data();
  uint8_t* to = dst.mutable_data();
  const int64_t src_h = src.shape(0), src_w = src.shape(1);
  const KernelTable& table = kernels();
  py::gil_scoped_release release;
  table.resize_rgb_u8(from, src_h, src_w, to, dst_h, dst_w);
  return dst;
}

void bind_norms(py::module_& m) {
  m.def("rms_norm", [](ThreadPool& pool, const Matrix& x, Address weight, float eps, const Matrix& out) {
    const NormArgs args{rows(x), rows(out), at<void>(weight), nullptr, eps};
    const KernelTable& table = kernels();
    locked(pool, [&] { table.rms_norm(pool, args); });
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of pagelens. Not a public interface: use pagelens.ops.";
  m.def("isa", &isa, "The instruction set in use; chosen on first use, PAGELENS_CPU_ISA forces one.");
  m.def("compiled_isas", &compiled_isas);
  m.def("supported_isas", &supported_isas);
  m.def("set_isa", &set_isa, py::arg("name"), "Use another instruction set from now on (for tests).");

  py::class_<ThreadPool>(m, "ThreadPool")
      .def(py::init<int>(), py::arg("num_threads"))
      .def_property_readonly("num_threads", &ThreadPool::num_threads)
      .def_property_readonly("scratch_bytes", &ThreadPool::scratch_bytes)
      .def("close", &ThreadPool::close, py::call_guard<py::gil_scoped_release>());

  m.def("resize_rgb_u8", &resize_rgb_u8, py::arg("src").noconvert(), py::arg("dst_h"), py::arg("dst_w"));
  bind_norms(m);
}
