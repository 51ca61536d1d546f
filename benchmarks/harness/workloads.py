"""Benchmark cases: sizes, dtypes, inputs, and the memory traffic and operations of a pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

QUANTILE = 0.97
PHASES = ("forward", "backward", "both")


class Workload(NamedTuple):
    """One distilled layer: B images of P patches and one CLS token, width D, adapter rank r."""

    name: str
    images: int
    patches: int
    width: int
    rank: int = 64

    @property
    def sizes(self) -> str:
        """``B x P x D``, for display."""
        return f"{self.images} x {self.patches} x {self.width}"


class Precision(NamedTuple):
    """The dtypes of a call.

    Attributes:
        name: name in the results.
        features: dtype of student and teacher.
        adapter: dtype of down and up.
        autocast: autocast dtype; None: no autocast.
    """

    name: str
    features: torch.dtype
    adapter: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def product(self) -> torch.dtype:
        """The dtype of the matrix products' operands."""
        return self.autocast or self.features

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the forward pass runs."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast)


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", torch.float32, torch.float32),
        Precision("bf16", torch.bfloat16, torch.bfloat16),
        Precision("autocast", torch.float32, torch.float32, torch.bfloat16),
    )
}


class Case(NamedTuple):
    """A case in which all providers are compared: a workload, a precision and a series.

    Attributes:
        series: ``workloads``, ``patches`` (cost against P) or ``widths`` (cost against D).
        workload: the sizes.
        precision: the dtypes.
    """

    series: str
    workload: Workload
    precision: Precision

    @property
    def label(self) -> str:
        """Name in test ids and results."""
        return f"{self.workload.name}-{self.precision.name}"


_IMAGES = {"cuda": (128, 16, 64, 64, 64), "cpu": (8, 1, 4, 8, 8)}
_MODELS = (
    ("A-vit-l16-224px", 196, 1024),
    ("B-dinov2-l14-518px", 1369, 1024),
    ("C-vit-g-224px", 256, 1536),
    ("D-vit-s16-224px", 196, 384),
    ("E-vit-b16-224px", 196, 768),
)
# On a CPU the sweeps have fewer images and smaller widths: a run takes minutes.
_PATCHES = (64, 128, 256, 512, 1024, 2048, 4096)
_PATCH_SWEEP = {"cuda": (16, 1024), "cpu": (1, 384)}  # images and width
_WIDTHS = {"cuda": (192, 384, 768, 1024, 1536, 2048, 4096), "cpu": (192, 384, 768, 1024, 1536)}
_WIDTH_SWEEP = {"cuda": (64, 196), "cpu": (8, 196)}  # images and patches
_SWEEP_PRECISION = {"cuda": "bf16", "cpu": "fp32"}
_ORDER = {"cuda": ("bf16", "autocast", "fp32"), "cpu": ("fp32", "bf16", "autocast")}


def workloads(device_type: str, quick: bool = False) -> list[Case]:
    """Return the five workloads in every precision, the most relevant precision first.

    Args:
        device_type: ``cpu`` or ``cuda``.
        quick: one tiny workload instead, for a smoke test.
    """
    if quick:
        chosen = [Workload("tiny", 2, 20, 64, 8)]
    else:
        images = _IMAGES[device_type]
        chosen = [Workload(n, b, p, d) for b, (n, p, d) in zip(images, _MODELS, strict=True)]
    return [
        Case("workloads", workload, PRECISIONS[name])
        for name in _ORDER[device_type]
        for workload in chosen
    ]


def sweeps(device_type: str, quick: bool = False) -> list[Case]:
    """Return the cases that sweep the number of patches P and the width D.

    Args:
        device_type: ``cpu`` or ``cuda``.
        quick: two tiny cases of each sweep instead.
    """
    precision = PRECISIONS[_SWEEP_PRECISION[device_type]]
    if quick:
        patches, widths = (16, 32), (32, 64)
        (images, width), (width_images, width_patches) = (1, 32), (2, 16)
        rank = 8
    else:
        patches, widths = _PATCHES, _WIDTHS[device_type]
        (images, width), (width_images, width_patches) = (
            _PATCH_SWEEP[device_type],
            _WIDTH_SWEEP[device_type],
        )
        rank = 64
    cases = [
        Case("patches", Workload(f"P{count}", images, count, width, rank), precision)
        for count in patches
    ]
    cases += [
        Case("widths", Workload(f"D{size}", width_images, width_patches, size, rank), precision)
        for size in widths
    ]
    return cases


