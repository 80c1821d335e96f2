// The module pagelens._native: only the files of bindings know Python. Tensors come as addresses, sizes and strides
// that engine/ops/native.py has checked; the GIL is released while a kernel runs.
#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <functional>
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

// The calls of one decode step, to be made again without Python: same sizes, same addresses, other contents.
struct Program {
  ThreadPool* pool;
  std::vector<std::function<int64_t()>> calls;
};
thread_local Program* recording = nullptr;  // takes in the calls of this thread

// Runs a kernel that returns -1 or a bad row, and records it if asked. `f` holds copies: it may outlive the call.
template <class F>
int64_t run_op(ThreadPool& pool, F f) {
  py::gil_scoped_release release;
  const auto held = pool.lock();
  if (recording && recording->pool == &pool) recording->calls.push_back(f);
  return f();
}

// Index of the first call that found something bad, the last that was made; -1: none did.
int64_t replay(Program& program) {
  py::gil_scoped_release release;
  const auto held = program.pool->lock();
  for (size_t i = 0; i < program.calls.size(); i++)
    if (program.calls[i]() >= 0) return static_cast<int64_t>(i);
  return -1;
}

void bind_program(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init([](ThreadPool& pool) { return Program{&pool, {}}; }), py::keep_alive<1, 2>())
      .def("begin", [](Program& self) { recording = &self; })
      .def("end", [](Program&) { recording = nullptr; })
      .def("replay", &replay)
      .def_property_readonly("num_calls", [](const Program& self) { return self.calls.size(); });
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

// (n, k, dtype, has_bias, format, activation, scale_dtype, group_size, has_zeros, has_order, activation_group)
using Shape = std::tuple<int64_t, int64_t, int, bool, int, int, int, int64_t, bool, bool, int64_t>;

bool has_good_activation_group(const LinearShape& s) {
  if (s.activation_group == 0) return true;
  return s.activation_group % 8 == 0 && s.activation_group > 0 && s.activation_group <= kMaxActivationGroup &&
         s.activation == ActivationFormat::int8 && (s.format == Format::int4 || s.format == Format::int8) &&
         !s.has_zeros && !s.has_order && (s.group_size == s.activation_group || s.group_size >= s.k);
}

// Throws std::invalid_argument: a shape may come from a file.
LinearShape linear_shape(const Shape& s) {
  const auto [n, k, dtype, has_bias, format, activation, scale_dtype, group_size, has_zeros, has_order,
              activation_group] = s;
  constexpr int64_t kMost = int64_t{1} << 31;
  const bool good = n >= 0 && n < kMost && k >= 0 && k < kMost && (n == 0 || k < (int64_t{1} << 40) / n) &&
                    dtype >= 0 && dtype <= 1 && format >= 0 && format <= 3 && activation >= 0 && activation <= 2 &&
                    scale_dtype >= 0 && scale_dtype <= 2 && group_size >= 1 && group_size < kMost &&
                    (format == 0 || group_size % 8 == 0 || group_size >= k) &&
                    (format != 0 || (!has_zeros && !has_order && activation == 0));
  const LinearShape shape{n,
                          k,
                          static_cast<DType>(dtype),
                          has_bias,
                          static_cast<Format>(format),
                          static_cast<ActivationFormat>(activation),
                          static_cast<DType>(scale_dtype),
                          group_size,
                          has_zeros,
                          has_order,
                          activation_group};
  if (!good || !has_good_activation_group(shape))
    throw std::invalid_argument("a packed matrix has sizes or formats that no kernel has");
  return shape;
}

// The order of the inputs is followed without a check when rows are packed. Throws std::invalid_argument.
const PackedLinear& checked_order(const PackedLinear& packed) {
  if (packed.order)
    for (int64_t i = 0; i < packed.k; i++)
      if (packed.order[i] < 0 || packed.order[i] >= packed.k)
        throw std::invalid_argument("the order of the inputs names input " + std::to_string(packed.order[i]) + " of " +
                                    std::to_string(packed.k));
  return packed;
}

const PackedSwiglu& checked_order(const PackedSwiglu& packed) {
  checked_order(packed.gate_up);
  checked_order(packed.down);
  return packed;
}

// Addresses, 0 where there is none: (weight, scales, zeros) of one matrix, or of gate and up; their rows; order; bias
// and its dtype.
using Parts = std::array<Address, 3>;
using Content = std::tuple<Parts, Parts, int64_t, Address, Address, int>;

