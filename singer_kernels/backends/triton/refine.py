"""Stage ``refine``: H, Z, the norms of F and F̂, and the partial sums of the KD loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.operators import ForwardInputs
from singer_kernels.backends.precision import MatmulPrecision
from singer_kernels.backends.triton.configs import Config
from singer_kernels.backends.triton.language import (
    dot,
    load_tile,
    operand,
    split_dot,
    split_dot_transposed,
    sqrt,
    store_tile,
    token_offsets,
)
from singer_kernels.backends.triton.launch import (
    block_of,
    kernel_options,
    meta_params,
    run_configured,
    token_strides,
)


@triton.jit
def up_gram_kernel(
    up_ptr,  # Wu, [r, D]
    up_gram_ptr,  # out: M = Wu Wuᵀ, [r, r]
    width,
    rank,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``M = Wu Wuᵀ``, BLOCK_T rows per program: exact products, sums in float32."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_R)
    up_gram = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        rows = operand(load_tile(up_ptr, row * width, d, row < rank, width), OPERAND)
        up = operand(load_tile(up_ptr, k * width, d, k < rank, width), OPERAND)
        up_gram = dot(rows, tl.trans(up), up_gram, PRECISION)
    store_tile(up_gram_ptr, row * rank, k, row < rank, rank, up_gram)


@triton.jit(do_not_specialize=["num_rows"])
def refine_kernel(
    teacher_ptr,  # F, [B, T, D]
    student_ptr,  # S, [B, T, D]
    down_ptr,  # Wd, [D, r]
    up_ptr,  # Wu, [r, D]
    up_gram_ptr,  # M = Wu Wuᵀ, [r, r]; IDENTITY
    hz_ptr,  # out: [H | Z], [B, P, 2r]
    split_bf16_ptr,  # out: high and low bf16 of H and L = Z − ½ H M, [B, P, 4, BLOCK_R]; IDENTITY
    residual_ptr,  # out: (F̂ − S) Wuᵀ, [B, P, r]; HAS_RESIDUAL
    norms_ptr,  # out: n, [B, P]
    teacher_norms_ptr,  # out: norms of F, [B, P]
    kd_partials_ptr,  # out: sums of (F̂ − S)², [programs]
    refined_ptr,  # out: F̂, [B, T, D]; HAS_REFINED
    gram_tokens_ptr,  # out: F̂ for the Gram products, [B, T, D]; HAS_GRAM_TOKENS
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
    HAS_GRAM_TOKENS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``H = F Wd``, ``F̂ = F + H Wu``, ``Z = F̂ Wuᵀ``, ``n = ‖F̂‖``, KD partial ``Σ (F̂ − S)²``.

    One program per BLOCK_T rows of the flattened ``[B T, D]``; H = 0 on prefix tokens. F is read
    twice, the second time from L2. IDENTITY takes ``Z = F Wuᵀ + H M``, as exact as the Gram
    identity needs it; otherwise ``Z = F̂ Wuᵀ`` of the rounded F̂.
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

    # 1. H = F Wd over D; with IDENTITY, F Wuᵀ too
    h = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    z = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    for start in range(0, width, BLOCK_D):
        d = start + column
        teacher = operand(load_tile(teacher_ptr, teacher_offsets, d, in_range, width), OPERAND)
        down = operand(load_tile(down_ptr, d * rank, k, d < width, rank), OPERAND)
        h = dot(teacher, down, h, PRECISION)
        if IDENTITY:
            up = operand(load_tile(up_ptr, k * width, d, k < rank, width), OPERAND)
            z = dot(teacher, tl.trans(up), z, PRECISION)
    h = tl.where(is_patch[:, None], h, 0.0)

    patch = image * (num_tokens - num_prefix_tokens) + token - num_prefix_tokens
    rank_offsets = patch.to(tl.int64) * rank
    store_tile(hz_ptr, 2 * rank_offsets, k, is_patch, rank, h)
    if IDENTITY:
        # 2. Z = F Wuᵀ + H M and L = Z − ½ H M; M is symmetric, so x Mᵀ = x M
        up_gram = load_tile(up_gram_ptr, k * rank, k, k < rank, rank)
        full_z = split_dot_transposed(h, up_gram, z, OPERAND)
        l = 0.5 * (z + full_z)
        split_offsets = patch.to(tl.int64) * 4 * BLOCK_R
        high = operand(h, OPERAND)
        low = h - high.to(ACC)
        store_tile(split_bf16_ptr, split_offsets, k, is_patch, BLOCK_R, high)
        store_tile(split_bf16_ptr + BLOCK_R, split_offsets, k, is_patch, BLOCK_R, low)
        high = operand(l, OPERAND)
        low = l - high.to(ACC)
        store_tile(split_bf16_ptr + 2 * BLOCK_R, split_offsets, k, is_patch, BLOCK_R, high)
        store_tile(split_bf16_ptr + 3 * BLOCK_R, split_offsets, k, is_patch, BLOCK_R, low)
        store_tile(hz_ptr + rank, 2 * rank_offsets, k, is_patch, rank, full_z)

    # 3. F̂ = F + H Wu over D; squared norms, KD sum, Z = F̂ Wuᵀ and residual of each block
    residual = tl.zeros((BLOCK_T, BLOCK_R), ACC)
    squares = tl.zeros((BLOCK_T,), ACC)
    teacher_squares = tl.zeros((BLOCK_T,), ACC)
    kd = tl.zeros((BLOCK_T,), ACC)
    for start in range(0, width, BLOCK_D):
        d = start + column
        teacher = load_tile(teacher_ptr, teacher_offsets, d, in_range, width).to(ACC)
        student = load_tile(student_ptr, student_offsets, d, in_range, width).to(ACC)
        up = operand(load_tile(up_ptr, k * width, d, k < rank, width), OPERAND)
        delta = tl.zeros((BLOCK_T, BLOCK_D), ACC)
        delta = split_dot(h, up, delta, OPERAND, PRECISION)
        refined = teacher + tl.where(is_patch[:, None], delta, 0.0)
        kd_difference = refined - student
        squares += tl.sum(refined * refined, axis=1)
        teacher_squares += tl.sum(teacher * teacher, axis=1)
        kd += tl.sum(kd_difference * kd_difference, axis=1)
        if not IDENTITY:
            z = dot(operand(refined, OPERAND), tl.trans(up), z, PRECISION)
        if HAS_RESIDUAL:
            residual = dot(operand(kd_difference, OPERAND), tl.trans(up), residual, PRECISION)
        if HAS_REFINED:
            store_tile(refined_ptr, row_offsets, d, in_range, width, refined)
        if HAS_GRAM_TOKENS:
            store_tile(gram_tokens_ptr, row_offsets, d, in_range, width, refined)
    # 4. norms, KD partial sum, Z and residual to memory
    tl.store(kd_partials_ptr + program, tl.sum(tl.where(in_range, kd, 0.0)))
    tl.store(norms_ptr + patch, sqrt(squares), mask=is_patch)
    tl.store(teacher_norms_ptr + patch, sqrt(teacher_squares), mask=is_patch)
    if not IDENTITY:
        store_tile(hz_ptr + rank, 2 * rank_offsets, k, is_patch, rank, z)
    if HAS_RESIDUAL:
        store_tile(residual_ptr, rank_offsets, k, is_patch, rank, residual)


class RefineOutput(NamedTuple):
    """Tensors of the stage ``refine``; None where not requested."""

    hz: Tensor  # [H | Z], [B, P, 2r]
    norms: Tensor  # n, [B, P]
    teacher_norms: Tensor  # norms of F, [B, P]
    kd_partials: Tensor  # sums of (F̂ − S)², [programs]
    split_bf16: Tensor | None  # high and low bf16 of H and L, [B, P, 4, BLOCK_R]
    residual: Tensor | None  # (F̂ − S) Wuᵀ, [B, P, r]
    refined: Tensor | None  # F̂, [B, T, D], in the teacher's dtype
    gram_tokens: Tensor | None  # F̂, [B, T, D], in the Gram products' dtype


def run_refine(
    x: ForwardInputs,
    precision: MatmulPrecision,
    *,
    identity: bool,
    gram_tokens_dtype: torch.dtype | None,
) -> RefineOutput:
    """Launch the stage ``refine``; the last dimension of student and teacher is contiguous.

    Args:
        x: the operator's inputs.
        precision: dtypes of the products.
        identity: whether the Gram identity follows, which reads H and L split into bfloat16.
        gram_tokens_dtype: the dtype of F̂ for the Gram products; None: do not write it.
    """
    (images, tokens, width), rank = x.teacher.shape, x.down.shape[1]
    patches = tokens - x.num_prefix_tokens
    block_r, acc = block_of(rank), precision.acc
    new = x.teacher.new_empty
    hz = new((images, patches, 2 * rank), dtype=acc)
    norms, teacher_norms = (new((images, patches), dtype=acc) for _ in range(2))
    split_bf16 = residual = up_gram = None
    if identity:
        split_bf16 = new((images, patches, 4, block_r), dtype=precision.product)
        up_gram = new((rank, rank), dtype=acc)
        up_gram_kernel[(block_r // 16,)](
            x.up,
            up_gram,
            width,
            rank,
            **kernel_options(precision, rank),
            **meta_params(Config(16, 64, 4, 2), block_r),
        )
    if x.has_residual:
        residual = new((images, patches, rank), dtype=precision.storage_dtype)
    refined = new(x.teacher.shape) if x.has_refined else None
    gram_tokens, writes_gram_tokens = None, False
    if gram_tokens_dtype is not None:
        writes_gram_tokens = refined is None or refined.dtype != gram_tokens_dtype
        gram_tokens = (
            new(x.teacher.shape, dtype=gram_tokens_dtype) if writes_gram_tokens else refined
        )

    def launch(config: Config) -> Tensor:
        programs = triton.cdiv(images * tokens, config.rows)
        kd_partials = new((programs,), dtype=acc)
        refine_kernel[(programs,)](
            x.teacher,
            x.student,
            x.down,
            x.up,
            up_gram,
            hz,
            split_bf16,
            residual,
            norms,
            teacher_norms,
            kd_partials,
            refined,
            gram_tokens,
            *token_strides(x.teacher),
            *token_strides(x.student),
            images * tokens,
            tokens,
            x.num_prefix_tokens,
            width,
            rank,
            IDENTITY=identity,
            HAS_RESIDUAL=x.has_residual,
            HAS_REFINED=x.has_refined,
            HAS_GRAM_TOKENS=writes_gram_tokens,
            **kernel_options(precision, rank),
            **meta_params(config, block_r),
        )
        return kd_partials

    flags = (identity, x.has_residual, x.has_refined, writes_gram_tokens)
    sizes = (images, tokens, width, *flags)
    kd_partials = run_configured("refine", precision, rank, launch, *sizes)
    return RefineOutput(
        hz, norms, teacher_norms, kd_partials, split_bf16, residual, refined, gram_tokens
    )
