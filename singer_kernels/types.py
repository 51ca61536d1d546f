"""What the losses return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FusedLossesOutput(NamedTuple):
    """The result of :func:`singer_kernels.fused_losses` for one distilled layer.

    The losses are scalars in float32 (float64 if an input is float64), each differentiable on its
    own with respect to ``student``, ``down``, ``up`` and ``gram_target``.

    Attributes:
        kd: mean of ``(S − F̂)²`` over all tokens.
        outlier: mean squared excess of the outlying patch norms over their image's quantile.
        info: mean squared difference of the two Gram matrices; None with ``gram=False``.
        refined: F̂, ``[B, T, D]``, in the teacher's dtype, differentiable; None unless asked for.
        norms: ``‖F̂ᵢ‖`` of the patches, ``[B, P]``, detached.
        threshold: the quantile of each image's norms, ``[B]``, detached.
    """

    kd: Tensor
    outlier: Tensor
    info: Tensor | None
    refined: Tensor | None
    norms: Tensor
    threshold: Tensor
