// In place of the CUDA runtime library: the extension that nvcc's objects are linked into hands every launch to a
// function instead of a driver. Names, grids, shared memory and argument bytes are thus those of the launch code
// itself. Only what the kernels' host code calls is here; anything else does not link.
#include <cuda_runtime_api.h>

#include <map>
#include <string>

namespace {

// name: the kernel's mangled name. arguments: where each parameter lies. Returns whether it went well.
using Launcher = int (*)(const char* name, const unsigned* grid, const unsigned* block, size_t shared,
                         void** arguments);

struct Kernel {
  std::string name;
  size_t shared_limit = 48 << 10;  // without asking
};

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;  // filled while the extension is loaded
  return all;
}
Launcher launcher = nullptr;
Configuration pending;
cudaError_t last_error = cudaSuccess;
constexpr int kMultiprocessors = 3;  // few and odd, so that blocks of persistent kernels take several tiles

cudaError_t run(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared) {
  const auto kernel = kernels().find(function);
  const unsigned sizes[2][3] = {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}};
  if (kernel == kernels().end())
    last_error = cudaErrorInvalidDeviceFunction;
  else if (shared > kernel->second.shared_limit)
    last_error = cudaErrorInvalidValue;
  else if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    last_error = cudaErrorInvalidConfiguration;
  else if (!launcher || !launcher(kernel->second.name.c_str(), sizes[0], sizes[1], shared, arguments))
    last_error = cudaErrorLaunchFailure;
  return last_error;
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void set_launcher(Launcher to) { launcher = to; }
__attribute__((visibility("default"))) size_t shared_limit = 227 << 10;  // of the device: what a kernel may ask for

// What nvcc's host code calls (crt/host_runtime.h).
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, dim3*, dim3*, int*) {
  kernels()[host].name = name;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pending = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pending.grid;
  *block = pending.block;
  *shared = pending.shared;
  *static_cast<cudaStream_t*>(stream) = pending.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return run(kernel, grid, block, arguments, shared);
}

// The runtime's own functions.
cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  return run(function, grid, block, arguments, shared);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (static_cast<size_t>(value) > shared_limit) return last_error = cudaErrorInvalidValue;
    kernels()[function].shared_limit = static_cast<size_t>(value);
  }
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    default:
      return "cudaErrorLaunchFailure";
  }
}
const char* cudaGetErrorString(cudaError_t) { return "as tools/gpu_static/cuda_runtime.cpp says"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = kMultiprocessors;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 0;
  return cudaErrorNoDevice;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int) { return cudaErrorNoDevice; }

}  // extern "C"
