"""The pieces of SiNGER's losses in the manner of the authors' code: eager, everything stored.

Prefix tokens are CLS alone, as their code has it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def refine(tokens: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return ``F̂ = F + (F Wd) Wu`` on all tokens ``[B, T, D]`` but the first, in a new tensor."""
    patches = tokens[:, 1:]
    return torch.cat([tokens[:, :1], patches + (patches @ down) @ up], dim=1)


def _norms(refined: Tensor) -> Tensor:
    norms = refined[:, 1:].norm(dim=-1)
    return norms.to(torch.promote_types(norms.dtype, torch.float32))  # what torch.quantile takes


def outlier_loss(refined: Tensor, quantile: float) -> Tensor:
    """Return the mean squared excess of the patch norms above their image's quantile.

    Args:
        refined: F̂, ``[B, 1 + P, D]``.
        quantile: γ in [0, 1].
    """
    norms = _norms(refined)
    limit = torch.quantile(norms, quantile, dim=1, keepdim=True).detach()
    outliers = norms[norms > limit]
    if outliers.numel() == 0:
        return norms.new_zeros(())
    return F.mse_loss(outliers, limit.expand_as(norms)[norms > limit])


def masked_outlier_loss(refined: Tensor, quantile: float) -> Tensor:
    """Return the same as :func:`outlier_loss`, by what every torch compiles into one graph.

    No index has a size that the host waits for; and the quantile is read off the sorted norms, for
    ``torch.quantile`` looks at its argument's values in some releases.
    """
    norms = _norms(refined)
    ordered = norms.detach().sort(dim=1).values
    rank = quantile * (norms.shape[1] - 1)
    below, above = ordered[:, math.floor(rank)], ordered[:, math.ceil(rank)]
    limit = torch.lerp(below, above, rank - math.floor(rank))[:, None]
    count = (norms > limit).sum().clamp_min(1)
    return (norms - limit).clamp_min(0).square().sum() / count


def gram_loss(tokens: Tensor, target: Tensor) -> Tensor:
    """Return the MSE of two cosine-similarity matrices of the patches of ``[B, 1 + P, D]``."""
    rows, others = (F.normalize(x[:, 1:], dim=-1) for x in (tokens, target))
    return F.mse_loss(rows @ rows.mT, others @ others.mT)
