"""The stages in order: what is allocated, which kernel is launched, with what."""

from __future__ import annotations

import math
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from singer_kernels.backends.triton import configs
from singer_kernels.backends.triton.kernels.backward import (
    backward_rows_kernel,
    backward_tokens_kernel,
    sum_losses_kernel,
    sum_parts_kernel,
)
from singer_kernels.backends.triton.kernels.gram import (
    gram_apply_kernel,
    gram_pairs_kernel,
    gram_rows_kernel,
    row_norms_kernel,
)
from singer_kernels.backends.triton.kernels.language import INTERPRETED
from singer_kernels.backends.triton.kernels.outlier import outlier_fwd_kernel
from singer_kernels.backends.triton.kernels.refine import refine_fwd_kernel


class Arithmetic(NamedTuple):
    """How products are computed on the device at hand."""

    product: torch.dtype  # what the operands are rounded to
    acc: torch.dtype  # what sums are kept in
    arch: int | None  # None: the interpreter

    @property
    def operand(self) -> Any:
        """The operands' dtype in a kernel. float16 has the digits of TF32, but not its range."""
        if self.product == torch.float16:
            return tl.float32
        return getattr(tl, self.name)

    @property
    def name(self) -> str:
        """The operands' dtype in a kernel, by its name."""
        dtype = torch.float32 if self.product == torch.float16 else self.product
        return str(dtype).removeprefix("torch.")

    def precision(self, rank: int) -> str:
        """Return how float32 operands are multiplied: as torch is told to, where it fits."""
        if self.product not in (torch.float16, torch.float32) or rank > configs.MAX_MATRIX_RANK:
            return "ieee"
        is_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return "tf32" if is_tf32 or self.product == torch.float16 else "tf32x3"

    def options(self, rank: int) -> dict[str, Any]:
        """Return the constants that every kernel with products takes."""
        return {
            "OPERAND": self.operand,
            "PRECISION": self.precision(rank),
            "ACC": getattr(tl, str(self.acc).removeprefix("torch.")),
        }

    def config(self, kernel: str, rank: int) -> configs.Config:
        """Return a kernel's configuration here."""
        return configs.lookup(kernel, self.arch, self.name, rank)


def architecture(device: torch.device) -> int | None:
    """Return the architecture that configurations are looked up for; None: the interpreter."""
    if INTERPRETED.value:
        return None
    return configs.architecture(torch.cuda.get_device_capability(device))


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device the current one: Triton launches there."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else nullcontext()


def block_of(size: int) -> int:
    """Return the power of two, at least 16, that holds a size: the least that a product takes."""
    return max(16, triton.next_power_of_2(size))


def rows_contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy of it if its last dimension is not contiguous."""
    is_contiguous = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    return tensor if is_contiguous else tensor.contiguous()


def _compiling(config: configs.Config) -> dict[str, Any]:
    """Return a configuration's compiler options. Multiply-adds are fused, whatever the default."""
    return {
        "num_warps": config.warps,
        "num_stages": config.stages,
        "enable_fp_fusion": True,
        "maxnreg": config.registers,
    }


def _meta(config: configs.Config, block_r: int | None = None, rows: str = "BLOCK_T") -> Any:
    meta = {
        rows: config.rows,
        "BLOCK_D": config.inner,
        **_compiling(config),
    }
    return meta if block_r is None else {**meta, "BLOCK_R": block_r}


class Refined(NamedTuple):
    """What the stage ``refine`` gives; what was not asked for is None."""

    columns: Tensor  # [H | Z], [B, P, 2r]
    norms: Tensor  # n, [B, P]
    plain_norms: Tensor  # norms of F, [B, P]
    kd_parts: Tensor  # [programs]
    parts: Tensor | None  # H and L in high and low parts, [B, P, 4, BLOCK_R]
    residual: Tensor | None  # (F̂ − S) Wuᵀ, [B, P, r]
    refined: Tensor | None  # F̂, [B, T, D], in the teacher's dtype
    rows: Tensor | None  # F̂, [B, T, D], for the Gram products


