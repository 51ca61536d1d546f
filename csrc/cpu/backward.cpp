// Stage `backward`: dS, and the sums over patches dWd = F^T dH and dWu = V^T F^ + H^T (Y - dS).
//
// First dH and V, by blocks of rows; then the rest, by slices of the width D. A thread takes a
// slice of all patches: nothing of width D is stored, and the order of summation is fixed.
#include "math/backward.h"

#include "cpu/stages.h"
#include "math/outlier.h"

namespace singer::cpu {

namespace {

// Patches per step of a slice: with a slice's width, they stay in the cache.
constexpr int64_t kSliceRows = 96;

// Largest width of a slice, in panels: wider slices read longer pieces of rows.
constexpr int64_t kMaxPanels = 4;

// Return the widest slice, in panels, with which all threads end at about the same time.
int64_t panels_per_slice(int64_t panels) {
  const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
  int64_t best = 1, shortest = panels + 1;
  for (int64_t width = 1; width <= kMaxPanels; ++width) {
    const int64_t longest = ceil_div(ceil_div(panels, width), threads) * width;
    if (longest <= shortest) {
      best = width;
      shortest = longest;
    }
  }
  return best;
}

template <typename T>
class Backward {
 public:
  explicit Backward(const BackwardParams<T>& params)
      : params_(params),
        sizes_(params.sizes),
        patches_(sizes_.images * sizes_.patches()),
        has_kd_(params.grad_kd.has_value()),
        has_grad_refined_(params.grad_refined.has_value()),
        needs_down_(params.grad_down.has_value()),
        needs_up_(params.grad_up.has_value()),
        needs_v_(needs_up_ && (params.grad_outlier.has_value() || params.grad_info.has_value())),
        needs_student_(has_kd_ && (needs_up_ || params.grad_student != nullptr)),
        needs_refined_(needs_student_ || needs_v_),
        alpha_(has_kd_ ? kd_scale(sizes_.images, sizes_.tokens, sizes_.width, *params.grad_kd)
                       : T(0)),
        is_student_direct_(params.grad_student_dtype == scalar_type<T>()),
        grad_h_(needs_down_ ? patches_ * sizes_.rank : 0),
        v_(needs_v_ ? patches_ * sizes_.rank : 0) {}

  void prefix() const;
  void rows() const;
  void slices() const;

 private:
  struct Token {
    int64_t image, index;
  };
  Token token_of(int64_t patch) const {
    return {patch / sizes_.patches(), sizes_.prefix + patch % sizes_.patches()};
  }

  char* grad_student_at(const Token& token, int64_t column) const {
    const int64_t row = token.image * sizes_.tokens + token.index;
    return params_.grad_student +
           (row * sizes_.width + column) * size_of(params_.grad_student_dtype);
  }

  class Slice;

