"""Reference implementation of every loss, in plain torch: the specification.

Differentiable by autograd, for float64, float32, bfloat16 and float16. The other backends are
tested against it.

Letters: F teacher tokens, S projected student tokens, F̂ refined tokens, all ``[B, T, D]``; Wd
``[D, r]``, Wu ``[r, D]``. ``T = num_prefix_tokens + P``: prefix tokens (CLS, registers), then P
patches.

Precision: a matrix product takes its operands' promoted dtype, or the autocast dtype under
``torch.autocast``; everything else is computed in the accumulation dtype: float64 if an operand is
float64, float32 otherwise.

A NaN or Inf in a patch makes every loss that reads the patch non-finite. (The authors' code gives
outlier loss 0 for an image that holds a NaN.)

Source: SiNGER (arXiv 2509.20986), sections 3.1 to 3.3, and the authors' code
(github.com/AIRLABkhu/SiNGER, ``mdistiller/distillers/SiNGER.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from singer_kernels.types import FusedLossesOutput

NORM_EPS = 1e-12
"""Smallest denominator of the Gram matrix's row normalisation (that of ``F.normalize``)."""


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype in which the tensors are reduced.

    Returns:
        ``torch.float64`` if any tensor is float64, ``torch.float32`` otherwise.
    """
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    # Promotion serves mixed inputs outside autocast; under autocast matmul casts once more.
    dtype = torch.promote_types(a.dtype, b.dtype)
    return torch.matmul(a.to(dtype), b.to(dtype))


def _refine(
    teacher: Tensor, down: Tensor, up: Tensor, num_prefix_tokens: int
) -> tuple[Tensor, torch.dtype]:
    """Return F̂ in the accumulation dtype, and the dtype that torch's promotion would give it."""
    acc = accumulation_dtype(teacher, down, up)
    prefix, patches = teacher[:, :num_prefix_tokens], teacher[:, num_prefix_tokens:]
    delta = _matmul(_matmul(patches, down), up)  # [B, P, D]
    refined = torch.cat([prefix.to(acc), patches.to(acc) + delta.to(acc)], dim=1)  # [B, T, D]
    return refined, torch.promote_types(teacher.dtype, delta.dtype)


def refine(teacher: Tensor, down: Tensor, up: Tensor, num_prefix_tokens: int = 1) -> Tensor:
    """Add the low-rank perturbation to the patches: ``F̂ = F + (F Wd) Wu``.

    Prefix tokens pass unchanged.

    Args:
        teacher: F, ``[B, T, D]``.
        down: Wd, ``[D, r]``.
        up: Wu, ``[r, D]``.
        num_prefix_tokens: number of leading tokens that are not patches.

    Returns:
        F̂, ``[B, T, D]``, in the dtype of ``teacher``.

    Source: paper, section 3.1; ``SiNGERAdapter.forward`` of the authors' code.
    """
    refined, _ = _refine(teacher, down, up, num_prefix_tokens)
    return refined.to(teacher.dtype)


def token_norms(tokens: Tensor, num_prefix_tokens: int = 1) -> Tensor:
    """Return the Euclidean norm of every patch.

    Args:
        tokens: ``[B, T, D]``.
        num_prefix_tokens: number of leading tokens that are not patches.

    Returns:
        n, ``[B, P]``, in the accumulation dtype. The gradient of a zero-norm patch is 0.

    Source: paper, section 3.2.
    """
    patches = tokens[:, num_prefix_tokens:].to(accumulation_dtype(tokens))
    norms: Tensor = torch.linalg.vector_norm(patches, dim=-1)
    return norms


def norm_threshold(norms: Tensor, quantile: float) -> Tensor:
    """Return each image's interpolated quantile of its patch norms, as ``torch.quantile`` does.

    Args:
        norms: n, ``[B, P]``.
        quantile: γ in [0, 1].

    Returns:
        q, ``[B]``, in the accumulation dtype, detached.

    Source: paper, section 3.2.
    """
    return torch.quantile(norms.detach().to(accumulation_dtype(norms)), quantile, dim=1)


def _outlier_excess_loss(norms: Tensor, threshold: Tensor) -> Tensor:
    threshold = threshold[:, None]  # [B, 1]
    # Not "above the threshold" alone: NaN and Inf count as outliers too.
    is_outlier = ~((norms <= threshold) & norms.isfinite())
    excess = torch.where(is_outlier, norms - threshold, 0.0)
    return excess.square().sum() / is_outlier.sum().clamp_min(1)


