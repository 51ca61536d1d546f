"""Roofline of the machine: measured copy bandwidth and matrix-product throughput."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from harness.timing import TimedCall
from harness.workloads import Cost, Precision

COPY_BYTES = {"cpu": 128 * 2**20, "cuda": 2**30}  # larger than any last-level cache
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}  # rows and columns of the product's operands


class Probe(NamedTuple):
    """A call that reaches one of the machine's limits, and its cost."""

    run: TimedCall
    cost: Cost


def roofline_probes(precision: Precision, device: torch.device) -> dict[str, Probe]:
    """Return the calls to time: ``copy``, and ``product`` in the dtype of the matrix products.

    On a CPU also ``convolution``: the same product as a 1 x 1 convolution, which torch hands to
    another library, faster on some processors.

    Args:
        precision: dtypes of the case.
        device: the device to measure.
    """
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    size = MATRIX_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=precision.product) for _ in range(2))
    product = torch.empty_like(a)
    operations = 2 * size**3
    calls = {
        "copy": (functools.partial(target.copy_, source), Cost(2 * source.nbytes, 0)),
        "product": (functools.partial(torch.mm, a, b, out=product), Cost(0, operations)),
    }
    if device.type == "cpu":
        # channels_last: rows of `a` are the pixels of 8 images, its columns their channels.
        image = a.view(8, size // 8, 1, size).permute(0, 3, 1, 2)
        kernels = b.view(size, size, 1, 1)
        calls["convolution"] = (functools.partial(F.conv2d, image, kernels), Cost(0, operations))
    return {name: Probe(TimedCall(call, device), cost) for name, (call, cost) in calls.items()}


def peak_rates(
    probes: dict[str, Probe], times: dict[str, list[dict[str, float]]]
) -> dict[str, float]:
    """Return ``bytes_per_second`` and ``operations_per_second`` of the fastest run of each probe.

    Args:
        probes: see :func:`roofline_probes`.
        times: name of a probe to the phases' seconds of each round.
    """
    # Noise only slows down: take the minimum.
    fastest = {name: min(row["both"] for row in times[name]) for name in probes}
    operations = [probe.cost.operations / fastest[name] for name, probe in probes.items()]
    return {
        "bytes_per_second": probes["copy"].cost.bytes / fastest["copy"],
        "operations_per_second": max(operations),
    }


def roofline_seconds(cost: Cost, bytes_per_second: float, operations_per_second: float) -> float:
    """Return the roofline time: the longer of memory traffic and arithmetic at peak rates."""
    return max(cost.bytes / bytes_per_second, cost.operations / operations_per_second)
