"""Stage ``refine``: H, Z and what else is needed of each row, the norms, the KD partial sums."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.triton.configs import Config
from singer_kernels.backends.triton.language import (
    dot,
    load_tile,
    operand,
    root,
    split_dot,
    split_dot_transposed,
    store_tile,
    token_offsets,
)
from singer_kernels.backends.triton.launch import Arithmetic, block_of, meta


@triton.jit(do_not_specialize=["num_rows"])
def refine_fwd_kernel(
    teacher_ptr,  # F, [B, T, D]
    student_ptr,  # S, [B, T, D]
    down_ptr,  # Wd, [D, r]
    up_ptr,  # Wu, [r, D]
    overlap_ptr,  # M = Wu Wuᵀ, [r, r]; IDENTITY
    columns_ptr,  # out: [H | Z], [B, P, 2r]
    parts_ptr,  # out: H and L = Z − ½ H M in high and low parts, [B, P, 4, BLOCK_R]; IDENTITY
    residual_ptr,  # out: (F̂ − S) Wuᵀ, [B, P, r]; HAS_RESIDUAL
    norms_ptr,  # out: n, [B, P]
    plain_norms_ptr,  # out: norms of F, [B, P]
    kd_ptr,  # out: sums of (F̂ − S)², [programs]
    refined_ptr,  # out: F̂, [B, T, D]; HAS_REFINED
    rows_ptr,  # out: F̂ for the Gram products, [B, T, D]; HAS_ROWS
    teacher_stride_image,
    teacher_stride_token,
    student_stride_image,
    student_stride_token,
    num_rows,  # B T
    num_tokens,
    num_prefix_tokens,
    width,
    rank,
    IDENTITY: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_REFINED: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``H = F Wd``, ``F̂ = F + H Wu``, ``Z = F̂ Wuᵀ``, ``n = ‖F̂‖``, KD partial ``Σ (F̂ − S)²``.

    One program per BLOCK_T tokens, whatever their image; on prefix tokens H = 0. F is read twice,
    the second time from cache. With IDENTITY ``Z = F Wuᵀ + H M``: to the last digits what the
    Gram identity needs; else Z comes from the rounded F̂, whose error is small beside F̂ itself.
    """
    program = tl.program_id(0)
    row = program * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = row < num_rows
    image = row // num_tokens
    token = row % num_tokens
    is_patch = in_range & (token >= num_prefix_tokens)
    teacher_offsets = token_offsets(image, token, teacher_stride_image, teacher_stride_token)
    student_offsets = token_offsets(image, token, student_stride_image, student_stride_token)
    row_offsets = row.to(tl.int64) * width
    column = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_R)

    hidden = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    latent = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    for start in range(0, width, BLOCK_D):
        d = start + column
        plain = operand(load_tile(teacher_ptr, teacher_offsets, d, in_range, width), OPERAND)
        down = operand(load_tile(down_ptr, d * rank, k, d < width, rank), OPERAND)
        hidden = dot(plain, down, hidden, PRECISION)
        if IDENTITY:
            up = operand(load_tile(up_ptr, k * width, d, k < rank, width), OPERAND)
            latent = dot(plain, tl.trans(up), latent, PRECISION)
    hidden = tl.where(is_patch[:, None], hidden, 0.0)

    patch = image * (num_tokens - num_prefix_tokens) + token - num_prefix_tokens
    rank_offsets = patch.to(tl.int64) * rank
    store_tile(columns_ptr, 2 * rank_offsets, k, is_patch, rank, hidden)
    if IDENTITY:
        # The overlap is symmetric: its rows are its columns.
        overlap = load_tile(overlap_ptr, k * rank, k, k < rank, rank)
        full = split_dot_transposed(hidden, overlap, latent, OPERAND)
        half = 0.5 * (latent + full)
        part_offsets = patch.to(tl.int64) * 4 * BLOCK_R
        high = operand(hidden, OPERAND)
        low = hidden - high.to(ACC)
        store_tile(parts_ptr, part_offsets, k, is_patch, BLOCK_R, high)
        store_tile(parts_ptr + BLOCK_R, part_offsets, k, is_patch, BLOCK_R, low)
        high = operand(half, OPERAND)
        low = half - high.to(ACC)
        store_tile(parts_ptr + 2 * BLOCK_R, part_offsets, k, is_patch, BLOCK_R, high)
        store_tile(parts_ptr + 3 * BLOCK_R, part_offsets, k, is_patch, BLOCK_R, low)
        store_tile(columns_ptr + rank, 2 * rank_offsets, k, is_patch, rank, full)

    residual = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    squares = tl.zeros((BLOCK_T,), ACC)
    plain_squares = tl.zeros((BLOCK_T,), ACC)
    kd = tl.zeros((BLOCK_T,), ACC)
    for start in range(0, width, BLOCK_D):
        d = start + column
        plain = load_tile(teacher_ptr, teacher_offsets, d, in_range, width).to(ACC)
        student = load_tile(student_ptr, student_offsets, d, in_range, width).to(ACC)
        up = operand(load_tile(up_ptr, k * width, d, k < rank, width), OPERAND)
        delta = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        delta = split_dot(hidden, up, delta, OPERAND, PRECISION)
        refined = plain + tl.where(is_patch[:, None], delta, 0.0)
        difference = refined - student
        squares += tl.sum(refined * refined, axis=1)
        plain_squares += tl.sum(plain * plain, axis=1)
        kd += tl.sum(difference * difference, axis=1)
        if not IDENTITY:
            latent = dot(operand(refined, OPERAND), tl.trans(up), latent, PRECISION)
        if HAS_RESIDUAL:
            residual = dot(operand(difference, OPERAND), tl.trans(up), residual, PRECISION)
        if HAS_REFINED:
            store_tile(refined_ptr, row_offsets, d, in_range, width, refined)
        if HAS_ROWS:
            store_tile(rows_ptr, row_offsets, d, in_range, width, refined)
    tl.store(kd_ptr + program, tl.sum(tl.where(in_range, kd, 0.0)))
    tl.store(norms_ptr + patch, root(squares), mask=is_patch)
    tl.store(plain_norms_ptr + patch, root(plain_squares), mask=is_patch)
    if not IDENTITY:
        store_tile(columns_ptr + rank, 2 * rank_offsets, k, is_patch, rank, latent)
    if HAS_RESIDUAL:
        store_tile(residual_ptr, rank_offsets, k, is_patch, rank, residual)


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
