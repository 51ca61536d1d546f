"""Whether a provider computes the losses and gradients that it is timed for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from harness.providers import Loss, Losses, build
from harness.workloads import Inputs, Precision

OUTPUTS = ("kd", "outlier", "info", "d_student", "d_down", "d_up")


def upstream_of(losses: Losses, weights: Sequence[float] = (0.7, 1.3, 1.9)) -> list[Tensor]:
    """Return the gradients that come back, in the losses' dtypes."""
    return [torch.full_like(loss, w) for loss, w in zip(losses, weights, strict=True)]


def balanced_weights(inputs: Inputs) -> list[float]:
    """Return upstream gradients with which the losses move the adapter alike.

    Else an error of the one with the smallest gradients would hide in the others'.
    """
    losses = build("reference")(inputs)
    weights = []
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, [inputs.down], retain_graph=True)
        weights.append(1 / gradient.abs().max().item())
    return weights


def _results(
    loss: Loss, inputs: Inputs, precision: Precision | None, weights: Sequence[float]
) -> list[Tensor]:
    if precision is None:
        losses = loss(inputs)
    else:
        with precision.context(inputs.student.device):
            losses = loss(inputs)
    gradients = torch.autograd.grad(losses, inputs.trained, upstream_of(losses, weights))
    return [result.detach() for result in (*losses, *gradients)]


def _relative_errors(found: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    # The largest error beside the largest number: of a scalar, its relative error.
    return {
        name: ((a.double() - b).abs().max() / b.abs().max()).item()
        for name, a, b in zip(OUTPUTS, found, exact, strict=True)
    }


def rounding_slack(inputs: Inputs, precision: Precision) -> float:
    """Return by how much two right results may differ, beside the largest number.

    Operands are rounded to the products' dtype, each term of a sum by its own rounding, which are
    independent: as a share of the sum that is a few roundings of that dtype. Sums are kept in
    float32: each of their n terms adds a rounding, independent too, so √n of them (Higham and Mary,
    2019). Four standard deviations of either are allowed.
    """
    images, tokens, width = inputs.teacher.shape
    terms = max(images * tokens, width)
    accumulator = torch.promote_types(precision.features, torch.float32)
    operands = torch.finfo(precision.product).eps / 2
    return 4 * operands + 4 * math.sqrt(terms) * torch.finfo(accumulator).eps / 2


class Verdict(NamedTuple):
    """What the oracle found of one provider.

    Attributes:
        errors: each loss and gradient to its relative error.
        allowed: the same to what is allowed.
    """

    errors: dict[str, float]
    allowed: dict[str, float]

    @property
    def is_right(self) -> bool:
        """Whether every error is allowed; one that is no number is not."""
        return all(self.errors[name] <= self.allowed[name] for name in OUTPUTS)

    @property
    def reason(self) -> str:
        """What is wrong, in one line."""
        return ", ".join(
            f"{name} {self.errors[name]:.1e} (allowed {self.allowed[name]:.1e})"
            for name in OUTPUTS
            if not self.errors[name] <= self.allowed[name]
        )


class Oracle:
    """Float64 truth of one set of inputs, and what the yardsticks make of it.

    A backend may be as far from the truth as the reference in the same dtypes, and what eager code
    is rewritten or compiled to as far as ``eager``: as far means at most twice, for their roundings
    are two draws of one distribution, plus :func:`rounding_slack`. ``eager`` is held to the truth
    in float64, where only the right formulas meet it.

    Args:
        inputs: as they are timed, rounded to their dtypes; the truth is that of their values.
        precision: their dtypes.

    Raises:
        AssertionError: the eager code computes something else.
    """

    def __init__(self, inputs: Inputs, precision: Precision) -> None:
        self.inputs, self.precision = inputs, precision
        wide = inputs.to(torch.float64)
        self.weights = balanced_weights(wide)
        self.exact = _results(build("reference"), wide, None, self.weights)
        # Sums in another order, and differences of all but equal numbers, lose some of 16 digits.
        eager = _results(build("eager"), wide, None, self.weights)
        errors = _relative_errors(eager, self.exact)
        if not max(errors.values()) < 1e-9:
            raise AssertionError(f"the eager losses are wrong in float64: {errors}")
        del wide, eager
        self.slack = rounding_slack(inputs, precision)
        self.errors = {name: self._errors(build(name)) for name in ("reference", "eager")}

    def _errors(self, loss: Loss) -> dict[str, float]:
        found = _results(loss, self.inputs, self.precision, self.weights)
        return _relative_errors(found, self.exact)

    def judge(self, name: str, loss: Loss) -> Verdict:
        """Compute a provider's losses and gradients, and compare them with the truth."""
        yardstick = "eager" if name.startswith(("eager", "compiled")) else "reference"
        errors = self.errors["eager"] if name == "eager" else self._errors(loss)
        allowed = {key: 2 * error + self.slack for key, error in self.errors[yardstick].items()}
        return Verdict(errors, allowed)
