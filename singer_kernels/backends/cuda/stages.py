"""The stages of the losses: products by torch's library, and the launches between them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from singer_kernels.backends.operators import Upstream, narrow_dtype

MOST_ENTRIES = 2**26
"""How many entries of a Gram matrix, or of a product with one, are in memory at once: 256 MiB in
float32. Two matrices are, and E."""


def _kernel(name: str) -> Any:
    return getattr(torch.ops.singer_kernels, f"cuda_{name}")


class Arithmetic(NamedTuple):
    """How products are computed."""

    product: torch.dtype  # what their operands are asked to be rounded to
    acc: torch.dtype  # what sums are kept in

    @property
    def operand(self) -> torch.dtype:
        """What operands are rounded to, and what is kept between kernels."""
        return narrow_dtype(self.product, self.acc)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a b`` in ``acc``, of rounded operands; matrices, or batches of them."""
        a, b = a.to(self.operand), b.to(self.operand)
        if self.operand == self.acc:
            return torch.matmul(a, b)
        if a.is_cuda:
            return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=self.acc)
        return torch.matmul(a.to(self.acc), b.to(self.acc))

    def multiply_split(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a b`` with a in two parts, so that it keeps twice the digits of an operand."""
        if self.operand == self.acc:
            return self.multiply(a, b)
        high = a.to(self.operand)
        low = (a - high.to(a.dtype)).to(self.operand)
        return self.multiply(torch.cat([high, low], dim=1), torch.cat([b, b], dim=0))


class Refined(NamedTuple):
    """What the stage ``refine`` gives; what was not asked for is None."""

    kd: Tensor  # []
    columns: Tensor  # [H | Z], [B, P, 2r]
    norms: Tensor  # n, [B, P]
    residual: Tensor | None  # (F̂ − S) Wuᵀ, [B, P, r]
    refined: Tensor | None  # F̂, [B, T, D], in the teacher's dtype
    rows: Tensor | None  # F̂ / n of the patches, [B, P, D], for the Gram products


def run_refine(
    student: Tensor,
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    prefix: int,
    arithmetic: Arithmetic,
    *,
    has_refined: bool,
    has_residual: bool,
    rows_dtype: torch.dtype | None,
) -> Refined:
    """Run the stage ``refine``.

    Args:
        student: S, ``[B, T, D]``, contiguous.
        teacher: F, ``[B, T, D]``, contiguous.
        down: Wd, ``[D, r]``.
        up: Wu, ``[r, D]``.
        prefix: the number of prefix tokens.
        arithmetic: how products are computed.
        has_refined: whether F̂ is wanted.
        has_residual: whether ``(F̂ − S) Wuᵀ`` is.
        rows_dtype: the dtype in which the Gram products want ``F̂ / n``; None: they don't.
    """
    images, tokens, width = teacher.shape
    rank, patches, acc = down.shape[1], tokens - prefix, arithmetic.acc
    wide_up = up.to(acc)
    both = arithmetic.multiply(teacher.flatten(0, 1), torch.cat([down, up.mT], dim=1))
    hidden, latent = both.split(rank, dim=1)  # F Wd and F Wuᵀ, [B T, r]
    latent = torch.addmm(latent, hidden, wide_up @ wide_up.mT)  # F̂ Wuᵀ
    delta = arithmetic.multiply_split(hidden, up).view(images, tokens, width)

    def of_patches(rows: Tensor) -> Tensor:
        return rows.view(images, tokens, -1)[:, prefix:].contiguous()

    new = teacher.new_empty
    norms, kd_parts = new((images, patches), dtype=acc), new((images, tokens), dtype=acc)
    refined = new(teacher.shape) if has_refined else None
    rows = None if rows_dtype is None else new((images, patches, width), dtype=rows_dtype)
    differences = None
    if has_residual:
        differences = new((images, patches, width), dtype=arithmetic.operand)
    _kernel("refine")(teacher, student, delta, prefix, norms, kd_parts, refined, rows, differences)
    residual = None
    if differences is not None:
        # Of the difference, not a difference of products, each rounded, that may be all but equal.
        residual = arithmetic.multiply(differences.flatten(0, 1), up.mT).to(arithmetic.operand)
        residual = residual.view(images, patches, rank)
    kd = kd_parts.sum() / teacher.numel()
    columns = of_patches(torch.cat([hidden, latent], dim=1))
    return Refined(kd, columns, norms, residual, refined, rows)


class Outliers(NamedTuple):
    """What the stage ``outlier`` gives."""

    loss: Tensor  # []
    threshold: Tensor  # q, [B]
    weight: Tensor  # 2 / count, []


def run_outlier(norms: Tensor, quantile: float) -> Outliers:
    """Run the stage ``outlier`` on norms ``[B, P]``."""
    threshold, squares, counts = (norms.new_empty(len(norms)) for _ in range(3))
    _kernel("outlier")(norms, quantile, threshold, squares, counts)
    count = counts.sum().clamp_min(1)
    return Outliers(squares.sum() / count, threshold, 2 / count)


def normalized(tokens: Tensor, prefix: int, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Return the patches' norms ``[B, P]``, and the patches divided by them ``[B, P, D]``."""
    images, count, width = tokens.shape
    norms = tokens.new_empty((images, count - prefix), dtype=arithmetic.acc)
    rows = tokens.new_empty((images, count - prefix, width), dtype=arithmetic.operand)
    _kernel("normalize")(tokens, prefix, norms, rows)
    return norms, rows


def run_gram(
    rows: Tensor,
    norms: Tensor,
    target: Tensor,
    prefix: int,
    arithmetic: Arithmetic,
    *,
    columns: Tensor | None,
    columns_are_tokens: bool,
    columns_dtype: torch.dtype,
    d_target_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the stage ``gram``.

    Args:
        rows: the patches divided by their norms, ``[B, P, D]``.
        norms: n, ``[B, P]``.
        target: R, ``[B, T, D]``, contiguous.
        prefix: the number of its prefix tokens.
        arithmetic: how products are computed.
        columns: C, ``[B, P, m]``; None: X C is not wanted.
        columns_are_tokens: whether C is the tokens ``[B, T, D]`` that ``rows`` were made of.
        columns_dtype: the dtype of X C.
        d_target_dtype: the dtype of the target's gradient; None: it is not wanted.

    Returns:
        The loss, X C ``[B, P, m]`` and the gradient of R's patches ``[B, P, D]``, or None.
    """
    images, patches, width = rows.shape
    target_norms, target_rows = normalized(target, prefix, arithmetic)
    scale = 4 / (images * patches**2)
    new = rows.new_empty
    sums = new((3, images, patches), dtype=arithmetic.acc)
    turned_columns = d_target = None
    if columns is not None:
        turned_columns = new((images, patches, columns.shape[2]), dtype=columns_dtype)
    if d_target_dtype is not None:
        d_target = new(target_rows.shape, dtype=d_target_dtype)
    needs_difference = turned_columns is not None or d_target is not None

    def some_images(some: slice) -> None:
        cosines, target_cosines = (
            arithmetic.multiply(x[some], x[some].mT) for x in (rows, target_rows)
        )
        difference = new(cosines.shape, dtype=arithmetic.operand) if needs_difference else None
        squares, slopes, target_slopes = (x[some] for x in sums)
        _kernel("gram_difference")(
            cosines, target_cosines, difference, squares, slopes, target_slopes
        )
        del cosines, target_cosines  # their memory is needed
        if columns is not None and difference is not None and turned_columns is not None:
            if columns_are_tokens:
                scaled = rows[some]
            else:
                scaled = torch.empty_like(columns[some], dtype=arithmetic.operand)
                _kernel("gram_scale")(columns[some], norms[some], scaled)
            _kernel("gram_gradient")(
                arithmetic.multiply(difference, scaled),
                columns[some],
                norms[some],
                slopes,
                scale,
                turned_columns[some],
                prefix if columns_are_tokens else 0,
            )
        if difference is not None and d_target is not None:
            # E is G − G_R: from the target's side the sign is the other.
            _kernel("gram_gradient")(
                arithmetic.multiply(difference, target_rows[some]),
                target[some],
                target_norms[some],
                target_slopes,
                -scale,
                d_target[some],
                prefix,
            )

    step = max(1, MOST_ENTRIES // (patches * max(patches, width)))
    for start in range(0, images, step):
        some_images(slice(start, start + step))
    loss = sums[0].sum() / (images * patches**2)
    return loss, turned_columns, d_target


def run_backward(
    student: Tensor | None,
    teacher: Tensor,
    up: Tensor,
    columns: Tensor,
    gram_columns: Tensor | None,
    residual: Tensor | None,
    norms: Tensor | None,
    threshold: Tensor | None,
    outlier_weight: Tensor | None,
    upstream: Upstream,
    prefix: int,
    arithmetic: Arithmetic,
    student_dtype: torch.dtype | None,
    down_dtype: torch.dtype | None,
    up_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run the stage ``backward``.

    Args:
        student: S, ``[B, T, D]``, contiguous; needed with ``upstream.kd``.
        teacher: F, ``[B, T, D]``, contiguous.
        up: Wu, ``[r, D]``.
        columns: ``[H | Z]``, ``[B, P, 2r]``.
        gram_columns: ``X [H | Z]``; needed with ``upstream.info``.
        residual: ``(F̂ − S) Wuᵀ``, ``[B, P, r]``; needed with ``upstream.kd``.
        norms: n, ``[B, P]``; needed with ``upstream.outlier``, as are the next two.
        threshold: q, ``[B]``.
        outlier_weight: 2 / count.
        upstream: the gradients that come back.
        prefix: the number of prefix tokens.
        arithmetic: how products are computed.
        student_dtype: the dtype of dS; None: it is not asked for.
        down_dtype: the dtype of dWd; likewise.
        up_dtype: the dtype of dWu; likewise.

    Returns:
        dS, dWd and dWu; None where not asked for.
    """
    images, tokens, width = teacher.shape
    patches, rank = tokens - prefix, up.shape[0]
    kd, outlier, info, back = upstream
    has_turned = outlier is not None or info is not None
    has_dense = kd is not None or back is not None
    needs_down, needs_up = down_dtype is not None, up_dtype is not None
    new = teacher.new_empty
    hidden = columns[..., :rank]
    d_hidden = new((images, patches, rank), dtype=arithmetic.operand) if needs_down else None
    turned = None
    if needs_up and has_turned:
        turned = new((images, patches, rank), dtype=arithmetic.operand)
    if d_hidden is not None or turned is not None:
        through_up = None
        if back is not None and needs_down:
            rows = arithmetic.multiply(back.flatten(0, 1), up.mT).view(images, tokens, rank)
            through_up = rows[:, prefix:].contiguous()
        _kernel("backward_columns")(
            columns,
            gram_columns if info is not None else None,
            residual if kd is not None and needs_down else None,
            through_up,
            norms,
            threshold,
            outlier_weight,
            kd,
            outlier,
            info,
            d_hidden,
            turned,
            tokens,
            width,
        )
    d_student = refined = dense = None
    if student_dtype is not None:
        d_student = new(teacher.shape, dtype=student_dtype)
    if turned is not None:
        refined = new((images, patches, width), dtype=arithmetic.operand)
    if needs_up and has_dense:
        dense = new((images, patches, width), dtype=arithmetic.operand)
    if d_student is not None or refined is not None or dense is not None:
        padded = torch.nn.functional.pad(hidden, (0, 0, prefix, 0))  # H = 0 on the prefix
        delta = arithmetic.multiply_split(padded.flatten(0, 1), up).view(teacher.shape)
        _kernel("backward_tokens")(
            teacher, student, delta, back, kd, d_student, refined, dense, prefix
        )
        del padded, delta  # the largest: not to be kept beside the products below
    d_down = d_up = None
    if d_hidden is not None:
        # One product per image: patches are a slice of the tokens, which this takes as it is.
        d_down = arithmetic.multiply(teacher[:, prefix:].mT, d_hidden).sum(dim=0).to(down_dtype)
    if needs_up:
        terms = [(turned, refined), (hidden, dense)]
        found = [
            arithmetic.multiply(left.mT, right).sum(dim=0)
            for left, right in terms
            if left is not None and right is not None
        ]
        d_up = sum(found[1:], found[0]).to(up_dtype) if found else None
    return d_student, d_down, d_up
