// Formulas of stage `backward`: dS = a (S - F^), V = X H + c H and
// dH = X Z + c Z + a (F^ - S) Wu^T + Y Wu^T.
#pragma once

#include "math/portable.h"

namespace singer {

// a = 2 / (B T D) times grad_output.
template <typename T>
SINGER_FN T kd_scale(int64_t images, int64_t tokens, int64_t width, T grad_output) {
  const T count = static_cast<T>(images) * static_cast<T>(tokens) * static_cast<T>(width);
  return grad_output * (T(2) / count);
}

// One entry of dS = a (S - F^).
template <typename T>
SINGER_FN T student_gradient(T student, T refined, T scale) {
  return scale * (student - refined);
}

}  // namespace singer
