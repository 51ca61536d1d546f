// Stage `gram`: the sum of E^2, and X C. E is symmetric: only its upper triangle is computed, by
// blocks of rows, and stored for X C if a gradient is requested.
#include "math/gram.h"

#include <numeric>

#include "cpu/stages.h"

namespace singer::cpu {
namespace {

// rowsum(E * G), for the gradient of one side. By symmetry, a block of rows contributes to the rows
// below it too; each block's contribution is stored apart, so that the order of summation is fixed.
template <typename T>
class RowDots {
 public:
  RowDots(bool is_needed, int64_t blocks, int64_t patches)
      : patches_(patches), partials_(is_needed ? (blocks + 1) * patches : 0) {}

  // Return a block's contributions to the rows below it, [P]; null: not needed.
  T* partials(int64_t block) const {
    return partials_.data() == nullptr ? nullptr : partials_.data() + (block + 1) * patches_;
  }

  // Return the contribution of each row's own block, [P].
  T* own() const { return partials_.data(); }

  // Return the sum of a row, which lies below the first `blocks` blocks.
  T total(int64_t row, int64_t blocks) const {
    T sum = own()[row];
    for (int64_t block = 0; block < blocks; ++block) sum += partials(block)[row];
    return sum;
  }

 private:
  int64_t patches_;
  Scratch<T> partials_;
};

// out = a^T b or, with `accumulate`, out += a^T b: rows `first` and following, as many as out has,
// and the columns from their diagonal block on.
template <typename T>
void multiply_upper(const PackedView<T>& a, const PackedView<T>& b, int64_t first, int64_t depth,
                    bool accumulate, const Matrix<T>& out) {
  const int64_t panel = simd_kernels<T>().panel_width, lanes = simd_kernels<T>().lanes;
  PackedView<T> right = b.from_panel(first / panel);
  right.columns = round_up(right.columns, lanes);  // out has room for whole vectors
  for (int64_t start = 0; start < out.rows; start += panel) {
    const int64_t height = std::min(panel, out.rows - start);
    right.multiply(a.from_panel((first + start) / panel).transposed_panel(height, depth),
                   out.row_slice(start, height), accumulate);
  }
}

// E of one image, from the diagonal blocks on to the right.
template <typename T>
class GramDifference {
 public:
  explicit GramDifference(const GramParams<T>& params)
      : params_(params),
        stride_(row_stride<T>(params.patches)),
        entries_(needs_gradient() ? params.patches * stride_ : 0),
        row_dots_(params.refined.factor.data != nullptr, blocks(), params.patches),
        target_row_dots_(params.target.factor.data != nullptr, blocks(), params.patches) {}

  bool needs_gradient() const {
    return params_.refined.factor.data != nullptr || params_.target.factor.data != nullptr;
  }

  // Number of elements in the buffer of `compute`.
  int64_t buffer_size() const { return (needs_gradient() ? 1 : 2) * kBlockRows * stride_; }

  // Compute E of a block of rows; return the sum of its squares and of their mirror images'.
  double compute(int64_t block, T* buffer) const;

  // Write X C of a block of rows, after all blocks of E.
  void gradient(int64_t block) const {
    gradient(block, params_.refined, row_dots_, params_.scale);
    gradient(block, params_.target, target_row_dots_, -params_.scale);  // E is G - G_R
  }

 private:
  int64_t blocks() const { return ceil_div(params_.patches, kBlockRows); }
  int64_t rows_in(int64_t block) const {
    return std::min(kBlockRows, params_.patches - block * kBlockRows);
  }
  void gradient(int64_t block, const GramSide<T>& side, const RowDots<T>& row_dots, T scale) const;

