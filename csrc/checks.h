// Tensor helpers and argument checks of the operators; every error names the argument.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name until torch 2.11
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace singer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename Shape>
std::string shape_text(const Shape& shape) {
  std::ostringstream text;
  text << "(";
  for (size_t i = 0; i < shape.size(); ++i) text << (i == 0 ? "" : ", ") << shape[i];
  text << ")";
  return text.str();
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline bool is_supported(ScalarType dtype) {
  return dtype == ScalarType::Double || dtype == ScalarType::Float ||
         dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

// From torch's dtype code: scalar_type() raises for dtypes that ScalarType lacks.
inline bool has_supported_dtype(const Tensor& tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype == aoti_torch_dtype_float64() || dtype == aoti_torch_dtype_float32() ||
         dtype == aoti_torch_dtype_bfloat16() || dtype == aoti_torch_dtype_float16();
}

// torch accepts None for an argument of type Tensor.
inline void check_defined(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.defined(), name, ": got None, expected a tensor");
}

// Dense floating tensor whose pointer is aligned to its element size.
inline void check_floating(const char* name, const Tensor& tensor) {
  check_defined(name, tensor);
  int32_t layout = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  STD_TORCH_CHECK(layout == aoti_torch_layout_strided(), name, ": expected a dense tensor");
  STD_TORCH_CHECK(has_supported_dtype(tensor), name,
                  ": expected float64, float32, bfloat16 or float16");
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  STD_TORCH_CHECK(address % tensor.element_size() == 0, name, ": got the address ", address,
                  ", expected a multiple of ", tensor.element_size());
}

// Likewise, with that many dimensions, on the device of `like`.
inline void check_tensor(const char* name, const Tensor& tensor, int64_t dims, const Tensor& like) {
  check_floating(name, tensor);
  STD_TORCH_CHECK(tensor.dim() == dims, name, ": got ", tensor.dim(), " dimensions, expected ",
                  dims);
  STD_TORCH_CHECK(tensor.is_cpu() == like.is_cpu() && tensor.is_cuda() == like.is_cuda() &&
                      tensor.get_device_index() == like.get_device_index(),
                  name, ": expected the device of the teacher or tokens");
}

inline void check_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
                        const Tensor& like) {
  check_tensor(name, tensor, static_cast<int64_t>(shape.size()), like);
  const auto got = shape_of(tensor);
  STD_TORCH_CHECK(got == shape, name, ": got shape ", shape_text(got), ", expected ",
                  shape_text(shape));
}

// Contiguous tensor of that shape and, if given, the accumulation dtype `acc`; or none.
inline void check_dense(const char* name, const std::optional<Tensor>& tensor,
                        const std::vector<int64_t>& shape, const Tensor& like,
                        std::optional<ScalarType> acc = std::nullopt) {
  if (!tensor.has_value()) return;
  check_shape(name, *tensor, shape, like);
  STD_TORCH_CHECK(tensor->is_contiguous(), name, ": expected a contiguous tensor");
  STD_TORCH_CHECK(!acc.has_value() || tensor->scalar_type() == *acc, name,
                  ": expected the accumulation dtype");
}

inline void check_acc(const char* name, ScalarType acc) {
  STD_TORCH_CHECK(acc == ScalarType::Float || acc == ScalarType::Double, name,
                  ": expected float32 or float64");
}

// Return the tensor's dtype, which must be an accumulation dtype.
inline ScalarType acc_of(const char* name, const Tensor& tensor) {
  check_floating(name, tensor);
  check_acc(name, tensor.scalar_type());
  return tensor.scalar_type();
}

inline void check_product(const char* name, ScalarType product) {
  STD_TORCH_CHECK(is_supported(product), name,
                  ": expected float64, float32, bfloat16 or float16");
}

// [B, T, D], not empty, with at least one patch.
inline void check_tokens(const char* name, const Tensor& tokens, int64_t prefix) {
  check_tensor(name, tokens, 3, tokens);
  STD_TORCH_CHECK(tokens.numel() > 0, name, ": got the empty shape ",
                  shape_text(shape_of(tokens)));
  STD_TORCH_CHECK(prefix >= 0 && prefix < tokens.size(1), "num_prefix_tokens: got ", prefix,
                  ", expected 0 to ", tokens.size(1) - 1);
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape,
                         ScalarType dtype) {
  const std::vector<int64_t> sizes(shape);
  return torch::stable::new_empty(like, {sizes.data(), sizes.size()}, dtype);
}

template <typename T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace singer