def outlier_loss(norms: Tensor, quantile: float = 0.97) -> Tensor:
    """Pull the norms above an image's quantile down to it.

    ``mean (n − q_b)²`` over all patches of the batch with ``n > q_b``, 0 if there are none, where
    ``q_b`` is the quantile of image b's norms, a constant for the gradient.

    Args:
        norms: n, ``[B, P]``.
        quantile: γ in [0, 1].

    Returns:
        A scalar in the accumulation dtype.

    Source: paper, section 3.2.
    """
    norms = norms.to(accumulation_dtype(norms))
    return _outlier_excess_loss(norms, norm_threshold(norms, quantile))


def _normalize_rows(patches: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(patches, dim=-1, keepdim=True)
    # A zero-norm row stays zero and, unlike with F.normalize, has gradient 0 instead of 1 / eps.
    return patches * torch.where(norms == 0, 0.0, norms.clamp_min(NORM_EPS).reciprocal())


def gram_matrix(
    tokens: Tensor, num_prefix_tokens: int = 1, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the cosine similarity of every pair of an image's patches.

    Args:
        tokens: ``[B, T, D]``.
        num_prefix_tokens: number of leading tokens that are not patches.
        dtype: the dtype of the product's operands; None: that of ``tokens``.

    Returns:
        G, ``[B, P, P]``, in the accumulation dtype; rows are normalised as ``x / max(‖x‖, 1e-12)``.

    Source: paper, section 3.3.
    """
    acc = accumulation_dtype(tokens)
    rows = _normalize_rows(tokens[:, num_prefix_tokens:].to(acc)).to(dtype or tokens.dtype)
    return torch.matmul(rows, rows.mT).to(acc)


def _gram_difference_loss(
    tokens: Tensor, target: Tensor, num_prefix_tokens: int, dtype: torch.dtype
) -> Tensor:
    # Both products take one dtype: with two, their rounding alone would make a loss.
    gram = gram_matrix(tokens, num_prefix_tokens, dtype)
    target_gram = gram_matrix(target, num_prefix_tokens, dtype)
    acc = accumulation_dtype(gram, target_gram)
    return (gram.to(acc) - target_gram.to(acc)).square().mean()


def gram_loss(tokens: Tensor, target: Tensor, num_prefix_tokens: int = 1) -> Tensor:
    """Match the patches' cosine-similarity matrix: mean of ``(G(tokens) − G(target))²``.

    Args:
        tokens: ``[B, T, D]``.
        target: ``[B, T, D]``; it too receives a gradient if it requires one.
        num_prefix_tokens: number of leading tokens that are not patches.

    Returns:
        A scalar in the accumulation dtype, the mean over all ``B·P·P`` entries.

    Source: paper, section 3.3.
    """
    dtype = torch.promote_types(tokens.dtype, target.dtype)
    return _gram_difference_loss(tokens, target, num_prefix_tokens, dtype)


def kd_loss(student: Tensor, tokens: Tensor) -> Tensor:
    """Match the features: mean of ``(S − tokens)²`` over all ``B·T·D`` entries, prefix included.

    Args:
        student: S, ``[B, T, D]``.
        tokens: ``[B, T, D]``.

    Returns:
        A scalar in the accumulation dtype.

    Source: paper, section 3.1.
    """
    acc = accumulation_dtype(student, tokens)
    return (student.to(acc) - tokens.to(acc)).square().mean()


def fused_losses(
    student: Tensor,
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    gram_target: Tensor | None = None,
    gram: bool = True,
    quantile: float = 0.97,
    num_prefix_tokens: int = 1,
    return_refined: bool = False,
) -> FusedLossesOutput:
    """Return the three losses of one distilled layer.

    The arguments and the result are those of :func:`singer_kernels.fused_losses`, unchecked.
    """
    target = teacher if gram_target is None else gram_target
    refined, refined_dtype = _refine(teacher, down, up, num_prefix_tokens)
    refined = refined.to(accumulation_dtype(student, refined, target))
    norms = token_norms(refined, num_prefix_tokens)
    threshold = norm_threshold(norms, quantile)
    info = None
    if gram:
        dtype = torch.promote_types(refined_dtype, target.dtype)
        info = _gram_difference_loss(refined, target, num_prefix_tokens, dtype)
    return FusedLossesOutput(
        kd=kd_loss(student, refined),
        outlier=_outlier_excess_loss(norms, threshold),
        info=info,
        refined=refined.to(teacher.dtype) if return_refined else None,
        norms=norms.detach(),
        threshold=threshold,
    )
