// What the files of bindings share. Each of them adds its functions to the module pagelens._native.
#pragma once
#include <pybind11/pybind11.h>

#include <utility>

#include "common/thread_pool.h"

namespace pagelens {

void bind_memory(pybind11::module_& m);
void bind_probe(pybind11::module_& m);

// Runs a kernel with the pool locked. The GIL goes first: a thread that waits for the pool must not hold it.
template <class F>
auto locked(ThreadPool& pool, F&& f) {
  pybind11::gil_scoped_release release;
  const auto held = pool.lock();
  return f();
}

}  // namespace pagelens