  const GramParams<T>& params_;
  int64_t stride_;
  Scratch<T> entries_;  // E, [P, stride]
  RowDots<T> row_dots_, target_row_dots_;
};

template <typename T>
double GramDifference<T>::compute(int64_t block, T* buffer) const {
  const GramSide<T>&refined = params_.refined, &target = params_.target;
  const int64_t patches = params_.patches, rank = params_.identity_rank;
  const int64_t first = block * kBlockRows, count = rows_in(block), below = first + count;
  T* entries =
      needs_gradient() ? entries_.data() + first * stride_ + first : buffer + kBlockRows * stride_;
  const Matrix<T> products{entries, count, patches - first, stride_};
  const Matrix<T> target_products{buffer, count, patches - first, stride_};
  // 1. F^ F^^T, and R R^T or, with the identity, H L^T + L H^T.
  multiply_upper(refined.rows_t, refined.rows_t, first, params_.width, false, products);
  if (rank > 0) {
    const PackedView<T> l = target.rows_t, h = target.rows_t.from_row(rank);
    multiply_upper(h, l, first, rank, false, target_products);
    multiply_upper(l, h, first, rank, true, target_products);
  } else {
    multiply_upper(target.rows_t, target.rows_t, first, params_.width, false, target_products);
  }
  // 2. E and its sums, by rows: the diagonal block, which is complete, and the rest, which counts
  // twice.
  T *dots = row_dots_.partials(block), *target_dots = target_row_dots_.partials(block);
  if (dots != nullptr) std::fill(dots + below, dots + patches, T(0));
  if (target_dots != nullptr) std::fill(target_dots + below, target_dots + patches, T(0));
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = first + i;
    const auto sums_of = [&](int64_t begin, int64_t end, T* column_dots, T* target_column_dots) {
      return simd_kernels<T>().gram_difference(
          products.row(i) + begin - first, target_products.row(i) + begin - first, rank > 0,
          refined.inv_norms[row], target.inv_norms[row], refined.inv_norms + begin,
          target.inv_norms + begin, end - begin, column_dots, target_column_dots);
    };
    const GramSums<T> diagonal = sums_of(first, below, nullptr, nullptr);
    const GramSums<T> rest = sums_of(below, patches, dots == nullptr ? nullptr : dots + below,
                                     target_dots == nullptr ? nullptr : target_dots + below);
    squares += static_cast<double>(diagonal.squares) + 2 * static_cast<double>(rest.squares);
    if (dots != nullptr) row_dots_.own()[row] = diagonal.row_dot + rest.row_dot;
    if (target_dots != nullptr) {
      target_row_dots_.own()[row] = diagonal.target_row_dot + rest.target_row_dot;
    }
  }
  return squares;
}

template <typename T>
void GramDifference<T>::gradient(int64_t block, const GramSide<T>& side,
                                 const RowDots<T>& row_dots, T scale) const {
  if (side.factor.data == nullptr) return;
  const int64_t first = block * kBlockRows, count = rows_in(block);
  const Matrix<T> out = side.gradient.row_slice(first, count);
  // 1. E diag(1/n) C: the columns left of the diagonal block are rows of the blocks above.
  const Matrix<const T> left{entries_.data() + first, count, first, 1, stride_};
  const Matrix<const T> right{entries_.data() + first * stride_ + first, count,
                              params_.patches - first, stride_};
  if (first > 0) side.scaled_factor.multiply(left, out);
  side.scaled_factor.from_row(first).multiply(right, out, first > 0);
  // 2. X C.
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = first + i;
    const T norm_grad_coef = gram_norm_coefficient(side.norms[row], row_dots.total(row, block));
    simd_kernels<T>().gram_gradient(out.row(i), side.factor.row(row), side.inv_norms[row],
                                    norm_grad_coef, scale, out.columns, out.row(i));
  }
}

}  // namespace

