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

import triton
import triton.language as tl

from singer_kernels.backends.triton.kernels.language import (
    NORM_EPS,
    dot,
    load_tile,
    number,
    operand,
    reciprocal,
    root,
    split_dot,
    store_tile,
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


@triton.jit
def gram_pairs_kernel(
    rows_ptr,  # F̂, [B, T, D]; "stored"
    target_ptr,  # R, [B, T, D]
    up_ptr,  # Wu, [r, D]; "formed"
    columns_ptr,  # [H | Z], [B, P, 2r]; not "stored"
    parts_ptr,  # H and L in high and low parts, [B, P, 4, BLOCK_R]; "identity"
    norms_ptr,  # n, [B, P]
    target_norms_ptr,  # norms of R, [B, P]
    amplification_ptr,  # largest ‖F‖ / n, [B]; not "stored"
    difference_ptr,  # out: E, [B, P, stride]; STORES
    slopes_ptr,  # out: parts of s, [B, tiles, P]; STORES
    target_slopes_ptr,  # out: parts of the target's s, [B, tiles, P]; HAS_TARGET_SLOPES
    loss_ptr,  # out: sums of E², [B, tiles, tiles]
    rows_stride_image,
    rows_stride_token,
    target_stride_image,
    target_stride_token,
    difference_stride,  # of a row of E
    num_patches,
    num_prefix_tokens,
    width,
    rank,
    STORES: tl.constexpr,
    HAS_TARGET_SLOPES: tl.constexpr,
    MODE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``Σ E²`` and, with STORES, E and the parts of s, of one pair of tiles i ≤ j of one image.

    ``[a, p]`` of the parts of s is the sum over the columns of tile a in row p.
    """
    tile_j, tile_i, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_tiles = tl.num_programs(0)
    loss_ptr += (image.to(tl.int64) * num_tiles + tile_i) * num_tiles + tile_j
    if _is_other_modes(amplification_ptr, image, MODE):
        return
    if tile_j < tile_i:
        tl.store(loss_ptr, 0.0)
        return
    norms_ptr += image * num_patches
    target_norms_ptr += image * num_patches
    patch_i = tile_i * BLOCK_P + tl.arange(0, BLOCK_P)
    patch_j = tile_j * BLOCK_P + tl.arange(0, BLOCK_P)
    first = image.to(tl.int64)
    target_ptr += first * target_stride_image
    if MODE == "stored":
        rows_ptr += first * rows_stride_image
    else:
        columns_ptr += first * num_patches * 2 * rank
    if MODE == "identity":
        parts_ptr += first * num_patches * 4 * BLOCK_R
    difference, gram, target_gram = _tile(
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
    times = tl.where(tile_i == tile_j, 1.0, 2.0).to(ACC)
    tl.store(loss_ptr, times * tl.sum(difference * difference))
    if STORES:
        mask_i, mask_j = patch_i < num_patches, patch_j < num_patches
        difference_ptr += first * num_patches * difference_stride
        slope_base = first * num_tiles * num_patches
        offsets_i = patch_i.to(tl.int64) * difference_stride
        # The padding of a row too: tiles are 0 there, and whole vectors are written and read.
        store_tile(difference_ptr, offsets_i, patch_j, mask_i, difference_stride, difference)
        by_row = slope_base + tile_j * num_patches + patch_i
        by_column = slope_base + tile_i * num_patches + patch_j
        slope = difference * gram
        tl.store(slopes_ptr + by_row, tl.sum(slope, axis=1), mask=mask_i)
        if HAS_TARGET_SLOPES:
            target_slope = -difference * target_gram
            tl.store(target_slopes_ptr + by_row, tl.sum(target_slope, axis=1), mask=mask_i)
        if tile_i != tile_j:
            offsets_j = patch_j.to(tl.int64) * difference_stride
            mirrored = tl.trans(difference)
            store_tile(difference_ptr, offsets_j, patch_i, mask_j, difference_stride, mirrored)
            tl.store(slopes_ptr + by_column, tl.sum(slope, axis=0), mask=mask_j)
            if HAS_TARGET_SLOPES:
                target_slope = -difference * target_gram
                tl.store(target_slopes_ptr + by_column, tl.sum(target_slope, axis=0), mask=mask_j)


@triton.jit(do_not_specialize=["num_parts"])
def gram_apply_kernel(
    difference_ptr,  # E, [B, P, stride]
    slopes_ptr,  # parts of s, [B, num_parts, P]
    norms_ptr,  # n of the rows that X belongs to, [B, P]
    columns_ptr,  # what X is applied to, [B, P, C]
    out_ptr,  # out: ± X columns, [B, P, C]
    columns_stride_image,
    columns_stride_row,
    difference_stride,  # of a row of E
    num_parts,
    num_patches,
    num_columns,  # C
    NEGATIVE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``X columns = 4/(B P²) [diag(1/n) (±E) diag(1/n) − diag(s/n²)] columns``, a tile of it.

    NEGATIVE: the target's side, where the difference is −E.
    """
    tile_c, tile, image = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_images = tl.num_programs(2)
    first = image.to(tl.int64)
    difference_ptr += first * num_patches * difference_stride
    slopes_ptr += first * num_parts * num_patches
    norms_ptr += first * num_patches
    columns_ptr += first * columns_stride_image
    out_ptr += first * num_patches * num_columns
    patch = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = patch < num_patches
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    slope = tl.zeros((BLOCK_P,), ACC)
    for part in range(num_parts):
        slope += tl.load(slopes_ptr + part * num_patches + patch, mask=mask, other=0.0)
    turned = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    offsets = patch.to(tl.int64) * difference_stride
    for start in range(0, num_patches, BLOCK_K):
        other = start + tl.arange(0, BLOCK_K)
        other_mask = other < num_patches
        inverse = reciprocal(tl.load(norms_ptr + other, mask=other_mask, other=0.0))
        difference = load_tile(difference_ptr, offsets, other, mask, difference_stride)
        other_offsets = other.to(tl.int64) * columns_stride_row
        column = load_tile(columns_ptr, other_offsets, c, other_mask, num_columns).to(ACC)
        scaled = operand(column * inverse[:, None], OPERAND)
        turned = dot(operand(difference, OPERAND), scaled, turned, PRECISION)
    if NEGATIVE:
        turned = -turned
    norms = tl.load(norms_ptr + patch, mask=mask, other=0.0)
    inverse = reciprocal(norms)
    radial = tl.where(norms < tl.full((), NORM_EPS, ACC), 0.0, slope * inverse * inverse)
    scale = 4.0 / (number(num_images, ACC) * num_patches * num_patches)
    column_offsets = patch.to(tl.int64) * columns_stride_row
    column = load_tile(columns_ptr, column_offsets, c, mask, num_columns).to(ACC)
    value = turned * (scale * inverse)[:, None] - column * (scale * radial)[:, None]
    store_tile(out_ptr, patch.to(tl.int64) * num_columns, c, mask, num_columns, value)


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
