// One kernel source for two compilers: nvcc builds it for the card, g++ for the tests. A kernel includes only this
// header; the program that tests it, runtime.h too.
//
// Under nvcc (device.h) the names below are thin wrappers over PTX. Under g++ (host.h) they are the same names on a
// runtime that runs every CUDA thread as a fiber, and finds races, divergence and wrong waits. docs/simt.md tells what
// is checked, what is not, and how to test a kernel with it.
//
// A kernel may use: threadIdx, blockIdx, blockDim, gridDim; __syncthreads, __syncwarp; __shfl[_xor,_up,_down]_sync of
// 4-byte types, __ballot_sync, __any_sync, __all_sync, __reduce_or_sync; atomicAdd, atomicMax; the functions of
// device.h; CUDA's float functions. Shared memory is dynamic only: shared_memory(). Static __shared__ arrays do not
// compile under g++: they could be given neither exact bounds nor poison.
#pragma once
#ifdef __CUDACC__
  #include "simt/device.h"
#else
  #include "simt/host.h"
#endif
