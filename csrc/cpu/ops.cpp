// The operators on the CPU. singer_kernels/backends/operators.py derives their schemas.
#include <tuple>

#include "cpu/stages.h"

namespace singer::cpu {
namespace {

using Optional = std::optional<Tensor>;
using OptionalDtype = std::optional<ScalarType>;

// Arguments of the operators, as the named tuples of operators.py: same names, order and shapes.
struct ForwardInputs {
  Tensor student, teacher, down, up;
  Optional gram_target;
  bool gram;
  double quantile;
  int64_t num_prefix_tokens;
  bool has_refined, has_residual, has_grad_hz, has_grad_target;
  ScalarType acc, product, gram_product;
};

struct BackwardInputs {
  Optional student;
  Tensor teacher, up, hz;
  Optional grad_hz, residual, norms, threshold, outlier_weight;
  Optional grad_kd, grad_outlier, grad_info, grad_refined;
  int64_t num_prefix_tokens;
  ScalarType acc, product;
  OptionalDtype student_dtype, down_dtype, up_dtype;
};

struct GramLossInputs {
  Tensor tokens, target;
  int64_t num_prefix_tokens;
  bool has_grad_tokens, has_grad_target;
  ScalarType acc, product;
};

using ForwardOutput = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                 Tensor, Tensor, Tensor>;
using BackwardOutput = std::tuple<Tensor, Tensor, Tensor>;
using GramLossOutput = std::tuple<Tensor, Tensor, Tensor>;

// Return a grad_output, [] of any dtype, in the accumulation dtype.
template <typename T>
std::optional<T> scalar_of(const Optional& tensor) {
  if (!tensor.has_value()) return std::nullopt;
  T value;
  const ScalarType dtype = tensor->scalar_type();
  simd_kernels<T>().read(tensor->const_data_ptr(), dtype, 1, 1, dtype, &value);
  return value;
}

template <typename T>
double total(const T* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]);
  return sum;
}

void check_cpu(const char* name, const Tensor& tensor) {
  check_defined(name, tensor);
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a tensor on the CPU");
}

// Return the mean of E^2 from each image's sum.
template <typename T>
T mean_square(const std::vector<double>& squares, int64_t patches) {
  const double entries = static_cast<double>(squares.size()) * patches * patches;
  return static_cast<T>(total(squares.data(), static_cast<int64_t>(squares.size())) / entries);
}

template <typename T>
T gram_scale(const Sizes& sizes) {
  const T patches = static_cast<T>(sizes.patches());
  return T(4) / (static_cast<T>(sizes.images) * patches * patches);
}

// Return the number of images per group, about equal for all groups. No result depends on it.
int64_t images_per_group(int64_t images, int64_t patches) {
  const int64_t target = kGroupPatches * static_cast<int64_t>(torch::stable::get_num_threads());
  // The packed matrices of an image are about as large as if P were a multiple of kBlockRows.
  const int64_t most = std::max<int64_t>(1, target / round_up(patches, kBlockRows));
  return ceil_div(images, ceil_div(images, most));
}

// M = Wu Wu^T, packed.
template <typename T>
PackedMatrix<T> up_gram_of(const Matrix<const T>& up, const PackedMatrix<T>& up_transposed) {
  constexpr int64_t kRows = 12;  // of the largest register tile
  const Scratch<T> data(up.rows * up.rows);
  const Matrix<T> up_gram{data.data(), up.rows, up.rows, up.rows};
  parallel(ceil_div(up.rows, kRows), kRows * up.rows * up.columns, [&](int64_t i) {
    const int64_t first = i * kRows, count = std::min(kRows, up.rows - first);
    up_transposed.view().multiply(up.row_slice(first, count), up_gram.row_slice(first, count));
  });
  return PackedMatrix<T>(up_gram);
}

