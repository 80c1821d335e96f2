// The module pagelens._native: the only file that knows Python. Tensors come as addresses, sizes and strides that
// engine/ops/native.py has checked; the GIL is released while a kernel runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "common/cpu_features.h"
#include "common/pack.h"
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
  py::gil_scoped_release release;
  kernels().resize_rgb_u8(from, src_h, src_w, to, dst_h, dst_w);
  return dst;
}

// Leaked on purpose: it must outlive the interpreter's last use of this module.
py::object& closed_error() {
  static py::object* type = new py::object(py::reinterpret_borrow<py::object>(PyExc_RuntimeError));
  return *type;
}

// Packed weights own their memory and keep it while a Python object names them.
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

// (address of weight, address of bias or 0, dtype of bias)
Linear make_linear(ThreadPool& pool, Address weight, Address bias, int bias_dtype, int64_t n, int64_t k, int dtype) {
  const DType type = static_cast<DType>(dtype);
  return locked(pool, [&] {
    auto memory = std::make_shared<WeightBuffer>(packed_bytes(n, k, type, bias != 0));
    const PackedLinear packed =
        pack_linear(pool, at<void>(weight), at<void>(bias), static_cast<DType>(bias_dtype), n, k, type, memory->data());
    return Linear{memory, packed};
  });
}

size_t swiglu_bytes(int64_t inner, int64_t k, DType dtype) {
  return packed_bytes((inner + 15) / 16 * 32, k, dtype, false) + packed_bytes(k, inner, dtype, false);
}

PackedSwiglu fill_swiglu(ThreadPool& pool, Address gate, Address up, Address down, int64_t inner, int64_t k,
                         DType dtype, char* to) {
  PackedSwiglu packed;
  packed.inner = inner;
  packed.gate_up = pack_gate_up(pool, at<void>(gate), at<void>(up), inner, k, dtype, to);
  to += packed_bytes(packed.gate_up.n, k, dtype, false);
  packed.down = pack_linear(pool, at<void>(down), nullptr, dtype, k, inner, dtype, to);
  return packed;
}

Swiglu make_swiglu(ThreadPool& pool, Address gate, Address up, Address down, int64_t inner, int64_t k, int dtype) {
  const DType type = static_cast<DType>(dtype);
  return locked(pool, [&] {
    auto memory = std::make_shared<WeightBuffer>(swiglu_bytes(inner, k, type));
    return Swiglu{memory, fill_swiglu(pool, gate, up, down, inner, k, type, memory->data())};
  });
}

// The router is float32; experts: (gate, up, down) addresses, all of one size, in one piece of memory.
Moe make_moe(ThreadPool& pool, Address router, const std::vector<std::array<Address, 3>>& experts,
             std::optional<Swiglu> shared, int64_t inner, int64_t k, int dtype) {
  const DType type = static_cast<DType>(dtype);
  return locked(pool, [&] {
    const int64_t count = static_cast<int64_t>(experts.size());
    const size_t router_bytes = packed_bytes(count, k, DType::f32, false), each = swiglu_bytes(inner, k, type);
    Moe moe;
    moe.memory = std::make_shared<WeightBuffer>(router_bytes + each * experts.size());
    moe.shared = std::move(shared);
    char* to = moe.memory->data();
    moe.router = pack_linear(pool, at<void>(router), nullptr, DType::f32, count, k, DType::f32, to);
    to += router_bytes;
    for (const auto& [gate, up, down] : experts) {
      moe.experts.push_back(fill_swiglu(pool, gate, up, down, inner, k, type, to));
      to += each;
    }
    return moe;
  });
}

void bind_packing(py::module_& m) {
  const auto bytes = [](const auto& self) { return self.memory->size(); };
  py::class_<Linear>(m, "Linear").def_property_readonly("num_bytes", [bytes](const Linear& l) { return bytes(l); });
  py::class_<Swiglu>(m, "Swiglu").def_property_readonly("num_bytes", [bytes](const Swiglu& s) { return bytes(s); });
  py::class_<Moe>(m, "Moe").def_property_readonly("num_bytes", [bytes](const Moe& e) { return bytes(e); });
  m.def("pack_linear", &make_linear);
  m.def("pack_swiglu", &make_swiglu);
  m.def("pack_moe", &make_moe);
}

void bind_rows(py::module_& m) {
  m.def("embedding", [](ThreadPool& pool, Address ids, const Matrix& table, const Matrix& out) {
    const EmbeddingArgs args{at<int32_t>(ids), rows(table), rows(out)};
    return locked(pool, [&] { return kernels().embedding(pool, args); });
  });
  m.def("rms_norm", [](ThreadPool& pool, const Matrix& x, Address weight, float eps, const Matrix& out) {
    const NormArgs args{rows(x), rows(out), at<void>(weight), nullptr, eps};
    locked(pool, [&] { kernels().rms_norm(pool, args); });
  });
  m.def("layer_norm",
        [](ThreadPool& pool, const Matrix& x, Address weight, Address bias, float eps, const Matrix& out) {
          const NormArgs args{rows(x), rows(out), at<void>(weight), at<void>(bias), eps};
          locked(pool, [&] { kernels().layer_norm(pool, args); });
        });
}

