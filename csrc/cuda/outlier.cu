// Stage `outlier`: each image's quantile by bitwise selection, and its sums for the loss.
#include "math/outlier.h"

#include "cuda/launch.h"

namespace singer::cuda {
namespace {

// q, the sum of (n - q)^2 over the outliers and their count, per image. One warp per image.
// all_norms = n: [B, P]; threshold_out = q, squares_out, counts: [B].
template <typename T>
__global__ void outlier_kernel(const T* all_norms, T* threshold_out, T* squares_out, T* counts,
                               int64_t images, int64_t patches, int64_t lower_index,
                               double fraction) {
  const int64_t image = warp_index();
  if (image >= images) return;
  const T* norms = all_norms + image * patches;
  const int lane = threadIdx.x % kLanes;
  const auto for_each = [&](auto body) {
    for (int64_t i = lane; i < patches; i += kLanes) body(norms[i]);
  };
  // 1. The norm at the integer part of the quantile's position: bitwise selection.
  int64_t nans = 0;
  for_each([&](T norm) { nans += norm != norm; });
  const Key<T> low = kth_smallest<T>(lower_index, [&](Key<T> key) {
    int64_t count = 0;
    for_each([&](T norm) { count += norm_key(norm) < key; });
    return warp_sum(count);
  });
  // 2. The next larger norm, and q between both; NaN if any norm is.
  int64_t count_through = 0;
  Key<T> next = last_key<T>();
  for_each([&](T norm) {
    const Key<T> key = norm_key(norm);
    count_through += key <= low;
    if (key > low && key < next) next = key;
  });
  count_through = warp_sum(count_through);
  next = warp_min(next);
  const Key<T> high = fraction > 0 && count_through <= lower_index + 1 ? next : low;
  T threshold = interpolate(bits_as<T>(low), bits_as<T>(high), static_cast<T>(fraction));
  if (warp_sum(nans) > 0) threshold = bits_as<T>(last_key<T>());
  // 3. Sum and count the outliers.
  T squares = 0;
  int64_t count = 0;
  for_each([&](T norm) {
    if (!is_outlier(norm, threshold)) return;
    squares += (norm - threshold) * (norm - threshold);
    ++count;
  });
  squares = warp_sum(squares);
  count = warp_sum(count);
  if (!is_first_lane()) return;
  threshold_out[image] = threshold;
  squares_out[image] = squares;
  counts[image] = static_cast<T>(count);
}

void outlier(Tensor norms, double quantile, Tensor threshold, Tensor squares, Tensor counts) {
  check_tensor("norms", norms, 2, norms);
  const auto shape = shape_of(norms);
  const ScalarType acc = acc_of("norms", norms);
  STD_TORCH_CHECK(norms.numel() > 0, "norms: got the empty shape ", shape_text(shape));
  STD_TORCH_CHECK(quantile >= 0 && quantile <= 1, "quantile: got ", quantile, ", expected 0 to 1");
  check_dense("norms", norms, shape, norms);
  check_dense("threshold", threshold, {shape[0]}, norms, acc);
  check_dense("squares", squares, {shape[0]}, norms, acc);
  check_dense("counts", counts, {shape[0]}, norms, acc);
  check_apart({{"threshold", threshold}, {"squares", squares}, {"counts", counts}},
              {{"norms", norms}});
  dispatch(acc, [&](auto zero) {
    using T = decltype(zero);
    const auto position = QuantilePosition<T>::of(quantile, shape[1]);
    launch<outlier_kernel<T>>(shape[0], norms, data_or_null<T>(norms), data_of<T>(threshold),
                              data_of<T>(squares), data_of<T>(counts), shape[0], shape[1],
                              position.below, position.fraction);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singer_kernels, SINGER_KEY, library) {
  library.impl("cuda_outlier", TORCH_BOX(&outlier));
}

}  // namespace singer::cuda
