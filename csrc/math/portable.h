// Helpers to compile the formulas for both CPU and GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SINGER_FN __host__ __device__ __forceinline__
#else
#define SINGER_FN inline __attribute__((always_inline))
#endif

namespace singer {

template <typename To, typename From>
SINGER_FN To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "a bit pattern keeps its size");
  To result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

template <typename T>
SINGER_FN bool is_finite(T value) {
  return value - value == T(0);  // NaN for NaN and for infinity
}

}  // namespace singer
