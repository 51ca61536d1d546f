"""Stage ``outlier``, and the sums that make the three losses."""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.kernels.losses import sum_losses_kernel
from singer_kernels.backends.triton.kernels.outlier import outlier_fwd_kernel
from singer_kernels.backends.triton.stages.common import block_of, compiling, kernel_dtype


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
