// The loops, once per vector width, and the choice among them.
#include "cpu/loops.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SINGER_WIDE_LOOPS
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
#pragma GCC push_options
#pragma GCC target("avx2,fma")
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
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
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
#pragma GCC pop_options
#endif

namespace singer::cpu {
namespace {

template <typename T>
const Loops<T>& widest() {
#ifdef SINGER_WIDE_LOOPS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512::table<T>("avx512");
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2::table<T>("avx2");
  }
#endif
  return baseline::table<T>("baseline");
}

}  // namespace

template <typename T>
const Loops<T>& loops() {
  static const Loops<T>& chosen = widest<T>();
  return chosen;
}

template const Loops<float>& loops<float>();
template const Loops<double>& loops<double>();

}  // namespace singer::cpu
