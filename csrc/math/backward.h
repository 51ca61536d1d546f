// Stage `backward`: dS = a (S - F^), dH = X Z + c Z + a (F^ - S) Wu^T + Y Wu^T, V = X H + c H.
#pragma once

#include "math/portable.h"

namespace singer {

// a = 2 / (B T D), times the upstream gradient.
template <typename T>
SINGER_FN T kd_scale(int64_t images, int64_t tokens, int64_t width, T upstream) {
  const T count = static_cast<T>(images) * static_cast<T>(tokens) * static_cast<T>(width);
  return upstream * (T(2) / count);
}

template <typename T>
SINGER_FN T student_gradient(T student, T refined, T scale) {
  return scale * (student - refined);
}

}  // namespace singer
