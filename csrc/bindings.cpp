// The module pagelens._native: only the files of bindings know Python. Tensors come as addresses, sizes and strides
// that engine/ops/native.py has checked; the GIL is released while a kernel runs.
#include "bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <chrono>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "common/cpu_features.h"
#include "common/pack.h"
#include "common/thread_pool.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace pagelens;

namespace {

// The calls of one decode step, to be made again without Python: same sizes, same addresses, other contents.
struct Program {
  using Calls = std::vector<std::function<int64_t()>>;
  ThreadPool* pool;
  std::shared_ptr<Calls> calls = std::make_shared<Calls>();
};

// What takes in the calls of this thread on one pool: nothing, once the program is gone.
struct Recorder {
  ThreadPool* pool = nullptr;
  std::weak_ptr<Program::Calls> calls;
};
thread_local Recorder recorder;

// Runs a kernel that returns -1 or a bad row, and records it if asked. `f` holds copies: it may outlive the call.
template <class F>
int64_t run_op(ThreadPool& pool, F f) {
  py::gil_scoped_release release;
  const auto held = pool.lock();
  if (recorder.pool == &pool)
    if (const auto calls = recorder.calls.lock()) calls->push_back(f);
  return f();
}

// Index of the first call that found something bad, the last that was made; -1: none did.
int64_t replay(Program& program) {
  py::gil_scoped_release release;
  const auto held = program.pool->lock();
  const Program::Calls& calls = *program.calls;
  for (size_t i = 0; i < calls.size(); i++)
    if (calls[i]() >= 0) return static_cast<int64_t>(i);
  return -1;
}

// What `replay` does; seconds of each call that was made.
std::vector<double> timed_replay(Program& program) {
  using Clock = std::chrono::steady_clock;
  py::gil_scoped_release release;
  const auto held = program.pool->lock();
  std::vector<double> seconds;
  seconds.reserve(program.calls->size());
  Clock::time_point before = Clock::now();
  for (const auto& call : *program.calls) {
    const bool good = call() < 0;
    const Clock::time_point after = Clock::now();
    seconds.push_back(std::chrono::duration<double>(after - std::exchange(before, after)).count());
    if (!good) break;
  }
  return seconds;
}

void bind_program(py::module_& m) {
  py::class_<Program>(m, "Program")
      .def(py::init([](ThreadPool& pool) { return Program{&pool}; }), py::keep_alive<1, 2>())
      .def("begin", [](Program& self) { recorder = {self.pool, self.calls}; })
      .def("end",
           [](Program& self) {
             if (recorder.calls.lock() == self.calls) recorder = {};
           })
      .def("replay", &replay)
      .def("timed_replay", &timed_replay)
      .def_property_readonly("num_calls", [](const Program& self) { return self.calls->size(); });
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
    return locked(pool, [&] { return kernels().sample(pool, args); });
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

// A plain read of the memory that products read, to set them beside.
template <class T>
void bind_read(py::module_& m) {
  m.def("read_weights", [](ThreadPool& pool, const T& weights) {
    const char* data = weights.memory->data();
    const int64_t bytes = static_cast<int64_t>(weights.memory->size());
    run_op(pool, [&pool, data, bytes] { return kernels().probe_read(pool, data, bytes), int64_t{-1}; });
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
  bind_read<Linear>(m);
  bind_read<Swiglu>(m);
}
