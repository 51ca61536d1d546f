"""Builds the compiled part of singer_kernels: what is there, what to build, how; the command."""
