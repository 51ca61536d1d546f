// Stage `outlier`: each image's quantile by bitwise selection, and its sums for the loss.
#include "math/outlier.h"

#include "cpu/stages.h"

namespace singer::cpu {
namespace {

// Return the quantile of an image's norms [P]; NaN if any norm is.
template <typename T>
T threshold_of(const T* norms, int64_t patches, double quantile) {
  bool has_nan = false;
  for (int64_t i = 0; i < patches; ++i) has_nan |= norms[i] != norms[i];
  if (has_nan) return bits_as<T>(last_key<T>());
  // 1. The norm at the integer part of the quantile's position: bitwise selection.
  const auto position = QuantilePosition<T>::of(quantile, patches);
  const auto count_below = [&](Key<T> key) {
    int64_t count = 0;
    for (int64_t i = 0; i < patches; ++i) count += norm_key(norms[i]) < key;
    return count;
  };
  const Key<T> low = kth_smallest<T>(position.below, count_below);
  // 2. The next larger norm, and the quantile between both.
  int64_t count_through = 0;
  Key<T> next = last_key<T>();
  for (int64_t i = 0; i < patches; ++i) {
    const Key<T> key = norm_key(norms[i]);
    count_through += key <= low;
    if (key > low && key < next) next = key;
  }
  const bool is_between = position.fraction > 0 && count_through <= position.below + 1;
  const Key<T> high = is_between ? next : low;
  return interpolate(bits_as<T>(low), bits_as<T>(high), static_cast<T>(position.fraction));
}

}  // namespace

template <typename T>
void outlier(const T* norms, int64_t images, int64_t patches, double quantile, T* threshold,
             T* squares, T* counts) {
  parallel(images, 64 * patches, [&](int64_t image) {
    const T* own = norms + image * patches;
    const T limit = threshold_of(own, patches, quantile);
    T sum = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < patches; ++i) {
      if (!is_outlier(own[i], limit)) continue;
      const T excess = own[i] - limit;
      sum += excess * excess;
      ++count;
    }
    threshold[image] = limit;
    squares[image] = sum;
    counts[image] = static_cast<T>(count);
  });
}

template void outlier(const float*, int64_t, int64_t, double, float*, float*, float*);
template void outlier(const double*, int64_t, int64_t, double, double*, double*, double*);

}  // namespace singer::cpu
