"""A program that owns rows of the Gram matrices."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.gram_tile import (
    Gram,
    GramRows,
    _is_other_modes,
    _tile,
    config_in_mode,
)
from singer_kernels.backends.triton.language import (
    NORM_EPS,
    dot,
    load_tile,
    number,
    operand,
    reciprocal,
    store_tile,
)
from singer_kernels.backends.triton.launch import (
    Arithmetic,
    block_of,
    meta,
)


@triton.jit
def gram_rows_kernel(
    rows_ptr,  # F̂, [B, T, D]; "stored"
    target_ptr,  # R, [B, T, D]
    up_ptr,  # Wu, [r, D]; "formed"
    columns_ptr,  # [H | Z], [B, P, 2r]
    parts_ptr,  # H and L in high and low parts, [B, P, 4, BLOCK_R]; "identity"
    norms_ptr,  # n, [B, P]
    target_norms_ptr,  # norms of R, [B, P]
    amplification_ptr,  # largest ‖F‖ / n, [B]; not "stored"
    gram_columns_ptr,  # out: X [H | Z], [B, P, 2r]
    loss_ptr,  # out: sums of E², [B, tiles]
    rows_stride_image,
    rows_stride_token,
    target_stride_image,
    target_stride_token,
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
    """``Σ E²`` and ``X [H | Z]`` of BLOCK_P rows of one image; no ``[P, P]`` in memory."""
    tile, image = tl.program_id(0), tl.program_id(1)
    num_images = tl.num_programs(1)
    norms_ptr += image * num_patches
    target_norms_ptr += image * num_patches
    patch_i = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_i = patch_i < num_patches
    if _is_other_modes(amplification_ptr, image, MODE):
        return
    first = image.to(tl.int64)
    target_ptr += first * target_stride_image
    columns_ptr += first * num_patches * 2 * rank
    if MODE == "stored":
        rows_ptr += first * rows_stride_image
    if MODE == "identity":
        parts_ptr += first * num_patches * 4 * BLOCK_R
    gram_columns_ptr += first * num_patches * 2 * rank
    k = tl.arange(0, BLOCK_R)

    loss = tl.zeros((BLOCK_P,), ACC)
    slope = tl.zeros((BLOCK_P,), ACC)
    turned_hidden = tl.zeros((BLOCK_P, BLOCK_R), ACC)
    turned_latent = tl.zeros((BLOCK_P, BLOCK_R), ACC)
    for start in range(0, num_patches, BLOCK_P):
        patch_j = start + tl.arange(0, BLOCK_P)
        mask_j = patch_j < num_patches
        difference, gram, _ = _tile(
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
            MODE,
            OPERAND,
            PRECISION,
            ACC,
            BLOCK_P,
            BLOCK_D,
            BLOCK_R,
        )
        loss += tl.sum(difference * difference, axis=1)
        slope += tl.sum(difference * gram, axis=1)
        inverse_j = reciprocal(tl.load(norms_ptr + patch_j, mask=mask_j, other=0.0))[:, None]
        offsets_j = patch_j.to(tl.int64) * 2 * rank
        hidden_j = load_tile(columns_ptr, offsets_j, k, mask_j, rank) * inverse_j
        latent_j = load_tile(columns_ptr + rank, offsets_j, k, mask_j, rank) * inverse_j
        left = operand(difference, OPERAND)
        turned_hidden = dot(left, operand(hidden_j, OPERAND), turned_hidden, PRECISION)
        turned_latent = dot(left, operand(latent_j, OPERAND), turned_latent, PRECISION)
    tl.store(loss_ptr + image * tl.num_programs(0) + tile, tl.sum(loss))

    scale = 4.0 / (number(num_images, ACC) * num_patches * num_patches)
    norms = tl.load(norms_ptr + patch_i, mask=mask_i, other=0.0)
    inverse = reciprocal(norms)
    radial = tl.where(norms < tl.full((), NORM_EPS, ACC), 0.0, slope * inverse * inverse)
    inverse, radial = (scale * inverse)[:, None], (scale * radial)[:, None]
    offsets_i = patch_i.to(tl.int64) * 2 * rank
    hidden_i = load_tile(columns_ptr, offsets_i, k, mask_i, rank)
    value = turned_hidden * inverse - hidden_i * radial
    store_tile(gram_columns_ptr, offsets_i, k, mask_i, rank, value)
    latent_i = load_tile(columns_ptr + rank, offsets_i, k, mask_i, rank)
    value = turned_latent * inverse - latent_i * radial
    store_tile(gram_columns_ptr + rank, offsets_i, k, mask_i, rank, value)


def run_gram_rows(
    given: GramRows, prefix: int, arithmetic: Arithmetic, *, columns_dtype: torch.dtype
) -> Gram:
    """Run the stage ``gram`` by rows: the loss and ``X [H | Z]``.

    Args:
        given: both sides, with ``[H | Z]``.
        prefix: the number of prefix tokens.
        arithmetic: how products are computed.
        columns_dtype: the dtype of ``X [H | Z]``.
    """
    assert given.columns is not None
    images, patches = given.norms.shape
    width, rank = given.target.shape[-1], given.rank
    block_r = block_of(rank)
    sizes = (patches, prefix, width, rank)
    new = given.norms.new_empty
    turned = new(given.columns.shape, dtype=columns_dtype)

    def own_rows(config: configs.Config) -> Tensor:
        tiles = triton.cdiv(patches, config.rows)
        parts = new((images, tiles))
        for mode in given.modes:
            gram_rows_kernel[(tiles, images)](
                *given.pointers(),
                given.norms,
                given.target_norms,
                given.amplification,
                turned,
                parts,
                *given.strides(),
                *sizes,
                MODE=mode,
                **arithmetic.options(1),
                **meta(
                    config_in_mode(arithmetic, "gram_rows", mode, config, rank), block_r, "BLOCK_P"
                ),
            )
        return parts

    parts = arithmetic.run("gram_rows", rank, own_rows, images, *sizes, given.mode)
    return Gram(parts, turned, None)
