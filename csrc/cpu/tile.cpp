#include "cpu/tile.h"

namespace pagelens::PAGELENS_ISA {
namespace {

constexpr int kVectors = kPanel / W;

// Vectors of a panel that are accumulated in one pass over K, so that R rows of them fit into the registers.
constexpr int vectors_a_pass(int rows) {
  if (W == 16) return kVectors;
  if (W == 8) return rows <= 2 ? 4 : 2;
  return rows == 1 ? 8 : 2;
}

// c += x * b. As assembly where that is one instruction: GCC 12 otherwise hoists the broadcasts of a whole tile and
// spills the accumulators of the larger ones (16 registers, 15 needed).
PAGELENS_INLINE void accumulate(vf& c, vf x, vf b) {
#if defined(PAGELENS_ISA_AVX512) || defined(PAGELENS_ISA_AVX512_BF16)
  asm("vfmadd231ps %2, %1, %0" : "+v"(c) : "v"(x), "v"(b));
#elif defined(PAGELENS_ISA_AVX2)
  asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(x), "x"(b));
#else
  c = fma(x, b, c);
#endif
}

template <int R, int NV>
PAGELENS_INLINE void load_sums(vf (&c)[R][NV], const float* acc, bool first) {
  if (first) {
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++) c[r][v] = vf{};
  } else {
    PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++) c[r][v] =
        load(acc + r * kPanel + v * W);
  }
}

template <int R, int NV>
PAGELENS_INLINE void store_sums(const vf (&c)[R][NV], float* acc) {
  PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++)
      store(acc + r * kPanel + v * W, c[r][v]);
}

// The three functions below are leaves that are never inlined: inside larger code GCC spills their accumulators.
template <int R>
__attribute__((noinline)) void tile_f32(const void* a_, const void* w_, int64_t groups, float* acc, bool first,
                                        const Fetch& fetch) {
  constexpr int NV = vectors_a_pass(R);
  for (int pass = 0; pass < kVectors / NV; pass++) {
    const float* a = static_cast<const float*>(a_);
    const float* w = static_cast<const float*>(w_) + pass * NV * W;
    [[maybe_unused]] const char* ahead = static_cast<const char*>(fetch.from);
    const int64_t step = kTileFetches ? fetch.step : 0;
    vf c[R][NV];
    load_sums<R, NV>(c, acc + pass * NV * W, first);
    for (int64_t g = 0; g < groups; g++, a += R, w += kPanel, ahead += step) {
      if constexpr (kTileFetches) __builtin_prefetch(ahead, 0, 2);
      vf b[NV];
      PAGELENS_UNROLL for (int v = 0; v < NV; v++) b[v] = load(w + v * W);
      PAGELENS_UNROLL for (int r = 0; r < R; r++) {
        const vf x = splat(a[r]);
        PAGELENS_UNROLL for (int v = 0; v < NV; v++) accumulate(c[r][v], x, b[v]);
      }
    }
    store_sums<R, NV>(c, acc + pass * NV * W);
  }
}

#ifdef PAGELENS_ISA_AVX512_BF16
template <int R>
__attribute__((noinline)) void tile_bf16(const void* a_, const void* w_, int64_t groups, float* acc, bool first,
                                         const Fetch& fetch) {
  const uint32_t* a = static_cast<const uint32_t*>(a_);
  const float* w = static_cast<const float*>(w_);
  const char* ahead = static_cast<const char*>(fetch.from);
  const int64_t step = fetch.step;
  vf c[R][kVectors];
  load_sums<R, kVectors>(c, acc, first);
  for (int64_t g = 0; g < groups; g++, a += R, w += kPanel, ahead += step) {
    if constexpr (kTileFetches) __builtin_prefetch(ahead, 0, 2);
    vf b[kVectors];
    PAGELENS_UNROLL for (int v = 0; v < kVectors; v++) b[v] = load(w + v * W);
    PAGELENS_UNROLL for (int r = 0; r < R; r++) {
      const vu x = splat_bits(load_as<uint32_t>(a + r));
      // Not the intrinsic: its casts made GCC 12 copy every accumulator through the stack.
      PAGELENS_UNROLL for (int v = 0; v < kVectors;
                           v++) asm("vdpbf16ps %2, %1, %0" : "+v"(c[r][v]) : "v"(x), "v"(b[v]));
    }
  }
  store_sums<R, kVectors>(c, acc);
}
#else
// The even element of every pair first, then the odd one; both are exact in float32.
template <int R>
__attribute__((noinline)) void tile_bf16(const void* a_, const void* w_, int64_t groups, float* acc, bool first,
                                         const Fetch& fetch) {
  constexpr int NV = vectors_a_pass(R);
  for (int pass = 0; pass < kVectors / NV; pass++) {
    const float* a = static_cast<const float*>(a_);
    const uint32_t* w = static_cast<const uint32_t*>(w_) + pass * NV * W;
    [[maybe_unused]] const char* ahead = static_cast<const char*>(fetch.from);
    const int64_t step = kTileFetches ? fetch.step : 0;
    vf c[R][NV];
    load_sums<R, NV>(c, acc + pass * NV * W, first);
    for (int64_t g = 0; g < groups; g++, a += 2 * R, w += kPanel, ahead += step) {
      if constexpr (kTileFetches) __builtin_prefetch(ahead, 0, 2);
      vf b[NV];
      PAGELENS_UNROLL for (int v = 0; v < NV; v++) b[v] = (vf)(load_as<vu>(w + v * W) << 16);
      PAGELENS_UNROLL for (int r = 0; r < R; r++) {
        const vf x = splat(a[r]);
        PAGELENS_UNROLL for (int v = 0; v < NV; v++) accumulate(c[r][v], x, b[v]);
      }
      PAGELENS_UNROLL for (int v = 0; v < NV; v++) b[v] = (vf)(load_as<vu>(w + v * W) & 0xffff0000u);
      PAGELENS_UNROLL for (int r = 0; r < R; r++) {
        const vf x = splat(a[R + r]);
        PAGELENS_UNROLL for (int v = 0; v < NV; v++) accumulate(c[r][v], x, b[v]);
      }
    }
    store_sums<R, NV>(c, acc + pass * NV * W);
  }
}
#endif

template <int R>
TileFn choose(DType dtype, int rows) {
  if (rows == R) return dtype == DType::f32 ? tile_f32<R> : tile_bf16<R>;
  if constexpr (R > 1) return choose<R - 1>(dtype, rows);
  return nullptr;
}

#ifdef PAGELENS_FREE_ORDER
  #include "free_order/tile.h"
#endif

}  // namespace

TileFn tile_fn(DType weight_dtype, int rows) {
#ifdef PAGELENS_FREE_ORDER
  if (const TileFn split = split_tile_fn(weight_dtype, rows)) return split;
#endif
  return choose<kMaxTileRows>(weight_dtype, rows);
}

}  // namespace pagelens::PAGELENS_ISA
