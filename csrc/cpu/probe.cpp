// How fast this machine reads memory and multiplies, with nothing else in the way: the limits of all other kernels.
//
// What is read or computed is of no use to anybody, so empty assembly statements stand where the compiler must believe
// that it is used.
#include <algorithm>

#include "common/simd.h"
#include "common/thread_pool.h"

namespace pagelens::PAGELENS_ISA {
namespace {

#if defined(__x86_64__)
  #define PAGELENS_USE(v) asm volatile("" ::"x"(v))
  #define PAGELENS_CHANGE(v) asm volatile("" : "+x"(v))
#else
  #define PAGELENS_USE(v) asm volatile("" ::"w"(v))
  #define PAGELENS_CHANGE(v) asm volatile("" : "+w"(v))
#endif

// Fill the registers of the oldest machines beside two operands, and are enough for the latency of every one.
constexpr int kSums = 12;

// Multiplications and additions that one `multiply` makes, with all lanes counted.
constexpr double operations(ProbeKind kind) {
#if defined(PAGELENS_ISA_AVX512_BF16)
  return 2.0 * W * (kind == ProbeKind::int8 ? 4 : kind == ProbeKind::bf16 ? 2 : 1);
#else
  return 2.0 * W * (kind == ProbeKind::int8 ? 2 : 1);
#endif
}

// sum += x * y with the instruction that the kernels of this set use: without one for bfloat16 that of float32 (the
// kernels widen first), without VNNI the one for 16 bits, and an addition.
template <ProbeKind K>
PAGELENS_INLINE void multiply(vf& sum, vf x, vf y) {
#if defined(PAGELENS_ISA_AVX512_BF16)
  if (K == ProbeKind::bf16) {
    asm volatile("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  } else if (K == ProbeKind::int8) {
    asm volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  } else {
    asm volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  }
#elif defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX2)
  if (K == ProbeKind::int8) {
    vf product;
    asm volatile("vpmaddwd %2, %1, %0" : "=v"(product) : "v"(x), "v"(y));
    sum = (vf)((vu)sum + (vu)product);
  } else {
    asm volatile("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  }
#else
  typedef uint16_t halves __attribute__((vector_size(4 * W)));
  vf again = x;  // so that a product is not made once for all sums
  PAGELENS_CHANGE(again);
  if (K == ProbeKind::int8) {
    sum = (vf)((halves)sum + (halves)again * (halves)y);
  } else {
    sum = fma(again, y, sum);
  }
  PAGELENS_CHANGE(sum);
#endif
}

// `rounds` times kSums products. A leaf that is never inlined, so that nothing but the sums needs a register.
template <ProbeKind K>
__attribute__((noinline)) void multiply_rounds(int64_t rounds) {
  vf sums[kSums], x = splat(1.0f), y = splat(1e-6f);
  PAGELENS_CHANGE(x);
  PAGELENS_CHANGE(y);
  PAGELENS_UNROLL for (int i = 0; i < kSums; i++) sums[i] = splat(static_cast<float>(i));
  for (int64_t round = 0; round < rounds; round++)
    PAGELENS_UNROLL for (int i = 0; i < kSums; i++) multiply<K>(sums[i], x, y);
  PAGELENS_UNROLL for (int i = 0; i < kSums; i++) PAGELENS_USE(sums[i]);
}

__attribute__((noinline)) void read(const char* from, int64_t bytes) {
  constexpr int kLoads = 8;
  vu sums[kLoads] = {};
  for (int64_t i = 0; i < bytes; i += kLoads * static_cast<int64_t>(sizeof(vu)))
    PAGELENS_UNROLL for (int j = 0; j < kLoads; j++) sums[j] ^=
        load_as<vu>(from + i + j * static_cast<int64_t>(sizeof(vu)));
  PAGELENS_UNROLL for (int j = 0; j < kLoads; j++) PAGELENS_USE(sums[j]);
}

}  // namespace

void probe_read(ThreadPool& pool, const char* data, int64_t bytes) {
  constexpr int64_t kPiece = int64_t{1} << 18, kStep = 512;
  const int64_t steps = bytes / kStep, pieces = std::max<int64_t>((bytes + kPiece - 1) / kPiece, pool.num_threads());
  pool.run(pieces, [&](int64_t i, int) {
    const int64_t from = steps * i / pieces * kStep, to = steps * (i + 1) / pieces * kStep;
    read(data + from, to - from);
  });
}

double probe_arithmetic(ThreadPool& pool, ProbeKind kind, int64_t rounds) {
  // Many pieces: a thread that is held up leaves some to the others.
  const int64_t pieces = 64 * pool.num_threads(), each = (rounds + pieces - 1) / pieces;
  pool.run(pieces, [&](int64_t, int) {
    switch (kind) {
      case ProbeKind::f32:
        return multiply_rounds<ProbeKind::f32>(each);
      case ProbeKind::bf16:
        return multiply_rounds<ProbeKind::bf16>(each);
      case ProbeKind::int8:
        return multiply_rounds<ProbeKind::int8>(each);
    }
  });
  return static_cast<double>(pieces * each) * kSums * operations(kind);
}

}  // namespace pagelens::PAGELENS_ISA
