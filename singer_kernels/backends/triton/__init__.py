"""The backend ``"triton"``: fused kernels for NVIDIA GPUs of compute capability 8.0 and later.

Importing this does not import Triton; the first call does. The stages, one module each:

- ``refine``: H, Z, norms and the KD partial sums, from F and S;
- ``outlier``: the quantile of each image's norms by bitwise selection;
- ``gram``: both Gram matrices tile by tile, loss and ``X [H | Z]``;
- ``backward``: dS and the parts of dWd and dWu in one pass, then their sums.

No atomics and no synchronisation with the host: the same input gives the same bits. Products take
bfloat16 or float32 operands (float16 ones as TF32, which has the same digits and more range) and
accumulate in float32. Where torch is not told to use TF32, float32 products are three TF32 ones,
and plain ones where the adapter is wider than 128.

With ``TRITON_INTERPRET=1``, set before the first call, Triton's interpreter runs the kernels on
CPU tensors, float64 ones too: for tests.
"""

from __future__ import annotations

import os

import torch

from singer_kernels.backends import reference as reference_backend
from singer_kernels.backends.problem import Problem
from singer_kernels.backends.triton.autograd import fused_losses, gram_loss

__all__ = [
    "fused_losses",
    "gram_loss",
    "kd_loss",
    "outlier_loss",
    "refine",
    "token_norms",
    "unavailable_reason",
    "unsupported_reason",
]

# These pieces are bound by memory, and one or two ATen calls each.
refine = reference_backend.refine
token_norms = reference_backend.token_norms
outlier_loss = reference_backend.outlier_loss
kd_loss = reference_backend.kd_loss

LEAST_CAPABILITY = (8, 0)
"""The first with bfloat16 and TF32 products."""


def is_interpreted() -> bool:
    """Whether Triton's interpreter is asked for."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def unavailable_reason(device: torch.device, asked: bool) -> str | None:
    """See :class:`singer_kernels.backends.Backend`."""
    if device.type == "cpu" and is_interpreted():
        return None if asked else "the interpreter is for tests"
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if torch.version.cuda is None:
        return "it needs an NVIDIA GPU"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, pair)) for pair in (capability, LEAST_CAPABILITY))
        return f"it needs compute capability {least}, the device has {found}"
    import triton  # noqa: F401 - an ImportError is the caller's to report

    return None


def unsupported_reason(problem: Problem) -> str | None:
    """See :class:`singer_kernels.backends.Backend`."""
    from singer_kernels.backends.triton import configs

    if problem.acc == torch.float64 and not is_interpreted():
        return "it does not compute in float64"
    if problem.rank > configs.MAX_RANK:
        return f"rank {problem.rank} is more than {configs.MAX_RANK}"
    is_wide = problem.rank > configs.MAX_MATRIX_RANK
    if is_wide and problem.product == torch.float16 and not is_interpreted():
        return f"float16 products of rank {problem.rank} are wider than {configs.MAX_MATRIX_RANK}"
    if problem.patches > configs.MAX_PATCHES:
        return f"{problem.patches} patches are more than {configs.MAX_PATCHES}"
    return None
