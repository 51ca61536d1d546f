"""The backend ``"torch"``: the closed-form forward and backward, in ATen calls.

It runs wherever torch runs. Letters as in :mod:`singer_kernels.reference`; beside them, on patches,
``H = F Wd``, ``Z = F̂ Wuᵀ``, ``M = Wu Wuᵀ``, n the norms of F̂, f those of F.

- Forward: ``F̂ = F + H Wu``. Both Gram matrices need one product of width D: with
  ``L = Z − ½ H M``, ``F Fᵀ = F̂ F̂ᵀ − H Lᵀ − L Hᵀ`` has width 2r. F̂ F̂ᵀ is the one computed, not
  F Fᵀ: an adapter that cancels an outlier makes F̂ the smaller, and small numbers taken from large
  ones would lose their digits. (An adapter that makes every norm a times larger costs G(F) a factor
  of about a² in precision.)
- The information loss: ``E = G(F̂) − G(R)``, ``s = rowsum(E ∘ G(F̂))``, and
  ``X = 4/(B P²) [diag(1/n) E diag(1/n) − diag(s/n²)]`` gives ``dF̂ = X F̂``. It reaches the
  adapter only through ``X [H | Z]``, which the forward computes; E is not saved.
- Backward: with ``c = 2 (n − q)₊ / (count n)``, ``V = (X + c) H``, ``α = 2/(B T D)`` and Y the
  gradient from the next block: ``dS = α (S − F̂)``, ``dH = (X + c) Z + (Y − dS) Wuᵀ``,
  ``dWd = Fᵀ dH``, ``dWu = Vᵀ F̂ + Hᵀ (Y − dS)``. S is read for KD alone: a NaN in it does not
  reach the other losses' gradients.

Beside the inputs, F̂ is the only tensor of its size that is saved. Allocation costs more than
arithmetic on a CPU: tensors that are no longer needed are overwritten.

This holds for float32 and float64 products. For narrower ones, TF32 included, the rows of both Gram
matrices are rounded and multiplied directly, as in the reference: the identity would subtract
rounded numbers.

Source: derived from SiNGER (arXiv 2509.20986), section 3.
"""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

from singer_kernels.backends import Backend
from singer_kernels.backends.gradients import (
    fused_losses_backward,
    gram_loss_backward,
    gram_loss_forward,
    mark_outputs,
    scaled_patches,
)
from singer_kernels.backends.precision import MatmulPrecision, no_autocast, saved
from singer_kernels.reference import NORM_EPS, accumulation_dtype, norm_threshold
from singer_kernels.types import FusedLossesInputs, FusedLossesOutput


def _is_exact(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.float64)


def _has_exact_products(dtype: torch.dtype) -> bool:
    """Whether products of that dtype keep its digits: float32 ones may be computed in TF32."""
    if dtype == torch.float32:
        # torch.compile can't trace the setting; the direct products are right in any case.
        return not is_compiling() and torch.backends.cuda.matmul.fp32_precision != "tf32"
    return dtype == torch.float64


