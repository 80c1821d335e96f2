// Packed random weights, the exact matrices that they stand for, and products with them in double precision.
#pragma once
#include <algorithm>
#include <memory>

#include "common/pack.h"
#include "tests/check.h"

namespace pagelens::tests {

// How a weight is kept; group 0: one scale a row.
struct Recipe {
  const char* name;
  Format format = Format::plain;
  int64_t group = 0;
  ActivationFormat activation = ActivationFormat::plain;
  int64_t activation_group = 0;
  DType scales = DType::f32;
  bool zeros = false, order = false;
};

inline const std::vector<Recipe>& recipes() {
  static const std::vector<Recipe> list = {
      {"plain"},
      {"int8", Format::int8, 0, ActivationFormat::int8, 64, DType::f32},
      {"int4", Format::int4, 32, ActivationFormat::int8, 32, DType::bf16},
      {"int4 zeros order", Format::int4, 16, ActivationFormat::plain, 0, DType::f16, true, true},
      {"int8 groups", Format::int8, 24, ActivationFormat::plain, 0, DType::bf16, true, false},
      {"int8 a row each", Format::int8, 0, ActivationFormat::int8, 0, DType::bf16},
      {"fp8", Format::fp8, 128, ActivationFormat::fp8, 0, DType::f32},
  };
  return list;
}

inline float from_half(uint16_t h) {
  const int exponent = h >> 10 & 31, mantissa = h & 1023;
  const float size = exponent ? std::ldexp(1.0f + mantissa / 1024.0f, exponent - 15) : std::ldexp(mantissa, -24);
  return h >> 15 ? -size : size;
}

inline double from_fp8(int8_t bits) {  // E4M3
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const double size = exponent ? std::ldexp(1.0 + mantissa / 8.0, exponent - 7) : std::ldexp(mantissa, -9);
  return bits < 0 ? -size : size;
}

inline double to_fp8_grid(double x) {  // ties to even
  if (x == 0.0) return 0.0;
  const int exponent = std::max(std::ilogb(x), -6);
  return std::ldexp(std::nearbyint(std::ldexp(x, 3 - exponent)), exponent - 3);
}

// A row as the format wants its inputs, in units of x.
inline void round_inputs(const PackedLinear& w, std::vector<double>& x) {
  if (w.activation == ActivationFormat::plain) return;
  const bool whole = w.activation == ActivationFormat::int8;
  const int64_t size = w.activation_group ? w.activation_group : std::max<int64_t>(w.k, 1);
  const float most = whole ? 127.0f : 448.0f;
  for (int64_t first = 0; first < w.k; first += size) {
    const int64_t end = std::min(first + size, w.k);
    float largest = 0.0f;
    for (int64_t i = first; i < end; i++) largest = std::max(largest, std::fabs(static_cast<float>(x[i])));
    float scale = largest / most;
    if (scale < 0x1p-126f) scale = 1.0f;
    for (int64_t i = first; i < end; i++) {
      const float y = std::min(std::max(static_cast<float>(x[i]) / scale, -most), most);
      x[i] = (whole ? std::nearbyint(y) : to_fp8_grid(y)) * scale;
    }
  }
}

// The packed memory, and W [n, k] and the bias in double precision.
struct TestLinear {
  std::shared_ptr<WeightBuffer> memory;
  PackedLinear packed;
  std::vector<double> weight, bias;