  const BackwardParams<T>& params_;
  const Sizes& sizes_;
  int64_t patches_;
  bool has_kd_, has_grad_refined_, needs_down_, needs_up_;
  bool needs_v_;
  bool needs_student_;      // dS, requested or for dWu
  bool needs_refined_;      // F^, for dS or dWu
  T alpha_;                 // a
  bool is_student_direct_;  // dS is written in place, without conversion
  Scratch<T> grad_h_, v_;   // dH and V, [B P, r]
};

// dS of the prefix tokens, where F^ = F.
template <typename T>
void Backward<T>::prefix() const {
  const int64_t width = sizes_.width, count = sizes_.images * sizes_.prefix;
  if (params_.grad_student == nullptr) return;
  parallel_ranges(count, 4 * width, [&](int64_t begin, int64_t end) {
    const Scratch<T> buffer(3 * width);
    T* out = buffer.data() + 2 * width;
    for (int64_t i = begin; i < end; ++i) {
      const Token token{i / sizes_.prefix, i % sizes_.prefix};
      const T* teacher = params_.teacher.row(token.image, token.index, buffer.data());
      const T* student = params_.student->row(token.image, token.index, buffer.data() + width);
      simd_kernels<T>().student_gradient(teacher, student, alpha_, width, out);
      simd_kernels<T>().write(out, params_.grad_student_dtype, width, grad_student_at(token, 0));
    }
  });
}

// V = X H + c H and dH = X Z + c Z + a (F^ - S) Wu^T + Y Wu^T.
template <typename T>
void Backward<T>::rows() const {
  if (!needs_down_ && !needs_v_) return;
  const SimdKernels<T>& simd = simd_kernels<T>();
  const int64_t width = sizes_.width, rank = sizes_.rank;
  const bool has_grad_refined_up = has_grad_refined_ && needs_down_;
  const T grad_info = params_.grad_info.value_or(T(0));
  const T weight =
      params_.grad_outlier.has_value() ? *params_.outlier_weight * *params_.grad_outlier : T(0);
  const int64_t blocks = ceil_div(patches_, kBlockRows);
  const int64_t cost = kBlockRows * rank * (has_grad_refined_up ? width : 8);
  parallel_queue(blocks, cost, [&](TaskQueue& queue) {
    const Scratch<T> buffer(has_grad_refined_up ? kBlockRows * width : 0);
    const Scratch<T> grad_refined_up(has_grad_refined_up ? kBlockRows * rank : 0);
    for (int64_t task; queue.take(task);) {
      const RowBlock block{task * kBlockRows, std::min(kBlockRows, patches_ - task * kBlockRows)};
      // 1. Y Wu^T.
      if (has_grad_refined_up) {
        const Matrix<const T> grad_refined =
            gather(*params_.grad_refined, block, sizes_.patches(), sizes_.prefix, width,
                   buffer.data());
        params_.up_transposed.view().multiply(grad_refined,
                                              {grad_refined_up.data(), block.count, rank, rank});
      }
      for (int64_t i = 0; i < block.count; ++i) {
        const int64_t patch = block.first + i;
        // 2. c.
        const bool has_outlier = params_.grad_outlier.has_value();
        T coefficient = 0;
        if (has_outlier) {
          coefficient = outlier_coefficient(params_.norms[patch],
                                            params_.threshold[token_of(patch).image], weight);
        }
        // 3. V and dH.
        const T* hz = params_.hz.row(patch);
        const T* grad_hz =
            params_.grad_info.has_value() ? params_.grad_hz + patch * 2 * rank : nullptr;
        if (needs_v_) {
          simd.backward_row(grad_hz, grad_info, has_outlier ? hz : nullptr, coefficient, nullptr,
                            T(0), nullptr, rank, v_.data() + patch * rank);
        }
        if (needs_down_) {
          simd.backward_row(grad_hz == nullptr ? nullptr : grad_hz + rank, grad_info,
                            has_outlier ? hz + rank : nullptr, coefficient,
                            has_kd_ ? params_.residual + patch * rank : nullptr,
                            alpha_,
                            has_grad_refined_up ? grad_refined_up.data() + i * rank : nullptr, rank,
                            grad_h_.data() + patch * rank);
        }
      }
    }
  });
}

// A thread's buffers and sums for one slice of the width of all patches.
template <typename T>
class Backward<T>::Slice {
 public:
  Slice(const Backward& stage, int64_t max_panels)
      : stage_(stage),
        width_(max_panels * simd_kernels<T>().panel_width),
        area_(kSliceRows * width_),
        teacher_(buffer_size(stage.needs_refined_, params().teacher)),
        operand_(buffer_size(stage.needs_down_ && !shares_teacher(), params().operand)),
        student_(stage.needs_student_ ? buffer_size(true, *params().student) : 0),
        grad_refined_(uses_grad_refined() ? buffer_size(true, *params().grad_refined) : 0),
        grad_student_(params().grad_student != nullptr && !stage.is_student_direct_ ? area_ : 0),
        refined_panels_(zeros(stage.needs_refined_)),
        operand_panels_(zeros(stage.needs_down_)),
        grad_student_panels_(zeros(stage.needs_student_)),
        grad_refined_panels_(zeros(uses_grad_refined())),
        sums_(2 * stage.sizes_.rank * width_) {}

