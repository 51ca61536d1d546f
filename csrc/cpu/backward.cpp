// Stage `backward`: dS, and the sums over patches dWd = F^T dH, dWu = V^T F^ + H^T (Y - dS).
#include "math/backward.h"

#include <numeric>

#include "cpu/stages.h"
#include "math/outlier.h"

namespace singer::cpu {

namespace {

template <typename T>
void write_matrix(const Matrix<T>& matrix, const Tensor& out) {
  const Dtype dtype = dtype_of(out.scalar_type());
  char* data = static_cast<char*>(out.mutable_data_ptr());
  parallel(matrix.rows, matrix.columns, [&](int64_t i) {
    loops<T>().write(matrix.row(i), dtype, matrix.columns,
                     data + i * matrix.columns * size_of(dtype));
  });
}

// total += a b, by way of `part`.
template <typename A, typename B, typename T>
void multiply_add(const Matrix<A>& a, const Matrix<B>& b, const Matrix<T>& part,
                  const Matrix<T>& total) {
  multiply(a, b, part);
  parallel(total.rows, total.columns,
           [&](int64_t i) { loops<T>().add(part.row(i), total.columns, total.row(i)); });
}

template <typename T>
void subtract(const Matrix<T>& part, const Matrix<T>& total) {
  parallel(total.rows, total.columns, [&](int64_t i) {
    T* out = total.row(i);
    const T* in = part.row(i);
    for (int64_t j = 0; j < total.columns; ++j) out[j] -= in[j];
  });
}

}  // namespace

template <typename T>
void backward_prefix(const BackwardCall<T>& call, const Tensor& like) {
  const Sizes& sizes = call.sizes;
  const int64_t width = sizes.width, count = sizes.images * sizes.prefix;
  if (count == 0 || call.d_student == nullptr) return;
  const Loops<T>& loop = loops<T>();
  const Scratch<T> buffer(like, 4 * count * width);
  const T alpha = kd_scale(sizes.images, sizes.tokens, width, *call.d_kd);
  parallel(count, 4 * width, [&](int64_t i) {
    const int64_t image = i / sizes.prefix, token = i % sizes.prefix;
    T* rows = buffer.data() + 4 * i * width;
    const T* teacher = call.teacher.row(image, token, rows);
    const T* student = call.student->row(image, token, rows + width);
    T *refined = rows + 2 * width, *out = rows + 3 * width;
    std::fill(refined, refined + width, T(0));
    loop.student_gradient(refined, teacher, student, alpha, width, out);
    loop.write(out, call.d_student_dtype, width,
               call.d_student +
                   (image * sizes.tokens + token) * width * size_of(call.d_student_dtype));
  });
}

template <typename T>
void backward(const BackwardCall<T>& call, const Tensor& like) {
  const Sizes& sizes = call.sizes;
  const int64_t patches = sizes.patches(), width = sizes.width, rank = sizes.rank;
  const Loops<T>& loop = loops<T>();
  const bool has_kd = call.d_kd != nullptr, has_back = call.d_refined.has_value();
  const bool has_turned = call.d_outlier != nullptr || call.d_info != nullptr;
  const bool needs_down = call.d_down.has_value(), needs_up = call.d_up.has_value();
  // F^ is read by dS and, through V, by dWu; Y - dS by dWu alone.
  const bool needs_refined = has_kd || (needs_up && has_turned);
  const T alpha = has_kd ? kd_scale(sizes.images, sizes.tokens, width, *call.d_kd) : T(0);
  const T weight = call.d_outlier == nullptr ? T(0) : *call.outlier_weight * *call.d_outlier;
  const T d_info = call.d_info == nullptr ? T(0) : *call.d_info;

  const int64_t area = kChunkRows * width;
  const bool buffers_student = has_kd && !call.student->is_direct();
  const Scratch<T> plain(like, area), refined(like, needs_refined ? area : 0);
  const Scratch<T> exact(like, call.operand.is_rounded() && needs_refined ? area : 0);
  const Scratch<T> student(like, buffers_student ? area : 0);
  const Scratch<T> pulled(like, has_kd ? area : 0), back(like, has_back ? area : 0);
  const Scratch<T> d_hidden(like, kChunkRows * rank), turned(like, kChunkRows * rank);
  const Scratch<T> through_up(like, has_back ? kChunkRows * rank : 0);
  const Scratch<T> sums(like, 3 * width * rank);
  const Matrix<T> d_down{sums.data(), width, rank, rank};
  const Matrix<T> d_up{sums.data() + width * rank, rank, width, width};
  T* part = sums.data() + 2 * width * rank;
  std::fill(sums.data(), part, T(0));
  backward_prefix(call, like);

  for (const Chunk& chunk : chunks_of(sizes.images, patches, kChunkRows)) {
    const int64_t count = chunk.count;
    const Matrix<const T> columns = call.columns.from(chunk.first, count);
    const Matrix<const T> hidden{columns.data, count, rank, columns.row_stride};
    const auto operand = gather(call.operand, chunk, patches, sizes.prefix, width, plain.data());
    const Matrix<T> whole{refined.data(), count, width, width};
    const Matrix<T> pull{pulled.data(), count, width, width};
    const Matrix<T> returned{back.data(), count, width, width};
    const Matrix<T> inner{d_hidden.data(), count, rank, rank};
    const Matrix<T> turn{turned.data(), count, rank, rank};
    const Matrix<T> from_back{through_up.data(), count, rank, rank};
    if (has_back) {
      parallel(count, width, [&](int64_t i) {
        const int64_t patch = chunk.first + i;
        T* out = returned.row(i);
        const T* row =
            call.d_refined->row(patch / patches, sizes.prefix + patch % patches, out);
        if (row != out) std::copy(row, row + width, out);
      });
      if (needs_down) multiply(returned, call.up.transposed(), from_back);
    }
    if (needs_refined) multiply(hidden, call.up, whole);
    parallel(count, 3 * width, [&](int64_t i) {
      const int64_t patch = chunk.first + i, image = patch / patches;
      const int64_t token = sizes.prefix + patch % patches;
      if (needs_refined) {
        const T* teacher = operand.row(i);
        if (call.operand.is_rounded()) {
          teacher = call.teacher.row(image, token, exact.data() + i * width);
        }
        const T* row =
            has_kd ? call.student->row(image, token, student.data() + i * width) : nullptr;
        loop.student_gradient(whole.row(i), teacher, row, alpha, width,
                              has_kd ? pull.row(i) : nullptr);
        if (call.d_student != nullptr) {
          loop.write(pull.row(i), call.d_student_dtype, width,
                     call.d_student + (image * sizes.tokens + token) * width *
                                          size_of(call.d_student_dtype));
        }
      }
      T coefficient = 0;
      if (call.d_outlier != nullptr) {
        coefficient = outlier_coefficient(call.norms[patch], call.threshold[image], weight);
      }
      const T* row = columns.row(i);
      const T* turned_row =
          call.d_info == nullptr ? nullptr : call.gram_columns + patch * 2 * rank;
      if (needs_up && has_turned) {
        loop.column_gradient(turned_row, d_info, row, coefficient, nullptr, T(0), nullptr, rank,
                             turn.row(i));
      }
      if (needs_down) {
        loop.column_gradient(turned_row == nullptr ? nullptr : turned_row + rank, d_info,
                             row + rank, coefficient,
                             has_kd ? call.residual + patch * rank : nullptr, alpha,
                             has_back ? from_back.row(i) : nullptr, rank, inner.row(i));
      }
    });
    if (needs_down) {
      multiply_add(operand.transposed(), inner, Matrix<T>{part, width, rank, rank}, d_down);
    }
    if (!needs_up) continue;
    const Matrix<T> up_part{part, rank, width, width};
    if (has_turned) multiply_add(turn.transposed(), whole, up_part, d_up);
    if (has_back) multiply_add(hidden.transposed(), returned, up_part, d_up);
    if (has_kd) {
      multiply(hidden.transposed(), pull, up_part);
      subtract(up_part, d_up);
    }
  }
  if (needs_down) write_matrix(d_down, *call.d_down);
  if (needs_up) write_matrix(d_up, *call.d_up);
}

template void backward(const BackwardCall<float>&, const Tensor&);
template void backward(const BackwardCall<double>&, const Tensor&);

}  // namespace singer::cpu
