// Rows of tensors, matrices and their products on the CPU.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "checks.h"
#include "cpu/loops.h"

namespace singer::cpu {

template <typename T>
constexpr ScalarType scalar_type() {
  return sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
}

inline Dtype dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Dtype::kDouble;
    case ScalarType::Float:
      return Dtype::kFloat;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kHalf;
  }
}

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

// Calls `body(begin, end)` for parts of the indices below count, on all threads; `cost` is about
// how many operations an index takes.
template <typename Body>
void parallel_ranges(int64_t count, int64_t cost, const Body& body) {
  constexpr int64_t kLeastCost = 32768;  // below, a second thread is not worth its start
  const int64_t grain = std::max<int64_t>(1, kLeastCost / std::max<int64_t>(cost, 1));
  torch::stable::parallel_for(0, count, grain, body);
}

// Calls `body(i)` for every index below count, likewise.
template <typename Body>
void parallel(int64_t count, int64_t cost, const Body& body) {
  parallel_ranges(count, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// Memory of a call's own, on a border of cache lines.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(count == 0 ? nullptr
                         : static_cast<T*>(::operator new(count * sizeof(T), kAlignment))) {}

  T* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

// A matrix somewhere in memory: `rows` x `columns`, strides in numbers.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride = 1;

  operator Matrix<const T>() const { return {data, rows, columns, row_stride, column_stride}; }
  Matrix from(int64_t first, int64_t count) const {
    return {data + first * row_stride, count, columns, row_stride, column_stride};
  }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  T* row(int64_t index) const { return data + index * row_stride; }
};

// A right factor of products, packed by blocks of columns.
template <typename T>
class Packed {
 public:
  Packed(int64_t rows, int64_t columns)
      : rows_(rows),
        columns_(columns),
        blocks_((columns + loops<T>().block - 1) / loops<T>().block),
        data_(rows * blocks_ * loops<T>().block) {}

  explicit Packed(const Matrix<const T>& factor) : Packed(factor.rows, factor.columns) {
    parallel(blocks_, rows_ * loops<T>().block,
             [&](int64_t block) { set(factor, 0, block, block + 1); });
  }

  int64_t blocks() const { return blocks_; }

  // Sets the rows from `first` on.
  void set(const Matrix<const T>& part, int64_t first, int64_t begin, int64_t end) const {
    loops<T>().pack(part.data, part.row_stride, part.column_stride, part.rows, columns_, begin, end,
                    data_.data() + first * loops<T>().block, rows_ * loops<T>().block);
  }
  void set(const Matrix<const T>& part, int64_t first) const { set(part, first, 0, blocks_); }

  // out = factor a b or, with `adds`, out += it; b is this, from the row `first` on.
  void multiply(const Matrix<const T>& a, const Matrix<T>& out, bool adds = false,
                T factor = T(1), int64_t first = 0) const {
    loops<T>().multiply(a.data, a.row_stride, a.column_stride, a.rows, a.columns,
                        data_.data() + first * loops<T>().block,
                        rows_ * loops<T>().block, columns_, adds, factor, out.data, out.row_stride);
  }

 private:
  int64_t rows_, columns_, blocks_;
  Scratch<T> data_;
};

// The rows of a tensor [B, T, D] of any dtype and strides, read in the accumulation dtype.
template <typename T>
class TokenRows {
 public:
  TokenRows(const Tensor& tensor, Dtype rounding)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        dtype_(dtype_of(tensor.scalar_type())),
        rounding_(rounding),
        image_stride_(tensor.stride(0)),
        token_stride_(tensor.stride(1)),
        stride_(tensor.stride(2)),
        width_(tensor.size(2)),
        read_(loops<T>().read) {
    is_rounded_ = rounding != dtype_ && size_of(rounding) <= size_of(dtype_);
    if (!is_rounded_) rounding_ = dtype_;
    is_direct_ = dtype_ == dtype_of(scalar_type<T>()) && !is_rounded_ && stride_ == 1;
  }

  explicit TokenRows(const Tensor& tensor) : TokenRows(tensor, dtype_of(tensor.scalar_type())) {}

  // Whether rows lose digits when they are read.
  bool is_rounded() const { return is_rounded_; }

  // Whether a row needs no buffer.
  bool is_direct() const { return is_direct_; }

  // A row where it lies, or read into `buffer`, which holds D numbers.
  const T* row(int64_t image, int64_t token, T* buffer) const {
    const char* start = address(image, token);
    if (is_direct_) return reinterpret_cast<const T*>(start);
    read_(start, dtype_, stride_, width_, rounding_, buffer);
    return buffer;
  }

  // `count` rows of one image as a matrix, if they need no copy; else one without data.
  Matrix<const T> in_place(int64_t image, int64_t token, int64_t count) const {
    return {is_direct_ ? reinterpret_cast<const T*>(address(image, token)) : nullptr, count, width_,
            token_stride_};
  }

 private:
  const char* address(int64_t image, int64_t token) const {
    return data_ + (image * image_stride_ + token * token_stride_) * size_of(dtype_);
  }

  const char* data_;
  Dtype dtype_, rounding_;
  int64_t image_stride_, token_stride_, stride_, width_;
  decltype(Loops<T>::read) read_;
  bool is_rounded_, is_direct_;
};

// Where a run of patches lies; patches are counted over all images.
struct Run {
  int64_t first, count;
};

// The runs of so many patches, or fewer, from `first` on. The border of an image of that size or
// larger ends a run, so that its rows can be used where they lie.
inline std::vector<Run> runs_of(int64_t first, int64_t count, int64_t patches, int64_t most) {
  std::vector<Run> runs;
  for (const int64_t end = first + count; first < end;) {
    int64_t length = std::min(most, end - first);
    if (patches >= most) {
      const int64_t rest = patches - first % patches, parts = (rest + most - 1) / most;
      length = std::min((rest + parts - 1) / parts, end - first);
    }
    runs.push_back({first, length});
    first += length;
  }
  return runs;
}

// The patches of a run as a matrix: in place, or read into `buffer`.
template <typename T>
Matrix<const T> gather(const TokenRows<T>& rows, const Run& run, int64_t patches, int64_t prefix,
                       int64_t width, T* buffer) {
  const int64_t image = run.first / patches;
  if ((run.first + run.count - 1) / patches == image) {
    const auto direct = rows.in_place(image, prefix + run.first % patches, run.count);
    if (direct.data != nullptr) return direct;
  }
  for (int64_t i = 0; i < run.count; ++i) {
    const int64_t patch = run.first + i;
    T* out = buffer + i * width;
    const T* row = rows.row(patch / patches, prefix + patch % patches, out);
    if (row != out) std::copy(row, row + width, out);
  }
  return {buffer, run.count, width, width};
}

// A small matrix in the accumulation dtype, contiguous in `buffer`.
template <typename T>
Matrix<const T> dense(const Tensor& tensor, const Scratch<T>& buffer) {
  const int64_t rows = tensor.size(0), columns = tensor.size(1);
  for (int64_t i = 0; i < rows; ++i) {
    const Dtype dtype = dtype_of(tensor.scalar_type());
    const char* row = static_cast<const char*>(tensor.const_data_ptr()) +
                      i * tensor.stride(0) * size_of(dtype);
    loops<T>().read(row, dtype, tensor.stride(1), columns, dtype, buffer.data() + i * columns);
  }
  return {buffer.data(), rows, columns, columns};
}

}  // namespace singer::cpu
