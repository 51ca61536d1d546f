// The loops' one text, included once per vector width by loops.cpp, inside a namespace of its own.
// It calls nothing but what is inlined, so that no code for a wide processor is shared with others.

template <typename T>
struct Body {
  static float bfloat16_to_float(uint16_t bits) {
    return bits_as<float>(static_cast<uint32_t>(bits) << 16);
  }

  static uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = bits_as<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value == value ? rounded : 0x7FC0u);
  }

  // From the bits: not every compiler knows the type.
  static float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7FFFu;
    // 2^-24 of a subnormal is exact; of the others the exponent moves from 15 to 127.
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
    // Adding 1/2 shifts a subnormal's digits to the end of the mantissa, rounded to even.
    const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
    const uint32_t rounded = (magnitude - (112u << 23) + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
    uint32_t half = magnitude < 0x38800000u ? small : rounded;
    half = magnitude >= 0x477FF000u ? 0x7C00u : half;
    half = magnitude > 0x7F800000u ? 0x7E00u : half;
    return static_cast<uint16_t>(half | sign);
  }

  static void read(const void* in, Dtype dtype, int64_t stride, int64_t count, Dtype rounding,
                   T* out) {
    if (dtype == Dtype::kDouble) {
      const double* values = static_cast<const double*>(in);
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(values[i * stride]);
    } else if (dtype == Dtype::kFloat) {
      const float* values = static_cast<const float*>(in);
      if (stride == 1) {
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(values[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<T>(values[i * stride]);
      }
    } else if (dtype == Dtype::kBFloat16) {
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
    if (rounding == Dtype::kBFloat16 && dtype != Dtype::kBFloat16) {
      for (int64_t i = 0; i < count; ++i) {
        out[i] = static_cast<T>(bfloat16_to_float(float_to_bfloat16(static_cast<float>(out[i]))));
      }
    } else if (rounding == Dtype::kHalf && dtype != Dtype::kHalf) {
      for (int64_t i = 0; i < count; ++i) {
        out[i] = static_cast<T>(half_to_float(float_to_half(static_cast<float>(out[i]))));
      }
    }
  }

  static void write(const T* in, Dtype dtype, int64_t count, void* out) {
    if (dtype == Dtype::kDouble) {
      double* values = static_cast<double*>(out);
      for (int64_t i = 0; i < count; ++i) values[i] = static_cast<double>(in[i]);
    } else if (dtype == Dtype::kFloat) {
      float* values = static_cast<float*>(out);
      for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(in[i]);
    } else {
      uint16_t* values = static_cast<uint16_t*>(out);
      if (dtype == Dtype::kBFloat16) {
        for (int64_t i = 0; i < count; ++i) values[i] = float_to_bfloat16(in[i]);
      } else {
        for (int64_t i = 0; i < count; ++i) values[i] = float_to_half(in[i]);
      }
    }
  }

  static RowSums<T> refine(T* delta, const T* plain, const T* student, int64_t count,
                           T* residual) {
    T refined_sum = 0, plain_sum = 0, residual_sum = 0;
    if (residual != nullptr) {
#pragma omp simd reduction(+ : refined_sum, plain_sum, residual_sum)
      for (int64_t i = 0; i < count; ++i) {
        const T refined = delta[i] + plain[i];
        const T difference = refined - student[i];
        delta[i] = refined;
        residual[i] = difference;
        refined_sum += refined * refined;
        plain_sum += plain[i] * plain[i];
        residual_sum += difference * difference;
      }
    } else {
#pragma omp simd reduction(+ : refined_sum, plain_sum, residual_sum)
      for (int64_t i = 0; i < count; ++i) {
        const T refined = delta[i] + plain[i];
        const T difference = refined - student[i];
        delta[i] = refined;
        refined_sum += refined * refined;
        plain_sum += plain[i] * plain[i];
        residual_sum += difference * difference;
      }
    }
    return {refined_sum, plain_sum, residual_sum};
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

  template <bool kHasSlopes, bool kHasTargetSlopes>
  static GramSums<T> gram_of(T* products, const T* others, bool is_identity, T inverse,
                             T target_inverse, const T* inverses, const T* target_inverses,
                             int64_t count, T* slopes, T* target_slopes) {
    T squares = 0, slope = 0, target_slope = 0;
    // The target's product is others, or products - others.
    const T kept = is_identity ? T(1) : T(0), sign = is_identity ? T(-1) : T(1);
#pragma omp simd reduction(+ : squares, slope, target_slope)
    for (int64_t j = 0; j < count; ++j) {
      const T cosine = products[j] * (inverse * inverses[j]);
      const T other = kept * products[j] + sign * others[j];
      const T target_cosine = other * (target_inverse * target_inverses[j]);
      const T difference = cosine - target_cosine;
      products[j] = difference;
      squares += difference * difference;
      const T steep = difference * cosine, target_steep = difference * target_cosine;
      slope += steep;
      target_slope += target_steep;
      if constexpr (kHasSlopes) slopes[j] += steep;
      if constexpr (kHasTargetSlopes) target_slopes[j] += target_steep;
    }
    return {squares, slope, target_slope};
  }

  static GramSums<T> gram(T* products, const T* others, bool is_identity, T inverse,
                          T target_inverse, const T* inverses, const T* target_inverses,
                          int64_t count, T* slopes, T* target_slopes) {
    const auto run =
        slopes == nullptr
            ? (target_slopes == nullptr ? gram_of<false, false> : gram_of<false, true>)
            : (target_slopes == nullptr ? gram_of<true, false> : gram_of<true, true>);
    return run(products, others, is_identity, inverse, target_inverse, inverses, target_inverses,
               count, slopes, target_slopes);
  }

  static void scale(const T* in, T factor, int64_t count, T* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = factor * in[i];
  }

  static void subtract_half(const T* latent, const T* half, int64_t count, T* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = latent[i] - T(0.5) * half[i];
  }

  static void gram_gradient(const T* turned, const T* columns, T inverse, T radial, T scale,
                            int64_t count, T* out) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = singer::gram_gradient(turned[i], columns[i], inverse, radial, scale);
    }
  }

  static void student_gradient(const T* refined, const T* student, T scale, int64_t count,
                               T* out) {
    for (int64_t i = 0; i < count; ++i) {
      out[i] = singer::student_gradient(student[i], refined[i], scale);
    }
  }

  static void backward_rows(const BackwardRows<T>& rows) {
    constexpr int64_t kBlock = Product<T>::kColumns, kLine = 64 / sizeof(T), kAhead = 4;
    for (int64_t i = 0; i < rows.rows; ++i) {
      // Pieces of rows are short: no processor sees by itself which comes next. The first cache may
      // have no place for them, if rows begin in the same set.
      for (int64_t j = 0; i + kAhead < rows.rows && j < rows.columns; j += kLine) {
        if (rows.refined != nullptr) __builtin_prefetch(rows.teacher[i + kAhead] + j, 0, 2);
        if (rows.student != nullptr) __builtin_prefetch(rows.student[i + kAhead] + j, 0, 2);
        if (rows.d_student != nullptr) __builtin_prefetch(rows.d_student[i + kAhead] + j, 1);
      }
      for (int64_t start = 0; start < rows.columns; start += kBlock) {
        const int64_t left = rows.columns - start, count = left < kBlock ? left : kBlock;
        const int64_t place = start / kBlock * rows.block_stride + i * kBlock;
        if (rows.plain != nullptr) copy(rows.operand[i] + start, count, rows.plain + place);
        if (rows.d_refined != nullptr) copy(rows.back[i] + start, count, rows.d_refined + place);
        if (rows.refined == nullptr) continue;
        T* refined = rows.refined + place;
        const T* teacher = rows.teacher[i] + start;
        for (int64_t j = 0; j < count; ++j) refined[j] += teacher[j];
        if (rows.student == nullptr) continue;
        T* pulled = rows.pulled + place;
        student_gradient(refined, rows.student[i] + start, rows.scale, count, pulled);
        if (rows.d_student != nullptr) copy(pulled, count, rows.d_student[i] + start);
      }
    }
  }

  static void copy(const T* in, int64_t count, T* out) {
    constexpr int64_t kBlock = Product<T>::kColumns;
    if (count == kBlock) {
      __builtin_memcpy(out, in, kBlock * sizeof(T));
    } else {
      for (int64_t j = 0; j < count; ++j) out[j] = in[j];
    }
  }

  static void column_gradient(const T* turned, T d_info, const T* column, T coefficient,
                              const T* residual, T kd, const T* back, int64_t count, T* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = coefficient * column[i];
    if (turned != nullptr) {
      for (int64_t i = 0; i < count; ++i) out[i] += d_info * turned[i];
    }
    if (residual != nullptr) {
      for (int64_t i = 0; i < count; ++i) out[i] += kd * residual[i];
    }
    if (back != nullptr) {
      for (int64_t i = 0; i < count; ++i) out[i] += back[i];
    }
  }
};

template <typename T>
const Loops<T>& table() {
  static const Loops<T> result{Product<T>::kColumns,
                               Product<T>::kLanes,
                               Product<T>::pack,
                               Product<T>::multiply,
                               Body<T>::read,
                               Body<T>::write,
                               Body<T>::refine,
                               Body<T>::sum_of_squares,
                               Body<T>::squared_distance,
                               Body<T>::gram,
                               Body<T>::scale,
                               Body<T>::subtract_half,
                               Body<T>::gram_gradient,
                               Body<T>::student_gradient,
                               Body<T>::backward_rows,
                               Body<T>::column_gradient};
  return result;
}
