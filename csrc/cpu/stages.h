// The stages on the CPU, one source each.
#pragma once

#include "cpu/rows.h"

namespace singer::cpu {

// Rows that are worked on at once: with their products they stay in a core's cache.
constexpr int64_t kChunkRows = 256;

struct Sizes {
  int64_t images, tokens, prefix, width, rank;

  int64_t patches() const { return tokens - prefix; }
};

// What the stage `refine` reads and writes.
template <typename T>
struct RefineCall {
  Sizes sizes;
  TokenRows<T> student;        // S
  TokenRows<T> teacher;        // F
  TokenRows<T> operand;        // F as the products take it
  Matrix<const T> down, up;    // Wd, [D, r]; Wu, [r, D]
  Matrix<T> columns;           // out: [H | Z], [B P, 2r]
  Matrix<T> residual;          // out: (F^ - S) Wu^T, [B P, r]; without data: not wanted
  T* norms;                    // out: n, [B P]
  T* plain_norms;              // out: norms of F, [B P]
  T* kd_parts;                 // out: sums of (F^ - S)^2, [B T]
  char* refined;               // out: F^, [B, T, D]; null: not wanted
  Dtype refined_dtype;
};

// Buffers of one chunk.
template <typename T>
struct RefineScratch {
  RefineScratch(const Tensor& like, const RefineCall<T>& call);

  Scratch<T> plain, exact, student, residual;
};

// H, Z, norms and the KD sums of a run of patches; `refined` receives their F^.
template <typename T>
void refine(const RefineCall<T>& call, const Chunk& chunk, const RefineScratch<T>& scratch,
            const Matrix<T>& refined);

// The KD sums of the prefix tokens, where F^ = F.
template <typename T>
void refine_prefix(const RefineCall<T>& call, const Tensor& like);

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
  Matrix<const T> rows;         // F^, [P, D]
  const T* norms;               // [P]
  Matrix<const T> target;       // R, [P, D]; or, with `right`, the left factor of F^ F^^T - F F^T
  const T* target_norms;        // [P]
  Matrix<const T> right;        // its right factor, [P, 2r]; without data: R is given
  Matrix<const T> columns;      // C, [P, m]; without data: no gradient is wanted
  Matrix<T> gram_columns;       // out: X C
  Matrix<T> d_target;           // out: the gradient of R, [P, D]; without data: not wanted
  T scale;                      // 4 / (B P^2)
};

template <typename T>
struct GramScratch {
  GramScratch(const Tensor& like, int64_t patches, int64_t columns, int64_t target_columns);

  int64_t panel;  // rows at once
  Scratch<T> products, others, vectors, row_sums;
  Scratch<T> scaled, turned, scaled_target, turned_target, part;
};

// Returns the sum of E^2.
template <typename T>
double gram(const GramCall<T>& call, const GramScratch<T>& scratch);

// What the stage `backward` reads and writes; a null pointer is a term that is not there.
template <typename T>
struct BackwardCall {
  Sizes sizes;
  std::optional<TokenRows<T>> student;    // S
  TokenRows<T> teacher;                   // F
  TokenRows<T> operand;                   // F as the products take it
  Matrix<const T> up;                     // Wu, [r, D]
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
void backward(const BackwardCall<T>& call, const Tensor& like);

// norms of rows
template <typename T>
void row_norms(const Matrix<const T>& rows, T* norms);

}  // namespace singer::cpu
