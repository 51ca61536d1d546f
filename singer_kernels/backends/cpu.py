"""The backend ``"cpu"``: the compiled extension's kernels for the CPU.

Stages as in the backend ``"triton"``, in C++ (``csrc/cpu``), in the widest vectors that the
processor has, products included. A thread takes some rows through all products of a stage while
they are in its cache. Of each Gram matrix, which is symmetric, half is computed. With gradients,
that half of the matrices' difference is kept until they are computed, for a few images at a time,
in P² numbers each, of which the other half is never touched. F̂ is not kept for the backward, which
computes it again, some columns at a time.

Sums and products are float32, or float64, for features of any dtype. Where products are to be
narrower (under autocast), the features and the adapter are rounded to that dtype first; what is
computed on the way (H, F̂, the Gram matrices) is not.

The same input gives the same bits on any number of threads; processors with vectors of another
width round differently.

Source: derived from SiNGER (arXiv 2509.20986), section 3.
"""

from __future__ import annotations

import torch

from singer_kernels import extension
from singer_kernels.backends import constant_while_tracing, operators
from singer_kernels.backends.autograd import KernelBackend

operators.define("cpu", lambda product, acc: acc)


@constant_while_tracing
def _extension_reason(explicit: bool) -> str | None:
    """Return why the extension can't or, unless it was asked for, should not be used, or None."""
    reason = extension.load()
    if reason is not None:
        return f"the compiled extension is {reason}"
    if not explicit and extension.vectors() == "baseline":
        return "only with AVX2 or AVX-512 is it known to be faster than the backend 'torch'"
    return None


class CpuBackend(KernelBackend):
    """The kernels of ``csrc/cpu``."""

    name = "cpu"

    def unavailable_reason(self, device: torch.device, explicit: bool) -> str | None:
        """See :class:`singer_kernels.backends.Backend`."""
        if device.type != "cpu":
            return f"it needs a CPU, not {device.type}"
        return _extension_reason(explicit)


backend = CpuBackend()
