// pagelens._cuda (nvcc) and pagelens._cuda_sim (g++, csrc/simt): the same functions over the same kernels. Tensors come
// as addresses that engine/ops/cuda.py has checked; errors of a launch become RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/kernels.h"
#ifndef PAGELENS_CUDA
  #include "simt/runtime.h"
#endif

namespace py = pybind11;
using namespace pagelens::cuda;

namespace {

using Address = uint64_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Stream stream_of(Address stream) { return at<void>(stream); }

void bind_routing(py::module_& m) {
  m.def(
      "moe_routing",
      [](Address logits, int tokens, int experts, int top_k, bool renormalize, float scale, Address expert_ids,
         Address weights, Address offsets, Address permutation, Address stream) {
        moe_routing({at<const float>(logits), tokens, experts, top_k, renormalize, scale, at<int32_t>(expert_ids),
                     at<float>(weights), at<int32_t>(offsets), at<int32_t>(permutation)},
                    stream_of(stream));
      },
      py::arg("logits"), py::arg("tokens"), py::arg("experts"), py::arg("top_k"), py::arg("renormalize"),
      py::arg("scale"), py::arg("expert_ids"), py::arg("weights"), py::arg("offsets"), py::arg("permutation"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

void bind_rope(py::module_& m) {
  m.def(
      "qk_norm_rope_store",
      [](Address qkv, int64_t qkv_stride, int tokens, int heads, int kv_heads, int head_dim, int num_positions,
         int num_slots, Address positions, Address slots, Address cos, Address sin, Address q_norm, Address k_norm,
         float eps, Address keys, Address values, Address out, Address stream) {
        qk_norm_rope_store(
            {at<const bf16>(qkv), qkv_stride, tokens, heads, kv_heads, head_dim, num_positions, num_slots,
             at<const int32_t>(positions), at<const int32_t>(slots), at<const float>(cos), at<const float>(sin),
             at<const bf16>(q_norm), at<const bf16>(k_norm), eps, at<bf16>(keys), at<bf16>(values), at<bf16>(out)},
            stream_of(stream));
      },
      py::arg("qkv"), py::arg("qkv_stride"), py::arg("tokens"), py::arg("heads"), py::arg("kv_heads"),
      py::arg("head_dim"), py::arg("num_positions"), py::arg("num_slots"), py::arg("positions"), py::arg("slots"),
      py::arg("cos"), py::arg("sin"), py::arg("q_norm"), py::arg("k_norm"), py::arg("eps"), py::arg("keys"),
      py::arg("values"), py::arg("out"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

void bind_attention(py::module_& m) {
  py::class_<PagedAttentionArgs>(m, "PagedAttentionArgs", py::module_local())
      .def(py::init([](Address q, Address keys, Address values, int heads, int kv_heads, int head_dim, int block_size,
                       Address block_tables, Address query_starts, Address context_lens, int sequences, int table_width,
                       int tokens, int longest_context, float scale, Address out) {
             return PagedAttentionArgs{at<const bf16>(q),
                                       at<const bf16>(keys),
                                       at<const bf16>(values),
                                       heads,
                                       kv_heads,
                                       head_dim,
                                       block_size,
                                       at<const int32_t>(block_tables),
                                       at<const int32_t>(query_starts),
                                       at<const int32_t>(context_lens),
                                       sequences,
                                       table_width,
                                       tokens,
                                       longest_context,
                                       scale,
                                       nullptr,
                                       at<bf16>(out)};
           }),
           py::arg("q"), py::arg("keys"), py::arg("values"), py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"),
           py::arg("block_size"), py::arg("block_tables"), py::arg("query_starts"), py::arg("context_lens"),
           py::arg("sequences"), py::arg("table_width"), py::arg("tokens"), py::arg("longest_context"),
           py::arg("scale"), py::arg("out"));
  m.def("paged_attention_scratch", &paged_attention_scratch, "Floats of scratch that paged_attention needs.");
  m.def(
      "paged_attention",
      [](PagedAttentionArgs args, Address scratch, Address stream) {
        args.partial = at<float>(scratch);
        paged_attention(args, stream_of(stream));
      },
      py::arg("args"), py::arg("scratch"), py::arg("stream"), py::call_guard<py::gil_scoped_release>());
}

void bind_window_attention(py::module_& m) {
  m.def(
      "window_attention",
      [](Address qkv, Address pad_qkv, Address rel_h_high, Address rel_h_low, Address rel_w_high, Address rel_w_low,
         int views, int grid, int size, int across, int heads, int head_dim, float scale, Address out, Address stream) {
        window_attention({at<const bf16>(qkv), at<const bf16>(pad_qkv), at<const bf16>(rel_h_high),
                          at<const bf16>(rel_h_low), at<const bf16>(rel_w_high), at<const bf16>(rel_w_low), views, grid,
                          size, across, heads, head_dim, scale, at<bf16>(out)},
                         stream_of(stream));
      },
      py::arg("qkv"), py::arg("pad_qkv"), py::arg("rel_h_high"), py::arg("rel_h_low"), py::arg("rel_w_high"),
      py::arg("rel_w_low"), py::arg("views"), py::arg("grid"), py::arg("size"), py::arg("across"), py::arg("heads"),
      py::arg("head_dim"), py::arg("scale"), py::arg("out"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
}

void bind_conv_downsample(py::module_& m) {
  m.def(
      "conv_downsample",
      [](Address x, int views, int side, int width, int neck, int down1, int down2, const std::vector<Address>& weights,
         float eps, Address sums, Address map, Address half_map, Address out, Address stream) {
        if (weights.size() != 8) throw py::value_error("conv_downsample takes 8 weights");
        const auto w = [&](int i) { return at<const bf16>(weights[i]); };
        py::gil_scoped_release release;
        conv_downsample({at<const bf16>(x),
                         views,
                         side,
                         width,
                         neck,
                         down1,
                         down2,
                         w(0),
                         w(1),
                         w(2),
                         w(3),
                         w(4),
                         w(5),
                         w(6),
                         w(7),
                         eps,
                         at<float>(sums),
                         at<bf16>(map),
                         at<bf16>(half_map),
                         at<bf16>(out)},
                        stream_of(stream));
      },
      py::arg("x"), py::arg("views"), py::arg("side"), py::arg("width"), py::arg("neck"), py::arg("down1"),
      py::arg("down2"), py::arg("weights"), py::arg("eps"), py::arg("sums"), py::arg("map"), py::arg("half_map"),
      py::arg("out"), py::arg("stream"));
}

WeightKind kind_of(const std::string& name) {
  if (name == "bfloat16") return WeightKind::bf16;
  if (name == "int8") return WeightKind::int8;
  if (name == "int4") return WeightKind::int4;
  throw py::value_error("grouped_gemm takes weights in bfloat16, int8 or int4, not " + name);
}

void bind_grouped_gemm(py::module_& m) {
  m.def(
      "grouped_gemm",
      [](Address x, int tokens, int width, int inner, int experts, int top_k, const std::string& kind, Address gate_up,
         Address down, Address gate_up_scales, Address down_scales, Address offsets, Address permutation,
         Address weights, Address hidden, Address parts, Address y, Address stream) {
        const WeightKind weight_kind = kind_of(kind);
        py::gil_scoped_release release;
        grouped_gemm({at<const bf16>(x), tokens, width, inner, experts, top_k, weight_kind, at<const void>(gate_up),
                      at<const void>(down), at<const float>(gate_up_scales), at<const float>(down_scales),
                      at<const int32_t>(offsets), at<const int32_t>(permutation), at<const float>(weights),
                      at<bf16>(hidden), at<float>(parts), at<float>(y)},
                     stream_of(stream));
      },
      py::arg("x"), py::arg("tokens"), py::arg("width"), py::arg("inner"), py::arg("experts"), py::arg("top_k"),
      py::arg("kind"), py::arg("gate_up"), py::arg("down"), py::arg("gate_up_scales"), py::arg("down_scales"),
      py::arg("offsets"), py::arg("permutation"), py::arg("weights"), py::arg("hidden"), py::arg("parts"), py::arg("y"),
      py::arg("stream"));
}

#ifndef PAGELENS_CUDA
// How the host runs kernels, and what it found (simt/runtime.h).
void bind_simulator(py::module_& m) {
  m.def(
      "set_options",
      [](const std::string& order, uint32_t seed, bool races, const std::string& refusal) {
        simt::options() = {order == "reverse"  ? simt::Order::reverse
                           : order == "random" ? simt::Order::random
                                               : simt::Order::forward,
                           seed, races, refusal};
      },
      py::arg("order") = "forward", py::arg("seed") = 1, py::arg("races") = false, py::arg("refusal") = "");
  m.def("take_findings", [] {
    const simt::Findings found = simt::take_findings();
    py::dict banks;
    for (const auto* table : {&found.ldmatrix, &found.shared})
      for (const auto& [place, count] : *table) banks[py::str(place)] = py::make_tuple(count.phases, count.extra);
    py::dict result;
    result["races"] = found.races;
    result["banks"] = banks;
    result["accesses"] = found.accesses;
    return result;
  });
}
#endif

}  // namespace

PYBIND11_MODULE(PAGELENS_MODULE, m) {
  m.def("devices", [] {
    const Devices d = devices();
    return py::make_tuple(d.count, d.words);
  });
  bind_routing(m);
  bind_rope(m);
  bind_attention(m);
  bind_window_attention(m);
  bind_conv_downsample(m);
  bind_grouped_gemm(m);
#ifndef PAGELENS_CUDA
  bind_simulator(m);
#endif
}
