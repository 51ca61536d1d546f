// Formulas of stage `outlier`: the quantile by bitwise selection, and the gradient's coefficient.
#pragma once

#include "math/portable.h"

namespace singer {

// Sort key: norms are not negative, so their bit patterns without the sign bit have their order.
template <typename T>
struct KeyOf;

template <>
struct KeyOf<float> {
  using type = uint32_t;
  static constexpr int bits = 31;
};

template <>
struct KeyOf<double> {
  using type = uint64_t;
  static constexpr int bits = 63;
};

template <typename T>
using Key = typename KeyOf<T>::type;

// Sort key of NaN and padding: larger than any norm's.
template <typename T>
SINGER_FN Key<T> last_key() {
  return ~Key<T>(0) >> 1;
}

template <typename T>
SINGER_FN Key<T> norm_key(T norm) {
  return norm == norm ? bits_as<Key<T>>(norm) : last_key<T>();
}

// The k-th smallest key (from 0), built from its highest bit: the largest v with at most k keys
// below v. `count_below(v)` returns the number of keys below v.
template <typename T, typename CountBelow>
SINGER_FN Key<T> kth_smallest(int64_t k, CountBelow count_below) {
  Key<T> value = 0;
  for (int bit = KeyOf<T>::bits - 1; bit >= 0; --bit) {
    const Key<T> candidate = value | (Key<T>(1) << bit);
    if (count_below(candidate) <= k) value = candidate;
  }
  return value;
}

// Integer and fractional part of quantile (P - 1), rounded as by torch.quantile in that dtype.
// The product is computed in float64, exact for float32 operands: a float32 one might be fused with
// the subtraction, which would skip its rounding.
template <typename T>
struct QuantilePosition {
  int64_t below;
  double fraction;

  SINGER_FN static QuantilePosition of(double quantile, int64_t patches) {
    const double factor = static_cast<double>(static_cast<T>(quantile));
    const T position = static_cast<T>(factor * static_cast<double>(patches - 1));
    const T whole = std::floor(position);
    return {static_cast<int64_t>(whole), static_cast<double>(position - whole)};
  }
};

// lerp(low, high, fraction), from the nearer end as torch.lerp does.
template <typename T>
SINGER_FN T interpolate(T low, T high, T fraction) {
  const T gap = high - low;
  return fraction < T(0.5) ? low + fraction * gap : high - gap * (T(1) - fraction);
}

// Return whether n > q; NaN and Inf count as outliers.
template <typename T>
SINGER_FN bool is_outlier(T norm, T threshold) {
  return !(norm <= threshold && is_finite(norm));
}

// c = w (n - q)+ / n, with w = 2 / count times grad_output.
template <typename T>
SINGER_FN T outlier_coefficient(T norm, T threshold, T weight) {
  if (norm == T(0) || !is_outlier(norm, threshold)) return T(0);
  return weight * (norm - threshold) / norm;
}

}  // namespace singer
