"""The stages of the losses: torch's matrix products and launches of the kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from singer_kernels.backends.operators import BackwardInputs, ForwardInputs
from singer_kernels.backends.precision import MatmulPrecision

MAX_ENTRIES = 2**26
"""Entries in memory at once of each of G(F̂), G(R) and E, over all images: 256 MiB in float32."""


def _kernel(name: str) -> Any:
    return getattr(torch.ops.singer_kernels, f"cuda_{name}")


class Refined(NamedTuple):
    """Results of the stage ``refine``; None where not requested."""

    kd: Tensor  # []
    hz: Tensor  # [H | Z], [B, P, 2r]
    norms: Tensor  # n, [B, P]
    residual: Tensor | None  # (F̂ − S) Wuᵀ, [B, P, r]
    refined: Tensor | None  # F̂, [B, T, D], in the teacher's dtype
    rows: Tensor | None  # F̂ / n of the patches, [B, P, D], for the Gram products


def run_refine(
    x: ForwardInputs, precision: MatmulPrecision, rows_dtype: torch.dtype | None
) -> Refined:
    """Run the stage ``refine`` on contiguous tokens; ``F̂ / n`` in ``rows_dtype``, unless None."""
    teacher, up, prefix = x.teacher, x.up, x.num_prefix_tokens
    images, tokens, width = teacher.shape
    rank, patches, acc = x.down.shape[1], tokens - prefix, precision.acc
    up_acc = up.to(acc)
    both = precision.multiply(teacher.flatten(0, 1), torch.cat([x.down, up.mT], dim=1))
    h, z = both.split(rank, dim=1)  # F Wd and F Wuᵀ, [B T, r]
    z = torch.addmm(z, h, up_acc @ up_acc.mT)  # F̂ Wuᵀ
    delta = precision.multiply_split(h, up).view(images, tokens, width)
    new = teacher.new_empty
    norms, kd_partials = new((images, patches), dtype=acc), new((images, tokens), dtype=acc)
    refined = new(teacher.shape) if x.has_refined else None
    rows = None if rows_dtype is None else new((images, patches, width), dtype=rows_dtype)
    kd_difference = None
    if x.has_residual:
        kd_difference = new((images, patches, width), dtype=precision.storage_dtype)
    _kernel("refine")(
        teacher, x.student, delta, prefix, norms, kd_partials, refined, rows, kd_difference
    )
    residual = None
    if kd_difference is not None:
        # Project F̂ − S itself: subtracting two rounded products would cancel.
        residual = precision.multiply(kd_difference.flatten(0, 1), up.mT).to(
            precision.storage_dtype
        )
        residual = residual.view(images, patches, rank)
    kd = kd_partials.sum() / teacher.numel()
    hz = torch.cat([h, z], dim=1).view(images, tokens, -1)[:, prefix:].contiguous()
    return Refined(kd, hz, norms, residual, refined, rows)


def run_outlier(norms: Tensor, quantile: float) -> tuple[Tensor, Tensor, Tensor]:
    """Run the stage ``outlier`` on n ``[B, P]``: loss ``[]``, q ``[B]`` and 2 / count ``[]``."""
    threshold, squares, counts = (norms.new_empty(len(norms)) for _ in range(3))
    _kernel("outlier")(norms, quantile, threshold, squares, counts)
    count = counts.sum().clamp_min(1)
    return squares.sum() / count, threshold, 2 / count


def normalized(tokens: Tensor, prefix: int, precision: MatmulPrecision) -> tuple[Tensor, Tensor]:
    """Return the patches' norms ``[B, P]``, and the patches divided by them ``[B, P, D]``."""
    images, count, width = tokens.shape
    norms = tokens.new_empty((images, count - prefix), dtype=precision.acc)
    rows = tokens.new_empty((images, count - prefix, width), dtype=precision.storage_dtype)
    _kernel("normalize")(tokens, prefix, norms, rows)
    return norms, rows