def refine(
    student: Tensor,
    teacher: Tensor,
    down: Tensor,
    up: Tensor,
    prefix: int,
    arithmetic: Arithmetic,
    *,
    identity: bool,
    has_residual: bool,
    has_refined: bool,
    rows_dtype: torch.dtype | None,
) -> Refined:
    """Run the stage ``refine``.

    Args:
        student: S, ``[B, T, D]``.
        teacher: F, ``[B, T, D]``.
        down: Wd, ``[D, r]``, contiguous, rounded to the products' dtype.
        up: Wu, ``[r, D]``, likewise.
        prefix: the number of prefix tokens.
        arithmetic: how products are computed.
        identity: whether the Gram identity's parts are needed.
        has_residual: whether ``(F̂ − S) Wuᵀ`` is.
        has_refined: whether F̂ is, in the teacher's dtype.
        rows_dtype: the dtype in which the Gram products want F̂; None: they don't.
    """
    images, tokens, width = teacher.shape
    rank, patches = down.shape[1], tokens - prefix
    block_r, acc = block_of(rank), arithmetic.acc
    config = arithmetic.config("refine", rank)
    programs = triton.cdiv(images * tokens, config.rows)
    new = teacher.new_empty
    columns = new((images, patches, 2 * rank), dtype=acc)
    parts = None
    if identity:
        parts = new((images, patches, 4, block_r), dtype=arithmetic.product)
    residual = new((images, patches, rank), dtype=acc) if has_residual else None
    norms, plain_norms = (new((images, patches), dtype=acc) for _ in range(2))
    kd_parts = new((programs,), dtype=acc)
    refined = new((images, tokens, width)) if has_refined else None
    rows, writes_rows = None, False
    if rows_dtype is not None:
        writes_rows = refined is None or refined.dtype != rows_dtype
        rows = new((images, tokens, width), dtype=rows_dtype) if writes_rows else refined
    # Rounded operands are exact in float32 and in TF32: this product rounds nothing but its sums.
    overlap = torch.mm(up.to(acc), up.to(acc).T) if identity else None
    refine_fwd_kernel[(programs,)](
        teacher,
        student,
        down,
        up,
        overlap,
        columns,
        parts,
        residual,
        norms,
        plain_norms,
        kd_parts,
        refined,
        rows,
        *teacher.stride()[:2],
        *student.stride()[:2],
        images * tokens,
        tokens,
        prefix,
        width,
        rank,
        IDENTITY=identity,
        HAS_RESIDUAL=has_residual,
        HAS_REFINED=has_refined,
        HAS_ROWS=writes_rows,
        **arithmetic.options(rank),
        **_meta(config, block_r),
    )
    return Refined(columns, norms, plain_norms, kd_parts, parts, residual, refined, rows)


class Outliers(NamedTuple):
    """What the stage ``outlier`` gives."""

    threshold: Tensor  # q, [B]
    squares: Tensor  # [B]
    counts: Tensor  # [B]
    amplification: Tensor | None  # largest ‖F‖ / n, [B]


def quantile_rank(quantile: float, patches: int, acc: torch.dtype) -> tuple[int, float]:
    """Return ``⌊γ (P − 1)⌋`` and the rest, computed in the accumulation dtype as torch does."""
    rank = quantile * (patches - 1)
    if acc == torch.float32:
        (gamma,) = struct.unpack("f", struct.pack("f", quantile))
        (rank,) = struct.unpack("f", struct.pack("f", gamma * (patches - 1)))
    below = math.floor(rank)
    return below, rank - below


def outlier(norms: Tensor, plain_norms: Tensor | None, quantile: float) -> Outliers:
    """Run the stage ``outlier``: norms ``[B, P]``, and the plain ones if ratios are asked for."""
    images, patches = norms.shape
    new = norms.new_empty
    threshold, squares, counts = (new((images,)) for _ in range(3))
    amplification = None if plain_norms is None else new((images,))
    below, share = quantile_rank(quantile, patches, norms.dtype)
    (kept,) = struct.unpack("f", struct.pack("f", share))
    block_p = block_of(patches)
    outlier_fwd_kernel[(images,)](
        norms,
        plain_norms,
        threshold,
        squares,
        counts,
        amplification,
        patches,
        below,
        kept,
        share - kept,
        HAS_PLAIN=plain_norms is not None,
        ACC=getattr(tl, str(norms.dtype).removeprefix("torch.")),
        BLOCK_P=block_p,
        **_compiling(configs.Config(0, 0, configs.outlier_warps(block_p), 1)),
    )
    return Outliers(threshold, squares, counts, amplification)


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
        return self.rows, self.target, self.up, self.columns, self.parts

    def strides(self) -> tuple[int, ...]:
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
        ACC=getattr(tl, str(acc).removeprefix("torch.")),
        BLOCK_P=rows,
        BLOCK_D=inner,
        **_compiling(configs.SUMS),
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
    config = arithmetic.config("gram_apply", 1)
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
        **_compiling(config),
    )
    return out


def _named(kernel: str, mode: str) -> str:
    return f"{kernel}_formed" if mode == "formed" else kernel


