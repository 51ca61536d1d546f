"""Stage ``gram``: both Gram matrices tile by tile, their difference's loss, and its gradient.

``E = G(F̂) − G(R)``, ``s = rowsum(E ∘ G(F̂))``; the gradient operator in the rows of F̂ is
``X = 4/(B P²) [diag(1/n) E diag(1/n) − diag(s/n²)]`` (without the s-term where n < 1e-12), and the
adapter needs ``X [H | Z]`` alone.

How a tile gets its two products (MODE):

- ``"identity"``, R = F: ``F̂ᵢ·F̂ⱼ = Fᵢ·Fⱼ + hᵢ·Lⱼ + Lᵢ·hⱼ``: one product of width D.
- ``"formed"``, R = F: F̂ is formed from F in passing. For images where the adapter all but cancels
  rows, whose identity would be a small difference of large numbers.
- ``"stored"``: from F̂ and R as they lie in memory.

Two ways through the tiles: a program that owns BLOCK_P rows and walks over all columns (no matrix
in memory), or a program per pair of tiles i ≤ j that writes E, which ``gram_apply_kernel`` then
multiplies with the columns (half the products, but E goes through memory).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.language import (
    dot,
    load_tile,
    operand,
    reciprocal,
    root,
    split_dot,
)
from singer_kernels.backends.triton.launch import (
    Arithmetic,
    block_of,
    compiling,
    kernel_dtype,
)

CANCELLED = tl.constexpr(256.0)
"""Largest ``‖Fᵢ‖‖Fⱼ‖ / (nᵢ nⱼ)`` of an image for the identity: float32 sums and bfloat16 pairs
lose this many times 2⁻¹⁷ there, 2⁻⁹ in all, which is the rounding of one bfloat16 product."""


@triton.jit
def _formed(plain, hidden, up_ptr, d, k, rank, width, OPERAND, PRECISION):
    """Return F̂ of a tile, rounded to an operand."""
    up = operand(load_tile(up_ptr, k * width, d, k < rank, width), OPERAND)
    refined = split_dot(hidden, up, plain.to(hidden.dtype), OPERAND, PRECISION)
    return operand(refined, OPERAND)


@triton.jit
def _tile(
    rows_ptr,
    target_ptr,
    up_ptr,
    columns_ptr,
    parts_ptr,
    norms_ptr,
    target_norms_ptr,
    rows_stride_token,
    target_stride_token,
    patch_i,
    patch_j,
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
    target_i, target_j = token_i * target_stride_token, token_j * target_stride_token
    column = tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_R)
    rank_i, rank_j = patch_i.to(tl.int64) * rank, patch_j.to(tl.int64) * rank
    if MODE == "formed":
        hidden_i = load_tile(columns_ptr, 2 * rank_i, k, mask_i, rank)
        hidden_j = load_tile(columns_ptr, 2 * rank_j, k, mask_j, rank)
    plain = tl.zeros((BLOCK_P, BLOCK_P), ACC)
    refined = tl.zeros((BLOCK_P, BLOCK_P), ACC)
    for start in range(0, width, BLOCK_D):
        d = start + column
        plain_i = load_tile(target_ptr, target_i, d, mask_i, width)
        plain_j = load_tile(target_ptr, target_j, d, mask_j, width)
        left, right = operand(plain_i, OPERAND), operand(plain_j, OPERAND)
        plain = dot(left, tl.trans(right), plain, PRECISION)
        if MODE == "formed":
            left = _formed(plain_i, hidden_i, up_ptr, d, k, rank, width, OPERAND, PRECISION)
            right = _formed(plain_j, hidden_j, up_ptr, d, k, rank, width, OPERAND, PRECISION)
            refined = dot(left, tl.trans(right), refined, PRECISION)
        if MODE == "stored":
            row_i, row_j = token_i * rows_stride_token, token_j * rows_stride_token
            left = operand(load_tile(rows_ptr, row_i, d, mask_i, width), OPERAND)
            right = operand(load_tile(rows_ptr, row_j, d, mask_j, width), OPERAND)
            refined = dot(left, tl.trans(right), refined, PRECISION)
    inverse_i = reciprocal(tl.load(norms_ptr + patch_i, mask=mask_i, other=0.0))
    inverse_j = reciprocal(tl.load(norms_ptr + patch_j, mask=mask_j, other=0.0))
    inverse = inverse_i[:, None] * inverse_j[None, :]
    plain_inverse_i = reciprocal(tl.load(target_norms_ptr + patch_i, mask=mask_i, other=0.0))
    plain_inverse_j = reciprocal(tl.load(target_norms_ptr + patch_j, mask=mask_j, other=0.0))
    plain_inverse = plain_inverse_i[:, None] * plain_inverse_j[None, :]
    target_gram = plain * plain_inverse
    if MODE == "identity":
        for step in range(6):
            # H Lᵀ, then L Hᵀ: high·high, high·low and low·high of each.
            second, term = step // 3, step % 3
            part_i = patch_i.to(tl.int64) * (4 * BLOCK_R) + (2 * second + term // 2) * BLOCK_R
            other = 2 - 2 * second + term % 2
            part_j = patch_j.to(tl.int64) * (4 * BLOCK_R) + other * BLOCK_R
            left = operand(load_tile(parts_ptr, part_i, k, mask_i, BLOCK_R), OPERAND)
            right = operand(load_tile(parts_ptr, part_j, k, mask_j, BLOCK_R), OPERAND)
            refined = dot(left, tl.trans(right), refined, PRECISION)
        # Not the difference of two Gram entries near 1, but of what tells them apart.
        difference = plain * (inverse - plain_inverse) + refined * inverse
        gram = target_gram + difference
    else:
        gram = refined * inverse
        difference = gram - target_gram
    return difference, gram, target_gram


@triton.jit
def _is_other_modes(amplification_ptr, image, MODE: tl.constexpr):
    """Whether an image is left to the launch in the other of the modes "identity" and "formed"."""
    if MODE == "stored":
        return False
    else:
        largest = tl.load(amplification_ptr + image)
        if MODE == "identity":
            return largest * largest > CANCELLED
        else:
            return (largest * largest > CANCELLED) == 0


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
    """``n = ‖x‖`` of each patch."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    patch = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = patch < num_patches
    offsets = image * stride_image + (patch + num_prefix_tokens).to(tl.int64) * stride_token
    squares = tl.zeros((BLOCK_P,), ACC)
    for start in range(0, width, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        x = load_tile(tokens_ptr, offsets, d, mask, width).to(ACC)
        squares += tl.sum(x * x, axis=1)
    tl.store(norms_ptr + image * num_patches + patch, root(squares), mask=mask)


class Gram(NamedTuple):
    """What the stage ``gram`` gives; what was not asked for is None."""

    parts: Tensor  # sums of E²
    columns: Tensor | None  # X [H | Z], [B, P, 2r]
    d_target: Tensor | None  # the gradient in the target's patches, [B, P, D]


class GramRows(NamedTuple):
    """The two sides of the stage ``gram``, and what the identity takes."""

    mode: str  # "identity" or "stored"
    rows: Tensor | None  # F̂, [B, T, D]
    target: Tensor  # R, [B, T, D]
    norms: Tensor  # n, [B, P]
    target_norms: Tensor  # [B, P]
    up: Tensor | None = None
    columns: Tensor | None = None
    parts: Tensor | None = None
    amplification: Tensor | None = None

    @property
    def rank(self) -> int:
        """r; 1 if there is no adapter."""
        return 1 if self.columns is None else self.columns.shape[-1] // 2

    @property
    def modes(self) -> tuple[str, ...]:
        """The launches: what the identity can't do, the second does."""
        return ("identity", "formed") if self.mode == "identity" else ("stored",)

    def pointers(self) -> tuple[Tensor | None, ...]:
        """Return the tensors in the kernels' order."""
        return self.rows, self.target, self.up, self.columns, self.parts

    def strides(self) -> tuple[int, ...]:
        """Return the image and token strides of both sides."""
        rows = self.target if self.rows is None else self.rows
        return (*rows.stride()[:2], *self.target.stride()[:2])


def row_norms(tokens: Tensor, prefix: int, acc: torch.dtype) -> Tensor:
    """Return the norms of the patches of ``tokens [B, T, D]``, ``[B, P]``."""
    images, count, width = tokens.shape
    patches = count - prefix
    norms = tokens.new_empty((images, patches), dtype=acc)
    rows, inner = 16, min(512, block_of(width))
    row_norms_kernel[(triton.cdiv(patches, rows), images)](
        tokens,
        norms,
        *tokens.stride()[:2],
        patches,
        prefix,
        width,
        ACC=kernel_dtype(acc),
        BLOCK_P=rows,
        BLOCK_D=inner,
        **compiling(configs.SUMS),
    )
    return norms


def config_in_mode(
    arithmetic: Arithmetic, kernel: str, mode: str, config: configs.Config, rank: int
) -> configs.Config:
    """Return a mode's configuration; both modes write to one grid of tiles: they share its rows."""
    if mode != "formed":
        return config
    return arithmetic.config(f"{kernel}_formed", rank)._replace(rows=config.rows)