// Return one side of `gram`; `gradient` [P, D], if not null, receives X R.
template <typename T>
GramSide<T> gram_side(const NormalizedImage<T>& image, T* gradient) {
  GramSide<T> side{image.rows_t.view(), image.inv_norms.data()};
  if (gradient == nullptr) return side;
  side.factor = image.rows;
  side.norms = image.norms.data();
  side.scaled_factor = image.scaled.view();
  side.gradient = {gradient, side.factor.rows, side.factor.columns, side.factor.columns};
  return side;
}

// Whether F F^T of an image is computed from F^ F^^T by the Gram identity. Not where F^ is much
// larger than F: the difference would cancel.
template <typename T>
bool takes_identity(const RefineParams<T>& params, int64_t image) {
  constexpr T kMaxGrowth = 4;  // of a norm, from F to F^
  if (params.up_gram.is_empty()) return false;
  const int64_t patches = params.sizes.patches(), first = image * patches;
  for (int64_t i = first; i < first + patches; ++i) {
    if (params.norms[i] > kMaxGrowth * params.teacher_norms[i]) return false;
  }
  return true;
}

// Run `refine` and `gram` on `count` images from `begin` on. target = R, not rounded, as F^ is not:
// rounding only one of them would itself be a loss. grad_hz: [B P, 2r], grad_target: [B P, D] or
// null; squares: the sums of E^2, [count].
template <typename T>
void refine_and_compare(const RefineParams<T>& params, int64_t begin, int64_t count,
                        const TokenRows<T>& target, T* grad_hz, T* grad_target, double* squares) {
  const Sizes& sizes = params.sizes;
  const int64_t patches = sizes.patches(), width = sizes.width, rank = sizes.rank;
  // 1. F^ of each image, and the operands of its Gram matrix.
  std::vector<std::unique_ptr<RefinedImage<T>>> refined(count);
  for (auto& image : refined) {
    image = std::make_unique<RefinedImage<T>>(sizes, !params.up_gram.is_empty(),
                                              params.has_gradient);
  }
  refine(params, begin, count, refined);
  // 2. R of each image that does not take the identity; null for the others.
  std::vector<std::unique_ptr<NormalizedImage<T>>> targets(count);
  bool has_targets = false;
  for (int64_t i = 0; i < count; ++i) {
    if (takes_identity(params, begin + i)) continue;
    targets[i] = std::make_unique<NormalizedImage<T>>(sizes, grad_target != nullptr);
    has_targets = true;
  }
  if (has_targets) normalize(target, sizes, begin, targets);
  // 3. Both sides' Gram matrices.
  std::vector<GramParams<T>> images(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = (begin + i) * patches;
    T* const gradient = grad_target == nullptr ? nullptr : grad_target + first * width;
    const RefinedImage<T>& image = *refined[i];
    GramSide<T> own{image.refined_t.view(), image.inv_norms.data()};
    if (grad_hz != nullptr) {
      own.factor = Matrix<const T>(params.hz).row_slice(first, patches);
      own.norms = params.norms + first;
      own.scaled_factor = image.scaled_hz.view();
      own.gradient = {grad_hz + first * 2 * rank, patches, 2 * rank, 2 * rank};
    }
    const bool has_identity = targets[i] == nullptr;
    const GramSide<T> other =
        has_identity ? GramSide<T>{image.lh_t.view(), image.teacher_inv_norms.data()}
                     : gram_side(*targets[i], gradient);
    images[i] = {patches, width, own, other, has_identity ? rank : 0, gram_scale<T>(sizes)};
  }
  cpu::gram(images, squares);
}

