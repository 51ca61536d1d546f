"""What is measured: sizes, dtypes, inputs, and the least that a pass must move and compute."""

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
        """B, P and D, for people."""
        return f"{self.images} x {self.patches} x {self.width}"


class Precision(NamedTuple):
    """The dtypes of a call.

    Attributes:
        name: as the results call it.
        features: of student and teacher.
        adapter: of down and up.
        autocast: the autocast dtype; None: no autocast.
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


class Point(NamedTuple):
    """One comparison of all providers: a workload in a precision, and the series it belongs to.

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
        """What tests and results call it."""
        return f"{self.workload.name}-{self.precision.name}"


_IMAGES = {"cuda": (128, 16, 64, 64, 64), "cpu": (8, 1, 4, 8, 8)}
_MODELS = (
    ("A-vit-l16-224px", 196, 1024),
    ("B-dinov2-l14-518px", 1369, 1024),
    ("C-vit-g-224px", 256, 1536),
    ("D-vit-s16-224px", 196, 384),
    ("E-vit-b16-224px", 196, 768),
)
# On a CPU the sweeps are narrower, and over fewer images, so that a run takes minutes.
_PATCHES = (64, 128, 256, 512, 1024, 2048, 4096)
_PATCHES_AT = {"cuda": (16, 1024), "cpu": (1, 384)}  # images and width
_WIDTHS = {"cuda": (192, 384, 768, 1024, 1536, 2048, 4096), "cpu": (192, 384, 768, 1024, 1536)}
_WIDTHS_AT = {"cuda": (64, 196), "cpu": (8, 196)}  # images and patches
_SWEPT_IN = {"cuda": "bf16", "cpu": "fp32"}
_ORDER = {"cuda": ("bf16", "autocast", "fp32"), "cpu": ("fp32", "bf16", "autocast")}


def workloads(device_type: str, quick: bool = False) -> list[Point]:
    """Return the workloads of the page, each in every precision, the most telling first.

    Args:
        device_type: ``cpu`` or ``cuda``.
        quick: one of tiny sizes instead, to see that everything works.
    """
    if quick:
        given = [Workload("tiny", 2, 20, 64, 8)]
    else:
        images = _IMAGES[device_type]
        given = [Workload(n, b, p, d) for b, (n, p, d) in zip(images, _MODELS, strict=True)]
    return [
        Point("workloads", workload, PRECISIONS[name])
        for name in _ORDER[device_type]
        for workload in given
    ]


def sweeps(device_type: str, quick: bool = False) -> list[Point]:
    """Return the points that show how cost grows with P and with D.

    Args:
        device_type: ``cpu`` or ``cuda``.
        quick: two tiny points of each instead.
    """
    precision = PRECISIONS[_SWEPT_IN[device_type]]
    if quick:
        patches, widths = (16, 32), (32, 64)
        (images, width), (many, of_width) = (1, 32), (2, 16)
        rank = 8
    else:
        patches, widths = _PATCHES, _WIDTHS[device_type]
        (images, width), (many, of_width) = _PATCHES_AT[device_type], _WIDTHS_AT[device_type]
        rank = 64
    points = [
        Point("patches", Workload(f"P{count}", images, count, width, rank), precision)
        for count in patches
    ]
    points += [
        Point("widths", Workload(f"D{size}", many, of_width, size, rank), precision)
        for size in widths
    ]
    return points


class Inputs(NamedTuple):
    """A call's tensors; all but the teacher require grad."""

    student: Tensor  # S, [B, 1 + P, D]
    teacher: Tensor  # F, [B, 1 + P, D]
    down: Tensor  # Wd, [D, r]
    up: Tensor  # Wu, [r, D]

    @property
    def trained(self) -> list[Tensor]:
        """What gradients are asked for."""
        return [self.student, self.down, self.up]

    @property
    def nbytes(self) -> int:
        """The memory of all four, in bytes."""
        return sum(tensor.nbytes for tensor in self)

    def to(self, dtype: torch.dtype) -> Inputs:
        """Return a copy in a dtype that requires grad alike."""
        return _trainable(tensor.detach().to(dtype, copy=True) for tensor in self)


def _trainable(tensors: Iterable[Tensor]) -> Inputs:
    student, teacher, down, up = tensors
    return Inputs(student.requires_grad_(), teacher, down.requires_grad_(), up.requires_grad_())


def make_inputs(
    workload: Workload, precision: Precision, device: torch.device, seed: int = 0
) -> Inputs:
    """Return inputs that look like features: a common direction, noise, and a few long tokens.

    One patch in fifty, at least one per image, is ten times as long as the others; the adapter
    halves the rank directions it spans; the student is off by half the noise.

    Args:
        workload: the sizes.
        precision: the dtypes.
        device: where they are made.
        seed: of the generator.
    """
    images, tokens = workload.images, 1 + workload.patches
    width, rank = workload.width, workload.rank
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    teacher = normal(1, 1, width) + normal(images, tokens, width)
    places = torch.rand((images, workload.patches), generator=generator, device=device)
    longest = places.topk(max(1, workload.patches // 50), dim=1).indices + 1
    teacher.scatter_(
        1,
        longest[..., None].expand(-1, -1, width),
        10 * teacher.gather(1, longest[..., None].expand(-1, -1, width)),
    )
    student = teacher + 0.5 * normal(images, tokens, width)
    down = torch.linalg.qr(normal(width, rank)).Q
    up = 0.1 * normal(rank, width) / width**0.5 - 0.5 * down.T
    features = [tensor.to(precision.features) for tensor in (student, teacher)]
    adapter = [tensor.to(precision.adapter).contiguous() for tensor in (down, up)]
    return _trainable([*features, *adapter])


class Cost(NamedTuple):
    """What a pass takes."""

    bytes: int  # moved to or from memory
    operations: int  # floating-point; a multiply-add is two


def least_cost(workload: Workload, precision: Precision, phase: str) -> Cost:
    """Return the least that a phase must move and compute, whatever computes it.

    Every input is read once, every result written once; nothing between them is counted. Matrix
    products are those of the closed form: of a Gram matrix one triangle, ``F̂F̂ᵀ`` and ``FFᵀ``
    together in D + 2r multiply-adds an entry, ``X [H | Z]`` in 2r. The forward has ``F Wd`` and
    ``H Wu``; the backward has ``H Wu`` again, ``F Wuᵀ``, ``S Wuᵀ``, ``Fᵀ dH`` and two for dWu.

    Args:
        workload: the sizes.
        precision: the dtypes.
        phase: ``forward``, ``backward``, or ``both``, their sum.

    Returns:
        Bytes and operations.
    """
    if phase == "both":
        forward, backward = (least_cost(workload, precision, name) for name in PHASES[:2])
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
