// Stage `outlier`: each image's quantile by bitwise selection, and its share of the loss.
#include "math/outlier.h"

#include "cpu/stages.h"

namespace singer::cpu {
namespace {

template <typename T>
T threshold_of(const T* norms, int64_t patches, double quantile) {
  bool has_nan = false;
  for (int64_t i = 0; i < patches; ++i) has_nan |= norms[i] != norms[i];
  if (has_nan) return bits_as<T>(last_key<T>());
  const auto rank = Rank<T>::of(quantile, patches);
  const auto count_below = [&](Key<T> key) {
    int64_t count = 0;
    for (int64_t i = 0; i < patches; ++i) count += norm_key(norms[i]) < key;
    return count;
  };
  const Key<T> low = kth_smallest<T>(rank.below, count_below);
  int64_t through = 0;
  Key<T> next = last_key<T>();
  for (int64_t i = 0; i < patches; ++i) {
    const Key<T> key = norm_key(norms[i]);
    through += key <= low;
    if (key > low && key < next) next = key;
  }
  const bool is_between = rank.share > 0 && through <= rank.below + 1;
  const Key<T> high = is_between ? next : low;
  return interpolate(bits_as<T>(low), bits_as<T>(high), static_cast<T>(rank.share));
}

}  // namespace

template <typename T>
void outlier(const OutlierCall<T>& call) {
  parallel(call.images, 64 * call.patches, [&](int64_t image) {
    const T* norms = call.norms + image * call.patches;
    const T threshold = threshold_of(norms, call.patches, call.quantile);
    T squares = 0;
    int64_t count = 0;
    for (int64_t i = 0; i < call.patches; ++i) {
      if (!is_outlier(norms[i], threshold)) continue;
      const T excess = norms[i] - threshold;
      squares += excess * excess;
      ++count;
    }
    call.threshold[image] = threshold;
    call.squares[image] = squares;
    call.counts[image] = static_cast<T>(count);
  });
}

template void outlier(const OutlierCall<float>&);
template void outlier(const OutlierCall<double>&);

}  // namespace singer::cpu
