// The inner loops of the CPU kernels, compiled for several vector widths; `loops<T>()` picks the
// widest that this processor has.
#pragma once

#include <cstdint>

#include "math/backward.h"
#include "math/gram.h"

namespace singer::cpu {

// Rows that a thread works on at once, so that they stay in its cache: a multiple of the columns of
// every block of a right factor.
constexpr int64_t kRunRows = 32;

// The dtypes that rows are read from and written to.
enum class Dtype { kHalf, kFloat, kDouble, kBFloat16 };

template <typename T>
struct RowSums {
  T refined;   // sum of F^ squared
  T plain;     // sum of F squared
  T residual;  // sum of (F^ - S) squared
};

template <typename T>
struct GramSums {
  T squares;       // sum of E^2
  T slope;         // sum of E G
  T target_slope;  // sum of E G_R
};

// Some columns of some rows of F^, S and what else the sums over patches take, as right factors:
// blocks of columns, `block_stride` apart, row by row. Of what is null nothing is read or written,
// nor of what it alone is made of.
template <typename T>
struct BackwardRows {
  int64_t rows, columns, block_stride;
  T scale;
  const T* const* teacher;  // F, where each row begins
  const T* const* operand;  // F as the products take it
  const T* const* student;  // S
  const T* const* back;     // Y
  T* refined;               // in: H Wu; out: F^; null: neither is needed
  T* plain;                 // out: F as the products take it
  T* pulled;                // out: dS = scale (S - F^)
  T* d_refined;             // out: Y
  T* const* d_student;      // out: dS, where each row begins
};

template <typename T>
struct Loops {
  // Products: a right factor is packed by blocks of `block` columns, two vectors of `lanes` numbers,
  // then multiplied. See products_body.h.
  int64_t block, lanes;
  void (*pack)(const T* in, int64_t row_stride, int64_t column_stride, int64_t rows,
               int64_t columns, T* out, int64_t block_stride);
  void (*multiply)(const T* a, int64_t row_stride, int64_t depth_stride, int64_t rows,
                   int64_t depth, const T* packed, int64_t block_stride, int64_t columns, bool adds,
                   T factor, T* out, int64_t out_stride, int64_t out_block_stride);

  // out = in, rounded to `rounding` on the way.
  void (*read)(const void* in, Dtype dtype, int64_t stride, int64_t count, Dtype rounding, T* out);

  void (*write)(const T* in, Dtype dtype, int64_t count, void* out);

  // refined = delta + plain, in place; residual = refined - student, unless it is null.
  RowSums<T> (*refine)(T* delta, const T* plain, const T* student, int64_t count, T* residual);

  T (*sum_of_squares)(const T* row, int64_t count);

  // sum of (a - b)^2
  T (*squared_distance)(const T* a, const T* b, int64_t count);

  // products becomes E = G - G_R. G = products inverse inverse_columns; G_R is made likewise of
  // `others` or, with `is_identity`, of products - others. To `slopes` and `target_slopes`, unless
  // they are null, each column's E G and E G_R are added.
  GramSums<T> (*gram)(T* products, const T* others, bool is_identity, T inverse, T target_inverse,
                      const T* inverses, const T* target_inverses, int64_t count, T* slopes,
                      T* target_slopes);

  // out = factor in
  void (*scale)(const T* in, T factor, int64_t count, T* out);

  // out = latent - half / 2
  void (*subtract_half)(const T* latent, const T* half, int64_t count, T* out);

  // out = X C of one row: see gram_gradient.
  void (*gram_gradient)(const T* turned, const T* columns, T inverse, T radial, T scale,
                        int64_t count, T* out);

  // out = scale (student - refined)
  void (*student_gradient)(const T* refined, const T* student, T scale, int64_t count, T* out);

  // See BackwardRows.
  void (*backward_rows)(const BackwardRows<T>& rows);

  // out = d_info turned + coefficient column + kd residual + back; a null term is left out.
  void (*column_gradient)(const T* turned, T d_info, const T* column, T coefficient,
                          const T* residual, T kd, const T* back, int64_t count, T* out);
};

template <typename T>
const Loops<T>& loops();

}  // namespace singer::cpu