  // x rounded as the format asks; sum over k of x[k] W[n, k], and the sum of the products' magnitudes.
  void multiply(std::vector<double> x, std::vector<double>* sums, double* size = nullptr) const {
    round_inputs(packed, x);
    sums->assign(static_cast<size_t>(packed.n), 0.0);
    for (int64_t n = 0; n < packed.n; n++) {
      double total = 0.0;
      for (int64_t k = 0; k < packed.k; k++) total += x[k] * weight[n * packed.k + k];
      (*sums)[n] = total + (bias.empty() ? 0.0 : bias[n]);
      if (size) *size = std::max(*size, std::fabs((*sums)[n]));
    }
  }
};

// Rows of a matrix before they are packed, and what they stand for.
struct Source {
  Memory values, scales, zeros, order;
  std::vector<double> weight;
  Source(Random& random, const LinearShape& s, const int32_t* order_of_all)
      : values(static_cast<size_t>(s.n * s.k * (s.format == Format::plain ? bytes_of(s.dtype) : 1))),
        scales(static_cast<size_t>(s.n * groups(s) * bytes_of(s.scale_dtype))),
        zeros(static_cast<size_t>(s.has_zeros ? s.n * groups(s) * 2 : 0)),
        order(static_cast<size_t>(s.has_order ? s.k * 4 : 0)),
        weight(static_cast<size_t>(s.n * s.k)) {
    const double spread = 1.0 / std::sqrt(static_cast<double>(std::max<int64_t>(s.k, 1)));
    if (s.format == Format::plain) {
      for (int64_t i = 0; i < s.n * s.k; i++) {
        weight[i] = rounded(random.uniform(-spread, spread), s.dtype);
        if (s.dtype == DType::f32) {
          values.as<float>()[i] = static_cast<float>(weight[i]);
        } else {
          values.as<uint16_t>()[i] = to_bf16(static_cast<float>(weight[i]));
        }
      }
      return;
    }
    if (s.has_order && s.k) std::memcpy(order.as<char>(), order_of_all, order.bytes());
    const int limit = s.format == Format::int4 ? 8 : 127;
    for (int64_t n = 0; n < s.n; n++)
      for (int64_t k = 0; k < s.k; k++) {
        const int64_t g = n * groups(s) + k / s.group_size;
        if (k % s.group_size == 0) {
          put_scale(g, s.scale_dtype, random.uniform(0.5, 1.0) * spread / limit);
          if (s.has_zeros) zeros.as<int16_t>()[g] = static_cast<int16_t>(random.below(2 * limit + 1) - limit);
        }
        int8_t q = static_cast<int8_t>(random.below(2 * limit) - limit);
        if (s.format == Format::fp8) q = static_cast<int8_t>((random.next() & 0x80) | random.below(0x58));
        values.as<int8_t>()[n * s.k + k] = q;
        const double value = s.format == Format::fp8 ? from_fp8(q) : q;
        const double zero = s.has_zeros ? zeros.as<int16_t>()[g] : 0;
        const int64_t input = s.has_order ? order.as<int32_t>()[k] : k;
        weight[n * s.k + input] = (value - zero) * scale(g, s.scale_dtype);
      }
  }
  static int64_t groups(const LinearShape& s) {
    return s.format == Format::plain ? 0 : (s.k + s.group_size - 1) / s.group_size;
  }

