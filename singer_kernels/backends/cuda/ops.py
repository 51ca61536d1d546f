"""The backend's operators, and those of its kernels, which write into tensors they are given."""

from __future__ import annotations

import torch
from torch import Tensor

from singer_kernels.backends import operators
from singer_kernels.backends.cuda import stages
from singer_kernels.backends.operators import ForwardOutput, Upstream, or_empty

_KERNELS = (
    "cuda_refine(Tensor teacher, Tensor student, Tensor delta, int num_prefix_tokens, "
    "Tensor(a!) norms, Tensor(b!) kd_parts, Tensor(c!)? refined, Tensor(d!)? rows, "
    "Tensor(e!)? differences) -> ()",
    "cuda_normalize(Tensor tokens, int num_prefix_tokens, Tensor(a!) norms, Tensor(b!) rows) -> ()",
    "cuda_outlier(Tensor norms, float quantile, Tensor(a!) threshold, Tensor(b!) squares, "
    "Tensor(c!) counts) -> ()",
    "cuda_gram_difference(Tensor cosines, Tensor targets, Tensor(a!)? differences, "
    "Tensor(b!) squares, Tensor(c!) slopes, Tensor(d!) target_slopes) -> ()",
    "cuda_gram_scale(Tensor columns, Tensor norms, Tensor(a!) out) -> ()",
    "cuda_gram_gradient(Tensor turned, Tensor columns, Tensor norms, Tensor slopes, float scale, "
    "Tensor(a!) out, int num_prefix_tokens) -> ()",
    "cuda_backward_columns(Tensor columns, Tensor? gram_columns, Tensor? residual, "
    "Tensor? through_up, Tensor? norms, Tensor? threshold, Tensor? outlier_weight, Tensor? d_kd, "
    "Tensor? d_outlier, Tensor? d_info, Tensor(a!)? d_hidden, Tensor(b!)? turned, int tokens, "
    "int width) -> ()",
    "cuda_backward_tokens(Tensor teacher, Tensor? student, Tensor delta, Tensor? d_refined, "
    "Tensor? d_kd, Tensor(a!)? d_student, Tensor(b!)? refined, Tensor(c!)? dense, "
    "int num_prefix_tokens) -> ()",
)


def losses_forward(
    student: Tensor,
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    gram_target: Tensor | None,
    gram: bool,
    quantile: float,
    num_prefix_tokens: int,
    has_refined: bool,
    has_residual: bool,
    has_gram_columns: bool,
    has_d_target: bool,
    acc: torch.dtype,
    product: torch.dtype,
    gram_product: torch.dtype,
) -> tuple[Tensor, ...]:
    """Run the stages ``refine``, ``outlier`` and ``gram``; see :class:`ForwardOutput`."""
    prefix, teacher = num_prefix_tokens, teacher.contiguous()
    arithmetic = stages.Arithmetic(product, acc)
    gram_arithmetic = stages.Arithmetic(gram_product, acc)
    refined = stages.run_refine(
        student.contiguous(),
        teacher,
        down,
        up,
        prefix,
        arithmetic,
        has_refined=has_refined,
        has_residual=has_residual,
        rows_dtype=gram_arithmetic.operand if gram else None,
    )
    outliers = stages.run_outlier(refined.norms, quantile)
    info = refined.kd.new_empty(0)
    gram_columns = d_target = None
    if refined.rows is not None:
        target = teacher if gram_target is None else gram_target.contiguous()
        info, gram_columns, d_target = stages.run_gram(
            refined.rows,
            refined.norms,
            target,
            prefix,
            gram_arithmetic,
            columns=refined.columns if has_gram_columns else None,
            columns_are_tokens=False,
            columns_dtype=gram_arithmetic.operand,
            d_target_dtype=gram_arithmetic.operand if has_d_target else None,
        )
    return ForwardOutput(
        kd=refined.kd,
        outlier=outliers.loss,
        info=info,
        refined=or_empty(refined.refined, teacher),
        norms=refined.norms,
        threshold=outliers.threshold,
        outlier_weight=outliers.weight,
        columns=refined.columns,
        residual=or_empty(refined.residual, info, arithmetic.operand),
        gram_columns=or_empty(gram_columns, info, gram_arithmetic.operand),
        d_target=or_empty(d_target, info, gram_arithmetic.operand),
    )


def losses_backward(
    student: Tensor | None,
    teacher: Tensor,
    up: Tensor,
    columns: Tensor,
    gram_columns: Tensor | None,
    residual: Tensor | None,
    norms: Tensor | None,
    threshold: Tensor | None,
    outlier_weight: Tensor | None,
    d_kd: Tensor | None,
    d_outlier: Tensor | None,
    d_info: Tensor | None,
    d_refined: Tensor | None,
    num_prefix_tokens: int,
    acc: torch.dtype,
    product: torch.dtype,
    student_dtype: torch.dtype | None,
    down_dtype: torch.dtype | None,
    up_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """Run the stage ``backward``; see :func:`stages.run_backward`."""
    reaches = any(grad is not None for grad in (d_kd, d_outlier, d_info, d_refined))
    grads = stages.run_backward(
        None if student is None else student.contiguous(),
        teacher.contiguous(),
        up,
        columns,
        gram_columns,
        residual,
        norms,
        threshold,
        outlier_weight,
        Upstream(d_kd, d_outlier, d_info, None if d_refined is None else d_refined.contiguous()),
        num_prefix_tokens,
        stages.Arithmetic(product, acc),
        None if d_kd is None else student_dtype,
        down_dtype if reaches else None,
        up_dtype if reaches else None,
    )
    d_student, d_down, d_up = (or_empty(grad, columns) for grad in grads)
    return d_student, d_down, d_up


def gram_loss(
    tokens: Tensor,
    target: Tensor,
    num_prefix_tokens: int,
    has_d_tokens: bool,
    has_d_target: bool,
    acc: torch.dtype,
    product: torch.dtype,
) -> tuple[Tensor, ...]:
    """Run the stage ``gram`` on two tensors of tokens."""
    arithmetic, tokens = stages.Arithmetic(product, acc), tokens.contiguous()
    norms, rows = stages.normalized(tokens, num_prefix_tokens, arithmetic)
    loss, d_tokens, d_target = stages.run_gram(
        rows,
        norms,
        target.contiguous(),
        num_prefix_tokens,
        arithmetic,
        columns=tokens if has_d_tokens else None,
        columns_are_tokens=True,
        columns_dtype=acc,
        d_target_dtype=acc if has_d_target else None,
    )
    return loss, or_empty(d_tokens, loss), or_empty(d_target, loss)


for _schema in _KERNELS:
    operators.LIBRARY.define(_schema)
operators.define("cuda")
for _name, _implementation in (
    ("cuda_losses_forward", losses_forward),
    ("cuda_losses_backward", losses_backward),
    ("cuda_gram_loss", gram_loss),
):
    operators.LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
