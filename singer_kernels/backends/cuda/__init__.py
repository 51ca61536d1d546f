"""The backend ``"cuda"``: the compiled extension's kernels for GPUs where Triton can't run.

The stages are those of the backend ``"triton"``. Matrix products are torch's; the steps bound by
memory are kernels in ``csrc/cuda``: F̂ with its norms and KD sums, the quantile, the difference of
the Gram matrices, the rows of the gradients.

bfloat16 products accumulate in float32; in ``H Wu``, H is split into two bfloat16 parts. float16
features are multiplied in float32: float16 lacks the range of H and X. Products of float32 features
follow torch's TF32 setting, as the reference's do; the float32 ones of narrow features do not. Gram
matrices are in memory, of as many images at a time as fit ``stages.MAX_ENTRIES``.
"""

from __future__ import annotations

import torch

from singer_kernels import extension
from singer_kernels.backends import constant_while_tracing
from singer_kernels.backends.autograd import KernelBackend
from singer_kernels.backends.cuda import ops as _ops  # noqa: F401  it registers the operators


@constant_while_tracing
def _reason(device_type: str, explicit: bool) -> str | None:
    """Return None if the kernels can run (and, unless explicit, should), or the reason."""
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
