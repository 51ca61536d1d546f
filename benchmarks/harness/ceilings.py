"""What the machine can do: a copy, and a matrix product, timed among the providers."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from harness.timing import CallTurn
from harness.workloads import Cost, Precision

COPIED = {"cpu": 128 * 2**20, "cuda": 2**30}  # bytes; more than a last-level cache holds
EDGE = {"cpu": 1024, "cuda": 8192}  # of the matrices of a product


class Ceiling(NamedTuple):
    """One measurement of what the machine can do."""

    turn: CallTurn
    cost: Cost


def ceilings(precision: Precision, device: torch.device) -> dict[str, Ceiling]:
    """Return the measurements to take: ``copy``, and ``product`` in the products' dtype.

    On a CPU there is ``convolution`` too, the same product asked for as a 1 x 1 convolution, for
    which torch takes another library, on some processors a faster one.

    Args:
        precision: of the workload.
        device: where.
    """
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    edge = EDGE[device.type]
    a, b = (torch.randn(edge, edge, device=device, dtype=precision.product) for _ in range(2))
    product = torch.empty_like(a)
    operations = 2 * edge**3
    calls = {
        "copy": (functools.partial(target.copy_, source), Cost(2 * source.nbytes, 0)),
        "product": (functools.partial(torch.mm, a, b, out=product), Cost(0, operations)),
    }
    if device.type == "cpu":
        # Rows of a matrix are pixels of 8 images, their columns channels, as they lie in memory.
        image = a.view(8, edge // 8, 1, edge).permute(0, 3, 1, 2)
        kernels = b.view(edge, edge, 1, 1)
        calls["convolution"] = (functools.partial(F.conv2d, image, kernels), Cost(0, operations))
    return {name: Ceiling(CallTurn(call, device), cost) for name, (call, cost) in calls.items()}


def floor_seconds(cost: Cost, bytes_per_second: float, operations_per_second: float) -> float:
    """Return the least time for a cost: the longer of moving and computing, at the ceilings."""
    return max(cost.bytes / bytes_per_second, cost.operations / operations_per_second)
