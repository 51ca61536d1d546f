"""The stages as operators of torch: what torch.compile, export and CUDA graphs see of them.

Registered without importing Triton, which the first call does. A result that was not asked for is
an empty tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_library = torch.library.Library("singer_kernels", "FRAGMENT")

_FORWARD = (
    "triton_losses_forward("
    "Tensor student, Tensor teacher, Tensor down, Tensor up, Tensor? gram_target, bool gram, "
    "float quantile, SymInt num_prefix_tokens, bool has_refined, bool has_residual, "
    "bool has_gram_columns, bool has_d_target, "
    "ScalarType acc, ScalarType product, ScalarType gram_product) -> "
    "(Tensor kd, Tensor outlier, Tensor info, Tensor refined, Tensor norms, Tensor threshold, "
    "Tensor outlier_weight, Tensor columns, Tensor residual, Tensor gram_columns, Tensor d_target)"
)
_BACKWARD = (
    "triton_losses_backward("
    "Tensor? student, Tensor teacher, Tensor up, Tensor columns, Tensor? gram_columns, "
    "Tensor? residual, Tensor? norms, Tensor? threshold, Tensor? outlier_weight, "
    "Tensor? d_kd, Tensor? d_outlier, Tensor? d_info, Tensor? d_refined, "
    "SymInt num_prefix_tokens, ScalarType acc, ScalarType product, "
    "ScalarType? student_dtype, ScalarType? down_dtype, ScalarType? up_dtype) -> "
    "(Tensor d_student, Tensor d_down, Tensor d_up)"
)
_GRAM = (
    "triton_gram_loss("
    "Tensor tokens, Tensor target, SymInt num_prefix_tokens, bool has_d_tokens, "
    "bool has_d_target, ScalarType acc, ScalarType product) -> "
    "(Tensor loss, Tensor d_tokens, Tensor d_target)"
)


class ForwardOutput(NamedTuple):
    """What ``triton_losses_forward`` returns; empty where not asked for."""

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


def kept_dtype(product: torch.dtype, acc: torch.dtype) -> torch.dtype:
    """Return the dtype that products are kept in between kernels; float16 would lose its range."""
    return torch.bfloat16 if product == torch.bfloat16 else acc


def _or_empty(tensor: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype) if tensor is None else tensor


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
    """Run the stages ``refine``, ``outlier`` and ``gram``; see :class:`ForwardOutput`.

    Args:
        student: S, ``[B, T, D]``.
        teacher: F, ``[B, T, D]``.
        down: Wd, ``[D, r]``, contiguous, rounded to ``product``.
        up: Wu, ``[r, D]``, likewise.
        gram_target: R, ``[B, T, D]``; None: the plain teacher.
        gram: whether the information loss is wanted.
        quantile: γ.
        num_prefix_tokens: how many leading tokens are no patches.
        has_refined: whether F̂ is wanted.
        has_residual: whether ``(F̂ − S) Wuᵀ`` is.
        has_gram_columns: whether ``X [H | Z]`` is.
        has_d_target: whether the target's gradient is.
        acc: the dtype of sums.
        product: the dtype of the products' operands.
        gram_product: that of the Gram products.
    """
    from singer_kernels.backends.triton import configs, stages

    prefix, (width, rank) = num_prefix_tokens, down.shape
    arch = stages.architecture(teacher.device)
    arithmetic = stages.Arithmetic(product, acc, arch)
    gram_arithmetic = stages.Arithmetic(gram_product, acc, arch)
    student, teacher = stages.rows_contiguous(student), stages.rows_contiguous(teacher)
    is_own = gram_target is None
    identity = gram and is_own and product == torch.bfloat16 and configs.takes_identity(rank, width)
    rows_dtype, gram_dtype = None, kept_dtype(gram_product, acc)
    if gram and not identity:
        rows_dtype = gram_dtype
    with stages.on_device(teacher):
        refined = stages.run_refine(
            student,
            teacher,
            down,
            up,
            prefix,
            arithmetic,
            identity=identity,
            residual_dtype=kept_dtype(product, acc) if has_residual else None,
            has_refined=has_refined,
            rows_dtype=rows_dtype,
        )
        plain_norms = refined.plain_norms if identity else None
        outliers = stages.run_outlier(refined.norms, plain_norms, quantile)
        found = None
        if gram:
            target = teacher if gram_target is None else stages.rows_contiguous(gram_target)
            target_norms = refined.plain_norms if is_own else stages.row_norms(target, prefix, acc)
            found = stages.run_gram(
                stages.GramRows(
                    "identity" if identity else "stored",
                    refined.rows,
                    target,
                    refined.norms,
                    target_norms,
                    up,
                    refined.columns,
                    refined.parts,
                    outliers.amplification,
                ),
                refined.columns,
                prefix,
                gram_arithmetic,
                columns_dtype=gram_dtype if has_gram_columns else None,
                d_target_dtype=gram_dtype if has_d_target else None,
            )
        kd, outlier, info, weight = stages.sum_losses(
            refined.kd_parts,
            outliers,
            None if found is None else found.parts,
            teacher.shape,
            prefix,
        )
    return ForwardOutput(
        kd=kd,
        outlier=outlier,
        info=info if gram else info.new_empty(0),
        refined=_or_empty(refined.refined, teacher),
        norms=refined.norms,
        threshold=outliers.threshold,
        outlier_weight=weight,
        columns=refined.columns,
        residual=_or_empty(refined.residual, kd, kept_dtype(product, acc)),
        gram_columns=_or_empty(None if found is None else found.columns, kd, gram_dtype),
        d_target=_or_empty(None if found is None else found.d_target, kd, gram_dtype),
    )


def _losses_forward_fake(
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

    gram_dtype = kept_dtype(gram_product, acc)
    return ForwardOutput(
        kd=new(),
        outlier=new(),
        info=new(wanted=gram),
        refined=new(images, tokens, width, dtype=teacher.dtype, wanted=has_refined),
        norms=new(images, patches),
        threshold=new(images),
        outlier_weight=new(),
        columns=new(images, patches, 2 * rank),
        residual=new(images, patches, rank, dtype=kept_dtype(product, acc), wanted=has_residual),
        gram_columns=new(images, patches, 2 * rank, dtype=gram_dtype, wanted=has_gram_columns),
        d_target=new(images, patches, width, dtype=gram_dtype, wanted=has_d_target),
    )


def losses_backward(
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
    """Run the stage ``backward``; see :func:`stages.run_backward` for the arguments."""
    from singer_kernels.backends.triton import stages

    arithmetic = stages.Arithmetic(product, acc, stages.architecture(teacher.device))
    teacher = stages.rows_contiguous(teacher)
    student = None if student is None else stages.rows_contiguous(student)
    d_refined = None if d_refined is None else stages.rows_contiguous(d_refined)
    with stages.on_device(teacher):
        grads = stages.run_backward(
            student,
            teacher,
            up,
            columns,
            gram_columns,
            residual,
            norms,
            threshold,
            outlier_weight,
            stages.Upstream(d_kd, d_outlier, d_info, d_refined),
            num_prefix_tokens,
            arithmetic,
            student_dtype,
            down_dtype,
            up_dtype,
        )
    d_student, d_down, d_up = (_or_empty(grad, columns) for grad in grads)
    return d_student, d_down, d_up


def _losses_backward_fake(
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


def _gram_loss(
    tokens: Tensor,
    target: Tensor,
    num_prefix_tokens: int,
    has_d_tokens: bool,
    has_d_target: bool,
    acc: torch.dtype,
    product: torch.dtype,
) -> tuple[Tensor, ...]:
    from singer_kernels.backends.triton import stages

    arithmetic = stages.Arithmetic(product, acc, stages.architecture(tokens.device))
    tokens, target = stages.rows_contiguous(tokens), stages.rows_contiguous(target)
    with stages.on_device(tokens):
        norms = stages.row_norms(tokens, num_prefix_tokens, acc)
        target_norms = stages.row_norms(target, num_prefix_tokens, acc)
        found = stages.run_gram(
            stages.GramRows("stored", tokens, target, norms, target_norms),
            tokens[:, num_prefix_tokens:],
            num_prefix_tokens,
            arithmetic,
            columns_dtype=acc if has_d_tokens else None,
            d_target_dtype=acc if has_d_target else None,
        )
        loss = stages.mean_of_parts(found.parts, norms)
    return loss, _or_empty(found.columns, loss), _or_empty(found.d_target, loss)


def _gram_loss_fake(
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


for _schema, _implementation, _fake in (
    (_FORWARD, losses_forward, _losses_forward_fake),
    (_BACKWARD, losses_backward, _losses_backward_fake),
    (_GRAM, _gram_loss, _gram_loss_fake),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"singer_kernels::{_name}", _fake, lib=_library)
