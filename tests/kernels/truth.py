"""The losses in float64 NumPy, and their gradients in closed form, written apart from the package.

Values come from explicit loops over images and patches. Gradients come from the algebra of the
low-rank form, not from differentiating the loops, so that the two agree only if both are right.

Letters: F teacher, S student, R Gram target ``[B, T, D]``; Wd ``[D, r]``, Wu ``[r, D]``;
F̂ refined; n norms ``[B, P]``; q thresholds ``[B]``; G Gram matrices ``[B, P, P]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

EPS = 1e-12  # the smallest norm that a Gram row is divided by


@dataclass(frozen=True)
class Values:
    kd: float
    outlier: float
    info: float
    refined: Array  # [B, T, D]
    norms: Array  # [B, P]
    threshold: Array  # [B]


@dataclass(frozen=True)
class Gradients:
    student: Array  # [B, T, D]
    down: Array  # [D, r]
    up: Array  # [r, D]
    gram_target: Array  # [B, T, D]


def refine(teacher: Array, down: Array, up: Array, prefix: int) -> Array:
    refined = teacher.copy()
    for image in range(teacher.shape[0]):
        for token in range(prefix, teacher.shape[1]):
            hidden = teacher[image, token] @ down  # [r]
            refined[image, token] = teacher[image, token] + hidden @ up
    return refined


def token_norms(tokens: Array, prefix: int) -> Array:
    return np.array([[math.sqrt(float(t @ t)) for t in image[prefix:]] for image in tokens])


def interpolated_quantile(values: Array, gamma: float) -> float:
    ordered = sorted(values.tolist())
    rank = gamma * (len(ordered) - 1)
    below, above = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return below + (rank - math.floor(rank)) * (above - below)


def thresholds(norms: Array, gamma: float) -> Array:
    return np.array([interpolated_quantile(image, gamma) for image in norms])


def outlier_loss(norms: Array, gamma: float) -> float:
    squares = []
    for image, limit in zip(norms, thresholds(norms, gamma), strict=True):
        squares += [(norm - limit) ** 2 for norm in image.tolist() if norm > limit]
    return float(np.mean(squares)) if squares else 0.0


def gram_matrix(tokens: Array, prefix: int) -> Array:
    patches = tokens[:, prefix:]
    norms = token_norms(tokens, prefix)
    images, count = norms.shape
    gram = np.empty((images, count, count))
    for image in range(images):
        rows = [p / max(n, EPS) for p, n in zip(patches[image], norms[image], strict=True)]
        for i in range(count):
            for j in range(count):
                gram[image, i, j] = rows[i] @ rows[j]
    return gram


def gram_loss(tokens: Array, target: Array, prefix: int) -> float:
    return float(np.mean((gram_matrix(tokens, prefix) - gram_matrix(target, prefix)) ** 2))


def kd_loss(student: Array, tokens: Array) -> float:
    return float(np.mean((student - tokens) ** 2))


def losses(
    student: Array,
    teacher: Array,
    down: Array,
    up: Array,
    target: Array | None,
    gamma: float,
    prefix: int,
) -> Values:
    refined = refine(teacher, down, up, prefix)
    norms = token_norms(refined, prefix)
    return Values(
        kd=kd_loss(student, refined),
        outlier=outlier_loss(norms, gamma),
        info=gram_loss(refined, teacher if target is None else target, prefix),
        refined=refined,
        norms=norms,
        threshold=thresholds(norms, gamma),
    )


def _gram_operator(difference: Array, gram: Array, norms: Array, scale: float) -> Array:
    # X = γ_G [diag(1/n) E diag(1/n) − diag(s/n²)], so that the Gram gradient of a token row is XF̂.
    s = np.sum(difference * gram, axis=1)
    # A zero-norm row takes no gradient; between 0 and EPS the divisor is the constant EPS.
    inverse = np.where(norms == 0, 0.0, 1 / np.maximum(norms, EPS))
    s = np.where(norms < EPS, 0.0, s)
    return scale * (inverse[:, None] * difference * inverse - np.diag(s * inverse**2))


def outlier_coefficients(norms: Array, gamma: float, weight: float) -> Array:
    """Return c ``[B, P]``: the outlier gradient of patch i is ``c_i F̂_i``."""
    excess = norms - thresholds(norms, gamma)[:, None]
    count = max(int(np.sum(excess > 0)), 1)
    coefficients = np.zeros_like(norms)
    above = excess > 0
    coefficients[above] = 2 * weight * excess[above] / (count * norms[above])
    return coefficients


def gradients(
    student: Array,
    teacher: Array,
    down: Array,
    up: Array,
    target: Array | None,
    gamma: float,
    prefix: int,
    weights: tuple[float, float, float],
    d_refined: Array | None = None,
) -> Gradients:
    """Differentiate ``w_kd kd + w_out outlier + w_info info + <d_refined, F̂>``."""
    images, tokens, width = teacher.shape
    count = tokens - prefix
    w_kd, w_out, w_info = weights
    target = teacher if target is None else target
    d_refined = np.zeros_like(teacher) if d_refined is None else d_refined

    values = losses(student, teacher, down, up, target, gamma, prefix)
    target_norms = token_norms(target, prefix)
    gram, target_gram = gram_matrix(values.refined, prefix), gram_matrix(target, prefix)
    difference = gram - target_gram  # E
    alpha = 2 * w_kd / (images * tokens * width)
    scale = 4 * w_info / (images * count**2)  # γ_G
    coefficients = outlier_coefficients(values.norms, gamma, w_out)
    product = up @ up.T  # M

    d_down, d_up = np.zeros_like(down), np.zeros_like(up)
    d_target = np.zeros_like(target)
    for b in range(images):
        f, s = teacher[b, prefix:], student[b, prefix:]
        f_hat, back = values.refined[b, prefix:], d_refined[b, prefix:]
        h = f @ down
        z = f @ up.T + h @ product  # F̂ Wuᵀ
        j = s @ up.T
        c = coefficients[b][:, None]
        x = _gram_operator(difference[b], gram[b], values.norms[b], scale)
        v = x @ h + c * h
        d_h = x @ z + c * z + alpha * (z - j) + back @ up.T
        d_down += f.T @ d_h
        d_up += v.T @ f_hat + h.T @ (alpha * (f_hat - s) + back)
        x_target = _gram_operator(-difference[b], target_gram[b], target_norms[b], scale)
        d_target[b, prefix:] = x_target @ target[b, prefix:]
    return Gradients(alpha * (student - values.refined), d_down, d_up, d_target)
