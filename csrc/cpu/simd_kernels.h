// The innermost kernels (matrix products and operations on rows), compiled for several instruction
// sets; `simd_kernels<T>()` returns those of the widest one that this processor has.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

#include "math/backward.h"
#include "math/gram.h"

namespace singer::cpu {

using torch::headeronly::ScalarType;

// Largest block of patches that a thread takes through a stage, so that it stays in the cache. A
// multiple of every panel width.
constexpr int64_t kBlockRows = 32;

template <typename T>
struct RowSums {
  T refined;  // sum of F^ squared
  T teacher;  // sum of F squared
  T kd;       // sum of (F^ - S) squared
};

template <typename T>
struct GramSums {
  T squares;         // sum of E^2
  T row_dot;         // sum of E G
  T target_row_dot;  // sum of E G_R
};

// A slice of the width D of some patches. Panels are those of packed right factors, `panel_stride`
// apart. A null output is skipped, with every input that only it needs.
template <typename T>
struct BackwardTile {
  int64_t rows, width, panel_stride;
  T scale;                       // a
  const T* const* teacher;       // F, the start of each row
  const T* const* operand;       // F rounded to the dtype of the products
  const T* const* student;       // S
  const T* const* grad_refined;  // Y
  T* refined_panels;             // in: H Wu; out: F^
  T* operand_panels;             // out: F rounded to the dtype of the products
  T* grad_student_panels;        // out: dS = a (S - F^)
  T* grad_refined_panels;        // out: Y
  T* const* grad_student;        // out: dS, the start of each row
};

template <typename T>
struct SimdKernels {
  // Matrix products, see simd_matmul.h. Right factors are packed in panels, `panel_width` columns
  // each: two vectors of `lanes` elements.
  int64_t panel_width, lanes;
  void (*pack)(const T* in, int64_t row_stride, int64_t column_stride, int64_t rows,
               int64_t columns, T* out, int64_t panel_stride);
  void (*multiply)(const T* a, int64_t row_stride, int64_t depth_stride, int64_t rows,
                   int64_t depth, const T* packed, int64_t panel_stride, int64_t columns,
                   bool accumulate, T factor, T* out, int64_t out_stride,
                   int64_t out_panel_stride);

  // out = in, rounded to `rounding` first.
  void (*read)(const void* in, ScalarType dtype, int64_t stride, int64_t count,
               ScalarType rounding, T* out);

  // out = in, rounded to `dtype`.
  void (*write)(const T* in, ScalarType dtype, int64_t count, void* out);

  // F^ = F + delta, in place of delta; residual = F^ - S, unless null.
  RowSums<T> (*refine)(T* delta, const T* teacher, const T* student, int64_t count, T* residual);

  T (*sum_of_squares)(const T* row, int64_t count);

  // sum of (a - b)^2
  T (*squared_distance)(const T* a, const T* b, int64_t count);

  // E = G - G_R of one row, in place of products. G = products inv_norm inv_norms; likewise G_R, of
  // target_products or, with `is_identity`, products - target_products. Adds E G and E G_R of each
  // column to column_dots and target_column_dots, unless null.
  GramSums<T> (*gram_difference)(T* products, const T* target_products, bool is_identity,
                                 T inv_norm, T target_inv_norm, const T* inv_norms,
                                 const T* target_inv_norms, int64_t count, T* column_dots,
                                 T* target_column_dots);

  // out = factor in
  void (*scale)(const T* in, T factor, int64_t count, T* out);

  // l = z - hm / 2
  void (*subtract_half)(const T* z, const T* hm, int64_t count, T* l);

  // out = X C of one row: see singer::gram_gradient.
  void (*gram_gradient)(const T* product, const T* factor, T inv_norm, T norm_grad_coef, T scale,
                        int64_t count, T* out);

  // out = scale (student - refined)
  void (*student_gradient)(const T* refined, const T* student, T scale, int64_t count, T* out);

  // Completes F^ and computes dS of a tile: see BackwardTile.
  void (*backward_tile)(const BackwardTile<T>& tile);

  // One row of V or dH: out = grad_info grad_hz + coefficient hz + alpha residual +
  // grad_refined_up; null terms are left out.
  void (*backward_row)(const T* grad_hz, T grad_info, const T* hz, T coefficient,
                       const T* residual, T alpha, const T* grad_refined_up, int64_t count,
                       T* out);
};

template <typename T>
const SimdKernels<T>& simd_kernels();

}  // namespace singer::cpu
