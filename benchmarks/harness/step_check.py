"""Proves that the steps that ``steps.py`` times compute the same losses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from harness.authors_step import AuthorsStep
from singer.methods import SiNGER

TERMS = ("kd", "outlier", "info")
CHECKED_IMAGES = 16


def roundoff(model: SiNGER | AuthorsStep, dtype: torch.dtype, tokens: int) -> float:
    """Return how far a token may be from its exact value, as a share of its size.

    A product of inner length k sums k rounded terms, each off by the accumulator's unit roundoff u
    (float32's, or float64's); in bfloat16 both operands and the result are rounded besides.
    Roundings are independent, so they add in squares (Higham and Mary, 2019): over the terms, over
    a block's products, and over the blocks, which add to the residual stream. Of attention's two
    products one has an inner length of at most the width, the other one of ``tokens``.
    """
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    backbones = (model.teacher_backbone if isinstance(model, AuthorsStep) else model.teacher,)
    backbones = (*backbones, model.student_backbone)
    lengths = [
        module.in_features
        for backbone in backbones
        for module in backbone.model.modules()
        if isinstance(module, nn.Linear)
    ]
    for backbone in backbones:
        lengths += [backbone.dim, tokens] * backbone.depth
    square = sum(lengths) * (torch.finfo(accumulator).eps / 2) ** 2
    if dtype == torch.bfloat16:
        square += 3 * len(lengths) * (torch.finfo(dtype).eps / 2) ** 2
    return math.sqrt(square)


def tolerances(
    method: SiNGER, exact: dict[str, float], images: Tensor, dtype: torch.dtype
) -> dict[str, float]:
    """Return how far a step's losses may be from the exact ones, absolutely.

    Every term is a mean of squared differences ``(a − b)²``. If a and b are off by the share δ of
    their size (:func:`roundoff`), the mean is off by at most ``2 √term · δ (|a| + |b|)``, with root
    mean squares for the sizes (Cauchy and Schwarz); by ``1 / √D`` of it, as the errors of a token's
    D entries have independent signs and each term sums over them. ``I + N Nᵀ``, the adapter at its
    start, makes a token at most twice as long, so the plain side's size, doubled, bounds one side,
    and √term more the other one. A sum over layers has at most ``√layers`` times the bound. In
    bfloat16 the outliers' tolerance is wide, for their excess is small beside their norms: there
    the check sees gross errors only.

    Args:
        method: initial weights.
        exact: its losses on ``images``, from float64.
        images: ``[B, 3, H, W]``, uint8.
        dtype: of the step: bfloat16 stands for autocast.

    Returns:
        Loss to tolerance; ``loss`` is the weighted sum of its terms.
    """
    tokens = [*method.teacher_tokens(images).tokens.values()]
    entry = max(x.square().mean().sqrt().item() for x in tokens)
    longest = max(x[:, 1:].norm(dim=-1).max().item() for x in tokens)
    # An entry of a Gram matrix is at most 1.
    sizes = {"kd": entry, "outlier": longest, "info": max(entry, 1.0)}
    share = 2 * math.sqrt(len(method.layers) / method.teacher.dim)
    share *= roundoff(method, dtype, tokens[0].shape[1])
    allowed = {}
    for term in TERMS:
        root = math.sqrt(exact[term])
        allowed[term] = share * root * (4 * sizes[term] + root)
    return {"loss": sum(method.weights[term] * allowed[term] for term in TERMS), **allowed}


def values(model: SiNGER | AuthorsStep, images: Tensor) -> dict[str, float]:
    """Return a model's losses on a batch ``[B, 3, H, W]``, uint8, as numbers."""
    losses = model.losses(model.student_tokens(images), model.teacher_tokens(images))
    return {name: value.item() for name, value in losses.items()}


def check(
    losses: Mapping[str, Callable[[Tensor], dict[str, float]]], method: SiNGER, images: Tensor
) -> dict[str, dict[str, float]]:
    """Compare the losses of all steps with those of the authors' step in float64.

    Ours in float64 is compared too (``ours-fp64``): there the tolerance is so small that only the
    same formulas meet it.

    Args:
        losses: name to what gives the losses of a batch, from the weights of ``method``; a name
            with ``bf16`` in it stands for bfloat16 autocast, any other one for float32.
        method: the weights they start from.
        images: ``[B, 3, H, W]``, uint8; the first :data:`CHECKED_IMAGES` are used.

    Returns:
        Name to the error of each loss, as a share of its tolerance: above 1 it is wrong.
    """
    images = images[:CHECKED_IMAGES]
    shares: dict[str, dict[str, float]] = {}
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = values(AuthorsStep(method).double(), images)
        found = {"ours-fp64": values(copy.deepcopy(method).double(), images)}
        found |= {name: step(images) for name, step in losses.items()}
        for name, actual in found.items():
            narrow = torch.bfloat16 if "bf16" in name else torch.float32
            dtype = torch.float64 if name == "ours-fp64" else narrow
            allowed = tolerances(method, exact, images, dtype)
            shares[name] = {
                # A tolerance is 0 where the exact loss is.
                key: abs(actual[key] - exact[key]) / max(allowed[key], 1e-300)
                for key in exact
            }
    return shares


def is_right(shares: dict[str, float]) -> bool:
    """Say whether every error is within its tolerance; one that is not a number is not."""
    return all(share <= 1 for share in shares.values())
