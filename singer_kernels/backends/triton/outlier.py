"""Stage ``outlier``: each image's quantile by bitwise selection, and its share of the loss."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.language import number
from singer_kernels.backends.triton.launch import block_of, compiling, kernel_dtype


@triton.jit
def _kth_smallest(keys, k, BITS: tl.constexpr):
    """Return the k-th smallest (from 0) of non-negative integers, built from its highest bit.

    It is the largest v with at most k keys below v.
    """
    value = tl.zeros((), keys.dtype)
    one = tl.full((), 1, keys.dtype)
    for step in range(BITS):
        candidate = value | (one << (BITS - 1 - step))
        below = tl.sum((keys < candidate).to(tl.int32))
        value = tl.where(below <= k, candidate, value)
    return value


@triton.jit(do_not_specialize=["rank_below"])
def outlier_fwd_kernel(
    norms_ptr,  # n, [B, P]
    plain_norms_ptr,  # norms of F, [B, P]; HAS_PLAIN
    threshold_ptr,  # out: q, [B]
    squares_ptr,  # out: sums of (n − q)² over the outliers, [B]
    counts_ptr,  # out: how many outliers, [B]
    amplification_ptr,  # out: largest ‖F‖ / n, [B]; HAS_PLAIN
    num_patches,
    rank_below,  # ⌊γ (P − 1)⌋
    weight,  # γ (P − 1) − ⌊γ (P − 1)⌋
    weight_rest,  # what float32 loses of it
    HAS_PLAIN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """``q = lerp(n₍ₖ₎, n₍ₖ₊₁₎, w)`` as ``torch.quantile`` has it; ``Σ (n − q)²`` and the count.

    One program per image. Norms are not negative, so their bits are ordered as they are; NaN is
    an outlier of a NaN quantile, as in the reference.
    """
    image = tl.program_id(0).to(tl.int64)
    patch = tl.arange(0, BLOCK_P)
    in_range = patch < num_patches
    norms = tl.load(norms_ptr + image * num_patches + patch, mask=in_range, other=0.0)
    is_nan = norms != norms
    if ACC == tl.float64:
        keys = norms.to(tl.int64, bitcast=True)
        last = tl.full((), 0x7FFFFFFFFFFFFFFF, tl.int64)
    else:
        keys = norms.to(tl.int32, bitcast=True)
        last = tl.full((), 0x7FFFFFFF, tl.int32)
    keys = tl.where(in_range & (norms == norms), keys, last)
    low_key = _kth_smallest(keys, rank_below, 63 if ACC == tl.float64 else 31)
    through = tl.sum((keys <= low_key).to(tl.int32))
    next_key = tl.min(tl.where(keys > low_key, keys, last))
    share = number(weight, ACC) + weight_rest
    is_between = (share > 0) & (through <= rank_below + 1)
    high_key = tl.where(is_between, next_key, low_key)
    low = low_key.to(ACC, bitcast=True)
    high = high_key.to(ACC, bitcast=True)
    gap = high - low
    threshold = tl.where(share < 0.5, low + share * gap, high - gap * (1.0 - share))
    has_nan = tl.max(is_nan.to(tl.int32)) > 0
    threshold = tl.where(has_nan, float("nan"), threshold)
    is_finite = tl.abs(norms) < float("inf")
    is_outlier = in_range & ~((norms <= threshold) & is_finite)
    excess = tl.where(is_outlier, norms - threshold, 0.0)
    tl.store(threshold_ptr + image, threshold)
    tl.store(squares_ptr + image, tl.sum(excess * excess))
    tl.store(counts_ptr + image, tl.sum(is_outlier.to(tl.int32)).to(ACC))
    if HAS_PLAIN:
        plain = tl.load(plain_norms_ptr + image * num_patches + patch, mask=in_range, other=0.0)
        ratio = tl.where(norms == 0, 0.0, plain / norms)
        tl.store(amplification_ptr + image, tl.max(ratio))


class Outliers(NamedTuple):
    """What the stage ``outlier`` gives."""

    threshold: Tensor  # q, [B]
    squares: Tensor  # [B]
    counts: Tensor  # [B]
    amplification: Tensor | None  # largest ‖F‖ / n, [B]


def quantile_rank(quantile: float, patches: int, acc: torch.dtype) -> tuple[int, float]:
    """Return ``⌊γ (P − 1)⌋`` and the rest, computed in the accumulation dtype as torch does."""
    rank = quantile * (patches - 1)
    if acc == torch.float32:
        (gamma,) = struct.unpack("f", struct.pack("f", quantile))
        (rank,) = struct.unpack("f", struct.pack("f", gamma * (patches - 1)))
    below = math.floor(rank)
    return below, rank - below


def run_outlier(norms: Tensor, plain_norms: Tensor | None, quantile: float) -> Outliers:
    """Run the stage ``outlier``: norms ``[B, P]``, and the plain ones if ratios are asked for."""
    images, patches = norms.shape
    new = norms.new_empty
    threshold, squares, counts = (new((images,)) for _ in range(3))
    amplification = None if plain_norms is None else new((images,))
    below, share = quantile_rank(quantile, patches, norms.dtype)
    (kept,) = struct.unpack("f", struct.pack("f", share))
    block_p = block_of(patches)
    outlier_fwd_kernel[(images,)](
        norms,
        plain_norms,
        threshold,
        squares,
        counts,
        amplification,
        patches,
        below,
        kept,
        share - kept,
        HAS_PLAIN=plain_norms is not None,
        ACC=kernel_dtype(norms.dtype),
        BLOCK_P=block_p,
        **compiling(configs.Config(0, 0, configs.outlier_warps(block_p), 1)),
    )
    return Outliers(threshold, squares, counts, amplification)
