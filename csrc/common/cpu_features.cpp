#include "common/cpu_features.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/kernels.h"

#if defined(__x86_64__)
  #include <cpuid.h>
#endif

namespace pagelens {
namespace {

struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false;
};

#if defined(__x86_64__)
unsigned long long enabled_states() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<unsigned long long>(high) << 32 | low;
}

Features detect() {
  Features f;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, avx = c >> 28 & 1, f16c = c >> 29 & 1;
  if (!(osxsave && avx && fma && f16c)) return f;
  // The CPU may know a set that the operating system does not save on a context switch; XCR0 tells.
  const unsigned long long states = enabled_states();
  const bool ymm = (states & 0x6) == 0x6, zmm = (states & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const unsigned max_subleaf = a;
  f.avx2 = ymm && (b >> 5 & 1);
  const bool f512 = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1, vnni = c >> 11 & 1;
  f.avx512 = f.avx2 && zmm && f512 && dq && bw && vl;
  if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512_bf16 = f.avx512 && vnni && (a >> 5 & 1);
  return f;
}
#else
Features detect() { return {}; }
#endif

struct Entry {
  const char* name;
  bool supported;
  const KernelTable* table;  // nullptr: not in this build
};

const std::vector<Entry>& entries() {
  static const std::vector<Entry> list = [] {
    const Features f = detect();
    std::vector<Entry> e = {{"portable", true, &portable::table()},
                            {"avx2", f.avx2, nullptr},
                            {"avx512", f.avx512, nullptr},
                            {"avx512_bf16", f.avx512_bf16, nullptr}};
#ifdef PAGELENS_HAS_AVX2
    e[1].table = &avx2::table();
#endif
#ifdef PAGELENS_HAS_AVX512
    e[2].table = &avx512::table();
#endif
#ifdef PAGELENS_HAS_AVX512_BF16
    e[3].table = &avx512_bf16::table();
#endif
    return e;
  }();
  return list;
}

// The same sets with sums in free order: in builds for benchmarks/bench_invariance.py only, and never chosen unasked.
std::vector<Entry> free_order_entries() {
  [[maybe_unused]] const Features f = detect();
  std::vector<Entry> e;
#ifdef PAGELENS_HAS_PORTABLE_FREE
  e.push_back({"portable_free", true, &portable_free::table()});
#endif
#ifdef PAGELENS_HAS_AVX2_FREE
  e.push_back({"avx2_free", f.avx2, &avx2_free::table()});
#endif
#ifdef PAGELENS_HAS_AVX512_FREE
  e.push_back({"avx512_free", f.avx512, &avx512_free::table()});
#endif
#ifdef PAGELENS_HAS_AVX512_BF16_FREE
  e.push_back({"avx512_bf16_free", f.avx512_bf16, &avx512_bf16_free::table()});
#endif
  return e;
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Entry& find(const std::string& name, const std::string& asked_by) {
  static const std::vector<Entry> free_order = free_order_entries();
  for (const Entry& e : free_order)
    if (name == e.name && e.supported) return e;
  for (const Entry& e : entries()) {
    if (name != e.name) continue;
    if (!e.table)
      throw std::invalid_argument(asked_by + "=" + name + " was not compiled into this build, which has " +
                                  joined(compiled_isas()) +
                                  "; choose one of these, or rebuild with a compiler that knows it");
    if (!e.supported)
      throw std::invalid_argument(asked_by + "=" + name + " is not supported by this CPU, which can run " +
                                  joined(supported_isas()) + "; choose one of these, or unset it");
    return e;
  }
  throw std::invalid_argument(asked_by + "=" + name +
                              " is not an instruction set; known: portable, avx2, avx512, avx512_bf16");
}

std::atomic<const Entry*> chosen{nullptr};

const Entry& current() {
  if (const Entry* e = chosen.load(std::memory_order_acquire)) return *e;
  const char* forced = std::getenv("PAGELENS_CPU_ISA");
  const Entry* e = forced && *forced ? &find(forced, "PAGELENS_CPU_ISA") : &find(supported_isas().back(), "isa");
  chosen.store(e, std::memory_order_release);
  return *e;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Entry& e : entries())
    if (e.table) names.push_back(e.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Entry& e : entries())
    if (e.table && e.supported) names.push_back(e.name);
  return names;
}

std::string isa() { return current().name; }
void set_isa(const std::string& name) { chosen.store(&find(name, "isa"), std::memory_order_release); }
const KernelTable& kernels() { return *current().table; }

}  // namespace pagelens
