// Stage `gram`: the sum of E^2 and X C. E is symmetric: of each pair of entries one is computed, and
// kept until X C is.
#include "math/gram.h"

#include <numeric>

#include "cpu/stages.h"

namespace singer::cpu {
namespace {

// The sums over each row of E G, for the gradient of one side. A run of rows adds to the rows below it
// too; their parts are kept apart, so that all are added in one order.
template <typename T>
class Slopes {
 public:
  Slopes(bool is_needed, int64_t runs, int64_t patches)
      : patches_(patches), parts_(is_needed ? (runs + 1) * patches : 0) {}

  // The parts of a run, one for each row of the image; null: not needed.
  T* parts(int64_t run) const {
    return parts_.data() == nullptr ? nullptr : parts_.data() + (run + 1) * patches_;
  }

  // Of each row what its own run finds.
  T* own() const { return parts_.data(); }

  // The sum for a row of which `runs` earlier runs know.
  T total(int64_t row, int64_t runs) const {
    T sum = own()[row];
    for (int64_t run = 0; run < runs; ++run) sum += parts(run)[row];
    return sum;
  }

 private:
  int64_t patches_;
  Scratch<T> parts_;
};

// E of one image, from the diagonal on to the right.
template <typename T>
class Difference {
 public:
  explicit Difference(const GramCall<T>& call)
      : call_(call),
        runs_(parts_of(call.patches, kRunRows)),
        stride_(row_stride<T>(call.patches)),
        entries_(is_kept() ? call.patches * stride_ : 0),
        slopes_(call.refined.columns.data != nullptr, runs_, call.patches),
        target_slopes_(call.target.columns.data != nullptr, runs_, call.patches) {}

  // Whether a gradient is wanted.
  bool is_kept() const {
    return call_.refined.columns.data != nullptr || call_.target.columns.data != nullptr;
  }

  // How many numbers the buffer of `compute` holds.
  int64_t buffer_size() const { return (is_kept() ? 1 : 2) * kRunRows * stride_; }

  // The entries of a run of rows; returns the sum of their squares and of their mirror images'.
  double compute(int64_t run, T* buffer) const;

  // X C of a run of rows, once all entries are there.
  void apply(int64_t run) const {
    apply(run, call_.refined, slopes_, call_.scale);
    apply(run, call_.target, target_slopes_, -call_.scale);  // E is G - G_R
  }

 private:
  int64_t rows_of(int64_t run) const {
    return std::min(kRunRows, call_.patches - run * kRunRows);
  }
  void apply(int64_t run, const GramSide<T>& side, const Slopes<T>& slopes, T scale) const;

