"""Stage ``gram``: tiles of both Gram matrices, shared by ``gram_rows`` and ``gram_pairs``.

``E = G(F̂) − G(R)``, ``s = rowsum(E ∘ G(F̂))``; the loss's gradient in F̂ is ``X F̂`` with
``X = 4/(B P²) [diag(1/n) E diag(1/n) − diag(s/n²)]`` (without the s-term where n < 1e-12). The
adapter's gradients need ``X [H | Z]`` alone.

MODE says how a tile computes ``F̂ᵢ·F̂ⱼ``:

- ``"identity"``, R = F: ``F̂ᵢ·F̂ⱼ = Fᵢ·Fⱼ + Hᵢ·Lⱼ + Lᵢ·Hⱼ``, one product of width D.
- ``"recompute"``, R = F: recompute F̂ from F and H. For images with rows that the adapter nearly
  cancels (‖F‖ ≫ n), where the identity would subtract large numbers.
- ``"materialized"``: load F̂ from memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.precision import MatmulPrecision
from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.language import (
    dot,
    load_tile,
    operand,
    reciprocal,
    split_dot,
    sqrt,
)
from singer_kernels.backends.triton.launch import (
    block_of,
    compiler_options,
    kernel_dtype,
    kernel_options,
    meta_params,
    table_config,
    token_strides,
)

MAX_CANCELLATION = tl.constexpr(256.0)
"""Largest ``‖Fᵢ‖‖Fⱼ‖ / (nᵢ nⱼ)`` of an image for the identity, which amplifies the 2⁻¹⁷ error of
float32 sums and bfloat16 pairs: to 2⁻⁹ at this limit, the rounding of one bfloat16 product."""


@triton.jit
def _recompute_refined(teacher, h, up_ptr, d, k, rank, width, OPERAND, PRECISION):
    """Return ``F̂ = F + H Wu`` of a tile, rounded to the operand dtype."""
    up = operand(load_tile(up_ptr, k * width, d, k < rank, width), OPERAND)
    refined = split_dot(h, up, teacher.to(h.dtype), OPERAND, PRECISION)
    return operand(refined, OPERAND)


@triton.jit
def gram_tile(
    tokens_ptr,  # F̂ of the image, [T, D]; "materialized"
    target_ptr,  # R of the image, [T, D]
    up_ptr,  # Wu, [r, D]; "recompute"
    hz_ptr,  # [H | Z] of the image, [P, 2r]; "recompute"
    split_bf16_ptr,  # high and low bf16 of H and L, [P, 4, BLOCK_R]; "identity"
    norms_ptr,  # n, [P]
    target_norms_ptr,  # norms of R, [P]
    tokens_stride_token,
    target_stride_token,
    patch_i,  # patches of the tile's rows, [BLOCK_P]
    patch_j,  # of its columns, [BLOCK_P]
    num_patches,
    num_prefix_tokens,
    width,
    rank,
    MODE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Return E, G(F̂) and G(R) of one tile, ``[BLOCK_P, BLOCK_P]``, 0 outside the image."""
    mask_i, mask_j = patch_i < num_patches, patch_j < num_patches
    token_i = (patch_i + num_prefix_tokens).to(tl.int64)
    token_j = (patch_j + num_prefix_tokens).to(tl.int64)
    target_offsets_i = token_i * target_stride_token
    target_offsets_j = token_j * target_stride_token
    column = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_R)
    rank_offsets_i, rank_offsets_j = patch_i.to(tl.int64) * rank, patch_j.to(tl.int64) * rank
    if MODE == "recompute":
        h_i = load_tile(hz_ptr, 2 * rank_offsets_i, k, mask_i, rank)
        h_j = load_tile(hz_ptr, 2 * rank_offsets_j, k, mask_j, rank)
    # 1. Rᵢ·Rⱼ and, but for the identity, F̂ᵢ·F̂ⱼ over D
    target_product = tl.zeros((BLOCK_P, BLOCK_P), ACC)
    product = tl.zeros((BLOCK_P, BLOCK_P), ACC)
    for start in range(0, width, BLOCK_D):
        d = start + column
        target_i = load_tile(target_ptr, target_offsets_i, d, mask_i, width)
        target_j = load_tile(target_ptr, target_offsets_j, d, mask_j, width)
        left, right = operand(target_i, OPERAND), operand(target_j, OPERAND)
        target_product = dot(left, tl.trans(right), target_product, PRECISION)
        if MODE == "recompute":
            left = _recompute_refined(target_i, h_i, up_ptr, d, k, rank, width, OPERAND, PRECISION)
            right = _recompute_refined(target_j, h_j, up_ptr, d, k, rank, width, OPERAND, PRECISION)
            product = dot(left, tl.trans(right), product, PRECISION)
        if MODE == "materialized":
            offsets_i, offsets_j = token_i * tokens_stride_token, token_j * tokens_stride_token
            left = operand(load_tile(tokens_ptr, offsets_i, d, mask_i, width), OPERAND)
            right = operand(load_tile(tokens_ptr, offsets_j, d, mask_j, width), OPERAND)
            product = dot(left, tl.trans(right), product, PRECISION)
    # 2. 1 / (nᵢ nⱼ) of both sides, and G(R)
    inv_norms_i = reciprocal(tl.load(norms_ptr + patch_i, mask=mask_i, other=0.0))
    inv_norms_j = reciprocal(tl.load(norms_ptr + patch_j, mask=mask_j, other=0.0))
    inv_norms = inv_norms_i[:, None] * inv_norms_j[None, :]
    target_inv_norms_i = reciprocal(tl.load(target_norms_ptr + patch_i, mask=mask_i, other=0.0))
    target_inv_norms_j = reciprocal(tl.load(target_norms_ptr + patch_j, mask=mask_j, other=0.0))
    target_inv_norms = target_inv_norms_i[:, None] * target_inv_norms_j[None, :]
    target_gram = target_product * target_inv_norms
    # 3. G(F̂) and E
    if MODE == "identity":
        for step in range(6):
            # Hᵢ·Lⱼ, then Lᵢ·Hⱼ: high·high, high·low and low·high of each
            second, term = step // 3, step % 3
            split_i, split_j = 2 * second + term // 2, 2 - 2 * second + term % 2
            offsets_i = patch_i.to(tl.int64) * (4 * BLOCK_R) + split_i * BLOCK_R
            offsets_j = patch_j.to(tl.int64) * (4 * BLOCK_R) + split_j * BLOCK_R
            left = operand(load_tile(split_bf16_ptr, offsets_i, k, mask_i, BLOCK_R), OPERAND)
            right = operand(load_tile(split_bf16_ptr, offsets_j, k, mask_j, BLOCK_R), OPERAND)
            product = dot(left, tl.trans(right), product, PRECISION)
        # Both entries are near 1: expand the difference to avoid cancellation.
        difference = target_product * (inv_norms - target_inv_norms) + product * inv_norms
        gram = target_gram + difference
    else:
        gram = product * inv_norms
        difference = gram - target_gram
    return difference, gram, target_gram


