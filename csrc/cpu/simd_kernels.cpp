// The innermost kernels, once per instruction set, and the choice among them.
#include "cpu/simd_kernels.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)  // also defined by Clang
#define SINGER_HAS_AVX
#endif

// Compile the following functions for these ISA features, up to SINGER_TARGET_END.
#define SINGER_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define SINGER_TARGET(features) \
  SINGER_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SINGER_TARGET_END SINGER_PRAGMA(clang attribute pop)
#define SINGER_AVX512 "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#else
#define SINGER_TARGET(features) SINGER_PRAGMA(GCC push_options) SINGER_PRAGMA(GCC target(features))
#define SINGER_TARGET_END SINGER_PRAGMA(GCC pop_options)
#define SINGER_AVX512 "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif

// Select elements of two vectors by index.
#ifdef __clang__
#define SINGER_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SINGER_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) < (b)){__VA_ARGS__})
#endif

// In unnamed namespaces: the linker must not merge functions of different instruction sets.
namespace singer::cpu {
namespace {
namespace baseline {
#define SINGER_VECTOR_BYTES 16
#define SINGER_TILE_ROWS 4
#include "cpu/simd_matmul.h"
#include "cpu/simd_row_kernels.h"
#undef SINGER_VECTOR_BYTES
#undef SINGER_TILE_ROWS
}  // namespace baseline
}  // namespace
}  // namespace singer::cpu

#ifdef SINGER_HAS_AVX
SINGER_TARGET("avx2,fma")
namespace singer::cpu {
namespace {
namespace avx2 {
#define SINGER_VECTOR_BYTES 32
#define SINGER_TILE_ROWS 6
#include "cpu/simd_matmul.h"
#include "cpu/simd_row_kernels.h"
#undef SINGER_VECTOR_BYTES
#undef SINGER_TILE_ROWS
}  // namespace avx2
}  // namespace
}  // namespace singer::cpu
SINGER_TARGET_END

SINGER_TARGET(SINGER_AVX512)
namespace singer::cpu {
namespace {
namespace avx512 {
#define SINGER_VECTOR_BYTES 64
#define SINGER_TILE_ROWS 12
#include "cpu/simd_matmul.h"
#include "cpu/simd_row_kernels.h"
#undef SINGER_VECTOR_BYTES
#undef SINGER_TILE_ROWS
}  // namespace avx512
}  // namespace
}  // namespace singer::cpu
SINGER_TARGET_END
#endif

namespace singer::cpu {
namespace {

bool is_same(const char* a, const char* b) { return std::strcmp(a, b) == 0; }

// The widest instruction set that the processor has and SINGER_CPU_CAPABILITY, if set, allows.
const char* cpu_capability() {
#ifdef SINGER_HAS_AVX
  const char* variable = std::getenv("SINGER_CPU_CAPABILITY");
  const char* requested = variable == nullptr ? "" : variable;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (is_same(requested, "baseline")) return "baseline";
  if (has_avx512 && !is_same(requested, "avx2")) return "avx512";
  if (has_avx2) return "avx2";
#endif
  return "baseline";
}

template <typename T>
const SimdKernels<T>& select_kernels() {
#ifdef SINGER_HAS_AVX
  if (is_same(cpu_capability(), "avx512")) return avx512::kernel_table<T>();
  if (is_same(cpu_capability(), "avx2")) return avx2::kernel_table<T>();
#endif
  return baseline::kernel_table<T>();
}

}  // namespace

template <typename T>
const SimdKernels<T>& simd_kernels() {
  static const SimdKernels<T>& selected = select_kernels<T>();
  return selected;
}

template const SimdKernels<float>& simd_kernels<float>();
template const SimdKernels<double>& simd_kernels<double>();

}  // namespace singer::cpu

// Return the instruction set of the kernels in use; for introspection.
extern "C" __attribute__((visibility("default"))) const char* singer_cpu_capability() {
  static const char* const name = singer::cpu::cpu_capability();
  return name;
}
