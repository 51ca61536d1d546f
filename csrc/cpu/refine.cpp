// Stage `refine`: H = F Wd, F^ = F + H Wu, Z = F^ Wu^T, norms and KD sums.
#include "cpu/stages.h"

namespace singer::cpu {

template <typename T>
RefineScratch<T>::RefineScratch(const Tensor& like, const RefineCall<T>& call)
    : plain(like, kChunkRows * call.sizes.width),
      exact(like, call.operand.is_rounded() ? kChunkRows * call.sizes.width : 0),
      student(like, call.student.is_direct() ? 0 : kChunkRows * call.sizes.width),
      residual(like, call.residual.data == nullptr ? 0 : kChunkRows * call.sizes.width) {}

template <typename T>
void refine(const RefineCall<T>& call, const Chunk& chunk, const RefineScratch<T>& scratch,
            const Matrix<T>& refined) {
  const Sizes& sizes = call.sizes;
  const int64_t patches = sizes.patches(), width = sizes.width, rank = sizes.rank;
  const Loops<T>& loop = loops<T>();
  const auto plain =
      gather(call.operand, chunk, patches, sizes.prefix, width, scratch.plain.data());
  const Matrix<T> columns = call.columns.from(chunk.first, chunk.count);
  const Matrix<T> hidden{columns.data, chunk.count, rank, columns.row_stride};
  const Matrix<T> latent{columns.data + rank, chunk.count, rank, columns.row_stride};
  multiply(plain, call.down, hidden);
  multiply(hidden, call.up, refined);
  const bool has_residual = call.residual.data != nullptr;
  parallel(chunk.count, 3 * width, [&](int64_t i) {
    const int64_t patch = chunk.first + i, image = patch / patches;
    const int64_t token = sizes.prefix + patch % patches;
    const T* student = call.student.row(image, token, scratch.student.data() + i * width);
    const T* teacher = plain.row(i);
    if (call.operand.is_rounded()) {
      teacher = call.teacher.row(image, token, scratch.exact.data() + i * width);
    }
    T* residual = has_residual ? scratch.residual.data() + i * width : nullptr;
    const RowSums<T> sums = loop.refine(refined.row(i), teacher, student, width, residual);
    call.norms[patch] = std::sqrt(sums.refined);
    call.plain_norms[patch] = std::sqrt(sums.plain);
    call.kd_parts[image * sizes.tokens + token] = sums.residual;
    if (call.refined != nullptr) {
      const int64_t offset = (image * sizes.tokens + token) * width * size_of(call.refined_dtype);
      loop.write(refined.row(i), call.refined_dtype, width, call.refined + offset);
    }
  });
  multiply(refined, call.up.transposed(), latent);
  if (has_residual) {
    const Matrix<const T> residual{scratch.residual.data(), chunk.count, width, width};
    multiply(residual, call.up.transposed(), call.residual.from(chunk.first, chunk.count));
  }
}

template <typename T>
void refine_prefix(const RefineCall<T>& call, const Tensor& like) {
  const Sizes& sizes = call.sizes;
  const int64_t width = sizes.width, count = sizes.images * sizes.prefix;
  if (count == 0) return;
  const Loops<T>& loop = loops<T>();
  const Scratch<T> buffer(like, 2 * count * width);
  parallel(count, 2 * width, [&](int64_t i) {
    const int64_t image = i / sizes.prefix, token = i % sizes.prefix;
    const int64_t row = image * sizes.tokens + token;
    const T* teacher = call.teacher.row(image, token, buffer.data() + 2 * i * width);
    const T* student = call.student.row(image, token, buffer.data() + (2 * i + 1) * width);
    call.kd_parts[row] = loop.squared_distance(teacher, student, width);
    if (call.refined != nullptr) {
      loop.write(teacher, call.refined_dtype, width,
                 call.refined + row * width * size_of(call.refined_dtype));
    }
  });
}

template <typename T>
void row_norms(const Matrix<const T>& rows, T* norms) {
  parallel(rows.rows, rows.columns, [&](int64_t i) {
    norms[i] = std::sqrt(loops<T>().sum_of_squares(rows.row(i), rows.columns));
  });
}

#define SINGER_INSTANTIATE(T)                                                             \
  template struct RefineScratch<T>;                                                       \
  template void refine(const RefineCall<T>&, const Chunk&, const RefineScratch<T>&,       \
                       const Matrix<T>&);                                                 \
  template void refine_prefix(const RefineCall<T>&, const Tensor&);                       \
  template void row_norms(const Matrix<const T>&, T*);
SINGER_INSTANTIATE(float)
SINGER_INSTANTIATE(double)

}  // namespace singer::cpu
