// Device functions, launches and argument checks shared by the CUDA kernels.
//
// Each warp processes one row. With SINGER_EMULATED, for tests without a GPU, the kernels compile
// as plain C++: a warp has one lane, and a launch is a loop, or a call of `Launcher::current`.
#pragma once

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "cuda/registry.h"
#include "math/portable.h"

#ifdef SINGER_EMULATED
#define __global__ static
struct Index {
  unsigned x;
};
static Index blockIdx, blockDim, threadIdx;
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/csrc/stable/accelerator.h>

// Defined by torch's CUDA library; weak, so that the extension loads without it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** stream);
#endif

namespace singer::cuda {

#ifdef SINGER_EMULATED
constexpr int kLanes = 1;
#define SINGER_DEVICE inline
#define SINGER_KEY CPU
#else
constexpr int kLanes = 32;
#define SINGER_DEVICE __device__ __forceinline__
#define SINGER_KEY CUDA
#endif
#ifdef SINGER_EMULATED
// What launches kernels in place of the loop: a function of the kernel's name, the number of blocks
// and the addresses of its arguments.
struct Launcher {
  using Function = void (*)(const char* name, int64_t blocks, void** arguments);
  static inline Function current = nullptr;

  template <typename... Parameters, typename... Arguments>
  static void call(void (*)(Parameters...), const Kernel& kernel, int64_t blocks,
                   const Arguments&... arguments) {
    std::tuple<Parameters...> values(arguments...);
    std::apply(
        [&](auto&... value) {
          void* addresses[] = {&value...};
          current(kernel.name.c_str(), blocks, addresses);
        },
        values);
  }
};
#endif

constexpr int kWarps = 4;  // per block
constexpr int kThreads = kLanes * kWarps;

// Elements per vectorised access: 16 bytes of a 16-bit dtype.
constexpr int kVector = 8;

// An input of any supported dtype.
struct Rows {
  const void* data;
  ScalarType dtype;
};

// An output of any supported dtype.
struct Output {
  void* data;
  ScalarType dtype;
};

// Kernel arguments of a tensor; the data is null if there is none.
inline Rows rows_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {nullptr, ScalarType::Float};
  return {tensor->const_data_ptr(), tensor->scalar_type()};
}
inline Output output_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {nullptr, ScalarType::Float};
  return {tensor->mutable_data_ptr(), tensor->scalar_type()};
}

SINGER_DEVICE float narrow_to_float(uint16_t bits, bool is_bfloat16) {
  if (is_bfloat16) return bits_as<float>(static_cast<uint32_t>(bits) << 16);
#ifdef SINGER_EMULATED
  return static_cast<float>(bits_as<_Float16>(bits));
#else
  return __half2float(__ushort_as_half(bits));
#endif
}

