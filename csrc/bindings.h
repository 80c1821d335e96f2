// What the files of bindings share. Each of them adds its functions to the module pagelens._native.
#pragma once
#include <pybind11/pybind11.h>

#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/pack.h"
#include "common/thread_pool.h"
#include "cpu/kernels.h"

namespace pagelens {

using Address = uint64_t;  // of a tensor's first element

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (address, rows, cols, row stride in elements, dtype)
using Matrix = std::tuple<Address, int64_t, int64_t, int64_t, int>;

inline Rows rows(const Matrix& m) {
  return {at<void>(std::get<0>(m)), std::get<1>(m), std::get<2>(m), std::get<3>(m), static_cast<DType>(std::get<4>(m))};
}

// Packed weights own their memory and keep it while a Python object names them (mapped ones: see `map_*`).
struct Linear {
  std::shared_ptr<WeightBuffer> memory;
  PackedLinear packed;
};

struct Swiglu {
  std::shared_ptr<WeightBuffer> memory;
  PackedSwiglu packed;
};

struct Moe {
  std::shared_ptr<WeightBuffer> memory;
  std::vector<PackedSwiglu> experts;
  std::optional<Swiglu> shared;
  PackedLinear router;

  PackedMoe packed() const {
    return {router, experts.data(), static_cast<int64_t>(experts.size()), shared ? &shared->packed : nullptr};
  }
};

void bind_memory(pybind11::module_& m);
void bind_packing(pybind11::module_& m);
void bind_probe(pybind11::module_& m);

// Runs a kernel with the pool locked. The GIL goes first: a thread that waits for the pool must not hold it.
template <class F>
auto locked(ThreadPool& pool, F&& f) {
  pybind11::gil_scoped_release release;
  const auto held = pool.lock();
  return f();
}

}  // namespace pagelens