void fill(ThreadPool& pool, const PackedLinear& packed, const Content& content) {
  const auto& [first, second, rows, order, bias, bias_dtype] = content;
  const auto source = [&](int part) { return RowSource{at<void>(first[part]), at<void>(second[part]), rows}; };
  const DType type = static_cast<DType>(bias_dtype);
  if (packed.quantized()) {
    pack_quantized(pool, packed, source(0), source(1), source(2), at<int32_t>(order), at<void>(bias), type);
  } else {
    pack_plain(pool, packed, source(0), at<void>(bias), type);
  }
}

PackedSwiglu place_swiglu(const LinearShape& up, const LinearShape& down, char* memory) {
  return {place(up, memory), place(down, memory + packed_bytes(up)), down.k};
}

size_t swiglu_bytes(const LinearShape& up, const LinearShape& down) { return packed_bytes(up) + packed_bytes(down); }

LinearShape router_shape(int64_t experts, int64_t width) { return {experts, width, DType::f32}; }

// A layer of `count` experts: the router, then each expert's gate/up and down.
Moe place_moe(std::shared_ptr<WeightBuffer> memory, int64_t count, const LinearShape& up, const LinearShape& down,
              std::optional<Swiglu> shared) {
  Moe moe;
  moe.memory = std::move(memory);
  moe.shared = std::move(shared);
  char* to = moe.memory->data();
  moe.router = place(router_shape(count, up.k), to);
  to += packed_bytes(router_shape(count, up.k));
  for (int64_t e = 0; e < count; e++, to += swiglu_bytes(up, down)) moe.experts.push_back(place_swiglu(up, down, to));
  return moe;
}

size_t moe_bytes(int64_t count, const LinearShape& up, const LinearShape& down) {
  return packed_bytes(router_shape(count, up.k)) + static_cast<size_t>(count) * swiglu_bytes(up, down);
}

// Memory of a file that somebody keeps mapped. Throws std::invalid_argument.
std::shared_ptr<WeightBuffer> mapped(Address address, size_t bytes, size_t needed) {
  if (bytes != needed || address % 64)
    throw std::invalid_argument("packed weights have " + std::to_string(bytes) + " bytes at an address of " +
                                std::to_string(address % 64) + " modulo 64; needed are " + std::to_string(needed) +
                                " bytes at a multiple of 64");
  return std::make_shared<WeightBuffer>(at<char>(address), bytes);
}

template <class T>
void bind_address(py::class_<T>& type) {
  type.def_property_readonly("num_bytes", [](const T& self) { return self.memory->size(); });
  type.def_property_readonly(
      "address", [](const T& self) { return reinterpret_cast<Address>(self.memory->data()); },
      "Of the packed memory, num_bytes long: what map_* takes.");
}