def gram(
    given: GramRows,
    columns: Tensor,
    prefix: int,
    arithmetic: Arithmetic,
    *,
    needs_columns: bool,
    d_target_dtype: torch.dtype | None,
) -> Gram:
    """Run the stage ``gram``.

    Args:
        given: both sides.
        columns: what X is applied to, ``[B, P, C]``.
        prefix: the number of prefix tokens.
        arithmetic: how products are computed.
        needs_columns: whether ``X columns`` is asked for.
        d_target_dtype: the dtype of the target's gradient; None: it is not asked for.
    """
    images, patches = given.norms.shape
    width = given.target.shape[-1]
    rank = 1 if given.columns is None else given.columns.shape[-1] // 2
    block_r = block_of(rank)
    needs_target = d_target_dtype is not None
    new = given.norms.new_empty
    sizes = (patches, prefix, width, rank)
    owns_rows = needs_columns and not needs_target and given.columns is not None
    if owns_rows and patches < configs.PAIRS_FROM and block_r <= configs.MAX_ROWS_BLOCK_R:
        tiles = triton.cdiv(patches, arithmetic.config("gram_rows", rank).rows)
        parts, turned = new((images, tiles)), torch.empty_like(columns)
        for mode in given.modes:
            config = arithmetic.config(_named("gram_rows", mode), rank)
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
                **_meta(config, block_r, "BLOCK_P"),
            )
        return Gram(parts, turned, None)

    stores = needs_columns or needs_target
    tiles = triton.cdiv(patches, arithmetic.config("gram_pairs", rank).rows)
    parts = new((images, tiles, tiles))
    difference = slopes = target_slopes = None
    stride = 16 * triton.cdiv(patches, 16)  # rows that begin at 16-byte boundaries
    if stores:
        stored = arithmetic.acc if arithmetic.operand != tl.bfloat16 else torch.bfloat16
        difference = new((images, patches, stride), dtype=stored)
        slopes = new((images, tiles, patches))
        target_slopes = torch.empty_like(slopes) if needs_target else None
    for mode in given.modes:
        config = arithmetic.config(_named("gram_pairs", mode), rank)
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
            **_meta(config, block_r, "BLOCK_P"),
        )
    turned = d_target = None
    if needs_columns:
        out = new(columns.shape)
        turned = _apply(difference, slopes, given.norms, columns, out, arithmetic, negative=False)
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
    return Gram(parts, turned, d_target)


