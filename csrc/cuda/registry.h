// Every kernel that can be launched, by name: for introspection.
//
// `launch` takes a kernel as its template argument alone, and so has an entry made of it when the
// library is loaded: one, however often it is launched.
#pragma once

#include <string>

namespace singer::cuda {

// An entry of the list; it lives as long as the library.
struct Kernel {
  static const Kernel* first;

  const void* function;
  std::string name;  // such as refine_kernel<float>
  const Kernel* next;

  // `text` is what the compiler calls a function with that kernel as its template argument.
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
