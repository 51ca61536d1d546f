// Rows of tensors, matrices and their products on the CPU.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
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

// How many parts of a size cover so many, and what they cover.
inline int64_t parts_of(int64_t count, int64_t size) { return (count + size - 1) / size; }
inline int64_t round_up(int64_t count, int64_t size) { return parts_of(count, size) * size; }

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

// Tasks that threads take as they become free, in order. Results may not depend on who takes what.
class Queue {
 public:
  explicit Queue(int64_t count) : count_(count) {}
  Queue(const Queue&) = delete;

  // The next task, if one is left.
  bool take(int64_t& task) {
    task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < count_;
  }

 private:
  int64_t count_;
  std::atomic<int64_t> next_{0};
};

// Calls `body(queue)` on as many threads as are worth it.
template <typename Body>
void parallel_queue(int64_t count, int64_t cost, const Body& body) {
  Queue queue(count);
  parallel_ranges(count, cost, [&](int64_t, int64_t) { body(queue); });
}

// Memory of a call's own, on a border of cache lines.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(count == 0 ? nullptr : allocate(count)) {}

  T* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  static T* allocate(int64_t count) {
    constexpr int64_t kMost = std::numeric_limits<int64_t>::max() / sizeof(T);
    if (count < 0 || count > kMost) throw std::bad_alloc();
    return static_cast<T*>(::operator new(count * sizeof(T), kAlignment));
  }
  struct Free {
    void operator()(T* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<T, Free> data_;
};

// The distance of rows of so many numbers in memory of ours: whole blocks of columns, and never so
// that all rows begin in one set of a first cache.
template <typename T>
int64_t row_stride(int64_t count) {
  constexpr int64_t kPage = 4096;
  const int64_t stride = round_up(count, loops<T>().block);
  return stride * sizeof(T) % kPage == 0 ? stride + loops<T>().block : stride;
}

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

// A right factor of products as Packed holds it, from some row and block on.
template <typename T>
struct Factor {
  const T* data;
  int64_t block_stride, columns;

  Factor from_row(int64_t row) const {
    return {data + row * loops<T>().block, block_stride, columns};
  }
  Factor from_block(int64_t block) const {
    return {data + block * block_stride, block_stride, columns - block * loops<T>().block};
  }

  // Some columns, at most a block and of the first one, as rows of a left factor.
  Matrix<const T> turned(int64_t count, int64_t depth) const {
    return {data, count, depth, 1, loops<T>().block};
  }

  // out = factor a b or, with `adds`, out += it.
  void multiply(const Matrix<const T>& a, const Matrix<T>& out, bool adds = false,
                T factor = T(1)) const {
    multiply_blocks(a, out, loops<T>().block, adds, factor);
  }

  // Likewise, where out's blocks of columns lie apart, as those of a right factor.
  void multiply_blocks(const Matrix<const T>& a, const Matrix<T>& out, int64_t out_block_stride,
                       bool adds = false, T factor = T(1)) const {
    loops<T>().multiply(a.data, a.row_stride, a.column_stride, a.rows, a.columns, data,
                        block_stride, columns, adds, factor, out.data, out.row_stride,
                        out_block_stride);
  }
};

// A right factor of products, packed by blocks of columns.
template <typename T>
class Packed {
 public:
  Packed(int64_t rows, int64_t columns)
      : rows_(rows),
        columns_(columns),
        blocks_(parts_of(columns, loops<T>().block)),
        data_(rows * blocks_ * loops<T>().block) {}

  explicit Packed(const Matrix<const T>& factor) : Packed(factor.rows, factor.columns) {
    const int64_t block = loops<T>().block;
    parallel(blocks_, rows_ * block, [&](int64_t index) {
      const int64_t first = index * block, count = std::min(block, columns_ - first);
      set_columns({factor.data + first * factor.column_stride, factor.rows, count,
                   factor.row_stride, factor.column_stride},
                  first);
    });
  }

  int64_t blocks() const { return blocks_; }
  Factor<T> factor() const { return {data_.data(), rows_ * loops<T>().block, columns_}; }

  void multiply(const Matrix<const T>& a, const Matrix<T>& out) const { factor().multiply(a, out); }

  // Sets the rows from `first` on, of all columns.
  void set_rows(const Matrix<const T>& part, int64_t first) const {
    const int64_t block = loops<T>().block;
    loops<T>().pack(part.data, part.row_stride, part.column_stride, part.rows, columns_,
                    data_.data() + first * block, rows_ * block);
  }

  // Sets the columns from `first` on, which begins a block; beyond them their last vector is 0.
  void set_columns(const Matrix<const T>& part, int64_t first) const {
    loops<T>().pack(part.data, part.row_stride, part.column_stride, part.rows, part.columns,
                    data_.data() + first * rows_, rows_ * loops<T>().block);
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
    return columns(image, token, 0, width_, buffer);
  }

  // Some columns of a row, likewise.
  const T* columns(int64_t image, int64_t token, int64_t first, int64_t count, T* buffer) const {
    const char* start = address(image, token) + first * stride_ * size_of(dtype_);
    if (is_direct_) return reinterpret_cast<const T*>(start);
    read_(start, dtype_, stride_, count, rounding_, buffer);
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

// Runs of at most kRunRows patches: whole images, or parts of one that begin at its multiples of
// kRunRows.
inline std::vector<Run> runs_of(int64_t first_image, int64_t images, int64_t patches) {
  std::vector<Run> runs;
  const int64_t whole = kRunRows / patches;
  for (int64_t image = first_image; image < first_image + images;) {
    if (whole > 0) {
      const int64_t count = std::min(whole, first_image + images - image);
      runs.push_back({image * patches, count * patches});
      image += count;
      continue;
    }
    for (int64_t start = 0; start < patches; start += kRunRows) {
      runs.push_back({image * patches + start, std::min(kRunRows, patches - start)});
    }
    ++image;
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

// A small matrix in the accumulation dtype: where it lies, or contiguous in `buffer`.
template <typename T>
Matrix<const T> dense(const Tensor& tensor, const Scratch<T>& buffer) {
  const int64_t rows = tensor.size(0), columns = tensor.size(1);
  if (tensor.scalar_type() == scalar_type<T>() && tensor.stride(1) == 1) {
    return {static_cast<const T*>(tensor.const_data_ptr()), rows, columns, tensor.stride(0)};
  }
  for (int64_t i = 0; i < rows; ++i) {
    const Dtype dtype = dtype_of(tensor.scalar_type());
    const char* row = static_cast<const char*>(tensor.const_data_ptr()) +
                      i * tensor.stride(0) * size_of(dtype);
    loops<T>().read(row, dtype, tensor.stride(1), columns, dtype, buffer.data() + i * columns);
  }
  return {buffer.data(), rows, columns, columns};
}

}  // namespace singer::cpu
