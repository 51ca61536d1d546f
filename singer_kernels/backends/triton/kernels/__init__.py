"""The kernels, one module for each stage."""
