// Stage `backward`: dS, and the sums over patches dWd = F^T dH, dWu = V^T F^ + H^T (Y - dS).
#include "math/backward.h"

#include "cpu/stages.h"
#include "math/outlier.h"

namespace singer::cpu {

namespace {

// Columns of F and F^ that one thread takes at once in the products of dWd and dWu.
constexpr int64_t kColumnsAtOnce = 48;

template <typename T>
void write_matrix(const Matrix<const T>& matrix, const Tensor& out) {
  const Dtype dtype = dtype_of(out.scalar_type());
  char* data = static_cast<char*>(out.mutable_data_ptr());
  parallel_ranges(matrix.rows, matrix.columns, [&](int64_t begin, int64_t end) {
    const Scratch<T> buffer(matrix.columns);
    for (int64_t i = begin; i < end; ++i) {
      // Only to take the stride out.
      loops<T>().read(matrix.row(i), dtype_of(scalar_type<T>()), matrix.column_stride,
                      matrix.columns, dtype_of(scalar_type<T>()), buffer.data());
      loops<T>().write(buffer.data(), dtype, matrix.columns,
                       data + i * matrix.columns * size_of(dtype));
    }
  });
}

template <typename T>
class Backward {
 public:
  explicit Backward(const BackwardCall<T>& call)
      : call_(call),
        sizes_(call.sizes),
        has_kd_(call.d_kd != nullptr),
        has_back_(call.d_refined.has_value()),
        has_turned_(call.d_outlier != nullptr || call.d_info != nullptr),
        needs_down_(call.d_down.has_value()),
        needs_up_(call.d_up.has_value()),
        needs_refined_(has_kd_ || (needs_up_ && has_turned_)),
        alpha_(has_kd_ ? kd_scale(sizes_.images, sizes_.tokens, sizes_.width, *call.d_kd) : T(0)),
        chunk_(std::min(kGroupRows, sizes_.images * sizes_.patches())),
        in_place_(sizes_.patches() >= kRunRows),
        plain_in_place_(in_place_ && call.operand.in_place(0, 0, 1).data != nullptr),
        pulled_in_place_(in_place_ && call.d_student != nullptr &&
                         call.d_student_dtype == dtype_of(scalar_type<T>())),
        plain_(needs_down_ && !plain_in_place_ ? chunk_ * sizes_.width : 0),
        refined_(needs_refined_ ? chunk_ * sizes_.width : 0),
        pulled_(has_kd_ && !pulled_in_place_ ? chunk_ * sizes_.width : 0),
        back_(has_back_ ? chunk_ * sizes_.width : 0) {}

  void prefix() const;
  void patches() const;

 private:
  // Where dS of a patch is written first: to its place in the output, or to a buffer.
  T* pulled(int64_t patch, const Run& chunk) const {
    if (!pulled_in_place_) return pulled_.data() + (patch - chunk.first) * sizes_.width;
    const int64_t row = patch / sizes_.patches() * sizes_.tokens + sizes_.prefix +
                        patch % sizes_.patches();
    return reinterpret_cast<T*>(call_.d_student) + row * sizes_.width;
  }

  // The columns of F from `start` on, transposed, of a part of the chunk in one image.
  Matrix<const T> plain_columns(const Run& part, const Run& chunk, int64_t start,
                                int64_t count) const {
    const int64_t width = sizes_.width, patches = sizes_.patches();
    Matrix<const T> rows{plain_.data() + (part.first - chunk.first) * width, part.count, width,
                         width};
    if (plain_in_place_) {
      rows = call_.operand.in_place(part.first / patches, sizes_.prefix + part.first % patches,
                                    part.count);
    }
    return rows.transposed().from(start, count);
  }

  struct Factors {
    const Packed<T>&hidden, &d_hidden, &turned;  // H, dH and V of a chunk
  };

  void row_gradients(const Run& run, const Run& chunk, const Factors& factors,
                     const Scratch<T>& row_buffer) const;
  void write_student(const T* row, int64_t image, int64_t token) const {
    loops<T>().write(row, call_.d_student_dtype, sizes_.width,
                     call_.d_student + (image * sizes_.tokens + token) * sizes_.width *
                                           size_of(call_.d_student_dtype));
  }

