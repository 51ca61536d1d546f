"""The three losses from the partial sums of the stages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.language import to_scalar
from singer_kernels.backends.triton.launch import compiler_options, kernel_dtype
from singer_kernels.backends.triton.outlier import OutlierOutput

CHUNK = 1024
"""Partial sums that a program reads at a time."""


@triton.jit(do_not_specialize=["num_partials"])
def sum_chunks_kernel(
    partials_ptr,  # [num_partials]
    sums_ptr,  # out: sums of BLOCK consecutive ones, [programs]
    num_partials,
    BLOCK: tl.constexpr,
):
    """Sum BLOCK consecutive partials per program."""
    chunk = tl.program_id(0)
    index = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    partials = tl.load(partials_ptr + index, mask=index < num_partials, other=0.0)
    tl.store(sums_ptr + chunk, tl.sum(partials))


@triton.jit(do_not_specialize=["num_kd_partials", "num_images", "num_info_partials"])
def sum_losses_kernel(
    kd_partials_ptr,  # sums of (F̂ − S)², [num_kd_partials]
    squares_ptr,  # sums of (n − q)², [B]
    counts_ptr,  # numbers of outliers, [B]
    info_partials_ptr,  # sums of E², [num_info_partials]; HAS_INFO
    kd_out_ptr,  # out: []
    outlier_out_ptr,  # out: []
    outlier_weight_ptr,  # out: 2 / count, []
    info_out_ptr,  # out: []; HAS_INFO
    num_kd_partials,
    num_images,
    num_info_partials,
    num_tokens,
    num_patches,
    width,
    HAS_INFO: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``kd = Σ (F̂ − S)² / (B T D)``, ``outlier = Σ (n − q)² / count``, ``info = Σ E² / (B P²)``.

    One program sums the partials in a fixed order: results are reproducible bit by bit.
    """
    # 1. kd
    index = tl.arange(0, BLOCK)
    kd = tl.zeros((BLOCK,), ACC)
    for start in range(0, num_kd_partials, BLOCK):
        mask = start + index < num_kd_partials
        kd += tl.load(kd_partials_ptr + start + index, mask=mask, other=0.0)
    images = to_scalar(num_images, ACC)
    tl.store(kd_out_ptr, tl.sum(kd) / (images * num_tokens * width))
    # 2. outlier, and its weight 2 / count in the backward
    squares = tl.zeros((BLOCK,), ACC)
    counts = tl.zeros((BLOCK,), ACC)
    for start in range(0, num_images, BLOCK):
        mask = start + index < num_images
        squares += tl.load(squares_ptr + start + index, mask=mask, other=0.0)
        counts += tl.load(counts_ptr + start + index, mask=mask, other=0.0)
    count = tl.maximum(tl.sum(counts), 1.0)
    tl.store(outlier_out_ptr, tl.sum(squares) / count)
    tl.store(outlier_weight_ptr, 2.0 / count)
    # 3. info
    if HAS_INFO:
        info = tl.zeros((BLOCK,), ACC)
        for start in range(0, num_info_partials, BLOCK):
            mask = start + index < num_info_partials
            info += tl.load(info_partials_ptr + start + index, mask=mask, other=0.0)
        tl.store(info_out_ptr, tl.sum(info) / (images * num_patches * num_patches))


def few_partials(partials: Tensor) -> Tensor:
    """Return at most ``configs.MAX_PARTIALS`` numbers with the sum of the given ones."""
    while (count := partials.numel()) > configs.MAX_PARTIALS:
        sums = partials.new_empty(triton.cdiv(count, CHUNK))
        sum_chunks_kernel[(sums.numel(),)](
            partials, sums, count, BLOCK=CHUNK, **compiler_options(configs.SMALL)
        )
        partials = sums
    return partials


def sum_losses(
    kd_partials: Tensor,
    outliers: OutlierOutput,
    info_partials: Tensor | None,
    shape: torch.Size,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return kd, outlier, info and 2 / count, ``[]`` each; info is unwritten without partials."""
    images, tokens, width = shape
    kd_partials = few_partials(kd_partials)
    if info_partials is not None:
        info_partials = few_partials(info_partials)
    kd, outlier_loss, info, weight = (kd_partials.new_empty(()) for _ in range(4))
    sum_losses_kernel[(1,)](
        kd_partials,
        outliers.squares,
        outliers.counts,
        info_partials,
        kd,
        outlier_loss,
        weight,
        info,
        kd_partials.numel(),
        images,
        0 if info_partials is None else info_partials.numel(),
        tokens,
        tokens - prefix,
        width,
        HAS_INFO=info_partials is not None,
        ACC=kernel_dtype(kd_partials.dtype),
        BLOCK=CHUNK,
        **compiler_options(configs.SMALL),
    )
    return kd, outlier_loss, info, weight
