"""Benchmark harness: workloads, providers of the losses, accuracy check, timing and report."""
