"""The backend ``"cpu"``: the compiled extension's kernels for the CPU.

Stages as in the backend ``"triton"``, in C++ (``csrc/cpu``): the patches are worked on in chunks
that stay in a core's cache, the Gram matrices in panels of their upper half, and neither F̂ nor a
P × P matrix is kept for the backward. Dense products are torch's library's; the rest is one pass
over each chunk, in the widest vectors that the processor has.

Products take float32 operands, or float64, for features of any dtype. Where they are to be
narrower (under autocast, or for narrow inputs), the features and the adapter are rounded to that
dtype first; what is computed on the way (H, F̂, the Gram matrices) is not.

Source: derived from SiNGER (arXiv 2509.20986), section 3.
"""

from __future__ import annotations

from functools import partial

import torch

from singer_kernels import extension
from singer_kernels.backends import autograd, operators
from singer_kernels.backends import reference as reference_backend
from singer_kernels.backends.problem import Problem

operators.define("cpu", lambda product, acc: acc)

fused_losses = partial(autograd.fused_losses, backend="cpu")
gram_loss = partial(autograd.gram_loss, backend="cpu")
# One or two ATen calls each.
refine = reference_backend.refine
token_norms = reference_backend.token_norms
outlier_loss = reference_backend.outlier_loss
kd_loss = reference_backend.kd_loss


def _extension_reason() -> str | None:
    """Return why the extension isn't loaded, or None."""
    reason = extension.load()
    return None if reason is None else f"the compiled extension is {reason}"


# As in the backend "triton": torch.compile is to call this, not to trace it.
_extension_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unavailable_reason(device: torch.device, asked: bool) -> str | None:
    """See :class:`singer_kernels.backends.Backend`."""
    if device.type != "cpu":
        return f"it needs a CPU, not {device.type}"
    return _extension_reason()


def unsupported_reason(problem: Problem) -> str | None:
    """Return None: this backend serves every size."""
    return None