  // Compute the outputs of the panels from `panel` on.
  void run(int64_t panel, int64_t panels) const {
    const int64_t start = panel * simd_kernels<T>().panel_width;
    const int64_t width =
        std::min(panels * simd_kernels<T>().panel_width, stage_.sizes_.width - start);
    for (int64_t first = 0; first < stage_.patches_; first += kSliceRows) {
      add_rows(start, width, {first, std::min(kSliceRows, stage_.patches_ - first)});
    }
    write(start, width);
  }

 private:
  const BackwardParams<T>& params() const { return stage_.params_; }
  bool uses_grad_refined() const { return stage_.has_grad_refined_ && stage_.needs_up_; }
  // Whether the products take F unrounded: `teacher`, which is read anyway.
  bool shares_teacher() const { return stage_.needs_refined_ && !params().operand.is_rounded(); }
  int64_t buffer_size(bool is_needed, const TokenRows<T>& rows) const {
    return is_needed && !rows.is_direct() ? area_ : 0;
  }
  // Panels are initialised, as products read whole vectors; results beyond the width are dropped.
  Scratch<T> zeros(bool is_needed) const {
    Scratch<T> result(is_needed ? area_ : 0);
    if (is_needed) std::fill(result.data(), result.data() + area_, T(0));
    return result;
  }

  Matrix<T> grad_down_t(int64_t width) const {
    return {sums_.data(), stage_.sizes_.rank, width, width_};
  }
  Matrix<T> grad_up(int64_t width) const {
    const int64_t rank = stage_.sizes_.rank;
    return {sums_.data() + rank * width_, rank, width, width_};
  }

  void add_rows(int64_t start, int64_t width, const RowBlock& block) const;
  void write(int64_t start, int64_t width) const;

