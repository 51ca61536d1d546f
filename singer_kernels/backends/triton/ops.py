"""The stages as operators of torch, for torch.compile, export and CUDA graphs.

Registered without importing Triton, which the first call does.
"""

from __future__ import annotations

import torch

from singer_kernels.backends import operators
from singer_kernels.backends.operators import (
    BackwardInputs,
    BackwardOutput,
    ForwardInputs,
    ForwardOutput,
    GramLossInputs,
    GramLossOutput,
    or_empty,
)

operators.define("triton")


@operators.implement("triton", "losses_forward")
def losses_forward(x: ForwardInputs) -> ForwardOutput:
    """Run the stages ``refine``, ``outlier`` and ``gram``."""
    from singer_kernels.backends.triton import configs, launch
    from singer_kernels.backends.triton.gram_pairs import run_gram_pairs
    from singer_kernels.backends.triton.gram_rows import run_gram_rows
    from singer_kernels.backends.triton.gram_tile import GramInputs, row_norms
    from singer_kernels.backends.triton.losses import sum_losses
    from singer_kernels.backends.triton.outlier import run_outlier
    from singer_kernels.backends.triton.refine import run_refine

    prefix, (width, rank) = x.num_prefix_tokens, x.down.shape
    arch = launch.architecture(x.teacher.device)
    precision = launch.MatmulPrecision(x.product, x.acc, arch)
    gram_precision = launch.MatmulPrecision(x.gram_product, x.acc, arch)
    student, teacher = launch.rows_contiguous(x.student), launch.rows_contiguous(x.teacher)
    is_own = x.gram_target is None
    identity = x.gram and is_own and x.product == torch.bfloat16
    identity = identity and configs.takes_identity(rank, width)
    gram_dtype = gram_precision.storage_dtype
    with launch.on_device(teacher):
        refined = run_refine(
            student,
            teacher,
            x.down,
            x.up,
            prefix,
            precision,
            identity=identity,
            residual_dtype=precision.storage_dtype if x.has_residual else None,
            has_refined=x.has_refined,
            gram_tokens_dtype=gram_dtype if x.gram and not identity else None,
        )
        teacher_norms = refined.teacher_norms if identity else None
        outliers = run_outlier(refined.norms, teacher_norms, x.quantile)
        found = None
        if x.gram:
            target = teacher if x.gram_target is None else launch.rows_contiguous(x.gram_target)
            target_norms = refined.teacher_norms if is_own else row_norms(target, prefix, x.acc)
            inputs = GramInputs(
                "identity" if identity else "materialized",
                refined.gram_tokens,
                target,
                refined.norms,
                target_norms,
                x.up,
                refined.hz,
                refined.split_bf16,
                outliers.cancellation_ratio,
            )
            takes_rows = configs.takes_gram_rows(rank, refined.norms.shape[1])
            if x.has_grad_hz and not x.has_grad_target and takes_rows:
                found = run_gram_rows(inputs, prefix, gram_precision, grad_hz_dtype=gram_dtype)
            else:
                found = run_gram_pairs(
                    inputs,
                    refined.hz,
                    prefix,
                    gram_precision,
                    grad_factor_dtype=gram_dtype if x.has_grad_hz else None,
                    grad_target_dtype=gram_dtype if x.has_grad_target else None,
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
        info=info if x.gram else info.new_empty(0),
        refined=or_empty(refined.refined, teacher),
        norms=refined.norms,
        threshold=outliers.threshold,
        outlier_weight=weight,
        hz=refined.hz,
        residual=or_empty(refined.residual, kd, precision.storage_dtype),
        grad_hz=or_empty(None if found is None else found.grad_factor, kd, gram_dtype),
        grad_target=or_empty(None if found is None else found.grad_target, kd, gram_dtype),
    )


@operators.implement("triton", "losses_backward")
def losses_backward(x: BackwardInputs) -> BackwardOutput:
    """Run the stage ``backward``."""
    from singer_kernels.backends.triton import launch
    from singer_kernels.backends.triton.backward import run_backward

    x = x._replace(
        student=None if x.student is None else launch.rows_contiguous(x.student),
        teacher=launch.rows_contiguous(x.teacher),
        grad_refined=None if x.grad_refined is None else launch.rows_contiguous(x.grad_refined),
    )
    precision = launch.MatmulPrecision(x.product, x.acc, launch.architecture(x.teacher.device))
    with launch.on_device(x.teacher):
        grads = run_backward(x, precision)
    return BackwardOutput(*(or_empty(grad, x.hz) for grad in grads))


@operators.implement("triton", "gram_loss")
def gram_loss(x: GramLossInputs) -> GramLossOutput:
    """Run the stage ``gram`` on two tensors of tokens."""
    from singer_kernels.backends.triton import launch
    from singer_kernels.backends.triton.gram_pairs import run_gram_pairs
    from singer_kernels.backends.triton.gram_tile import GramInputs, row_norms
    from singer_kernels.backends.triton.losses import mean_of_partials

    prefix = x.num_prefix_tokens
    precision = launch.MatmulPrecision(x.product, x.acc, launch.architecture(x.tokens.device))
    tokens, target = launch.rows_contiguous(x.tokens), launch.rows_contiguous(x.target)
    with launch.on_device(tokens):
        norms = row_norms(tokens, prefix, x.acc)
        target_norms = row_norms(target, prefix, x.acc)
        found = run_gram_pairs(
            GramInputs("materialized", tokens, target, norms, target_norms),
            tokens[:, prefix:],
            prefix,
            precision,
            grad_factor_dtype=x.acc if x.has_grad_tokens else None,
            grad_target_dtype=x.acc if x.has_grad_target else None,
        )
        loss = mean_of_partials(found.loss_partials, norms)
    return GramLossOutput(
        loss, or_empty(found.grad_factor, loss), or_empty(found.grad_target, loss)
    )