template <typename T>
ForwardOutput forward(const ForwardInputs& x, const Sizes& sizes) {
  constexpr ScalarType acc = scalar_type<T>();
  const int64_t images = sizes.images, patches = sizes.patches();
  const int64_t width = sizes.width, rank = sizes.rank;
  // 1. The outputs; empty if not requested.
  const auto new_or_empty = [&](bool is_needed, std::initializer_list<int64_t> shape,
                                ScalarType dtype) {
    return is_needed ? new_tensor(x.teacher, shape, dtype) : new_tensor(x.teacher, {0}, dtype);
  };
  const Tensor kd = new_tensor(x.teacher, {}, acc), outlier_loss = new_tensor(x.teacher, {}, acc);
  const Tensor info = new_or_empty(x.gram, {}, acc);
  const Tensor refined =
      new_or_empty(x.has_refined, {images, sizes.tokens, width}, x.teacher.scalar_type());
  const Tensor norms = new_tensor(x.teacher, {images, patches}, acc);
  const Tensor threshold = new_tensor(x.teacher, {images}, acc);
  const Tensor weight = new_tensor(x.teacher, {}, acc);
  const Tensor hz = new_tensor(x.teacher, {images, patches, 2 * rank}, acc);
  const Tensor residual = new_or_empty(x.has_residual, {images, patches, rank}, acc);
  const Tensor grad_hz = new_or_empty(x.has_grad_hz, {images, patches, 2 * rank}, acc);
  const Tensor grad_target = new_or_empty(x.has_grad_target, {images, patches, width}, acc);

  // 2. Stages `refine` and `gram`, by groups of images whose operands stay in the cache.
  const Scratch<T> down_buffer(width * rank), up_buffer(rank * width);
  const Scratch<T> teacher_norms(images * patches), kd_partials(images * sizes.tokens);
  const Matrix<const T> up = to_matrix<T>(x.up, up_buffer);
  PackedMatrix<T> up_transposed(up.transposed());
  const bool has_identity = x.gram && !x.gram_target.has_value() && 2 * rank < width;
  PackedMatrix<T> up_gram = has_identity ? up_gram_of(up, up_transposed) : PackedMatrix<T>(0, 0);
  const RefineParams<T> params{
      sizes,
      TokenRows<T>(x.student),
      TokenRows<T>(x.teacher),
      TokenRows<T>(x.teacher, x.product),
      PackedMatrix<T>(to_matrix<T>(x.down, down_buffer)),
      PackedMatrix<T>(up),
      std::move(up_transposed),
      std::move(up_gram),
      {data_of<T>(hz), images * patches, 2 * rank, 2 * rank},
      {x.has_residual ? data_of<T>(residual) : nullptr, images * patches, rank, rank},
      data_of<T>(norms),
      teacher_norms.data(),
      kd_partials.data(),
      x.has_refined ? data_of<char>(refined) : nullptr,
      x.teacher.scalar_type(),
      x.has_grad_hz};
  refine_prefix(params);
  const TokenRows<T> target(x.gram_target.has_value() ? *x.gram_target : x.teacher);
  std::vector<double> squares(images, 0.0);
  const int64_t group = images_per_group(images, patches);
  for (int64_t start = 0; x.gram && start < images; start += group) {
    refine_and_compare(params, start, std::min(group, images - start), target,
                       x.has_grad_hz ? data_of<T>(grad_hz) : nullptr,
                       x.has_grad_target ? data_of<T>(grad_target) : nullptr,
                       squares.data() + start);
  }
  if (!x.gram) refine(params, 0, images, {});

  // 3. Stage `outlier`, and the losses.
  const Scratch<T> partials(2 * images);
  outlier<T>(params.norms, images, patches, x.quantile, data_of<T>(threshold), partials.data(),
             partials.data() + images);
  const double entries = static_cast<double>(images) * sizes.tokens * width;
  const double count = std::max(total(partials.data() + images, images), 1.0);
  *data_of<T>(kd) = static_cast<T>(total(kd_partials.data(), images * sizes.tokens) / entries);
  *data_of<T>(outlier_loss) = static_cast<T>(total(partials.data(), images) / count);
  *data_of<T>(weight) = static_cast<T>(2 / count);
  if (x.gram) *data_of<T>(info) = mean_square<T>(squares, patches);
  return {kd, outlier_loss, info, refined, norms, threshold, weight, hz, residual, grad_hz,
          grad_target};
}