  const Backward& stage_;
  int64_t width_, area_;  // the largest width, and elements of that many columns of kSliceRows rows
  Scratch<T> teacher_, operand_, student_, grad_refined_, grad_student_;
  Scratch<T> refined_panels_, operand_panels_, grad_student_panels_, grad_refined_panels_;
  Scratch<T> sums_;  // dWd^T and dWu of the slice, [r, width_] each
};

template <typename T>
void Backward<T>::Slice::add_rows(int64_t start, int64_t width, const RowBlock& block) const {
  const SimdKernels<T>& simd = simd_kernels<T>();
  const int64_t rank = stage_.sizes_.rank, panel_width = simd.panel_width;
  const int64_t panel_stride = kSliceRows * panel_width;
  // 1. The slice of each row, in place or read.
  const T *teacher[kSliceRows], *operand[kSliceRows], *student[kSliceRows],
      *grad_refined[kSliceRows];
  T* grad_student[kSliceRows];
  for (int64_t i = 0; i < block.count; ++i) {
    const Token token = stage_.token_of(block.first + i);
    const auto slice_of = [&](const TokenRows<T>& rows, const Scratch<T>& buffer) {
      T* read_to = buffer.data() == nullptr ? nullptr : buffer.data() + i * width_;
      return rows.width_slice(token.image, token.index, start, width, read_to);
    };
    if (stage_.needs_refined_) teacher[i] = slice_of(params().teacher, teacher_);
    if (stage_.needs_down_) {
      operand[i] = shares_teacher() ? teacher[i] : slice_of(params().operand, operand_);
    }
    if (stage_.needs_student_) student[i] = slice_of(*params().student, student_);
    if (uses_grad_refined()) grad_refined[i] = slice_of(*params().grad_refined, grad_refined_);
    if (params().grad_student != nullptr) {
      grad_student[i] = stage_.is_student_direct_
                            ? reinterpret_cast<T*>(stage_.grad_student_at(token, start))
                            : grad_student_.data() + i * width_;
    }
  }
  // 2. H Wu, F^ and dS.
  const Matrix<const T> h{params().hz.row(block.first), block.count, rank, params().hz.row_stride};
  if (stage_.needs_refined_) {
    PackedView<T> up = params().up.view().from_panel(start / panel_width);
    up.columns = round_up(width, simd.lanes);
    up.multiply_into_panels(h, {refined_panels_.data(), block.count, up.columns, panel_width},
                            panel_stride);
  }
  simd.backward_tile({block.count, width, panel_stride, stage_.alpha_, teacher, operand,
                      stage_.needs_student_ ? student : nullptr, grad_refined,
                      refined_panels_.data(), operand_panels_.data(), grad_student_panels_.data(),
                      grad_refined_panels_.data(),
                      params().grad_student != nullptr ? grad_student : nullptr});
  if (params().grad_student != nullptr && !stage_.is_student_direct_) {
    for (int64_t i = 0; i < block.count; ++i) {
      simd.write(grad_student[i], params().grad_student_dtype, width,
                 stage_.grad_student_at(stage_.token_of(block.first + i), start));
    }
  }
  // 3. Add to dWd^T = dH^T F and dWu = V^T F^ + H^T (Y - dS).
  const auto add = [&](const Matrix<const T>& left, const Scratch<T>& right, const Matrix<T>& out,
                       bool accumulate, T factor) {
    PackedView<T>{right.data(), panel_stride, width}.multiply(left.transposed(), out, accumulate,
                                                              factor);
  };
  const auto rows_of = [&](const Scratch<T>& matrix) {  // [B P, r]
    return Matrix<const T>{matrix.data() + block.first * rank, block.count, rank, rank};
  };
  bool accumulate = block.first > 0;
  if (stage_.needs_down_) {
    add(rows_of(stage_.grad_h_), operand_panels_, grad_down_t(width), accumulate, T(1));
  }
  if (stage_.needs_v_) {
    add(rows_of(stage_.v_), refined_panels_, grad_up(width), accumulate, T(1));
    accumulate = true;
  }
  if (stage_.needs_up_ && stage_.has_kd_) {
    add(h, grad_student_panels_, grad_up(width), accumulate, T(-1));
    accumulate = true;
  }
  if (uses_grad_refined()) add(h, grad_refined_panels_, grad_up(width), accumulate, T(1));
}

// Write dWd and dWu of the slice, rounded to their dtypes.
template <typename T>
void Backward<T>::Slice::write(int64_t start, int64_t width) const {
  const int64_t rank = stage_.sizes_.rank;
  const auto write_row = [&](const T* row, int64_t count, const Tensor& out, int64_t offset) {
    const ScalarType dtype = out.scalar_type();
    simd_kernels<T>().write(row, dtype, count,
                            static_cast<char*>(out.mutable_data_ptr()) + offset * size_of(dtype));
  };
  if (stage_.needs_down_) {
    const Matrix<T> down_t = grad_down_t(width);
    const Scratch<T> row(rank);
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t i = 0; i < rank; ++i) row.data()[i] = down_t.row(i)[j];
      write_row(row.data(), rank, *params().grad_down, (start + j) * rank);
    }
  }
  if (stage_.needs_up_) {
    const Matrix<T> up = grad_up(width);
    for (int64_t i = 0; i < rank; ++i) {
      write_row(up.row(i), width, *params().grad_up, i * stage_.sizes_.width + start);
    }
  }
}

template <typename T>
void Backward<T>::slices() const {
  const int64_t width = simd_kernels<T>().panel_width, panels = ceil_div(sizes_.width, width);
  const int64_t per_slice = panels_per_slice(panels), count = ceil_div(panels, per_slice);
  parallel_queue(count, patches_ * per_slice * width * sizes_.rank, [&](TaskQueue& queue) {
    const Slice slice(*this, per_slice);
    for (int64_t task; queue.take(task);) {
      slice.run(task * per_slice, std::min(per_slice, panels - task * per_slice));
    }
  });
}

}  // namespace

template <typename T>
void backward(const BackwardParams<T>& params) {
  const Backward<T> stage(params);
  stage.prefix();
  stage.rows();
  stage.slices();
}

template void backward(const BackwardParams<float>&);
template void backward(const BackwardParams<double>&);

}  // namespace singer::cpu
