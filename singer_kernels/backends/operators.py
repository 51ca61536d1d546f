"""Signatures, schemas and fake implementations of the operators of a backend with kernels.

Backend ``<name>`` has the operators ``singer_kernels::<name>_losses_forward``,
``<name>_losses_backward`` and ``<name>_gram_loss``. Their schemas are derived from the named tuples
below; implementations in C++ take the same arguments by position. A tensor that was not requested
comes back empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor

from singer_kernels.backends.precision import MatmulPrecision

LIBRARY = torch.library.Library("singer_kernels", "FRAGMENT")


class ForwardInputs(NamedTuple):
    """Arguments of ``losses_forward``."""

    student: Tensor  # S, [B, T, D]
    teacher: Tensor  # F, [B, T, D]
    down: Tensor  # Wd, [D, r], contiguous, rounded to product
    up: Tensor  # Wu, [r, D], contiguous, rounded to product
    gram_target: Tensor | None  # R, [B, T, D]; None: the teacher
    gram: bool  # whether to compute the information loss
    quantile: float
    num_prefix_tokens: int
    has_refined: bool  # which outputs to compute
    has_residual: bool
    has_grad_hz: bool
    has_grad_target: bool
    acc: torch.dtype  # of sums
    product: torch.dtype  # of the products' operands
    gram_product: torch.dtype  # of the Gram products' operands


class ForwardOutput(NamedTuple):
    """Results of ``losses_forward``; empty where not requested."""

    kd: Tensor
    outlier: Tensor
    info: Tensor
    refined: Tensor  # F̂, [B, T, D], in the teacher's dtype
    norms: Tensor  # n, [B, P]
    threshold: Tensor  # q, [B]
    outlier_weight: Tensor  # 2 / count, []
    hz: Tensor  # [H | Z], [B, P, 2r]
    residual: Tensor  # (F̂ − S) Wuᵀ, [B, P, r]
    grad_hz: Tensor  # X [H | Z], [B, P, 2r]
    grad_target: Tensor  # the information loss's gradient in the target's patches, [B, P, D]


class BackwardInputs(NamedTuple):
    """Arguments of ``losses_backward``; a gradient is None where none comes back."""

    student: Tensor | None  # S, [B, T, D]; needed with grad_kd
    teacher: Tensor  # F, [B, T, D]
    up: Tensor  # Wu, [r, D], contiguous, rounded to product
    hz: Tensor  # [H | Z], [B, P, 2r]
    grad_hz: Tensor | None  # X [H | Z]; needed with grad_info
    residual: Tensor | None  # (F̂ − S) Wuᵀ, [B, P, r]; needed with grad_kd
    norms: Tensor | None  # n, [B, P]; needed with grad_outlier, as are the next two
    threshold: Tensor | None  # q, [B]
    outlier_weight: Tensor | None  # 2 / count, []
    grad_kd: Tensor | None  # []
    grad_outlier: Tensor | None  # []
    grad_info: Tensor | None  # []
    grad_refined: Tensor | None  # Y, [B, T, D]
    num_prefix_tokens: int
    acc: torch.dtype
    product: torch.dtype
    student_dtype: torch.dtype | None  # of dS; None: do not compute it
    down_dtype: torch.dtype | None  # of dWd; likewise
    up_dtype: torch.dtype | None  # of dWu; likewise

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Whether to compute dS, dWd and dWu: those requested that an output's gradient reaches."""
        grads = (self.grad_kd, self.grad_outlier, self.grad_info, self.grad_refined)
        reaches_adapter = any(grad is not None for grad in grads)
        return (
            self.student_dtype is not None and self.grad_kd is not None,
            self.down_dtype is not None and reaches_adapter,
            self.up_dtype is not None and reaches_adapter,
        )


class BackwardOutput(NamedTuple):
    """Results of ``losses_backward``; empty where not requested or without a gradient."""

    grad_student: Tensor  # dS, [B, T, D]
    grad_down: Tensor  # dWd, [D, r]
    grad_up: Tensor  # dWu, [r, D]


class GramLossInputs(NamedTuple):
    """Arguments of ``gram_loss``."""

    tokens: Tensor  # [B, T, D]
    target: Tensor  # [B, T, D]
    num_prefix_tokens: int
    has_grad_tokens: bool
    has_grad_target: bool
    acc: torch.dtype
    product: torch.dtype


class GramLossOutput(NamedTuple):
    """Results of ``gram_loss``; empty where not requested."""

    loss: Tensor  # []
    grad_tokens: Tensor  # of the patches, [B, P, D], in acc
    grad_target: Tensor  # likewise


