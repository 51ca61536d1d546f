// The stages on the CPU, one source each.
#pragma once

#include "cpu/matrix.h"

namespace singer::cpu {

// Target patches per thread in an image group: enough work between barriers, small enough for the
// shared cache.
constexpr int64_t kGroupPatches = 512;

struct Sizes {
  int64_t images, tokens, prefix, width, rank;

  int64_t patches() const { return tokens - prefix; }
};

// An image after `refine`, as `gram` takes it.
template <typename T>
struct RefinedImage {
  RefinedImage(const Sizes& sizes, bool has_identity, bool has_gradient)
      : refined_t(sizes.width, sizes.patches()),
        inv_norms(sizes.patches()),
        teacher_inv_norms(has_identity ? sizes.patches() : 0),
        lh_t(has_identity ? 2 * sizes.rank : 0, sizes.patches()),
        scaled_hz(has_gradient ? sizes.patches() : 0, 2 * sizes.rank) {}

  PackedMatrix<T> refined_t;     // F^ transposed, [D, P]
  Scratch<T> inv_norms;          // 1 / n, [P]
  Scratch<T> teacher_inv_norms;  // 1 / norms of F, [P]; with the identity
  PackedMatrix<T> lh_t;          // [L | H] transposed, [2r, P]; with the identity
  PackedMatrix<T> scaled_hz;     // diag(1/n) [H | Z], [P, 2r]; with a gradient
};

template <typename T>
struct RefineParams {
  Sizes sizes;
  TokenRows<T> student;           // S
  TokenRows<T> teacher;           // F
  TokenRows<T> operand;           // F rounded to the dtype of the products
  PackedMatrix<T> down;           // Wd, [D, r]
  PackedMatrix<T> up;             // Wu, [r, D]
  PackedMatrix<T> up_transposed;  // Wu^T, [D, r]
  PackedMatrix<T> up_gram;        // M = Wu Wu^T, [r, r]; empty: without the Gram identity
  Matrix<T> hz;                   // out: [H | Z], [B P, 2r]
  Matrix<T> residual;             // out: (F^ - S) Wu^T, [B P, r]; null data: not requested
  T* norms;                       // out: n, [B P]
  T* teacher_norms;               // out: norms of F, [B P]
  T* kd_partials;                 // out: sums of (F^ - S)^2, [B T]
  char* refined;                  // out: F^, [B, T, D]; null: not requested
  ScalarType refined_dtype;
  bool has_gradient;              // whether X [H | Z] is requested
};

// Compute the outputs for the patches of `count` images from `first` on and, unless `images` is
// empty, the operands of their Gram matrices.
template <typename T>
void refine(const RefineParams<T>& params, int64_t first, int64_t count,
            const std::vector<std::unique_ptr<RefinedImage<T>>>& images);

// Compute kd_partials and F^ = F of the prefix tokens.
template <typename T>
void refine_prefix(const RefineParams<T>& params);

// Write threshold = q, and the sum of (n - q)^2 over the outliers and their number of each image.
// norms: [B, P]; threshold, squares, counts: [B].
template <typename T>
void outlier(const T* norms, int64_t images, int64_t patches, double quantile, T* threshold,
             T* squares, T* counts);

// One side of the stage `gram`: F^ or R of an image. C is [H | Z] or R itself.
template <typename T>
struct GramSide {
  PackedView<T> rows_t;           // the patches transposed, [D, P]
  const T* inv_norms;             // 1 / norms of the patches, [P]
  Matrix<const T> factor{};       // C, [P, m]; null data: no gradient, and the rest is not read
  const T* norms = nullptr;       // [P]
  PackedView<T> scaled_factor{};  // diag(1/n) C, [P, m]
  Matrix<T> gradient{};           // out: X C, [P, m]
};

// The stage `gram` of one image.
template <typename T>
struct GramParams {
  int64_t patches, width;
  GramSide<T> refined, target;
  // If above 0, target.rows_t is [L | H] transposed, [2r, P]: F F^T = F^ F^^T - H L^T - L H^T.
  int64_t identity_rank;
  T scale;  // 4 / (B P^2)
};

// Write the sum of E^2 of each image; at least one, all of one size.
template <typename T>
void gram(const std::vector<GramParams<T>>& images, double* squares);

// The patches R of an image, their norms n, and the operands of `gram`.
template <typename T>
struct NormalizedImage {
  NormalizedImage(const Sizes& sizes, bool has_gradient)
      : has_gradient(has_gradient),
        rows_t(sizes.width, sizes.patches()),
        inv_norms(sizes.patches()),
        norms(sizes.patches()),
        scaled(has_gradient ? sizes.patches() : 0, sizes.width),
        buffer(0) {}

  bool has_gradient;       // whether X R is requested, which takes `scaled` and `rows`
  PackedMatrix<T> rows_t;  // R transposed, [D, P]
  Scratch<T> inv_norms;    // 1 / n, [P]
  Scratch<T> norms;        // n, [P]
  PackedMatrix<T> scaled;  // diag(1/n) R, [P, D]
  Scratch<T> buffer;
  Matrix<const T> rows{};  // R, [P, D], in `buffer` or in place
};

// Compute the images from `first` on; null entries are skipped.
template <typename T>
void normalize(const TokenRows<T>& tokens, const Sizes& sizes, int64_t first,
               const std::vector<std::unique_ptr<NormalizedImage<T>>>& images);

// Null inputs belong to losses without a gradient; null outputs are not requested.
template <typename T>
struct BackwardParams {
  Sizes sizes;
  std::optional<TokenRows<T>> student;       // S
  TokenRows<T> teacher;                      // F
  TokenRows<T> operand;                      // F rounded to the dtype of the products
  PackedMatrix<T> up;                        // Wu, [r, D]
  PackedMatrix<T> up_transposed;             // Wu^T, [D, r]; only with `grad_refined`
  Matrix<const T> hz;                        // [H | Z], [B P, 2r]
  const T* grad_hz;                          // X [H | Z], [B P, 2r]
  const T* residual;                         // (F^ - S) Wu^T, [B P, r]
  const T* norms;                            // n, [B P]
  const T* threshold;                        // q, [B]
  const T* outlier_weight;                   // 2 / count, []
  std::optional<T> grad_kd, grad_outlier, grad_info;
  std::optional<TokenRows<T>> grad_refined;  // Y
  char* grad_student;                        // out: dS, [B, T, D]
  ScalarType grad_student_dtype;
  std::optional<Tensor> grad_down;           // out: dWd, [D, r]
  std::optional<Tensor> grad_up;             // out: dWu, [r, D]
};

template <typename T>
void backward(const BackwardParams<T>& params);

}  // namespace singer::cpu
