"""SiNGER's losses in eager torch, as in the authors' code: autograd saves every intermediate.

As in their code, CLS is the only prefix token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def refine(tokens: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return ``F̂ = F + (F Wd) Wu`` for tokens ``[B, T, D]``; the first, CLS, is unchanged."""
    patches = tokens[:, 1:]
    return torch.cat([tokens[:, :1], patches + (patches @ down) @ up], dim=1)


def _norms(refined: Tensor) -> Tensor:
    norms = refined[:, 1:].norm(dim=-1)
    # torch.quantile takes no bfloat16.
    return norms.to(torch.promote_types(norms.dtype, torch.float32))


def outlier_loss(refined: Tensor, quantile: float) -> Tensor:
    """Return the mean squared excess of the patch norms above their image's quantile.

    Args:
        refined: F̂, ``[B, 1 + P, D]``.
        quantile: γ in [0, 1].
    """
    norms = _norms(refined)
    threshold = torch.quantile(norms, quantile, dim=1, keepdim=True).detach()
    outliers = norms[norms > threshold]
    if outliers.numel() == 0:
        return norms.new_zeros(())
    return F.mse_loss(outliers, threshold.expand_as(norms)[norms > threshold])


def masked_outlier_loss(refined: Tensor, quantile: float) -> Tensor:
    """Return :func:`outlier_loss`, in operations that every torch compiles into one graph.

    A mask replaces boolean indexing, whose result's size synchronises the host; sorting replaces
    ``torch.quantile``, which in some releases reads its argument's values on the host.
    """
    norms = _norms(refined)
    ordered = norms.detach().sort(dim=1).values
    position = quantile * (norms.shape[1] - 1)
    below, above = ordered[:, math.floor(position)], ordered[:, math.ceil(position)]
    threshold = torch.lerp(below, above, position - math.floor(position))[:, None]
    count = (norms > threshold).sum().clamp_min(1)
    return (norms - threshold).clamp_min(0).square().sum() / count


def gram_loss(tokens: Tensor, target: Tensor) -> Tensor:
    """Return the MSE of two cosine-similarity matrices of the patches of ``[B, 1 + P, D]``."""
    rows, others = (F.normalize(x[:, 1:], dim=-1) for x in (tokens, target))
    return F.mse_loss(rows @ rows.mT, others @ others.mT)
