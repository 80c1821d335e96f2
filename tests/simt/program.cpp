// Runs the kernels of gemm.cu and primitives.cu on the host and prints what was found, one fact a line.
//   program gemm ORDER RACES        ORDER: forward, reverse or random; RACES: 0 or 1
//   program NAME ORDER RACES        a kernel of primitives.cu
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "simt/runtime.h"
#include "simt/simt.h"

void run_gemm(const simt::bf16* a, const simt::bf16* w, float* c, int m, int n, int k, simt::Stream stream);
bool run_primitive(const std::string& name, const int* x, int* out);

namespace {

// The largest error relative to |a| . |w|, the natural scale of a sum's rounding; infinite if any is not a number.
double gemm_error(int m, int n, int k) {
  uint32_t state = 1;
  const auto next = [&] {
    return static_cast<float>((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1.0f;
  };
  std::vector<simt::bf16> a(static_cast<size_t>(m) * k), w(static_cast<size_t>(n) * k);
  std::vector<float> c(static_cast<size_t>(m) * n, NAN);
  for (auto& v : a) v = simt::to_bf16(next());
  for (auto& v : w) v = simt::to_bf16(next());
  run_gemm(a.data(), w.data(), c.data(), m, n, k, nullptr);
  double worst = 0;
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++) {
      double sum = 0, scale = 0;
      for (int l = 0; l < k; l++) {
        const double product = double{simt::to_float(a[i * k + l])} * simt::to_float(w[j * k + l]);
        sum += product;
        scale += std::fabs(product);
      }
      const double error = std::fabs(sum - c[i * n + j]) / scale;
      worst = std::isnan(error) ? INFINITY : std::fmax(worst, error);
    }
  return worst;
}

int run(const std::string& name) {
  if (name == "gemm") {
    const int sizes[][3] = {{77, 90, 72}, {1, 1, 8}, {64, 64, 32}, {128, 65, 160}};
    for (const auto& s : sizes) std::printf("error %dx%dx%d %.3g\n", s[0], s[1], s[2], gemm_error(s[0], s[1], s[2]));
    return 0;
  }
  std::vector<int> x(1024), out(1024, 0);
  for (int i = 0; i < 1024; i++) x[i] = i * 7 + 1;
  if (!run_primitive(name, x.data(), out.data())) return std::fprintf(stderr, "no kernel %s\n", name.c_str()), 2;
  std::printf("out");
  for (int i = 0; i < 448; i++) std::printf(" %d", out[i]);
  std::printf("\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return std::fprintf(stderr, "program NAME ORDER RACES\n"), 2;
  const std::string order = argv[2];
  simt::options() = {order == "reverse"  ? simt::Order::reverse
                     : order == "random" ? simt::Order::random
                                         : simt::Order::forward,
                     7, std::string(argv[3]) == "1"};
  int result;
  try {
    result = run(argv[1]);
  } catch (const simt::Error& error) {
    std::printf("stopped %s\n", error.what());
    result = 0;
  }
  const simt::Findings found = simt::take_findings();
  std::printf("accesses %lld\n", static_cast<long long>(found.accesses));
  for (const std::string& race : found.races) std::printf("race %s\n", race.c_str());
  for (const auto& [place, banks] : found.ldmatrix)
    std::printf("ldmatrix %s %lld %lld\n", place.c_str(), static_cast<long long>(banks.phases),
                static_cast<long long>(banks.extra));
  for (const auto& [place, banks] : found.shared)
    std::printf("shared %s %lld %lld\n", place.c_str(), static_cast<long long>(banks.phases),
                static_cast<long long>(banks.extra));
  return result;
}
