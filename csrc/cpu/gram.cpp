// Stage `gram`: the sum of E^2 and X C, panel by panel of E's upper half; E is never whole.
#include "math/gram.h"

#include <cmath>

#include "cpu/stages.h"

namespace singer::cpu {
namespace {

// More panels save more of the products' lower half; narrow ones run slower.
constexpr int64_t kPanels = 8, kLeastPanel = 64;
// Columns of a panel that one thread takes at once.
constexpr int64_t kBlock = 128;

int64_t panel_rows(int64_t patches) {
  const int64_t rows = (patches + kPanels - 1) / kPanels;
  return std::min(patches, std::max(kLeastPanel, (rows + 15) / 16 * 16));
}

int64_t blocks_of(int64_t patches) { return patches / kBlock + 2; }

// total (rows of `first` on) += part
template <typename T>
void add_rows(const Matrix<T>& part, const Matrix<T>& total) {
  parallel(part.rows, part.columns, [&](int64_t i) {
    loops<T>().add(part.row(i), part.columns, total.row(i));
  });
}

// The product of E with scaled columns, of which each panel brings a part.
template <typename T>
struct Turning {
  Matrix<const T> columns;  // C
  Matrix<T> scaled, turned;
  T* part;

  Turning(const Matrix<const T>& of, const T* inverses, T* scaled_data, T* turned_data, T* buffer)
      : columns(of),
        scaled{scaled_data, of.rows, of.columns, of.columns},
        turned{turned_data, of.rows, of.columns, of.columns},
        part(buffer) {
    if (columns.data == nullptr) return;
    parallel(columns.rows, columns.columns, [&](int64_t i) {
      loops<T>().scale(columns.row(i), inverses[i], columns.columns, scaled.row(i));
      std::fill(turned.row(i), turned.row(i) + columns.columns, T(0));
    });
  }

  // `panel`: rows `first` on of E, columns `first` on.
  void add(const Matrix<T>& panel, int64_t first) const {
    if (columns.data == nullptr) return;
    const int64_t rows = panel.rows, rest = panel.columns - rows, width = columns.columns;
    const Matrix<T> own{part, rows, width, width};
    multiply(panel, scaled.from(first, panel.columns), own);
    add_rows(own, turned.from(first, rows));
    if (rest == 0) return;
    const Matrix<T> right{panel.data + rows, rows, rest, panel.row_stride};
    const Matrix<T> others{part, rest, width, width};
    multiply(right.transposed(), scaled.from(first, rows), others);
    add_rows(others, turned.from(first + rows, rest));
  }

  void finish(const T* norms, const T* slopes, T scale, const Matrix<T>& out) const {
    if (columns.data == nullptr) return;
    parallel(columns.rows, columns.columns, [&](int64_t i) {
      loops<T>().gram_gradient(turned.row(i), columns.row(i), reciprocal_norm(norms[i]),
                               radial_weight(norms[i], slopes[i]), scale, columns.columns,
                               out.row(i));
    });
  }
};

}  // namespace

template <typename T>
GramScratch<T>::GramScratch(const Tensor& like, int64_t patches, int64_t columns,
                            int64_t target_columns)
    : panel(panel_rows(patches)),
      products(like, panel * patches),
      others(like, panel * patches),
      vectors(like, 4 * patches),
      row_sums(like, 3 * panel * blocks_of(patches)),
      scaled(like, patches * columns),
      turned(like, patches * columns),
      scaled_target(like, patches * target_columns),
      turned_target(like, patches * target_columns),
      part(like, patches * std::max(columns, target_columns)) {}

template <typename T>
double gram(const GramCall<T>& call, const GramScratch<T>& scratch) {
  const int64_t patches = call.rows.rows;
  const Loops<T>& loop = loops<T>();
  T* inverses = scratch.vectors.data();
  T* target_inverses = inverses + patches;
  T* slopes = target_inverses + patches;
  T* target_slopes = slopes + patches;
  for (int64_t i = 0; i < patches; ++i) {
    inverses[i] = reciprocal_norm(call.norms[i]);
    target_inverses[i] = reciprocal_norm(call.target_norms[i]);
    slopes[i] = target_slopes[i] = T(0);
  }
  const bool is_identity = call.right.data != nullptr;
  const Matrix<const T> other_right = is_identity ? call.right : call.target;
  const Matrix<const T> target_rows = call.d_target.data == nullptr ? Matrix<const T>{} : call.target;
  const Turning<T> own(call.columns, inverses, scratch.scaled.data(), scratch.turned.data(),
                       scratch.part.data());
  const Turning<T> targets(target_rows, target_inverses, scratch.scaled_target.data(),
                           scratch.turned_target.data(), scratch.part.data());
  double squares = 0;
  for (int64_t first = 0; first < patches; first += scratch.panel) {
    const int64_t rows = std::min(scratch.panel, patches - first), span = patches - first;
    const Matrix<T> products{scratch.products.data(), rows, span, span};
    const Matrix<T> others{scratch.others.data(), rows, span, span};
    multiply(call.rows.from(first, rows), call.rows.from(first, span).transposed(), products);
    multiply(call.target.from(first, rows), other_right.from(first, span).transposed(), others);
    // Blocks of columns: first those of the panel's own rows, whose both halves are here.
    const int64_t own_blocks = (rows + kBlock - 1) / kBlock;
    const int64_t blocks = own_blocks + (span - rows + kBlock - 1) / kBlock;
    T* sums = scratch.row_sums.data();
    parallel(blocks, rows * kBlock, [&](int64_t block) {
      const bool is_own = block < own_blocks;
      const int64_t start = is_own ? block * kBlock : rows + (block - own_blocks) * kBlock;
      const int64_t count = std::min(kBlock, (is_own ? rows : span) - start), j = first + start;
      for (int64_t i = 0; i < rows; ++i) {
        const GramSums<T> found =
            loop.gram(products.row(i) + start, others.row(i) + start, is_identity,
                      inverses[first + i], target_inverses[first + i], inverses + j,
                      target_inverses + j, count, is_own ? nullptr : slopes + j,
                      is_own ? nullptr : target_slopes + j);
        T* place = sums + 3 * (block * rows + i);
        place[0] = is_own ? found.squares : 2 * found.squares;
        place[1] = found.slope;
        place[2] = found.target_slope;
      }
    });
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t i = 0; i < rows; ++i) {
        const T* place = sums + 3 * (block * rows + i);
        squares += static_cast<double>(place[0]);
        slopes[first + i] += place[1];
        target_slopes[first + i] += place[2];
      }
    }
    own.add(products, first);
    targets.add(products, first);
  }
  own.finish(call.norms, slopes, call.scale, call.gram_columns);
  targets.finish(call.target_norms, target_slopes, -call.scale, call.d_target);
  return squares;
}

#define SINGER_INSTANTIATE(T)      \
  template struct GramScratch<T>;  \
  template double gram(const GramCall<T>&, const GramScratch<T>&);
SINGER_INSTANTIATE(float)
SINGER_INSTANTIATE(double)

}  // namespace singer::cpu
