// The inner loops of the CPU kernels, compiled for several vector widths; `loops<T>()` picks the
// widest that this processor has.
#pragma once

#include <cstdint>

#include "math/backward.h"
#include "math/gram.h"

namespace singer::cpu {

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

template <typename T>
struct Loops {
  // Products: a right factor is packed by blocks of `block` columns, then multiplied.
  // See products_body.h.
  int64_t block;
  void (*pack)(const T* in, int64_t row_stride, int64_t column_stride, int64_t rows,
               int64_t columns, int64_t begin, int64_t end, T* out, int64_t block_stride);
  void (*multiply)(const T* a, int64_t row_stride, int64_t depth_stride, int64_t rows,
                   int64_t depth, const T* packed, int64_t block_stride, int64_t columns, bool adds,
                   T factor, T* out, int64_t out_stride);

  // out = in, rounded to `rounding` on the way.
  void (*read)(const void* in, Dtype dtype, int64_t stride, int64_t count, Dtype rounding, T* out);

  void (*write)(const T* in, Dtype dtype, int64_t count, void* out);

  // refined = delta + plain, in place; residual = refined - student, unless it is null.
  RowSums<T> (*refine)(T* delta, const T* plain, const T* student, int64_t count, T* residual);

  T (*sum_of_squares)(const T* row, int64_t count);

  // sum of (a - b)^2
  T (*squared_distance)(const T* a, const T* b, int64_t count);

  // products becomes E = G - G_R. G = products inverse inverse_columns; G_R is made likewise of
  // `others` or, with `is_identity`, of products - others.
  GramSums<T> (*gram)(T* products, const T* others, bool is_identity, T inverse, T target_inverse,
                      const T* inverses, const T* target_inverses, int64_t count);

  // out = factor in
  void (*scale)(const T* in, T factor, int64_t count, T* out);

  // out = latent - half / 2
  void (*subtract_half)(const T* latent, const T* half, int64_t count, T* out);

  // out = X C of one row: see gram_gradient.
  void (*gram_gradient)(const T* turned, const T* columns, T inverse, T radial, T scale,
                        int64_t count, T* out);

  // refined = delta + plain, in place; out = scale (student - refined), where student is not null.
  void (*student_gradient)(T* delta, const T* plain, const T* student, T scale, int64_t count,
                           T* out);

  // out = d_info turned + coefficient column + kd residual + back; a null term is left out.
  void (*column_gradient)(const T* turned, T d_info, const T* column, T coefficient,
                          const T* residual, T kd, const T* back, int64_t count, T* out);
};

template <typename T>
const Loops<T>& loops();

}  // namespace singer::cpu
