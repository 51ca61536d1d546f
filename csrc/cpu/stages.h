// The stages on the CPU, one source each.
#pragma once

#include "cpu/rows.h"

namespace singer::cpu {

// Patches, for each thread, of the images that are taken together, unless one image has more: enough
// work between two barriers, few enough for a cache that the threads share.
constexpr int64_t kGroupPatches = 512;

struct Sizes {
  int64_t images, tokens, prefix, width, rank;

  int64_t patches() const { return tokens - prefix; }
};

// An image's rows as one side of a Gram matrix.
template <typename T>
struct GramRows {
  GramRows(int64_t width, int64_t patches) : packed(width, patches), inverses(patches) {}

  Packed<T> packed;     // the rows' transpose
  Scratch<T> inverses;  // 1 / n
};

// What the stage `refine` leaves of an image for its Gram matrix.
template <typename T>
struct RefinedImage {
  // With `has_identity` there is room for what makes F F^T of F^ F^^T too, and with `has_gradient`
  // for what the gradient takes.
  RefinedImage(const Sizes& sizes, bool has_identity, bool has_gradient)
      : refined(sizes.width, sizes.patches()),
        plain_inverses(has_identity ? sizes.patches() : 0),
        halves(has_identity ? 2 * sizes.rank : 0, sizes.patches()),
        scaled(has_gradient ? sizes.patches() : 0, 2 * sizes.rank) {}

  GramRows<T> refined;        // F^
  Scratch<T> plain_inverses;  // of the norms of F
  Packed<T> halves;           // [L | H]^T: F^ F^^T - F F^T = H L^T + L H^T
  Packed<T> scaled;           // [H | Z], rows divided by the norms of F^
};

// What the stage `refine` reads and writes.
template <typename T>
struct RefineCall {
  Sizes sizes;
  TokenRows<T> student;      // S
  TokenRows<T> teacher;      // F
  TokenRows<T> operand;      // F as the products take it
  Packed<T> down;            // Wd, [D, r]
  Packed<T> up;              // Wu, [r, D]
  Packed<T> up_transposed;   // Wu^T, [D, r]
  Packed<T> overlap;         // M = Wu Wu^T, [r, r]; empty: L is not wanted
  Matrix<T> columns;         // out: [H | Z], [B P, 2r]
  Matrix<T> residual;        // out: (F^ - S) Wu^T, [B P, r]; without data: not wanted
  T* norms;                  // out: n, [B P]
  T* plain_norms;            // out: norms of F, [B P]
  T* kd_parts;               // out: sums of (F^ - S)^2, [B T]
  char* refined;             // out: F^, [B, T, D]; null: not wanted
  Dtype refined_dtype;
  bool has_gradient;         // whether [H | Z] is to be made ready for the Gram matrix's gradient
};

// H, Z, norms and the KD sums of the patches of so many images from `first` on; what their Gram
// matrices need goes to `images`, or nowhere if it is empty.
template <typename T>
void refine(const RefineCall<T>& call, int64_t first, int64_t count,
            const std::vector<std::unique_ptr<RefinedImage<T>>>& images);

// The KD sums of the prefix tokens, where F^ = F.
template <typename T>
void refine_prefix(const RefineCall<T>& call);

template <typename T>
struct OutlierCall {
  int64_t images, patches;
  double quantile;
  const T* norms;  // [B, P]
  T* threshold;    // out: q, [B]
  T* squares;      // out: sums of (n - q)^2, [B]
  T* counts;       // out: how many, [B]
};

template <typename T>
void outlier(const OutlierCall<T>& call);

// One side of the stage `gram` of one image: F^ or R. Without data in `columns` no gradient of it is
// wanted, and nothing after them is read.
template <typename T>
struct GramSide {
  Factor<T> rows;           // its rows' transpose, [D, P]
  const T* inverses;        // 1 / norms of the rows, [P]
  Matrix<const T> columns;  // C, [P, m]
  const T* norms;           // [P]
  Factor<T> scaled;         // C with its rows divided by the norms
  Matrix<T> gram_columns;   // out: X C
};

// What the stage `gram` reads and writes, for one image.
template <typename T>
struct GramCall {
  int64_t patches, width;
  GramSide<T> refined, target;
  // Above 0, `target.rows` are [L | H]^T, [2r, P], with F^ F^^T - R R^T = H L^T + L H^T.
  int64_t identity_rank;
  T scale;  // 4 / (B P^2)
};

// Writes the sum of E^2 of each image, at least one, all of one size.
template <typename T>
void gram(const std::vector<GramCall<T>>& calls, double* squares);

// An image's rows made ready for `gram`, from a tensor.
template <typename T>
struct TokenGramRows {
  // `has_gradient`: it is wanted, and takes the rows themselves and `scaled`.
  TokenGramRows(const Sizes& sizes, bool has_gradient)
      : has_gradient(has_gradient),
        rows(sizes.width, sizes.patches()),
        norms(sizes.patches()),
        scaled(has_gradient ? sizes.patches() : 0, sizes.width),
        buffer(0) {}

  bool has_gradient;
  GramRows<T> rows;
  Scratch<T> norms;
  Packed<T> scaled;  // the rows divided by their norms
  Scratch<T> buffer;
  Matrix<const T> kept{};  // the rows, in `buffer` or where they lie
};

// Sets those of the image `first` and the next ones that are not null.
template <typename T>
void read_gram_rows(const TokenRows<T>& tokens, const Sizes& sizes, int64_t first,
                    const std::vector<std::unique_ptr<TokenGramRows<T>>>& images);

// What the stage `backward` reads and writes; a null pointer is a term that is not there.
template <typename T>
struct BackwardCall {
  Sizes sizes;
  std::optional<TokenRows<T>> student;    // S
  TokenRows<T> teacher;                   // F
  TokenRows<T> operand;                   // F as the products take it
  Packed<T> up;                           // Wu, [r, D]
  Packed<T> up_transposed;                // Wu^T, [D, r]; only with `d_refined`
  Matrix<const T> columns;                // [H | Z], [B P, 2r]
  const T* gram_columns;                  // X [H | Z], [B P, 2r]
  const T* residual;                      // (F^ - S) Wu^T, [B P, r]
  const T* norms;                         // n, [B P]
  const T* threshold;                     // q, [B]
  const T* outlier_weight;                // 2 / count
  const T* d_kd;                          // upstream gradients
  const T* d_outlier;
  const T* d_info;
  std::optional<TokenRows<T>> d_refined;  // Y, [B, T, D]
  char* d_student;                        // out: dS, [B, T, D]
  Dtype d_student_dtype;
  std::optional<Tensor> d_down;           // out: dWd, [D, r]
  std::optional<Tensor> d_up;             // out: dWu, [r, D]
};

template <typename T>
void backward(const BackwardCall<T>& call);

}  // namespace singer::cpu