  const BackwardCall<T>& call_;
  const Sizes& sizes_;
  bool has_kd_, has_back_, has_turned_, needs_down_, needs_up_;
  bool needs_refined_;  // by dS and, through V, by dWu
  T alpha_;
  int64_t chunk_;
  bool in_place_;  // images are large enough for products of their own
  bool plain_in_place_, pulled_in_place_;
  Scratch<T> plain_, refined_, pulled_, back_;  // F, F^, dS and Y of a chunk
};

template <typename T>
void Backward<T>::prefix() const {
  const int64_t width = sizes_.width, count = sizes_.images * sizes_.prefix;
  if (call_.d_student == nullptr) return;
  parallel_ranges(count, 4 * width, [&](int64_t begin, int64_t end) {
    const Scratch<T> buffer(4 * width);
    T *refined = buffer.data() + 2 * width, *out = refined + width;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / sizes_.prefix, token = i % sizes_.prefix;
      const T* teacher = call_.teacher.row(image, token, buffer.data());
      const T* student = call_.student->row(image, token, buffer.data() + width);
      std::fill(refined, refined + width, T(0));
      loops<T>().student_gradient(refined, teacher, student, alpha_, width, out);
      write_student(out, image, token);
    }
  });
}

// What each row of a run gives by itself: dS, dH and V.
template <typename T>
void Backward<T>::row_gradients(const Run& run, const Run& chunk, const Factors& factors,
                                const Scratch<T>& row_buffer) const {
  const Loops<T>& loop = loops<T>();
  const int64_t width = sizes_.width, rank = sizes_.rank, patches = sizes_.patches();
  const int64_t place = run.first - chunk.first;
  const Matrix<const T> columns = call_.columns.from(run.first, run.count);
  const Matrix<const T> hidden{columns.data, run.count, rank, columns.row_stride};
  const Matrix<T> refined{refined_.data() + place * width, run.count, width, width};
  const Matrix<T> back{back_.data() + place * width, run.count, width, width};
  T* buffer = row_buffer.data();
  T* d_hidden = buffer + 2 * width;
  T* turned = d_hidden + kRunRows * rank;
  const Matrix<T> from_back{turned + kRunRows * rank, run.count, rank, rank};
  for (int64_t i = 0; has_back_ && i < run.count; ++i) {
    const int64_t patch = run.first + i;
    const T* row = call_.d_refined->row(patch / patches, sizes_.prefix + patch % patches,
                                        back.row(i));
    if (row != back.row(i)) std::copy(row, row + width, back.row(i));
  }
  if (has_back_ && needs_down_) call_.up_transposed.multiply(back, from_back);
  if (needs_refined_) call_.up.multiply(hidden, refined);
  const T weight =
      call_.d_outlier == nullptr ? T(0) : *call_.outlier_weight * *call_.d_outlier;
  const T d_info = call_.d_info == nullptr ? T(0) : *call_.d_info;
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t patch = run.first + i, image = patch / patches;
    const int64_t token = sizes_.prefix + patch % patches;
    if (needs_down_ && !plain_in_place_) {
      T* plain = plain_.data() + (place + i) * width;
      const T* row = call_.operand.row(image, token, plain);
      if (row != plain) std::copy(row, row + width, plain);
    }
    if (needs_refined_) {
      T* out = has_kd_ ? pulled(patch, chunk) : nullptr;
      loop.student_gradient(refined.row(i), call_.teacher.row(image, token, buffer),
                            has_kd_ ? call_.student->row(image, token, buffer + width) : nullptr,
                            alpha_, width, out);
      if (call_.d_student != nullptr && !pulled_in_place_) write_student(out, image, token);
    }
    T coefficient = 0;
    if (call_.d_outlier != nullptr) {
      coefficient = outlier_coefficient(call_.norms[patch], call_.threshold[image], weight);
    }
    const T* row = columns.row(i);
    const T* gram_row = call_.d_info == nullptr ? nullptr : call_.gram_columns + patch * 2 * rank;
    if (needs_up_ && has_turned_) {
      loop.column_gradient(gram_row, d_info, row, coefficient, nullptr, T(0), nullptr, rank,
                           turned + i * rank);
    }
    if (needs_down_) {
      loop.column_gradient(gram_row == nullptr ? nullptr : gram_row + rank, d_info, row + rank,
                           coefficient, has_kd_ ? call_.residual + patch * rank : nullptr, alpha_,
                           has_back_ ? from_back.row(i) : nullptr, rank, d_hidden + i * rank);
    }
  }
  if (needs_down_) factors.d_hidden.set({d_hidden, run.count, rank, rank}, place);
  if (needs_up_ && has_turned_) factors.turned.set({turned, run.count, rank, rank}, place);
  if (needs_up_ && (has_kd_ || has_back_)) factors.hidden.set(hidden, place);
}

