// Stage `outlier`: each image's quantile by bitwise selection, and its sums for the loss.
#include "math/outlier.h"

#include "cpu/stages.h"

namespace singer::cpu {
template <typename T>
void outlier(const T* norms, int64_t images, int64_t patches, double quantile, T* threshold,
             T* squares, T* counts) {
  const auto position = QuantilePosition<T>::of(quantile, patches);
  const auto itself = [](auto value) { return value; };
  parallel(images, 64 * patches, [&](int64_t image) {
    const T* own = norms + image * patches;
    const auto for_each = [&](auto body) {
      for (int64_t i = 0; i < patches; ++i) body(own[i]);
    };
    const T limit =
        quantile_of<T>(position.below, position.fraction, for_each, itself, itself);
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
