"""Training steps by compiled Triton kernels, in processes of their own.

Here Triton's interpreter is on, from its first import; a worker compiles.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from bounds import oracle_slack, relative_errors
from cases import WEIGHTS, Case, Shape, outlier_case, random_case, total

TIMEOUT = 600  # seconds that a test waits for a worker


class Step(NamedTuple):
    """A forward and backward of ``fused_losses``.

    Attributes:
        architecture: 80 for sm_80, 90 for sm_90a.
        dtype: of features, adapter and products.
        shape: sizes.
        kind: "random", "cancelling" (the adapter nearly cancels patches of the
            first image), "target" (its own Gram target,
            which takes a gradient), "mid" (a mid layer: F̂ and its gradient, no Gram loss) or
            "forward" (no backward).
        pairs: whether the Gram stage takes pairs of tiles, not rows.
        offset: elements before the student, which is then not aligned to 16 bytes.
        gamma: the quantile.
        seed: of the inputs.
    """

    architecture: int
    dtype: str
    shape: Shape
    kind: str = "random"
    pairs: bool = False
    offset: int = 0
    gamma: float = 0.9
    seed: int = 0

    @property
    def name(self) -> str:
        gram = "pairs" if self.pairs else "rows"
        sizes = "-".join(map(str, vars(self.shape).values()))
        return f"sm_{self.architecture} {self.dtype} {self.kind} {gram} {sizes}"

    def case(self) -> Case:
        dtype = getattr(torch, self.dtype)
        if self.kind == "cancelling":
            case = outlier_case(self.shape, self.gamma, self.seed)
            case.teacher[1:] = random_case(self.shape, self.gamma, self.seed).teacher[1:]
        else:
            with_target = self.kind == "target"
            case = random_case(self.shape, self.gamma, self.seed, with_target=with_target)
        return case.rounded(dtype, dtype, dtype)


def _run(step: Step, case: Case, backend: str) -> dict[str, float]:
    """Return the relative error of each output and gradient."""
    dtype = getattr(torch, step.dtype)
    tensors = case.tensors(dtype, dtype, dtype)
    if step.offset:
        student = tensors["student"].detach()
        held = student.new_empty(student.numel() + step.offset)[step.offset :].view_as(student)
        tensors["student"] = held.copy_(student).requires_grad_()
    is_mid = step.kind == "mid"
    grad_refined = np.random.default_rng(step.seed + 1).standard_normal(case.teacher.shape)
    grad_refined = torch.from_numpy(grad_refined).to(dtype)
    with torch.set_grad_enabled(step.kind != "forward"):
        out = case.run(tensors, gram=not is_mid, return_refined=is_mid, backend=backend)
    weights, grad = WEIGHTS, None
    if is_mid:
        loss = WEIGHTS[0] * out.kd + WEIGHTS[1] * out.outlier
        (loss + (out.refined * grad_refined).sum()).backward()
        weights, grad = (*WEIGHTS[:2], 0.0), grad_refined.double().numpy()
    elif step.kind != "forward":
        total(out).backward()
    return relative_errors(case, tensors, out, weights, grad)


@contextlib.contextmanager
def _compiled(step: Step, recorded: list[Any] | None = None) -> Iterator[None]:
    from ptx.triton_driver import emulated
    from singer_kernels.backends.triton import configs

    least = 1 if step.pairs else configs.MIN_PATCHES_FOR_PAIRS
    with (
        emulated(step.architecture, recorded),
        mock.patch.object(configs, "MIN_PATCHES_FOR_PAIRS", least),
    ):
        yield


def check(step: Step) -> dict[str, tuple[float, float]]:
    """Return the error of each output and gradient, and its bound: see ``test_oracle``."""
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    case = step.case()
    with _compiled(step):
        found = _run(step, case, "triton")
    expected = _run(step, case, "reference")
    slack = oracle_slack(case, getattr(torch, step.dtype))
    assert found.keys() == expected.keys()
    return {name: (error, expected[name] + slack[name]) for name, error in found.items()}


def record(step: Step) -> list[tuple[str, Any]]:
    """Return the PTX and the arguments of each launch of a step."""
    recorded: list[tuple[str, Any]] = []
    with _compiled(step, recorded):
        _run(step, step.case(), "triton")
    return recorded


def _prepare(cache: str) -> None:
    # Before Triton's import.
    os.environ.update(TRITON_INTERPRET="0", TRITON_CACHE_DIR=cache)
    torch.set_num_threads(1)


def workers(cache: str, count: int) -> ProcessPoolExecutor:
    """Return processes that compile; ``cache``: a folder for compiled kernels."""
    return ProcessPoolExecutor(
        count,
        multiprocessing.get_context("spawn"),
        initializer=_prepare,
        initargs=(cache,),
    )