template <typename T>
void gram(const std::vector<GramParams<T>>& images, double* squares) {
  const int64_t count = static_cast<int64_t>(images.size()), patches = images[0].patches;
  std::vector<std::unique_ptr<GramDifference<T>>> differences;
  for (const GramParams<T>& image : images) {
    differences.push_back(std::make_unique<GramDifference<T>>(image));
  }
  const int64_t blocks = ceil_div(patches, kBlockRows);
  std::vector<double> partials(count * blocks);
  // 1. E of all images. The longest blocks of rows first, so that threads end together.
  parallel_queue(count * blocks, kBlockRows * patches * images[0].width, [&](TaskQueue& queue) {
    const Scratch<T> buffer(differences[0]->buffer_size());
    for (int64_t task; queue.take(task);) {
      const int64_t image = task % count, block = task / count;
      partials[image * blocks + block] = differences[image]->compute(block, buffer.data());
    }
  });
  // 2. The sums of E^2, in a fixed order.
  for (int64_t image = 0; image < count; ++image) {
    const auto start = partials.begin() + image * blocks;
    squares[image] = std::accumulate(start, start + blocks, 0.0);
  }
  // 3. X C.
  if (!differences[0]->needs_gradient()) return;
  const int64_t columns = images[0].refined.factor.columns + images[0].target.factor.columns;
  parallel_queue(count * blocks, kBlockRows * patches * columns, [&](TaskQueue& queue) {
    for (int64_t task; queue.take(task);) differences[task / blocks]->gradient(task % blocks);
  });
}

template <typename T>
void normalize(const TokenRows<T>& tokens, const Sizes& sizes, int64_t first,
               const std::vector<std::unique_ptr<NormalizedImage<T>>>& images) {
  const int64_t patches = sizes.patches(), width = sizes.width;
  const int64_t blocks = ceil_div(patches, kBlockRows);
  const SimdKernels<T>& simd = simd_kernels<T>();
  // 1. Choose where the rows for a gradient are stored: in place or in a buffer.
  for (size_t i = 0; i < images.size(); ++i) {
    if (images[i] == nullptr || !images[i]->has_gradient) continue;
    NormalizedImage<T>& image = *images[i];
    image.rows = tokens.rows_in_place(first + static_cast<int64_t>(i), sizes.prefix, patches);
    if (image.rows.data != nullptr) continue;
    image.buffer = Scratch<T>(patches * width);
    image.rows = {image.buffer.data(), patches, width, width};
  }
  const int64_t count = static_cast<int64_t>(images.size());
  parallel_queue(count * blocks, kBlockRows * width, [&](TaskQueue& queue) {
    const Scratch<T> buffer(kBlockRows * width);
    for (int64_t task; queue.take(task);) {
      const int64_t index = task / blocks, start = task % blocks * kBlockRows;
      if (images[index] == nullptr) continue;
      const NormalizedImage<T>& image = *images[index];
      const RowBlock block{(first + index) * patches + start,
                           std::min(kBlockRows, patches - start)};
      T* read_to =
          image.buffer.data() == nullptr ? buffer.data() : image.buffer.data() + start * width;
      const Matrix<const T> rows = gather(tokens, block, patches, sizes.prefix, width, read_to);
      // 2. The rows transposed, their norms and inverse norms.
      image.rows_t.set_columns(rows.transposed(), start);
      for (int64_t i = 0; i < block.count; ++i) {
        image.norms.data()[start + i] = std::sqrt(simd.sum_of_squares(rows.row(i), width));
        image.inv_norms.data()[start + i] = reciprocal_norm(image.norms.data()[start + i]);
      }
      // 3. The rows divided by their norms.
      if (!image.has_gradient) continue;
      for (int64_t i = 0; i < block.count; ++i) {
        simd.scale(rows.row(i), image.inv_norms.data()[start + i], width,
                   buffer.data() + i * width);
      }
      image.scaled.set_rows({buffer.data(), block.count, width, width}, start);
    }
  });
}

#define SINGER_INSTANTIATE(T)                                                      \
  template void gram(const std::vector<GramParams<T>>&, double*);                  \
  template void normalize(const TokenRows<T>&, const Sizes&, int64_t,              \
                          const std::vector<std::unique_ptr<NormalizedImage<T>>>&);
SINGER_INSTANTIATE(float)
SINGER_INSTANTIATE(double)

}  // namespace singer::cpu
