"""Inputs for the tests, and the comparison with the truth."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import truth
from torch import Tensor

from singer_kernels import FusedLossesOutput, fused_losses

WEIGHTS = (0.7, 1.3, 1.9)  # upstream gradients of kd, outlier and info, all different


@dataclass(frozen=True)
class Shape:
    images: int
    prefix: int
    patches: int
    width: int
    rank: int

    @property
    def tokens(self) -> tuple[int, int, int]:
        return self.images, self.prefix + self.patches, self.width


@dataclass(frozen=True)
class Case:
    """One call's inputs, in float64 NumPy."""

    student: truth.Array
    teacher: truth.Array
    down: truth.Array
    up: truth.Array
    target: truth.Array | None
    gamma: float
    prefix: int

    def values(self) -> truth.Values:
        return truth.losses(
            self.student, self.teacher, self.down, self.up, self.target, self.gamma, self.prefix
        )

    def gradients(
        self, weights: tuple[float, float, float], d_refined: truth.Array | None = None
    ) -> truth.Gradients:
        return truth.gradients(
            self.student,
            self.teacher,
            self.down,
            self.up,
            self.target,
            self.gamma,
            self.prefix,
            weights,
            d_refined,
        )

    def rounded(self, student: torch.dtype, teacher: torch.dtype, adapter: torch.dtype) -> Case:
        """Round the inputs to these dtypes, so that a comparison leaves input rounding out."""

        def to(array: truth.Array, dtype: torch.dtype) -> truth.Array:
            return torch.from_numpy(array).to(dtype).double().numpy()

        return replace(
            self,
            student=to(self.student, student),
            teacher=to(self.teacher, teacher),
            down=to(self.down, adapter),
            up=to(self.up, adapter),
            target=None if self.target is None else to(self.target, teacher),
        )

    def tensors(
        self,
        student: torch.dtype = torch.float64,
        teacher: torch.dtype = torch.float64,
        adapter: torch.dtype = torch.float64,
        device: str = "cpu",
    ) -> dict[str, Tensor | None]:
        """Return the tensor arguments of ``fused_losses``; all but the teacher require grad."""

        def leaf(array: truth.Array, dtype: torch.dtype) -> Tensor:
            return torch.from_numpy(array.copy()).to(device, dtype).requires_grad_()

        return {
            "student": leaf(self.student, student),
            "teacher": torch.from_numpy(self.teacher.copy()).to(device, teacher),
            "down": leaf(self.down, adapter),
            "up": leaf(self.up, adapter),
            "gram_target": None if self.target is None else leaf(self.target, teacher),
        }

    def run(self, tensors: dict[str, Tensor | None], **options: object) -> FusedLossesOutput:
        return fused_losses(
            **tensors,
            quantile=self.gamma,
            num_prefix_tokens=self.prefix,
            **options,
        )


def random_case(shape: Shape, gamma: float, seed: int = 0, with_target: bool = False) -> Case:
    rng = np.random.default_rng(seed)
    down = rng.standard_normal((shape.width, shape.rank)) / np.sqrt(shape.width)
    up = rng.standard_normal((shape.rank, shape.width)) / np.sqrt(shape.rank)
    return Case(
        student=rng.standard_normal(shape.tokens),
        teacher=rng.standard_normal(shape.tokens),
        down=down,
        up=up,
        target=3 * rng.standard_normal(shape.tokens) if with_target else None,
        gamma=gamma,
        prefix=shape.prefix,
    )


def outlier_case(shape: Shape, gamma: float, seed: int = 0, ratio: float = 500.0) -> Case:
    """One patch in 16 has ``ratio`` times the usual norm; the adapter cancels 99 % of it."""
    case = random_case(shape, gamma, seed)
    rng = np.random.default_rng(seed + 1)
    direction = rng.standard_normal(shape.width)
    direction /= np.linalg.norm(direction)
    teacher, down, up = case.teacher.copy(), 0.1 * case.down, 0.1 * case.up
    for image in range(shape.images):
        count = max(1, shape.patches // 16)
        for patch in rng.choice(shape.patches, count, replace=False):
            height = ratio * np.sqrt(shape.width) * rng.uniform(0.8, 1.2)
            teacher[image, shape.prefix + patch] += height * direction
    down[:, 0], up[0] = direction, -0.99 * direction
    return replace(case, teacher=teacher, down=down, up=up)


def tied_case(shape: Shape, gamma: float, seed: int = 0) -> Case:
    """Few distinct patches, all numbers small dyadics: products are exact and ties are ties."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(-4, 5, (3, shape.width)).astype(float)
    down = np.zeros((shape.width, shape.rank))
    up = np.zeros((shape.rank, shape.width))
    for k in range(shape.rank):
        down[rng.integers(shape.width), k] = rng.choice([-1.0, -0.5, 0.5])
        up[k, rng.integers(shape.width)] = rng.choice([-0.5, 0.5, 1.0])
    return Case(
        student=rng.integers(-4, 5, shape.tokens).astype(float),
        teacher=patterns[rng.integers(3, size=shape.tokens[:2])],
        down=down,
        up=up,
        target=None,
        gamma=gamma,
        prefix=shape.prefix,
    )


def total(out: FusedLossesOutput, weights: tuple[float, float, float] = WEIGHTS) -> Tensor:
    w_kd, w_out, w_info = weights
    return w_kd * out.kd + w_out * out.outlier + w_info * out.info


def assert_near(actual: Tensor, expected: truth.Array, atol: float = 0.0) -> None:
    """Compare to float64 rounding: 1e-10 of the largest entry, plus ``atol``."""
    assert tuple(actual.shape) == np.shape(expected)
    actual = actual.detach().double().numpy()
    assert np.isfinite(actual).all()
    error = np.max(np.abs(actual - expected))
    assert error <= 1e-10 * np.max(np.abs(expected)) + atol


def assert_values(out: FusedLossesOutput, case: Case) -> None:
    expected = case.values()
    assert_near(out.kd, expected.kd)
    assert_near(out.outlier, expected.outlier)
    # Entries of G carry rounding of about 1e-15, so where G(F̂) = G(R) the mean of squares is 1e-30.
    assert_near(out.info, expected.info, atol=1e-26)
    assert_near(out.norms, expected.norms)
    assert_near(out.threshold, expected.threshold)
    if out.refined is not None:
        assert_near(out.refined, expected.refined)


def assert_gradients(tensors: dict[str, Tensor | None], expected: truth.Gradients) -> None:
    assert_near(tensors["student"].grad, expected.student)
    assert_near(tensors["down"].grad, expected.down)
    assert_near(tensors["up"].grad, expected.up)
    target = tensors["gram_target"]
    if target is not None:
        # Where the gradient vanishes (D = 1, P = 1) it is rounding in the difference of two halves,
        # each at most 8 w / (B n), for E is at most 2.
        half = 8 * WEIGHTS[2] / (target.shape[0] * target.detach().norm(dim=-1).min().item())
        assert_near(target.grad, expected.gram_target, atol=1e-14 * half)