def _in_range(factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """Return a factor ``[B, P, m]`` in a dtype, and the divisor of each of its columns, ``[m]``.

    Only float16 needs it: where a patch is all but cancelled, X H leaves its range.
    """
    if dtype != torch.float16:
        return factor.to(dtype), 1.0
    peak = factor.abs().amax(dim=(0, 1)).clamp_min(1.0)
    return (factor / peak).to(dtype), peak


_PANELS, _MIN_PANEL = 8, 128
"""Into how many panels a symmetric product is cut, and the least number of rows of one: more panels
save more of the product's second half, narrower ones run slower."""


class _Rows(NamedTuple):
    """Patches, their norms and the norms' reciprocals."""

    patches: Tensor  # [B, P, D], accumulation dtype
    norms: Tensor  # [B, P]
    inv_norms: Tensor  # [B, P]

    @classmethod
    def of(cls, patches: Tensor) -> _Rows:
        norms = torch.linalg.vector_norm(patches, dim=-1)
        # 0 where n = 0: the row is 0, and so is its gradient.
        inv_norms = torch.where(norms == 0, 0.0, norms.clamp_min(NORM_EPS).reciprocal())
        return cls(patches, norms, inv_norms)

    def products(self) -> Tensor:
        """Return every pair's inner product, ``[B, P, P]``: half is computed, half mirrored."""
        batch, count, _ = self.patches.shape
        products = self.patches.new_empty(batch, count, count)
        panels = min(_PANELS, -(-count // _MIN_PANEL))
        if is_compiling():  # each number of panels is a graph of its own; an export is one graph
            panels = 1 if is_exporting() or count < 2 * _MIN_PANEL else 2
        step = -(-count // panels)
        for index in range(panels):
            start, end = index * step, min((index + 1) * step, count)
            panel = torch.bmm(self.patches[:, start:end], self.patches[:, start:].mT)
            products[:, start:end, start:] = panel
            products[:, end:, start:end] = panel[:, :, end - start :].mT
        return products

    def cosines_(self, products: Tensor) -> Tensor:
        """Turn every pair's inner product into G, in place; ``[B, P, P]``."""
        return products.mul_(self.inv_norms[:, :, None]).mul_(self.inv_norms[:, None, :])

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Return G, ``[B, P, P]``, from products in the given dtype."""
        if _is_exact(dtype):
            return self.cosines_(self.products())
        rows = (self.patches * self.inv_norms[..., None]).to(dtype)
        return torch.bmm(rows, rows.mT).to(self.patches.dtype)

    def apply_gradient(
        self, difference: Tensor, gram: Tensor, factor: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """Return ``X factor``, X the gradient operator of ``mean E²`` in these rows.

        Args:
            difference: E, ``[B, P, P]``, symmetric: G of these rows minus a constant.
            gram: G of these rows, ``[B, P, P]``; overwritten.
            factor: ``[B, P, m]``.
            dtype: of the product's operands.
        """
        row_dots = gram.mul_(difference).sum(dim=-1)  # s, [B, P]
        norm_grad_coef = torch.where(self.norms < NORM_EPS, 0.0, row_dots * self.inv_norms.square())
        scaled, peak = _in_range(factor * self.inv_norms[..., None], dtype)
        product = torch.bmm(difference.to(dtype), scaled).to(factor.dtype)
        product = product.mul_(self.inv_norms[..., None] * peak).sub_(
            factor * norm_grad_coef[..., None]
        )
        return product.mul_(4.0 / difference.numel())


def _mean_square(rows: Tensor) -> Tensor:
    """Return the mean of the squares, without a tensor of their size."""
    return torch.linalg.vector_norm(rows, dim=-1).square().mean() / rows.shape[-1]


def _threshold(norms: Tensor, quantile: float) -> Tensor:
    """Return each row's quantile, ``[B, P]`` to ``[B]``: that of ``torch.quantile``.

    torch.compile can't trace that in every release; it gets the same formula in calls that it can.
    """
    if not is_compiling():
        return norm_threshold(norms, quantile)
    ordered = norms.sort(dim=1).values  # NaN last
    position = norms.new_full((1,), quantile) * (norms.shape[1] - 1)
    below = ordered.index_select(1, position.floor().long())
    above = ordered.index_select(1, position.ceil().long())
    value = below.lerp(above, position - position.floor())
    return torch.where(ordered[:, -1:].isnan(), ordered[:, -1:], value)[:, 0]


def _outlier_terms(norms: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outlier loss, and ``c [B, P]``: its gradient in F̂ is ``c F̂``."""
    threshold = threshold[:, None]
    is_outlier = ~((norms <= threshold) & norms.isfinite())
    excess = torch.where(is_outlier, norms - threshold, 0.0)
    count = is_outlier.sum().clamp_min(1)
    coefficient = torch.where(norms == 0, 0.0, 2.0 * excess / (count * norms))
    return excess.square().sum() / count, coefficient


class _Saved(NamedTuple):
    """Tensors of the forward for the backward; None where no gradient needs them."""

    student: Tensor
    teacher: Tensor
    down: Tensor
    up: Tensor
    gram_target: Tensor | None
    refined: Tensor  # F̂, [B, T, D]
    h: Tensor  # H, [B, T, r], 0 on prefix tokens
    z: Tensor  # Z, [B, P, r]
    coefficient: Tensor  # c, [B, P]
    grad_hz: Tensor | None  # X [H | Z], [B, P, 2r]
    grad_target: Tensor | None  # [B, P, D]


class _FusedLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tracks_gradients: bool, *args: Any) -> tuple[Any, ...]:
        x = FusedLossesInputs(*args)
        student, teacher, down, up, gram_target = x[:5]
        target = teacher if gram_target is None else gram_target
        acc = accumulation_dtype(student, teacher, down, up, target)
        product = MatmulPrecision.of(acc, teacher, down, up).product
        gram_product = MatmulPrecision.of(acc, teacher, down, up, target).product
        prefix, shape = x.num_prefix_tokens, teacher.shape
        needs_student, _, needs_down, needs_up, needs_target = (
            tracks_gradients and needed for needed in ctx.needs_input_grad[1:6]
        )
        needs_adapter = needs_down or needs_up
        with no_autocast(teacher.device.type):
            # Prefix tokens go along with H = 0: no copy of the patches alone is made.
            h = teacher.flatten(0, 1).to(product) @ down.to(product)
            h = h.view(*shape[:2], -1)  # H, [B, T, r]
            h[:, :prefix] = 0
            refined = _refined(teacher, h, up, acc)  # F̂, [B, T, D]
            rows = _Rows.of(refined[:, prefix:])
            threshold = _threshold(rows.norms, x.quantile)
            outlier, coefficient = _outlier_terms(rows.norms, threshold)
            kd = _mean_square(refined - student)
            z = refined.flatten(0, 1).to(product) @ up.to(product).mT
            z = z.view(*shape[:2], -1)[:, prefix:].to(acc)  # Z, [B, P, r]
            info, grad_hz, grad_target = None, None, None
            if x.gram:
                info, grad_hz, grad_target = _information(
                    rows,
                    h[:, prefix:].to(acc),
                    z,
                    up.to(acc),
                    _Rows.of(target[:, prefix:].to(acc)),
                    gram_target is None,
                    gram_product,
                    needs_adapter,
                    needs_target,
                )
            returned = refined.to(teacher.dtype) if x.return_refined else None
        ctx.options = (acc, product, prefix)
        ctx.save_for_backward(
            saved(student, needs_student or needs_adapter),
            saved(teacher, needs_down),
            saved(down, needs_adapter),
            saved(up, needs_adapter),
            saved(gram_target, needs_target),
            saved(refined, needs_student or needs_adapter),
            saved(h, needs_adapter),
            saved(z, needs_down),
            saved(coefficient, needs_adapter),
            grad_hz,
            grad_target,
        )
        outputs = (kd, outlier, info, returned, rows.norms, threshold)
        return mark_outputs(ctx, outputs, needs_student, needs_adapter, needs_target)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        student, down, up, target = fused_losses_backward(ctx, _backward, grad_outputs)
        return None, student, None, down, up, target, None, None, None, None


def _refined(teacher: Tensor, h: Tensor, up: Tensor, acc: torch.dtype) -> Tensor:
    """Return F̂ = F + H Wu, ``[B, T, D]``, in the accumulation dtype."""
    factor = up.to(h.dtype).expand(h.shape[0], -1, -1)
    if h.dtype == acc:
        return torch.baddbmm(teacher.to(acc), h, factor)
    return teacher.to(acc) + torch.bmm(h, factor).to(acc)


def _information(
    rows: _Rows,
    h: Tensor,
    z: Tensor,
    up: Tensor,
    target_rows: _Rows,
    is_teacher: bool,
    dtype: torch.dtype,
    needs_adapter: bool,
    needs_target: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the information loss and, if needed, ``X [H | Z]`` and the target's gradient."""
    if is_teacher and _has_exact_products(dtype):
        products = rows.products()
        up_gram = (up @ up.mT).expand(h.shape[0], -1, -1)  # M
        l = torch.baddbmm(z, h, up_gram, alpha=-0.5)  # noqa: E741  L = Z - H M / 2, [B, P, r]
        hl, lh = torch.cat([h, l], -1), torch.cat([l, h], -1)
        target_gram = target_rows.cosines_(torch.baddbmm(products, hl, lh.mT, alpha=-1))
        gram = rows.cosines_(products)
    else:
        gram, target_gram = rows.gram(dtype), target_rows.gram(dtype)
    factor = torch.cat([h, z], dim=-1) if needs_adapter else None  # [B, P, 2r]
    return _gram_difference(rows, target_rows, gram, target_gram, factor, needs_target, dtype)


def _gram_difference(
    rows: _Rows,
    target_rows: _Rows,
    gram: Tensor,
    target_gram: Tensor,
    factor: Tensor | None,
    needs_target: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return ``mean E²``, ``X factor`` and the target's gradient; ``gram`` are overwritten."""
    difference = gram - target_gram  # E, [B, P, P]
    grad_factor, grad_target = None, None
    if factor is not None:
        grad_factor = rows.apply_gradient(difference, gram, factor, dtype)
    if needs_target:
        grad_target = target_rows.apply_gradient(
            -difference, target_gram, target_rows.patches, dtype
        )
    return _mean_square(difference), grad_factor, grad_target


def _total(*terms: Tensor | None) -> Tensor | None:
    """Return the sum of the terms that are there, or None."""
    present = [term for term in terms if term is not None]
    return reduce(torch.add, present) if present else None


def _sum_of_products(*terms: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
    """Return the sum of the products whose factors are both there, or None."""
    return _total(*(a * b for a, b in terms if a is not None and b is not None))


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """Return ``leftᵀ right``, summed over all patches: ``[B, P, a]``, ``[B, P, b]`` to ``[a, b]``.

    In float32 and wider one product per image, which takes slices as they are; in narrower dtypes
    one product in all, for each image's part would be rounded.
    """
    if _is_exact(right.dtype):
        return torch.bmm(left.mT, right).sum(dim=0)
    return left.flatten(0, 1).mT @ right.flatten(0, 1)


def _backward(
    ctx: Any,
    tensors: tuple[Tensor | None, ...],
    grad_kd: Tensor | None,
    grad_outlier: Tensor | None,
    grad_info: Tensor | None,
    grad_refined: Tensor | None,
) -> list[Tensor | None]:
    """Return the gradients of student, down, up and gram_target."""
    x = _Saved(*tensors)
    student, teacher, down, up, gram_target, refined, h, z = x[:8]
    acc, product, prefix = ctx.options
    needs_student, _, needs_down, needs_up, _ = ctx.needs_input_grad[1:6]
    grad_student = grad_down = grad_up = grad_target = None
    if grad_info is not None and gram_target is not None and x.grad_target is not None:
        grad_target = scaled_patches(gram_target, x.grad_target, prefix, grad_info)
    grad_student_acc = None  # dS = α (S − F̂), [B, T, D]
    if grad_kd is not None:
        grad_student_acc = (student - refined) * (grad_kd * (2.0 / refined.numel()))
        grad_student = grad_student_acc.to(student.dtype) if needs_student else None
    if not (needs_down or needs_up):
        return [grad_student, None, None, grad_target]

    # The adapter, by patches alone: 0 times a NaN in a prefix token would be NaN.
    h = h[:, prefix:]
    grad_delta, sign = None, 1  # Y − dS = sign · grad_delta
    if grad_refined is None:
        grad_delta, sign = grad_student_acc, -1
    elif grad_student_acc is None:
        grad_delta = grad_refined.to(acc)
    else:
        grad_delta = grad_refined.to(acc) - grad_student_acc
    if grad_delta is not None:
        grad_delta = grad_delta[:, prefix:].to(product)
    coefficient = None if grad_outlier is None else (x.coefficient * grad_outlier)[..., None]
    grad_hz_h = grad_hz_z = None
    if x.grad_hz is not None:
        grad_hz_h, grad_hz_z = x.grad_hz.split(down.shape[1], dim=-1)
    if needs_down:
        grad_delta_up = None  # (Y − dS) Wuᵀ
        if grad_delta is not None:
            # Not matmul, which would copy the slice to fold its first two dimensions.
            factor = up.to(product).mT.expand(grad_delta.shape[0], -1, -1)
            grad_delta_up = torch.bmm(grad_delta, factor).to(acc) * sign
        grad_h = _total(_sum_of_products((grad_hz_z, grad_info), (z, coefficient)), grad_delta_up)
        if grad_h is not None:
            scaled, peak = _in_range(grad_h, product)
            patches = teacher[:, prefix:].to(product)
            grad_down = (_outer(patches, scaled).to(acc) * peak).to(down.dtype)
    if needs_up:
        v = _sum_of_products((grad_hz_h, grad_info), (h, coefficient))
        v_refined = h_grad_delta = None  # Vᵀ F̂ and Hᵀ (Y − dS)
        if v is not None:
            scaled, peak = _in_range(v, product)
            patches = refined[:, prefix:].to(product)
            v_refined = (_outer(scaled, patches).to(acc).mT * peak).mT
        if grad_delta is not None:
            h_grad_delta = _outer(h, grad_delta).to(acc) * sign
        total = _total(v_refined, h_grad_delta)
        grad_up = None if total is None else total.to(up.dtype)
    return [grad_student, grad_down, grad_up, grad_target]


def _gram_loss(
    tokens: Tensor,
    target: Tensor,
    prefix: int,
    needs_tokens: bool,
    needs_target: bool,
    acc: torch.dtype,
    product: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the Gram loss and the gradients of the patches of both, ``[B, P, D]``, or None."""
    rows, target_rows = (_Rows.of(x[:, prefix:].to(acc)) for x in (tokens, target))
    gram, target_gram = rows.gram(product), target_rows.gram(product)
    factor = rows.patches if needs_tokens else None
    return _gram_difference(rows, target_rows, gram, target_gram, factor, needs_target, product)


class _GramLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, target: Tensor, *options: Any) -> Tensor:
        return gram_loss_forward(ctx, _gram_loss, tokens, target, *options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        return *gram_loss_backward(ctx, grad_output), None, None


class TorchBackend(Backend):
    """Runs wherever torch runs."""

    def fused_losses(self, inputs: FusedLossesInputs) -> FusedLossesOutput:
        """See :func:`singer_kernels.reference.fused_losses`."""
        return FusedLossesOutput(*_FusedLosses.apply(torch.is_grad_enabled(), *inputs))

    def gram_loss(self, tokens: Tensor, target: Tensor, num_prefix_tokens: int) -> Tensor:
        """See :func:`singer_kernels.reference.gram_loss`."""
        tracks_gradients = torch.is_grad_enabled()
        return cast("Tensor", _GramLoss.apply(tokens, target, num_prefix_tokens, tracks_gradients))


backend = TorchBackend()