void bind_attention(py::module_& m) {
  m.def("qk_norm_rope_store",
        [](ThreadPool& pool, const Matrix& qkv, Address positions, Address slots, Address cos, Address sin,
           int64_t num_positions, Address keys, Address values, int64_t num_slots, int64_t num_heads,
           int64_t num_kv_heads, int64_t head_dim, Address q_norm, Address k_norm, float eps, const Matrix& out) {
          const RopeArgs args{rows(qkv),        at<int32_t>(positions), at<int32_t>(slots),
                              at<float>(cos),   at<float>(sin),         num_positions,
                              at<void>(keys),   at<void>(values),       num_slots,
                              num_heads,        num_kv_heads,           head_dim,
                              at<void>(q_norm), at<void>(k_norm),       eps,
                              rows(out)};
          return locked(pool, [&] { return kernels().qk_norm_rope_store(pool, args); });
        });
  m.def("paged_attention",
        [](ThreadPool& pool, const Matrix& q, Address keys, Address values, int64_t num_blocks, int64_t block_size,
           int64_t num_heads, int64_t num_kv_heads, int64_t head_dim, Address block_tables, int64_t max_blocks,
           Address query_starts, Address context_lens, int64_t num_sequences, float scale, const Matrix& out) {
          const AttentionArgs args{rows(q),
                                   rows(out),
                                   at<void>(keys),
                                   at<void>(values),
                                   num_blocks,
                                   block_size,
                                   num_heads,
                                   num_kv_heads,
                                   head_dim,
                                   at<int32_t>(block_tables),
                                   max_blocks,
                                   at<int32_t>(query_starts),
                                   at<int32_t>(context_lens),
                                   num_sequences,
                                   scale};
          return locked(pool, [&] { return kernels().paged_attention(pool, args); });
        });
}

void bind_products(py::module_& m) {
  m.def("linear", [](ThreadPool& pool, const Matrix& x, const Linear& weight, int activation, const Matrix& residual,
                     const Matrix& out) {
    const LinearArgs args{rows(x), weight.packed, static_cast<Activation>(activation), rows(residual), rows(out)};
    locked(pool, [&] { kernels().linear(pool, args); });
  });
  m.def("swiglu_ffn",
        [](ThreadPool& pool, const Matrix& x, const Swiglu& ffn, const Matrix& residual, const Matrix& out) {
          const SwigluArgs args{rows(x), ffn.packed, rows(residual), rows(out)};
          locked(pool, [&] { kernels().swiglu_ffn(pool, args); });
        });
  m.def("moe_routing", [](ThreadPool& pool, const Matrix& logits, int64_t top_k, bool renormalize, float scale,
                          Address expert_ids, Address weights, Address offsets, Address permutation) {
    const RoutingArgs args{rows(logits),
                           top_k,
                           renormalize,
                           scale,
                           at<int32_t>(expert_ids),
                           at<float>(weights),
                           at<int32_t>(offsets),
                           at<int32_t>(permutation)};
    locked(pool, [&] { kernels().moe_routing(pool, args); });
  });
  m.def("grouped_gemm", [](ThreadPool& pool, const Matrix& x, const Moe& moe, int64_t top_k, Address expert_ids,
                           Address offsets, Address permutation, Address weights, const Matrix& out) {
    const GroupedArgs args{rows(x),
                           moe.packed(),
                           top_k,
                           at<int32_t>(expert_ids),
                           at<int32_t>(offsets),
                           at<int32_t>(permutation),
                           at<float>(weights),
                           false,
                           {},
                           rows(out)};
    return locked(pool, [&] { return kernels().grouped_gemm(pool, args); });
  });
  m.def("moe_ffn", [](ThreadPool& pool, const Matrix& x, const Moe& moe, int64_t top_k, bool renormalize, float scale,
                      const Matrix& residual, const Matrix& out) {
    const MoeArgs args{rows(x), moe.packed(), top_k, renormalize, scale, rows(residual), rows(out)};
    locked(pool, [&] { kernels().moe_ffn(pool, args); });
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "C++ kernels of pagelens. Not a public interface: use pagelens.ops.";
  m.def("isa", &isa, "The instruction set in use; chosen on first use, PAGELENS_CPU_ISA forces one.");
  m.def("compiled_isas", &compiled_isas);
  m.def("supported_isas", &supported_isas);
  m.def("set_isa", &set_isa, py::arg("name"), "Use another instruction set from now on (for tests).");

  m.def(
      "set_closed_error", [](py::object type) { closed_error() = std::move(type); },
      "The exception type of a pool that was closed or made before a fork (RuntimeError until this is called).");
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const PoolClosed& error) {
      PyErr_SetString(closed_error().ptr(), error.what());
    }
  });
  py::class_<ThreadPool>(m, "ThreadPool")
      .def(py::init<int>(), py::arg("num_threads"))
      .def_property_readonly("num_threads", &ThreadPool::num_threads)
      .def_property_readonly("scratch_bytes", &ThreadPool::scratch_bytes)
      .def("close", &ThreadPool::close, py::call_guard<py::gil_scoped_release>());

  m.def("resize_rgb_u8", &resize_rgb_u8, py::arg("src").noconvert(), py::arg("dst_h"), py::arg("dst_w"));
  bind_packing(m);
  bind_rows(m);
  bind_attention(m);
  bind_products(m);
}
