"""The backend ``"cpu"``: the compiled extension's kernels for the CPU.

The stages are those of the backend ``"triton"``, in C++ (``csrc/cpu``), compiled for several
instruction sets, matrix products included. A thread takes a block of rows through all products of a
stage while it is in cache. Gram matrices are symmetric: one half is computed. With gradients, that
half of E is stored until X C is computed, for a group of images at a time, in a buffer of P²
elements each. F̂ is not saved for the backward, which recomputes it in blocks of columns.

Sums and products are float32, or float64, for features of any dtype. Under autocast the features
and the adapter are rounded to its dtype first; H, F̂ and the Gram matrices are not.

The same input gives the same bits with any number of threads, but not with another instruction set.

Source: derived from SiNGER (arXiv 2509.20986), section 3.
"""

from __future__ import annotations

import torch

from singer_kernels import extension
from singer_kernels.backends import constant_while_tracing, operators
from singer_kernels.backends.autograd import KernelBackend

operators.define("cpu", lambda precision: precision.acc)


@constant_while_tracing
def _extension_reason(explicit: bool) -> str | None:
    """Return None if the extension can be used (and, unless explicit, should be), or the reason."""
    reason = extension.load()
    if reason is not None:
        return f"the compiled extension is {reason}"
    capability = None if explicit else extension.cpu_capability()
    if capability == "baseline":
        return "only with AVX2 or AVX-512 is it known to be faster than the backend 'torch'"
    if capability is None and not explicit:
        return "the compiled extension is the build of another version: build it again"
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
