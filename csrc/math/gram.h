// Formulas of stage `gram`: row normalisation and the gradient operator
// X = 4 / (B P^2) [diag(1/n) E diag(1/n) - diag(s / n^2)].
#pragma once

#include "math/portable.h"

namespace singer {

// Smallest denominator of the row normalisation (that of torch.nn.functional.normalize).
constexpr double kNormEps = 1e-12;

// 1 / max(n, eps); 0 where n = 0, so that a zero row has gradient 0.
template <typename T>
SINGER_FN T reciprocal_norm(T norm) {
  const T divisor = norm < T(kNormEps) ? T(kNormEps) : norm;  // NaN stays NaN
  return norm == T(0) ? T(0) : T(1) / divisor;
}

// s / n^2, the gradient through the norm; 0 where n < eps, as the denominator is constant there.
template <typename T>
SINGER_FN T gram_norm_coefficient(T norm, T row_dot) {
  const T inv_norm = reciprocal_norm(norm);
  return norm < T(kNormEps) ? T(0) : row_dot * inv_norm * inv_norm;
}

// One entry of X C: `product` is that of E diag(1/n) C, `factor` that of C, `inv_norm` 1/n, `scale`
// 4 / (B P^2).
template <typename T>
SINGER_FN T gram_gradient(T product, T factor, T inv_norm, T norm_grad_coef, T scale) {
  return scale * (inv_norm * product - norm_grad_coef * factor);
}

}  // namespace singer
