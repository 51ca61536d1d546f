"""The stages as operators of torch: what torch.compile, export and CUDA graphs see of them.

Registered without importing Triton, which the first call does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from singer_kernels.backends import operators
from singer_kernels.backends.operators import ForwardOutput, Upstream, narrow_dtype, or_empty


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
    """Run the stages ``refine``, ``outlier`` and ``gram``; see :class:`ForwardOutput`.

    Args:
        student: S, ``[B, T, D]``.
        teacher: F, ``[B, T, D]``.
        down: Wd, ``[D, r]``, contiguous, rounded to ``product``.
        up: Wu, ``[r, D]``, likewise.
        gram_target: R, ``[B, T, D]``; None: the plain teacher.
        gram: whether the information loss is wanted.
        quantile: γ.
        num_prefix_tokens: how many leading tokens are no patches.
        has_refined: whether F̂ is wanted.
        has_residual: whether ``(F̂ − S) Wuᵀ`` is.
        has_gram_columns: whether ``X [H | Z]`` is.
        has_d_target: whether the target's gradient is.
        acc: the dtype of sums.
        product: the dtype of the products' operands.
        gram_product: that of the Gram products.
    """
    from singer_kernels.backends.triton import configs, launch
    from singer_kernels.backends.triton.gram_pairs import run_gram_pairs
    from singer_kernels.backends.triton.gram_rows import run_gram_rows
    from singer_kernels.backends.triton.gram_tile import GramInputs, row_norms
    from singer_kernels.backends.triton.losses import sum_losses
    from singer_kernels.backends.triton.outlier import run_outlier
    from singer_kernels.backends.triton.refine_stage import run_refine

    prefix, (width, rank) = num_prefix_tokens, down.shape
    arch = launch.architecture(teacher.device)
    precision = launch.MatmulPrecision(product, acc, arch)
    gram_precision = launch.MatmulPrecision(gram_product, acc, arch)
    student, teacher = launch.rows_contiguous(student), launch.rows_contiguous(teacher)
    is_own = gram_target is None
    identity = gram and is_own and product == torch.bfloat16 and configs.takes_identity(rank, width)
    gram_tokens_dtype, gram_dtype = None, narrow_dtype(gram_product, acc)
    if gram and not identity:
        gram_tokens_dtype = gram_dtype
    with launch.on_device(teacher):
        refined = run_refine(
            student,
            teacher,
            down,
            up,
            prefix,
            precision,
            identity=identity,
            residual_dtype=narrow_dtype(product, acc) if has_residual else None,
            has_refined=has_refined,
            gram_tokens_dtype=gram_tokens_dtype,
        )
        teacher_norms = refined.teacher_norms if identity else None
        outliers = run_outlier(refined.norms, teacher_norms, quantile)
        found = None
        if gram:
            target = teacher if gram_target is None else launch.rows_contiguous(gram_target)
            target_norms = refined.teacher_norms if is_own else row_norms(target, prefix, acc)
            inputs = GramInputs(
                "identity" if identity else "materialized",
                refined.gram_tokens,
                target,
                refined.norms,
                target_norms,
                up,
                refined.hz,
                refined.split_bf16,
                outliers.cancellation_ratio,
            )
            takes_rows = configs.takes_gram_rows(rank, refined.norms.shape[1])
            if has_gram_columns and not has_d_target and takes_rows:
                found = run_gram_rows(inputs, prefix, gram_precision, grad_hz_dtype=gram_dtype)
            else:
                found = run_gram_pairs(
                    inputs,
                    refined.hz,
                    prefix,
                    gram_precision,
                    grad_factor_dtype=gram_dtype if has_gram_columns else None,
                    grad_target_dtype=gram_dtype if has_d_target else None,
                )
        kd, outlier, info, weight = sum_losses(
            refined.kd_partials,
            outliers,
            None if found is None else found.loss_partials,
            teacher.shape,
            prefix,
        )
    return ForwardOutput(
        kd=kd,
        outlier=outlier,
        info=info if gram else info.new_empty(0),
        refined=or_empty(refined.refined, teacher),
        norms=refined.norms,
        threshold=outliers.threshold,
        outlier_weight=weight,
        columns=refined.hz,
        residual=or_empty(refined.residual, kd, narrow_dtype(product, acc)),
        gram_columns=or_empty(None if found is None else found.grad_factor, kd, gram_dtype),
        d_target=or_empty(None if found is None else found.grad_target, kd, gram_dtype),
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
    """Run the stage ``backward``; see :func:`.backward.run_backward` for the arguments."""
    from singer_kernels.backends.triton import launch
    from singer_kernels.backends.triton.backward import run_backward

    precision = launch.MatmulPrecision(product, acc, launch.architecture(teacher.device))
    teacher = launch.rows_contiguous(teacher)
    student = None if student is None else launch.rows_contiguous(student)
    d_refined = None if d_refined is None else launch.rows_contiguous(d_refined)
    with launch.on_device(teacher):
        grads = run_backward(
            student,
            teacher,
            up,
            columns,
            gram_columns,
            residual,
            norms,
            threshold,
            outlier_weight,
            Upstream(d_kd, d_outlier, d_info, d_refined),
            num_prefix_tokens,
            precision,
            student_dtype,
            down_dtype,
            up_dtype,
        )
    d_student, d_down, d_up = (or_empty(grad, columns) for grad in grads)
    return d_student, d_down, d_up


def _gram_loss(
    tokens: Tensor,
    target: Tensor,
    num_prefix_tokens: int,
    has_d_tokens: bool,
    has_d_target: bool,
    acc: torch.dtype,
    product: torch.dtype,
) -> tuple[Tensor, ...]:
    from singer_kernels.backends.triton import launch
    from singer_kernels.backends.triton.gram_pairs import run_gram_pairs
    from singer_kernels.backends.triton.gram_tile import GramInputs, row_norms
    from singer_kernels.backends.triton.losses import mean_of_partials

    precision = launch.MatmulPrecision(product, acc, launch.architecture(tokens.device))
    tokens, target = launch.rows_contiguous(tokens), launch.rows_contiguous(target)
    with launch.on_device(tokens):
        norms = row_norms(tokens, num_prefix_tokens, acc)
        target_norms = row_norms(target, num_prefix_tokens, acc)
        found = run_gram_pairs(
            GramInputs("materialized", tokens, target, norms, target_norms),
            tokens[:, num_prefix_tokens:],
            num_prefix_tokens,
            precision,
            grad_factor_dtype=acc if has_d_tokens else None,
            grad_target_dtype=acc if has_d_target else None,
        )
        loss = mean_of_partials(found.loss_partials, norms)
    return loss, or_empty(found.grad_factor, loss), or_empty(found.grad_target, loss)


operators.define("triton")
for _name, _implementation in (
    ("triton_losses_forward", losses_forward),
    ("triton_losses_backward", losses_backward),
    ("triton_gram_loss", _gram_loss),
):
    operators.LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
