"""The pieces of SiNGER's losses in the manner of the authors' code: eager, everything stored.

Prefix tokens are CLS alone, as their code has it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def refine(tokens: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return ``F̂ = F + (F Wd) Wu`` on all tokens ``[B, T, D]`` but the first, in a new tensor."""
    patches = tokens[:, 1:]
    return torch.cat([tokens[:, :1], patches + (patches @ down) @ up], dim=1)


def _norms_and_limit(refined: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    norms = refined[:, 1:].norm(dim=-1)
    norms = norms.to(torch.promote_types(norms.dtype, torch.float32))  # what torch.quantile takes
    return norms, torch.quantile(norms, quantile, dim=1, keepdim=True).detach()


def outlier_loss(refined: Tensor, quantile: float) -> Tensor:
    """Return the mean squared excess of the patch norms above their image's quantile.

    Args:
        refined: F̂, ``[B, 1 + P, D]``.
        quantile: γ in [0, 1].
    """
    norms, limit = _norms_and_limit(refined, quantile)
    outliers = norms[norms > limit]
    if outliers.numel() == 0:
        return norms.new_zeros(())
    return F.mse_loss(outliers, limit.expand_as(norms)[norms > limit])


def masked_outlier_loss(refined: Tensor, quantile: float) -> Tensor:
    """Return the same as :func:`outlier_loss`, without an index whose size the host waits for."""
    norms, limit = _norms_and_limit(refined, quantile)
    count = (norms > limit).sum().clamp_min(1)
    return (norms - limit).clamp_min(0).square().sum() / count


def gram_loss(tokens: Tensor, target: Tensor) -> Tensor:
    """Return the MSE of two cosine-similarity matrices of the patches of ``[B, 1 + P, D]``."""
    rows, others = (F.normalize(x[:, 1:], dim=-1) for x in (tokens, target))
    return F.mse_loss(rows @ rows.mT, others @ others.mT)
