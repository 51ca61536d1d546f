"""Gradients that refuse to be differentiated again.

``torch.autograd.function.once_differentiable`` hangs its error on new leaves, which
``torch.autograd.grad`` never reaches: a second derivative would silently lack a part. Here the
error hangs on the inputs, so that every way to a second derivative meets it.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

import torch
from torch import Tensor


class _Refuse(torch.autograd.Function):
    """The identity in its first argument; its gradient raises."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise RuntimeError("the losses of singer_kernels can't be differentiated twice")


def refuse_twice(grad: Tensor, *inputs: Tensor) -> Tensor:
    """Return a gradient whose own gradient, with respect to ``inputs`` or its history, raises.

    Args:
        grad: the gradient, computed in a ``backward``.
        inputs: what the gradient was computed from, beside its own history.
    """
    return cast("Tensor", _Refuse.apply(grad, *inputs))