 private:
  void put_scale(int64_t i, DType dtype, double value) {
    if (dtype == DType::f32) {
      scales.as<float>()[i] = static_cast<float>(value);
    } else if (dtype == DType::bf16) {
      scales.as<uint16_t>()[i] = to_bf16(static_cast<float>(value));
    } else {  // float16, numbers of 2^-10 to 2^-4 with 10 bits, or below 2^-14 without
      int exponent;
      const double mantissa = std::frexp(value, &exponent);
      const int biased = exponent - 1 + 15;
      scales.as<uint16_t>()[i] =
          static_cast<uint16_t>(biased > 0 ? (biased << 10) + static_cast<int>((2 * mantissa - 1) * 1024)
                                           : static_cast<int>(std::ldexp(value, 24)));
    }
  }
  double scale(int64_t i, DType dtype) const {
    if (dtype == DType::f32) return scales.as<float>()[i];
    const uint16_t bits = scales.as<uint16_t>()[i];
    return dtype == DType::bf16 ? from_bf16(bits) : from_half(bits);
  }
};

inline LinearShape shape_of(const Recipe& recipe, int64_t n, int64_t k, DType dtype, bool bias) {
  LinearShape s;
  s.n = n, s.k = k, s.dtype = dtype, s.has_bias = bias, s.format = recipe.format;
  if (recipe.format == Format::plain) return s;
  s.activation = recipe.activation, s.activation_group = recipe.activation_group;
  s.scale_dtype = recipe.scales, s.group_size = recipe.group ? recipe.group : std::max<int64_t>(k, 1);
  s.has_zeros = recipe.zeros, s.has_order = recipe.order;
  return s;
}

inline std::vector<int32_t> shuffled(Random& random, int64_t k) {
  std::vector<int32_t> order(static_cast<size_t>(k));
  for (int64_t i = 0; i < k; i++) order[i] = static_cast<int32_t>(i);
  for (int64_t i = k - 1; i > 0; i--) std::swap(order[i], order[random.below(i + 1)]);
  return order;
}

inline void pack_rows(const PackedLinear& packed, const Source& first, const Source* second, int64_t rows,
                      const float* bias) {
  ThreadPool pool(2);
  const auto held = pool.lock();
  const auto part = [&](Memory Source::* memory) {
    return RowSource{(first.*memory).as<char>(), second ? (second->*memory).as<char>() : nullptr, rows};
  };
  if (packed.quantized()) {
    pack_quantized(pool, packed, part(&Source::values), part(&Source::scales), part(&Source::zeros),
                   first.order.as<int32_t>(), bias, DType::f32);
  } else {
    pack_plain(pool, packed, part(&Source::values), bias, DType::f32);
  }
}

inline TestLinear make_linear(Random& random, const Recipe& recipe, int64_t n, int64_t k, DType dtype, bool bias) {
  const LinearShape shape = shape_of(recipe, n, k, dtype, bias);
  TestLinear made;
  made.memory = std::make_shared<WeightBuffer>(packed_bytes(shape));
  made.packed = place(shape, made.memory->data());
  const std::vector<int32_t> order = shuffled(random, k);
  const Source source(random, shape, order.data());
  const Matrix biases = Matrix::random(random, 1, n, DType::f32);
  pack_rows(made.packed, source, nullptr, n, bias ? static_cast<float*>(biases.data()) : nullptr);
  made.weight = source.weight;
  for (int64_t i = 0; bias && i < n; i++) made.bias.push_back(biases.at(0, i));
  return made;
}

// gate, up [inner, width] and down [width, inner].
struct TestSwiglu {
  TestLinear gate, up, down;  // of gate and up only the matrix and the format
  std::shared_ptr<WeightBuffer> memory;
  PackedSwiglu packed;

  // down(silu(gate(x)) * up(x)), the product rounded to `dtype`.
  std::vector<double> apply(const std::vector<double>& x, DType dtype) const {
    std::vector<double> g, u, y;
    gate.multiply(x, &g);
    up.multiply(x, &u);
    for (size_t i = 0; i < g.size(); i++) g[i] = rounded(g[i] / (1.0 + std::exp(-g[i])) * u[i], dtype);
    down.multiply(g, &y);
    return y;
  }
};

inline TestSwiglu make_swiglu(Random& random, const Recipe& recipe, int64_t width, int64_t inner, DType dtype) {
  TestSwiglu made;
  const LinearShape half = shape_of(recipe, inner, width, dtype, false);
  LinearShape both = half;
  both.n = 32 * ((inner + 15) / 16);
  const std::vector<int32_t> order = shuffled(random, width);
  const Source gate(random, half, order.data()), up(random, half, order.data());
  made.memory = std::make_shared<WeightBuffer>(packed_bytes(both));
  made.packed.gate_up = place(both, made.memory->data());
  pack_rows(made.packed.gate_up, gate, &up, inner, nullptr);
  made.down = make_linear(random, recipe, width, inner, dtype, false);
  made.packed.down = made.down.packed;
  made.packed.inner = inner;
  made.gate.packed = made.up.packed = made.packed.gate_up;
  made.gate.packed.n = made.up.packed.n = inner;
  made.gate.weight = gate.weight;
  made.up.weight = up.weight;
  return made;
}

inline std::vector<double> row_of(const Matrix& x, int64_t r) {
  std::vector<double> row(static_cast<size_t>(x.cols()));
  for (int64_t c = 0; c < x.cols(); c++) row[c] = x.at(r, c);
  return row;
}

}  // namespace pagelens::tests
