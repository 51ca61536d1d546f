// Rows of tensors, matrices and their products on the CPU.
#pragma once

#include <algorithm>
#include <array>
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

// Calls `body(i)` for every i below count, on all threads; `cost` in numbers touched per i.
template <typename Body>
void parallel(int64_t count, int64_t cost, const Body& body) {
  constexpr int64_t kLeastCost = 16384;
  const int64_t grain = std::max<int64_t>(1, kLeastCost / std::max<int64_t>(cost, 1));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// Memory of a call's own.
template <typename T>
class Scratch {
 public:
  Scratch(const Tensor& like, int64_t count)
      : tensor_(new_tensor(like, {std::max<int64_t>(count, 0)}, scalar_type<T>())),
        data_(static_cast<T*>(tensor_.mutable_data_ptr())) {}

  T* data() const { return data_; }

 private:
  Tensor tensor_;
  T* data_;
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

template <typename T>
Tensor view(const Matrix<T>& matrix) {
  const std::array<int64_t, 2> sizes{matrix.rows, matrix.columns};
  const std::array<int64_t, 2> strides{matrix.row_stride, matrix.column_stride};
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(
      const_cast<void*>(static_cast<const void*>(matrix.data)), 2, sizes.data(), strides.data(), 0,
      sizeof(T) == sizeof(double) ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// out = a b, by torch's library.
template <typename A, typename B, typename T>
void multiply(const Matrix<A>& a, const Matrix<B>& b, const Matrix<T>& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(view(a)),
                                    torch::stable::detail::from(view(b)),
                                    torch::stable::detail::from(view(out))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // it is ours to free
}

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
    is_rounded_ = size_of(rounding) < size_of(dtype_);
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
    const bool is_matrix = is_direct_ && token_stride_ >= width_;
    return {is_matrix ? reinterpret_cast<const T*>(address(image, token)) : nullptr, count, width_,
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

// A run of patches that is worked on at once: whole images, or rows of one image.
struct Chunk {
  int64_t first, count;  // patches, counted over all images

  int64_t image(int64_t patches) const { return first / patches; }
  bool is_in_one_image(int64_t patches) const {
    return first / patches == (first + count - 1) / patches;
  }
};

// The chunks of all patches: of several small images, or of equal parts of a large one.
inline std::vector<Chunk> chunks_of(int64_t images, int64_t patches, int64_t most) {
  std::vector<Chunk> chunks;
  if (patches >= most) {
    const int64_t parts = (patches + most - 1) / most, step = (patches + parts - 1) / parts;
    for (int64_t image = 0; image < images; ++image) {
      for (int64_t start = 0; start < patches; start += step) {
        chunks.push_back({image * patches + start, std::min(step, patches - start)});
      }
    }
    return chunks;
  }
  const int64_t together = most / patches;
  for (int64_t image = 0; image < images; image += together) {
    chunks.push_back({image * patches, std::min(together, images - image) * patches});
  }
  return chunks;
}

// The patches of a chunk as a matrix: in place, or gathered into `buffer`.
template <typename T>
Matrix<const T> gather(const TokenRows<T>& rows, const Chunk& chunk, int64_t patches,
                       int64_t prefix, int64_t width, T* buffer) {
  if (chunk.is_in_one_image(patches)) {
    const auto direct =
        rows.in_place(chunk.image(patches), prefix + chunk.first % patches, chunk.count);
    if (direct.data != nullptr) return direct;
  }
  parallel(chunk.count, width, [&](int64_t i) {
    const int64_t patch = chunk.first + i;
    T* out = buffer + i * width;
    const T* row = rows.row(patch / patches, prefix + patch % patches, out);
    if (row != out) std::copy(row, row + width, out);
  });
  return {buffer, chunk.count, width, width};
}

// A small matrix, contiguous, in the accumulation dtype.
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