SINGER_DEVICE uint16_t float_to_narrow(float value, bool is_bfloat16) {
#ifdef SINGER_EMULATED
  if (!is_bfloat16) return bits_as<uint16_t>(static_cast<_Float16>(value));
  const uint32_t bits = bits_as<uint32_t>(value);
  if (value != value) return 0x7FC0u;
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
#else
  if (is_bfloat16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return __half_as_ushort(__float2half_rn(value));
#endif
}

// The 2, 4, 8 or 16 bytes of one access: words, as single bytes would be taken apart one by one.
#ifdef SINGER_EMULATED
template <int kBytes>
struct [[gnu::may_alias]] alignas(kBytes) Chunk {
  uint16_t words[kBytes / 2];
};
#else
template <int kBytes>
using Chunk = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
#endif

// Store a chunk by one access; the compiler may divide an assignment.
template <typename C>
SINGER_DEVICE void store_chunk(C* to, const C& chunk) {
#ifdef SINGER_EMULATED
  *to = chunk;
#else
  __stwb(to, chunk);
#endif
}

// Load kCount elements from `offset` on, as T; if kCount > 1 the address is 16-byte aligned.
template <int kCount, typename T>
SINGER_DEVICE void load(const Rows& rows, int64_t offset, T (&out)[kCount]) {
  constexpr int kWide = kCount == 1 ? 1 : 2;  // 8-byte elements per load
  if (rows.dtype == ScalarType::Double) {
    const auto* from = reinterpret_cast<const Chunk<8 * kWide>*>(
        static_cast<const double*>(rows.data) + offset);
    for (int i = 0; i < kCount / kWide; ++i) {
      const Chunk<8 * kWide> chunk = from[i];
      double values[kWide];
      memcpy(values, &chunk, sizeof(values));
      for (int j = 0; j < kWide; ++j) out[i * kWide + j] = static_cast<T>(values[j]);
    }
  } else if (rows.dtype == ScalarType::Float) {
    constexpr int kFloats = 2 * kWide > kCount ? kCount : 2 * kWide;
    const auto* from = reinterpret_cast<const Chunk<4 * kFloats>*>(
        static_cast<const float*>(rows.data) + offset);
    for (int i = 0; i < kCount / kFloats; ++i) {
      const Chunk<4 * kFloats> chunk = from[i];
      float values[kFloats];
      memcpy(values, &chunk, sizeof(values));
      for (int j = 0; j < kFloats; ++j) out[i * kFloats + j] = static_cast<T>(values[j]);
    }
  } else {
    const bool is_bfloat16 = rows.dtype == ScalarType::BFloat16;
    const Chunk<2 * kCount> chunk = *reinterpret_cast<const Chunk<2 * kCount>*>(
        static_cast<const uint16_t*>(rows.data) + offset);
    uint16_t values[kCount];
    memcpy(values, &chunk, sizeof(values));
    for (int j = 0; j < kCount; ++j) {
      out[j] = static_cast<T>(narrow_to_float(values[j], is_bfloat16));
    }
  }
}

// Store kCount elements, rounded to the output's dtype; alignment as in load.
template <int kCount, typename T>
SINGER_DEVICE void store(const T (&in)[kCount], const Output& out, int64_t offset) {
  if (out.dtype == ScalarType::Double) {
    constexpr int kWide = kCount == 1 ? 1 : 2;
    auto* to = reinterpret_cast<Chunk<8 * kWide>*>(static_cast<double*>(out.data) + offset);
    for (int i = 0; i < kCount / kWide; ++i) {
      double values[kWide];
      for (int j = 0; j < kWide; ++j) values[j] = static_cast<double>(in[i * kWide + j]);
      Chunk<8 * kWide> chunk;
      memcpy(&chunk, values, sizeof(values));
      store_chunk(to + i, chunk);
    }
  } else if (out.dtype == ScalarType::Float) {
    constexpr int kFloats = kCount == 1 ? 1 : 4;
    auto* to = reinterpret_cast<Chunk<4 * kFloats>*>(static_cast<float*>(out.data) + offset);
    for (int i = 0; i < kCount / kFloats; ++i) {
      float values[kFloats];
      for (int j = 0; j < kFloats; ++j) values[j] = static_cast<float>(in[i * kFloats + j]);
      Chunk<4 * kFloats> chunk;
      memcpy(&chunk, values, sizeof(values));
      store_chunk(to + i, chunk);
    }
  } else {
    const bool is_bfloat16 = out.dtype == ScalarType::BFloat16;
    uint16_t values[kCount];
    for (int j = 0; j < kCount; ++j) {
      values[j] = float_to_narrow(static_cast<float>(in[j]), is_bfloat16);
    }
    Chunk<2 * kCount> chunk;
    memcpy(&chunk, values, sizeof(values));
    auto* to = reinterpret_cast<Chunk<2 * kCount>*>(static_cast<uint16_t*>(out.data) + offset);
    store_chunk(to, chunk);
  }
}

// Call `body(position, count)` for this lane's positions of a row: kVector elements at a time if
// every row is 16-byte aligned, else one at a time.
template <typename Body>
SINGER_DEVICE void for_row(int64_t width, bool is_aligned, const Body& body) {
  const int lane = threadIdx.x % kLanes;
  if (is_aligned) {
    for (int64_t d = lane * kVector; d < width; d += kLanes * kVector) {
      body(d, std::integral_constant<int, kVector>());
    }
  } else {
    for (int64_t d = lane; d < width; d += kLanes) body(d, std::integral_constant<int, 1>());
  }
}

// The same for rows of any width: vectors between the multiples of kVector among the elements'
// offsets, the up to 2 (kVector - 1) elements around them one at a time. Every tensor that `body`
// accesses has the row at this `offset`; `is_aligned`: they start at 16-byte boundaries.
template <typename Body>
SINGER_DEVICE void for_row_at(int64_t offset, int64_t width, bool is_aligned, const Body& body) {
  const int lane = threadIdx.x % kLanes;
  int64_t begin = width, count = 0;  // of the vectors
  if (is_aligned) {
    begin = (kVector - offset % kVector) % kVector;
    if (begin > width) begin = width;
    count = (width - begin) / kVector * kVector;
  }
  for (int64_t d = lane * kVector; d < count; d += kLanes * kVector) {
    body(begin + d, std::integral_constant<int, kVector>());
  }
  for (int64_t d = lane; d < width - count; d += kLanes) {
    body(d < begin ? d : d + count, std::integral_constant<int, 1>());
  }
}

// Sum over the warp's lanes, returned in every lane, in a fixed order (deterministic).
template <typename T>
SINGER_DEVICE T warp_sum(T value) {
#ifndef SINGER_EMULATED
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  }
#endif
  return value;
}