def or_empty(tensor: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the tensor, or an empty placeholder for an output that was not requested."""
    return like.new_empty(0, dtype=dtype) if tensor is None else tensor


StorageDtype = Callable[[MatmulPrecision], torch.dtype]

_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    float: "float",
    int: "SymInt",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
}


def _schema(operator: str, inputs: type, outputs: type) -> str:
    arguments, results = (
        ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(part).items())
        for part in (inputs, outputs)
    )
    return f"{operator}({arguments}) -> ({results})"


def _fake_forward(x: ForwardInputs, stored: StorageDtype) -> ForwardOutput:
    images, tokens, width = x.teacher.shape
    patches, rank = tokens - x.num_prefix_tokens, x.down.shape[1]

    def new(*shape: int, dtype: torch.dtype = x.acc, wanted: bool = True) -> Tensor:
        return x.teacher.new_empty(shape if wanted else (0,), dtype=dtype)

    residual_dtype, gram_dtype = (
        stored(MatmulPrecision(product, x.acc)) for product in (x.product, x.gram_product)
    )
    return ForwardOutput(
        kd=new(),
        outlier=new(),
        info=new(wanted=x.gram),
        refined=new(images, tokens, width, dtype=x.teacher.dtype, wanted=x.has_refined),
        norms=new(images, patches),
        threshold=new(images),
        outlier_weight=new(),
        hz=new(images, patches, 2 * rank),
        residual=new(images, patches, rank, dtype=residual_dtype, wanted=x.has_residual),
        grad_hz=new(images, patches, 2 * rank, dtype=gram_dtype, wanted=x.has_grad_hz),
        grad_target=new(images, patches, width, dtype=gram_dtype, wanted=x.has_grad_target),
    )


def _fake_backward(x: BackwardInputs, stored: StorageDtype) -> BackwardOutput:
    rank, width = x.up.shape
    shapes = (x.teacher.shape, (width, rank), (rank, width))
    dtypes = (x.student_dtype, x.down_dtype, x.up_dtype)
    return BackwardOutput(
        *(
            x.teacher.new_empty(shape, dtype=dtype) if needed else x.hz.new_empty(0)
            for shape, dtype, needed in zip(shapes, dtypes, x.needs, strict=True)
        )
    )


def _fake_gram_loss(x: GramLossInputs, stored: StorageDtype) -> GramLossOutput:
    images, tokens, width = x.tokens.shape
    shape = (images, tokens - x.num_prefix_tokens, width)
    return GramLossOutput(
        x.tokens.new_empty((), dtype=x.acc),
        x.tokens.new_empty(shape if x.has_grad_tokens else (0,), dtype=x.acc),
        x.tokens.new_empty(shape if x.has_grad_target else (0,), dtype=x.acc),
    )


_OPERATORS: dict[str, tuple[type, type, Callable[[Any, StorageDtype], Any]]] = {
    "losses_forward": (ForwardInputs, ForwardOutput, _fake_forward),
    "losses_backward": (BackwardInputs, BackwardOutput, _fake_backward),
    "gram_loss": (GramLossInputs, GramLossOutput, _fake_gram_loss),
}


def define(backend: str, stored: StorageDtype = lambda precision: precision.storage_dtype) -> None:
    """Define a backend's three operators and their fake implementations.

    Args:
        backend: its name.
        stored: how the backend chooses the dtype of saved tensors.
    """
    for name, (inputs, outputs, fake) in _OPERATORS.items():
        LIBRARY.define(_schema(f"{backend}_{name}", inputs, outputs))

        def unpacked(*args: Any, _inputs: type = inputs, _fake: Any = fake, **kwargs: Any) -> Any:
            return _fake(_inputs(*args, **kwargs), stored)

        torch.library.register_fake(f"singer_kernels::{backend}_{name}", unpacked, lib=LIBRARY)


Implementation = TypeVar("Implementation", bound=Callable[[Any], Any])


def implement(backend: str, name: str) -> Callable[[Implementation], Implementation]:
    """Register a function from the operator's inputs to its outputs as its implementation."""
    inputs = _OPERATORS[name][0]

    def register(function: Implementation) -> Implementation:
        def unpacked(*args: Any, **kwargs: Any) -> Any:
            return function(inputs(*args, **kwargs))

        LIBRARY.impl(f"{backend}_{name}", unpacked, "CompositeExplicitAutograd")
        return function

    return register
