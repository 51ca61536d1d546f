// Stage `gram`: the sum of E^2 and X C, by runs of E's rows; E is never whole.
#include "math/gram.h"

#include <numeric>

#include "cpu/stages.h"

namespace singer::cpu {
namespace {

// C with its rows divided by norms, packed; empty if there is no C.
template <typename T>
Packed<T> pack_scaled(const Matrix<const T>& columns, const T* inverses) {
  if (columns.data == nullptr) return Packed<T>(0, 0);
  const Scratch<T> scaled(columns.rows * columns.columns);
  const Matrix<T> matrix{scaled.data(), columns.rows, columns.columns, columns.columns};
  parallel(columns.rows, columns.columns, [&](int64_t i) {
    loops<T>().scale(columns.row(i), inverses[i], columns.columns, matrix.row(i));
  });
  return Packed<T>(matrix);
}

// Rows `first` on of X C, from those of E.
template <typename T>
void apply(const Matrix<const T>& difference, const Packed<T>& scaled,
           const Matrix<const T>& columns, const T* norms, const T* slopes, T scale, int64_t first,
           const Matrix<T>& out) {
  const Matrix<T> turned = out.from(first, difference.rows);
  scaled.multiply(difference, turned);
  for (int64_t i = 0; i < difference.rows; ++i) {
    const T norm = norms[first + i];
    loops<T>().gram_gradient(turned.row(i), columns.row(first + i), reciprocal_norm(norm),
                             radial_weight(norm, slopes[i]), scale, columns.columns,
                             turned.row(i));
  }
}

// What all rows of one image's E are made with.
template <typename T>
struct Prepared {
  explicit Prepared(const GramCall<T>& of)
      : call(of),
        is_identity(of.right.data != nullptr),
        inverses(reciprocals(of.norms, of.rows.rows)),
        target_inverses(reciprocals(of.target_norms, of.rows.rows)),
        right(of.rows.transposed()),
        other_right((is_identity ? of.right : of.target).transposed()),
        scaled(pack_scaled(of.columns, inverses.data())),
        scaled_target(pack_scaled(of.d_target.data == nullptr ? Matrix<const T>{} : of.target,
                                  target_inverses.data())) {}

  static Scratch<T> reciprocals(const T* norms, int64_t count) {
    Scratch<T> result(count);
    for (int64_t i = 0; i < count; ++i) result.data()[i] = reciprocal_norm(norms[i]);
    return result;
  }

  const GramCall<T>& call;
  bool is_identity;
  Scratch<T> inverses, target_inverses;
  Packed<T> right, other_right, scaled, scaled_target;
};

// Rows of E from `run.first` on, and what follows from them; returns the sum of their squares.
// `panel` holds twice their numbers, `sums` two for each row.
template <typename T>
double gram_run(const Prepared<T>& image, const Run& run, T* panel, T* sums) {
  const GramCall<T>& call = image.call;
  const auto [first, count] = run;
  const int64_t patches = call.rows.rows;
  const Matrix<T> products{panel, count, patches, patches};
  const Matrix<T> others{panel + count * patches, count, patches, patches};
  T *slopes = sums, *target_slopes = sums + count;
  image.right.multiply(call.rows.from(first, count), products);
  image.other_right.multiply(call.target.from(first, count), others);
  double squares = 0;
  for (int64_t i = 0; i < count; ++i) {
    const GramSums<T> found =
        loops<T>().gram(products.row(i), others.row(i), image.is_identity,
                        image.inverses.data()[first + i], image.target_inverses.data()[first + i],
                        image.inverses.data(), image.target_inverses.data(), patches);
    squares += static_cast<double>(found.squares);
    slopes[i] = found.slope;
    target_slopes[i] = found.target_slope;
  }
  if (call.columns.data != nullptr) {
    apply<T>(products, image.scaled, call.columns, call.norms, slopes, call.scale, first,
             call.gram_columns);
  }
  if (call.d_target.data != nullptr) {  // E is G - G_R: from the target's side the sign is -1
    apply<T>(products, image.scaled_target, call.target, call.target_norms, target_slopes,
             -call.scale, first, call.d_target);
  }
  return squares;
}

}  // namespace

template <typename T>
void gram(const std::vector<GramCall<T>>& calls, double* squares) {
  const int64_t images = static_cast<int64_t>(calls.size()), patches = calls[0].rows.rows;
  const int64_t cost = patches * calls[0].rows.columns;
  std::vector<std::unique_ptr<Prepared<T>>> prepared(images);
  parallel(images, cost, [&](int64_t i) { prepared[i] = std::make_unique<Prepared<T>>(calls[i]); });
  const auto runs = runs_of(0, patches, patches, kRunRows);
  const int64_t of_image = static_cast<int64_t>(runs.size());
  std::vector<double> parts(images * of_image);
  parallel_ranges(images * of_image, kRunRows * cost, [&](int64_t begin, int64_t end) {
    const Scratch<T> panel(2 * kRunRows * patches), sums(2 * kRunRows);
    for (int64_t i = begin; i < end; ++i) {
      parts[i] = gram_run(*prepared[i / of_image], runs[i % of_image], panel.data(), sums.data());
    }
  });
  for (int64_t image = 0; image < images; ++image) {
    const auto start = parts.begin() + image * of_image;
    squares[image] = std::accumulate(start, start + of_image, 0.0);
  }
}

template void gram(const std::vector<GramCall<float>>&, double*);
template void gram(const std::vector<GramCall<double>>&, double*);

}  // namespace singer::cpu
