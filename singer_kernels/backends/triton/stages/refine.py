"""Stage ``refine``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from singer_kernels.backends.triton.configs import Config
from singer_kernels.backends.triton.kernels.refine import refine_fwd_kernel
from singer_kernels.backends.triton.stages.common import Arithmetic, block_of, meta


class Refined(NamedTuple):
    """What the stage ``refine`` gives; what was not asked for is None."""

    columns: Tensor  # [H | Z], [B, P, 2r]
    norms: Tensor  # n, [B, P]
    plain_norms: Tensor  # norms of F, [B, P]
    kd_parts: Tensor  # [programs]
    parts: Tensor | None  # H and L in high and low parts, [B, P, 4, BLOCK_R]
    residual: Tensor | None  # (F̂ − S) Wuᵀ, [B, P, r]
    refined: Tensor | None  # F̂, [B, T, D], in the teacher's dtype
    rows: Tensor | None  # F̂, [B, T, D], for the Gram products


def run_refine(
    student: Tensor,
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    prefix: int,
    arithmetic: Arithmetic,
    *,
    identity: bool,
    residual_dtype: torch.dtype | None,
    has_refined: bool,
    rows_dtype: torch.dtype | None,
) -> Refined:
    """Run the stage ``refine``.

    Args:
        student: S, ``[B, T, D]``.
        teacher: F, ``[B, T, D]``.
        down: Wd, ``[D, r]``, contiguous, rounded to the products' dtype.
        up: Wu, ``[r, D]``, likewise.
        prefix: the number of prefix tokens.
        arithmetic: how products are computed.
        identity: whether the Gram identity's parts are needed.
        residual_dtype: the dtype of ``(F̂ − S) Wuᵀ``; None: it is not needed.
        has_refined: whether F̂ is, in the teacher's dtype.
        rows_dtype: the dtype in which the Gram products want F̂; None: they don't.
    """
    images, tokens, width = teacher.shape
    rank, patches = down.shape[1], tokens - prefix
    block_r, acc = block_of(rank), arithmetic.acc
    new = teacher.new_empty
    columns = new((images, patches, 2 * rank), dtype=acc)
    parts = None
    if identity:
        parts = new((images, patches, 4, block_r), dtype=arithmetic.product)
    has_residual, residual = residual_dtype is not None, None
    if has_residual:
        residual = new((images, patches, rank), dtype=residual_dtype)
    norms, plain_norms = (new((images, patches), dtype=acc) for _ in range(2))
    refined = new((images, tokens, width)) if has_refined else None
    rows, writes_rows = None, False
    if rows_dtype is not None:
        writes_rows = refined is None or refined.dtype != rows_dtype
        rows = new((images, tokens, width), dtype=rows_dtype) if writes_rows else refined
    # Rounded operands are exact in float32 and in TF32: this product rounds nothing but its sums.
    overlap = torch.mm(up.to(acc), up.to(acc).T) if identity else None

    def attempt(config: Config) -> Tensor:
        programs = triton.cdiv(images * tokens, config.rows)
        kd_parts = new((programs,), dtype=acc)
        refine_fwd_kernel[(programs,)](
            teacher,
            student,
            down,
            up,
            overlap,
            columns,
            parts,
            residual,
            norms,
            plain_norms,
            kd_parts,
            refined,
            rows,
            *teacher.stride()[:2],
            *student.stride()[:2],
            images * tokens,
            tokens,
            prefix,
            width,
            rank,
            IDENTITY=identity,
            HAS_RESIDUAL=has_residual,
            HAS_REFINED=has_refined,
            HAS_ROWS=writes_rows,
            **arithmetic.options(rank),
            **meta(config, block_r),
        )
        return kd_parts

    sizes = (images, tokens, width, identity, has_residual, has_refined, writes_rows)
    kd_parts = arithmetic.run("refine", rank, attempt, *sizes)
    return Refined(columns, norms, plain_norms, kd_parts, parts, residual, refined, rows)
