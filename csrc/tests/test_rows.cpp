// What works row by row: embedding, rms_norm, layer_norm, quantize, sample; and resize_rgb_u8.
#include <algorithm>

#include "tests/check.h"

using namespace pagelens;
using namespace pagelens::tests;

namespace {

void check_embedding(DType dtype, int64_t rows, int64_t vocabulary, int64_t width, int64_t gap) {
  Random random(static_cast<uint64_t>(rows + width));
  const Matrix table = Matrix::random(random, vocabulary, width, dtype, gap);
  std::vector<int32_t> ids;
  for (int64_t r = 0; r < rows; r++)
    ids.push_back(static_cast<int32_t>(r == 0 ? vocabulary - 1 : random.below(vocabulary)));
  const Memory memory = copy_of(ids);
  Expected expected;
  for (const int32_t id : ids)
    for (int64_t c = 0; c < width; c++) expected.push_back(table.at(id, c));
  check_kernel(
      std::string("embedding ") + name_of(dtype) + " " + std::to_string(rows),
      [&] { return Matrix(rows, width, dtype, gap); }, expected, 1e-12,
      [&](ThreadPool& pool, Matrix& out) {
        EmbeddingArgs args{};
        args.ids = memory.as<int32_t>(), args.table = table.view(), args.out = out.view();
        expect(kernels().embedding(pool, args) == -1, "embedding refused good ids");
        args.table.rows = vocabulary - 1;  // the first id is then outside
        if (rows) expect(kernels().embedding(pool, args) == 0, "embedding took an id outside its table");
      });
}

void check_norms(DType dtype, int64_t rows, int64_t width, int64_t gap) {
  Random random(static_cast<uint64_t>(rows * 3 + width));
  const Matrix x = Matrix::random(random, rows, width, dtype, gap, 3.0);
  const Matrix weight = Matrix::random(random, 1, width, dtype), bias = Matrix::random(random, 1, width, dtype);
  Expected rms, layer;
  for (int64_t r = 0; r < rows; r++) {
    double sum = 0.0, squares = 0.0, variance = 0.0;
    for (int64_t c = 0; c < width; c++) sum += x.at(r, c), squares += x.at(r, c) * x.at(r, c);
    for (int64_t c = 0; c < width; c++) variance += std::pow(x.at(r, c) - sum / width, 2.0) / width;
    for (int64_t c = 0; c < width; c++) {
      rms.push_back(x.at(r, c) / std::sqrt(squares / width + 1e-5) * weight.at(0, c));
      layer.push_back((x.at(r, c) - sum / width) / std::sqrt(variance + 1e-5) * weight.at(0, c) + bias.at(0, c));
    }
  }
  const std::string what = std::string(name_of(dtype)) + " " + std::to_string(rows) + " x " + std::to_string(width);
  const auto run = [&](ThreadPool& pool, Matrix& out, bool is_layer, bool in_place) {
    Matrix own = Matrix(rows, width, dtype, gap);
    NormArgs args{};
    args.weight = weight.data(), args.bias = is_layer ? bias.data() : nullptr, args.eps = 1e-5f;
    args.x = x.view(), args.out = out.view();
    if (in_place) {
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < width; c++) out.set(r, c, x.at(r, c));
      args.x = out.view();
    }
    (is_layer ? kernels().layer_norm : kernels().rms_norm)(pool, args);
  };
  const auto blank = [&] { return Matrix(rows, width, dtype, gap); };
  for (const bool in_place : {false, true}) {
    check_kernel("rms_norm " + what, blank, rms, 1e-5, [&](ThreadPool& p, Matrix& o) { run(p, o, false, in_place); });
    check_kernel("layer_norm " + what, blank, layer, 1e-5,
                 [&](ThreadPool& p, Matrix& o) { run(p, o, true, in_place); });
  }
}

