"""Base class of the backends with kernels: differentiable losses around their operators."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from singer_kernels.backends import Backend
from singer_kernels.backends.gradients import (
    fused_losses_backward,
    gram_loss_backward,
    gram_loss_forward,
    mark_outputs,
    scaled_patches,
)
from singer_kernels.backends.operators import (
    BackwardInputs,
    BackwardOutput,
    ForwardInputs,
    ForwardOutput,
)
from singer_kernels.backends.precision import MatmulPrecision, no_autocast, saved
from singer_kernels.reference import accumulation_dtype
from singer_kernels.types import FusedLossesInputs, FusedLossesOutput


class _Saved(NamedTuple):
    """Tensors of the forward for the backward; None where no gradient needs them."""

    student: Tensor
    teacher: Tensor
    down: Tensor | None
    up: Tensor
    gram_target: Tensor | None
    rounded_up: Tensor | None  # up in the products' dtype, where that is another tensor
    hz: Tensor
    residual: Tensor | None
    norms: Tensor | None
    threshold: Tensor | None
    outlier_weight: Tensor | None
    grad_hz: Tensor | None
    grad_target: Tensor | None


class _FusedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, tracks_gradients: bool, *args: Any) -> tuple[Any, ...]:
        x = FusedLossesInputs(*args)
        target = x.teacher if x.gram_target is None else x.gram_target
        acc = accumulation_dtype(x.student, x.teacher, x.down, x.up, target)
        product = MatmulPrecision.of(acc, x.teacher, x.down, x.up).product
        gram_product = MatmulPrecision.of(acc, x.teacher, x.down, x.up, target).product
        needs_student, _, needs_down, needs_up, needs_target = (
            tracks_gradients and needed for needed in ctx.needs_input_grad[2:7]
        )
        needs_adapter = needs_down or needs_up
        with no_autocast(x.teacher.device.type):
            rounded_up = x.up.to(product).contiguous()
            inputs = ForwardInputs(
                student=x.student,
                teacher=x.teacher,
                down=x.down.to(product).contiguous(),
                up=rounded_up,
                gram_target=x.gram_target,
                gram=x.gram,
                quantile=x.quantile,
                num_prefix_tokens=x.num_prefix_tokens,
                has_refined=x.return_refined,
                has_residual=needs_down,
                has_grad_hz=x.gram and needs_adapter,
                has_grad_target=x.gram and needs_target,
                acc=acc,
                product=product,
                gram_product=gram_product,
            )
            operator = getattr(torch.ops.singer_kernels, f"{backend}_losses_forward")
            out = ForwardOutput(*operator(*inputs))
        ctx.options = (acc, product, x.num_prefix_tokens, x.down.dtype, x.up.dtype, backend)
        needs_rows = needs_student or needs_adapter
        ctx.save_for_backward(
            saved(x.student, needs_rows),
            saved(x.teacher, needs_rows),
            saved(x.down, needs_adapter),
            saved(x.up, needs_rows),
            saved(x.gram_target, needs_target),
            rounded_up if rounded_up is not x.up and needs_rows else None,
            out.hz if needs_rows else None,
            out.residual if needs_down else None,
            out.norms if needs_adapter else None,
            out.threshold if needs_adapter else None,
            out.outlier_weight if needs_adapter else None,
            out.grad_hz if inputs.has_grad_hz else None,
            out.grad_target if inputs.has_grad_target else None,
        )
        info = out.info if x.gram else None
        refined = out.refined if x.return_refined else None
        outputs = (out.kd, out.outlier, info, refined, out.norms, out.threshold)
        return mark_outputs(ctx, outputs, needs_student, needs_adapter, needs_target)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        student, down, up, target = fused_losses_backward(ctx, _backward, grad_outputs)
        return None, None, student, None, down, up, target, None, None, None, None


def _backward(
    ctx: Any,
    tensors: tuple[Tensor | None, ...],
    grad_kd: Tensor | None,
    grad_outlier: Tensor | None,
    grad_info: Tensor | None,
    grad_refined: Tensor | None,
) -> list[Tensor | None]:
    """Return the gradients of student, down, up and gram_target."""
    x = _Saved(*tensors)
    acc, product, prefix, down_dtype, up_dtype, backend = ctx.options
    needs_student, _, needs_down, needs_up, needs_target = ctx.needs_input_grad[2:7]
    grad_target = None
    if needs_target and grad_info is not None and x.gram_target is not None:
        grad_target = scaled_patches(
            x.gram_target, cast("Tensor", x.grad_target), prefix, grad_info
        )
    if not (needs_down or needs_up):
        grad_outlier = grad_info = grad_refined = None
    inputs = BackwardInputs(
        student=x.student,
        teacher=x.teacher,
        up=x.up if x.rounded_up is None else x.rounded_up,
        hz=x.hz,
        grad_hz=x.grad_hz,
        residual=x.residual,
        norms=x.norms,
        threshold=x.threshold,
        outlier_weight=x.outlier_weight,
        grad_kd=grad_kd,
        grad_outlier=grad_outlier,
        grad_info=grad_info,
        grad_refined=grad_refined,
        num_prefix_tokens=prefix,
        acc=acc,
        product=product,
        student_dtype=x.student.dtype if needs_student else None,
        down_dtype=down_dtype if needs_down else None,
        up_dtype=up_dtype if needs_up else None,
    )
    if not any(inputs.needs):
        return [None, None, None, grad_target]
    operator = getattr(torch.ops.singer_kernels, f"{backend}_losses_backward")
    grads = BackwardOutput(*operator(*inputs))
    return [
        *(grad if n else None for grad, n in zip(grads, inputs.needs, strict=True)),
        grad_target,
    ]


class _GramLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, target: Tensor, backend: str, *options: Any) -> Tensor:
        operator = getattr(torch.ops.singer_kernels, f"{backend}_gram_loss")
        return gram_loss_forward(ctx, operator, tokens, target, *options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *gram_loss_backward(ctx, grad_output), None, None, None


class KernelBackend(Backend):
    """A backend with the operators of :mod:`singer_kernels.backends.operators`."""

    name: str

    def fused_losses(self, inputs: FusedLossesInputs) -> FusedLossesOutput:
        """See :func:`singer_kernels.reference.fused_losses`."""
        out = _FusedLosses.apply(self.name, torch.is_grad_enabled(), *inputs)
        return FusedLossesOutput(*out)

    def gram_loss(self, tokens: Tensor, target: Tensor, num_prefix_tokens: int) -> Tensor:
        """See :func:`singer_kernels.reference.gram_loss`."""
        options = (num_prefix_tokens, torch.is_grad_enabled())
        return cast("Tensor", _GramLoss.apply(tokens, target, self.name, *options))
