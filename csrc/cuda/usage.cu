// Resources of each kernel on a device, read by singer_kernels/extension.py.
#include "cuda/launch.h"

namespace singer::cuda {

const Kernel* Kernel::first = nullptr;

namespace {

// Fields in the order of singer_kernels.extension.KernelUsage.
struct Usage {
  int32_t registers;  // per thread
  int32_t local;      // bytes per thread: spilled registers and local arrays
  int32_t shared;     // bytes per block
  int32_t blocks;     // resident per multiprocessor
  int32_t warps;      // of those blocks
  int32_t max_warps;  // that a multiprocessor can hold
};

const Kernel* kernel_at(int32_t index) {
  const Kernel* kernel = Kernel::first;
  for (; kernel != nullptr && index > 0; --index) kernel = kernel->next;
  return kernel;
}

#ifndef SINGER_EMULATED
// Set the thread's current device for this scope.
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
  int blocks = 0, max_threads = 0;
  cudaError_t error = cudaFuncGetAttributes(&attributes, function);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, function, kThreads, 0);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&max_threads, cudaDevAttrMaxThreadsPerMultiProcessor, device);
  }
  if (error != cudaSuccess) return error;
  usage = {attributes.numRegs,
           static_cast<int32_t>(attributes.localSizeBytes),
           static_cast<int32_t>(attributes.sharedSizeBytes),
           blocks,
           blocks * kWarps,
           max_threads / kLanes};
  return cudaSuccess;
}
#endif

}  // namespace

#define SINGER_EXPORT extern "C" __attribute__((visibility("default")))

#ifdef SINGER_EMULATED
// Set what launches kernels; null: a loop over their lanes.
SINGER_EXPORT void singer_cuda_set_launcher(Launcher::Function launcher) {
  Launcher::current = launcher;
}
#endif

// Return the kernel's name; null past the last.
SINGER_EXPORT const char* singer_cuda_kernel_name(int32_t index) {
  const Kernel* kernel = kernel_at(index);
  return kernel == nullptr ? nullptr : kernel->name.c_str();
}

// Write a kernel's resources on a device and return null, or return an error message.
SINGER_EXPORT const char* singer_cuda_kernel_usage(int32_t index, int32_t device, Usage* usage) {
  const Kernel* kernel = kernel_at(index);
  if (kernel == nullptr) return "there is no such kernel";
#ifdef SINGER_EMULATED
  return "the kernels are compiled as plain C++";
#else
  const cudaError_t error = read_usage(kernel->function, device, *usage);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // clear it: the next launch would report it
  return cudaGetErrorString(error);
#endif
}

}  // namespace singer::cuda