def sum_losses(
    kd_parts: Tensor, outliers: Outliers, gram_parts: Tensor | None, shape: torch.Size, prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return kd, outlier, info and 2 / count, all scalars; info is not written without a Gram."""
    images, tokens, width = shape
    kd, outlier_loss, info, weight = (kd_parts.new_empty(()) for _ in range(4))
    sum_losses_kernel[(1,)](
        kd_parts,
        outliers.squares,
        outliers.counts,
        gram_parts,
        kd,
        outlier_loss,
        weight,
        info,
        kd_parts.numel(),
        images,
        0 if gram_parts is None else gram_parts.numel(),
        tokens,
        tokens - prefix,
        width,
        HAS_INFO=gram_parts is not None,
        ACC=getattr(tl, str(kd_parts.dtype).removeprefix("torch.")),
        BLOCK=1024,
        **_compiling(configs.SUMS),
    )
    return kd, outlier_loss, info, weight


class Upstream(NamedTuple):
    """The gradients that come back; None: none does."""

    kd: Tensor | None  # []
    outlier: Tensor | None  # []
    info: Tensor | None  # []
    refined: Tensor | None  # Y, [B, T, D]


def backward(
    student: Tensor | None,
    teacher: Tensor,
    up: Tensor,
    columns: Tensor,
    gram_columns: Tensor | None,
    residual: Tensor | None,
    norms: Tensor,
    threshold: Tensor,
    outlier_weight: Tensor,
    upstream: Upstream,
    prefix: int,
    arithmetic: Arithmetic,
    student_dtype: torch.dtype | None,
    down_dtype: torch.dtype | None,
    up_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Run the stage ``backward``.

    Args:
        student: S, ``[B, T, D]``; needed with ``upstream.kd``.
        teacher: F, ``[B, T, D]``.
        up: Wu, ``[r, D]``, contiguous, rounded to the products' dtype.
        columns: ``[H | Z]``, ``[B, P, 2r]``.
        gram_columns: ``X [H | Z]``; needed with ``upstream.info``.
        residual: ``(F̂ − S) Wuᵀ``, ``[B, P, r]``; needed with ``upstream.kd``.
        norms: n, ``[B, P]``.
        threshold: q, ``[B]``.
        outlier_weight: 2 / count.
        upstream: the gradients that come back.
        prefix: the number of prefix tokens.
        arithmetic: how products are computed.
        student_dtype: the dtype of dS; None: it is not asked for.
        down_dtype: the dtype of dWd; likewise.
        up_dtype: the dtype of dWu; likewise.

    Returns:
        dS, dWd and dWu; None where not asked for, or where the gradient is nothing but 0.
    """
    images, tokens, width = teacher.shape
    rank, patches = up.shape[0], tokens - prefix
    block_r, acc = block_of(rank), arithmetic.acc
    has_kd, has_refined = upstream.kd is not None, upstream.refined is not None
    has_turned = upstream.outlier is not None or upstream.info is not None
    needs_student = student_dtype is not None and has_kd
    reaches_adapter = has_kd or has_refined or has_turned
    needs_down = down_dtype is not None and reaches_adapter
    needs_up = up_dtype is not None and reaches_adapter
    new = teacher.new_empty
    options = arithmetic.options(rank)
    d_hidden = turned = d_student = d_down = d_up = None
    kept = acc if arithmetic.operand != tl.bfloat16 else torch.bfloat16
    back_strides = upstream.refined.stride()[:2] if has_refined else (0, 0)
    if needs_down or (needs_up and has_turned):
        d_hidden = new((images, patches, rank), dtype=kept)
        turned = new((images, patches, rank), dtype=kept)
        config = arithmetic.config("backward_rows", rank)
        backward_rows_kernel[(triton.cdiv(images * patches, config.rows),)](
            columns,
            gram_columns,
            residual,
            norms,
            threshold,
            outlier_weight,
            up,
            upstream.refined,
            upstream.kd,
            upstream.outlier,
            upstream.info,
            d_hidden,
            turned,
            *back_strides,
            images * patches,
            patches,
            prefix,
            width,
            rank,
            images,
            HAS_KD=has_kd and needs_down,
            HAS_OUTLIER=upstream.outlier is not None,
            HAS_INFO=upstream.info is not None,
            HAS_REFINED=has_refined and needs_down,
            **options,
            **_meta(config, block_r),
        )
    if not (needs_student or needs_down or needs_up):
        return None, None, None
    config = arithmetic.config("backward_tokens", rank)
    blocks = triton.cdiv(images * tokens, config.rows)
    rows_per_split = config.rows * triton.cdiv(blocks, configs.SPLITS)
    splits = triton.cdiv(images * tokens, rows_per_split)
    if needs_student:
        d_student = new((images, tokens, width), dtype=student_dtype)
    down_parts = new((splits, width, rank), dtype=acc) if needs_down else None
    up_parts = new((splits, width, rank), dtype=acc) if needs_up else None
    backward_tokens_kernel[(triton.cdiv(width, config.inner), splits)](
        teacher,
        student,
        up,
        columns,
        d_hidden,
        turned,
        upstream.refined,
        upstream.kd,
        d_student,
        down_parts,
        up_parts,
        *teacher.stride()[:2],
        *(student.stride()[:2] if has_kd else (0, 0)),
        *back_strides,
        images * tokens,
        tokens,
        prefix,
        width,
        rank,
        rows_per_split,
        HAS_KD=has_kd,
        HAS_TURNED=has_turned,
        HAS_REFINED=has_refined,
        NEEDS_STUDENT=needs_student,
        NEEDS_DOWN=needs_down,
        NEEDS_UP=needs_up,
        **options,
        **_meta(config, block_r),
    )
    if needs_down:
        d_down = _sum_parts(down_parts, new((width, rank), dtype=down_dtype), (rank, 1))
    if needs_up:
        d_up = _sum_parts(up_parts, new((rank, width), dtype=up_dtype), (1, width))
    return d_student, d_down, d_up


def _sum_parts(parts: Tensor, out: Tensor, strides: tuple[int, int]) -> Tensor:
    splits, width, rank = parts.shape
    block_r = block_of(rank)
    rows = max(1, 1024 // block_r)
    sum_parts_kernel[(triton.cdiv(width, rows),)](
        parts,
        out,
        splits,
        width,
        rank,
        *strides,
        BLOCK_D=rows,
        BLOCK_R=block_r,
        ACC=getattr(tl, str(parts.dtype).removeprefix("torch.")),
        **_compiling(configs.SUMS),
    )
    return out


def mean_of_parts(parts: Tensor, norms: Tensor) -> Tensor:
    """Return the Gram loss alone, from its parts; norms ``[B, P]``."""
    images, patches = norms.shape
    return parts.sum() / (images * patches * patches)