template <typename T>
void Backward<T>::patches() const {
  const int64_t width = sizes_.width, rank = sizes_.rank, total = sizes_.images * sizes_.patches();
  const Scratch<T> sums(2 * width * rank);
  const Matrix<T> d_down{sums.data(), width, rank, rank};
  const Matrix<T> d_up{sums.data() + width * rank, width, rank, rank};  // transposed
  for (int64_t first = 0; first < total; first += chunk_) {
    const Run chunk{first, std::min(chunk_, total - first)};
    const Packed<T> hidden(chunk.count, rank), d_hidden(chunk.count, rank),
        turned(chunk.count, rank);
    const Factors factors{hidden, d_hidden, turned};
    // By images, if anything is used where it lies.
    const int64_t part_size = in_place_ ? sizes_.patches() : chunk_;
    const auto parts_of_chunk = runs_of(chunk.first, chunk.count, part_size, part_size);
    const auto runs = runs_of(chunk.first, chunk.count, sizes_.patches(), kRunRows);
    parallel_ranges(static_cast<int64_t>(runs.size()), kRunRows * width * rank,
                    [&](int64_t begin, int64_t end) {
      const Scratch<T> buffer(2 * width + 3 * kRunRows * rank);
      for (int64_t i = begin; i < end; ++i) row_gradients(runs[i], chunk, factors, buffer);
    });
    if (!(needs_down_ || needs_up_)) continue;
    const int64_t blocks = (width + kColumnsAtOnce - 1) / kColumnsAtOnce;
    const bool adds = first > 0;
    parallel(blocks, kColumnsAtOnce * rank * chunk.count, [&](int64_t block) {
      const int64_t start = block * kColumnsAtOnce;
      const int64_t count = std::min(kColumnsAtOnce, width - start);
      const auto columns_of = [&](const T* data, int64_t rows) {
        return Matrix<const T>{data, rows, width, width}.transposed().from(start, count);
      };
      const Matrix<T> down = d_down.from(start, count), own = d_up.from(start, count);
      bool adds_up = adds;
      if (needs_up_ && has_turned_) {
        turned.multiply(columns_of(refined_.data(), chunk.count), own, adds_up);
        adds_up = true;
      }
      if (needs_up_ && has_back_) {
        hidden.multiply(columns_of(back_.data(), chunk.count), own, adds_up);
        adds_up = true;
      }
      for (const Run& part : parts_of_chunk) {
        const int64_t place = part.first - chunk.first;
        if (needs_down_) {
          d_hidden.multiply(plain_columns(part, chunk, start, count), down, adds || place > 0, T(1),
                            place);
        }
        if (needs_up_ && has_kd_) {
          hidden.multiply(columns_of(pulled(part.first, chunk), part.count), own,
                          adds_up || place > 0, T(-1), place);
        }
      }
    });
  }
  if (needs_down_) write_matrix<T>(d_down, *call_.d_down);
  if (needs_up_) write_matrix<T>(d_up.transposed(), *call_.d_up);
}

}  // namespace

template <typename T>
void backward(const BackwardCall<T>& call) {
  const Backward<T> stage(call);
  stage.prefix();
  stage.patches();
}

template void backward(const BackwardCall<float>&);
template void backward(const BackwardCall<double>&);

}  // namespace singer::cpu