// All sets round alike; a value is at most half a step from what it stands for, or the end of the range.
void check_quantize(DType dtype, Format format, int64_t rows, int64_t width, int64_t gap) {
  Random random(static_cast<uint64_t>(rows * 5 + width));
  Matrix weight = Matrix::random(random, rows, width, dtype, gap);
  const bool int4 = format == Format::int4;
  const int64_t group = int4 ? 32 : std::max<int64_t>(width, 1), groups = (width + group - 1) / group;
  std::vector<int8_t> first;
  const std::string what = std::string("quantize ") + (int4 ? "int4 " : "int8 ") + name_of(dtype);
  each_setting(what, [&](ThreadPool& pool, const std::string& setting) {
    const Memory values(static_cast<size_t>(rows * width));
    const Memory scales(static_cast<size_t>(rows * (int4 ? 2 * groups : 4)));
    QuantizeArgs args{};
    args.weight = weight.view(), args.format = format;
    args.values = values.as<int8_t>(), args.scales = scales.as<void>();
    expect(kernels().quantize(pool, args) == -1, setting + ": refused");
    bool close = true;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < width; c++) {
        const double scale =
            int4 ? from_bf16(scales.as<uint16_t>()[r * groups + c / group]) : scales.as<float>()[r * groups];
        const double steps = scale == 0.0 ? 0.0 : weight.at(r, c) / scale;
        const double reachable = std::min(std::max(steps, int4 ? -8.0 : -127.0), int4 ? 7.0 : 127.0);
        close &= std::fabs(args.values[r * width + c] - reachable) <= 0.501;
      }
    expect(close, setting + ": further than half a step from the weight");
    std::vector<int8_t> all(values.as<int8_t>(), values.as<int8_t>() + values.bytes());
    all.insert(all.end(), scales.as<int8_t>(), scales.as<int8_t>() + scales.bytes());
    if (first.empty()) first = all;
    expect(all == first, setting + ": other bits than the first setting");
    if (rows > 1 && width > 0) {
      Matrix broken = Matrix::random(random, rows, width, dtype);
      broken.set(1, width - 1, INFINITY);
      args.weight = broken.view();
      expect(kernels().quantize(pool, args) == 1, setting + ": took an infinity");
    }
  });
}

// Sorting everything, as the contract has it. Returns -2 where `uniform` lies so near a border that rounding decides.
int32_t choose(const std::vector<double>& row, const SampleCut& cut) {
  std::vector<int32_t> order;
  for (size_t i = 0; i < row.size(); i++) order.push_back(static_cast<int32_t>(i));
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return row[a] > row[b]; });
  const double top = row[order[0]];
  if (cut.temperature == 0.0) return order[0];
  if (cut.top_k > 0 && cut.top_k < static_cast<double>(order.size())) order.resize(static_cast<size_t>(cut.top_k));
  std::vector<double> weights;
  double total = 0.0, kept = 0.0, sum = 0.0;
  for (const int32_t token : order) {
    const double weight = std::exp(static_cast<float>(row[token] - top) / cut.temperature);
    if (weight == 0.0 || weight < cut.min_p) break;
    weights.push_back(weight);
    total += weight;
  }
  size_t count = 0;
  while (count < weights.size() && (cut.top_p >= 1.0 || kept < cut.top_p * total)) kept += weights[count++];
  for (size_t i = 0; i < count; i++) {
    sum += weights[i];
    if (std::fabs(sum - cut.uniform * kept) < 1e-9 * kept) return -2;
    if (sum > cut.uniform * kept) return order[i];
  }
  return -2;
}

void check_sample(int64_t rows, int64_t vocabulary, int64_t gap, double size, bool ties) {
  Random random(static_cast<uint64_t>(rows * 3 + vocabulary));
  Matrix logits = Matrix::random(random, rows, vocabulary, DType::f32, gap, size);
  for (int64_t r = 0; r < rows && ties; r++)
    for (int64_t i = 0; i < vocabulary; i++) logits.set(r, i, std::round(logits.at(r, i)));
  constexpr double kCuts[][4] = {{0, 0, 1, 0},   {1, 0, 1, 0},      {0.5, 5, 1, 0},    {2, 40, 0.9, 0.02},
                                 {1, 0, 0.6, 0}, {1, 0, 0.999, 0},  {1.5, 0, 1, 0.05}, {100, 2100, 0.99, 0},
                                 {3, 0, 0.5, 0}, {1e-9, 0, 0.9, 0}, {1, 1, 1, 0}};
  std::vector<SampleCut> cuts;
  std::vector<int32_t> expected;
  for (int64_t r = 0; r < rows; r++) {
    const double* c = kCuts[r % 11];
    cuts.push_back({c[0], c[1], c[2], c[3], random.uniform(0, 1)});
    std::vector<double> row;
    for (int64_t i = 0; i < vocabulary; i++) row.push_back(logits.at(r, i));
    expected.push_back(choose(row, cuts.back()));
  }
  if (rows > 2) logits.set(2, vocabulary - 1, NAN), expected[2] = -1;
  const Memory memory = copy_of(cuts);
  each_setting("sample " + std::to_string(vocabulary), [&](ThreadPool& pool, const std::string& setting) {
    const Memory tokens(static_cast<size_t>(rows) * 4);
    SampleArgs args{};
    args.logits = logits.view(), args.cuts = memory.as<SampleCut>(), args.tokens = tokens.as<int32_t>();
    kernels().sample(pool, args);
    for (int64_t r = 0; r < rows; r++)
      expect(expected[r] == -2 || args.tokens[r] == expected[r], setting + ": row " + std::to_string(r));
  });
}

