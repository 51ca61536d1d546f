// Stage `refine`: H = F Wd, F^ = F + H Wu, Z = F^ Wu^T, norms and KD sums; and, while they are in the
// cache, what the Gram matrices take of them.
#include "cpu/stages.h"
#include "math/gram.h"

namespace singer::cpu {
namespace {

// A thread's buffers, for one run; a row that can be used where it lies needs none.
template <typename T>
struct Buffers {
  explicit Buffers(const RefineCall<T>& call)
      : stride(row_stride<T>(call.sizes.width)),
        plain(call.operand.is_direct() && call.sizes.patches() >= kRunRows
                  ? 0
                  : kRunRows * call.sizes.width),
        refined(kRunRows * stride),
        exact(call.operand.is_rounded() ? call.sizes.width : 0),
        student(call.sizes.width),
        residual(call.residual.data == nullptr ? 0 : kRunRows * stride),
        columns(kRunRows * 2 * call.sizes.rank) {}

  int64_t stride;
  Scratch<T> plain, refined, exact, student, residual, columns;
};

// What the Gram matrix of one image takes of some of its patches, from `start` on.
template <typename T>
void prepare_gram(const RefineCall<T>& call, const RefinedImage<T>& image, const Run& patches,
                  int64_t start, const Matrix<const T>& refined, T* buffer) {
  const Loops<T>& loop = loops<T>();
  const auto [first, count] = patches;
  const int64_t rank = call.sizes.rank;
  const Matrix<const T> columns = Matrix<const T>(call.columns).from(first, count);
  const Matrix<T> rows{buffer, count, 2 * rank, 2 * rank};
  T* inverses = image.refined.inverses.data() + start;
  image.refined.packed.set_columns(refined.transposed(), start);
  for (int64_t i = 0; i < count; ++i) inverses[i] = reciprocal_norm(call.norms[first + i]);
  if (call.has_gradient) {
    for (int64_t i = 0; i < count; ++i) {
      loop.scale(columns.row(i), inverses[i], 2 * rank, rows.row(i));
    }
    image.scaled.set_rows(rows, start);
  }
  if (call.overlap.blocks() == 0) return;
  // L = Z - H M / 2
  call.overlap.multiply({columns.data, count, rank, columns.row_stride},
                        {buffer, count, rank, 2 * rank});
  for (int64_t i = 0; i < count; ++i) {
    image.plain_inverses.data()[start + i] = reciprocal_norm(call.plain_norms[first + i]);
    loop.subtract_half(columns.row(i) + rank, rows.row(i), rank, rows.row(i));
    std::copy(columns.row(i), columns.row(i) + rank, rows.row(i) + rank);
  }
  image.halves.set_columns(Matrix<const T>(rows).transposed(), start);
}

template <typename T>
void refine_run(const RefineCall<T>& call, const Run& run, const Buffers<T>& buffers) {
  const Sizes& sizes = call.sizes;
  const int64_t patches = sizes.patches(), width = sizes.width, rank = sizes.rank;
  const Loops<T>& loop = loops<T>();
  const auto plain =
      gather(call.operand, run, patches, sizes.prefix, width, buffers.plain.data());
  const Matrix<T> refined{buffers.refined.data(), run.count, width, buffers.stride};
  const Matrix<T> difference{buffers.residual.data(), run.count, width, buffers.stride};
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
    const RowSums<T> sums = loop.refine(refined.row(i), teacher, student, width,
                                        has_residual ? difference.row(i) : nullptr);
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
    call.up_transposed.multiply(difference, call.residual.from(run.first, run.count));
  }
}

}  // namespace

template <typename T>
void refine(const RefineCall<T>& call, int64_t first, int64_t count,
            const std::vector<std::unique_ptr<RefinedImage<T>>>& images) {
  const int64_t patches = call.sizes.patches(), width = call.sizes.width;
  const auto runs = runs_of(first, count, patches);
  const int64_t total = static_cast<int64_t>(runs.size());
  parallel_queue(total, kRunRows * width * call.sizes.rank, [&](Queue& queue) {
    const Buffers<T> buffers(call);
    for (int64_t task; queue.take(task);) {
      const Run& run = runs[task];
      refine_run(call, run, buffers);
      if (images.empty()) continue;
      for (int64_t done = 0; done < run.count;) {  // one image after the other
        const int64_t patch = run.first + done, start = patch % patches;
        const int64_t length = std::min(run.count - done, patches - start);
        prepare_gram(call, *images[patch / patches - first], Run{patch, length}, start,
                     {buffers.refined.data() + done * buffers.stride, length, width,
                      buffers.stride},
                     buffers.columns.data());
        done += length;
      }
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

#define SINGER_INSTANTIATE(T)                                                             \
  template void refine(const RefineCall<T>&, int64_t, int64_t,                            \
                       const std::vector<std::unique_ptr<RefinedImage<T>>>&);             \
  template void refine_prefix(const RefineCall<T>&);
SINGER_INSTANTIATE(float)
SINGER_INSTANTIATE(double)

}  // namespace singer::cpu