class Inputs(NamedTuple):
    """Inputs of the losses; all but the teacher require grad."""

    student: Tensor  # S, [B, 1 + P, D]
    teacher: Tensor  # F, [B, 1 + P, D]
    down: Tensor  # Wd, [D, r]
    up: Tensor  # Wu, [r, D]

    @property
    def trained(self) -> list[Tensor]:
        """The tensors to differentiate with respect to."""
        return [self.student, self.down, self.up]

    @property
    def nbytes(self) -> int:
        """Size of all four, in bytes."""
        return sum(tensor.nbytes for tensor in self)

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return a copy in another dtype, with the same ``requires_grad``."""
        return _trainable(tensor.detach().to(dtype, copy=True) for tensor in self)


def _trainable(tensors: Iterable[Tensor]) -> Inputs:
    student, teacher, down, up = tensors
    return Inputs(student.requires_grad_(), teacher, down.requires_grad_(), up.requires_grad_())


def make_inputs(
    workload: Workload, precision: Precision, device: torch.device, seed: int = 0
) -> Inputs:
    """Return random inputs that resemble features: a common direction, noise, and outlier tokens.

    One patch in fifty, at least one per image, has ten times the norm of the others. The adapter
    halves the component of a token in the r directions it spans. The student is the teacher plus
    noise of half its standard deviation.

    Args:
        workload: the sizes.
        precision: the dtypes.
        device: of the tensors.
        seed: of the generator.
    """
    images, tokens = workload.images, 1 + workload.patches
    width, rank = workload.width, workload.rank
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    teacher = normal(1, 1, width) + normal(images, tokens, width)
    scores = torch.rand((images, workload.patches), generator=generator, device=device)
    outliers = scores.topk(max(1, workload.patches // 50), dim=1).indices + 1
    teacher.scatter_(
        1,
        outliers[..., None].expand(-1, -1, width),
        10 * teacher.gather(1, outliers[..., None].expand(-1, -1, width)),
    )
    student = teacher + 0.5 * normal(images, tokens, width)
    down = torch.linalg.qr(normal(width, rank)).Q
    up = 0.1 * normal(rank, width) / width**0.5 - 0.5 * down.T
    features = [tensor.to(precision.features) for tensor in (student, teacher)]
    adapter = [tensor.to(precision.adapter).contiguous() for tensor in (down, up)]
    return _trainable([*features, *adapter])


class Cost(NamedTuple):
    """Memory traffic and arithmetic of a pass."""

    bytes: int  # moved to or from memory
    operations: int  # floating-point; a multiply-add is two


def roofline_cost(workload: Workload, precision: Precision, phase: str) -> Cost:
    """Return the minimal memory traffic and operations of a phase, for any implementation.

    Every input is read once and every result written once; intermediate results are not counted.
    Matrix products are those of the closed form: one triangle of the Gram matrices, ``F̂F̂ᵀ`` and
    ``FFᵀ`` together in D + 2r multiply-adds per entry, and ``X [H | Z]`` in 2r. The forward has
    ``F Wd`` and ``H Wu``; the backward has ``H Wu`` again, ``F Wuᵀ``, ``S Wuᵀ``, ``Fᵀ dH`` and two
    for dWu.

    Args:
        workload: the sizes.
        precision: the dtypes.
        phase: ``forward``, ``backward``, or ``both`` (their sum).

    Returns:
        Bytes and operations.
    """
    if phase == "both":
        forward, backward = (roofline_cost(workload, precision, name) for name in PHASES[:2])
        return Cost(forward.bytes + backward.bytes, forward.operations + backward.operations)
    images, patches, width, rank = workload[1:]
    features = images * (1 + patches) * width * precision.features.itemsize
    adapter = 2 * width * rank * precision.adapter.itemsize
    low_rank = 2 * images * patches * width * rank  # one product with an adapter's matrix
    entries = images * patches * patches
    if phase == "forward":
        triangle = images * patches * (patches + 1) // 2
        gram = 2 * triangle * (width + 2 * rank)
        return Cost(2 * features + adapter, 2 * low_rank + gram)
    return Cost(3 * features + 2 * adapter, 6 * low_rank + 4 * entries * rank)