ForwardOutput losses_forward(Tensor student, Tensor teacher, Tensor down, Tensor up,
                             Optional gram_target, bool gram, double quantile,
                             int64_t num_prefix_tokens, bool has_refined, bool has_residual,
                             bool has_grad_hz, bool has_grad_target, ScalarType acc,
                             ScalarType product, ScalarType gram_product) {
  const ForwardInputs x{student,     teacher,      down,        up,
                        gram_target, gram,         quantile,    num_prefix_tokens,
                        has_refined, has_residual, has_grad_hz, has_grad_target,
                        acc,         product,      gram_product};
  check_cpu("teacher", x.teacher);
  check_tokens("teacher", x.teacher, x.num_prefix_tokens);
  const auto shape = shape_of(x.teacher);
  check_shape("student", x.student, shape, x.teacher);
  check_tensor("down", x.down, 2, x.teacher);
  const int64_t rank = x.down.size(1);
  STD_TORCH_CHECK(rank > 0, "down: got rank 0, expected at least 1");
  check_shape("down", x.down, {shape[2], rank}, x.teacher);
  check_shape("up", x.up, {rank, shape[2]}, x.teacher);
  if (x.gram_target.has_value()) check_shape("gram_target", *x.gram_target, shape, x.teacher);
  STD_TORCH_CHECK(x.gram || !(x.gram_target.has_value() || x.has_grad_hz || x.has_grad_target),
                  "gram: got False, expected True with a target or gradients of its own");
  STD_TORCH_CHECK(!x.has_grad_target || x.gram_target.has_value(),
                  "gram_target: got None, expected a tensor with has_grad_target");
  STD_TORCH_CHECK(x.quantile >= 0 && x.quantile <= 1, "quantile: got ", x.quantile,
                  ", expected 0 to 1");
  check_acc("acc", x.acc);
  check_product("product", x.product);
  check_product("gram_product", x.gram_product);
  const Sizes sizes{shape[0], shape[1], x.num_prefix_tokens, shape[2], rank};
  return x.acc == ScalarType::Double ? forward<double>(x, sizes) : forward<float>(x, sizes);
}

template <typename T>
BackwardOutput run_backward(const BackwardInputs& x, const Sizes& sizes) {
  const Scratch<T> up_buffer(sizes.rank * sizes.width);
  const Matrix<const T> up = to_matrix<T>(x.up, up_buffer);
  const bool has_grad_refined = x.grad_refined.has_value();
  BackwardParams<T> params{
      sizes,
      std::nullopt,
      TokenRows<T>(x.teacher),
      TokenRows<T>(x.teacher, x.product),
      PackedMatrix<T>(up),
      has_grad_refined ? PackedMatrix<T>(up.transposed()) : PackedMatrix<T>(0, 0),
      {static_cast<const T*>(x.hz.const_data_ptr()), sizes.images * sizes.patches(),
       2 * sizes.rank, 2 * sizes.rank},
      data_or_null<T>(x.grad_hz),
      data_or_null<T>(x.residual),
      data_or_null<T>(x.norms),
      data_or_null<T>(x.threshold),
      data_or_null<T>(x.outlier_weight),
      scalar_of<T>(x.grad_kd),
      scalar_of<T>(x.grad_outlier),
      scalar_of<T>(x.grad_info),
      std::nullopt,
      nullptr,
      ScalarType::Float,
      std::nullopt,
      std::nullopt};
  if (x.grad_kd.has_value()) params.student.emplace(*x.student);
  if (has_grad_refined) params.grad_refined.emplace(*x.grad_refined);
  Optional grad_student;
  const bool reaches_adapter = x.grad_kd.has_value() || x.grad_outlier.has_value() ||
                               x.grad_info.has_value() || has_grad_refined;
  if (x.student_dtype.has_value() && x.grad_kd.has_value()) {
    grad_student = new_tensor(x.teacher, {sizes.images, sizes.tokens, sizes.width},
                              *x.student_dtype);
    params.grad_student = data_of<char>(*grad_student);
    params.grad_student_dtype = *x.student_dtype;
  }
  if (x.down_dtype.has_value() && reaches_adapter) {
    params.grad_down = new_tensor(x.teacher, {sizes.width, sizes.rank}, *x.down_dtype);
  }
  if (x.up_dtype.has_value() && reaches_adapter) {
    params.grad_up = new_tensor(x.teacher, {sizes.rank, sizes.width}, *x.up_dtype);
  }
  if (params.grad_student != nullptr || params.grad_down.has_value() ||
      params.grad_up.has_value()) {
    backward(params);
  }
  const auto or_empty = [&](const Optional& tensor) {
    return tensor.has_value() ? *tensor : new_tensor(x.hz, {0}, scalar_type<T>());
  };
  return {or_empty(grad_student), or_empty(params.grad_down), or_empty(params.grad_up)};
}

