"""Stage ``backward``: dS, dWd and dWu in one pass over F and S, and the sums in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.operators import Upstream
from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.language import (
    dot,
    load_tile,
    number,
    operand,
    split_dot,
    store_tile,
    token_offsets,
)
from singer_kernels.backends.triton.launch import (
    Arithmetic,
    block_of,
    compiling,
    kernel_dtype,
    meta,
)


@triton.jit(do_not_specialize=["num_patches_in_all", "num_images"])
def backward_rows_kernel(
    columns_ptr,  # [H | Z], [B, P, 2r]
    gram_columns_ptr,  # X [H | Z], [B, P, 2r]; HAS_INFO
    residual_ptr,  # (F̂ − S) Wuᵀ, [B, P, r]; HAS_KD
    norms_ptr,  # n, [B, P]; HAS_OUTLIER
    threshold_ptr,  # q, [B]; HAS_OUTLIER
    outlier_weight_ptr,  # 2 / count, []; HAS_OUTLIER
    up_ptr,  # Wu, [r, D]; HAS_REFINED
    d_refined_ptr,  # Y, [B, T, D]; HAS_REFINED
    d_kd_ptr,  # upstream gradients, []
    d_outlier_ptr,
    d_info_ptr,
    d_hidden_ptr,  # out: dH, [B, P, r]
    turned_ptr,  # out: V, [B, P, r]
    d_refined_stride_image,
    d_refined_stride_token,
    num_patches_in_all,  # B P
    num_patches,
    num_prefix_tokens,
    width,
    rank,
    num_images,
    HAS_KD: tl.constexpr,
    HAS_OUTLIER: tl.constexpr,
    HAS_INFO: tl.constexpr,
    HAS_REFINED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``V = X H + c H`` and ``dH = X Z + c Z + α (F̂ − S) Wuᵀ + Y Wuᵀ`` of BLOCK_T patches.

    ``c = 2 (n − q)₊ / (count n)``, ``α = 2 / (B T D)``; each term times its upstream gradient.
    """
    patch = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = patch < num_patches_in_all
    k = tl.arange(0, BLOCK_R)
    offsets = patch.to(tl.int64) * rank
    d_hidden = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    turned = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    if HAS_REFINED:
        image, token = patch // num_patches, patch % num_patches + num_prefix_tokens
        token_offset = token_offsets(image, token, d_refined_stride_image, d_refined_stride_token)
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            up = operand(load_tile(up_ptr, k * width, d, k < rank, width), OPERAND)
            back = operand(load_tile(d_refined_ptr, token_offset, d, mask, width), OPERAND)
            d_hidden = dot(back, tl.trans(up), d_hidden, PRECISION)
    if HAS_KD:
        num_tokens = num_patches + num_prefix_tokens
        alpha = 2.0 / (number(num_images, ACC) * num_tokens * width)
        alpha = tl.load(d_kd_ptr).to(ACC) * alpha
        d_hidden += alpha * load_tile(residual_ptr, offsets, k, mask, rank).to(ACC)
    if HAS_OUTLIER:
        norms = tl.load(norms_ptr + patch, mask=mask, other=0.0)
        threshold = tl.load(threshold_ptr + patch // num_patches, mask=mask, other=0.0)
        is_within = (norms <= threshold) & (tl.abs(norms) < float("inf"))
        excess = tl.where(is_within, 0.0, norms - threshold)
        weight = tl.load(outlier_weight_ptr) * tl.load(d_outlier_ptr).to(ACC)
        coefficient = tl.where(norms == 0, 0.0, weight * excess / norms)[:, None]
        turned += coefficient * load_tile(columns_ptr, 2 * offsets, k, mask, rank)
        d_hidden += coefficient * load_tile(columns_ptr + rank, 2 * offsets, k, mask, rank)
    if HAS_INFO:
        d_info = tl.load(d_info_ptr).to(ACC)
        turned += d_info * load_tile(gram_columns_ptr, 2 * offsets, k, mask, rank).to(ACC)
        d_hidden += d_info * load_tile(gram_columns_ptr + rank, 2 * offsets, k, mask, rank).to(ACC)
    store_tile(d_hidden_ptr, offsets, k, mask, rank, d_hidden)
    store_tile(turned_ptr, offsets, k, mask, rank, turned)


@triton.jit(do_not_specialize=["num_rows", "rows_per_split"])
def backward_tokens_kernel(
    teacher_ptr,  # F, [B, T, D]
    student_ptr,  # S, [B, T, D]; HAS_KD
    up_ptr,  # Wu, [r, D]
    columns_ptr,  # [H | Z], [B, P, 2r]
    d_hidden_ptr,  # dH, [B, P, r]; NEEDS_DOWN
    turned_ptr,  # V, [B, P, r]; NEEDS_UP
    d_refined_ptr,  # Y, [B, T, D]; HAS_REFINED
    d_kd_ptr,  # upstream gradient, []; HAS_KD
    d_student_ptr,  # out: dS, [B, T, D]; NEEDS_STUDENT
    d_down_ptr,  # out: parts of dWd, [splits, D, r]; NEEDS_DOWN
    d_up_ptr,  # out: parts of dWuᵀ, [splits, D, r]; NEEDS_UP
    teacher_stride_image,
    teacher_stride_token,
    student_stride_image,
    student_stride_token,
    d_refined_stride_image,
    d_refined_stride_token,
    num_rows,  # B T
    num_tokens,
    num_prefix_tokens,
    width,
    rank,
    rows_per_split,  # a multiple of BLOCK_T
    HAS_KD: tl.constexpr,
    HAS_TURNED: tl.constexpr,
    HAS_REFINED: tl.constexpr,
    NEEDS_STUDENT: tl.constexpr,
    NEEDS_DOWN: tl.constexpr,
    NEEDS_UP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``dS = α (S − F̂)``, ``dWd = Fᵀ dH``, ``dWu = Vᵀ F̂ + Hᵀ (Y − dS)``, BLOCK_D columns of each.

    One program per split of the tokens and block of columns; the parts are summed by
    ``sum_parts_kernel``. Prefix tokens reach dS alone.
    """
    block_d, split = tl.program_id(0), tl.program_id(1)
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_R)
    up = operand(load_tile(up_ptr, k * width, d, k < rank, width), OPERAND)
    d_down = tl.zeros((BLOCK_D, BLOCK_R), ACC)
    d_up = tl.zeros((BLOCK_D, BLOCK_R), ACC)
    num_patches = num_tokens - num_prefix_tokens
    if HAS_KD:
        alpha = 2.0 / (number(num_rows, ACC) * width)
        alpha = tl.load(d_kd_ptr).to(ACC) * alpha
    begin = split * rows_per_split
    for start in range(begin, min(begin + rows_per_split, num_rows), BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        in_range = row < num_rows
        image, token = row // num_tokens, row % num_tokens
        is_patch = in_range & (token >= num_prefix_tokens)
        patch = image * num_patches + token - num_prefix_tokens
        rank_offsets = patch.to(tl.int64) * rank
        offsets = token_offsets(image, token, teacher_stride_image, teacher_stride_token)
        plain = load_tile(teacher_ptr, offsets, d, in_range, width)
        hidden = load_tile(columns_ptr, 2 * rank_offsets, k, is_patch, rank)
        delta = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        delta = split_dot(hidden, up, delta, OPERAND, PRECISION)
        refined = plain.to(ACC) + tl.where(is_patch[:, None], delta, 0.0)
        back = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        if HAS_KD:
            offsets = token_offsets(image, token, student_stride_image, student_stride_token)
            student = load_tile(student_ptr, offsets, d, in_range, width).to(ACC)
            back = alpha * (refined - student)
            if NEEDS_STUDENT:
                row_offsets = row.to(tl.int64) * width
                store_tile(d_student_ptr, row_offsets, d, in_range, width, -back)
        if NEEDS_DOWN:
            inner = load_tile(d_hidden_ptr, rank_offsets, k, is_patch, rank)
            left = operand(tl.where(is_patch[:, None], plain, 0.0), OPERAND)
            d_down = dot(tl.trans(left), operand(inner, OPERAND), d_down, PRECISION)
        if NEEDS_UP:
            if HAS_TURNED:
                inner = load_tile(turned_ptr, rank_offsets, k, is_patch, rank)
                left = operand(tl.where(is_patch[:, None], refined, 0.0), OPERAND)
                d_up = dot(tl.trans(left), operand(inner, OPERAND), d_up, PRECISION)
            if HAS_REFINED:
                offsets = token_offsets(
                    image, token, d_refined_stride_image, d_refined_stride_token
                )
                back += load_tile(d_refined_ptr, offsets, d, in_range, width).to(ACC)
            if HAS_KD or HAS_REFINED:
                left = operand(tl.where(is_patch[:, None], back, 0.0), OPERAND)
                d_up = dot(tl.trans(left), operand(hidden, OPERAND), d_up, PRECISION)
    offsets = (split * width + d).to(tl.int64) * rank
    if NEEDS_DOWN:
        store_tile(d_down_ptr, offsets, k, d < width, rank, d_down)
    if NEEDS_UP:
        store_tile(d_up_ptr, offsets, k, d < width, rank, d_up)


@triton.jit(do_not_specialize=["num_parts"])
def sum_parts_kernel(
    d_down_parts_ptr,  # [num_parts, D, r]; NEEDS_DOWN
    d_up_parts_ptr,  # [num_parts, D, r]; NEEDS_UP
    d_down_ptr,  # out: dWd, [D, r]; NEEDS_DOWN
    d_up_ptr,  # out: dWu, [r, D]; NEEDS_UP
    num_parts,
    width,
    rank,
    NEEDS_DOWN: tl.constexpr,
    NEEDS_UP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    """The parts' sums, in their order: program (·, 0) for dWd, (·, 1) for dWu."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_D, BLOCK_R), ACC)
    if tl.program_id(1) == 0:
        if NEEDS_DOWN:
            for part in range(num_parts):
                offsets = (part * width + d).to(tl.int64) * rank
                total += load_tile(d_down_parts_ptr, offsets, k, d < width, rank)
            store_tile(d_down_ptr, d.to(tl.int64) * rank, k, d < width, rank, total)
    else:
        if NEEDS_UP:
            for part in range(num_parts):
                offsets = (part * width + d).to(tl.int64) * rank
                total += load_tile(d_up_parts_ptr, offsets, k, d < width, rank)
            store_tile(d_up_ptr, k.to(tl.int64) * width, d, k < rank, width, tl.trans(total))


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
