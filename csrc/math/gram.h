// Stage `gram`: cosines, their difference, and the gradient operator
// X = 4 / (B P^2) [diag(1/n) E diag(1/n) - diag(s / n^2)].
#pragma once

#include "math/portable.h"

namespace singer {

// The smallest divisor of a row (that of torch.nn.functional.normalize).
constexpr double kNormEps = 1e-12;

// 1 / max(n, eps), and 0 where n = 0: the row is 0, and so is its gradient.
template <typename T>
SINGER_FN T reciprocal_norm(T norm) {
  const T divisor = norm < T(kNormEps) ? T(kNormEps) : norm;  // NaN stays NaN
  return norm == T(0) ? T(0) : T(1) / divisor;
}

// s / n^2; a row shorter than eps is divided by a constant and has no such term.
template <typename T>
SINGER_FN T radial_weight(T norm, T slope) {
  const T inverse = reciprocal_norm(norm);
  return norm < T(kNormEps) ? T(0) : slope * inverse * inverse;
}

// One entry of X C: `turned` is the row of E diag(1/n) C, `scale` 4 / (B P^2).
template <typename T>
SINGER_FN T gram_gradient(T turned, T column, T inverse, T radial, T scale) {
  return scale * (inverse * turned - radial * column);
}

}  // namespace singer
