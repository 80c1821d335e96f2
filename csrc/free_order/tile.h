// Tiles of few rows with several partial sums along K, included by cpu/tile.cpp in its namespace. For
// benchmarks/bench_invariance.py only: a row's bits depend on how many others are in the call.
//
// Few rows have so few accumulators that each product waits for the one before; partial sums break that chain. Two of
// them: with four, one row whose weights come from memory took 3 to 17 % longer, with two 1 to 2 %, so a row of a large
// model, which is a long one, has none. From four rows on they gain nothing.
#pragma once

// Of each output; 1: as in every normal build. Without AVX-512 a row alone has four vectors of outputs or eight.
constexpr int partial_sums(int rows) {
  if (W == 16) return rows <= 3 ? 2 : 1;
  return W == 8 && rows == 1 ? 2 : 1;
}

// c += one packed word of activations times one vector of words; element e of a pair where there is no dot product.
template <DType D>
PAGELENS_INLINE void add_product(vf& c, const uint32_t* a, const uint32_t* w, [[maybe_unused]] int e) {
  const vf x = (vf)splat_bits(load_as<uint32_t>(a));
#ifdef PAGELENS_ISA_AVX512_BF16
  if (D == DType::bf16) {
    const vf b = load_as<vf>(w);
    asm("vdpbf16ps %2, %1, %0" : "+v"(c) : "v"(x), "v"(b));
    return;
  }
#endif
  const vu word = load_as<vu>(w);
  accumulate(c, x, (vf)(D == DType::f32 ? word : e ? word & 0xffff0000u : word << 16));
}

constexpr int64_t kLongRow = 384;  // groups; a longer row of bfloat16 dots is not split

template <DType D, int R, int S>
__attribute__((noinline)) void split_tile(const void* a_, const void* w_, int64_t groups, float* acc, bool first,
                                          const Fetch& fetch) {
  constexpr int E = D == DType::bf16 && !kBf16Dot ? 2 : 1, G = S > E ? S / E : 1, NV = kPanel / W;
  const uint32_t* a = static_cast<const uint32_t*>(a_);
  const uint32_t* w = static_cast<const uint32_t*>(w_);
  if (kBf16Dot && R == 1 && groups > kLongRow)
    return D == DType::f32 ? tile_f32<1>(a_, w_, groups, acc, first, fetch)
                           : tile_bf16<1>(a_, w_, groups, acc, first, fetch);
  [[maybe_unused]] const char* ahead = static_cast<const char*>(fetch.from);
  const int64_t step = kTileFetches ? fetch.step : 0;
  vf c[S][R][NV];
  load_sums<R, NV>(c[0], acc, first);
  PAGELENS_UNROLL for (int s = 1; s < S; s++) load_sums<R, NV>(c[s], acc, true);
  int64_t g = 0;
  for (; g + G <= groups; g += G, a += G * E * R, w += G * kPanel) PAGELENS_UNROLL for (int i = 0; i < G * E; i++) {
      if (kTileFetches && R > 1 && i % E == 0) __builtin_prefetch(ahead, 0, 2), ahead += step;
      PAGELENS_UNROLL for (int r = 0; r < R; r++) PAGELENS_UNROLL for (int v = 0; v < NV; v++)
          add_product<D>(c[i % S][r][v], a + i * R + r, w + i / E * kPanel + v * W, i % E);
    }
  for (; g < groups; g++, a += E * R, w += kPanel)
    PAGELENS_UNROLL for (int i = 0; i < E; i++) PAGELENS_UNROLL for (int r = 0; r < R; r++)
        PAGELENS_UNROLL for (int v = 0; v < NV; v++) add_product<D>(c[i % S][r][v], a + i * R + r, w + v * W, i % E);
  PAGELENS_UNROLL for (int s = 1; s < S; s++) PAGELENS_UNROLL for (int r = 0; r < R; r++)
      PAGELENS_UNROLL for (int v = 0; v < NV; v++) c[0][r][v] = c[0][r][v] + c[s][r][v];
  store_sums<R, NV>(c[0], acc);
}

// nullptr where one sum an output is as fast.
template <int R = 3>
TileFn split_tile_fn(DType dtype, int rows) {
  if (rows == R && partial_sums(R) > 1)
    return dtype == DType::f32 ? split_tile<DType::f32, R, partial_sums(R)>
                               : split_tile<DType::bf16, R, partial_sums(R)>;
  if constexpr (R > 1) return split_tile_fn<R - 1>(dtype, rows);
  return nullptr;
}
