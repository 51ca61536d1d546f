"""Stage ``outlier``: each image's norm threshold by bitwise selection, and its loss terms."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.language import to_scalar
from singer_kernels.backends.triton.launch import block_of, compiler_options, kernel_dtype


@triton.jit
def _kth_smallest(keys, k, BITS: tl.constexpr):
    """Return the k-th smallest (from 0) of non-negative integers.

    It is the largest v with at most k keys below v, built bit by bit from the highest.
    """
    value = tl.zeros((), keys.dtype)
    one = tl.full((), 1, keys.dtype)
    for step in range(BITS):
        candidate = value | (one << (BITS - 1 - step))
        num_below = tl.sum((keys < candidate).to(tl.int32))
        value = tl.where(num_below <= k, candidate, value)
    return value


@triton.jit(do_not_specialize=["lower_index"])
def outlier_kernel(
    norms_ptr,  # n, [B, P]
    teacher_norms_ptr,  # norms of F, [B, P]; HAS_TEACHER_NORMS
    threshold_ptr,  # out: q, [B]
    squares_ptr,  # out: sums of (n − q)² over the outliers, [B]
    counts_ptr,  # out: numbers of outliers, [B]
    cancellation_ratio_ptr,  # out: largest ‖F‖ / n, [B]; HAS_TEACHER_NORMS
    num_patches,
    lower_index,  # ⌊γ (P − 1)⌋
    fraction_high,  # w = γ (P − 1) − ⌊γ (P − 1)⌋, rounded to float32
    fraction_low,  # w − fraction_high
    HAS_TEACHER_NORMS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``q = lerp(n₍ₖ₎, n₍ₖ₊₁₎, w)`` as in ``torch.quantile``; ``Σ (n − q)²`` and count of n > q.

    One program per image. A NaN norm makes q NaN and is an outlier, as in the reference.
    """
    image = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK_P)
    in_range = patch < num_patches
    norms = tl.load(norms_ptr + image * num_patches + patch, mask=in_range, other=0.0)
    is_nan = norms != norms
    # 1. sort keys: the bits of non-negative floats order as integers; NaN and padding come last
    if ACC == tl.float64:
        keys = norms.to(tl.int64, bitcast=True)
        last = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    else:
        keys = norms.to(tl.int32, bitcast=True)
        last = tl.full((), 0x7FFFFFFF, tl.int32)
    keys = tl.where(in_range & (norms == norms), keys, last)
    # 2. the order statistics n₍ₖ₎ and n₍ₖ₊₁₎
    low_key = _kth_smallest(keys, lower_index, 63 if ACC == tl.float64 else 31)
    not_above = tl.sum((keys <= low_key).to(tl.int32))
    next_key = tl.min(tl.where(keys > low_key, keys, last))
    fraction = to_scalar(fraction_high, ACC) + fraction_low
    is_between = (fraction > 0) & (not_above <= lower_index + 1)
    high_key = tl.where(is_between, next_key, low_key)
    # 3. q, interpolated as torch.lerp does
    low = low_key.to(ACC, bitcast=True)
    high = high_key.to(ACC, bitcast=True)
    gap = high - low
    threshold = tl.where(fraction < 0.5, low + fraction * gap, high - gap * (1.0 - fraction))
    has_nan = tl.max(is_nan.to(tl.int32)) > 0
    threshold = tl.where(has_nan, float("nan"), threshold)
    # 4. Σ (n − q)² and count over the outliers; the largest ‖F‖ / n
    is_finite = tl.abs(norms) < float("inf")
    is_outlier = in_range & ~((norms <= threshold) & is_finite)
    excess = tl.where(is_outlier, norms - threshold, 0.0)
    tl.store(threshold_ptr + image, threshold)
    tl.store(squares_ptr + image, tl.sum(excess * excess))
    tl.store(counts_ptr + image, tl.sum(is_outlier.to(tl.int32)).to(ACC))
    if HAS_TEACHER_NORMS:
        offsets = image * num_patches + patch
        teacher_norms = tl.load(teacher_norms_ptr + offsets, mask=in_range, other=0.0)
        ratio = tl.where(norms == 0, 0.0, teacher_norms / norms)
        tl.store(cancellation_ratio_ptr + image, tl.max(ratio))


class OutlierOutput(NamedTuple):
    """Tensors of the stage ``outlier``."""

    threshold: Tensor  # q, [B]
    squares: Tensor  # sums of (n − q)² over the outliers, [B]
    counts: Tensor  # numbers of outliers, [B]
    cancellation_ratio: Tensor | None  # largest ‖F‖ / n, [B]


def _to_float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def quantile_position(quantile: float, patches: int, acc: torch.dtype) -> tuple[int, float]:
    """Return ``⌊γ (P − 1)⌋`` and the fraction, in the accumulation dtype's arithmetic as torch."""
    position = quantile * (patches - 1)
    if acc == torch.float32:
        position = _to_float32(_to_float32(quantile) * (patches - 1))
    index = math.floor(position)
    return index, position - index


def run_outlier(norms: Tensor, teacher_norms: Tensor | None, quantile: float) -> OutlierOutput:
    """Launch the stage ``outlier`` on n and, for the cancellation ratio, norms of F: ``[B, P]``."""
    images, patches = norms.shape
    new = norms.new_empty
    threshold, squares, counts = (new((images,)) for _ in range(3))
    cancellation_ratio = None if teacher_norms is None else new((images,))
    index, fraction = quantile_position(quantile, patches, norms.dtype)
    # Triton passes a float as float32: the rest goes in a second argument.
    fraction_high = _to_float32(fraction)
    block_p = block_of(patches)
    outlier_kernel[(images,)](
        norms,
        teacher_norms,
        threshold,
        squares,
        counts,
        cancellation_ratio,
        patches,
        index,
        fraction_high,
        fraction - fraction_high,
        HAS_TEACHER_NORMS=teacher_norms is not None,
        ACC=kernel_dtype(norms.dtype),
        BLOCK_P=block_p,
        **compiler_options(configs.Config(0, 0, configs.outlier_warps(block_p), 1)),
    )
    return OutlierOutput(threshold, squares, counts, cancellation_ratio)
