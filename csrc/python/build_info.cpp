// The module _build: how the library _ops was built. The build passes all values as macros.

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict report() {
  py::dict entries;
#if defined(__clang__) || !defined(__GNUC__)
  entries["compiler"] = __VERSION__;
#else
  entries["compiler"] = "GCC " __VERSION__;
#endif
  entries["standard"] = SINGER_STANDARD;
  entries["flags"] = SINGER_FLAGS;
#ifdef SINGER_CUDA_VERSION
  entries["cuda"] = SINGER_CUDA_VERSION;
  entries["cuda_architectures"] = SINGER_CUDA_ARCHITECTURES;
#else
  entries["cuda"] = py::none();
  entries["cuda_architectures"] = py::none();
#endif
  entries["torch"] = SINGER_TORCH_VERSION;
  entries["target_abi"] = SINGER_TARGET_ABI;
  entries["hash"] = SINGER_BUILD_HASH;
  return entries;
}

}  // namespace

PYBIND11_MODULE(_build, module) {
  module.doc() = "How the library _ops was built.";
  module.def("report", &report, "Return the settings of the build, by name.");
}
