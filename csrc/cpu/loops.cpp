// The loops, once per vector width, and the choice among them.
#include "cpu/loops.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)  // Clang says so too
#define SINGER_WIDE_LOOPS
#endif

// What the functions after it may use of a processor, until SINGER_ANY_PROCESSOR.
#define SINGER_PRAGMA(text) _Pragma(#text)
#ifdef __clang__
#define SINGER_TARGET(features) \
  SINGER_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SINGER_ANY_PROCESSOR SINGER_PRAGMA(clang attribute pop)
#define SINGER_AVX512 "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#else
#define SINGER_TARGET(features) SINGER_PRAGMA(GCC push_options) SINGER_PRAGMA(GCC target(features))
#define SINGER_ANY_PROCESSOR SINGER_PRAGMA(GCC pop_options)
#define SINGER_AVX512 "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif

// Two vectors' numbers in another order.
#ifdef __clang__
#define SINGER_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SINGER_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) < (b)){__VA_ARGS__})
#endif

// Each in an unnamed namespace: two widths must never be taken for one function by the linker.
namespace singer::cpu {
namespace {
namespace baseline {
#define SINGER_BYTES 16
#define SINGER_ROWS 4
#include "cpu/products_body.h"
#include "cpu/loops_body.h"
#undef SINGER_BYTES
#undef SINGER_ROWS
}  // namespace baseline
}  // namespace
}  // namespace singer::cpu

#ifdef SINGER_WIDE_LOOPS
SINGER_TARGET("avx2,fma")
namespace singer::cpu {
namespace {
namespace avx2 {
#define SINGER_BYTES 32
#define SINGER_ROWS 6
#include "cpu/products_body.h"
#include "cpu/loops_body.h"
#undef SINGER_BYTES
#undef SINGER_ROWS
}  // namespace avx2
}  // namespace
}  // namespace singer::cpu
SINGER_ANY_PROCESSOR

SINGER_TARGET(SINGER_AVX512)
namespace singer::cpu {
namespace {
namespace avx512 {
#define SINGER_BYTES 64
#define SINGER_ROWS 12
#include "cpu/products_body.h"
#include "cpu/loops_body.h"
#undef SINGER_BYTES
#undef SINGER_ROWS
}  // namespace avx512
}  // namespace
}  // namespace singer::cpu
SINGER_ANY_PROCESSOR
#endif

namespace singer::cpu {
namespace {

bool is_same(const char* a, const char* b) { return std::strcmp(a, b) == 0; }

// The widest that the processor has or, for tests, that SINGER_CPU_VECTORS allows.
const char* widest() {
#ifdef SINGER_WIDE_LOOPS
  const char* wanted = std::getenv("SINGER_CPU_VECTORS");
  const char* most = wanted == nullptr ? "" : wanted;
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (is_same(most, "baseline")) return "baseline";
  if (has_avx512 && !is_same(most, "avx2")) return "avx512";
  if (has_avx2) return "avx2";
#endif
  return "baseline";
}

template <typename T>
const Loops<T>& chosen() {
#ifdef SINGER_WIDE_LOOPS
  if (is_same(widest(), "avx512")) return avx512::table<T>();
  if (is_same(widest(), "avx2")) return avx2::table<T>();
#endif
  return baseline::table<T>();
}

}  // namespace

template <typename T>
const Loops<T>& loops() {
  static const Loops<T>& result = chosen<T>();
  return result;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();

}  // namespace singer::cpu

// The vectors that the loops were chosen for; for introspection.
extern "C" __attribute__((visibility("default"))) const char* singer_cpu_vectors() {
  static const char* const name = singer::cpu::widest();
  return name;
}
