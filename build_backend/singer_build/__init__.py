"""Build the C++ and CUDA extension of singer_kernels."""
