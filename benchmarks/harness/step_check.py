"""Accuracy check of whole training steps: all compute the authors' losses, within rounding."""

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
    """Return the expected relative error of a token, from a model of its roundings.

    A product of inner length k sums k rounded terms, each with the unit roundoff u of the
    accumulator (float32, or float64); in bfloat16 both operands and the result are rounded too.
    Roundings are independent, so their squares add (Higham and Mary, 2019): over the terms, over
    the products of a block, and over the blocks, which add to the residual stream. Of attention's
    two products one has an inner length of at most the width, the other of ``tokens``.
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
    """Return the absolute tolerance of each loss of a step.

    Every term is a mean of squared differences ``(a − b)²``. If a and b have the relative error δ
    (:func:`roundoff`), the mean is off by at most ``2 √term · δ (|a| + |b|)``, with root mean
    squares for ``|a|`` and ``|b|`` (Cauchy-Schwarz); divided by ``√D``, since the errors of a
    token's D entries have independent signs and each term sums over them. ``I + N Nᵀ``, the initial
    adapter, at most doubles the norm of a token, so twice the teacher's size bounds one side, and
    √term more the other. A sum over layers has at most ``√layers`` times the bound. In bfloat16 the
    outlier loss has a wide tolerance, because the excess of a norm is small compared with the norm:
    there the check finds gross errors only.

    Args:
        method: initial weights.
        exact: its losses on ``images``, computed in float64.
        images: ``[B, 3, H, W]``, uint8.
        dtype: dtype of the step; bfloat16 stands for autocast.

    Returns:
        Loss to tolerance; that of ``loss`` is the weighted sum of the terms'.
    """
    tokens = [*method.teacher_tokens(images).tokens.values()]
    entry = max(x.square().mean().sqrt().item() for x in tokens)
    longest = max(x[:, 1:].norm(dim=-1).max().item() for x in tokens)
    # An entry of a Gram matrix is at most 1.
    sizes = {"kd": entry, "outlier": longest, "info": max(entry, 1.0)}
    relative = 2 * math.sqrt(len(method.layers) / method.teacher.dim)
    relative *= roundoff(method, dtype, tokens[0].shape[1])
    allowed = {}
    for term in TERMS:
        root = math.sqrt(exact[term])
        allowed[term] = relative * root * (4 * sizes[term] + root)
    return {"loss": sum(method.weights[term] * allowed[term] for term in TERMS), **allowed}


def values(model: SiNGER | AuthorsStep, images: Tensor) -> dict[str, float]:
    """Return a model's losses on a batch ``[B, 3, H, W]``, uint8, as numbers."""
    losses = model.losses(model.student_tokens(images), model.teacher_tokens(images))
    return {name: value.item() for name, value in losses.items()}


def check(
    losses: Mapping[str, Callable[[Tensor], dict[str, float]]], method: SiNGER, images: Tensor
) -> dict[str, dict[str, float]]:
    """Compare the losses of all steps with those of the authors' step in float64.

    Our step in float64 is compared too (``ours-fp64``): its tolerance is so small that only the
    same formulas pass.

    Args:
        losses: name to a function from a batch to the losses, with the weights of ``method``; a
            name that contains ``bf16`` is bfloat16 autocast, any other float32.
        method: the initial weights.
        images: ``[B, 3, H, W]``, uint8; the first :data:`CHECKED_IMAGES` are used.

    Returns:
        Name to error / tolerance of each loss; above 1 the step is wrong.
    """
    images = images[:CHECKED_IMAGES]
    shares: dict[str, dict[str, float]] = {}
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = values(AuthorsStep(method).double(), images)
        computed = {"ours-fp64": values(copy.deepcopy(method).double(), images)}
        computed |= {name: step(images) for name, step in losses.items()}
        for name, actual in computed.items():
            dtype = torch.bfloat16 if "bf16" in name else torch.float32
            if name == "ours-fp64":
                dtype = torch.float64
            allowed = tolerances(method, exact, images, dtype)
            shares[name] = {
                # Where the exact loss is 0 the tolerance is too.
                key: abs(actual[key] - exact[key]) / max(allowed[key], 1e-300)
                for key in exact
            }
    return shares


def is_correct(shares: dict[str, float]) -> bool:
    """Return whether every error is within its tolerance; NaN is not."""
    return all(share <= 1 for share in shares.values())