template <typename T>
SINGER_DEVICE T warp_min(T value) {
#ifndef SINGER_EMULATED
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(0xFFFFFFFFu, value, offset);
    value = other < value ? other : value;
  }
#endif
  return value;
}

SINGER_DEVICE int64_t warp_index() {
  return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
}

SINGER_DEVICE bool is_first_lane() { return threadIdx.x % kLanes == 0; }

// Return whether rows of that width can be accessed as vectors in all these tensors.
inline bool is_aligned(int64_t width, std::initializer_list<const void*> starts) {
  bool result = width % kVector == 0;
  for (const void* start : starts) result &= reinterpret_cast<uintptr_t>(start) % 16 == 0;
  return result;
}

// Launch a kernel with one warp per row, for `count` rows, on the device's current stream.
template <auto kKernel, typename... Arguments>
void launch(int64_t count, const Tensor& like, const Arguments&... arguments) {
  const Kernel& kernel = Registered<kKernel>::entry;
  if (count == 0) return;
  const int64_t blocks = (count + kWarps - 1) / kWarps;
  STD_TORCH_CHECK(blocks <= 0x7FFFFFFF, kernel.name, ": got ", count,
                  " rows, more than a grid has");
#ifdef SINGER_EMULATED
  if (Launcher::current != nullptr) return Launcher::call(kKernel, kernel, blocks, arguments...);
  blockDim.x = kThreads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kKernel(arguments...);
  }
#else
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  kKernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel.name, " could not be launched: ",
                  cudaGetErrorString(error));
#endif
}

// An argument's name and its tensor, null if there is none.
struct Named {
  const char* name;
  const Tensor* tensor;

  Named(const char* name, const Tensor& tensor) : name(name), tensor(&tensor) {}
  Named(const char* name, const std::optional<Tensor>& tensor)
      : name(name), tensor(tensor.has_value() ? &*tensor : nullptr) {}
};

// Check that no output overlaps another tensor of the call in memory; all are contiguous.
inline void check_apart(std::initializer_list<Named> outputs, std::initializer_list<Named> inputs) {
  struct Range {
    const char* name;
    uintptr_t begin, end;
  };
  std::vector<Range> ranges;
  const auto add = [&](const Named& named, const void* data) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    ranges.push_back({named.name, begin,
                      begin + named.tensor->numel() * named.tensor->element_size()});
  };
  for (const Named& named : outputs) {  // mutable_data_ptr resolves copy-on-write first
    if (named.tensor != nullptr) add(named, named.tensor->mutable_data_ptr());
  }
  const size_t written = ranges.size();
  for (const Named& named : inputs) {
    if (named.tensor != nullptr) add(named, named.tensor->const_data_ptr());
  }
  for (size_t i = 0; i < written; ++i) {
    for (size_t j = i + 1; j < ranges.size(); ++j) {
      const Range &own = ranges[i], &other = ranges[j];
      STD_TORCH_CHECK(std::max(own.begin, other.begin) >= std::min(own.end, other.end), own.name,
                      ": shares memory with ", other.name);
    }
  }
}

// Call `function` with a value of the accumulation type, float or double.
template <typename Function>
void dispatch(ScalarType acc, const Function& function) {
  if (acc == ScalarType::Double) {
    function(double{});
  } else {
    function(float{});
  }
}

}  // namespace singer::cuda