BackwardOutput losses_backward(Optional student, Tensor teacher, Tensor up, Tensor hz,
                               Optional grad_hz, Optional residual, Optional norms,
                               Optional threshold, Optional outlier_weight, Optional grad_kd,
                               Optional grad_outlier, Optional grad_info, Optional grad_refined,
                               int64_t num_prefix_tokens, ScalarType acc, ScalarType product,
                               OptionalDtype student_dtype, OptionalDtype down_dtype,
                               OptionalDtype up_dtype) {
  const BackwardInputs x{student,        teacher,           up,           hz,
                         grad_hz,        residual,          norms,        threshold,
                         outlier_weight, grad_kd,           grad_outlier, grad_info,
                         grad_refined,   num_prefix_tokens, acc,          product,
                         student_dtype,  down_dtype,        up_dtype};
  check_cpu("teacher", x.teacher);
  check_tokens("teacher", x.teacher, x.num_prefix_tokens);
  check_acc("acc", x.acc);
  check_product("product", x.product);
  for (const auto& dtype : {x.student_dtype, x.down_dtype, x.up_dtype}) {
    if (dtype.has_value()) check_product("a gradient's dtype", *dtype);
  }
  const auto shape = shape_of(x.teacher);
  check_tensor("up", x.up, 2, x.teacher);
  const int64_t images = shape[0], patches = shape[1] - x.num_prefix_tokens, rank = x.up.size(0);
  STD_TORCH_CHECK(rank > 0, "up: got rank 0, expected at least 1");
  check_shape("up", x.up, {rank, shape[2]}, x.teacher);
  STD_TORCH_CHECK(!x.grad_kd.has_value() || x.student.has_value(),
                  "student: got None, expected a tensor with grad_kd");
  if (x.student.has_value()) check_shape("student", *x.student, shape, x.teacher);
  const auto check_saved = [&](const char* name, const Optional& tensor,
                               const std::vector<int64_t>& expected, bool is_needed) {
    STD_TORCH_CHECK(!is_needed || tensor.has_value(), name, ": got None, expected a tensor");
    check_dense(name, tensor, expected, x.teacher, x.acc);
  };
  const bool has_outlier = x.grad_outlier.has_value();
  check_saved("hz", x.hz, {images, patches, 2 * rank}, true);
  check_saved("grad_hz", x.grad_hz, {images, patches, 2 * rank}, x.grad_info.has_value());
  check_saved("residual", x.residual, {images, patches, rank},
              x.grad_kd.has_value() && x.down_dtype.has_value());
  check_saved("norms", x.norms, {images, patches}, has_outlier);
  check_saved("threshold", x.threshold, {images}, has_outlier);
  check_saved("outlier_weight", x.outlier_weight, {}, has_outlier);
  if (x.grad_kd.has_value()) check_shape("grad_kd", *x.grad_kd, {}, x.teacher);
  if (x.grad_outlier.has_value()) check_shape("grad_outlier", *x.grad_outlier, {}, x.teacher);
  if (x.grad_info.has_value()) check_shape("grad_info", *x.grad_info, {}, x.teacher);
  if (x.grad_refined.has_value()) check_shape("grad_refined", *x.grad_refined, shape, x.teacher);
  const Sizes sizes{images, shape[1], x.num_prefix_tokens, shape[2], rank};
  return x.acc == ScalarType::Double ? run_backward<double>(x, sizes)
                                     : run_backward<float>(x, sizes);
}

