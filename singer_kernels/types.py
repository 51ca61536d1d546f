"""Types of the arguments and results of the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from torch import Tensor

BackendName: TypeAlias = Literal["triton", "cuda", "cpu", "torch", "reference"]
"""The backends, in the order of the automatic choice."""


class FusedLossesInputs(NamedTuple):
    """Checked arguments of :func:`singer_kernels.fused_losses`, as a backend gets them."""

    student: Tensor  # S, [B, T, D]
    teacher: Tensor  # F, [B, T, D]
    down: Tensor  # Wd, [D, r]
    up: Tensor  # Wu, [r, D]
    gram_target: Tensor | None  # R, [B, T, D]; None: the teacher
    gram: bool
    quantile: float
    num_prefix_tokens: int
    return_refined: bool


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


if TYPE_CHECKING:  # what the overloads of fused_losses return: the same class, narrowed

    class OutputWithInfo(FusedLossesOutput):
        """The result with ``gram=True``."""

        info: Tensor
        refined: None

    class OutputWithRefined(FusedLossesOutput):
        """The result with ``gram=False, return_refined=True``."""

        info: None
        refined: Tensor

    class OutputWithBoth(FusedLossesOutput):
        """The result with ``gram=True, return_refined=True``."""

        info: Tensor
        refined: Tensor

    class OutputWithNeither(FusedLossesOutput):
        """The result with ``gram=False``."""

        info: None
        refined: None
