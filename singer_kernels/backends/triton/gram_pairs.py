"""A program per pair of tiles of the Gram matrices."""

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
    compiling,
    meta,
)


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


def _apply(
    difference: Tensor,
    slopes: Tensor,
    norms: Tensor,
    columns: Tensor,
    out: Tensor,
    arithmetic: Arithmetic,
    *,
    negative: bool,
) -> Tensor:
    images, patches, count = out.shape

    def attempt(config: configs.Config) -> Tensor:
        block_c = config.inner
        grid = (triton.cdiv(count, block_c), triton.cdiv(patches, config.rows), images)
        gram_apply_kernel[grid](
            difference,
            slopes,
            norms,
            columns,
            out,
            *columns.stride()[:2],
            difference.stride(1),
            slopes.shape[1],
            patches,
            count,
            NEGATIVE=negative,
            **arithmetic.options(1),
            BLOCK_P=config.rows,
            BLOCK_K=config.rows,
            BLOCK_C=block_c,
            **compiling(config),
        )
        return out

    return arithmetic.run("gram_apply", 1, attempt, images, patches, count)


def run_gram_pairs(
    given: GramRows,
    columns: Tensor,
    prefix: int,
    arithmetic: Arithmetic,
    *,
    columns_dtype: torch.dtype | None,
    d_target_dtype: torch.dtype | None,
) -> Gram:
    """Run the stage ``gram`` by pairs of tiles.

    Args:
        given: both sides.
        columns: what X is applied to, ``[B, P, C]``.
        prefix: the number of prefix tokens.
        arithmetic: how products are computed.
        columns_dtype: the dtype of ``X columns``; None: it is not asked for.
        d_target_dtype: the dtype of the target's gradient; None: it is not asked for.
    """
    images, patches = given.norms.shape
    width, rank = given.target.shape[-1], given.rank
    block_r = block_of(rank)
    needs_columns, needs_target = columns_dtype is not None, d_target_dtype is not None
    new = given.norms.new_empty
    sizes = (patches, prefix, width, rank)
    stores = needs_columns or needs_target
    stride = 16 * triton.cdiv(patches, 16)  # rows that begin at 16-byte boundaries
    difference = new((images, patches, stride) if stores else (0,), dtype=arithmetic.kept)

    def by_pairs(config: configs.Config) -> tuple[Tensor, Tensor, Tensor]:
        tiles = triton.cdiv(patches, config.rows)
        parts = new((images, tiles, tiles))
        slopes = new((images, tiles, patches) if stores else (0,))
        target_slopes = new((images, tiles, patches) if needs_target else (0,))
        for mode in given.modes:
            gram_pairs_kernel[(tiles, tiles, images)](
                *given.pointers(),
                given.norms,
                given.target_norms,
                given.amplification,
                difference,
                slopes,
                target_slopes,
                parts,
                *given.strides(),
                stride,
                *sizes,
                STORES=stores,
                HAS_TARGET_SLOPES=needs_target,
                MODE=mode,
                **arithmetic.options(1),
                **meta(
                    config_in_mode(arithmetic, "gram_pairs", mode, config, rank), block_r, "BLOCK_P"
                ),
            )
        return parts, slopes, target_slopes

    key = (images, *sizes, given.mode, stores, needs_target)
    parts, slopes, target_slopes = arithmetic.run("gram_pairs", rank, by_pairs, *key)
    gram_columns: Tensor | None = None
    d_target: Tensor | None = None
    if needs_columns:
        out = new(columns.shape, dtype=columns_dtype)
        gram_columns = _apply(
            difference, slopes, given.norms, columns, out, arithmetic, negative=False
        )
    if needs_target:
        out = new((images, patches, width), dtype=d_target_dtype)
        patch_rows = given.target[:, prefix:]
        d_target = _apply(
            difference,
            target_slopes,
            given.target_norms,
            patch_rows,
            out,
            arithmetic,
            negative=True,
        )
    return Gram(parts, gram_columns, d_target)
