// What each kernel takes of a device; singer_kernels/extension.py asks for it.
#include "cuda/launch.h"

namespace singer::cuda {

const Kernel* Kernel::first = nullptr;

namespace {

// In the order of singer_kernels.extension.KernelUsage.
struct Usage {
  int32_t registers;   // of a thread
  int32_t local;       // bytes of a thread's own memory: what is spilled, and arrays
  int32_t shared;      // bytes of a block
  int32_t blocks;      // that a multiprocessor holds at once
  int32_t warps;       // of those blocks
  int32_t most_warps;  // that it holds of any kernel
};

const Kernel* kernel_at(int32_t index) {
  const Kernel* kernel = Kernel::first;
  for (; kernel != nullptr && index > 0; --index) kernel = kernel->next;
  return kernel;
}

#ifndef SINGER_EMULATED
// Makes a device the thread's current one; the one before is so again at the end.
class OnDevice {
 public:
  explicit OnDevice(int device) : error(cudaGetDevice(&before_)) {
    if (error == cudaSuccess) error = cudaSetDevice(device);
  }
  ~OnDevice() {
    if (error == cudaSuccess) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

  cudaError_t error;

 private:
  int before_ = 0;
};

cudaError_t read_usage(const void* function, int device, Usage& usage) {
  const OnDevice current(device);
  if (current.error != cudaSuccess) return current.error;
  cudaFuncAttributes attributes;
  int blocks = 0, most_threads = 0;
  cudaError_t error = cudaFuncGetAttributes(&attributes, function);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, kThreads, 0);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most_threads, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  }
  if (error != cudaSuccess) return error;
  usage = {attributes.numRegs,
           static_cast<int32_t>(attributes.localSizeBytes),
           static_cast<int32_t>(attributes.sharedSizeBytes),
           blocks,
           blocks * kWarps,
           most_threads / kLanes};
  return cudaSuccess;
}
#endif

}  // namespace

#define SINGER_EXPORT extern "C" __attribute__((visibility("default")))

// The kernel's name; null past the last.
SINGER_EXPORT const char* singer_cuda_kernel_name(int32_t index) {
  const Kernel* kernel = kernel_at(index);
  return kernel == nullptr ? nullptr : kernel->name.c_str();
}

// Writes what a kernel takes on a device, and returns null; or returns why it can't be told.
SINGER_EXPORT const char* singer_cuda_kernel_usage(int32_t index, int32_t device, Usage* usage) {
  const Kernel* kernel = kernel_at(index);
  if (kernel == nullptr) return "there is no such kernel";
#ifdef SINGER_EMULATED
  return "the kernels are compiled as plain C++";
#else
  const cudaError_t error = read_usage(kernel->function, device, *usage);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // the next launch is not to be blamed for it
  return cudaGetErrorString(error);
#endif
}

}  // namespace singer::cuda
