// Probes of the machine's limits: what memory and arithmetic give right now, to set a kernel's speed beside.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <string>
#include <vector>

#include "bindings.h"
#include "common/cpu_features.h"
#include "common/pack.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace pagelens {
namespace {

double seconds_of_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void check_repeats(int64_t repeats) {
  if (repeats < 1 || repeats > 10000)
    throw std::invalid_argument("repeats must be between 1 and 10000, got " + std::to_string(repeats));
}

std::vector<double> probe_bandwidth(ThreadPool& pool, int64_t num_bytes, int64_t repeats) {
  constexpr int64_t kPiece = int64_t{1} << 20;  // num_bytes is rounded up to whole pieces
  check_repeats(repeats);
  if (num_bytes < kPiece || num_bytes > int64_t{1} << 40)
    throw std::invalid_argument("num_bytes must be between 2^20 and 2^40, got " + std::to_string(num_bytes));
  const int64_t pieces = (num_bytes + kPiece - 1) / kPiece;
  return locked(pool, [&] {
    const WeightBuffer memory(static_cast<size_t>(pieces * kPiece));
    // Each thread makes the pages that it will read: with several memory nodes they then lie on its own.
    pool.run(pieces, [&](int64_t i, int) { std::memset(memory.data() + i * kPiece, 1, static_cast<size_t>(kPiece)); });
    std::vector<double> rates;
    for (int64_t i = 0; i < repeats; i++) {
      const double started = seconds_of_now();
      kernels().probe_read(pool, memory.data(), pieces * kPiece);
      rates.push_back(static_cast<double>(pieces * kPiece) / (seconds_of_now() - started));
    }
    return rates;
  });
}

std::vector<double> probe_flops(ThreadPool& pool, const std::string& kind, double seconds, int64_t repeats) {
  const std::vector<std::string> kinds = {"float32", "bfloat16", "int8"};
  size_t which = 0;
  while (which < kinds.size() && kinds[which] != kind) which++;
  if (which == kinds.size()) throw std::invalid_argument("kind must be float32, bfloat16 or int8, got '" + kind + "'");
  if (!(seconds > 0.0 && seconds <= 60.0))
    throw std::invalid_argument("seconds must be above 0 and at most 60, got " + std::to_string(seconds));
  check_repeats(repeats);
  const ProbeKind probe = static_cast<ProbeKind>(which);
  return locked(pool, [&] {
    int64_t rounds = 1;
    double took = 0.0;
    while (took < 0.01 && rounds < int64_t{1} << 40) {  // how many rounds are long enough to be timed
      rounds *= 4;
      const double started = seconds_of_now();
      kernels().probe_arithmetic(pool, probe, rounds);
      took = seconds_of_now() - started;
    }
    const int64_t wanted = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(rounds) * seconds / took));
    std::vector<double> rates;
    for (int64_t i = 0; i < repeats; i++) {
      const double started = seconds_of_now();
      const double done = kernels().probe_arithmetic(pool, probe, wanted);
      rates.push_back(done / (seconds_of_now() - started));
    }
    return rates;
  });
}

}  // namespace

void bind_probe(py::module_& m) {
  m.def("probe_bandwidth", &probe_bandwidth, py::arg("pool"), py::arg("num_bytes") = int64_t{1} << 30,
        py::arg("repeats") = 3);
  m.def("probe_flops", &probe_flops, py::arg("pool"), py::arg("kind"), py::arg("seconds") = 0.1,
        py::arg("repeats") = 3);
}

}  // namespace pagelens
