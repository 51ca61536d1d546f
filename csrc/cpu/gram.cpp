// Stage `gram`: the sum of E^2 and X C, by runs of E's rows; E is never whole.
#include "math/gram.h"

#include <numeric>

#include "cpu/stages.h"

namespace singer::cpu {
namespace {

// C with its rows divided by norms, packed.
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

}  // namespace

template <typename T>
double gram(const GramCall<T>& call) {
  const int64_t patches = call.rows.rows;
  const bool is_identity = call.right.data != nullptr;
  const bool has_columns = call.columns.data != nullptr, has_target = call.d_target.data != nullptr;
  const Scratch<T> inverses(patches), target_inverses(patches);
  for (int64_t i = 0; i < patches; ++i) {
    inverses.data()[i] = reciprocal_norm(call.norms[i]);
    target_inverses.data()[i] = reciprocal_norm(call.target_norms[i]);
  }
  const Packed<T> right(call.rows.transposed());
  const Packed<T> other_right((is_identity ? call.right : call.target).transposed());
  const Packed<T> scaled = pack_scaled(call.columns, inverses.data());
  const Packed<T> scaled_target =
      pack_scaled(has_target ? call.target : Matrix<const T>{}, target_inverses.data());
  const auto runs = runs_of(0, patches, patches, kRunRows);
  std::vector<double> squares(runs.size(), 0.0);
  parallel_ranges(static_cast<int64_t>(runs.size()), patches * call.rows.columns,
                  [&](int64_t begin, int64_t end) {
    const Scratch<T> panel(2 * kRunRows * patches), sums(2 * kRunRows);
    T *slopes = sums.data(), *target_slopes = sums.data() + kRunRows;
    for (int64_t index = begin; index < end; ++index) {
      const auto [first, count] = runs[index];
      const Matrix<T> products{panel.data(), count, patches, patches};
      const Matrix<T> others{panel.data() + kRunRows * patches, count, patches, patches};
      right.multiply(call.rows.from(first, count), products);
      other_right.multiply(call.target.from(first, count), others);
      for (int64_t i = 0; i < count; ++i) {
        const GramSums<T> found = loops<T>().gram(
            products.row(i), others.row(i), is_identity, inverses.data()[first + i],
            target_inverses.data()[first + i], inverses.data(), target_inverses.data(), patches);
        squares[index] += static_cast<double>(found.squares);
        slopes[i] = found.slope;
        target_slopes[i] = found.target_slope;
      }
      if (has_columns) {
        apply<T>(products, scaled, call.columns, call.norms, slopes, call.scale, first,
                 call.gram_columns);
      }
      if (has_target) {  // E is G - G_R: from the target's side the sign is the other
        apply<T>(products, scaled_target, call.target, call.target_norms, target_slopes,
                 -call.scale, first, call.d_target);
      }
    }
  });
  return std::accumulate(squares.begin(), squares.end(), 0.0);
}

template double gram(const GramCall<float>&);
template double gram(const GramCall<double>&);

}  // namespace singer::cpu
