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
from singer_kernels.backends.precision import MatmulPrecision

operators.define("triton")


@operators.implement("triton", "losses_forward")
def losses_forward(x: ForwardInputs) -> ForwardOutput:
    """Run the stages ``refine``, ``outlier`` and ``gram``."""
    from singer_kernels.backends.triton import configs, launch
    from singer_kernels.backends.triton.gram_pairs import run_gram_pairs
    from singer_kernels.backends.triton.gram_rows import run_gram_rows
    from singer_kernels.backends.triton.gram_tile import GramInputs, GramOutput, row_norms
    from singer_kernels.backends.triton.losses import sum_losses
    from singer_kernels.backends.triton.outlier import run_outlier
    from singer_kernels.backends.triton.refine import run_refine

    prefix, (width, rank) = x.num_prefix_tokens, x.down.shape
    x = x._replace(
        student=launch.rows_contiguous(x.student), teacher=launch.rows_contiguous(x.teacher)
    )
    precision = MatmulPrecision(x.product, x.acc)
    gram_precision = MatmulPrecision(x.gram_product, x.acc)
    gram_dtype = gram_precision.storage_dtype
    is_own = x.gram_target is None
    identity = x.gram and is_own and x.product == torch.bfloat16
    identity = identity and configs.takes_identity(rank, width)
    with launch.on_device(x.teacher):
        gram_tokens_dtype = gram_dtype if x.gram and not identity else None
        refined = run_refine(x, precision, identity=identity, gram_tokens_dtype=gram_tokens_dtype)
        teacher_norms = refined.teacher_norms if identity else None
        outliers = run_outlier(refined.norms, teacher_norms, x.quantile)
        gram = GramOutput(None, None, None)
        if x.gram:
            target = x.teacher if x.gram_target is None else launch.rows_contiguous(x.gram_target)
            inputs = GramInputs(
                "identity" if identity else "materialized",
                prefix,
                refined.gram_tokens,
                target,
                refined.norms,
                refined.teacher_norms if is_own else row_norms(target, prefix, x.acc),
                x.up,
                refined.hz,
                refined.split_bf16,
                outliers.cancellation_ratio,
            )
            takes_rows = configs.takes_gram_rows(rank, refined.norms.shape[1])
            if x.has_grad_hz and not x.has_grad_target and takes_rows:
                gram = run_gram_rows(inputs, gram_precision, grad_hz_dtype=gram_dtype)
            else:
                gram = run_gram_pairs(
                    inputs,
                    refined.hz,
                    gram_precision,
                    grad_factor_dtype=gram_dtype if x.has_grad_hz else None,
                    grad_target_dtype=gram_dtype if x.has_grad_target else None,
                )
        kd, outlier, info, weight = sum_losses(
            refined.kd_partials, outliers, gram.loss_partials, x.teacher.shape, prefix
        )
    return ForwardOutput(
        kd=kd,
        outlier=outlier,
        info=info if x.gram else info.new_empty(0),
        refined=or_empty(refined.refined, x.teacher),
        norms=refined.norms,
        threshold=outliers.threshold,
        outlier_weight=weight,
        hz=refined.hz,
        residual=or_empty(refined.residual, kd, precision.storage_dtype),
        grad_hz=or_empty(gram.grad_factor, kd, gram_dtype),
        grad_target=or_empty(gram.grad_target, kd, gram_dtype),
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
    with launch.on_device(x.teacher):
        grads = run_backward(x, MatmulPrecision(x.product, x.acc))
    return BackwardOutput(*(or_empty(grad, x.hz) for grad in grads))


@operators.implement("triton", "gram_loss")
def gram_loss(x: GramLossInputs) -> GramLossOutput:
    """Run the stage ``gram`` on two tensors of tokens."""
    from singer_kernels.backends.triton import launch
    from singer_kernels.backends.triton.gram_pairs import run_gram_pairs
    from singer_kernels.backends.triton.gram_tile import GramInputs, row_norms

    prefix = x.num_prefix_tokens
    tokens, target = launch.rows_contiguous(x.tokens), launch.rows_contiguous(x.target)
    with launch.on_device(tokens):
        norms, target_norms = (row_norms(rows, prefix, x.acc) for rows in (tokens, target))
        gram = run_gram_pairs(
            GramInputs("materialized", prefix, tokens, target, norms, target_norms),
            tokens[:, prefix:],
            MatmulPrecision(x.product, x.acc),
            grad_factor_dtype=x.acc if x.has_grad_tokens else None,
            grad_target_dtype=x.acc if x.has_grad_target else None,
        )
        loss = gram.loss_partials.sum() / (norms.numel() * norms.shape[1])
    return GramLossOutput(loss, or_empty(gram.grad_factor, loss), or_empty(gram.grad_target, loss))