@triton.jit
def skips_image(cancellation_ratio_ptr, image, MODE: tl.constexpr):
    """Whether the launch in the other mode, "identity" or "recompute", computes this image."""
    if MODE == "materialized":
        return False
    else:
        largest = tl.load(cancellation_ratio_ptr + image)
        if MODE == "identity":
            return largest * largest > MAX_CANCELLATION
        else:
            return (largest * largest > MAX_CANCELLATION) == 0


@triton.jit
def row_norms_kernel(
    tokens_ptr,  # [B, T, D]
    norms_ptr,  # out: [B, P]
    stride_image,
    stride_token,
    num_patches,
    num_prefix_tokens,
    width,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``n = ‖x‖`` of BLOCK_P patches of one image."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    patch = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = patch < num_patches
    offsets = image * stride_image + (patch + num_prefix_tokens).to(tl.int64) * stride_token
    # 1. ‖x‖² over D
    squares = tl.zeros((BLOCK_P,), ACC)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = load_tile(tokens_ptr, offsets, d, mask, width).to(ACC)
        squares += tl.sum(x * x, axis=1)
    # 2. n, of the image's patches only
    tl.store(norms_ptr + image * num_patches + patch, sqrt(squares), mask=mask)


class GramOutput(NamedTuple):
    """Tensors of the stage ``gram``; None where not requested."""

    loss_partials: Tensor | None  # sums of E²
    grad_factor: Tensor | None  # X factor, [B, P, C]; grad_hz where the factor is [H | Z]
    grad_target: Tensor | None  # gradient in the target's patches, [B, P, D]


class GramInputs(NamedTuple):
    """Operands of the Gram matrices; those without default are always needed."""

    mode: str  # "identity" or "materialized"
    num_prefix_tokens: int
    tokens: Tensor | None  # F̂, [B, T, D]; "materialized"
    target: Tensor  # R, [B, T, D]
    norms: Tensor  # n, [B, P]
    target_norms: Tensor  # norms of R, [B, P]
    up: Tensor | None = None  # Wu, [r, D]
    hz: Tensor | None = None  # [H | Z], [B, P, 2r]
    split_bf16: Tensor | None = None  # high and low bf16 of H and L, [B, P, 4, BLOCK_R]; "identity"
    cancellation_ratio: Tensor | None = None  # largest ‖F‖ / n, [B]; "identity"

    @property
    def rank(self) -> int:
        """r; 1 without an adapter."""
        return 1 if self.hz is None else self.hz.shape[-1] // 2

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """P, number of prefix tokens, D and r."""
        return self.norms.shape[1], self.num_prefix_tokens, self.target.shape[2], self.rank


def launch_modes(
    kernel: Any,
    name: str,
    grid: tuple[int, ...],
    x: GramInputs,
    outputs: tuple[Tensor, ...],
    pair_arguments: tuple[int, ...],
    precision: MatmulPrecision,
    config: configs.Config,
    **flags: bool,
) -> None:
    """Launch a kernel of Gram tiles; with the identity, again for the images beyond its limit.

    ``name`` is its key in ``configs.TABLE``. It takes the tensors of ``x``, the outputs, strides,
    ``pair_arguments`` (those of pairs alone: the stride of a row of E, the first image), the sizes
    of ``x`` and constexpr ``flags``.
    """
    tokens = x.target if x.tokens is None else x.tokens
    for mode in ("identity", "recompute") if x.mode == "identity" else ("materialized",):
        if mode == "recompute":  # of the same tile rows: both write the same partials
            recompute = table_config(f"{name}_recompute", precision, x.rank)
            config = recompute._replace(rows=config.rows)
        kernel[grid](
            x.tokens,
            x.target,
            x.up,
            x.hz,
            x.split_bf16,
            x.norms,
            x.target_norms,
            x.cancellation_ratio,
            *outputs,
            *token_strides(tokens),
            *token_strides(x.target),
            *pair_arguments,
            *x.sizes,
            MODE=mode,
            **flags,
            **kernel_options(precision, 1),
            **meta_params(config, block_of(x.rank), "BLOCK_P"),
        )


def row_norms(tokens: Tensor, prefix: int, acc: torch.dtype) -> Tensor:
    """Return the norms ``[B, P]`` of the patches of ``tokens`` ``[B, T, D]``."""
    images, count, width = tokens.shape
    patches = count - prefix
    norms = tokens.new_empty((images, patches), dtype=acc)
    rows, inner = 16, min(512, block_of(width))
    row_norms_kernel[(triton.cdiv(patches, rows), images)](
        tokens,
        norms,
        *token_strides(tokens),
        patches,
        prefix,
        width,
        ACC=kernel_dtype(acc),
        BLOCK_P=rows,
        BLOCK_D=inner,
        **compiler_options(configs.SMALL),
    )
    return norms
