"""The last step of the forward: the losses from their parts."""

from __future__ import annotations

import triton
import triton.language as tl

from singer_kernels.backends.triton.kernels.language import number


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
