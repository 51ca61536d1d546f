// Stage `gram`: the sum of E^2 and X C. E is symmetric: of each pair of entries one is computed, and
// kept until X C is.
#include "math/gram.h"

#include <numeric>

#include "cpu/stages.h"

namespace singer::cpu {
namespace {

// E of one image, from the diagonal on to the right, and the sums over its rows.
template <typename T>
class Difference {
 public:
  explicit Difference(const GramCall<T>& call)
      : call_(call),
        has_gradient_(call.columns.data != nullptr),
        has_target_gradient_(call.target_rows.data != nullptr),
        runs_((call.patches + kRunRows - 1) / kRunRows),
        // Whole blocks of columns, and one more, that rows don't begin in the same set of a cache.
        stride_((call.patches + loops<T>().block - 1) / loops<T>().block * loops<T>().block +
                loops<T>().block),
        entries_(keeps_entries() ? call.patches * stride_ : 0),
        slopes_(has_gradient_ ? (runs_ + 1) * call.patches : 0),
        target_slopes_(has_target_gradient_ ? (runs_ + 1) * call.patches : 0) {}

  bool keeps_entries() const { return has_gradient_ || has_target_gradient_; }

  // Numbers of the buffers of `compute`.
  int64_t buffer_size() const { return (keeps_entries() ? 1 : 2) * kRunRows * stride_; }

  // The rows of a run; returns the sum of squares of the entries that it stands for: its own and
  // those of the columns below it.
  double compute(int64_t run, T* buffer) const;

  // X C of the rows of a run, when E is there.
  void apply(int64_t run, T* slopes) const;

 private:
  struct Rows {
    int64_t first, count;
  };
  Rows rows_of(int64_t run) const {
    const int64_t first = run * kRunRows;
    return {first, std::min(kRunRows, call_.patches - first)};
  }

  // Each run's sums over rows of E G; runs_ x patches of what other runs have for these rows, and
  // one row of their own.
  T* own(const Scratch<T>& slopes) const { return slopes.data() + runs_ * call_.patches; }
  T* below(const Scratch<T>& slopes, int64_t run) const {
    return slopes.data() == nullptr ? nullptr : slopes.data() + run * call_.patches;
  }

  void apply(const Rows& rows, const Factor<T>& scaled, const Matrix<const T>& columns,
             const T* norms, const Scratch<T>& slopes, T scale, const Matrix<T>& out,
             T* totals) const;

  const GramCall<T>& call_;
  bool has_gradient_, has_target_gradient_;
  int64_t runs_, stride_;
  Scratch<T> entries_, slopes_, target_slopes_;
};

// out = a^T b of the columns of a run, and of those after it, of factors that are alike but for the
// rows they begin at.
template <typename T>
void multiply_turned(const Factor<T>& left, const Factor<T>& right, int64_t first, int64_t count,
                     int64_t depth, bool adds, const Matrix<T>& out) {
  const int64_t block = loops<T>().block, lanes = loops<T>().lanes;
  Factor<T> columns = right.from_block(first / block);
  columns.columns = (columns.columns + lanes - 1) / lanes * lanes;  // out has room for whole vectors
  for (int64_t start = 0; start < count; start += block) {
    const int64_t height = std::min(block, count - start);
    columns.multiply(left.from_block((first + start) / block).turned(height, depth),
                     out.from(start, height), adds);
  }
}

template <typename T>
double Difference<T>::compute(int64_t run, T* buffer) const {
  const Rows rows = rows_of(run);
  const int64_t first = rows.first, count = rows.count;
  const int64_t patches = call_.patches, width = patches - first, rank = call_.identity_rank;
  T* entries = keeps_entries() ? entries_.data() + first * stride_ + first
                               : buffer + kRunRows * stride_;
  const Matrix<T> products{entries, count, width, stride_};
  const Matrix<T> others{buffer, count, width, stride_};
  multiply_turned(call_.rows, call_.rows, first, count, call_.width, false, products);
  if (rank > 0) {
    const Factor<T> latent = call_.target, hidden = call_.target.from_row(rank);
    multiply_turned(hidden, latent, first, count, rank, false, others);
    multiply_turned(latent, hidden, first, count, rank, true, others);
  } else {
    multiply_turned(call_.target, call_.target, first, count, call_.width, false, others);
  }
  const int64_t rest = width - count;  // of a row, beyond the square on the diagonal
  T *below_slopes = below(slopes_, run), *below_target_slopes = below(target_slopes_, run);
  for (T* sums : {below_slopes, below_target_slopes}) {
    if (sums != nullptr) std::fill(sums + first + count, sums + patches, T(0));
  }
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto sums_of = [&](int64_t start, int64_t length, T* slopes, T* target_slopes) {
      const int64_t column = first + start;
      return loops<T>().gram(products.row(i) + start, others.row(i) + start, rank > 0,
                             call_.inverses[first + i], call_.target_inverses[first + i],
                             call_.inverses + column, call_.target_inverses + column, length,
                             slopes == nullptr ? nullptr : slopes + column,
                             target_slopes == nullptr ? nullptr : target_slopes + column);
    };
    const GramSums<T> square = sums_of(0, count, nullptr, nullptr);
    const GramSums<T> beside = sums_of(count, rest, below_slopes, below_target_slopes);
    squares += static_cast<double>(square.squares) + 2 * static_cast<double>(beside.squares);
    if (has_gradient_) own(slopes_)[first + i] = square.slope + beside.slope;
    if (has_target_gradient_) {
      own(target_slopes_)[first + i] = square.target_slope + beside.target_slope;
    }
  }
  return squares;
}

template <typename T>
void Difference<T>::apply(int64_t run, T* totals) const {
  const Rows rows = rows_of(run);
  if (has_gradient_) {
    apply(rows, call_.scaled, call_.columns, call_.norms, slopes_, call_.scale, call_.gram_columns,
          totals);
  }
  if (has_target_gradient_) {  // E is G - G_R: from the target's side the sign is -1
    apply(rows, call_.scaled_target, call_.target_rows, call_.target_norms, target_slopes_,
          -call_.scale, call_.d_target, totals);
  }
}

template <typename T>
void Difference<T>::apply(const Rows& rows, const Factor<T>& scaled,
                          const Matrix<const T>& columns, const T* norms,
                          const Scratch<T>& slopes, T scale, const Matrix<T>& out,
                          T* totals) const {
  const auto [first, count] = rows;
  const Matrix<T> turned = out.from(first, count);
  const Matrix<const T> above{entries_.data() + first, count, first, 1, stride_};
  const Matrix<const T> beside{entries_.data() + first * stride_ + first, count,
                               call_.patches - first, stride_};
  if (first > 0) scaled.multiply(above, turned);
  scaled.from_row(first).multiply(beside, turned, first > 0);
  std::copy(own(slopes) + first, own(slopes) + first + count, totals);
  for (int64_t run = 0; run * kRunRows < first; ++run) {
    const T* others = below(slopes, run) + first;
    for (int64_t i = 0; i < count; ++i) totals[i] += others[i];
  }
  for (int64_t i = 0; i < count; ++i) {
    const T norm = norms[first + i];
    loops<T>().gram_gradient(turned.row(i), columns.row(first + i), reciprocal_norm(norm),
                             radial_weight(norm, totals[i]), scale, columns.columns,
                             turned.row(i));
  }
}

}  // namespace

