// Stage `refine`: H = F Wd, F^ = F + H Wu, Z = F^ Wu^T, norms, KD sums and, while the rows are in
// the cache, the operands of the Gram matrices.
#include "cpu/stages.h"
#include "math/gram.h"

namespace singer::cpu {
namespace {

// A thread's buffers for one block of rows; empty where rows are used in place.
template <typename T>
struct Buffers {
  explicit Buffers(const RefineParams<T>& params)
      : stride(row_stride<T>(params.sizes.width)),
        operand(params.operand.is_direct() && params.sizes.patches() >= kBlockRows
                    ? 0
                    : kBlockRows * params.sizes.width),
        refined(kBlockRows * stride),
        teacher(params.operand.is_rounded() ? params.sizes.width : 0),
        student(params.sizes.width),
        residual(params.residual.data == nullptr ? 0 : kBlockRows * stride),
        low_rank(kBlockRows * 2 * params.sizes.rank) {}

  int64_t stride;  // of refined and residual
  Scratch<T> operand, refined, teacher, student, residual, low_rank;
};

// Write the operands of an image's Gram matrices for some patches of it, from `start` on. refined =
// F^: [count, D]; buffer: [count, 2r].
template <typename T>
void prepare_gram(const RefineParams<T>& params, const RefinedImage<T>& image,
                  const RowBlock& patches, int64_t start, const Matrix<const T>& refined,
                  T* buffer) {
  const SimdKernels<T>& simd = simd_kernels<T>();
  const auto [first, count] = patches;
  const int64_t rank = params.sizes.rank;
  const Matrix<const T> hz = Matrix<const T>(params.hz).row_slice(first, count);
  const Matrix<T> rows{buffer, count, 2 * rank, 2 * rank};
  // 1. F^ transposed, and 1 / n.
  T* inv_norms = image.inv_norms.data() + start;
  image.refined_t.set_columns(refined.transposed(), start);
  for (int64_t i = 0; i < count; ++i) inv_norms[i] = reciprocal_norm(params.norms[first + i]);
  // 2. diag(1/n) [H | Z].
  if (params.has_gradient) {
    for (int64_t i = 0; i < count; ++i) simd.scale(hz.row(i), inv_norms[i], 2 * rank, rows.row(i));
    image.scaled_hz.set_rows(rows, start);
  }
  if (params.up_gram.is_empty()) return;
  // 3. [L | H], L = Z - H M / 2, and the inverse norms of F.
  params.up_gram.view().multiply({hz.data, count, rank, hz.row_stride},
                                 {buffer, count, rank, 2 * rank});
  for (int64_t i = 0; i < count; ++i) {
    image.teacher_inv_norms.data()[start + i] = reciprocal_norm(params.teacher_norms[first + i]);
    simd.subtract_half(hz.row(i) + rank, rows.row(i), rank, rows.row(i));
    std::copy(hz.row(i), hz.row(i) + rank, rows.row(i) + rank);
  }
  image.lh_t.set_columns(Matrix<const T>(rows).transposed(), start);
}

template <typename T>
void refine_block(const RefineParams<T>& params, const RowBlock& block,
                  const Buffers<T>& buffers) {
  const Sizes& sizes = params.sizes;
  const int64_t patches = sizes.patches(), width = sizes.width, rank = sizes.rank;
  const SimdKernels<T>& simd = simd_kernels<T>();
  const auto operand =
      gather(params.operand, block, patches, sizes.prefix, width, buffers.operand.data());
  const Matrix<T> refined{buffers.refined.data(), block.count, width, buffers.stride};
  const Matrix<T> residual{buffers.residual.data(), block.count, width, buffers.stride};
  const Matrix<T> hz = params.hz.row_slice(block.first, block.count);
  const Matrix<T> h{hz.data, block.count, rank, hz.row_stride};
  const Matrix<T> z{hz.data + rank, block.count, rank, hz.row_stride};
  const bool has_residual = params.residual.data != nullptr;
  // 1. H = F Wd, and H Wu.
  params.down.view().multiply(operand, h);
  params.up.view().multiply(h, refined);
  // 2. F^ = F + H Wu, F^ - S, norms and KD sums; F itself, not rounded.
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t patch = block.first + i, image = patch / patches;
    const int64_t token = sizes.prefix + patch % patches, row = image * sizes.tokens + token;
    const T* student = params.student.row(image, token, buffers.student.data());
    const T* teacher = operand.row(i);
    if (params.operand.is_rounded()) {
      teacher = params.teacher.row(image, token, buffers.teacher.data());
    }
    const RowSums<T> sums = simd.refine(refined.row(i), teacher, student, width,
                                        has_residual ? residual.row(i) : nullptr);
    params.norms[patch] = std::sqrt(sums.refined);
    params.teacher_norms[patch] = std::sqrt(sums.teacher);
    params.kd_partials[row] = sums.kd;
    if (params.refined != nullptr) {
      simd.write(refined.row(i), params.refined_dtype, width,
                 params.refined + row * width * size_of(params.refined_dtype));
    }
  }
  // 3. Z = F^ Wu^T and (F^ - S) Wu^T.
  params.up_transposed.view().multiply(refined, z);
  if (has_residual) {
    params.up_transposed.view().multiply(residual,
                                         params.residual.row_slice(block.first, block.count));
  }
}

}  // namespace

