"""The backend ``"reference"``: the specification itself, differentiated by autograd.

It runs wherever torch runs. Each differentiable input passes through :class:`_OnceDifferentiable`,
so that a second differentiation raises here as it does in every other backend.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from singer_kernels import reference
from singer_kernels.backends.once import refuse_twice
from singer_kernels.backends.problem import Problem
from singer_kernels.types import FusedLossesOutput


class _OnceDifferentiable(torch.autograd.Function):
    """The identity, whose gradient can't be differentiated again."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return refuse_twice(grad)


def _once(tensor: Tensor) -> Tensor:
    return cast("Tensor", _OnceDifferentiable.apply(tensor)) if tensor.requires_grad else tensor


def unavailable_reason(device: torch.device, asked: bool) -> str | None:
    """Return None: this backend runs on every device."""
    return None


def unsupported_reason(problem: Problem) -> str | None:
    """Return None: this backend serves every size."""
    return None


def refine(teacher: Tensor, down: Tensor, up: Tensor, num_prefix_tokens: int) -> Tensor:
    """See :func:`singer_kernels.reference.refine`."""
    return reference.refine(teacher, _once(down), _once(up), num_prefix_tokens)


def token_norms(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """See :func:`singer_kernels.reference.token_norms`."""
    return reference.token_norms(_once(tokens), num_prefix_tokens)


def outlier_loss(norms: Tensor, quantile: float) -> Tensor:
    """See :func:`singer_kernels.reference.outlier_loss`."""
    return reference.outlier_loss(_once(norms), quantile)


def gram_loss(tokens: Tensor, target: Tensor, num_prefix_tokens: int) -> Tensor:
    """See :func:`singer_kernels.reference.gram_loss`."""
    return reference.gram_loss(_once(tokens), _once(target), num_prefix_tokens)


def kd_loss(student: Tensor, tokens: Tensor) -> Tensor:
    """See :func:`singer_kernels.reference.kd_loss`."""
    return reference.kd_loss(_once(student), _once(tokens))


def fused_losses(
    student: Tensor,
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    gram_target: Tensor | None,
    gram: bool,
    quantile: float,
    num_prefix_tokens: int,
    return_refined: bool,
) -> FusedLossesOutput:
    """See :func:`singer_kernels.reference.fused_losses`."""
    return reference.fused_losses(
        _once(student),
        teacher,
        _once(down),
        _once(up),
        gram_target=None if gram_target is None else _once(gram_target),
        gram=gram,
        quantile=quantile,
        num_prefix_tokens=num_prefix_tokens,
        return_refined=return_refined,
    )