template <typename T>
void gram(const std::vector<GramCall<T>>& calls, double* squares) {
  const int64_t images = static_cast<int64_t>(calls.size()), patches = calls[0].patches;
  std::vector<std::unique_ptr<Difference<T>>> differences(images);
  for (int64_t i = 0; i < images; ++i) {
    differences[i] = std::make_unique<Difference<T>>(calls[i]);
  }
  const int64_t runs = (patches + kRunRows - 1) / kRunRows;
  std::vector<double> parts(images * runs);
  // An image's last runs are its shortest, so that threads end together.
  parallel_queue(images * runs, kRunRows * patches * calls[0].width, [&](Queue& queue) {
    const Scratch<T> buffer(differences[0]->buffer_size());
    for (int64_t task; queue.take(task);) {
      const int64_t image = task / runs, run = task % runs;
      parts[image * runs + run] = differences[image]->compute(run, buffer.data());
    }
  });
  for (int64_t image = 0; image < images; ++image) {
    const auto start = parts.begin() + image * runs;
    squares[image] = std::accumulate(start, start + runs, 0.0);
  }
  if (!differences[0]->keeps_entries()) return;
  const int64_t columns = std::max(calls[0].columns.columns, calls[0].target_rows.columns);
  parallel_queue(images * runs, kRunRows * patches * columns, [&](Queue& queue) {
    T totals[kRunRows];
    for (int64_t task; queue.take(task);) differences[task / runs]->apply(task % runs, totals);
  });
}

template void gram(const std::vector<GramCall<float>>&, double*);
template void gram(const std::vector<GramCall<double>>&, double*);

template <typename T>
void read_gram_rows(const TokenRows<T>& tokens, const Sizes& sizes, int64_t first,
                    const std::vector<std::unique_ptr<TokenGramRows<T>>>& images) {
  const int64_t patches = sizes.patches(), width = sizes.width;
  const int64_t runs = (patches + kRunRows - 1) / kRunRows;
  const Loops<T>& loop = loops<T>();
  for (size_t i = 0; i < images.size(); ++i) {
    if (images[i] == nullptr || !images[i]->is_kept) continue;
    TokenGramRows<T>& image = *images[i];
    image.kept = tokens.in_place(first + static_cast<int64_t>(i), sizes.prefix, patches);
    if (image.kept.data == nullptr) image.kept = {image.buffer.data(), patches, width, width};
  }
  const int64_t count = static_cast<int64_t>(images.size());
  parallel_queue(count * runs, kRunRows * width, [&](Queue& queue) {
    const Scratch<T> buffer(kRunRows * width);
    for (int64_t task; queue.take(task);) {
      const int64_t index = task / runs, start = task % runs * kRunRows;
      if (images[index] == nullptr) continue;
      const TokenGramRows<T>& image = *images[index];
      const Run run{(first + index) * patches + start, std::min(kRunRows, patches - start)};
      const Matrix<const T> rows =
          gather(tokens, run, patches, sizes.prefix, width,
                 image.is_kept ? image.buffer.data() + start * width : buffer.data());
      image.rows.packed.set_columns(rows.transposed(), start);
      for (int64_t i = 0; i < run.count; ++i) {
        image.norms.data()[start + i] = std::sqrt(loop.sum_of_squares(rows.row(i), width));
        image.rows.inverses.data()[start + i] = reciprocal_norm(image.norms.data()[start + i]);
      }
      if (!image.is_kept) continue;
      for (int64_t i = 0; i < run.count; ++i) {
        loop.scale(rows.row(i), image.rows.inverses.data()[start + i], width,
                   buffer.data() + i * width);
      }
      image.scaled.set_rows({buffer.data(), run.count, width, width}, start);
    }
  });
}

template void read_gram_rows(const TokenRows<float>&, const Sizes&, int64_t,
                             const std::vector<std::unique_ptr<TokenGramRows<float>>>&);
template void read_gram_rows(const TokenRows<double>&, const Sizes&, int64_t,
                             const std::vector<std::unique_ptr<TokenGramRows<double>>>&);

}  // namespace singer::cpu
