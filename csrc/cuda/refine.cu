// Stage `refine`: F^, its norms and the KD sums, from F and delta = H Wu; row normalisation.
#include "cuda/launch.h"
#include "math/gram.h"

namespace singer::cuda {
namespace {

// F^ = F + H Wu on the patches, their norms, F^ - S, and per token the sum of (F^ - S)^2. One warp
// per token. teacher, student, delta, refined = F^: [B, T, D]; kd_partials: [B, T]; norms: [B, P];
// rows = F^ / n and kd_difference = F^ - S: [B, P, D]. Null outputs are skipped.
template <typename T>
__global__ void refine_kernel(Rows teacher, Rows student, const T* delta, T* norms, T* kd_partials,
                              Output refined, Output rows, Output kd_difference, int64_t count,
                              int64_t tokens, int64_t prefix, int64_t width, bool aligned) {
  const int64_t row = warp_index();
  if (row >= count) return;
  const int64_t image = row / tokens, token = row % tokens, patches = tokens - prefix;
  const int64_t patch = image * patches + token - prefix;
  const bool is_patch = token >= prefix;
  // 1. F^ and F^ - S, and this lane's part of both sums of squares.
  T squares = 0, kd_sum = 0;
  for_row(width, aligned, [&](int64_t d, auto size) {
    constexpr int kCount = decltype(size)::value;
    T refined_values[kCount], kd_difference_values[kCount], added[kCount] = {};
    load(teacher, row * width + d, refined_values);
    load(student, row * width + d, kd_difference_values);
    if (is_patch) load(Rows{delta, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float},
                       row * width + d, added);
    T chunk_squares = 0, chunk_kd_sum = 0;  // fewer roundings than one running sum
    for (int i = 0; i < kCount; ++i) {
      refined_values[i] += added[i];
      chunk_squares += refined_values[i] * refined_values[i];
      kd_difference_values[i] = refined_values[i] - kd_difference_values[i];
      chunk_kd_sum += kd_difference_values[i] * kd_difference_values[i];
    }
    if (kd_difference.data != nullptr && is_patch) {
      store(kd_difference_values, kd_difference, patch * width + d);
    }
    squares += chunk_squares;
    kd_sum += chunk_kd_sum;
    if (refined.data != nullptr) store(refined_values, refined, row * width + d);
  });
  // 2. The norm and the KD sum of the token.
  squares = warp_sum(squares);
  kd_sum = warp_sum(kd_sum);
  const T norm = std::sqrt(squares);
  if (is_first_lane()) {
    kd_partials[row] = kd_sum;
    if (is_patch) norms[patch] = norm;
  }
  // 3. F^ / n, for the Gram products; F and delta are read again, from the cache.
  if (rows.data == nullptr || !is_patch) return;
  const T inv_norm = reciprocal_norm(norm);
  for_row(width, aligned, [&](int64_t d, auto size) {
    constexpr int kCount = decltype(size)::value;
    T refined_values[kCount], added[kCount];
    load(teacher, row * width + d, refined_values);
    load(Rows{delta, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float}, row * width + d,
         added);
    for (int i = 0; i < kCount; ++i) refined_values[i] = (refined_values[i] + added[i]) * inv_norm;
    store(refined_values, rows, patch * width + d);
  });
}

// Norms n and rows x / n of the patches. One warp per patch. tokens: [B, T, D]; norms: [B, P];
// rows: [B, P, D].
template <typename T>
__global__ void normalize_kernel(Rows tokens, T* norms, Output rows, int64_t count, int64_t patches,
                                 int64_t prefix, int64_t width, bool aligned) {
  const int64_t patch = warp_index();
  if (patch >= count) return;
  const int64_t row = patch / patches * (patches + prefix) + prefix + patch % patches;
  // 1. The norm.
  T squares = 0;
  for_row(width, aligned, [&](int64_t d, auto size) {
    T values[decltype(size)::value];
    load(tokens, row * width + d, values);
    T chunk_squares = 0;
    for (const T value : values) chunk_squares += value * value;
    squares += chunk_squares;
  });
  // 2. Divide by it.
  const T norm = std::sqrt(warp_sum(squares)), inv_norm = reciprocal_norm(norm);
  if (is_first_lane()) norms[patch] = norm;
  for_row(width, aligned, [&](int64_t d, auto size) {
    T values[decltype(size)::value];
    load(tokens, row * width + d, values);
    for (T& value : values) value *= inv_norm;
    store(values, rows, patch * width + d);
  });
}

void refine(Tensor teacher, Tensor student, Tensor delta, int64_t prefix, Tensor norms,
            Tensor kd_partials, std::optional<Tensor> refined, std::optional<Tensor> rows,
            std::optional<Tensor> kd_difference) {
  check_tokens("teacher", teacher, prefix);
  const auto shape = shape_of(teacher);
  const ScalarType acc = acc_of("delta", delta);
  check_dense("teacher", teacher, shape, teacher);
  check_dense("student", student, shape, teacher);
  check_dense("delta", delta, shape, teacher);
  check_dense("norms", norms, {shape[0], shape[1] - prefix}, teacher, acc);
  check_dense("kd_partials", kd_partials, {shape[0], shape[1]}, teacher, acc);
  check_dense("refined", refined, shape, teacher);
  check_dense("rows", rows, {shape[0], shape[1] - prefix, shape[2]}, teacher);
  check_dense("kd_difference", kd_difference, {shape[0], shape[1] - prefix, shape[2]}, teacher);
  check_apart({{"norms", norms},
               {"kd_partials", kd_partials},
               {"refined", refined},
               {"rows", rows},
               {"kd_difference", kd_difference}},
              {{"teacher", teacher}, {"student", student}, {"delta", delta}});
  const int64_t count = shape[0] * shape[1], width = shape[2];
  const Output to_refined = output_of(refined), to_rows = output_of(rows),
               to_kd_difference = output_of(kd_difference);
  const bool aligned = is_aligned(
      width, {teacher.const_data_ptr(), student.const_data_ptr(), delta.const_data_ptr(),
              to_refined.data, to_rows.data, to_kd_difference.data});
  dispatch(acc, [&](auto zero) {
    using T = decltype(zero);
    launch<refine_kernel<T>>(count, teacher, rows_of(teacher), rows_of(student),
                             data_or_null<T>(delta), data_of<T>(norms), data_of<T>(kd_partials),
                             to_refined, to_rows, to_kd_difference, count, shape[1], prefix, width,
                             aligned);
  });
}

void normalize(Tensor tokens, int64_t prefix, Tensor norms, Tensor rows) {
  check_tokens("tokens", tokens, prefix);
  const auto shape = shape_of(tokens);
  const ScalarType acc = acc_of("norms", norms);
  check_dense("tokens", tokens, shape, tokens);
  check_dense("norms", norms, {shape[0], shape[1] - prefix}, tokens);
  check_dense("rows", rows, {shape[0], shape[1] - prefix, shape[2]}, tokens);
  check_apart({{"norms", norms}, {"rows", rows}}, {{"tokens", tokens}});
  const int64_t patches = shape[1] - prefix, count = shape[0] * patches, width = shape[2];
  const bool aligned = is_aligned(width, {tokens.const_data_ptr(), rows.const_data_ptr()});
  dispatch(acc, [&](auto zero) {
    using T = decltype(zero);
    launch<normalize_kernel<T>>(count, tokens, rows_of(tokens), data_of<T>(norms),
                                output_of(rows), count, patches, prefix, width, aligned);
  });
}

}  // namespace

#ifndef SINGER_EMULATED
// Return whether torch's CUDA library provides the current stream; for introspection.
extern "C" __attribute__((visibility("default"))) bool singer_has_cuda_stream() {
  return aoti_torch_get_current_cuda_stream != nullptr;
}
#endif

STABLE_TORCH_LIBRARY_IMPL(singer_kernels, SINGER_KEY, library) {
  library.impl("cuda_refine", TORCH_BOX(&refine));
  library.impl("cuda_normalize", TORCH_BOX(&normalize));
}

}  // namespace singer::cuda
