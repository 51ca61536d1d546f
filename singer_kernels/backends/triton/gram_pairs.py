"""Stage ``gram`` by pairs of tiles i ≤ j: half the products of ``gram_rows``, with E in memory.

E is in memory for as many images at a time as fit ``configs.MAX_DIFFERENCE_BYTES``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.precision import MatmulPrecision
from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.gram_tile import (
    GramInputs,
    GramOutput,
    gram_tile,
    launch_modes,
    skips_image,
)
from singer_kernels.backends.triton.language import (
    dot,
    gram_norm_coefficient,
    load_tile,
    operand,
    reciprocal,
    store_tile,
    to_scalar,
)
from singer_kernels.backends.triton.launch import (
    compiler_options,
    kernel_options,
    run_configured,
)


@triton.jit(do_not_specialize=["first_image"])
def gram_pairs_kernel(
    tokens_ptr,  # F̂, [B, T, D]; "materialized"
    target_ptr,  # R, [B, T, D]
    up_ptr,  # Wu, [r, D]; "recompute"
    hz_ptr,  # [H | Z], [B, P, 2r]; not "materialized"
    split_bf16_ptr,  # high and low bf16 of H and L, [B, P, 4, BLOCK_R]; "identity"
    norms_ptr,  # n, [B, P]
    target_norms_ptr,  # norms of R, [B, P]
    cancellation_ratio_ptr,  # largest ‖F‖ / n, [B]; not "materialized"
    difference_ptr,  # out: E, [images, P, stride]; STORES
    row_dots_ptr,  # out: partial sums of s, [images, tiles, P]; STORES
    target_row_dots_ptr,  # out: of the target's s, [images, tiles, P]; HAS_TARGET_ROW_DOTS
    loss_partials_ptr,  # out: sums of E², [images, tiles (tiles + 1) / 2]
    tokens_stride_image,
    tokens_stride_token,
    target_stride_image,
    target_stride_token,
    difference_stride,  # of a row of E
    first_image,  # of the launch; the outputs hold its images alone
    num_patches,
    num_prefix_tokens,
    width,
    rank,
    STORES: tl.constexpr,
    HAS_TARGET_ROW_DOTS: tl.constexpr,
    MODE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """``Σ E²`` of one pair of tiles i ≤ j of one image; with STORES, E and partial sums of s.

    ``s = rowsum(E ∘ G(F̂))``: entry ``[a, p]`` of its partial sums is row p over the columns of
    tile a. The target's is ``rowsum(−E ∘ G(R))``.
    """
    tile_j, tile_i = tl.program_id(0), tl.program_id(1)
    if tile_j < tile_i:
        return
    out_image = tl.program_id(2).to(tl.int64)
    image = first_image + tl.program_id(2)
    if skips_image(cancellation_ratio_ptr, image, MODE):
        return
    num_tiles = tl.num_programs(0)
    loss_partials_ptr += out_image * (num_tiles * (num_tiles + 1) // 2)
    loss_partials_ptr += tile_j * (tile_j + 1) // 2 + tile_i
    norms_ptr += image * num_patches
    target_norms_ptr += image * num_patches
    patch_i = tile_i * BLOCK_P + tl.arange(0, BLOCK_P)
    patch_j = tile_j * BLOCK_P + tl.arange(0, BLOCK_P)
    image_index = image.to(tl.int64)
    target_ptr += image_index * target_stride_image
    if MODE == "materialized":
        tokens_ptr += image_index * tokens_stride_image
    else:
        hz_ptr += image_index * num_patches * 2 * rank
    if MODE == "identity":
        split_bf16_ptr += image_index * num_patches * 4 * BLOCK_R
    # 1. E of the tile
    difference, gram, target_gram = gram_tile(
        tokens_ptr,
        target_ptr,
        up_ptr,
        hz_ptr,
        split_bf16_ptr,
        norms_ptr,
        target_norms_ptr,
        tokens_stride_token,
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
    # 2. Σ E²; a pair off the diagonal stands for two tiles
    weight = tl.where(tile_i == tile_j, 1.0, 2.0).to(ACC)
    tl.store(loss_partials_ptr, weight * tl.sum(difference * difference))
    # 3. E and s of the tile, then of its transpose
    if STORES:
        mask_i, mask_j = patch_i < num_patches, patch_j < num_patches
        difference_ptr += out_image * num_patches * difference_stride
        row_dots_base = out_image * num_tiles * num_patches
        offsets_i = patch_i.to(tl.int64) * difference_stride
        # Up to the padded row length, where tiles are 0: aligned, vectorised stores and loads
        store_tile(difference_ptr, offsets_i, patch_j, mask_i, difference_stride, difference)
        by_row = row_dots_base + tile_j * num_patches + patch_i
        by_column = row_dots_base + tile_i * num_patches + patch_j
        row_dots = difference * gram
        tl.store(row_dots_ptr + by_row, tl.sum(row_dots, axis=1), mask=mask_i)
        if HAS_TARGET_ROW_DOTS:
            target_row_dots = -difference * target_gram
            tl.store(target_row_dots_ptr + by_row, tl.sum(target_row_dots, axis=1), mask=mask_i)
        if tile_i != tile_j:
            offsets_j = patch_j.to(tl.int64) * difference_stride
            transposed = tl.trans(difference)
            store_tile(difference_ptr, offsets_j, patch_i, mask_j, difference_stride, transposed)
            tl.store(row_dots_ptr + by_column, tl.sum(row_dots, axis=0), mask=mask_j)
            if HAS_TARGET_ROW_DOTS:
                target_row_dots = -difference * target_gram
                tl.store(
                    target_row_dots_ptr + by_column, tl.sum(target_row_dots, axis=0), mask=mask_j
                )


@triton.jit(do_not_specialize=["first_image", "num_images", "num_partials"])
def gram_gradient_kernel(
    difference_ptr,  # E, [images, P, stride]
    row_dots_ptr,  # partial sums of s, [images, num_partials, P]
    norms_ptr,  # n of F̂, or with NEGATIVE of R, [B, P]
    factor_ptr,  # [B, P, C]
    out_ptr,  # out: ± X factor, [B, P, C]
    factor_stride_image,
    factor_stride_row,
    difference_stride,  # of a row of E
    first_image,  # of the launch; E and s are those of its images alone
    num_images,  # B
    num_partials,
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
    """``X factor``, a tile; ``X = 4/(B P²) [diag(1/n) (±E) diag(1/n) − diag(s/n²)]``.

    NEGATIVE: −E, for the gradient in the target.
    """
    tile_c, tile = tl.program_id(0), tl.program_id(1)
    launch_image = tl.program_id(2).to(tl.int64)
    image_index = first_image + launch_image
    difference_ptr += launch_image * num_patches * difference_stride
    row_dots_ptr += launch_image * num_partials * num_patches
    norms_ptr += image_index * num_patches
    factor_ptr += image_index * factor_stride_image
    out_ptr += image_index * num_patches * num_columns
    patch = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask = patch < num_patches
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    # 1. s
    row_dots = tl.zeros((BLOCK_P,), ACC)
    for tile_j in range(num_partials):
        row_dots += tl.load(row_dots_ptr + tile_j * num_patches + patch, mask=mask, other=0.0)
    # 2. ±E diag(1/n) factor over the patches
    product = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    offsets = patch.to(tl.int64) * difference_stride
    for start in range(0, num_patches, BLOCK_K):
        patch_j = start + tl.arange(0, BLOCK_K)
        mask_j = patch_j < num_patches
        inv_norms = reciprocal(tl.load(norms_ptr + patch_j, mask=mask_j, other=0.0))
        difference = load_tile(difference_ptr, offsets, patch_j, mask, difference_stride)
        factor_offsets_j = patch_j.to(tl.int64) * factor_stride_row
        factor = load_tile(factor_ptr, factor_offsets_j, c, mask_j, num_columns).to(ACC)
        scaled = operand(factor * inv_norms[:, None], OPERAND)
        product = dot(operand(difference, OPERAND), scaled, product, PRECISION)
    if NEGATIVE:
        product = -product
    # 3. 4/(B P²) (product / n − s/n² factor)
    norms = tl.load(norms_ptr + patch, mask=mask, other=0.0)
    inv_norms = reciprocal(norms)
    norm_grad_coef = gram_norm_coefficient(norms, row_dots)
    scale = 4.0 / (to_scalar(num_images, ACC) * num_patches * num_patches)
    factor_offsets = patch.to(tl.int64) * factor_stride_row
    factor = load_tile(factor_ptr, factor_offsets, c, mask, num_columns).to(ACC)
    value = product * (scale * inv_norms)[:, None] - factor * (scale * norm_grad_coef)[:, None]
    store_tile(out_ptr, patch.to(tl.int64) * num_columns, c, mask, num_columns, value)


def _launch_gradient(
    difference: Tensor,
    row_dots: Tensor,
    norms: Tensor,
    factor: Tensor,
    out: Tensor,
    images: range,
    precision: MatmulPrecision,
    *,
    negative: bool,
) -> None:
    """Compute ``± X factor`` of some images; factor and out, ``[B, P, C]``, hold all of them."""
    num_images, patches, num_columns = factor.shape

    def launch(config: configs.Config) -> None:
        tiles = triton.cdiv(patches, config.rows)
        grid = (triton.cdiv(num_columns, config.inner), tiles, len(images))
        gram_gradient_kernel[grid](
            difference,
            row_dots,
            norms,
            factor,
            out,
            *factor.stride()[:2],
            difference.stride(1),
            images.start,
            num_images,
            row_dots.shape[1],
            patches,
            num_columns,
            NEGATIVE=negative,
            **kernel_options(precision, 1),
            BLOCK_P=config.rows,
            BLOCK_K=config.rows,
            BLOCK_C=config.inner,
            **compiler_options(config),
        )

    run_configured("gram_gradient", precision, 1, launch, len(difference), patches, num_columns)


def run_gram_pairs(
    x: GramInputs,
    factor: Tensor,
    precision: MatmulPrecision,
    *,
    grad_factor_dtype: torch.dtype | None,
    grad_target_dtype: torch.dtype | None,
) -> GramOutput:
    """Launch the stage ``gram`` by pairs of tiles; a gradient whose dtype is None is not computed.

    ``factor`` is the right factor of X, ``[B, P, C]``: [H | Z], or the tokens themselves.
    """
    images, patches = x.norms.shape
    needs_target = grad_target_dtype is not None
    stores = needs_target or grad_factor_dtype is not None
    new = x.norms.new_empty
    stride = 16 * triton.cdiv(patches, 16)  # rows begin at 16-byte boundaries
    # 1. E of a group of images, used again for each group
    group, difference = images, new((0,), dtype=precision.storage_dtype)
    if stores:
        image_bytes = patches * stride * difference.element_size()
        group = min(images, max(1, configs.MAX_DIFFERENCE_BYTES // image_bytes))
        difference = new((group, patches, stride), dtype=precision.storage_dtype)
    grad_factor = grad_target = None
    if grad_factor_dtype is not None:
        grad_factor = new(factor.shape, dtype=grad_factor_dtype)
    target_patches = x.target[:, x.num_prefix_tokens :]
    if grad_target_dtype is not None:
        grad_target = new(target_patches.shape, dtype=grad_target_dtype)

    def some_images(some: range) -> Tensor:
        def launch(config: configs.Config) -> tuple[Tensor, Tensor, Tensor]:
            tiles = triton.cdiv(patches, config.rows)
            loss_partials = new((len(some), tiles * (tiles + 1) // 2))
            row_dots = new((len(some), tiles, patches) if stores else (0,))
            target_row_dots = new((len(some), tiles, patches) if needs_target else (0,))
            launch_modes(
                gram_pairs_kernel,
                "gram_pairs",
                (tiles, tiles, len(some)),
                x,
                (difference, row_dots, target_row_dots, loss_partials),
                (stride, some.start),
                precision,
                config,
                STORES=stores,
                HAS_TARGET_ROW_DOTS=needs_target,
            )
            return loss_partials, row_dots, target_row_dots

        # 2. E, Σ E² and the partial sums of s; one key and so one configuration for all groups
        key = (group, *x.sizes, x.mode, stores, needs_target)
        loss_partials, row_dots, target_row_dots = run_configured(
            "gram_pairs", precision, x.rank, launch, *key
        )
        # 3. X factor, and the gradient in the target
        if grad_factor is not None:
            _launch_gradient(
                difference, row_dots, x.norms, factor, grad_factor, some, precision, negative=False
            )
        if grad_target is not None:
            _launch_gradient(
                difference,
                target_row_dots,
                x.target_norms,
                target_patches,
                grad_target,
                some,
                precision,
                negative=True,
            )
        return loss_partials

    groups = [range(first, min(first + group, images)) for first in range(0, images, group)]
    loss_partials = [some_images(some) for some in groups]
    whole = loss_partials[0] if len(groups) == 1 else torch.cat(loss_partials)
    return GramOutput(whole, grad_factor, grad_target)
