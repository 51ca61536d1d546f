"""Gradients that were computed in the forward, up to their upstream factor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from singer_kernels.backends.once import refuse_twice


def scaled_patches(tensor: Tensor, unit: Tensor, prefix: int, upstream: Tensor) -> Tensor:
    """Return a token tensor's gradient: 0 on the prefix tokens, ``unit`` times a factor elsewhere.

    Args:
        tensor: the tokens, ``[B, T, D]``.
        unit: the gradient of the patches, ``[B, P, D]``, for an upstream gradient of 1.
        prefix: the number of prefix tokens.
        upstream: the upstream gradient, a scalar.
    """
    grad = torch.zeros_like(tensor)
    grad[:, prefix:] = unit * upstream
    return grad


def gram_loss_backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of ``gram_loss``: tokens, target, and None for two options.

    ``ctx`` holds the prefix and has saved both inputs and both unit gradients, or None.
    """
    tokens, target, d_tokens, d_target = ctx.saved_tensors
    inputs = [tensor for tensor in (tokens, target) if tensor is not None]
    grads: list[Tensor | None] = []
    for tensor, unit in ((tokens, d_tokens), (target, d_target)):
        grad = None
        if unit is not None:
            with torch.no_grad():
                grad = scaled_patches(tensor, unit, ctx.prefix, upstream)
            if torch.is_grad_enabled():
                grad = refuse_twice(grad, *inputs)
        grads.append(grad)
    return grads[0], grads[1], None, None
