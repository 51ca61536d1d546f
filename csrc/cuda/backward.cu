// Stage `backward`: dS, dH and V, and the operands of the products that give dWd and dWu.
#include "math/backward.h"

#include "cuda/launch.h"
#include "math/outlier.h"

namespace singer::cuda {
namespace {

// Scalars on the device; null for a loss that has no gradient.
struct GradOutputs {
  Rows kd, outlier, info;
};

template <typename T>
SINGER_DEVICE T scalar(const Rows& rows) {
  T value[1];
  load(rows, 0, value);
  return value[0];
}

// V = X H + c H and dH = X Z + c Z + a (F^ - S) Wu^T + Y Wu^T. One warp per patch.
// hz = [H | Z] and grad_hz = X [H | Z]: [B, P, 2r]; residual = (F^ - S) Wu^T, grad_refined_up =
// Y Wu^T, grad_h = dH and v = V: [B, P, r]; norms: [B, P]; threshold: [B];
// outlier_weight and grad_outputs: [].
template <typename T>
__global__ void backward_rows_kernel(const T* hz, Rows grad_hz, Rows residual,
                                     Rows grad_refined_up, const T* norms, const T* threshold,
                                     const T* outlier_weight, GradOutputs grad_outputs,
                                     Output grad_h, Output v, int64_t images, int64_t tokens,
                                     int64_t patches, int64_t width, int64_t rank) {
  const int64_t patch = warp_index();
  if (patch >= images * patches) return;
  // 1. The factors of the three losses: c, dInfo and a.
  T coefficient = 0, grad_info = 0, alpha = 0;
  if (grad_outputs.outlier.data != nullptr) {
    const T weight = *outlier_weight * scalar<T>(grad_outputs.outlier);
    coefficient = outlier_coefficient(norms[patch], threshold[patch / patches], weight);
  }
  if (grad_outputs.info.data != nullptr) grad_info = scalar<T>(grad_outputs.info);
  if (grad_outputs.kd.data != nullptr) {
    alpha = kd_scale(images, tokens, width, scalar<T>(grad_outputs.kd));
  }
  // 2. Sum the terms of every element of [V | dH].
  for (int64_t k = threadIdx.x % kLanes; k < 2 * rank; k += kLanes) {
    const bool is_z = k >= rank;
    const int64_t index = patch * rank + k - (is_z ? rank : 0);
    T value[1] = {0}, term[1];
    if (grad_outputs.outlier.data != nullptr) value[0] = coefficient * hz[patch * 2 * rank + k];
    if (grad_outputs.info.data != nullptr) {
      load(grad_hz, patch * 2 * rank + k, term);
      value[0] += grad_info * term[0];
    }
    if (is_z && residual.data != nullptr) {
      load(residual, index, term);
      value[0] += alpha * term[0];
    }
    if (is_z && grad_refined_up.data != nullptr) {
      load(grad_refined_up, index, term);
      value[0] += term[0];
    }
    // 3. Columns 0 to r - 1 are V, the others dH.
    const Output out = is_z ? grad_h : v;  // by value: a reference would put both in local memory
    if (out.data != nullptr) store(value, out, index);
  }
}

// dS = a (S - F^), and the right factors of V^T F^ and H^T (Y - dS), whose sum is dWu. One warp per
// token. teacher, student, delta = H Wu, grad_refined = Y and grad_student = dS: [B, T, D];
// refined = F^ and grad_delta = Y - dS, of the patches: [B, P, D].
template <typename T>
__global__ void backward_tokens_kernel(Rows teacher, Rows student, const T* delta,
                                       Rows grad_refined, Rows grad_kd, Output grad_student,
                                       Output refined, Output grad_delta, int64_t images,
                                       int64_t tokens, int64_t prefix, int64_t width,
                                       bool aligned) {
  const int64_t row = warp_index();
  if (row >= images * tokens) return;
  const int64_t image = row / tokens, token = row % tokens;
  const int64_t patch = image * (tokens - prefix) + token - prefix;
  const bool is_patch = token >= prefix;
  const T alpha =
      grad_kd.data == nullptr ? T(0) : kd_scale(images, tokens, width, scalar<T>(grad_kd));
  for_row(width, aligned, [&](int64_t d, auto size) {
    constexpr int kCount = decltype(size)::value;
    // 1. F^ = F + H Wu on the patches, F on the prefix.
    T refined_values[kCount], added[kCount] = {}, grad_student_values[kCount] = {};
    load(teacher, row * width + d, refined_values);
    if (is_patch) load(Rows{delta, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float},
                       row * width + d, added);
    for (int i = 0; i < kCount; ++i) refined_values[i] += added[i];
    // 2. dS, on all tokens.
    if (grad_kd.data != nullptr) {
      T own[kCount];
      load(student, row * width + d, own);
      for (int i = 0; i < kCount; ++i) {
        grad_student_values[i] = student_gradient(own[i], refined_values[i], alpha);
      }
      if (grad_student.data != nullptr) store(grad_student_values, grad_student, row * width + d);
    }
    // 3. F^ and Y - dS, of the patches.
    if (!is_patch) return;
    if (refined.data != nullptr) store(refined_values, refined, patch * width + d);
    if (grad_delta.data == nullptr) return;
    T grad_values[kCount] = {};
    if (grad_refined.data != nullptr) load(grad_refined, row * width + d, grad_values);
    for (int i = 0; i < kCount; ++i) grad_values[i] -= grad_student_values[i];
    store(grad_values, grad_delta, patch * width + d);
  });
}

using Optional = std::optional<Tensor>;

void backward_rows(Tensor hz, Optional grad_hz, Optional residual, Optional grad_refined_up,
                   Optional norms, Optional threshold, Optional outlier_weight, Optional grad_kd,
                   Optional grad_outlier, Optional grad_info, Optional grad_h, Optional v,
                   int64_t tokens, int64_t width) {
  check_tensor("hz", hz, 3, hz);
  const auto shape = shape_of(hz);
  const ScalarType acc = acc_of("hz", hz);
  STD_TORCH_CHECK(shape[2] % 2 == 0, "hz: got shape ", shape_text(shape),
                  ", expected [B, P, 2r]");
  STD_TORCH_CHECK(tokens >= shape[1], "tokens: got ", tokens, ", expected at least ", shape[1]);
  STD_TORCH_CHECK(width > 0, "width: got ", width, ", expected at least 1");
  const std::vector<int64_t> low_rank{shape[0], shape[1], shape[2] / 2};
  const auto need = [&](const char* name, const Optional& tensor, const Optional& with,
                        const std::vector<int64_t>& expected, std::optional<ScalarType> dtype) {
    STD_TORCH_CHECK(!with.has_value() || tensor.has_value(), name,
                    ": got None, expected a tensor");
    check_dense(name, tensor, expected, hz, dtype);
  };
  check_dense("hz", hz, shape, hz);
  need("grad_hz", grad_hz, grad_info, shape, std::nullopt);
  need("residual", residual, std::nullopt, low_rank, std::nullopt);
  need("grad_kd", grad_kd, residual, {}, std::nullopt);
  need("grad_refined_up", grad_refined_up, std::nullopt, low_rank, std::nullopt);
  need("norms", norms, grad_outlier, {shape[0], shape[1]}, acc);
  need("threshold", threshold, grad_outlier, {shape[0]}, acc);
  need("outlier_weight", outlier_weight, grad_outlier, {}, acc);
  need("grad_outlier", grad_outlier, std::nullopt, {}, std::nullopt);
  need("grad_info", grad_info, std::nullopt, {}, std::nullopt);
  need("grad_h", grad_h, std::nullopt, low_rank, std::nullopt);
  need("v", v, std::nullopt, low_rank, std::nullopt);
  check_apart({{"grad_h", grad_h}, {"v", v}},
              {{"hz", hz},
               {"grad_hz", grad_hz},
               {"residual", residual},
               {"grad_refined_up", grad_refined_up},
               {"norms", norms},
               {"threshold", threshold},
               {"outlier_weight", outlier_weight},
               {"grad_kd", grad_kd},
               {"grad_outlier", grad_outlier},
               {"grad_info", grad_info}});
  const GradOutputs grad_outputs{rows_of(grad_kd), rows_of(grad_outlier), rows_of(grad_info)};
  dispatch(acc, [&](auto zero) {
    using T = decltype(zero);
    launch<backward_rows_kernel<T>>(
        shape[0] * shape[1], hz, data_or_null<T>(hz), rows_of(grad_hz), rows_of(residual),
        rows_of(grad_refined_up), data_or_null<T>(norms), data_or_null<T>(threshold),
        data_or_null<T>(outlier_weight), grad_outputs, output_of(grad_h), output_of(v), shape[0],
        tokens, shape[1], width, shape[2] / 2);
  });
}

void backward_tokens(Tensor teacher, Optional student, Tensor delta, Optional grad_refined,
                     Optional grad_kd, Optional grad_student, Optional refined,
                     Optional grad_delta, int64_t prefix) {
  check_tokens("teacher", teacher, prefix);
  const auto shape = shape_of(teacher);
  const std::vector<int64_t> patches{shape[0], shape[1] - prefix, shape[2]};
  const ScalarType acc = acc_of("delta", delta);
  STD_TORCH_CHECK(!grad_student.has_value() || grad_kd.has_value(),
                  "grad_kd: got None, expected a tensor with grad_student");
  STD_TORCH_CHECK(!grad_kd.has_value() || student.has_value(),
                  "student: got None, expected a tensor with grad_kd");
  check_dense("teacher", teacher, shape, teacher);
  check_dense("student", student, shape, teacher);
  check_dense("delta", delta, shape, teacher);
  check_dense("grad_refined", grad_refined, shape, teacher);
  check_dense("grad_kd", grad_kd, {}, teacher);
  check_dense("grad_student", grad_student, shape, teacher);
  check_dense("refined", refined, patches, teacher);
  check_dense("grad_delta", grad_delta, patches, teacher);
  check_apart({{"grad_student", grad_student}, {"refined", refined}, {"grad_delta", grad_delta}},
              {{"teacher", teacher},
               {"student", student},
               {"delta", delta},
               {"grad_refined", grad_refined},
               {"grad_kd", grad_kd}});
  const Rows own = rows_of(student), grad_in = rows_of(grad_refined);
  const Output to_grad_student = output_of(grad_student), to_refined = output_of(refined),
               to_grad_delta = output_of(grad_delta);
  const bool aligned = is_aligned(
      shape[2], {teacher.const_data_ptr(), delta.const_data_ptr(), own.data, grad_in.data,
                 to_grad_student.data, to_refined.data, to_grad_delta.data});
  dispatch(acc, [&](auto zero) {
    using T = decltype(zero);
    launch<backward_tokens_kernel<T>>(shape[0] * shape[1], teacher, rows_of(teacher), own,
                                      data_or_null<T>(delta), grad_in, rows_of(grad_kd),
                                      to_grad_student, to_refined, to_grad_delta, shape[0],
                                      shape[1], prefix, shape[2], aligned);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singer_kernels, SINGER_KEY, library) {
  library.impl("cuda_backward_rows", TORCH_BOX(&backward_rows));
  library.impl("cuda_backward_tokens", TORCH_BOX(&backward_tokens));
}

}  // namespace singer::cuda
