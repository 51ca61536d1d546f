// Stage `gram`: E from both Gram matrices, and X C from the product of E with scaled columns.
#include "math/gram.h"

#include "cuda/launch.h"

namespace singer::cuda {
namespace {

// E = G - G_R, and the row's sums of E^2, E G and E G_R. One row of a matrix to a warp.
template <typename T>
__global__ void difference_kernel(Rows cosines, Rows targets, Output differences, T* squares_out,
                                  T* slopes, T* target_slopes, int64_t count, int64_t patches,
                                  bool aligned) {
  const int64_t row = warp_index();
  if (row >= count) return;
  T squares = 0, slope = 0, target_slope = 0;
  for_row(patches, aligned, [&](int64_t j, auto size) {
    constexpr int kCount = decltype(size)::value;
    T cosine[kCount], target[kCount];
    load(cosines, row * patches + j, cosine);
    load(targets, row * patches + j, target);
    for (int i = 0; i < kCount; ++i) {
      const T difference = cosine[i] - target[i];
      squares += difference * difference;
      slope += difference * cosine[i];
      target_slope += difference * target[i];
      cosine[i] = difference;
    }
    if (differences.data != nullptr) store(cosine, differences, row * patches + j);
  });
  squares = warp_sum(squares);
  slope = warp_sum(slope);
  target_slope = warp_sum(target_slope);
  if (!is_first_lane()) return;
  squares_out[row] = squares;
  slopes[row] = slope;
  target_slopes[row] = target_slope;
}

// out = C / n, row by row. One row to a warp.
template <typename T>
__global__ void scale_kernel(Rows columns, const T* norms, Output out, int64_t count, int64_t width,
                             bool aligned) {
  const int64_t row = warp_index();
  if (row >= count) return;
  const T inverse = reciprocal_norm(norms[row]);
  for_row(width, aligned, [&](int64_t d, auto size) {
    T values[decltype(size)::value];
    load(columns, row * width + d, values);
    for (T& value : values) value *= inverse;
    store(values, out, row * width + d);
  });
}

// out = X C, from E diag(1/n) C: see gram_gradient. One row to a warp. `tokens` and `prefix` say
// where the rows of C lie.
template <typename T>
__global__ void gradient_kernel(Rows turned, Rows columns, const T* norms, const T* slopes,
                                double scale, Output out, int64_t count, int64_t patches,
                                int64_t prefix, int64_t width, bool aligned) {
  const int64_t row = warp_index();
  if (row >= count) return;
  const T inverse = reciprocal_norm(norms[row]), radial = radial_weight(norms[row], slopes[row]);
  const int64_t column_row = row / patches * (patches + prefix) + prefix + row % patches;
  for_row(width, aligned, [&](int64_t d, auto size) {
    constexpr int kCount = decltype(size)::value;
    T values[kCount], own[kCount];
    load(turned, row * width + d, values);
    load(columns, column_row * width + d, own);
    for (int i = 0; i < kCount; ++i) {
      values[i] = gram_gradient(values[i], own[i], inverse, radial, static_cast<T>(scale));
    }
    store(values, out, row * width + d);
  });
}

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
void run_difference(const Tensor& cosines, const Tensor& targets,
                    const std::optional<Tensor>& differences, const Tensor& squares,
                    const Tensor& slopes, const Tensor& target_slopes) {
  const int64_t patches = cosines.size(2), count = cosines.size(0) * patches;
  const Output out = output_or_null(differences);
  launch<difference_kernel<T>>(count, cosines, Rows::of(cosines), Rows::of(targets), out,
         data_of<T>(squares), data_of<T>(slopes), data_of<T>(target_slopes), count, patches,
         is_aligned(patches, {cosines.const_data_ptr(), targets.const_data_ptr(), out.data}));
}

void difference(Tensor cosines, Tensor targets, std::optional<Tensor> differences, Tensor squares,
                Tensor slopes, Tensor target_slopes) {
  check_tensor("cosines", cosines, 3, cosines);
  const auto shape = shape_of(cosines);
  const ScalarType acc = acc_of("squares", squares);
  STD_TORCH_CHECK(shape[1] == shape[2], "cosines: got shape ", shape_text(shape),
                  ", expected [B, P, P]");
  check_dense("cosines", cosines, shape, cosines);
  check_dense("targets", targets, shape, cosines);
  check_dense("differences", differences, shape, cosines);
  check_dense("squares", squares, {shape[0], shape[1]}, cosines, acc);
  check_dense("slopes", slopes, {shape[0], shape[1]}, cosines, acc);
  check_dense("target_slopes", target_slopes, {shape[0], shape[1]}, cosines, acc);
  check_apart({{"differences", differences},
               {"squares", squares},
               {"slopes", slopes},
               {"target_slopes", target_slopes}},
              {{"cosines", cosines}, {"targets", targets}});
  SINGER_BY_DTYPE(acc, run_difference, cosines, targets, differences, squares, slopes,
                  target_slopes);
}

template <typename T>
void run_scale(const Tensor& columns, const Tensor& norms, const Tensor& out) {
  const int64_t width = columns.size(2), count = columns.size(0) * columns.size(1);
  launch<scale_kernel<T>>(count, columns, Rows::of(columns),
         static_cast<const T*>(norms.const_data_ptr()), Output::of(out), count, width,
         is_aligned(width, {columns.const_data_ptr(), out.const_data_ptr()}));
}

void scale(Tensor columns, Tensor norms, Tensor out) {
  check_tensor("columns", columns, 3, columns);
  const auto shape = shape_of(columns);
  const ScalarType acc = acc_of("norms", norms);
  check_dense("columns", columns, shape, columns);
  check_dense("norms", norms, {shape[0], shape[1]}, columns);
  check_dense("out", out, shape, columns);
  check_apart({{"out", out}}, {{"columns", columns}, {"norms", norms}});
  SINGER_BY_DTYPE(acc, run_scale, columns, norms, out);
}

template <typename T>
void run_gradient(const Tensor& turned, const Tensor& columns, const Tensor& norms,
                  const Tensor& slopes, double factor, const Tensor& out, int64_t prefix) {
  const int64_t patches = turned.size(1), width = turned.size(2);
  const int64_t count = turned.size(0) * patches;
  launch<gradient_kernel<T>>(count, turned, Rows::of(turned), Rows::of(columns),
         static_cast<const T*>(norms.const_data_ptr()),
         static_cast<const T*>(slopes.const_data_ptr()), factor, Output::of(out), count, patches,
         prefix, width,
         is_aligned(width, {turned.const_data_ptr(), columns.const_data_ptr(),
                            out.const_data_ptr()}));
}

void gradient(Tensor turned, Tensor columns, Tensor norms, Tensor slopes, double factor, Tensor out,
              int64_t prefix) {
  check_tensor("turned", turned, 3, turned);
  const auto shape = shape_of(turned);
  const ScalarType acc = acc_of("norms", norms);
  STD_TORCH_CHECK(prefix >= 0 && prefix < (int64_t{1} << 31), "num_prefix_tokens: got ", prefix,
                  ", expected 0 or more");
  check_dense("turned", turned, shape, turned);
  check_dense("columns", columns, {shape[0], shape[1] + prefix, shape[2]}, turned);
  check_dense("norms", norms, {shape[0], shape[1]}, turned);
  check_dense("slopes", slopes, {shape[0], shape[1]}, turned, acc);
  check_dense("out", out, shape, turned);
  check_apart({{"out", out}},
              {{"turned", turned}, {"columns", columns}, {"norms", norms}, {"slopes", slopes}});
  SINGER_BY_DTYPE(acc, run_gradient, turned, columns, norms, slopes, factor, out, prefix);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singer_kernels, SINGER_KEY, library) {
  library.impl("cuda_gram_difference", TORCH_BOX(&difference));
  library.impl("cuda_gram_scale", TORCH_BOX(&scale));
  library.impl("cuda_gram_gradient", TORCH_BOX(&gradient));
}

}  // namespace singer::cuda
