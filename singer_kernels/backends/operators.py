"""The operators that torch sees of a backend with kernels: schemas and fake implementations.

A backend of that name has ``singer_kernels::<name>_losses_forward``, ``<name>_losses_backward`` and
``<name>_gram_loss``. A result that was not asked for is an empty tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

LIBRARY = torch.library.Library("singer_kernels", "FRAGMENT")

_FORWARD = (
    "losses_forward("
    "Tensor student, Tensor teacher, Tensor down, Tensor up, Tensor? gram_target, bool gram, "
    "float quantile, SymInt num_prefix_tokens, bool has_refined, bool has_residual, "
    "bool has_gram_columns, bool has_d_target, "
    "ScalarType acc, ScalarType product, ScalarType gram_product) -> "
    "(Tensor kd, Tensor outlier, Tensor info, Tensor refined, Tensor norms, Tensor threshold, "
    "Tensor outlier_weight, Tensor columns, Tensor residual, Tensor gram_columns, Tensor d_target)"
)
_BACKWARD = (
    "losses_backward("
    "Tensor? student, Tensor teacher, Tensor up, Tensor columns, Tensor? gram_columns, "
    "Tensor? residual, Tensor? norms, Tensor? threshold, Tensor? outlier_weight, "
    "Tensor? d_kd, Tensor? d_outlier, Tensor? d_info, Tensor? d_refined, "
    "SymInt num_prefix_tokens, ScalarType acc, ScalarType product, "
    "ScalarType? student_dtype, ScalarType? down_dtype, ScalarType? up_dtype) -> "
    "(Tensor d_student, Tensor d_down, Tensor d_up)"
)
_GRAM = (
    "gram_loss("
    "Tensor tokens, Tensor target, SymInt num_prefix_tokens, bool has_d_tokens, "
    "bool has_d_target, ScalarType acc, ScalarType product) -> "
    "(Tensor loss, Tensor d_tokens, Tensor d_target)"
)


class ForwardOutput(NamedTuple):
    """What ``losses_forward`` returns; empty where not asked for."""

    kd: Tensor
    outlier: Tensor
    info: Tensor
    refined: Tensor  # F̂, [B, T, D], in the teacher's dtype
    norms: Tensor  # [B, P]
    threshold: Tensor  # [B]
    outlier_weight: Tensor  # 2 / count, []
    columns: Tensor  # [H | Z], [B, P, 2r]
    residual: Tensor  # (F̂ − S) Wuᵀ, [B, P, r]
    gram_columns: Tensor  # X [H | Z], [B, P, 2r]
    d_target: Tensor  # the info loss's gradient in the target's patches, [B, P, D]


class Upstream(NamedTuple):
    """The gradients that come back; None: none does."""

    kd: Tensor | None  # []
    outlier: Tensor | None  # []
    info: Tensor | None  # []
    refined: Tensor | None  # Y, [B, T, D]


def or_empty(tensor: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a result, or what stands for one that was not asked for."""
    return like.new_empty(0, dtype=dtype) if tensor is None else tensor


def narrow_dtype(product: torch.dtype, acc: torch.dtype) -> torch.dtype:
    """Return the dtype of operands and of what is kept: float16 would lose the range of H and X."""
    return torch.bfloat16 if product == torch.bfloat16 else acc


KeptDtype = Callable[[torch.dtype, torch.dtype], torch.dtype]
"""From the products' and the accumulation dtype: that of what one kernel keeps for another."""


def _fake_losses_forward(kept_dtype: KeptDtype) -> Callable[..., tuple[Tensor, ...]]:
    def losses_forward(
        student: Tensor,
        teacher: Tensor,
        down: Tensor,
        up: Tensor,
        gram_target: Tensor | None,
        gram: bool,
        quantile: float,
        num_prefix_tokens: int,
        has_refined: bool,
        has_residual: bool,
        has_gram_columns: bool,
        has_d_target: bool,
        acc: torch.dtype,
        product: torch.dtype,
        gram_product: torch.dtype,
    ) -> tuple[Tensor, ...]:
        images, tokens, width = teacher.shape
        patches, rank = tokens - num_prefix_tokens, down.shape[1]

        def new(*shape: int, dtype: torch.dtype = acc, wanted: bool = True) -> Tensor:
            return teacher.new_empty(shape if wanted else (0,), dtype=dtype)

        residual_dtype, gram_dtype = kept_dtype(product, acc), kept_dtype(gram_product, acc)
        return ForwardOutput(
            kd=new(),
            outlier=new(),
            info=new(wanted=gram),
            refined=new(images, tokens, width, dtype=teacher.dtype, wanted=has_refined),
            norms=new(images, patches),
            threshold=new(images),
            outlier_weight=new(),
            columns=new(images, patches, 2 * rank),
            residual=new(images, patches, rank, dtype=residual_dtype, wanted=has_residual),
            gram_columns=new(images, patches, 2 * rank, dtype=gram_dtype, wanted=has_gram_columns),
            d_target=new(images, patches, width, dtype=gram_dtype, wanted=has_d_target),
        )

    return losses_forward


def _fake_losses_backward(
    student: Tensor | None,
    teacher: Tensor,
    up: Tensor,
    columns: Tensor,
    gram_columns: Tensor | None,
    residual: Tensor | None,
    norms: Tensor | None,
    threshold: Tensor | None,
    outlier_weight: Tensor | None,
    d_kd: Tensor | None,
    d_outlier: Tensor | None,
    d_info: Tensor | None,
    d_refined: Tensor | None,
    num_prefix_tokens: int,
    acc: torch.dtype,
    product: torch.dtype,
    student_dtype: torch.dtype | None,
    down_dtype: torch.dtype | None,
    up_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    rank, width = up.shape
    arrives = any(grad is not None for grad in (d_kd, d_outlier, d_info, d_refined))

    def new(shape: Any, dtype: torch.dtype | None, arrives: bool) -> Tensor:
        if dtype is None or not arrives:
            return columns.new_empty(0)
        return teacher.new_empty(shape, dtype=dtype)

    return (
        new(teacher.shape, student_dtype, d_kd is not None),
        new((width, rank), down_dtype, arrives),
        new((rank, width), up_dtype, arrives),
    )


def _fake_gram_loss(
    tokens: Tensor,
    target: Tensor,
    num_prefix_tokens: int,
    has_d_tokens: bool,
    has_d_target: bool,
    acc: torch.dtype,
    product: torch.dtype,
) -> tuple[Tensor, ...]:
    images, count, width = tokens.shape
    shape = (images, count - num_prefix_tokens, width)
    return (
        tokens.new_empty((), dtype=acc),
        tokens.new_empty(shape if has_d_tokens else (0,), dtype=acc),
        tokens.new_empty(shape if has_d_target else (0,), dtype=acc),
    )


def define(name: str, kept_dtype: KeptDtype = narrow_dtype) -> None:
    """Define a backend's three operators, and what they return without computing it.

    Args:
        name: the backend's name.
        kept_dtype: how the backend chooses the dtype of what one kernel keeps for another.
    """
    fakes: tuple[Callable[..., tuple[Tensor, ...]], ...]
    fakes = (_fake_losses_forward(kept_dtype), _fake_losses_backward, _fake_gram_loss)
    for schema, fake in zip((_FORWARD, _BACKWARD, _GRAM), fakes, strict=True):
        LIBRARY.define(f"{name}_{schema}")
        operator = f"singer_kernels::{name}_{schema.partition('(')[0]}"
        torch.library.register_fake(operator, fake, lib=LIBRARY)