void bind_packing(py::module_& m) {
  py::class_<Linear> linear(m, "Linear");
  py::class_<Swiglu> swiglu(m, "Swiglu");
  py::class_<Moe> moe(m, "Moe");
  bind_address(linear);
  bind_address(swiglu);
  bind_address(moe);
  m.def("pack_linear", [](ThreadPool& pool, const Shape& shape, const Content& content) {
    const LinearShape s = linear_shape(shape);
    return locked(pool, [&] {
      auto memory = std::make_shared<WeightBuffer>(packed_bytes(s));
      const PackedLinear packed = place(s, memory->data());
      fill(pool, packed, content);
      return Linear{memory, packed};
    });
  });
  m.def("pack_swiglu",
        [](ThreadPool& pool, const Shape& up, const Content& gate_up, const Shape& down, const Content& content) {
          const LinearShape u = linear_shape(up), d = linear_shape(down);
          return locked(pool, [&] {
            auto memory = std::make_shared<WeightBuffer>(swiglu_bytes(u, d));
            const PackedSwiglu packed = place_swiglu(u, d, memory->data());
            fill(pool, packed.gate_up, gate_up);
            fill(pool, packed.down, content);
            return Swiglu{memory, packed};
          });
        });
  m.def("new_moe", [](ThreadPool& pool, Address router, int64_t count, const Shape& up, const Shape& down,
                      std::optional<Swiglu> shared) {
    const LinearShape u = linear_shape(up), d = linear_shape(down);
    return locked(pool, [&] {
      Moe layer = place_moe(std::make_shared<WeightBuffer>(moe_bytes(count, u, d)), count, u, d, std::move(shared));
      fill(pool, layer.router, {{router, 0, 0}, {0, 0, 0}, count, 0, 0, 0});
      return layer;
    });
  });
  m.def("fill_expert", [](ThreadPool& pool, Moe& layer, int64_t e, const Content& gate_up, const Content& down) {
    const PackedSwiglu& expert = layer.experts.at(static_cast<size_t>(e));
    locked(pool, [&] {
      fill(pool, expert.gate_up, gate_up);
      fill(pool, expert.down, down);
    });
  });
  m.def("quantize", [](ThreadPool& pool, const Matrix& weight, int format, Address values, Address scales) {
    const QuantizeArgs args{rows(weight), static_cast<Format>(format), at<int8_t>(values), at<void>(scales)};
    return locked(pool, [&] { return kernels().quantize(pool, args); });
  });
  m.def("map_linear", [](const Shape& shape, Address address, size_t bytes) {
    const LinearShape s = linear_shape(shape);
    auto memory = mapped(address, bytes, packed_bytes(s));
    return Linear{memory, checked_order(place(s, memory->data()))};
  });
  m.def("map_swiglu", [](const Shape& up, const Shape& down, Address address, size_t bytes) {
    const LinearShape u = linear_shape(up), d = linear_shape(down);
    auto memory = mapped(address, bytes, swiglu_bytes(u, d));
    return Swiglu{memory, checked_order(place_swiglu(u, d, memory->data()))};
  });
  m.def("map_moe", [](int64_t count, const Shape& up, const Shape& down, std::optional<Swiglu> shared, Address address,
                      size_t bytes) {
    const LinearShape u = linear_shape(up), d = linear_shape(down);
    if (count < 1 || count > 65536) throw std::invalid_argument(std::to_string(count) + " experts");
    Moe layer = place_moe(mapped(address, bytes, moe_bytes(count, u, d)), count, u, d, std::move(shared));
    for (const PackedSwiglu& expert : layer.experts) checked_order(expert);
    return layer;
  });
}

void bind_rows(py::module_& m) {
  m.def("embedding", [](ThreadPool& pool, Address ids, const Matrix& table, const Matrix& out) {
    const EmbeddingArgs args{at<int32_t>(ids), rows(table), rows(out)};
    return run_op(pool, [&pool, args] { return kernels().embedding(pool, args); });
  });
  m.def("rms_norm", [](ThreadPool& pool, const Matrix& x, Address weight, float eps, const Matrix& out) {
    const NormArgs args{rows(x), rows(out), at<void>(weight), nullptr, eps};
    run_op(pool, [&pool, args] { return kernels().rms_norm(pool, args), int64_t{-1}; });
  });
  m.def("layer_norm",
        [](ThreadPool& pool, const Matrix& x, Address weight, Address bias, float eps, const Matrix& out) {
          const NormArgs args{rows(x), rows(out), at<void>(weight), at<void>(bias), eps};
          run_op(pool, [&pool, args] { return kernels().layer_norm(pool, args), int64_t{-1}; });
        });
}

// A layer of the KV-cache: (keys, values, key scales, value scales, num_blocks, block_size, num_kv_heads, head_dim);
// the scales are 0 unless it is an int8 cache.
using Cache = std::tuple<Address, Address, Address, Address, int64_t, int64_t, int64_t, int64_t>;

void bind_sample(py::module_& m) {
  m.def("sample", [](ThreadPool& pool, const Matrix& logits, Address cuts, Address tokens) {
    const SampleArgs args{rows(logits), at<SampleCut>(cuts), at<int32_t>(tokens)};
    locked(pool, [&] { kernels().sample(pool, args); });
  });
}