def run_gram(
    rows: Tensor,
    norms: Tensor,
    target: Tensor,
    prefix: int,
    precision: MatmulPrecision,
    *,
    factor: Tensor | None,
    factor_is_tokens: bool,
    grad_factor_dtype: torch.dtype,
    grad_target_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the stage ``gram``.

    Args:
        rows: the patches divided by their norms, ``[B, P, D]``.
        norms: n, ``[B, P]``.
        target: R, ``[B, T, D]``, contiguous.
        prefix: the number of its prefix tokens.
        precision: dtypes of the products.
        factor: C, ``[B, P, m]``; None: do not compute X C.
        factor_is_tokens: whether C is the tokens ``[B, T, D]`` that ``rows`` were made of.
        grad_factor_dtype: the dtype of X C.
        grad_target_dtype: the dtype of the target's gradient; None: do not compute it.

    Returns:
        The loss, X C ``[B, P, m]`` and the gradient of R's patches ``[B, P, D]``, or None.
    """
    images, patches, width = rows.shape
    target_norms, target_rows = normalized(target, prefix, precision)
    scale = 4 / (images * patches**2)
    new = rows.new_empty
    sums = new((3, images, patches), dtype=precision.acc)
    grad_factor = grad_target = None
    if factor is not None:
        grad_factor = new((images, patches, factor.shape[2]), dtype=grad_factor_dtype)
    if grad_target_dtype is not None:
        grad_target = new(target_rows.shape, dtype=grad_target_dtype)
    needs_difference = grad_factor is not None or grad_target is not None

    def some_images(some: slice) -> None:
        gram, target_gram = (precision.multiply(x[some], x[some].mT) for x in (rows, target_rows))
        difference = new(gram.shape, dtype=precision.storage_dtype) if needs_difference else None
        squares, row_dots, target_row_dots = (x[some] for x in sums)
        _kernel("gram_difference")(
            gram, target_gram, difference, squares, row_dots, target_row_dots
        )
        del gram, target_gram  # free them before the products below
        if factor is not None and difference is not None and grad_factor is not None:
            if factor_is_tokens:
                scaled = rows[some]
            else:
                scaled = torch.empty_like(factor[some], dtype=precision.storage_dtype)
                _kernel("gram_scale")(factor[some], norms[some], scaled)
            _kernel("gram_gradient")(
                precision.multiply(difference, scaled),
                factor[some],
                norms[some],
                row_dots,
                scale,
                grad_factor[some],
                prefix if factor_is_tokens else 0,
            )
        if difference is not None and grad_target is not None:
            # E is G − G_R: from the target's side the sign is the other.
            _kernel("gram_gradient")(
                precision.multiply(difference, target_rows[some]),
                target[some],
                target_norms[some],
                target_row_dots,
                -scale,
                grad_target[some],
                prefix,
            )

    step = max(1, MAX_ENTRIES // (patches * max(patches, width)))
    for start in range(0, images, step):
        some_images(slice(start, start + step))
    loss = sums[0].sum() / (images * patches**2)
    return loss, grad_factor, grad_target


def run_backward(
    x: BackwardInputs, precision: MatmulPrecision
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run the stage ``backward`` on contiguous tokens: dS, dWd, dWu; None where not requested."""
    teacher, up, prefix = x.teacher, x.up, x.num_prefix_tokens
    images, tokens, width = teacher.shape
    patches, rank = tokens - prefix, up.shape[0]
    has_v = x.grad_outlier is not None or x.grad_info is not None
    needs_student, needs_down, needs_up = x.needs
    new = teacher.new_empty
    h = x.hz[..., :rank]
    grad_h = new((images, patches, rank), dtype=precision.storage_dtype) if needs_down else None
    v = None
    if needs_up and has_v:
        v = new((images, patches, rank), dtype=precision.storage_dtype)
    if grad_h is not None or v is not None:
        grad_refined_up = None  # Y Wuᵀ
        if x.grad_refined is not None and needs_down:
            rows = precision.multiply(x.grad_refined.flatten(0, 1), up.mT)
            grad_refined_up = rows.view(images, tokens, rank)[:, prefix:].contiguous()
        _kernel("backward_rows")(
            x.hz,
            x.grad_hz if x.grad_info is not None else None,
            x.residual if x.grad_kd is not None and needs_down else None,
            grad_refined_up,
            x.norms,
            x.threshold,
            x.outlier_weight,
            x.grad_kd,
            x.grad_outlier,
            x.grad_info,
            grad_h,
            v,
            tokens,
            width,
        )
    grad_student = new(teacher.shape, dtype=x.student_dtype) if needs_student else None
    refined = grad_delta = None
    if v is not None:
        refined = new((images, patches, width), dtype=precision.storage_dtype)
    if needs_up and (x.grad_kd is not None or x.grad_refined is not None):
        grad_delta = new((images, patches, width), dtype=precision.storage_dtype)  # Y − dS
    if grad_student is not None or refined is not None or grad_delta is not None:
        padded = torch.nn.functional.pad(h, (0, 0, prefix, 0))  # H = 0 on the prefix
        delta = precision.multiply_split(padded.flatten(0, 1), up).view(teacher.shape)
        _kernel("backward_tokens")(
            teacher,
            x.student,
            delta,
            x.grad_refined,
            x.grad_kd,
            grad_student,
            refined,
            grad_delta,
            prefix,
        )
        del padded, delta  # the largest: free them before the products below
    grad_down = grad_up = None
    if grad_h is not None:
        # One product per image: patches are a slice of the tokens, which bmm reads without a copy.
        grad_down = precision.multiply(teacher[:, prefix:].mT, grad_h).sum(dim=0).to(x.down_dtype)
    if needs_up:
        terms = [
            precision.multiply(left.mT, right).sum(dim=0)
            for left, right in ((v, refined), (h, grad_delta))
            if left is not None and right is not None
        ]
        grad_up = sum(terms[1:], terms[0]).to(x.up_dtype) if terms else None
    return grad_student, grad_down, grad_up
