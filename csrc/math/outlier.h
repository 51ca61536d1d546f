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

// The quantile of an image's norms by bitwise selection; NaN if any norm is. `below` and `fraction`:
// its QuantilePosition. `for_each(body)` calls body(norm) for this lane's norms, all of them on a
// CPU; `sum` and `min` reduce a value over the lanes.
template <typename T, typename ForEach, typename Sum, typename Min>
SINGER_FN T quantile_of(int64_t below, double fraction, const ForEach& for_each, const Sum& sum,
                        const Min& min) {
  int64_t nans = 0;
  for_each([&](T norm) { nans += norm != norm; });
  if (sum(nans) > 0) return bits_as<T>(last_key<T>());
  // 1. The norm at the integer part of the quantile's position.
  const Key<T> low = kth_smallest<T>(below, [&](Key<T> key) {
    int64_t count = 0;
    for_each([&](T norm) { count += norm_key(norm) < key; });
    return sum(count);
  });
  // 2. The next larger norm, and the quantile between both.
  int64_t count_through = 0;
  Key<T> next = last_key<T>();
  for_each([&](T norm) {
    const Key<T> key = norm_key(norm);
    count_through += key <= low;
    if (key > low && key < next) next = key;
  });
  const bool is_between = fraction > 0 && sum(count_through) <= below + 1;
  const Key<T> high = is_between ? min(next) : low;
  return interpolate(bits_as<T>(low), bits_as<T>(high), static_cast<T>(fraction));
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