  const GramCall<T>& call_;
  int64_t runs_, stride_;
  Scratch<T> entries_;
  Slopes<T> slopes_, target_slopes_;
};

// out = a^T b or, with `adds`, out += it: as many of its rows as out has, those of a's columns from
// `first` on, and of them what is not left of the diagonal.
template <typename T>
void multiply_turned(const Factor<T>& a, const Factor<T>& b, int64_t first, int64_t depth, bool adds,
                     const Matrix<T>& out) {
  const int64_t block = loops<T>().block, lanes = loops<T>().lanes;
  Factor<T> columns = b.from_block(first / block);
  columns.columns = round_up(columns.columns, lanes);  // out has room for whole vectors
  for (int64_t start = 0; start < out.rows; start += block) {
    const int64_t height = std::min(block, out.rows - start);
    columns.multiply(a.from_block((first + start) / block).turned(height, depth),
                     out.from(start, height), adds);
  }
}

template <typename T>
double Difference<T>::compute(int64_t run, T* buffer) const {
  const GramSide<T>&refined = call_.refined, &target = call_.target;
  const int64_t patches = call_.patches, rank = call_.identity_rank;
  const int64_t first = run * kRunRows, count = rows_of(run), below = first + count;
  T* entries = is_kept() ? entries_.data() + first * stride_ + first : buffer + kRunRows * stride_;
  const Matrix<T> products{entries, count, patches - first, stride_};
  const Matrix<T> others{buffer, count, patches - first, stride_};
  multiply_turned(refined.rows, refined.rows, first, call_.width, false, products);
  if (rank > 0) {
    const Factor<T> latent = target.rows, hidden = target.rows.from_row(rank);
    multiply_turned(hidden, latent, first, rank, false, others);
    multiply_turned(latent, hidden, first, rank, true, others);
  } else {
    multiply_turned(target.rows, target.rows, first, call_.width, false, others);
  }
  T *parts = slopes_.parts(run), *target_parts = target_slopes_.parts(run);
  if (parts != nullptr) std::fill(parts + below, parts + patches, T(0));
  if (target_parts != nullptr) std::fill(target_parts + below, target_parts + patches, T(0));
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = first + i;
    const auto sums_of = [&](int64_t begin, int64_t end, T* column_sums, T* target_column_sums) {
      return loops<T>().gram(products.row(i) + begin - first, others.row(i) + begin - first,
                             rank > 0, refined.inverses[row], target.inverses[row],
                             refined.inverses + begin, target.inverses + begin, end - begin,
                             column_sums, target_column_sums);
    };
    // On the diagonal stands a square that is computed whole.
    const GramSums<T> square = sums_of(first, below, nullptr, nullptr);
    const GramSums<T> beside =
        sums_of(below, patches, parts == nullptr ? nullptr : parts + below,
                target_parts == nullptr ? nullptr : target_parts + below);
    squares += static_cast<double>(square.squares) + 2 * static_cast<double>(beside.squares);
    if (parts != nullptr) slopes_.own()[row] = square.slope + beside.slope;
    if (target_parts != nullptr) {
      target_slopes_.own()[row] = square.target_slope + beside.target_slope;
    }
  }
  return squares;
}

template <typename T>
void Difference<T>::apply(int64_t run, const GramSide<T>& side, const Slopes<T>& slopes,
                          T scale) const {
  if (side.columns.data == nullptr) return;
  const int64_t first = run * kRunRows, count = rows_of(run);
  const Matrix<T> turned = side.gram_columns.from(first, count);
  const Matrix<const T> above{entries_.data() + first, count, first, 1, stride_};
  const Matrix<const T> beside{entries_.data() + first * stride_ + first, count,
                               call_.patches - first, stride_};
  if (first > 0) side.scaled.multiply(above, turned);
  side.scaled.from_row(first).multiply(beside, turned, first > 0);
  for (int64_t i = 0; i < count; ++i) {
    const T norm = side.norms[first + i];
    loops<T>().gram_gradient(turned.row(i), side.columns.row(first + i), side.inverses[first + i],
                             radial_weight(norm, slopes.total(first + i, run)), scale,
                             turned.columns, turned.row(i));
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
  const int64_t runs = parts_of(patches, kRunRows);
  std::vector<double> parts(images * runs);
  // The longest first, so that threads end together.
  parallel_queue(images * runs, kRunRows * patches * calls[0].width, [&](Queue& queue) {
    const Scratch<T> buffer(differences[0]->buffer_size());
    for (int64_t task; queue.take(task);) {
      const int64_t image = task % images, run = task / images;
      parts[image * runs + run] = differences[image]->compute(run, buffer.data());
    }
  });
  for (int64_t image = 0; image < images; ++image) {
    const auto start = parts.begin() + image * runs;
    squares[image] = std::accumulate(start, start + runs, 0.0);
  }
  if (!differences[0]->is_kept()) return;
  const int64_t columns = calls[0].refined.columns.columns + calls[0].target.columns.columns;
  parallel_queue(images * runs, kRunRows * patches * columns, [&](Queue& queue) {
    for (int64_t task; queue.take(task);) differences[task / runs]->apply(task % runs);
  });
}

template void gram(const std::vector<GramCall<float>>&, double*);
template void gram(const std::vector<GramCall<double>>&, double*);

template <typename T>
void read_gram_rows(const TokenRows<T>& tokens, const Sizes& sizes, int64_t first,
                    const std::vector<std::unique_ptr<TokenGramRows<T>>>& images) {
  const int64_t patches = sizes.patches(), width = sizes.width;
  const int64_t runs = parts_of(patches, kRunRows);
  const Loops<T>& loop = loops<T>();
  for (size_t i = 0; i < images.size(); ++i) {
    if (images[i] == nullptr || !images[i]->has_gradient) continue;
    TokenGramRows<T>& image = *images[i];
    image.kept = tokens.in_place(first + static_cast<int64_t>(i), sizes.prefix, patches);
    if (image.kept.data != nullptr) continue;
    image.buffer = Scratch<T>(patches * width);
    image.kept = {image.buffer.data(), patches, width, width};
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
                 image.buffer.data() == nullptr ? buffer.data()
                                                : image.buffer.data() + start * width);
      image.rows.packed.set_columns(rows.transposed(), start);
      for (int64_t i = 0; i < run.count; ++i) {
        image.norms.data()[start + i] = std::sqrt(loop.sum_of_squares(rows.row(i), width));
        image.rows.inverses.data()[start + i] = reciprocal_norm(image.norms.data()[start + i]);
      }
      if (!image.has_gradient) continue;
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
