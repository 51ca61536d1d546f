// Stage `refine`: H = F Wd, F^ = F + H Wu, Z = F^ Wu^T, norms and KD sums.
#include "cpu/stages.h"

namespace singer::cpu {
namespace {

// A thread's buffers, for one run; a row that can be used where it lies needs none.
template <typename T>
struct Buffers {
  explicit Buffers(const RefineCall<T>& call, bool keeps_refined)
      : area(kRunRows * call.sizes.width),
        plain(area),
        refined(keeps_refined ? 0 : area),
        exact(call.operand.is_rounded() ? call.sizes.width : 0),
        student(call.sizes.width),
        residual(call.residual.data == nullptr ? 0 : area) {}

  int64_t area;
  Scratch<T> plain, refined, exact, student, residual;
};

template <typename T>
void refine_run(const RefineCall<T>& call, const Run& run, const Matrix<T>& refined,
                const Buffers<T>& buffers) {
  const Sizes& sizes = call.sizes;
  const int64_t patches = sizes.patches(), width = sizes.width, rank = sizes.rank;
  const Loops<T>& loop = loops<T>();
  const auto plain =
      gather(call.operand, run, patches, sizes.prefix, width, buffers.plain.data());
  const Matrix<T> columns = call.columns.from(run.first, run.count);
  const Matrix<T> hidden{columns.data, run.count, rank, columns.row_stride};
  const Matrix<T> latent{columns.data + rank, run.count, rank, columns.row_stride};
  const bool has_residual = call.residual.data != nullptr;
  call.down.multiply(plain, hidden);
  call.up.multiply(hidden, refined);
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t patch = run.first + i, image = patch / patches;
    const int64_t token = sizes.prefix + patch % patches, row = image * sizes.tokens + token;
    const T* student = call.student.row(image, token, buffers.student.data());
    const T* teacher = plain.row(i);
    if (call.operand.is_rounded()) {
      teacher = call.teacher.row(image, token, buffers.exact.data());
    }
    T* residual = has_residual ? buffers.residual.data() + i * width : nullptr;
    const RowSums<T> sums = loop.refine(refined.row(i), teacher, student, width, residual);
    call.norms[patch] = std::sqrt(sums.refined);
    call.plain_norms[patch] = std::sqrt(sums.plain);
    call.kd_parts[row] = sums.residual;
    if (call.refined != nullptr) {
      loop.write(refined.row(i), call.refined_dtype, width,
                 call.refined + row * width * size_of(call.refined_dtype));
    }
  }
  call.up_transposed.multiply(refined, latent);
  if (has_residual) {
    call.up_transposed.multiply(Matrix<const T>{buffers.residual.data(), run.count, width, width},
                                call.residual.from(run.first, run.count));
  }
}

}  // namespace

template <typename T>
void refine(const RefineCall<T>& call, int64_t first, int64_t count, const Matrix<T>& refined) {
  const auto runs = runs_of(first, count, call.sizes.patches(), kRunRows);
  const int64_t width = call.sizes.width, total = static_cast<int64_t>(runs.size());
  const bool keeps_refined = refined.data != nullptr;
  parallel_ranges(total, kRunRows * width * call.sizes.rank, [&](int64_t begin, int64_t end) {
    const Buffers<T> buffers(call, keeps_refined);
    for (int64_t i = begin; i < end; ++i) {
      const Run& run = runs[i];
      const Matrix<T> own{buffers.refined.data(), run.count, width, width};
      refine_run(call, run, keeps_refined ? refined.from(run.first - first, run.count) : own,
                 buffers);
    }
  });
}

template <typename T>
void refine_prefix(const RefineCall<T>& call) {
  const Sizes& sizes = call.sizes;
  const int64_t width = sizes.width, count = sizes.images * sizes.prefix;
  const Loops<T>& loop = loops<T>();
  parallel_ranges(count, 2 * width, [&](int64_t begin, int64_t end) {
    const Scratch<T> buffer(2 * width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / sizes.prefix, token = i % sizes.prefix;
      const int64_t row = image * sizes.tokens + token;
      const T* teacher = call.teacher.row(image, token, buffer.data());
      const T* student = call.student.row(image, token, buffer.data() + width);
      call.kd_parts[row] = loop.squared_distance(teacher, student, width);
      if (call.refined != nullptr) {
        loop.write(teacher, call.refined_dtype, width,
                   call.refined + row * width * size_of(call.refined_dtype));
      }
    }
  });
}

template <typename T>
void row_norms(const Matrix<const T>& rows, T* norms) {
  parallel(rows.rows, rows.columns, [&](int64_t i) {
    norms[i] = std::sqrt(loops<T>().sum_of_squares(rows.row(i), rows.columns));
  });
}

#define SINGER_INSTANTIATE(T)                                                         \
  template void refine(const RefineCall<T>&, int64_t, int64_t, const Matrix<T>&);     \
  template void refine_prefix(const RefineCall<T>&);                                  \
  template void row_norms(const Matrix<const T>&, T*);
SINGER_INSTANTIATE(float)
SINGER_INSTANTIATE(double)

}  // namespace singer::cpu
