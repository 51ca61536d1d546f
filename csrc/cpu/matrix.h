// Matrices, their products, rows of tensors, and parallel loops on the CPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "checks.h"
#include "cpu/simd_kernels.h"

namespace singer::cpu {

template <typename T>
constexpr ScalarType scalar_type() {
  return sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
}

inline int64_t size_of(ScalarType dtype) {
  return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
}

inline int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t round_up(int64_t count, int64_t size) { return ceil_div(count, size) * size; }

// Call `function(begin, end)` on ranges of the indices below count, on all threads; `cost` is about
// the number of operations per index.
template <typename Function>
void parallel_ranges(int64_t count, int64_t cost, const Function& function) {
  constexpr int64_t kMinCost = 32768;  // per thread: less is not worth starting one
  const int64_t grain = std::max<int64_t>(1, kMinCost / std::max<int64_t>(cost, 1));
  torch::stable::parallel_for(0, count, grain, function);
}

// Call `function(i)` for every index below count, likewise.
template <typename Function>
void parallel(int64_t count, int64_t cost, const Function& function) {
  parallel_ranges(count, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

// Tasks, taken in order by whichever thread is free. Results may not depend on the thread.
class TaskQueue {
 public:
  explicit TaskQueue(int64_t count) : count_(count) {}
  TaskQueue(const TaskQueue&) = delete;

  // Set `task` to the next one; return false if none is left.
  bool take(int64_t& task) {
    task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < count_;
  }

 private:
  int64_t count_;
  std::atomic<int64_t> next_{0};
};

// Call `function(queue)` on each thread; `cost` is about the number of operations per task.
template <typename Function>
void parallel_queue(int64_t count, int64_t cost, const Function& function) {
  TaskQueue queue(count);
  parallel_ranges(count, cost, [&](int64_t, int64_t) { function(queue); });
}

// Uninitialised memory, aligned to a cache line.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(count == 0 ? nullptr : allocate(count)) {}

  T* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static T* allocate(int64_t count) {
    constexpr int64_t kMax = std::numeric_limits<int64_t>::max() / sizeof(T);
    if (count < 0 || count > kMax) throw std::bad_alloc();
    return static_cast<T*>(::operator new(count * sizeof(T), kAlignment));
  }
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

// Row stride of a buffer, in elements: a multiple of the panel width, padded off 4 KiB multiples to
// avoid L1 set conflicts.
template <typename T>
int64_t row_stride(int64_t count) {
  constexpr int64_t kPage = 4096;
  const int64_t width = simd_kernels<T>().panel_width, stride = round_up(count, width);
  return stride * sizeof(T) % kPage == 0 ? stride + width : stride;
}

// A view of a matrix [rows, columns]; strides in elements.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride = 1;

  operator Matrix<const T>() const { return {data, rows, columns, row_stride, column_stride}; }
  Matrix row_slice(int64_t first, int64_t count) const {
    return {data + first * row_stride, count, columns, row_stride, column_stride};
  }
  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  T* row(int64_t index) const { return data + index * row_stride; }
};

// A view of a packed right factor.
template <typename T>
struct PackedView {
  const T* data;
  int64_t panel_stride, columns;

  PackedView from_row(int64_t row) const {
    return {data + row * simd_kernels<T>().panel_width, panel_stride, columns};
  }
  PackedView from_panel(int64_t panel) const {
    return {data + panel * panel_stride, panel_stride,
            columns - panel * simd_kernels<T>().panel_width};
  }

  // The first `count` columns, at most a panel, transposed: a left factor [count, depth].
  Matrix<const T> transposed_panel(int64_t count, int64_t depth) const {
    return {data, count, depth, 1, simd_kernels<T>().panel_width};
  }

  // out = factor a b or, with `accumulate`, out += factor a b; b is this matrix.
  void multiply(const Matrix<const T>& a, const Matrix<T>& out, bool accumulate = false,
                T factor = T(1)) const {
    multiply_into_panels(a, out, simd_kernels<T>().panel_width, accumulate, factor);
  }

  // Likewise, into an output in panels.
  void multiply_into_panels(const Matrix<const T>& a, const Matrix<T>& out,
                            int64_t out_panel_stride, bool accumulate = false,
                            T factor = T(1)) const {
    simd_kernels<T>().multiply(a.data, a.row_stride, a.column_stride, a.rows, a.columns, data,
                               panel_stride, columns, accumulate, factor, out.data,
                               out.row_stride, out_panel_stride);
  }
};

// A right factor [rows, columns] of products, packed in panels.
template <typename T>
class PackedMatrix {
 public:
  PackedMatrix(int64_t rows, int64_t columns)
      : rows_(rows),
        columns_(columns),
        panels_(ceil_div(columns, simd_kernels<T>().panel_width)),
        data_(rows * panels_ * simd_kernels<T>().panel_width) {}

  explicit PackedMatrix(const Matrix<const T>& matrix)
      : PackedMatrix(matrix.rows, matrix.columns) {
    const int64_t width = simd_kernels<T>().panel_width;
    parallel(panels_, rows_ * width, [&](int64_t index) {
      const int64_t first = index * width, count = std::min(width, columns_ - first);
      set_columns({matrix.data + first * matrix.column_stride, matrix.rows, count,
                   matrix.row_stride, matrix.column_stride},
                  first);
    });
  }

  bool is_empty() const { return panels_ == 0; }
  PackedView<T> view() const {
    return {data_.data(), rows_ * simd_kernels<T>().panel_width, columns_};
  }

  // Set rows, with all columns, from `first` on.
  void set_rows(const Matrix<const T>& part, int64_t first) const {
    const int64_t width = simd_kernels<T>().panel_width;
    simd_kernels<T>().pack(part.data, part.row_stride, part.column_stride, part.rows, columns_,
                           data_.data() + first * width, rows_ * width);
  }

  // Set columns from `first` on, where a panel begins; the last vector is padded with zeros.
  void set_columns(const Matrix<const T>& part, int64_t first) const {
    simd_kernels<T>().pack(part.data, part.row_stride, part.column_stride, part.rows, part.columns,
                           data_.data() + first * rows_, rows_ * simd_kernels<T>().panel_width);
  }

 private:
  int64_t rows_, columns_, panels_;
  Scratch<T> data_;
};

// A tensor [B, T, D] of any supported dtype and strides, read in the accumulation dtype.
template <typename T>
class TokenRows {
 public:
  // `rounding`: elements are rounded to that dtype, if it is no wider than the tensor's.
  TokenRows(const Tensor& tensor, ScalarType rounding)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        dtype_(tensor.scalar_type()),
        rounding_(rounding),
        image_stride_(tensor.stride(0)),
        token_stride_(tensor.stride(1)),
        stride_(tensor.stride(2)),
        width_(tensor.size(2)),
        read_(simd_kernels<T>().read) {
    is_rounded_ = rounding != dtype_ && size_of(rounding) <= size_of(dtype_);
    if (!is_rounded_) rounding_ = dtype_;
    is_direct_ = dtype_ == scalar_type<T>() && !is_rounded_ && stride_ == 1;
  }

  explicit TokenRows(const Tensor& tensor) : TokenRows(tensor, tensor.scalar_type()) {}

  bool is_rounded() const { return is_rounded_; }

  // Whether rows are used in place, without a buffer.
  bool is_direct() const { return is_direct_; }

  // Return a row, in place or read into `buffer` [D].
  const T* row(int64_t image, int64_t token, T* buffer) const {
    return width_slice(image, token, 0, width_, buffer);
  }

  // Return `count` elements of a row, likewise.
  const T* width_slice(int64_t image, int64_t token, int64_t first, int64_t count,
                       T* buffer) const {
    const char* start = address(image, token) + first * stride_ * size_of(dtype_);
    if (is_direct_) return reinterpret_cast<const T*>(start);
    read_(start, dtype_, stride_, count, rounding_, buffer);
    return buffer;
  }

  // Return `count` rows of an image, in place; the data is null unless is_direct().
  Matrix<const T> rows_in_place(int64_t image, int64_t token, int64_t count) const {
    return {is_direct_ ? reinterpret_cast<const T*>(address(image, token)) : nullptr, count, width_,
            token_stride_};
  }

 private:
  const char* address(int64_t image, int64_t token) const {
    return data_ + (image * image_stride_ + token * token_stride_) * size_of(dtype_);
  }

  const char* data_;
  ScalarType dtype_, rounding_;
  int64_t image_stride_, token_stride_, stride_, width_;
  decltype(SimdKernels<T>::read) read_;
  bool is_rounded_, is_direct_;
};

// Consecutive patches; `first` counts over all images.
struct RowBlock {
  int64_t first, count;
};

// Split the patches of some images into blocks of at most kBlockRows: several whole images, or part
// of one.
inline std::vector<RowBlock> row_blocks(int64_t first_image, int64_t images, int64_t patches) {
  std::vector<RowBlock> blocks;
  const int64_t whole = kBlockRows / patches;
  for (int64_t image = first_image; image < first_image + images;) {
    if (whole > 0) {
      const int64_t count = std::min(whole, first_image + images - image);
      blocks.push_back({image * patches, count * patches});
      image += count;
      continue;
    }
    for (int64_t start = 0; start < patches; start += kBlockRows) {
      blocks.push_back({image * patches + start, std::min(kBlockRows, patches - start)});
    }
    ++image;
  }
  return blocks;
}

// Return the patches of a block as a matrix, in place or read into `buffer` [count, D].
template <typename T>
Matrix<const T> gather(const TokenRows<T>& rows, const RowBlock& block, int64_t patches,
                       int64_t prefix, int64_t width, T* buffer) {
  const int64_t image = block.first / patches;
  if ((block.first + block.count - 1) / patches == image) {
    const auto direct =
        rows.rows_in_place(image, prefix + block.first % patches, block.count);
    if (direct.data != nullptr) return direct;
  }
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t patch = block.first + i;
    T* out = buffer + i * width;
    const T* row = rows.row(patch / patches, prefix + patch % patches, out);
    if (row != out) std::copy(row, row + width, out);
  }
  return {buffer, block.count, width, width};
}

// Return a tensor [rows, columns] in the accumulation dtype, in place or read into `buffer`.
template <typename T>
Matrix<const T> to_matrix(const Tensor& tensor, const Scratch<T>& buffer) {
  const int64_t rows = tensor.size(0), columns = tensor.size(1);
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == scalar_type<T>() && tensor.stride(1) == 1) {
    return {static_cast<const T*>(tensor.const_data_ptr()), rows, columns, tensor.stride(0)};
  }
  for (int64_t i = 0; i < rows; ++i) {
    const char* row = static_cast<const char*>(tensor.const_data_ptr()) +
                      i * tensor.stride(0) * size_of(dtype);
    simd_kernels<T>().read(row, dtype, tensor.stride(1), columns, dtype,
                           buffer.data() + i * columns);
  }
  return {buffer.data(), rows, columns, columns};
}

}  // namespace singer::cpu
