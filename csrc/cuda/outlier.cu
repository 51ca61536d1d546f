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
  // 1. q.
  const T threshold = quantile_of<T>(
      lower_index, fraction, for_each, [](int64_t count) { return warp_sum(count); },
      [](Key<T> key) { return warp_min(key); });
  // 2. Sum and count the outliers.
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