// All sets give the same bytes; an even picture stays even; nothing leaves the range between the darkest and the
// lightest value by more than the kernel's overshoot.
void check_resize(int64_t src_h, int64_t src_w, int64_t dst_h, int64_t dst_w) {
  Random random(static_cast<uint64_t>(src_h * 7 + dst_w));
  std::vector<uint8_t> noise, first;
  for (int64_t i = 0; i < src_h * src_w * 3; i++) noise.push_back(static_cast<uint8_t>(random.below(256)));
  const Memory picture = copy_of(noise), even = copy_of(std::vector<uint8_t>(noise.size(), 77));
  for (const std::string& name : isas()) {
    set_isa(name);
    const Memory out(static_cast<size_t>(dst_h * dst_w * 3));
    kernels().resize_rgb_u8(picture.as<uint8_t>(), src_h, src_w, out.as<uint8_t>(), dst_h, dst_w);
    const std::vector<uint8_t> all(out.as<uint8_t>(), out.as<uint8_t>() + out.bytes());
    if (first.empty()) first = all;
    const std::string what =
        "resize_rgb_u8 " + std::to_string(src_h) + " x " + std::to_string(src_w) + " [" + name + "]";
    expect(all == first, what + ": other bytes than " + isas().front());
    expect(src_h != dst_h || src_w != dst_w || all == noise, what + ": the same size is not the same picture");
    kernels().resize_rgb_u8(even.as<uint8_t>(), src_h, src_w, out.as<uint8_t>(), dst_h, dst_w);
    bool same = true;
    for (size_t i = 0; i < out.bytes(); i++) same &= out.as<uint8_t>()[i] == 77;
    expect(same, what + ": an even picture became uneven");
  }
}

}  // namespace

int main(int argc, char** argv) {
  choose_isas(argc, argv);
  for (const DType dtype : {DType::f32, DType::bf16}) {
    check_embedding(dtype, 0, 3, 8, 0);
    check_embedding(dtype, 1, 2, 1, 0);
    check_embedding(dtype, 50, 90, 1000, 5);
    for (const int64_t width : {1, 7, 16, 33, 64, 129, 1000, 2050}) {
      check_norms(dtype, 0, width, 0);
      check_norms(dtype, 1, width, 0);
      check_norms(dtype, 37, width, 3);
    }
    for (const Format format : {Format::int8, Format::int4})
      for (const int64_t width : {1, 31, 32, 33, 160, 257}) {
        check_quantize(dtype, format, 0, width, 0);
        check_quantize(dtype, format, 1, width, 0);
        check_quantize(dtype, format, 29, width, 5);
      }
  }
  check_sample(0, 5, 0, 1, false);
  check_sample(11, 1, 0, 1, false);
  check_sample(22, 63, 3, 6, false);
  check_sample(22, 64, 0, 6, true);
  check_sample(33, 4001, 1, 8, false);
  check_sample(33, 9000, 0, 2, true);
  check_sample(11, 30011, 0, 1, false);
  check_resize(1, 1, 1, 1);
  check_resize(1, 1, 9, 5);
  check_resize(13, 7, 1, 1);
  check_resize(40, 30, 40, 30);
  check_resize(40, 30, 17, 61);
  check_resize(101, 77, 50, 33);
  check_resize(64, 300, 64, 31);
  check_resize(300, 64, 31, 64);
  return finish("rows");
}
