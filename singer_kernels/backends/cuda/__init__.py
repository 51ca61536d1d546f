"""The backend ``"cuda"``: the compiled extension's kernels for NVIDIA GPUs.

It serves where Triton can't run. The stages are those of the backend ``"triton"``; dense products
are torch's library's, and what is bound by memory is a kernel in ``csrc/cuda``: F̂ with its norms
and the KD sums, the quantile, the Gram matrices' difference, the gradients' rows.

bfloat16 products accumulate in float32, and H goes into ``H Wu`` in two bfloat16 parts. float16
features are multiplied in float32: float16 lacks the range of H and X. Products of float32 follow
torch's setting of TF32, as the reference's do. Gram matrices are written
to memory, of as many images at a time as fit ``stages.MAX_ENTRIES``.
"""

from __future__ import annotations

import torch

from singer_kernels import extension
from singer_kernels.backends import constant_while_tracing
from singer_kernels.backends.autograd import KernelBackend
from singer_kernels.backends.cuda import ops as _ops  # noqa: F401  it registers the operators


@constant_while_tracing
def _reason(device_type: str, explicit: bool) -> str | None:
    """Return why the kernels can't or, unless they were asked for, should not run, or None."""
    is_emulated = device_type == "cpu" and extension.has_kernels("cuda_refine", "cpu")
    if device_type != "cuda" and not is_emulated:
        return f"it needs a CUDA device, not {device_type}"
    if device_type == "cuda" and not extension.has_kernels("cuda_refine", "cuda"):
        return f"the compiled extension is {extension.load() or 'built without CUDA'}"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU"
    return None if explicit else "it has not been run on a GPU yet: only if asked for"


class CudaBackend(KernelBackend):
    """The kernels of ``csrc/cuda``."""

    name = "cuda"

    def unavailable_reason(self, device: torch.device, explicit: bool) -> str | None:
        """See :class:`singer_kernels.backends.Backend`.

        On a CPU it runs where the kernels were compiled as plain C++, as the tests do.
        """
        return _reason(device.type, explicit)


backend = CudaBackend()