void bind_attention(py::module_& m) {
  m.def("qk_norm_rope_store", [](ThreadPool& pool, const Matrix& qkv, Address positions, Address slots, Address cos,
                                 Address sin, int64_t num_positions, const Cache& cache, int64_t num_heads,
                                 Address q_norm, Address k_norm, float eps, const Matrix& out) {
    const auto [keys, values, key_scales, value_scales, num_blocks, block_size, num_kv_heads, head_dim] = cache;
    const RopeArgs args{rows(qkv),
                        at<int32_t>(positions),
                        at<int32_t>(slots),
                        at<float>(cos),
                        at<float>(sin),
                        num_positions,
                        at<void>(keys),
                        at<void>(values),
                        at<float>(key_scales),
                        at<float>(value_scales),
                        num_blocks,
                        block_size,
                        num_heads,
                        num_kv_heads,
                        head_dim,
                        at<void>(q_norm),
                        at<void>(k_norm),
                        eps,
                        rows(out)};
    return run_op(pool, [&pool, args] { return kernels().qk_norm_rope_store(pool, args); });
  });
  m.def("paged_attention", [](ThreadPool& pool, const Matrix& q, const Cache& cache, int64_t num_heads,
                              Address block_tables, int64_t max_blocks, Address query_starts, Address context_lens,
                              int64_t num_sequences, float scale, const Matrix& out) {
    const auto [keys, values, key_scales, value_scales, num_blocks, block_size, num_kv_heads, head_dim] = cache;
    const AttentionArgs args{rows(q),
                             rows(out),
                             at<void>(keys),
                             at<void>(values),
                             at<float>(key_scales),
                             at<float>(value_scales),
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
    return run_op(pool, [&pool, args] { return kernels().paged_attention(pool, args); });
  });
}

void bind_window_attention(py::module_& m) {
  m.def("window_attention", [](ThreadPool& pool, const Matrix& qkv, int64_t batch, int64_t grid_rows, int64_t grid_cols,
                               int64_t window_rows, int64_t window_cols, int64_t num_heads, int64_t head_dim,
                               Address pad, Address rel_h, Address rel_w, const Matrix& out) {
    const WindowAttentionArgs args{rows(qkv),   rows(out), batch,    grid_rows,     grid_cols,        window_rows,
                                   window_cols, num_heads, head_dim, at<void>(pad), at<float>(rel_h), at<float>(rel_w)};
    locked(pool, [&] { kernels().window_attention(pool, args); });
  });
}

void bind_convolutions(py::module_& m) {
  m.def("patch_embed", [](ThreadPool& pool, Address pixels, int64_t batch, int64_t channels, int64_t height,
                          int64_t width, int64_t patch, const Linear& weight, const Matrix& out) {
    const PatchEmbedArgs args{at<void>(pixels), batch, channels, height, width, patch, weight.packed, rows(out)};
    locked(pool, [&] { kernels().patch_embed(pool, args); });
  });
  m.def("conv_downsample", [](ThreadPool& pool, const Matrix& x, int64_t batch, int64_t grid, const Linear& conv1,
                              const Linear& conv2, const Linear& down1, const Linear& down2,
                              const std::array<Address, 4>& norms, float eps, const Matrix& out) {
    const PackedNeck neck{conv1.packed,        conv2.packed,        down1.packed,        down2.packed,
                          at<float>(norms[0]), at<float>(norms[1]), at<float>(norms[2]), at<float>(norms[3])};
    const ConvDownsampleArgs args{rows(x), batch, grid, neck, eps, rows(out)};
    locked(pool, [&] { kernels().conv_downsample(pool, args); });
  });
}

void bind_products(py::module_& m) {
  m.def("linear", [](ThreadPool& pool, const Matrix& x, const Linear& weight, int activation, const Matrix& residual,
                     const Matrix& out) {
    const LinearArgs args{rows(x), weight.packed, static_cast<Activation>(activation), rows(residual), rows(out)};
    run_op(pool, [&pool, args] { return kernels().linear(pool, args), int64_t{-1}; });
  });
  m.def("swiglu_ffn",
        [](ThreadPool& pool, const Matrix& x, const Swiglu& ffn, const Matrix& residual, const Matrix& out) {
          const SwigluArgs args{rows(x), ffn.packed, rows(residual), rows(out)};
          run_op(pool, [&pool, args] { return kernels().swiglu_ffn(pool, args), int64_t{-1}; });
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
    run_op(pool, [&pool, args] { return kernels().moe_ffn(pool, args), int64_t{-1}; });
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
  bind_program(m);
  bind_packing(m);
  bind_rows(m);
  bind_sample(m);
  bind_attention(m);
  bind_products(m);
  bind_window_attention(m);
  bind_convolutions(m);
  bind_memory(m);
  bind_probe(m);
}
