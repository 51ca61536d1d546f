// Kernels on rows, included by simd_kernels.cpp once per instruction set, in separate namespaces.
// Everything called here is inlined: no compiled function is shared between instruction sets.

template <typename T>
struct RowKernels {
  static float bfloat16_to_float(uint16_t bits) {
    return bits_as<float>(static_cast<uint32_t>(bits) << 16);
  }

  static uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value == value ? rounded : 0x7FC0u);
  }

  // Bitwise: not every compiler has a half type.
  static float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7FFFu;
    // A subnormal times 2^-24 is exact; for others the exponent bias changes from 15 to 127.
    const float small = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    const uint32_t exponent = magnitude >= 0x7C00u ? (magnitude << 13) + (224u << 23)
                                                   : (magnitude << 13) + (112u << 23);
    const uint32_t bits = magnitude < 0x0400u ? bits_as<uint32_t>(small) : exponent;
    return bits_as<float>(bits | sign);
  }

  static uint16_t float_to_half(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    // Adding 1/2 moves a subnormal's bits to the end of the mantissa, rounded to nearest even.
    const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t rounded = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? small : rounded;
    half = magnitude >= 0x477FF000u ? 0x7C00u : half;
    half = magnitude > 0x7F800000u ? 0x7E00u : half;
    return static_cast<uint16_t>(half | sign);
  }

  static void read(const void* in, ScalarType dtype, int64_t stride, int64_t count,
                   ScalarType rounding, T* out) {
    // 1. Convert; contiguous rows apart, so that their loops are vectorised.
    if (dtype == ScalarType::Double) {
      const double* values = static_cast<const double*>(in);
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(values[i * stride]);
    } else if (dtype == ScalarType::Float) {
      const float* values = static_cast<const float*>(in);
      if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(values[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(values[i * stride]);
      }
    } else if (dtype == ScalarType::BFloat16) {
      const uint16_t* values = static_cast<const uint16_t*>(in);
      if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(bfloat16_to_float(values[i]));
      } else {
        for (int64_t i = 0; i < count; ++i) {
          out[i] = static_cast<T>(bfloat16_to_float(values[i * stride]));
        }
      }
    } else {
      const uint16_t* values = static_cast<const uint16_t*>(in);
      for (int64_t i = 0; i < count; ++i) {
        out[i] = static_cast<T>(half_to_float(values[i * stride]));
      }
    }
    // 2. Round.
    if (rounding == ScalarType::BFloat16 && dtype != ScalarType::BFloat16) {
      for (int64_t i = 0; i < count; ++i) {
        out[i] = static_cast<T>(bfloat16_to_float(float_to_bfloat16(static_cast<float>(out[i]))));
      }
    } else if (rounding == ScalarType::Half && dtype != ScalarType::Half) {
      for (int64_t i = 0; i < count; ++i) {
        out[i] = static_cast<T>(half_to_float(float_to_half(static_cast<float>(out[i]))));
      }
    }
  }

  static void write(const T* in, ScalarType dtype, int64_t count, void* out) {
    // 1. Float types of C++: the compiler converts.
    if (dtype == ScalarType::Double) {
      double* values = static_cast<double*>(out);
      for (int64_t i = 0; i < count; ++i) values[i] = static_cast<double>(in[i]);
    } else if (dtype == ScalarType::Float) {
      float* values = static_cast<float*>(out);
      for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(in[i]);
    } else {
      // 2. 16-bit types: round the bits.
      uint16_t* values = static_cast<uint16_t*>(out);
      if (dtype == ScalarType::BFloat16) {
        for (int64_t i = 0; i < count; ++i) values[i] = float_to_bfloat16(in[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) values[i] = float_to_half(in[i]);
      }
    }
  }

  template <bool kHasResidual>
  static RowSums<T> refine_row(T* delta, const T* teacher, const T* student, int64_t count,
                               T* residual) {
    T refined_sum = 0, teacher_sum = 0, kd_sum = 0;
#pragma omp simd reduction(+ : refined_sum, teacher_sum, kd_sum)
    for (int64_t i = 0; i < count; ++i) {
      // 1. F^ and F^ - S.
      const T refined = delta[i] + teacher[i];
      const T kd_difference = refined - student[i];
      delta[i] = refined;
      if constexpr (kHasResidual) residual[i] = kd_difference;
      // 2. The sums of squares: of n, of the norm of F, and of the KD loss.
      refined_sum += refined * refined;
      teacher_sum += teacher[i] * teacher[i];
      kd_sum += kd_difference * kd_difference;
    }
    return {refined_sum, teacher_sum, kd_sum};
  }

  static RowSums<T> refine(T* delta, const T* teacher, const T* student, int64_t count,
                           T* residual) {
    return residual != nullptr ? refine_row<true>(delta, teacher, student, count, residual)
                               : refine_row<false>(delta, teacher, student, count, residual);
  }

  static T sum_of_squares(const T* row, int64_t count) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += row[i] * row[i];
    return sum;
  }

  static T squared_distance(const T* a, const T* b, int64_t count) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
    return sum;
  }

  template <bool kHasDots, bool kHasTargetDots>
  static GramSums<T> gram_row(T* products, const T* target_products, bool is_identity, T inv_norm,
                              T target_inv_norm, const T* inv_norms, const T* target_inv_norms,
                              int64_t count, T* column_dots, T* target_column_dots) {
    T squares = 0, row_dot = 0, target_row_dot = 0;
    // The inner product of the target is own * products + sign * target_products.
    const T own = is_identity ? T(1) : T(0), sign = is_identity ? T(-1) : T(1);
#pragma omp simd reduction(+ : squares, row_dot, target_row_dot)
    for (int64_t j = 0; j < count; ++j) {
      // 1. G and G_R.
      const T gram = products[j] * (inv_norm * inv_norms[j]);
      const T target_product = own * products[j] + sign * target_products[j];
      const T target_gram = target_product * (target_inv_norm * target_inv_norms[j]);
      // 2. E, in place of the product.
      const T difference = gram - target_gram;
      products[j] = difference;
      // 3. The sums of the row: of E^2, E G and E G_R.
      squares += difference * difference;
      const T dot = difference * gram, target_dot = difference * target_gram;
      row_dot += dot;
      target_row_dot += target_dot;
      // 4. By symmetry, the sums of later rows.
      if constexpr (kHasDots) column_dots[j] += dot;
      if constexpr (kHasTargetDots) target_column_dots[j] += target_dot;
    }
    return {squares, row_dot, target_row_dot};
  }

  static GramSums<T> gram_difference(T* products, const T* target_products, bool is_identity,
                                     T inv_norm, T target_inv_norm, const T* inv_norms,
                                     const T* target_inv_norms, int64_t count, T* column_dots,
                                     T* target_column_dots) {
    const auto kernel =
        column_dots == nullptr
            ? (target_column_dots == nullptr ? gram_row<false, false> : gram_row<false, true>)
            : (target_column_dots == nullptr ? gram_row<true, false> : gram_row<true, true>);
    return kernel(products, target_products, is_identity, inv_norm, target_inv_norm, inv_norms,
                  target_inv_norms, count, column_dots, target_column_dots);
  }

  static void scale(const T* in, T factor, int64_t count, T* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = factor * in[i];
  }

  static void subtract_half(const T* z, const T* hm, int64_t count, T* l) {
    for (int64_t i = 0; i < count; ++i) l[i] = z[i] - T(0.5) * hm[i];
  }

  static void gram_gradient(const T* product, const T* factor, T inv_norm, T norm_grad_coef,
                            T scale, int64_t count, T* out) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = singer::gram_gradient(product[i], factor[i], inv_norm, norm_grad_coef, scale);
    }
  }

  static void student_gradient(const T* refined, const T* student, T scale, int64_t count,
                               T* out) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = singer::student_gradient(student[i], refined[i], scale);
    }
  }

  static void backward_tile(const BackwardTile<T>& tile) {
    constexpr int64_t kPanel = Matmul<T>::kPanelWidth, kLine = 64 / sizeof(T), kAhead = 4;
    for (int64_t i = 0; i < tile.rows; ++i) {
      // 1. Prefetch a later row: a slice of a row is too short for the hardware prefetcher. Inputs
      // into L2, as rows that are 4 KiB apart evict each other from L1.
      for (int64_t j = 0; i + kAhead < tile.rows && j < tile.width; j += kLine) {
        if (tile.refined_panels != nullptr) __builtin_prefetch(tile.teacher[i + kAhead] + j, 0, 2);
        if (tile.student != nullptr) __builtin_prefetch(tile.student[i + kAhead] + j, 0, 2);
        if (tile.grad_student != nullptr) __builtin_prefetch(tile.grad_student[i + kAhead] + j, 1);
      }
      for (int64_t start = 0; start < tile.width; start += kPanel) {
        const int64_t left = tile.width - start, count = left < kPanel ? left : kPanel;
        const int64_t offset = start / kPanel * tile.panel_stride + i * kPanel;
        // 2. Pack the rounded F and Y.
        if (tile.operand_panels != nullptr) {
          copy(tile.operand[i] + start, count, tile.operand_panels + offset);
        }
        if (tile.grad_refined_panels != nullptr) {
          copy(tile.grad_refined[i] + start, count, tile.grad_refined_panels + offset);
        }
        // 3. F^ = F + H Wu.
        if (tile.refined_panels == nullptr) continue;
        T* refined = tile.refined_panels + offset;
        const T* teacher = tile.teacher[i] + start;
        for (int64_t j = 0; j < count; ++j) refined[j] += teacher[j];
        // 4. dS = a (S - F^).
        if (tile.student == nullptr) continue;
        T* grad_student = tile.grad_student_panels + offset;
        student_gradient(refined, tile.student[i] + start, tile.scale, count, grad_student);
        if (tile.grad_student != nullptr) copy(grad_student, count, tile.grad_student[i] + start);
      }
    }
  }

  static void copy(const T* in, int64_t count, T* out) {
    constexpr int64_t kPanel = Matmul<T>::kPanelWidth;
    if (count == kPanel) {
      __builtin_memcpy(out, in, kPanel * sizeof(T));
    } else {
      for (int64_t j = 0; j < count; ++j) out[j] = in[j];
    }
  }

  static void backward_row(const T* grad_hz, T grad_info, const T* hz, T coefficient,
                           const T* residual, T alpha, const T* grad_refined_up, int64_t count,
                           T* out) {
    // 1. The outlier loss.
    if (hz != nullptr) {
      for (int64_t i = 0; i < count; ++i) out[i] = coefficient * hz[i];
    } else {
      for (int64_t i = 0; i < count; ++i) out[i] = T(0);
    }
    // 2. The information loss.
    if (grad_hz != nullptr) {
      for (int64_t i = 0; i < count; ++i) out[i] += grad_info * grad_hz[i];
    }
    // 3. The KD loss.
    if (residual != nullptr) {
      for (int64_t i = 0; i < count; ++i) out[i] += alpha * residual[i];
    }
    // 4. The teacher's next block.
    if (grad_refined_up != nullptr) {
      for (int64_t i = 0; i < count; ++i) out[i] += grad_refined_up[i];
    }
  }
};

template <typename T>
const SimdKernels<T>& kernel_table() {
  static const SimdKernels<T> table{Matmul<T>::kPanelWidth,
                                    Matmul<T>::kLanes,
                                    Matmul<T>::pack,
                                    Matmul<T>::multiply,
                                    RowKernels<T>::read,
                                    RowKernels<T>::write,
                                    RowKernels<T>::refine,
                                    RowKernels<T>::sum_of_squares,
                                    RowKernels<T>::squared_distance,
                                    RowKernels<T>::gram_difference,
                                    RowKernels<T>::scale,
                                    RowKernels<T>::subtract_half,
                                    RowKernels<T>::gram_gradient,
                                    RowKernels<T>::student_gradient,
                                    RowKernels<T>::backward_tile,
                                    RowKernels<T>::backward_row};
  return table;
}