template <typename T>
GramLossOutput run_gram_loss(const GramLossInputs& x) {
  constexpr ScalarType acc = scalar_type<T>();
  const Sizes sizes{x.tokens.size(0), x.tokens.size(1), x.num_prefix_tokens, x.tokens.size(2), 0};
  const int64_t images = sizes.images, patches = sizes.patches(), width = sizes.width;
  const auto new_gradient = [&](bool is_needed) {
    return is_needed ? new_tensor(x.tokens, {images, patches, width}, acc)
                     : new_tensor(x.tokens, {0}, acc);
  };
  const Tensor loss = new_tensor(x.tokens, {}, acc);
  const Tensor grad_tokens = new_gradient(x.has_grad_tokens);
  const Tensor grad_target = new_gradient(x.has_grad_target);
  const TokenRows<T> tokens(x.tokens, x.product), target(x.target, x.product);
  std::vector<double> squares(images, 0.0);
  const int64_t group = images_per_group(images, patches);
  for (int64_t start = 0; start < images; start += group) {
    const int64_t count = std::min(group, images - start);
    std::vector<std::unique_ptr<NormalizedImage<T>>> own(count), other(count);
    for (int64_t i = 0; i < count; ++i) {
      own[i] = std::make_unique<NormalizedImage<T>>(sizes, x.has_grad_tokens);
      other[i] = std::make_unique<NormalizedImage<T>>(sizes, x.has_grad_target);
    }
    normalize(tokens, sizes, start, own);
    normalize(target, sizes, start, other);
    std::vector<GramParams<T>> group_params(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = (start + i) * patches * width;
      group_params[i] = {
          patches, width,
          gram_side(*own[i], x.has_grad_tokens ? data_of<T>(grad_tokens) + offset : nullptr),
          gram_side(*other[i], x.has_grad_target ? data_of<T>(grad_target) + offset : nullptr), 0,
          gram_scale<T>(sizes)};
    }
    cpu::gram(group_params, squares.data() + start);
  }
  *data_of<T>(loss) = mean_square<T>(squares, patches);
  return {loss, grad_tokens, grad_target};
}

GramLossOutput gram_loss(Tensor tokens, Tensor target, int64_t num_prefix_tokens,
                         bool has_grad_tokens, bool has_grad_target, ScalarType acc,
                         ScalarType product) {
  check_cpu("tokens", tokens);
  check_tokens("tokens", tokens, num_prefix_tokens);
  check_shape("target", target, shape_of(tokens), tokens);
  check_acc("acc", acc);
  check_product("product", product);
  const GramLossInputs x{tokens, target, num_prefix_tokens, has_grad_tokens, has_grad_target,
                         acc,    product};
  return acc == ScalarType::Double ? run_gram_loss<double>(x) : run_gram_loss<float>(x);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singer_kernels, CPU, library) {
  library.impl("cpu_losses_forward", TORCH_BOX(&losses_forward));
  library.impl("cpu_losses_backward", TORCH_BOX(&losses_backward));
  library.impl("cpu_gram_loss", TORCH_BOX(&gram_loss));
}

}  // namespace singer::cpu
