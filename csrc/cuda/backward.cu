// Stage `backward`: dH and V, and the rows of dS and of what the adapter's products take.
#include "math/backward.h"

#include "cuda/launch.h"
#include "math/outlier.h"

namespace singer::cuda {
namespace {

// Scalars on the device, and what has no term is null.
struct Upstream {
  Rows kd, outlier, info;
};

template <typename T>
SINGER_DEVICE T scalar(const Rows& rows) {
  T value[1];
  load(rows, 0, value);
  return value[0];
}

// V = X H + c H and dH = X Z + c Z + a (F^ - S) Wu^T + Y Wu^T. One patch to a warp.
template <typename T>
__global__ void columns_kernel(const T* columns, Rows gram_columns, Rows residual,
                               Rows through_up, const T* norms, const T* thresholds,
                               const T* outlier_weight, Upstream upstream, Output d_hidden,
                               Output turned, int64_t images, int64_t tokens, int64_t patches,
                               int64_t width, int64_t rank) {
  const int64_t patch = warp_index();
  if (patch >= images * patches) return;
  T coefficient = 0, d_info = 0, alpha = 0;
  if (upstream.outlier.data != nullptr) {
    const T weight = *outlier_weight * scalar<T>(upstream.outlier);
    coefficient = outlier_coefficient(norms[patch], thresholds[patch / patches], weight);
  }
  if (upstream.info.data != nullptr) d_info = scalar<T>(upstream.info);
  if (upstream.kd.data != nullptr) {
    alpha = kd_scale(images, tokens, width, scalar<T>(upstream.kd));
  }
  for (int64_t k = threadIdx.x % kLanes; k < 2 * rank; k += kLanes) {
    const bool is_latent = k >= rank;
    const int64_t place = patch * rank + k - (is_latent ? rank : 0);
    T value[1] = {coefficient * columns[patch * 2 * rank + k]};
    T term[1];
    if (upstream.info.data != nullptr) {
      load(gram_columns, patch * 2 * rank + k, term);
      value[0] += d_info * term[0];
    }
    if (is_latent && residual.data != nullptr) {
      load(residual, place, term);
      value[0] += alpha * term[0];
    }
    if (is_latent && through_up.data != nullptr) {
      load(through_up, place, term);
      value[0] += term[0];
    }
    const Output out = is_latent ? d_hidden : turned;  // a reference would put both in memory
    if (out.data != nullptr) store(value, out, place);
  }
}

// dS = a (S - F^) and, of the patches, F^ and Y - dS as the products take them. One token to a warp.
template <typename T>
__global__ void tokens_kernel(Rows teacher, Rows student, const T* delta, Rows d_refined, Rows d_kd,
                              Output d_student, Output refined, Output dense, int64_t images,
                              int64_t tokens, int64_t prefix, int64_t width, bool aligned) {
  const int64_t row = warp_index();
  if (row >= images * tokens) return;
  const int64_t image = row / tokens, token = row % tokens;
  const int64_t patch = image * (tokens - prefix) + token - prefix;
  const bool is_patch = token >= prefix;
  const T alpha =
      d_kd.data == nullptr ? T(0) : kd_scale(images, tokens, width, scalar<T>(d_kd));
  for_row(width, aligned, [&](int64_t d, auto size) {
    constexpr int kCount = decltype(size)::value;
    T whole[kCount], added[kCount] = {}, pulled[kCount] = {};
    load(teacher, row * width + d, whole);
    if (is_patch) load(Rows{delta, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float},
                       row * width + d, added);
    for (int i = 0; i < kCount; ++i) whole[i] += added[i];
    if (d_kd.data != nullptr) {
      T own[kCount];
      load(student, row * width + d, own);
      for (int i = 0; i < kCount; ++i) pulled[i] = student_gradient(own[i], whole[i], alpha);
      if (d_student.data != nullptr) store(pulled, d_student, row * width + d);
    }
    if (!is_patch) return;
    if (refined.data != nullptr) store(whole, refined, patch * width + d);
    if (dense.data == nullptr) return;
    T back[kCount] = {};
    if (d_refined.data != nullptr) load(d_refined, row * width + d, back);
    for (int i = 0; i < kCount; ++i) back[i] -= pulled[i];
    store(back, dense, patch * width + d);
  });
}

using Optional = std::optional<Tensor>;

template <typename T>
const T* data_or_null(const Optional& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

struct ColumnsCall {
  Tensor columns;
  Optional gram_columns, residual, through_up, norms, threshold, outlier_weight, d_kd, d_outlier,
      d_info, d_hidden, turned;
  int64_t tokens, width;
};

template <typename T>
void run_columns(const ColumnsCall& call) {
  const int64_t images = call.columns.size(0), patches = call.columns.size(1);
  const Upstream upstream{rows_or_null(call.d_kd), rows_or_null(call.d_outlier),
                          rows_or_null(call.d_info)};
  launch<columns_kernel<T>>(images * patches, call.columns,
         static_cast<const T*>(call.columns.const_data_ptr()), rows_or_null(call.gram_columns),
         rows_or_null(call.residual), rows_or_null(call.through_up), data_or_null<T>(call.norms),
         data_or_null<T>(call.threshold), data_or_null<T>(call.outlier_weight), upstream,
         output_or_null(call.d_hidden), output_or_null(call.turned), images, call.tokens, patches,
         call.width, call.columns.size(2) / 2);
}

void columns(Tensor columns, Optional gram_columns, Optional residual, Optional through_up,
             Optional norms, Optional threshold, Optional outlier_weight, Optional d_kd,
             Optional d_outlier, Optional d_info, Optional d_hidden, Optional turned,
             int64_t tokens, int64_t width) {
  check_tensor("columns", columns, 3, columns);
  const auto shape = shape_of(columns);
  const ScalarType acc = acc_of("columns", columns);
  STD_TORCH_CHECK(shape[2] % 2 == 0, "columns: got shape ", shape_text(shape),
                  ", expected [B, P, 2r]");
  STD_TORCH_CHECK(tokens >= shape[1], "tokens: got ", tokens, ", expected at least ", shape[1]);
  STD_TORCH_CHECK(width > 0, "width: got ", width, ", expected at least 1");
  const std::vector<int64_t> half{shape[0], shape[1], shape[2] / 2};
  const auto need = [&](const char* name, const Optional& tensor, const Optional& with,
                        const std::vector<int64_t>& expected, std::optional<ScalarType> dtype) {
    STD_TORCH_CHECK(!with.has_value() || tensor.has_value(), name,
                    ": got None, expected a tensor");
    check_dense(name, tensor, expected, columns, dtype);
  };
  check_dense("columns", columns, shape, columns);
  need("gram_columns", gram_columns, d_info, shape, std::nullopt);
  need("residual", residual, std::nullopt, half, std::nullopt);
  need("d_kd", d_kd, residual, {}, std::nullopt);
  need("through_up", through_up, std::nullopt, half, std::nullopt);
  need("norms", norms, d_outlier, {shape[0], shape[1]}, acc);
  need("threshold", threshold, d_outlier, {shape[0]}, acc);
  need("outlier_weight", outlier_weight, d_outlier, {}, acc);
  need("d_outlier", d_outlier, std::nullopt, {}, std::nullopt);
  need("d_info", d_info, std::nullopt, {}, std::nullopt);
  need("d_hidden", d_hidden, std::nullopt, half, std::nullopt);
  need("turned", turned, std::nullopt, half, std::nullopt);
  check_apart({{"d_hidden", d_hidden}, {"turned", turned}},
              {{"columns", columns},
               {"gram_columns", gram_columns},
               {"residual", residual},
               {"through_up", through_up},
               {"norms", norms},
               {"threshold", threshold},
               {"outlier_weight", outlier_weight},
               {"d_kd", d_kd},
               {"d_outlier", d_outlier},
               {"d_info", d_info}});
  const ColumnsCall call{columns,        gram_columns, residual,  through_up, norms,
                         threshold,      outlier_weight, d_kd,    d_outlier,  d_info,
                         d_hidden,       turned,       tokens,    width};
  SINGER_BY_DTYPE(acc, run_columns, call);
}

template <typename T>
void run_tokens(const Tensor& teacher, const Optional& student, const Tensor& delta,
                const Optional& d_refined, const Optional& d_kd, const Optional& d_student,
                const Optional& refined, const Optional& dense, int64_t prefix) {
  const int64_t images = teacher.size(0), tokens = teacher.size(1), width = teacher.size(2);
  const Rows own = rows_or_null(student), back = rows_or_null(d_refined);
  const Output to_student = output_or_null(d_student), to_refined = output_or_null(refined),
               to_dense = output_or_null(dense);
  launch<tokens_kernel<T>>(images * tokens, teacher, Rows::of(teacher), own,
         static_cast<const T*>(delta.const_data_ptr()), back, rows_or_null(d_kd), to_student,
         to_refined, to_dense, images, tokens, prefix, width,
         is_aligned(width, {teacher.const_data_ptr(), delta.const_data_ptr(), own.data, back.data,
                            to_student.data, to_refined.data, to_dense.data}));
}

void tokens(Tensor teacher, Optional student, Tensor delta, Optional d_refined, Optional d_kd,
            Optional d_student, Optional refined, Optional dense, int64_t prefix) {
  check_tokens("teacher", teacher, prefix);
  const auto shape = shape_of(teacher);
  const std::vector<int64_t> patches{shape[0], shape[1] - prefix, shape[2]};
  const ScalarType acc = acc_of("delta", delta);
  STD_TORCH_CHECK(!d_student.has_value() || d_kd.has_value(),
                  "d_kd: got None, expected a tensor with d_student");
  STD_TORCH_CHECK(!d_kd.has_value() || student.has_value(),
                  "student: got None, expected a tensor with d_kd");
  check_dense("teacher", teacher, shape, teacher);
  check_dense("student", student, shape, teacher);
  check_dense("delta", delta, shape, teacher);
  check_dense("d_refined", d_refined, shape, teacher);
  check_dense("d_kd", d_kd, {}, teacher);
  check_dense("d_student", d_student, shape, teacher);
  check_dense("refined", refined, patches, teacher);
  check_dense("dense", dense, patches, teacher);
  check_apart({{"d_student", d_student}, {"refined", refined}, {"dense", dense}},
              {{"teacher", teacher},
               {"student", student},
               {"delta", delta},
               {"d_refined", d_refined},
               {"d_kd", d_kd}});
  SINGER_BY_DTYPE(acc, run_tokens, teacher, student, delta, d_refined, d_kd, d_student, refined,
                  dense, prefix);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singer_kernels, SINGER_KEY, library) {
  library.impl("cuda_backward_columns", TORCH_BOX(&columns));
  library.impl("cuda_backward_tokens", TORCH_BOX(&tokens));
}

}  // namespace singer::cuda
