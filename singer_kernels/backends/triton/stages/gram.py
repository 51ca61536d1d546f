"""Stage ``gram``."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.kernels.gram import (
    gram_apply_kernel,
    gram_pairs_kernel,
    gram_rows_kernel,
    row_norms_kernel,
)
from singer_kernels.backends.triton.stages.common import (
    Arithmetic,
    block_of,
    compiling,
    kernel_dtype,
    meta,
)


class Gram(NamedTuple):
    """What the stage ``gram`` gives; what was not asked for is None."""

    parts: Tensor  # sums of E²
    columns: Tensor | None  # X [H | Z], [B, P, 2r]
    d_target: Tensor | None  # the gradient in the target's patches, [B, P, D]


class GramRows(NamedTuple):
    """The two sides of the stage ``gram``, and what the identity takes."""

    mode: str  # "identity" or "stored"
    rows: Tensor | None  # F̂, [B, T, D]
    target: Tensor  # R, [B, T, D]
    norms: Tensor  # n, [B, P]
    target_norms: Tensor  # [B, P]
    up: Tensor | None = None
    columns: Tensor | None = None
    parts: Tensor | None = None
    amplification: Tensor | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        """The launches: what the identity can't do, the second does."""
        return ("identity", "formed") if self.mode == "identity" else ("stored",)

    def pointers(self) -> tuple[Tensor | None, ...]:
        """Return the tensors in the kernels' order."""
        return self.rows, self.target, self.up, self.columns, self.parts

    def strides(self) -> tuple[int, ...]:
        """Return the image and token strides of both sides."""
        rows = self.target if self.rows is None else self.rows
        return (*rows.stride()[:2], *self.target.stride()[:2])


def row_norms(tokens: Tensor, prefix: int, acc: torch.dtype) -> Tensor:
    """Return the norms of the patches of ``tokens [B, T, D]``, ``[B, P]``."""
    images, count, width = tokens.shape
    patches = count - prefix
    norms = tokens.new_empty((images, patches), dtype=acc)
    rows, inner = 16, min(512, block_of(width))
    row_norms_kernel[(triton.cdiv(patches, rows), images)](
        tokens,
        norms,
        *tokens.stride()[:2],
        patches,
        prefix,
        width,
        ACC=kernel_dtype(acc),
        BLOCK_P=rows,
        BLOCK_D=inner,
        **compiling(configs.SUMS),
    )
    return norms


def _apply(
    difference: Tensor,
    slopes: Tensor,
    norms: Tensor,
    columns: Tensor,
    out: Tensor,
    arithmetic: Arithmetic,
    *,
    negative: bool,
) -> Tensor:
    images, patches, count = out.shape

    def attempt(config: configs.Config) -> Tensor:
        block_c = config.inner
        grid = (triton.cdiv(count, block_c), triton.cdiv(patches, config.rows), images)
        gram_apply_kernel[grid](
            difference,
            slopes,
            norms,
            columns,
            out,
            *columns.stride()[:2],
            difference.stride(1),
            slopes.shape[1],
            patches,
            count,
            NEGATIVE=negative,
            **arithmetic.options(1),
            BLOCK_P=config.rows,
            BLOCK_K=config.rows,
            BLOCK_C=block_c,
            **compiling(config),
        )
        return out

    return arithmetic.run("gram_apply", 1, attempt, images, patches, count)


def run_gram(
    given: GramRows,
    columns: Tensor,
    prefix: int,
    arithmetic: Arithmetic,
    *,
    columns_dtype: torch.dtype | None,
    d_target_dtype: torch.dtype | None,
) -> Gram:
    """Run the stage ``gram``.

    Args:
        given: both sides.
        columns: what X is applied to, ``[B, P, C]``.
        prefix: the number of prefix tokens.
        arithmetic: how products are computed.
        columns_dtype: the dtype of ``X columns``; None: it is not asked for.
        d_target_dtype: the dtype of the target's gradient; None: it is not asked for.
    """
    images, patches = given.norms.shape
    width = given.target.shape[-1]
    rank = 1 if given.columns is None else given.columns.shape[-1] // 2
    block_r = block_of(rank)
    needs_columns, needs_target = columns_dtype is not None, d_target_dtype is not None
    new = given.norms.new_empty

    def in_mode(kernel: str, mode: str, config: configs.Config) -> configs.Config:
        # Both modes write to one grid of tiles, so they share its rows.
        if mode != "formed":
            return config
        return arithmetic.config(f"{kernel}_formed", rank)._replace(rows=config.rows)

    sizes = (patches, prefix, width, rank)
    owns_rows = needs_columns and not needs_target and given.columns is not None
    if owns_rows and patches < configs.PAIRS_FROM and block_r <= configs.MAX_ROWS_BLOCK_R:
        turned = new(columns.shape, dtype=columns_dtype)

        def own_rows(config: configs.Config) -> Tensor:
            tiles = triton.cdiv(patches, config.rows)
            parts = new((images, tiles))
            for mode in given.modes:
                gram_rows_kernel[(tiles, images)](
                    *given.pointers(),
                    given.norms,
                    given.target_norms,
                    given.amplification,
                    turned,
                    parts,
                    *given.strides(),
                    *sizes,
                    MODE=mode,
                    **arithmetic.options(1),
                    **meta(in_mode("gram_rows", mode, config), block_r, "BLOCK_P"),
                )
            return parts

        parts = arithmetic.run("gram_rows", rank, own_rows, images, *sizes, given.mode)
        return Gram(parts, turned, None)

    stores = needs_columns or needs_target
    stride = 16 * triton.cdiv(patches, 16)  # rows that begin at 16-byte boundaries
    difference = new((images, patches, stride) if stores else (0,), dtype=arithmetic.kept)

    def by_pairs(config: configs.Config) -> tuple[Tensor, Tensor, Tensor]:
        tiles = triton.cdiv(patches, config.rows)
        parts = new((images, tiles, tiles))
        slopes = new((images, tiles, patches) if stores else (0,))
        target_slopes = new((images, tiles, patches) if needs_target else (0,))
        for mode in given.modes:
            gram_pairs_kernel[(tiles, tiles, images)](
                *given.pointers(),
                given.norms,
                given.target_norms,
                given.amplification,
                difference,
                slopes,
                target_slopes,
                parts,
                *given.strides(),
                stride,
                *sizes,
                STORES=stores,
                HAS_TARGET_SLOPES=needs_target,
                MODE=mode,
                **arithmetic.options(1),
                **meta(in_mode("gram_pairs", mode, config), block_r, "BLOCK_P"),
            )
        return parts, slopes, target_slopes

    key = (images, *sizes, given.mode, stores, needs_target)
    parts, slopes, target_slopes = arithmetic.run("gram_pairs", rank, by_pairs, *key)
    gram_columns: Tensor | None = None
    d_target: Tensor | None = None
    if needs_columns:
        out = new(columns.shape, dtype=columns_dtype)
        gram_columns = _apply(
            difference, slopes, given.norms, columns, out, arithmetic, negative=False
        )
    if needs_target:
        out = new((images, patches, width), dtype=d_target_dtype)
        patch_rows = given.target[:, prefix:]
        d_target = _apply(
            difference,
            target_slopes,
            given.target_norms,
            patch_rows,
            out,
            arithmetic,
            negative=True,
        )
    return Gram(parts, gram_columns, d_target)


def mean_of_parts(parts: Tensor, norms: Tensor) -> Tensor:
    """Return the Gram loss alone, from its parts; norms ``[B, P]``."""
    images, patches = norms.shape
    return parts.sum() / (images * patches * patches)
