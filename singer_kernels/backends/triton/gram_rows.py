"""Stage ``gram`` by rows: each program owns rows of the Gram matrices; no ``[P, P]`` in memory."""

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
from singer_kernels.backends.triton.launch import run_configured


@triton.jit
def gram_rows_kernel(
    tokens_ptr,  # F̂, [B, T, D]; "materialized"
    target_ptr,  # R, [B, T, D]
    up_ptr,  # Wu, [r, D]; "recompute"
    hz_ptr,  # [H | Z], [B, P, 2r]
    split_bf16_ptr,  # high and low bf16 of H and L, [B, P, 4, BLOCK_R]; "identity"
    norms_ptr,  # n, [B, P]
    target_norms_ptr,  # norms of R, [B, P]
    cancellation_ratio_ptr,  # largest ‖F‖ / n, [B]; not "materialized"
    grad_hz_ptr,  # out: X [H | Z], [B, P, 2r]
    loss_partials_ptr,  # out: sums of E², [B, tiles]
    tokens_stride_image,
    tokens_stride_token,
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
    """``Σ E²`` and ``X [H | Z]`` of BLOCK_P rows of one image.

    ``X = 4/(B P²) [diag(1/n) E diag(1/n) − diag(s/n²)]``; see ``gram_tile``.
    """
    tile, image = tl.program_id(0), tl.program_id(1)
    num_images = tl.num_programs(1)
    norms_ptr += image * num_patches
    target_norms_ptr += image * num_patches
    patch_i = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    mask_i = patch_i < num_patches
    if skips_image(cancellation_ratio_ptr, image, MODE):
        return
    image_index = image.to(tl.int64)
    target_ptr += image_index * target_stride_image
    hz_ptr += image_index * num_patches * 2 * rank
    if MODE == "materialized":
        tokens_ptr += image_index * tokens_stride_image
    if MODE == "identity":
        split_bf16_ptr += image_index * num_patches * 4 * BLOCK_R
    grad_hz_ptr += image_index * num_patches * 2 * rank
    k = tl.arange(0, BLOCK_R)

    # 1. Σ E², s = rowsum(E ∘ G(F̂)), E diag(1/n) H and E diag(1/n) Z over all columns
    loss = tl.zeros((BLOCK_P,), ACC)
    row_dots = tl.zeros((BLOCK_P,), ACC)
    e_h = tl.zeros((BLOCK_P, BLOCK_R), ACC)
    e_z = tl.zeros((BLOCK_P, BLOCK_R), ACC)
    for start in range(0, num_patches, BLOCK_P):
        patch_j = start + tl.arange(0, BLOCK_P)
        mask_j = patch_j < num_patches
        difference, gram, _ = gram_tile(
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
        loss += tl.sum(difference * difference, axis=1)
        row_dots += tl.sum(difference * gram, axis=1)
        inv_norms_j = reciprocal(tl.load(norms_ptr + patch_j, mask=mask_j, other=0.0))[:, None]
        offsets_j = patch_j.to(tl.int64) * 2 * rank
        h_j = load_tile(hz_ptr, offsets_j, k, mask_j, rank) * inv_norms_j
        z_j = load_tile(hz_ptr + rank, offsets_j, k, mask_j, rank) * inv_norms_j
        left = operand(difference, OPERAND)
        e_h = dot(left, operand(h_j, OPERAND), e_h, PRECISION)
        e_z = dot(left, operand(z_j, OPERAND), e_z, PRECISION)
    tl.store(loss_partials_ptr + image * tl.num_programs(0) + tile, tl.sum(loss))

    # 2. X [H | Z] = 4/(B P²) (E diag(1/n) [H | Z] / n − s/n² [H | Z])
    scale = 4.0 / (to_scalar(num_images, ACC) * num_patches * num_patches)
    norms = tl.load(norms_ptr + patch_i, mask=mask_i, other=0.0)
    inv_norms = reciprocal(norms)
    norm_grad_coef = gram_norm_coefficient(norms, row_dots)
    inv_norms, norm_grad_coef = (scale * inv_norms)[:, None], (scale * norm_grad_coef)[:, None]
    offsets_i = patch_i.to(tl.int64) * 2 * rank
    h_i = load_tile(hz_ptr, offsets_i, k, mask_i, rank)
    value = e_h * inv_norms - h_i * norm_grad_coef
    store_tile(grad_hz_ptr, offsets_i, k, mask_i, rank, value)
    z_i = load_tile(hz_ptr + rank, offsets_i, k, mask_i, rank)
    value = e_z * inv_norms - z_i * norm_grad_coef
    store_tile(grad_hz_ptr + rank, offsets_i, k, mask_i, rank, value)


def run_gram_rows(
    x: GramInputs, precision: MatmulPrecision, *, grad_hz_dtype: torch.dtype
) -> GramOutput:
    """Launch the stage ``gram`` by rows: the loss and ``X [H | Z]``."""
    images, patches = x.norms.shape
    new = x.norms.new_empty
    grad_hz = new((images, patches, 2 * x.rank), dtype=grad_hz_dtype)

    def launch(config: configs.Config) -> Tensor:
        tiles = triton.cdiv(patches, config.rows)
        loss_partials = new((images, tiles))
        outputs = (grad_hz, loss_partials)
        grid = (tiles, images)
        launch_modes(gram_rows_kernel, "gram_rows", grid, x, outputs, (), precision, config)
        return loss_partials

    key = (images, *x.sizes, x.mode)
    loss_partials = run_configured("gram_rows", precision, x.rank, launch, *key)
    return GramOutput(loss_partials, grad_hz, None)
