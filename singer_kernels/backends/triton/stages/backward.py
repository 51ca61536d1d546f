"""Stage ``backward``."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from singer_kernels.backends.operators import Upstream
from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.kernels.backward import (
    backward_rows_kernel,
    backward_tokens_kernel,
    sum_parts_kernel,
)
from singer_kernels.backends.triton.stages.common import (
    Arithmetic,
    block_of,
    compiling,
    kernel_dtype,
    meta,
)


def run_backward(
    student: Tensor | None,
    teacher: Tensor,
    up: Tensor,
    columns: Tensor,
    gram_columns: Tensor | None,
    residual: Tensor | None,
    norms: Tensor | None,
    threshold: Tensor | None,
    outlier_weight: Tensor | None,
    upstream: Upstream,
    prefix: int,
    arithmetic: Arithmetic,
    student_dtype: torch.dtype | None,
    down_dtype: torch.dtype | None,
    up_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run the stage ``backward``.

    Args:
        student: S, ``[B, T, D]``; needed with ``upstream.kd``.
        teacher: F, ``[B, T, D]``.
        up: Wu, ``[r, D]``, contiguous, rounded to the products' dtype.
        columns: ``[H | Z]``, ``[B, P, 2r]``.
        gram_columns: ``X [H | Z]``; needed with ``upstream.info``.
        residual: ``(F̂ − S) Wuᵀ``, ``[B, P, r]``; needed with ``upstream.kd``.
        norms: n, ``[B, P]``; needed with ``upstream.outlier``, as are the next two.
        threshold: q, ``[B]``.
        outlier_weight: 2 / count.
        upstream: the gradients that come back.
        prefix: the number of prefix tokens.
        arithmetic: how products are computed.
        student_dtype: the dtype of dS; None: it is not asked for.
        down_dtype: the dtype of dWd; likewise.
        up_dtype: the dtype of dWu; likewise.

    Returns:
        dS, dWd and dWu; None where not asked for, or where the gradient is nothing but 0.
    """
    images, tokens, width = teacher.shape
    rank, patches = up.shape[0], tokens - prefix
    block_r, acc = block_of(rank), arithmetic.acc
    has_kd, has_refined = upstream.kd is not None, upstream.refined is not None
    has_turned = upstream.outlier is not None or upstream.info is not None
    needs_student = student_dtype is not None and has_kd
    reaches_adapter = has_kd or has_refined or has_turned
    needs_down = down_dtype is not None and reaches_adapter
    needs_up = up_dtype is not None and reaches_adapter
    new = teacher.new_empty
    options = arithmetic.options(rank)
    d_hidden = turned = d_student = None
    back_strides = (0, 0) if upstream.refined is None else upstream.refined.stride()[:2]
    student_strides = (0, 0) if student is None else student.stride()[:2]
    if needs_down or (needs_up and has_turned):
        d_hidden = new((images, patches, rank), dtype=arithmetic.kept)
        turned = new((images, patches, rank), dtype=arithmetic.kept)

        def by_rows(config: configs.Config) -> None:
            backward_rows_kernel[(triton.cdiv(images * patches, config.rows),)](
                columns,
                gram_columns,
                residual,
                norms,
                threshold,
                outlier_weight,
                up,
                upstream.refined,
                upstream.kd,
                upstream.outlier,
                upstream.info,
                d_hidden,
                turned,
                *back_strides,
                images * patches,
                patches,
                prefix,
                width,
                rank,
                images,
                HAS_KD=has_kd and needs_down,
                HAS_OUTLIER=upstream.outlier is not None,
                HAS_INFO=upstream.info is not None,
                HAS_REFINED=has_refined and needs_down,
                **options,
                **meta(config, block_r),
            )

        sizes = (images, patches, width, has_kd, has_turned, has_refined)
        arithmetic.run("backward_rows", rank, by_rows, *sizes)
    if not (needs_student or needs_down or needs_up):
        return None, None, None
    if needs_student:
        d_student = new((images, tokens, width), dtype=student_dtype)

    def by_tokens(config: configs.Config) -> tuple[Tensor | None, Tensor | None]:
        blocks = triton.cdiv(images * tokens, config.rows)
        rows_per_split = config.rows * triton.cdiv(blocks, configs.SPLITS)
        splits = triton.cdiv(images * tokens, rows_per_split)
        down_parts = new((splits, width, rank), dtype=acc) if needs_down else None
        up_parts = new((splits, width, rank), dtype=acc) if needs_up else None
        backward_tokens_kernel[(triton.cdiv(width, config.inner), splits)](
            teacher,
            student,
            up,
            columns,
            d_hidden,
            turned,
            upstream.refined,
            upstream.kd,
            d_student,
            down_parts,
            up_parts,
            *teacher.stride()[:2],
            *student_strides,
            *back_strides,
            images * tokens,
            tokens,
            prefix,
            width,
            rank,
            rows_per_split,
            HAS_KD=has_kd,
            HAS_TURNED=has_turned,
            HAS_REFINED=has_refined,
            NEEDS_STUDENT=needs_student,
            NEEDS_DOWN=needs_down,
            NEEDS_UP=needs_up,
            **options,
            **meta(config, block_r),
        )
        return down_parts, up_parts

    flags = (has_kd, has_turned, has_refined, needs_student, needs_down, needs_up)
    down_parts, up_parts = arithmetic.run(
        "backward_tokens", rank, by_tokens, images, tokens, width, *flags
    )
    if not (needs_down or needs_up):
        return d_student, None, None
    d_down = new((width, rank), dtype=down_dtype) if needs_down else None
    d_up = new((rank, width), dtype=up_dtype) if needs_up else None
    splits = next(len(parts) for parts in (down_parts, up_parts) if parts is not None)
    columns_each = max(16, 1024 // block_r)
    sum_parts_kernel[(triton.cdiv(width, columns_each), 2)](
        down_parts,
        up_parts,
        d_down,
        d_up,
        splits,
        width,
        rank,
        NEEDS_DOWN=needs_down,
        NEEDS_UP=needs_up,
        BLOCK_D=columns_each,
        BLOCK_R=block_r,
        ACC=kernel_dtype(acc),
        **compiling(configs.SUMS),
    )
    return d_student, d_down, d_up
