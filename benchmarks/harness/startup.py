"""Time imports and a backend's first call in a fresh process.

    cd benchmarks && python -m harness.startup BACKEND [--device cuda]

Prints JSON, in seconds. The first call minus the second is one-time work: loading libraries,
compiling kernels, allocating memory.
"""

from __future__ import annotations

import argparse
import json
import time


def measure(backend: str, device: str) -> dict[str, float]:
    """Return the seconds of each step of a start-up.

    Args:
        backend: backend of ``fused_losses``.
        device: ``cpu`` or ``cuda``.

    Returns:
        ``import_torch``, ``import_singer_kernels`` (after torch), ``first_call`` and
        ``second_call``: forward and backward of 2 x 196 x 384 in float32, synchronised.
    """
    seconds = {}
    begin = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        seconds[name] = now - begin
        begin = time.perf_counter()

    import torch

    lap("import_torch")
    from singer_kernels import fused_losses

    lap("import_singer_kernels")
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 197, 384), (2, 197, 384), (384, 64), (64, 384))
    tensors = [torch.randn(shape, generator=generator).div_(8).to(device) for shape in shapes]
    student, teacher, down, up = tensors
    for tensor in (student, down, up):
        tensor.requires_grad_()
    if device == "cuda":
        torch.mm(down, up)  # creates the CUDA and cuBLAS contexts, which every program pays for
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for name in ("first_call", "second_call"):
        out = fused_losses(student, teacher, down, up, backend=backend)
        (out.kd + out.outlier + out.info).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        lap(name)
    return seconds


def main() -> None:
    """Print the times as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("backend")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    print(json.dumps(measure(options.backend, options.device)))


if __name__ == "__main__":
    main()
