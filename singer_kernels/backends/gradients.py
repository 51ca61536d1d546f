"""Gradients that raise when differentiated again, and scaling of precomputed gradients.

``torch.autograd.function.once_differentiable`` attaches its error to new leaves, which
``torch.autograd.grad`` never reaches: a second derivative would silently lack a part. Here the
error is attached to the inputs, so that every path of a second derivative reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor


class _ForbidDoubleBackward(torch.autograd.Function):
    """The identity in its first argument; its gradient raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise RuntimeError("the losses of singer_kernels can't be differentiated twice")


def forbid_double_backward(
    grads: Sequence[Tensor | None], *inputs: Tensor | None
) -> list[Tensor | None]:
    """Return gradients whose own gradients, with respect to ``inputs`` or their history, raise.

    Args:
        grads: the gradients that a ``backward`` returns.
        inputs: the tensors that they were computed from, beside their own history.
    """
    if not torch.is_grad_enabled():
        return list(grads)
    present = [tensor for tensor in inputs if tensor is not None]
    return [None if g is None else _ForbidDoubleBackward.apply(g, *present) for g in grads]


class _OnceDifferentiable(torch.autograd.Function):
    """The identity, whose gradient can't be differentiated again."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return forbid_double_backward([grad])[0]


def once_differentiable(tensor: Tensor) -> Tensor:
    """Return the tensor; gradients that flow through the result can't be differentiated again."""
    return cast("Tensor", _OnceDifferentiable.apply(tensor)) if tensor.requires_grad else tensor


def scaled_patches(tensor: Tensor, unit: Tensor, prefix: int, grad_output: Tensor) -> Tensor:
    """Return the gradient of ``[B, T, D]`` tokens: ``unit * grad_output``, 0 on prefix tokens.

    Args:
        tensor: the tokens, ``[B, T, D]``.
        unit: the gradient of the patches, ``[B, P, D]``, for a ``grad_output`` of 1.
        prefix: the number of prefix tokens.
        grad_output: the gradient of the loss, ``[]``.
    """
    grad = torch.zeros_like(tensor)
    grad[:, prefix:] = unit * grad_output
    return grad


def gram_loss_backward(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
    """Return the gradients of ``gram_loss`` in tokens and target.

    ``ctx`` holds the prefix and has saved both inputs and both gradients for a ``grad_output`` of
    1, or None.
    """
    tokens, target, *units = ctx.saved_tensors
    with torch.no_grad():
        grads = [
            None if unit is None else scaled_patches(tensor, unit, ctx.prefix, grad_output)
            for tensor, unit in zip((tokens, target), units, strict=True)
        ]
    return forbid_double_backward(grads, tokens, target)
