// Stage `gram`: E from both Gram matrices, and X C from the product E diag(1/n) C.
#include "math/gram.h"

#include "cuda/launch.h"

namespace singer::cuda {
namespace {

// E = G - G_R, and per row the sums of E^2, E * G and E * G_R. One warp per row of a matrix.
// gram = G, target_gram = G_R and difference_out = E: [B, P, P]; squares_out, row_dots =
// rowsum(E * G) and target_row_dots = rowsum(E * G_R): [B, P].
template <typename T>
__global__ void gram_difference_kernel(Rows gram, Rows target_gram, Output difference_out,
                                       T* squares_out, T* row_dots, T* target_row_dots,
                                       int64_t count, int64_t patches, bool aligned) {
  const int64_t row = warp_index();
  if (row >= count) return;
  // 1. E, and this lane's part of the sums.
  T squares = 0, row_dot = 0, target_row_dot = 0;
  for_row_at(row * patches, patches, aligned, [&](int64_t j, auto size) {
    constexpr int kCount = decltype(size)::value;
    T gram_values[kCount], target_gram_values[kCount];
    load(gram, row * patches + j, gram_values);
    load(target_gram, row * patches + j, target_gram_values);
    for (int i = 0; i < kCount; ++i) {
      const T difference = gram_values[i] - target_gram_values[i];
      squares += difference * difference;
      row_dot += difference * gram_values[i];
      target_row_dot += difference * target_gram_values[i];
      gram_values[i] = difference;
    }
    if (difference_out.data != nullptr) store(gram_values, difference_out, row * patches + j);
  });
  // 2. The sums of the row.
  squares = warp_sum(squares);
  row_dot = warp_sum(row_dot);
  target_row_dot = warp_sum(target_row_dot);
  if (!is_first_lane()) return;
  squares_out[row] = squares;
  row_dots[row] = row_dot;
  target_row_dots[row] = target_row_dot;
}

// out = diag(1/n) C. One warp per row. factor = C and out: [B, P, m]; norms = n: [B, P].
template <typename T>
__global__ void gram_scale_kernel(Rows factor, const T* norms, Output out, int64_t count,
                                  int64_t width, bool aligned) {
  const int64_t row = warp_index();
  if (row >= count) return;
  const T inv_norm = reciprocal_norm(norms[row]);
  for_row(width, aligned, [&](int64_t d, auto size) {
    T values[decltype(size)::value];
    load(factor, row * width + d, values);
    for (T& value : values) value *= inv_norm;
    store(values, out, row * width + d);
  });
}

// out = X C, from E diag(1/n) C: see singer::gram_gradient. One warp per row.
// product = E diag(1/n) C and out: [B, P, m]; factor = C: [B, prefix + P, m]; norms, row_dots:
// [B, P].
template <typename T>
__global__ void gram_gradient_kernel(Rows product, Rows factor, const T* norms, const T* row_dots,
                                double scale, Output out, int64_t count, int64_t patches,
                                int64_t prefix, int64_t width, bool aligned) {
  const int64_t row = warp_index();
  if (row >= count) return;
  const T inv_norm = reciprocal_norm(norms[row]);
  const T norm_grad_coef = gram_norm_coefficient(norms[row], row_dots[row]);
  // 1. The row of C: it has `prefix` more rows per image than the product.
  const int64_t factor_row = row / patches * (patches + prefix) + prefix + row % patches;
  // 2. Scale the product and subtract the gradient through the norms.
  for_row(width, aligned, [&](int64_t d, auto size) {
    constexpr int kCount = decltype(size)::value;
    T values[kCount], own[kCount];
    load(product, row * width + d, values);
    load(factor, factor_row * width + d, own);
    for (int i = 0; i < kCount; ++i) {
      values[i] = gram_gradient(values[i], own[i], inv_norm, norm_grad_coef, static_cast<T>(scale));
    }
    store(values, out, row * width + d);
  });
}

void difference(Tensor gram, Tensor target_gram, std::optional<Tensor> difference, Tensor squares,
                Tensor row_dots, Tensor target_row_dots) {
  check_tensor("gram", gram, 3, gram);
  const auto shape = shape_of(gram);
  const ScalarType acc = acc_of("squares", squares);
  STD_TORCH_CHECK(shape[1] == shape[2], "gram: got shape ", shape_text(shape),
                  ", expected [B, P, P]");
  check_dense("gram", gram, shape, gram);
  check_dense("target_gram", target_gram, shape, gram);
  check_dense("difference", difference, shape, gram);
  check_dense("squares", squares, {shape[0], shape[1]}, gram, acc);
  check_dense("row_dots", row_dots, {shape[0], shape[1]}, gram, acc);
  check_dense("target_row_dots", target_row_dots, {shape[0], shape[1]}, gram, acc);
  check_apart({{"difference", difference},
               {"squares", squares},
               {"row_dots", row_dots},
               {"target_row_dots", target_row_dots}},
              {{"gram", gram}, {"target_gram", target_gram}});
  const int64_t patches = shape[2], count = shape[0] * patches;
  const Output out = output_of(difference);
  const bool aligned =
      is_aligned(kVector, {gram.const_data_ptr(), target_gram.const_data_ptr(), out.data});
  dispatch(acc, [&](auto zero) {
    using T = decltype(zero);
    launch<gram_difference_kernel<T>>(count, gram, rows_of(gram), rows_of(target_gram), out,
                                      data_of<T>(squares), data_of<T>(row_dots),
                                      data_of<T>(target_row_dots), count, patches, aligned);
  });
}

void scale(Tensor factor, Tensor norms, Tensor out) {
  check_tensor("factor", factor, 3, factor);
  const auto shape = shape_of(factor);
  const ScalarType acc = acc_of("norms", norms);
  check_dense("factor", factor, shape, factor);
  check_dense("norms", norms, {shape[0], shape[1]}, factor);
  check_dense("out", out, shape, factor);
  check_apart({{"out", out}}, {{"factor", factor}, {"norms", norms}});
  const int64_t count = shape[0] * shape[1], width = shape[2];
  const bool aligned = is_aligned(width, {factor.const_data_ptr(), out.const_data_ptr()});
  dispatch(acc, [&](auto zero) {
    using T = decltype(zero);
    launch<gram_scale_kernel<T>>(count, factor, rows_of(factor), data_or_null<T>(norms),
                                 output_of(out), count, width, aligned);
  });
}

void gradient(Tensor product, Tensor factor, Tensor norms, Tensor row_dots, double scale,
              Tensor out, int64_t prefix) {
  check_tensor("product", product, 3, product);
  const auto shape = shape_of(product);
  const ScalarType acc = acc_of("norms", norms);
  STD_TORCH_CHECK(prefix >= 0 && prefix < (int64_t{1} << 31), "num_prefix_tokens: got ", prefix,
                  ", expected 0 or more");
  check_dense("product", product, shape, product);
  check_dense("factor", factor, {shape[0], shape[1] + prefix, shape[2]}, product);
  check_dense("norms", norms, {shape[0], shape[1]}, product);
  check_dense("row_dots", row_dots, {shape[0], shape[1]}, product, acc);
  check_dense("out", out, shape, product);
  check_apart({{"out", out}},
              {{"product", product}, {"factor", factor}, {"norms", norms}, {"row_dots", row_dots}});
  const int64_t patches = shape[1], count = shape[0] * patches, width = shape[2];
  const bool aligned = is_aligned(
      width, {product.const_data_ptr(), factor.const_data_ptr(), out.const_data_ptr()});
  dispatch(acc, [&](auto zero) {
    using T = decltype(zero);
    launch<gram_gradient_kernel<T>>(count, product, rows_of(product), rows_of(factor),
                                    data_or_null<T>(norms), data_or_null<T>(row_dots), scale,
                                    output_of(out), count, patches, prefix, width, aligned);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singer_kernels, SINGER_KEY, library) {
  library.impl("cuda_gram_difference", TORCH_BOX(&difference));
  library.impl("cuda_gram_scale", TORCH_BOX(&scale));
  library.impl("cuda_gram_gradient", TORCH_BOX(&gradient));
}

}  // namespace singer::cuda
