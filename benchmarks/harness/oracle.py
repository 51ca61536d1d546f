"""Accuracy check: losses and gradients of a provider against float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from harness.providers import Loss, Losses, build
from harness.workloads import Inputs, Precision

OUTPUTS = ("kd", "outlier", "info", "d_student", "d_down", "d_up")


def grad_outputs_for(losses: Losses, weights: Sequence[float] = (0.7, 1.3, 1.9)) -> list[Tensor]:
    """Return the ``grad_outputs`` of a backward pass: a different weight for each loss."""
    return [torch.full_like(loss, w) for loss, w in zip(losses, weights, strict=True)]


def balanced_weights(inputs: Inputs) -> list[float]:
    """Return weights of the losses with which their gradients to the adapter are equally large.

    With other weights an error in the smallest gradient would disappear in the sum.
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
    gradients = torch.autograd.grad(losses, inputs.trained, grad_outputs_for(losses, weights))
    return [result.detach() for result in (*losses, *gradients)]


def _relative_errors(actual: list[Tensor], exact: list[Tensor]) -> dict[str, float]:
    # Largest error over largest value; for a scalar this is the relative error.
    return {
        name: ((a.double() - b).abs().max() / b.abs().max()).item()
        for name, a, b in zip(OUTPUTS, actual, exact, strict=True)
    }


def rounding_slack(inputs: Inputs, precision: Precision) -> float:
    """Return how far two correct results may differ, relative to the largest value.

    Operands are rounded to the dtype of the products; these roundings are independent, so relative
    to the sum they stay at a few unit roundoffs of that dtype. Sums are accumulated in float32: n
    terms add n independent roundings, which grow as √n (Higham and Mary, 2019). Four standard
    deviations of either are allowed.
    """
    images, tokens, width = inputs.teacher.shape
    terms = max(images * tokens, width)
    accumulator = torch.promote_types(precision.features, torch.float32)
    operands = torch.finfo(precision.product).eps / 2
    return 4 * operands + 4 * math.sqrt(terms) * torch.finfo(accumulator).eps / 2


class Accuracy(NamedTuple):
    """Errors of one provider and their tolerances.

    Attributes:
        errors: relative error of each loss and gradient.
        allowed: tolerance of each.
    """

    errors: dict[str, float]
    allowed: dict[str, float]

    @property
    def is_correct(self) -> bool:
        """Whether every error is within its tolerance; NaN is not."""
        return all(self.errors[name] <= self.allowed[name] for name in OUTPUTS)

    @property
    def reason(self) -> str:
        """The outputs out of tolerance, in one line."""
        return ", ".join(
            f"{name} {self.errors[name]:.1e} (allowed {self.allowed[name]:.1e})"
            for name in OUTPUTS
            if not self.errors[name] <= self.allowed[name]
        )


class Oracle:
    """Float64 results for one set of inputs, and the errors of the baselines against them.

    A backend may be twice as far from float64 as the reference in the same dtypes, a rewrite or
    compilation of eager code twice as far as ``eager``, plus :func:`rounding_slack`: twice, because
    the roundings of the two are independent draws of one distribution. ``eager`` itself is compared
    in float64, where only the same formulas agree.

    Args:
        inputs: the inputs to time, already rounded to their dtypes; the float64 results are those
            of the rounded values.
        precision: their dtypes.

    Raises:
        AssertionError: the eager code disagrees with the reference in float64.
    """

    def __init__(self, inputs: Inputs, precision: Precision) -> None:
        self.inputs, self.precision = inputs, precision
        wide = inputs.to(torch.float64)
        self.weights = balanced_weights(wide)
        self.exact = _results(build("reference"), wide, None, self.weights)
        # Another order of summation, and cancellation, cost some of the 16 digits.
        eager = _results(build("eager"), wide, None, self.weights)
        errors = _relative_errors(eager, self.exact)
        if not max(errors.values()) < 1e-9:
            raise AssertionError(f"the eager losses are wrong in float64: {errors}")
        del wide, eager
        self.slack = rounding_slack(inputs, precision)
        self.errors = {name: self._errors(build(name)) for name in ("reference", "eager")}

    def _errors(self, loss: Loss) -> dict[str, float]:
        actual = _results(loss, self.inputs, self.precision, self.weights)
        return _relative_errors(actual, self.exact)

    def check(self, name: str, loss: Loss) -> Accuracy:
        """Compare a provider's losses and gradients with the float64 results."""
        baseline = "eager" if name.startswith(("eager", "compiled")) else "reference"
        errors = self.errors["eager"] if name == "eager" else self._errors(loss)
        allowed = {key: 2 * error + self.slack for key, error in self.errors[baseline].items()}
        return Accuracy(errors, allowed)
