"""The losses as differentiable functions around the operators of a backend with kernels."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from singer_kernels.backends.arithmetic import no_autocast, product_dtype, saved
from singer_kernels.backends.gradients import gram_loss_backward, scaled_patches
from singer_kernels.backends.once import refuse_twice
from singer_kernels.backends.operators import ForwardOutput
from singer_kernels.reference import accumulation_dtype
from singer_kernels.types import FusedLossesOutput


def _operator(backend: str, name: str) -> Any:
    return getattr(torch.ops.singer_kernels, f"{backend}_{name}")


class _FusedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        down: Tensor,
        up: Tensor,
        gram_target: Tensor | None,
        gram: bool,
        quantile: float,
        num_prefix_tokens: int,
        return_refined: bool,
        tracks_gradients: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        target = teacher if gram_target is None else gram_target
        acc = accumulation_dtype(student, teacher, down, up, target)
        product = acc if acc == torch.float64 else product_dtype(teacher, down, up)
        gram_product = acc if acc == torch.float64 else product_dtype(teacher, down, up, target)
        needs_student, _, needs_down, needs_up, needs_target = (
            tracks_gradients and needed for needed in ctx.needs_input_grad[:5]
        )
        needs_adapter = needs_down or needs_up
        with no_autocast(teacher.device.type):
            rounded_up = up.to(product).contiguous()
            found = ForwardOutput(
                *_operator(backend, "losses_forward")(
                    student,
                    teacher,
                    down.to(product).contiguous(),
                    rounded_up,
                    gram_target,
                    gram,
                    quantile,
                    num_prefix_tokens,
                    return_refined,
                    needs_down,
                    gram and needs_adapter,
                    gram and needs_target,
                    acc,
                    product,
                    gram_product,
                )
            )
        ctx.set_materialize_grads(False)
        ctx.options = (acc, product, num_prefix_tokens, down.dtype, up.dtype, backend)
        needs_rows = needs_student or needs_adapter
        ctx.save_for_backward(
            saved(student, needs_rows),
            saved(teacher, needs_rows),
            saved(down, needs_adapter),
            saved(up, needs_rows),
            saved(gram_target, needs_target),
            rounded_up if rounded_up is not up and needs_rows else None,
            found.columns if needs_rows else None,
            found.residual if needs_down else None,
            found.norms if needs_adapter else None,
            found.threshold if needs_adapter else None,
            found.outlier_weight if needs_adapter else None,
            found.gram_columns if gram and needs_adapter else None,
            found.d_target if gram and needs_target else None,
        )
        info = found.info if gram else None
        refined = found.refined if return_refined else None
        differentiable = (
            (found.kd, needs_rows),
            (found.outlier, needs_adapter),
            (info, needs_adapter or needs_target),
            (refined, needs_adapter),
            (found.norms, False),
            (found.threshold, False),
        )
        constants = [out for out, needed in differentiable if out is not None and not needed]
        ctx.mark_non_differentiable(*constants)
        return found.kd, found.outlier, info, refined, found.norms, found.threshold

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors  # once: under gradient checkpointing a second look raises
        device_type = next(tensor.device.type for tensor in kept if tensor is not None)
        with torch.no_grad(), no_autocast(device_type):
            grads = _backward(ctx, kept, *upstream[:4])
        inputs = [tensor for tensor in kept[:5] if tensor is not None]
        if torch.is_grad_enabled():
            grads = [None if grad is None else refuse_twice(grad, *inputs) for grad in grads]
        student, down, up, gram_target = grads
        return student, None, down, up, gram_target, None, None, None, None, None, None


def _backward(
    ctx: Any,
    kept: tuple[Tensor, ...],
    d_kd: Tensor | None,
    d_outlier: Tensor | None,
    d_info: Tensor | None,
    d_refined: Tensor | None,
) -> list[Tensor | None]:
    student, teacher, _, up, gram_target, rounded_up, columns, residual = kept[:8]
    norms, threshold, outlier_weight, gram_columns, d_target = kept[8:]
    acc, product, prefix, down_dtype, up_dtype, backend = ctx.options
    needs_student, _, needs_down, needs_up, needs_target = ctx.needs_input_grad[:5]
    grad_target = None
    if needs_target and d_info is not None:
        grad_target = scaled_patches(gram_target, d_target, prefix, d_info)
    needs_adapter = needs_down or needs_up
    if not needs_adapter:
        d_outlier = d_info = d_refined = None
    reaches = [grad is not None for grad in (d_kd, d_outlier, d_info, d_refined)]
    needs_student = needs_student and d_kd is not None
    needs_down, needs_up = needs_down and any(reaches), needs_up and any(reaches)
    if not (needs_student or needs_down or needs_up):
        return [None, None, None, grad_target]
    d_student, d_down, d_up = _operator(backend, "losses_backward")(
        student,
        teacher,
        up if rounded_up is None else rounded_up,
        columns,
        gram_columns,
        residual,
        norms,
        threshold,
        outlier_weight,
        d_kd,
        d_outlier,
        d_info,
        d_refined,
        prefix,
        acc,
        product,
        student.dtype if needs_student else None,
        down_dtype if needs_down else None,
        up_dtype if needs_up else None,
    )
    return [
        d_student if needs_student else None,
        d_down if needs_down else None,
        d_up if needs_up else None,
        grad_target,
    ]


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
    backend: str,
) -> FusedLossesOutput:
    """Compute the losses with a backend's operators; else as the reference's ``fused_losses``."""
    out = _FusedLosses.apply(
        student,
        teacher,
        down,
        up,
        gram_target,
        gram,
        quantile,
        num_prefix_tokens,
        return_refined,
        torch.is_grad_enabled(),
        backend,
    )
    return FusedLossesOutput(*out)


class _GramLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        target: Tensor,
        num_prefix_tokens: int,
        tracks_gradients: bool,
        backend: str,
    ) -> Tensor:
        acc = accumulation_dtype(tokens, target)
        product = acc if acc == torch.float64 else product_dtype(tokens, target)
        needs = [tracks_gradients and needed for needed in ctx.needs_input_grad[:2]]
        with no_autocast(tokens.device.type):
            loss, *units = _operator(backend, "gram_loss")(
                tokens, target, num_prefix_tokens, *needs, acc, product
            )
        ctx.prefix = num_prefix_tokens
        units = [unit if needed else None for unit, needed in zip(units, needs, strict=True)]
        ctx.save_for_backward(saved(tokens, needs[0]), saved(target, needs[1]), *units)
        return cast("Tensor", loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *gram_loss_backward(ctx, upstream), None


def gram_loss(tokens: Tensor, target: Tensor, num_prefix_tokens: int, backend: str) -> Tensor:
    """Compute the Gram loss with a backend's operator; else as the reference's ``gram_loss``."""
    tracks_gradients = torch.is_grad_enabled()
    return cast(
        "Tensor", _GramLoss.apply(tokens, target, num_prefix_tokens, tracks_gradients, backend)
    )
