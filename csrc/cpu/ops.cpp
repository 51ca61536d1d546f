// The operators on the CPU. Their schemas stand in singer_kernels/backends/operators.py.
#include <tuple>

#include "cpu/stages.h"

namespace singer::cpu {
namespace {

using Optional = std::optional<Tensor>;

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* data_or_null(const Optional& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// An upstream gradient, [] of any dtype, in the accumulation dtype.
template <typename T>
struct Scalar {
  T value = 0;
  const T* address = nullptr;

  explicit Scalar(const Optional& tensor) {
    if (!tensor.has_value()) return;
    const Dtype dtype = dtype_of(tensor->scalar_type());
    loops<T>().read(tensor->const_data_ptr(), dtype, 1, 1, dtype, &value);
    address = &value;
  }
  Scalar(const Scalar&) = delete;
};

template <typename T>
double total(const T* values, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(values[i]);
  return sum;
}

void check_cpu(const char* name, const Tensor& tensor) {
  check_given(name, tensor);
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a tensor on the CPU");
}

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

// How many images are taken together: groups of about the same size. No result depends on it.
int64_t images_together(int64_t images, int64_t patches) {
  const int64_t wanted = kGroupPatches * static_cast<int64_t>(torch::stable::get_num_threads());
  // Right factors are about as large as if P were a multiple of that.
  const int64_t most = std::max<int64_t>(1, wanted / round_up(patches, kRunRows));
  return parts_of(images, parts_of(images, most));
}

// M = Wu Wu^T, packed.
template <typename T>
Packed<T> overlap_of(const Matrix<const T>& up, const Packed<T>& up_transposed) {
  constexpr int64_t kRows = 12;  // those of the largest tile
  const Scratch<T> data(up.rows * up.rows);
  const Matrix<T> overlap{data.data(), up.rows, up.rows, up.rows};
  parallel(parts_of(up.rows, kRows), kRows * up.rows * up.columns, [&](int64_t i) {
    const int64_t first = i * kRows, count = std::min(kRows, up.rows - first);
    up_transposed.multiply(up.from(first, count), overlap.from(first, count));
  });
  return Packed<T>(overlap);
}

// A side that consists of a tensor's rows; with `gradient` its gradient goes there.
template <typename T>
GramSide<T> side_of(const TokenGramRows<T>& tokens, T* gradient) {
  GramSide<T> side{};
  side.rows = tokens.rows.packed.factor();
  side.inverses = tokens.rows.inverses.data();
  if (gradient == nullptr) return side;
  side.columns = tokens.kept;
  side.norms = tokens.norms.data();
  side.scaled = tokens.scaled.factor();
  side.gram_columns = {gradient, side.columns.rows, side.columns.columns, side.columns.columns};
  return side;
}

// Of the plain teacher, F F^T follows from F^ F^^T where that is the smaller product, unless F^ is so
// much larger that F would be lost in the difference.
template <typename T>
bool takes_identity(const RefineCall<T>& call, int64_t image) {
  constexpr T kMostGrowth = 4;
  if (call.overlap.blocks() == 0) return false;
  const int64_t patches = call.sizes.patches(), first = image * patches;
  for (int64_t i = first; i < first + patches; ++i) {
    if (call.norms[i] > kMostGrowth * call.plain_norms[i]) return false;
  }
  return true;
}

// F^ of so many images from `begin` on, what it is compared with (`target`, as it is: F^ isn't rounded
// either, and one rounded alone would make a loss), and the sums of E^2.
template <typename T>
void refine_and_compare(const RefineCall<T>& call, int64_t begin, int64_t count,
                        const TokenRows<T>& target, T* gram_columns, T* d_target,
                        double* squares) {
  const Sizes& sizes = call.sizes;
  const int64_t patches = sizes.patches(), width = sizes.width, rank = sizes.rank;
  std::vector<std::unique_ptr<RefinedImage<T>>> refined(count);
  for (auto& image : refined) {
    image = std::make_unique<RefinedImage<T>>(sizes, call.overlap.blocks() > 0, call.has_gradient);
  }
  refine(call, begin, count, refined);
  std::vector<std::unique_ptr<TokenGramRows<T>>> targets(count);  // null: the identity serves
  bool reads_targets = false;
  for (int64_t i = 0; i < count; ++i) {
    if (takes_identity(call, begin + i)) continue;
    targets[i] = std::make_unique<TokenGramRows<T>>(sizes, d_target != nullptr);
    reads_targets = true;
  }
  if (reads_targets) read_gram_rows(target, sizes, begin, targets);
  std::vector<GramCall<T>> calls(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = (begin + i) * patches;
    const RefinedImage<T>& image = *refined[i];
    GramSide<T> own{}, other{};
    own.rows = image.refined.packed.factor();
    own.inverses = image.refined.inverses.data();
    if (gram_columns != nullptr) {
      own.columns = Matrix<const T>(call.columns).from(first, patches);
      own.norms = call.norms + first;
      own.scaled = image.scaled.factor();
      own.gram_columns = {gram_columns + first * 2 * rank, patches, 2 * rank, 2 * rank};
    }
    const bool has_identity = targets[i] == nullptr;
    if (has_identity) {
      other.rows = image.halves.factor();
      other.inverses = image.plain_inverses.data();
    } else {
      other = side_of(*targets[i], d_target == nullptr ? nullptr : d_target + first * width);
    }
    calls[i] = {patches, width, own, other, has_identity ? rank : 0, gram_scale<T>(sizes)};
  }
  cpu::gram(calls, squares);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                           Tensor, Tensor>;

template <typename T>
Outputs forward(const Tensor& student, const Tensor& teacher, const Tensor& down, const Tensor& up,
                const Optional& gram_target, bool gram, double quantile, const Sizes& sizes,
                bool has_refined, bool has_residual, bool has_gram_columns, bool has_d_target,
                ScalarType product) {
  constexpr ScalarType acc = scalar_type<T>();
  const int64_t images = sizes.images, patches = sizes.patches();
  const int64_t width = sizes.width, rank = sizes.rank;
  const auto optional_tensor = [&](bool wanted, std::initializer_list<int64_t> shape,
                                   ScalarType dtype) {
    return wanted ? new_tensor(teacher, shape, dtype) : new_tensor(teacher, {0}, dtype);
  };
  const Tensor kd = new_tensor(teacher, {}, acc), outlier_loss = new_tensor(teacher, {}, acc);
  const Tensor info = gram ? new_tensor(teacher, {}, acc) : new_tensor(teacher, {0}, acc);
  const Tensor refined = optional_tensor(has_refined, {images, sizes.tokens, width},
                                         teacher.scalar_type());
  const Tensor norms = new_tensor(teacher, {images, patches}, acc);
  const Tensor threshold = new_tensor(teacher, {images}, acc);
  const Tensor weight = new_tensor(teacher, {}, acc);
  const Tensor columns = new_tensor(teacher, {images, patches, 2 * rank}, acc);
  const Tensor residual = optional_tensor(has_residual, {images, patches, rank}, acc);
  const Tensor gram_columns = optional_tensor(has_gram_columns, {images, patches, 2 * rank}, acc);
  const Tensor d_target = optional_tensor(has_d_target, {images, patches, width}, acc);

  const Scratch<T> down_buffer(width * rank), up_buffer(rank * width);
  const Scratch<T> plain_norms(images * patches), kd_parts(images * sizes.tokens);
  const Scratch<T> parts(2 * images);
  const Matrix<const T> wide_up = dense<T>(up, up_buffer);
  Packed<T> up_transposed(wide_up.transposed());
  const bool has_identity = gram && !gram_target.has_value() && 2 * rank < width;
  Packed<T> overlap = has_identity ? overlap_of(wide_up, up_transposed) : Packed<T>(0, 0);
  const RefineCall<T> call{
      sizes,
      TokenRows<T>(student),
      TokenRows<T>(teacher),
      TokenRows<T>(teacher, dtype_of(product)),
      Packed<T>(dense<T>(down, down_buffer)),
      Packed<T>(wide_up),
      std::move(up_transposed),
      std::move(overlap),
      {data_of<T>(columns), images * patches, 2 * rank, 2 * rank},
      {has_residual ? data_of<T>(residual) : nullptr, images * patches, rank, rank},
      data_of<T>(norms),
      plain_norms.data(),
      kd_parts.data(),
      has_refined ? data_of<char>(refined) : nullptr,
      dtype_of(teacher.scalar_type()),
      has_gram_columns};
  refine_prefix(call);

  const TokenRows<T> target(gram_target.has_value() ? *gram_target : teacher);
  std::vector<double> squares(images, 0.0);
  // What a Gram matrix is made of is kept no longer than it.
  const int64_t together = images_together(images, patches);
  for (int64_t start = 0; gram && start < images; start += together) {
    refine_and_compare(call, start, std::min(together, images - start), target,
                       has_gram_columns ? data_of<T>(gram_columns) : nullptr,
                       has_d_target ? data_of<T>(d_target) : nullptr, squares.data() + start);
  }
  if (!gram) refine(call, 0, images, {});
  outlier(OutlierCall<T>{images, patches, quantile, call.norms, data_of<T>(threshold),
                         parts.data(), parts.data() + images});

  const double entries = static_cast<double>(images) * sizes.tokens * width;
  const double count = std::max(total(parts.data() + images, images), 1.0);
  *data_of<T>(kd) = static_cast<T>(total(kd_parts.data(), images * sizes.tokens) / entries);
  *data_of<T>(outlier_loss) = static_cast<T>(total(parts.data(), images) / count);
  *data_of<T>(weight) = static_cast<T>(2 / count);
  if (gram) {
    *data_of<T>(info) = mean_square<T>(squares, patches);
  }
  return {kd,     outlier_loss, info,     refined,      norms,   threshold,
          weight, columns,      residual, gram_columns, d_target};
}

Outputs losses_forward(Tensor student, Tensor teacher, Tensor down, Tensor up,
                       Optional gram_target, bool gram, double quantile, int64_t prefix,
                       bool has_refined, bool has_residual, bool has_gram_columns,
                       bool has_d_target, ScalarType acc, ScalarType product,
                       ScalarType gram_product) {
  check_cpu("teacher", teacher);
  check_tokens("teacher", teacher, prefix);
  const auto shape = shape_of(teacher);
  check_shape("student", student, shape, teacher);
  check_tensor("down", down, 2, teacher);
  const int64_t rank = down.size(1);
  STD_TORCH_CHECK(rank > 0, "down: got rank 0, expected at least 1");
  check_shape("down", down, {shape[2], rank}, teacher);
  check_shape("up", up, {rank, shape[2]}, teacher);
  if (gram_target.has_value()) check_shape("gram_target", *gram_target, shape, teacher);
  STD_TORCH_CHECK(gram || !(gram_target.has_value() || has_gram_columns || has_d_target),
                  "gram: got False, expected True with a target or gradients of its own");
  STD_TORCH_CHECK(!has_d_target || gram_target.has_value(),
                  "gram_target: got None, expected a tensor with has_d_target");
  STD_TORCH_CHECK(quantile >= 0 && quantile <= 1, "quantile: got ", quantile, ", expected 0 to 1");
  check_acc("acc", acc);
  check_product("product", product);
  check_product("gram_product", gram_product);
  const Sizes sizes{shape[0], shape[1], prefix, shape[2], rank};
  const auto run = acc == ScalarType::Double ? forward<double> : forward<float>;
  return run(student, teacher, down, up, gram_target, gram, quantile, sizes, has_refined,
             has_residual, has_gram_columns, has_d_target, product);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor>;

template <typename T>
Gradients run_backward(const Optional& student, const Tensor& teacher, const Tensor& up,
                       const Tensor& columns, const Optional& gram_columns,
                       const Optional& residual, const Optional& norms, const Optional& threshold,
                       const Optional& outlier_weight, const Optional& d_kd,
                       const Optional& d_outlier, const Optional& d_info,
                       const Optional& d_refined, const Sizes& sizes, ScalarType product,
                       std::optional<ScalarType> student_dtype,
                       std::optional<ScalarType> down_dtype, std::optional<ScalarType> up_dtype) {
  constexpr ScalarType acc = scalar_type<T>();
  const bool reaches = d_kd.has_value() || d_outlier.has_value() || d_info.has_value() ||
                       d_refined.has_value();
  const Scratch<T> up_buffer(sizes.rank * sizes.width);
  const Matrix<const T> wide_up = dense<T>(up, up_buffer);
  const Scalar<T> kd(d_kd), outlier_loss(d_outlier), info(d_info);
  BackwardCall<T> call{sizes,
                       std::nullopt,
                       TokenRows<T>(teacher),
                       TokenRows<T>(teacher, dtype_of(product)),
                       Packed<T>(wide_up),
                       d_refined.has_value() ? Packed<T>(wide_up.transposed()) : Packed<T>(0, 0),
                       {static_cast<const T*>(columns.const_data_ptr()),
                        sizes.images * sizes.patches(), 2 * sizes.rank, 2 * sizes.rank},
                       data_or_null<T>(gram_columns),
                       data_or_null<T>(residual),
                       data_or_null<T>(norms),
                       data_or_null<T>(threshold),
                       data_or_null<T>(outlier_weight),
                       kd.address,
                       outlier_loss.address,
                       info.address,
                       std::nullopt,
                       nullptr,
                       Dtype::kFloat,
                       std::nullopt,
                       std::nullopt};
  if (d_kd.has_value()) call.student.emplace(*student);
  if (d_refined.has_value()) call.d_refined.emplace(*d_refined);
  Tensor d_student = new_tensor(columns, {0}, acc), d_down = new_tensor(columns, {0}, acc),
         d_up = new_tensor(columns, {0}, acc);
  if (student_dtype.has_value() && d_kd.has_value()) {
    d_student = new_tensor(teacher, {sizes.images, sizes.tokens, sizes.width}, *student_dtype);
    call.d_student = data_of<char>(d_student);
    call.d_student_dtype = dtype_of(*student_dtype);
  }
  if (down_dtype.has_value() && reaches) {
    d_down = new_tensor(teacher, {sizes.width, sizes.rank}, *down_dtype);
    call.d_down = d_down;
  }
  if (up_dtype.has_value() && reaches) {
    d_up = new_tensor(teacher, {sizes.rank, sizes.width}, *up_dtype);
    call.d_up = d_up;
  }
  if (call.d_student != nullptr || call.d_down.has_value() || call.d_up.has_value()) {
    backward(call);
  }
  return {d_student, d_down, d_up};
}

Gradients losses_backward(Optional student, Tensor teacher, Tensor up, Tensor columns,
                          Optional gram_columns, Optional residual, Optional norms,
                          Optional threshold, Optional outlier_weight, Optional d_kd,
                          Optional d_outlier, Optional d_info, Optional d_refined, int64_t prefix,
                          ScalarType acc, ScalarType product,
                          std::optional<ScalarType> student_dtype,
                          std::optional<ScalarType> down_dtype,
                          std::optional<ScalarType> up_dtype) {
  check_cpu("teacher", teacher);
  check_tokens("teacher", teacher, prefix);
  check_acc("acc", acc);
  check_product("product", product);
  for (const auto& dtype : {student_dtype, down_dtype, up_dtype}) {
    if (dtype.has_value()) check_product("a gradient's dtype", *dtype);
  }
  const auto shape = shape_of(teacher);
  check_tensor("up", up, 2, teacher);
  const int64_t rank = up.size(0), patches = shape[1] - prefix;
  STD_TORCH_CHECK(rank > 0, "up: got rank 0, expected at least 1");
  check_shape("up", up, {rank, shape[2]}, teacher);
  check_kept("columns", columns, {shape[0], patches, 2 * rank}, acc, teacher);
  STD_TORCH_CHECK(!d_kd.has_value() || student.has_value(),
                  "student: got None, expected a tensor with d_kd");
  if (student.has_value()) check_shape("student", *student, shape, teacher);
  check_kept("gram_columns", gram_columns, {shape[0], patches, 2 * rank}, acc, teacher,
             d_info.has_value());
  check_kept("residual", residual, {shape[0], patches, rank}, acc, teacher,
             d_kd.has_value() && down_dtype.has_value());
  const bool has_outlier = d_outlier.has_value();
  check_kept("norms", norms, {shape[0], patches}, acc, teacher, has_outlier);
  check_kept("threshold", threshold, {shape[0]}, acc, teacher, has_outlier);
  check_kept("outlier_weight", outlier_weight, {}, acc, teacher, has_outlier);
  if (d_kd.has_value()) check_shape("d_kd", *d_kd, {}, teacher);
  if (d_outlier.has_value()) check_shape("d_outlier", *d_outlier, {}, teacher);
  if (d_info.has_value()) check_shape("d_info", *d_info, {}, teacher);
  if (d_refined.has_value()) check_shape("d_refined", *d_refined, shape, teacher);
  const Sizes sizes{shape[0], shape[1], prefix, shape[2], rank};
  const auto run = acc == ScalarType::Double ? run_backward<double> : run_backward<float>;
  return run(student, teacher, up, columns, gram_columns, residual, norms, threshold,
             outlier_weight, d_kd, d_outlier, d_info, d_refined, sizes, product, student_dtype,
             down_dtype, up_dtype);
}

template <typename T>
Gradients run_gram_loss(const Tensor& tokens, const Tensor& target, int64_t prefix,
                        bool has_d_tokens, bool has_d_target, ScalarType product) {
  constexpr ScalarType acc = scalar_type<T>();
  const int64_t images = tokens.size(0), patches = tokens.size(1) - prefix, width = tokens.size(2);
  const auto gradient = [&](bool wanted) {
    return wanted ? new_tensor(tokens, {images, patches, width}, acc)
                  : new_tensor(tokens, {0}, acc);
  };
  const Tensor loss = new_tensor(tokens, {}, acc);
  const Tensor d_tokens = gradient(has_d_tokens), d_target = gradient(has_d_target);
  const TokenRows<T> rows(tokens, dtype_of(product)), target_rows(target, dtype_of(product));
  const Sizes sizes{images, tokens.size(1), prefix, width, 0};
  std::vector<double> squares(images, 0.0);
  const int64_t together = images_together(images, patches);
  for (int64_t start = 0; start < images; start += together) {
    const int64_t count = std::min(together, images - start);
    std::vector<std::unique_ptr<TokenGramRows<T>>> own(count), other(count);
    for (int64_t i = 0; i < count; ++i) {
      own[i] = std::make_unique<TokenGramRows<T>>(sizes, has_d_tokens);
      other[i] = std::make_unique<TokenGramRows<T>>(sizes, has_d_target);
    }
    read_gram_rows(rows, sizes, start, own);
    read_gram_rows(target_rows, sizes, start, other);
    std::vector<GramCall<T>> calls(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t offset = (start + i) * patches * width;
      calls[i] = {patches, width,
                  side_of(*own[i], has_d_tokens ? data_of<T>(d_tokens) + offset : nullptr),
                  side_of(*other[i], has_d_target ? data_of<T>(d_target) + offset : nullptr), 0,
                  gram_scale<T>(sizes)};
    }
    cpu::gram(calls, squares.data() + start);
  }
  *data_of<T>(loss) = mean_square<T>(squares, patches);
  return {loss, d_tokens, d_target};
}

Gradients gram_loss(Tensor tokens, Tensor target, int64_t prefix, bool has_d_tokens,
                    bool has_d_target, ScalarType acc, ScalarType product) {
  check_cpu("tokens", tokens);
  check_tokens("tokens", tokens, prefix);
  check_shape("target", target, shape_of(tokens), tokens);
  check_acc("acc", acc);
  check_product("product", product);
  const auto run = acc == ScalarType::Double ? run_gram_loss<double> : run_gram_loss<float>;
  return run(tokens, target, prefix, has_d_tokens, has_d_target, product);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(singer_kernels, CPU, library) {
  library.impl("cpu_losses_forward", TORCH_BOX(&losses_forward));
  library.impl("cpu_losses_backward", TORCH_BOX(&losses_backward));
  library.impl("cpu_gram_loss", TORCH_BOX(&gram_loss));
}

}  // namespace singer::cpu
