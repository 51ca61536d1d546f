"""Stage ``backward``: dS, dWd and dWu in one pass over F and S, summed in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.operators import BackwardInputs
from singer_kernels.backends.precision import MatmulPrecision
from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.language import (
    dot,
    load_tile,
    operand,
    split_dot,
    store_tile,
    to_scalar,
    token_offsets,
)
from singer_kernels.backends.triton.launch import (
    block_of,
    compiler_options,
    kernel_dtype,
    kernel_options,
    meta_params,
    run_configured,
    token_strides,
)


# A gradient may be an entry of a larger tensor (of stacked losses): its alignment makes no variant.
@triton.jit(
    do_not_specialize=["total_patches", "num_images"],
    do_not_specialize_on_alignment=["grad_kd_ptr", "grad_outlier_ptr", "grad_info_ptr"],
)
def backward_rows_kernel(
    hz_ptr,  # [H | Z], [B, P, 2r]
    grad_hz_ptr,  # X [H | Z], [B, P, 2r]; HAS_INFO
    residual_ptr,  # (F̂ − S) Wuᵀ, [B, P, r]; HAS_KD
    norms_ptr,  # n, [B, P]; HAS_OUTLIER
    threshold_ptr,  # q, [B]; HAS_OUTLIER
    outlier_weight_ptr,  # 2 / count, []; HAS_OUTLIER
    up_ptr,  # Wu, [r, D]; HAS_REFINED
    grad_refined_ptr,  # Y, [B, T, D]; HAS_REFINED
    grad_kd_ptr,  # gradient of the kd output, []; HAS_KD
    grad_outlier_ptr,  # of the outlier output, []; HAS_OUTLIER
    grad_info_ptr,  # of the info output, []; HAS_INFO
    grad_h_ptr,  # out: dH, [B, P, r]
    v_ptr,  # out: V, [B, P, r]
    grad_refined_stride_image,
    grad_refined_stride_token,
    total_patches,  # B P
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

    ``c = 2 (n − q)₊ / (count n)``, ``α = 2 / (B T D)``; each term times its output's gradient.
    """
    patch = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask = patch < total_patches
    k = tl.arange(0, BLOCK_R)
    offsets = patch.to(tl.int64) * rank
    grad_h = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    v = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    # 1. dH = Y Wuᵀ over D
    if HAS_REFINED:
        image, token = patch // num_patches, patch % num_patches + num_prefix_tokens
        token_offset = token_offsets(
            image, token, grad_refined_stride_image, grad_refined_stride_token
        )
        for start in range(0, width, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            up = operand(load_tile(up_ptr, k * width, d, k < rank, width), OPERAND)
            y = operand(load_tile(grad_refined_ptr, token_offset, d, mask, width), OPERAND)
            grad_h = dot(y, tl.trans(up), grad_h, PRECISION)
    # 2. dH += α (F̂ − S) Wuᵀ
    if HAS_KD:
        num_tokens = num_patches + num_prefix_tokens
        alpha = 2.0 / (to_scalar(num_images, ACC) * num_tokens * width)
        alpha = tl.load(grad_kd_ptr).to(ACC) * alpha
        grad_h += alpha * load_tile(residual_ptr, offsets, k, mask, rank).to(ACC)
    # 3. V += c H and dH += c Z
    if HAS_OUTLIER:
        norms = tl.load(norms_ptr + patch, mask=mask, other=0.0)
        threshold = tl.load(threshold_ptr + patch // num_patches, mask=mask, other=0.0)
        is_inlier = (norms <= threshold) & (tl.abs(norms) < float("inf"))
        excess = tl.where(is_inlier, 0.0, norms - threshold)
        weight = tl.load(outlier_weight_ptr) * tl.load(grad_outlier_ptr).to(ACC)
        coefficient = tl.where(norms == 0, 0.0, weight * excess / norms)[:, None]
        v += coefficient * load_tile(hz_ptr, 2 * offsets, k, mask, rank)
        grad_h += coefficient * load_tile(hz_ptr + rank, 2 * offsets, k, mask, rank)
    # 4. V += X H and dH += X Z
    if HAS_INFO:
        grad_info = tl.load(grad_info_ptr).to(ACC)
        v += grad_info * load_tile(grad_hz_ptr, 2 * offsets, k, mask, rank).to(ACC)
        grad_h += grad_info * load_tile(grad_hz_ptr + rank, 2 * offsets, k, mask, rank).to(ACC)
    store_tile(grad_h_ptr, offsets, k, mask, rank, grad_h)
    store_tile(v_ptr, offsets, k, mask, rank, v)


@triton.jit(
    do_not_specialize=["num_rows", "rows_per_split"],
    do_not_specialize_on_alignment=["grad_kd_ptr"],
)
def backward_tokens_kernel(
    teacher_ptr,  # F, [B, T, D]
    student_ptr,  # S, [B, T, D]; HAS_KD
    up_ptr,  # Wu, [r, D]
    hz_ptr,  # [H | Z], [B, P, 2r]
    grad_h_ptr,  # dH, [B, P, r]; NEEDS_DOWN
    v_ptr,  # V, [B, P, r]; NEEDS_UP
    grad_refined_ptr,  # Y, [B, T, D]; HAS_REFINED
    grad_kd_ptr,  # gradient of the kd output, []; HAS_KD
    grad_student_ptr,  # out: dS, [B, T, D]; NEEDS_STUDENT
    grad_down_ptr,  # out: partial sums of dWd, [splits, D, r]; NEEDS_DOWN
    grad_up_ptr,  # out: partial sums of dWuᵀ, [splits, D, r]; NEEDS_UP
    teacher_stride_image,
    teacher_stride_token,
    student_stride_image,
    student_stride_token,
    grad_refined_stride_image,
    grad_refined_stride_token,
    num_rows,  # B T
    num_tokens,
    num_prefix_tokens,
    width,
    rank,
    rows_per_split,  # a multiple of BLOCK_T
    HAS_KD: tl.constexpr,
    HAS_V: tl.constexpr,
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

    One program per split of the rows of ``[B T, D]`` and block of columns;
    ``sum_partials_kernel`` adds the splits. Prefix tokens contribute to dS alone.
    """
    block_d, split = tl.program_id(0), tl.program_id(1)
    d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_R)
    up = operand(load_tile(up_ptr, k * width, d, k < rank, width), OPERAND)
    grad_down = tl.zeros((BLOCK_D, BLOCK_R), ACC)
    grad_up = tl.zeros((BLOCK_D, BLOCK_R), ACC)
    num_patches = num_tokens - num_prefix_tokens
    if HAS_KD:
        alpha = 2.0 / (to_scalar(num_rows, ACC) * width)
        alpha = tl.load(grad_kd_ptr).to(ACC) * alpha
    begin = split * rows_per_split
    for start in range(begin, min(begin + rows_per_split, num_rows), BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        in_range = row < num_rows
        image, token = row // num_tokens, row % num_tokens
        is_patch = in_range & (token >= num_prefix_tokens)
        patch = image * num_patches + token - num_prefix_tokens
        rank_offsets = patch.to(tl.int64) * rank
        offsets = token_offsets(image, token, teacher_stride_image, teacher_stride_token)
        # 1. F̂ = F + H Wu
        teacher = load_tile(teacher_ptr, offsets, d, in_range, width)
        h = load_tile(hz_ptr, 2 * rank_offsets, k, is_patch, rank)
        delta = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        delta = split_dot(h, up, delta, OPERAND, PRECISION)
        refined = teacher.to(ACC) + tl.where(is_patch[:, None], delta, 0.0)
        # 2. gradient in F̂ of the kd loss, α (F̂ − S) = −dS
        grad_delta = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        if HAS_KD:
            offsets = token_offsets(image, token, student_stride_image, student_stride_token)
            student = load_tile(student_ptr, offsets, d, in_range, width).to(ACC)
            grad_delta = alpha * (refined - student)
            if NEEDS_STUDENT:
                row_offsets = row.to(tl.int64) * width
                store_tile(grad_student_ptr, row_offsets, d, in_range, width, -grad_delta)
        # 3. dWd += Fᵀ dH
        if NEEDS_DOWN:
            inner = load_tile(grad_h_ptr, rank_offsets, k, is_patch, rank)
            left = operand(tl.where(is_patch[:, None], teacher, 0.0), OPERAND)
            grad_down = dot(tl.trans(left), operand(inner, OPERAND), grad_down, PRECISION)
        # 4. dWuᵀ += F̂ᵀ V + (Y − dS)ᵀ H
        if NEEDS_UP:
            if HAS_V:
                inner = load_tile(v_ptr, rank_offsets, k, is_patch, rank)
                left = operand(tl.where(is_patch[:, None], refined, 0.0), OPERAND)
                grad_up = dot(tl.trans(left), operand(inner, OPERAND), grad_up, PRECISION)
            if HAS_REFINED:
                offsets = token_offsets(
                    image, token, grad_refined_stride_image, grad_refined_stride_token
                )
                grad_delta += load_tile(grad_refined_ptr, offsets, d, in_range, width).to(ACC)
            if HAS_KD or HAS_REFINED:
                left = operand(tl.where(is_patch[:, None], grad_delta, 0.0), OPERAND)
                grad_up = dot(tl.trans(left), operand(h, OPERAND), grad_up, PRECISION)
    offsets = (split * width + d).to(tl.int64) * rank
    if NEEDS_DOWN:
        store_tile(grad_down_ptr, offsets, k, d < width, rank, grad_down)
    if NEEDS_UP:
        store_tile(grad_up_ptr, offsets, k, d < width, rank, grad_up)


@triton.jit(do_not_specialize=["num_partials"])
def sum_partials_kernel(
    grad_down_partials_ptr,  # [num_partials, D, r]; NEEDS_DOWN
    grad_up_partials_ptr,  # [num_partials, D, r]; NEEDS_UP
    grad_down_ptr,  # out: dWd, [D, r]; NEEDS_DOWN
    grad_up_ptr,  # out: dWu, [r, D]; NEEDS_UP
    num_partials,
    width,
    rank,
    NEEDS_DOWN: tl.constexpr,
    NEEDS_UP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
):
    """Sum the splits of dWd (program (·, 0)) and dWuᵀ (program (·, 1)), in their order."""
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_D, BLOCK_R), ACC)
    # 1. dWd, BLOCK_D rows of [D, r]
    if tl.program_id(1) == 0:
        if NEEDS_DOWN:
            for split in range(num_partials):
                offsets = (split * width + d).to(tl.int64) * rank
                total += load_tile(grad_down_partials_ptr, offsets, k, d < width, rank)
            store_tile(grad_down_ptr, d.to(tl.int64) * rank, k, d < width, rank, total)
    # 2. dWu, BLOCK_D columns of [r, D]: the transpose of the sum
    else:
        if NEEDS_UP:
            for split in range(num_partials):
                offsets = (split * width + d).to(tl.int64) * rank
                total += load_tile(grad_up_partials_ptr, offsets, k, d < width, rank)
            store_tile(grad_up_ptr, k.to(tl.int64) * width, d, k < rank, width, tl.trans(total))


def _low_rank_gradients(
    x: BackwardInputs, precision: MatmulPrecision, needs_down: bool
) -> tuple[Tensor, Tensor]:
    """Return dH, complete if ``needs_down``, and V, ``[B, P, r]`` each."""
    (images, patches, _), (rank, width) = x.hz.shape, x.up.shape
    has_kd, has_refined = x.grad_kd is not None, x.grad_refined is not None
    has_outlier, has_info = x.grad_outlier is not None, x.grad_info is not None
    grad_h, v = (
        x.hz.new_empty((images, patches, rank), dtype=precision.storage_dtype) for _ in range(2)
    )

    def launch(config: configs.Config) -> None:
        backward_rows_kernel[(triton.cdiv(images * patches, config.rows),)](
            x.hz,
            x.grad_hz,
            x.residual,
            x.norms,
            x.threshold,
            x.outlier_weight,
            x.up,
            x.grad_refined,
            x.grad_kd,
            x.grad_outlier,
            x.grad_info,
            grad_h,
            v,
            *token_strides(x.grad_refined),
            images * patches,
            patches,
            x.num_prefix_tokens,
            width,
            rank,
            images,
            HAS_KD=has_kd and needs_down,
            HAS_OUTLIER=has_outlier,
            HAS_INFO=has_info,
            HAS_REFINED=has_refined and needs_down,
            **kernel_options(precision, rank),
            **meta_params(config, block_of(rank)),
        )

    key = (images, patches, width, has_kd, has_outlier or has_info, has_refined)
    run_configured("backward_rows", precision, rank, launch, *key)
    return grad_h, v


def _sum_splits(
    down_partials: Tensor | None,
    up_partials: Tensor | None,
    down_dtype: torch.dtype | None,
    up_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return dWd ``[D, r]`` and dWu ``[r, D]`` from their splits ``[splits, D, r]``."""
    partials = down_partials if up_partials is None else up_partials
    if partials is None:
        return None, None
    splits, width, rank = partials.shape
    grad_down = grad_up = None
    if down_partials is not None:
        grad_down = partials.new_empty((width, rank), dtype=down_dtype)
    if up_partials is not None:
        grad_up = partials.new_empty((rank, width), dtype=up_dtype)
    block_r = block_of(rank)
    block_d = max(16, 1024 // block_r)
    sum_partials_kernel[(triton.cdiv(width, block_d), 2)](
        down_partials,
        up_partials,
        grad_down,
        grad_up,
        splits,
        width,
        rank,
        NEEDS_DOWN=grad_down is not None,
        NEEDS_UP=grad_up is not None,
        BLOCK_D=block_d,
        BLOCK_R=block_r,
        ACC=kernel_dtype(partials.dtype),
        **compiler_options(configs.SMALL),
    )
    return grad_down, grad_up


def run_backward(
    x: BackwardInputs, precision: MatmulPrecision
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the stage ``backward``.

    Returns:
        dS, dWd and dWu; None where not requested, or where no output's gradient reaches them.
    """
    (images, tokens, width), rank = x.teacher.shape, x.up.shape[0]
    has_kd, has_refined = x.grad_kd is not None, x.grad_refined is not None
    has_v = x.grad_outlier is not None or x.grad_info is not None
    needs_student, needs_down, needs_up = x.needs
    if not any(x.needs):
        return None, None, None
    new = x.teacher.new_empty
    grad_h = v = None
    if needs_down or (needs_up and has_v):
        grad_h, v = _low_rank_gradients(x, precision, needs_down)
    grad_student = new(x.teacher.shape, dtype=x.student_dtype) if needs_student else None

    def launch(config: configs.Config) -> tuple[Tensor | None, Tensor | None]:
        blocks = triton.cdiv(images * tokens, config.rows)
        rows_per_split = config.rows * triton.cdiv(blocks, configs.SPLITS)
        splits = triton.cdiv(images * tokens, rows_per_split)
        down_partials = new((splits, width, rank), dtype=precision.acc) if needs_down else None
        up_partials = new((splits, width, rank), dtype=precision.acc) if needs_up else None
        backward_tokens_kernel[(triton.cdiv(width, config.inner), splits)](
            x.teacher,
            x.student,
            x.up,
            x.hz,
            grad_h,
            v,
            x.grad_refined,
            x.grad_kd,
            grad_student,
            down_partials,
            up_partials,
            *token_strides(x.teacher),
            *token_strides(x.student),
            *token_strides(x.grad_refined),
            images * tokens,
            tokens,
            x.num_prefix_tokens,
            width,
            rank,
            rows_per_split,
            HAS_KD=has_kd,
            HAS_V=has_v,
            HAS_REFINED=has_refined,
            NEEDS_STUDENT=needs_student,
            NEEDS_DOWN=needs_down,
            NEEDS_UP=needs_up,
            **kernel_options(precision, rank),
            **meta_params(config, block_of(rank)),
        )
        return down_partials, up_partials

    key = (images, tokens, width, has_kd, has_v, has_refined, *x.needs)
    down_partials, up_partials = run_configured("backward_tokens", precision, rank, launch, *key)
    grad_down, grad_up = _sum_splits(down_partials, up_partials, x.down_dtype, x.up_dtype)
    return grad_student, grad_down, grad_up
