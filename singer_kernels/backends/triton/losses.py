"""The last step of the forward: the losses from their parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.language import number
from singer_kernels.backends.triton.launch import compiling, kernel_dtype
from singer_kernels.backends.triton.outlier import Outliers


@triton.jit(do_not_specialize=["num_kd", "num_images", "num_info"])
def sum_losses_kernel(
    kd_ptr,  # sums of (F̂ − S)², [num_kd]
    squares_ptr,  # sums of (n − q)², [B]
    counts_ptr,  # [B]
    info_ptr,  # sums of E², [num_info]
    kd_out_ptr,  # out: []
    outlier_out_ptr,  # out: []
    outlier_weight_ptr,  # out: 2 / count, []
    info_out_ptr,  # out: []
    num_kd,
    num_images,
    num_info,
    num_tokens,
    num_patches,
    width,
    HAS_INFO: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The three losses from their parts, summed in a fixed order by one program."""
    index = tl.arange(0, BLOCK)
    kd = tl.zeros((BLOCK,), ACC)
    for start in range(0, num_kd, BLOCK):
        kd += tl.load(kd_ptr + start + index, mask=start + index < num_kd, other=0.0)
    images = number(num_images, ACC)
    tl.store(kd_out_ptr, tl.sum(kd) / (images * num_tokens * width))
    squares = tl.zeros((BLOCK,), ACC)
    counts = tl.zeros((BLOCK,), ACC)
    for start in range(0, num_images, BLOCK):
        mask = start + index < num_images
        squares += tl.load(squares_ptr + start + index, mask=mask, other=0.0)
        counts += tl.load(counts_ptr + start + index, mask=mask, other=0.0)
    count = tl.maximum(tl.sum(counts), 1.0)
    tl.store(outlier_out_ptr, tl.sum(squares) / count)
    tl.store(outlier_weight_ptr, 2.0 / count)
    if HAS_INFO:
        info = tl.zeros((BLOCK,), ACC)
        for start in range(0, num_info, BLOCK):
            info += tl.load(info_ptr + start + index, mask=start + index < num_info, other=0.0)
        tl.store(info_out_ptr, tl.sum(info) / (images * num_patches * num_patches))


def sum_losses(
    kd_parts: Tensor, outliers: Outliers, gram_parts: Tensor | None, shape: torch.Size, prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return kd, outlier, info and 2 / count, all scalars; info is not written without a Gram."""
    images, tokens, width = shape
    kd, outlier_loss, info, weight = (kd_parts.new_empty(()) for _ in range(4))
    sum_losses_kernel[(1,)](
        kd_parts,
        outliers.squares,
        outliers.counts,
        gram_parts,
        kd,
        outlier_loss,
        weight,
        info,
        kd_parts.numel(),
        images,
        0 if gram_parts is None else gram_parts.numel(),
        tokens,
        tokens - prefix,
        width,
        HAS_INFO=gram_parts is not None,
        ACC=kernel_dtype(kd_parts.dtype),
        BLOCK=1024,
        **compiling(configs.SUMS),
    )
    return kd, outlier_loss, info, weight


def mean_of_parts(parts: Tensor, norms: Tensor) -> Tensor:
    """Return the Gram loss alone, from its parts; norms ``[B, P]``."""
    images, patches = norms.shape
    return parts.sum() / (images * patches * patches)
