// What both sides share and what callers that nvcc does not compile may see: a stream, and bfloat16 as bits, with the
// rounding of the hardware (to nearest, ties to even; NaN stays NaN).
#pragma once
#include <cstdint>
#include <cstring>
#ifdef __CUDACC__
  #include <cuda_bf16.h>
  #define SIMT_BOTH __host__ __device__ __forceinline__
#else
  #define SIMT_BOTH inline
#endif

namespace simt {

using Stream = void*;  // a cudaStream_t; the host runs every launch to its end and ignores it

struct bf16 {
  uint16_t bits;
};

SIMT_BOTH float to_float(bf16 x) {
  const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}

SIMT_BOTH float to_float(float x) { return x; }

SIMT_BOTH bf16 to_bf16(float f) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(f))};
#else
  uint32_t wide;
  memcpy(&wide, &f, 4);
  if ((wide & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(0x7fff)};  // what cvt.rn.bf16 makes of a NaN
  return {static_cast<uint16_t>((wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16)};
#endif
}

// Two values in one register, the first in the low half: how mma takes its operands.
SIMT_BOTH uint32_t pack_bf16(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
#else
  return static_cast<uint32_t>(to_bf16(high).bits) << 16 | to_bf16(low).bits;
#endif
}

SIMT_BOTH float low_bf16(uint32_t pair) { return to_float(bf16{static_cast<uint16_t>(pair)}); }
SIMT_BOTH float high_bf16(uint32_t pair) { return to_float(bf16{static_cast<uint16_t>(pair >> 16)}); }

// Two floats as one 8-byte value, for one store: g++ would make two of float2's.
SIMT_BOTH uint64_t two_floats(float low, float high) {
  uint32_t bits[2];
  memcpy(&bits[0], &low, 4);
  memcpy(&bits[1], &high, 4);
  return static_cast<uint64_t>(bits[1]) << 32 | bits[0];
}

// Stores a float as T, rounded if T is bf16.
SIMT_BOTH void put(float* to, float x) { *to = x; }
SIMT_BOTH void put(bf16* to, float x) { *to = to_bf16(x); }

}  // namespace simt
