"""How far a low-precision result may lie from the float64 truth: first-order error analysis.

``u(dtype) = eps / 2`` is the relative error of one rounding. A product of inner length k with
float32 accumulation, rounded once to its dtype, has ``|δ(AB)| <= (u + k u32) |A| |B|`` entry by
entry; a float32 sum of k terms has ``k u32`` times the sum of their magnitudes. The bounds below
chain these, on the values of the case at hand; second-order terms are covered by the factor SLACK.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import truth
from cases import Case
from torch import Tensor

from singer_kernels import FusedLossesOutput

SLACK = 1.05
F32 = torch.float32


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


U32 = unit(F32)


@dataclass(frozen=True)
class Bounds:
    refined: truth.Array  # [B, T, D]
    norms: truth.Array  # [B, P]
    threshold: truth.Array  # [B, 1]
    kd: float
    outlier: float
    info: float


def refined_bound(case: Case, product: torch.dtype, u_operand: float = 0.0) -> truth.Array:
    """Bound the error of F̂ ``[B, T, D]`` in float32, of products ``F Wd`` and ``H Wu``."""
    exact, prefix, u = case.values(), case.prefix, unit(product)
    width, rank = case.down.shape
    # H = F Wd, then H Wu, then one float32 addition. Under autocast F, Wd and Wu are rounded too.
    f = case.teacher[:, prefix:]
    d_hidden = (u + 2 * u_operand + width * U32) * (np.abs(f) @ np.abs(case.down))
    d_delta = d_hidden @ np.abs(case.up)
    d_delta += (u + u_operand + rank * U32) * (np.abs(f @ case.down) @ np.abs(case.up))
    d_refined = np.zeros_like(case.teacher)
    d_refined[:, prefix:] = SLACK * (d_delta + U32 * np.abs(exact.refined[:, prefix:]))
    return d_refined


def loss_bounds(
    case: Case,
    product: torch.dtype,
    rows: torch.dtype,
    target_rows: torch.dtype,
    operand: torch.dtype | None = None,
) -> Bounds:
    """Bound the forward error.

    Args:
        case: the inputs, already rounded to their dtypes.
        product: the dtype of ``F Wd`` and ``H Wu``.
        rows: that of the rows whose products are G(F̂).
        target_rows: that of the rows of the target.
        operand: the dtype to which autocast rounds wider operands; None: it rounds none.
    """
    exact = case.values()
    prefix = case.prefix
    patches, width = exact.norms.shape[1], case.down.shape[0]
    u_operand = 0.0 if operand is None else unit(operand)
    d_refined = refined_bound(case, product, u_operand)

    # A mean of squares a²: 2|a| δa + δa², and the sum over its terms.
    def mean_square(a, d_a):
        terms = a.size + 3
        return float(np.mean(2 * np.abs(a) * d_a + d_a**2) + terms * U32 * np.mean(a**2))

    difference = np.abs(case.student - exact.refined)
    kd = mean_square(difference, d_refined + U32 * difference)

    # A norm moves by at most that of δF̂; a quantile by at most the largest move, plus the rounding
    # of the rank (at most P - 1) and of the interpolation.
    d_length = np.linalg.norm(d_refined[:, prefix:], axis=-1)
    d_norms = d_length + width * U32 * exact.norms
    d_threshold = np.max(d_norms + 4 * patches * U32 * exact.norms, axis=1, keepdims=True)
    excess = exact.norms - exact.threshold[:, None]
    # The same patches exceed, or the bound would not hold.
    assert (np.abs(excess) > d_norms + d_threshold).all()
    above = excess > 0
    outlier = mean_square(excess[above], (d_norms + d_threshold)[above])

    # A normalised row moves by ‖a/|a| - b/|b|‖ <= 2 ‖a - b‖ / (|a| + |b|), by its own rounding
    # (relative, or the half spacing of subnormal numbers), and by that of its norm; an entry of G
    # by its two rows, its accumulation and its rounding.
    def gram_bound(d_row, dtype):
        spacing = torch.finfo(dtype).smallest_normal * unit(dtype)
        d_row = d_row + unit(dtype) + np.sqrt(width) * spacing + (width + 2) * U32
        either = d_row[:, :, None] + d_row[:, None, :]
        return either + d_row[:, :, None] * d_row[:, None, :] + width * U32 + unit(dtype)

    target = case.teacher if case.target is None else case.target
    gram = truth.gram_matrix(exact.refined, prefix) - truth.gram_matrix(target, prefix)
    d_gram = gram_bound(2 * d_length / (2 * exact.norms - d_length), rows)
    d_gram = d_gram + gram_bound(np.zeros_like(exact.norms), target_rows)
    info = mean_square(gram, SLACK * d_gram)
    return Bounds(
        d_refined, SLACK * d_norms, SLACK * d_threshold, SLACK * kd, SLACK * outlier, SLACK * info
    )


@dataclass(frozen=True)
class GradientBounds:
    student: truth.Array
    down: truth.Array
    up: truth.Array


def gradient_bounds(
    case: Case,
    weights: tuple[float, float],
    student: torch.dtype,
    product: torch.dtype,
    adapter: torch.dtype,
) -> GradientBounds:
    """Bound the gradients of ``w_kd kd + w_out outlier`` where the forward products are exact.

    The gradient of F̂ is a float32 number; the products' dtype rounds it, then ``dF̂ Wuᵀ``, then
    each image's part of ``Hᵀ dF̂`` and ``Fᵀ dH`` and their sum; the adapter's dtype rounds last.
    """
    exact = case.values()
    prefix = case.prefix
    images, tokens, width = case.teacher.shape
    w_kd, w_out = weights
    f, f_hat = case.teacher[:, prefix:], exact.refined[:, prefix:]
    h = f @ case.down

    kd_part = 2 * w_kd / case.teacher.size * (f_hat - case.student[:, prefix:])
    coefficients = truth.outlier_coefficients(exact.norms, case.gamma, w_out)[..., None]
    excess = exact.norms - exact.threshold[:, None]
    # The excess loses digits to cancellation: n and q are good to (D + 4 P) u32 of the largest n.
    lost = (width + 4 * tokens) * U32 * exact.norms.max() / excess[excess > 0].min()
    back = np.abs(kd_part + coefficients * f_hat)
    d_back = 8 * U32 * np.abs(kd_part) + (2 * lost + 8 * U32) * np.abs(coefficients * f_hat)

    u, u_adapter, terms = unit(product), unit(adapter), images * tokens
    exact_gradients = case.gradients((w_kd, w_out, 0.0))
    up = (3 * u + terms * U32) * (np.abs(h).mT @ back) + np.abs(h).mT @ d_back
    wu = np.abs(case.up).T
    through = (4 * u + (terms + width) * U32) * back + d_back
    down = np.abs(f).mT @ (through @ wu)
    return GradientBounds(
        student=SLACK * (unit(student) + 8 * U32) * np.abs(exact_gradients.student),
        down=SLACK * (down.sum(axis=0) + u_adapter * np.abs(exact_gradients.down)),
        up=SLACK * (up.sum(axis=0) + u_adapter * np.abs(exact_gradients.up)),
    )


def cancellation(case):
    """Return by how much the adapter takes the largest token down: rounding of sums grows by it."""
    refined = truth.refine(case.teacher, case.down, case.up, case.prefix)
    largest, left = (np.linalg.norm(x, axis=-1).max() for x in (case.teacher, refined))
    return largest / left if largest > 10 * left else 0.0


OUTPUTS = ("kd", "outlier", "info", "refined", "norms", "threshold")
GRADIENTS = ("student", "down", "up", "gram_target")


def relative_errors(
    case: Case,
    tensors: dict[str, Tensor | None],
    out: FusedLossesOutput,
    weights: tuple[float, float, float],
    grad_refined: truth.Array | None = None,
) -> dict[str, float]:
    """Return the error of each output and gradient there is, as a share of its largest entry."""
    values, gradients = case.values(), case.gradients(weights, grad_refined)
    pairs = {name: (getattr(out, name), getattr(values, name)) for name in OUTPUTS}
    for name in GRADIENTS:
        if tensors[name] is not None and tensors[name].grad is not None:
            pairs[f"d_{name}"] = (tensors[name].grad, getattr(gradients, name))
    relative = {}
    for name, (actual, exact) in pairs.items():
        if actual is not None:
            exact = torch.as_tensor(exact, dtype=torch.float64).reshape(actual.shape)
            error = (actual.detach().double() - exact).abs().max()
            relative[name] = (error / exact.abs().max().clamp_min(1e-300)).item()
    return relative


def oracle_slack(case: Case, product: torch.dtype) -> dict[str, float]:
    """Return by how much each error may exceed the reference's; ``product``: of the products.

    It is ``4 √K u``: u is the unit roundoff of the products' dtype, K the longest sum (over the
    width, an image's patches, or all tokens), √K the growth of its rounding when signs are random,
    and 4 the number of products that follow each other (F Wd, H Wu, Gram matrix, gradient). Where
    the adapter takes the largest token down c-fold, the rounding of ``F + H Wu`` to float32 is c
    times as large a share of what is left: that is allowed once for each of the 4 too. Where the
    norms are c times as large as n − q, so are the roundings of n and of q in the outlier loss,
    which squares the difference.
    """
    images, tokens, width = case.teacher.shape
    longest = max(width, images * tokens)
    slack = 4 * np.sqrt(longest) * unit(product) + 4 * cancellation(case) * U32
    values = case.values()
    excess = (values.norms - values.threshold[:, None]).clip(min=0)
    size = np.sqrt(np.mean(excess[excess > 0] ** 2)) if excess.any() else np.inf
    outlier = 4 * U32 * values.norms.max() / size
    return {
        name: float(slack + outlier * (name in ("outlier", "d_down", "d_up")))
        for name in (*OUTPUTS, *(f"d_{x}" for x in GRADIENTS))
    }
