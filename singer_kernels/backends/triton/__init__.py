"""The backend ``"triton"``: fused kernels for NVIDIA GPUs of compute capability 8.0 and later.

Importing this does not import Triton; the first call does. The stages, one module each:

- ``refine``: H, Z, norms and the KD partial sums, from F and S;
- ``outlier``: the quantile of each image's norms by bitwise selection;
- ``gram``: both Gram matrices tile by tile, loss and ``X [H | Z]``;
- ``backward``: dS and the partial sums of dWd and dWu in one pass, then their sums.

No atomics and no synchronisation with the host: the same input gives the same bits. Products take
bfloat16 or float32 operands and accumulate in float32. A float32 product (float16 ones too, which
lack the range) is three TF32 products, exact to 22 bits, whatever torch's TF32 setting; above rank
128 it is one IEEE product.

With ``TRITON_INTERPRET=1``, set before the first call, Triton's interpreter runs the kernels on
CPU tensors, float64 ones too: for tests.
"""

from __future__ import annotations

import os

import torch

from singer_kernels.backends import CallSpec, constant_while_tracing
from singer_kernels.backends.autograd import KernelBackend
from singer_kernels.backends.triton import ops as _ops  # noqa: F401  it registers the operators

MIN_CAPABILITY = (8, 0)
"""The first with bfloat16 and TF32 products."""


def is_interpreted() -> bool:
    """Whether ``TRITON_INTERPRET`` is set."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@constant_while_tracing
def _device_reason(device_type: str, index: int | None) -> str | None:
    """Return None if the kernels can run on CUDA, or interpreted on a CPU, else the reason."""
    if device_type == "cuda":
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "torch finds no NVIDIA GPU"
        capability = torch.cuda.get_device_capability(index)
        if capability < MIN_CAPABILITY:
            found, least = (".".join(map(str, pair)) for pair in (capability, MIN_CAPABILITY))
            return f"it needs compute capability {least}, the device has {found}"
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if device_type == "cuda":
        try:
            # The first use builds a part of Triton's driver, which takes a C compiler.
            triton.runtime.driver.active.get_current_target()
        except Exception as error:
            return f"Triton can't start: {' '.join(str(error).split())}"
    return None


class TritonBackend(KernelBackend):
    """The Triton kernels."""

    name = "triton"

    def unavailable_reason(self, device: torch.device, explicit: bool) -> str | None:
        """See :class:`singer_kernels.backends.Backend`."""
        if device.type == "cpu" and is_interpreted():
            return _device_reason("cpu", None) if explicit else "the interpreter is for tests"
        if device.type != "cuda":
            return f"it needs a CUDA device, not {device.type}"
        return _device_reason("cuda", device.index)

    def unsupported_reason(self, spec: CallSpec) -> str | None:
        """See :class:`singer_kernels.backends.Backend`."""
        from singer_kernels.backends.triton import configs

        if spec.precision.acc == torch.float64 and not is_interpreted():
            return "it does not compute in float64"
        if spec.rank > configs.MAX_RANK:
            return f"rank {spec.rank} is more than {configs.MAX_RANK}"
        is_wide = spec.rank > configs.MAX_MATRIX_RANK
        if is_wide and spec.precision.product == torch.float16 and not is_interpreted():
            return f"float16 products of rank {spec.rank} are wider than {configs.MAX_MATRIX_RANK}"
        if spec.images > configs.MAX_IMAGES:
            return f"{spec.images} images are more than {configs.MAX_IMAGES}"
        if spec.patches > configs.MAX_PATCHES:
            return f"{spec.patches} patches are more than {configs.MAX_PATCHES}"
        return None


backend = TritonBackend()
