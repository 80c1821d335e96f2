// Weights into the kernels' layout, out of Python's memory or in place in a mapped file.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "bindings.h"
#include "common/cpu_features.h"
#include "common/pack.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace pagelens {
namespace {

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

}  // namespace

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

}  // namespace pagelens
