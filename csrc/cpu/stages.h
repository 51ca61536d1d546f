// The stages on the CPU, one source each.
#pragma once

#include "cpu/rows.h"

namespace singer::cpu {

// Rows that a thread works on at once, so that they stay in its cache: a multiple of the heights of
// a product's tiles (4, 6 and 12).
constexpr int64_t kRunRows = 48;

// Rows between two barriers of all threads: enough runs for many threads, few enough for a cache
// that they share. The same for any number of threads, as sums are to be.
constexpr int64_t kGroupRows = 12 * kRunRows;

struct Sizes {
  int64_t images, tokens, prefix, width, rank;

  int64_t patches() const { return tokens - prefix; }
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
  Matrix<T> columns;         // out: [H | Z], [B P, 2r]
  Matrix<T> residual;        // out: (F^ - S) Wu^T, [B P, r]; without data: not wanted
  T* norms;                  // out: n, [B P]
  T* plain_norms;            // out: norms of F, [B P]
  T* kd_parts;               // out: sums of (F^ - S)^2, [B T]
  char* refined;             // out: F^, [B, T, D]; null: not wanted
  Dtype refined_dtype;
};

// H, Z, norms and the KD sums of the patches from `first` on; F^ goes to `refined`, or nowhere if
// that has no data.
template <typename T>
void refine(const RefineCall<T>& call, int64_t first, int64_t count, const Matrix<T>& refined);

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

// What the stage `gram` reads and writes, for one image.
template <typename T>
struct GramCall {
  Matrix<const T> rows;     // F^, [P, D]
  const T* norms;           // [P]
  Matrix<const T> target;   // R, [P, D]; or, with `right`, the left factor of F^ F^^T - F F^T
  Matrix<const T> right;    // its right factor, [P, 2r]; without data: R is given
  const T* target_norms;    // [P]
  Matrix<const T> columns;  // C, [P, m]; without data: no gradient is wanted
  Matrix<T> gram_columns;   // out: X C
  Matrix<T> d_target;       // out: the gradient of R, [P, D]; without data: not wanted
  T scale;                  // 4 / (B P^2)
};

// Writes the sum of E^2 of each image, at least one, all of one size.
template <typename T>
void gram(const std::vector<GramCall<T>>& calls, double* squares);

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

// The norms of a matrix's rows.
template <typename T>
void row_norms(const Matrix<const T>& rows, T* norms);

}  // namespace singer::cpu
