"""Parts of the backends' ``autograd.Function``s; gradients that raise when differentiated again.

``torch.autograd.function.once_differentiable`` attaches its error to new leaves, which
``torch.autograd.grad`` never reaches: a second derivative would silently lack a part. Here the
error is attached to the inputs, so that every path of a second derivative reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from torch.nn import functional

from singer_kernels.backends.precision import MatmulPrecision, no_autocast, saved
from singer_kernels.reference import accumulation_dtype


class _ForbidDoubleBackward(torch.autograd.Function):
    """The identity in its first argument; its gradient raises."""

    generate_vmap_rule = True  # with setup_context: works under torch.func

    @staticmethod
    def forward(grad: Tensor, *inputs: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

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

    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

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
    # Out of place: grad_output may be batched (torch.autograd.grad with is_grads_batched).
    return functional.pad(unit * grad_output, (0, 0, prefix, 0)).to(tensor.dtype)


def mark_outputs(
    ctx: Any,
    outputs: tuple[Tensor | None, ...],
    needs_student: bool,
    needs_adapter: bool,
    needs_target: bool,
) -> tuple[Tensor | None, ...]:
    """Mark the outputs of ``fused_losses`` that no gradient comes back from, and return all."""
    needed = (
        needs_student or needs_adapter,  # kd
        needs_adapter,  # outlier
        needs_adapter or needs_target,  # info
        needs_adapter,  # refined
        False,  # norms
        False,  # threshold
    )
    pairs = zip(outputs, needed, strict=True)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*[out for out, n in pairs if out is not None and not n])
    return outputs


def fused_losses_backward(
    ctx: Any,
    compute: Callable[..., list[Tensor | None]],
    grad_outputs: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Return the gradients of student, down, up and gram_target.

    Args:
        ctx: it has saved student, teacher, down, up and gram_target, then further tensors.
        compute: from ``ctx``, the saved tensors and the gradients of kd, outlier, info and refined.
        grad_outputs: the gradients of all outputs.
    """
    tensors = ctx.saved_tensors  # read once: under gradient checkpointing a second access raises
    device_type = next(tensor.device.type for tensor in tensors if tensor is not None)
    with torch.no_grad(), no_autocast(device_type):
        grads = compute(ctx, tensors, *grad_outputs[:4])
    return forbid_double_backward(grads, *tensors[:5])


def gram_loss_forward(
    ctx: Any,
    compute: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]],
    tokens: Tensor,
    target: Tensor,
    num_prefix_tokens: int,
    tracks_gradients: bool,
) -> Tensor:
    """Return the Gram loss, and save what :func:`gram_loss_backward` needs.

    Args:
        ctx: of the ``autograd.Function``, whose first arguments are ``tokens`` and ``target``.
        compute: the operator ``gram_loss``, or a function with its signature.
        tokens: ``[B, T, D]``.
        target: ``[B, T, D]``.
        num_prefix_tokens: how many leading tokens are no patches.
        tracks_gradients: whether the caller was in grad mode.
    """
    precision = MatmulPrecision.of(accumulation_dtype(tokens, target), tokens, target)
    needs = [tracks_gradients and needed for needed in ctx.needs_input_grad[:2]]
    with no_autocast(tokens.device.type):
        loss, *units = compute(
            tokens, target, num_prefix_tokens, *needs, precision.acc, precision.product
        )
    ctx.prefix = num_prefix_tokens
    ctx.save_for_backward(
        saved(tokens, needs[0]),
        saved(target, needs[1]),
        *(unit if needed else None for unit, needed in zip(units, needs, strict=True)),
    )
    return loss


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