template <typename T>
void refine(const RefineParams<T>& params, int64_t first, int64_t count,
            const std::vector<std::unique_ptr<RefinedImage<T>>>& images) {
  const int64_t patches = params.sizes.patches(), width = params.sizes.width;
  const auto blocks = row_blocks(first, count, patches);
  const int64_t total = static_cast<int64_t>(blocks.size());
  parallel_queue(total, kBlockRows * width * params.sizes.rank, [&](TaskQueue& queue) {
    const Buffers<T> buffers(params);
    for (int64_t task; queue.take(task);) {
      const RowBlock& block = blocks[task];
      refine_block(params, block, buffers);
      if (images.empty()) continue;
      for (int64_t done = 0; done < block.count;) {  // one image at a time
        const int64_t patch = block.first + done, start = patch % patches;
        const int64_t length = std::min(block.count - done, patches - start);
        prepare_gram(params, *images[patch / patches - first], RowBlock{patch, length}, start,
                     {buffers.refined.data() + done * buffers.stride, length, width,
                      buffers.stride},
                     buffers.low_rank.data());
        done += length;
      }
    }
  });
}

template <typename T>
void refine_prefix(const RefineParams<T>& params) {
  const Sizes& sizes = params.sizes;
  const int64_t width = sizes.width, count = sizes.images * sizes.prefix;
  const SimdKernels<T>& simd = simd_kernels<T>();
  parallel_ranges(count, 2 * width, [&](int64_t begin, int64_t end) {
    const Scratch<T> buffer(2 * width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / sizes.prefix, token = i % sizes.prefix;
      const int64_t row = image * sizes.tokens + token;
      const T* teacher = params.teacher.row(image, token, buffer.data());
      const T* student = params.student.row(image, token, buffer.data() + width);
      params.kd_partials[row] = simd.squared_distance(teacher, student, width);
      if (params.refined != nullptr) {
        simd.write(teacher, params.refined_dtype, width,
                   params.refined + row * width * size_of(params.refined_dtype));
      }
    }
  });
}

#define SINGER_INSTANTIATE(T)                                                  \
  template void refine(const RefineParams<T>&, int64_t, int64_t,               \
                       const std::vector<std::unique_ptr<RefinedImage<T>>>&);  \
  template void refine_prefix(const RefineParams<T>&);
SINGER_INSTANTIATE(float)
SINGER_INSTANTIATE(double)

}  // namespace singer::cpu
