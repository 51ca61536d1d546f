"""Providers: the implementations of the losses that are compared (``provider`` as in Triton)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.eager import gram_loss, masked_outlier_loss, outlier_loss, refine
from harness.workloads import QUANTILE, Case, Inputs
from singer_kernels import backends, fused_losses


class Losses(NamedTuple):
    """Results of a provider: scalars."""

    kd: Tensor
    outlier: Tensor
    info: Tensor


Loss = Callable[[Inputs], Losses]

BACKENDS = ("torch", "cpu", "triton", "cuda")
NAMES = ("eager", "eager-masked", "compiled", "compiled-max", *BACKENDS)
"""All providers; each is described in ``benchmarks/README.md``."""

MAX_AUTOTUNE_CASES = ("A-vit-l16-224px-bf16", "B-dinov2-l14-518px-bf16")


def eager(inputs: Inputs) -> Losses:
    """Return the losses of a last layer, computed as in the authors' code."""
    refined = refine(inputs.teacher, inputs.down, inputs.up)
    kd, outlier = F.mse_loss(inputs.student, refined), outlier_loss(refined, QUANTILE)
    return Losses(kd, outlier, gram_loss(refined, inputs.teacher))


def eager_masked(inputs: Inputs) -> Losses:
    """Return the same without boolean indexing, so that the host does not synchronise."""
    refined = refine(inputs.teacher, inputs.down, inputs.up)
    kd, outlier = F.mse_loss(inputs.student, refined), masked_outlier_loss(refined, QUANTILE)
    return Losses(kd, outlier, gram_loss(refined, inputs.teacher))


def _fused(backend: str) -> Loss:
    def losses(inputs: Inputs) -> Losses:
        out = fused_losses(*inputs, quantile=QUANTILE, backend=backend)
        return Losses(out.kd, out.outlier, out.info)

    return losses


def build(name: str) -> Loss:
    """Return the provider called ``name``: one of :data:`NAMES`, or ``reference``."""
    if name == "eager":
        return eager
    if name == "eager-masked":
        return eager_masked
    if name.startswith("compiled"):
        mode = "max-autotune-no-cudagraphs" if name == "compiled-max" else None
        return torch.compile(eager_masked, fullgraph=True, dynamic=False, mode=mode)
    return _fused(name)


def unavailable_reason(name: str, device: torch.device, case: Case | None = None) -> str | None:
    """Return why a provider can't be measured, in one line, or None if it can.

    Args:
        name: one of :data:`NAMES`.
        device: the device to measure.
        case: the case; None: any.
    """
    if name in BACKENDS:
        if device.type == "cpu" and name in ("triton", "cuda"):
            return "it needs a CUDA device"  # TRITON_INTERPRET is for tests; its times mean nothing
        return backends.unavailable_reason(name, device)
    if name == "compiled" and device.type == "cpu":
        compiler = os.environ.get("CXX", "g++")  # where torch.compile looks for it
        return None if shutil.which(compiler) else f"torch.compile finds no {compiler}"
    if name == "compiled-max":
        if device.type != "cuda":
            return "autotuning of products is a GPU's"
        if case is not None and case.label not in MAX_AUTOTUNE_CASES:
            return "tuning takes long: only " + " and ".join(MAX_AUTOTUNE_CASES)
    return None
