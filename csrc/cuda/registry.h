// A list of all kernels that can be launched, by name, for introspection.
//
// Each instantiation of `launch<kernel>` adds one static entry when the library is loaded.
#pragma once

#include <string>

namespace singer::cuda {

// A list entry, with static lifetime.
struct Kernel {
  static const Kernel* first;

  const void* function;
  std::string name;  // such as refine_kernel<float>
  const Kernel* next;

  // `text` is the __PRETTY_FUNCTION__ of a function with that kernel as its template argument.
  Kernel(const void* function, const std::string& text) : function(function), next(first) {
    const size_t begin = text.rfind("::") + 2;
    name = text.substr(begin, text.rfind(']') - begin);
    first = this;
  }
  Kernel(const Kernel&) = delete;
};

template <auto kKernel>
const char* text_of() {
  return __PRETTY_FUNCTION__;
}

template <auto kKernel>
struct Registered {
  static const Kernel entry;
};

template <auto kKernel>
const Kernel Registered<kKernel>::entry(reinterpret_cast<const void*>(kKernel), text_of<kKernel>());

}  // namespace singer::cuda
