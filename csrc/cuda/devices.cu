// What there is to run on.
#include "cuda/kernels.h"
#include "simt/simt.h"

namespace pagelens::cuda {

#ifdef __CUDACC__
Devices devices() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // or the next launch would report it
  if (error != cudaSuccess) return {0, std::string("no GPU: ") + cudaGetErrorString(error)};
  if (!count) return {0, "no GPU: the driver sees none"};
  int current = 0;
  cudaDeviceProp properties;
  if (cudaGetDevice(&current) != cudaSuccess || cudaGetDeviceProperties(&properties, current) != cudaSuccess) {
    cudaGetLastError();
    return {0, "no GPU: device " + std::to_string(current) + " does not answer"};
  }
  return {count, std::string(properties.name) + ", sm_" + std::to_string(properties.major * 10 + properties.minor)};
}
#else
Devices devices() { return {1, "this CPU, through csrc/simt"}; }
#endif

}  // namespace pagelens::cuda
