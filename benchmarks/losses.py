"""Times the losses of one layer, forward and backward, every backend beside the eager loss.

    python benchmarks/losses.py [--rounds N]

The providers take turns within each round, so that a drift of the machine's speed hits all alike;
printed are medians and the ratio to ``eager``. Before it is timed, a provider's losses must agree
with the reference in float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from singer_kernels import backends, fused_losses, reference

WORKLOADS = [(8, 196, 1024), (1, 1369, 1024), (8, 196, 384)]  # images, patches, width
RANK = 64
WEIGHTS = (1.0, 0.01, 1.0)  # of KD, outlier and information loss
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(student: Tensor, teacher: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return the total loss of a last layer the way the authors' code computes it."""
    patches = teacher[:, 1:] + (teacher[:, 1:] @ down) @ up
    refined = torch.cat([teacher[:, :1], patches], dim=1)
    norms = refined[:, 1:].norm(dim=-1)
    limit = torch.quantile(norms, 0.97, dim=1, keepdim=True).detach()
    above = norms > limit
    outlier = F.mse_loss(norms[above], limit.expand_as(norms)[above])
    rows, plain = F.normalize(refined[:, 1:], dim=-1), F.normalize(teacher[:, 1:], dim=-1)
    info = F.mse_loss(rows @ rows.mT, plain @ plain.mT)
    kd = F.mse_loss(student, refined)
    return WEIGHTS[0] * kd + WEIGHTS[1] * outlier + WEIGHTS[2] * info


def fused(backend: str) -> Loss:
    """Return the same loss from a backend of ``singer_kernels``."""

    def loss(student: Tensor, teacher: Tensor, down: Tensor, up: Tensor) -> Tensor:
        out = fused_losses(student, teacher, down, up, backend=backend)
        return WEIGHTS[0] * out.kd + WEIGHTS[1] * out.outlier + WEIGHTS[2] * out.info

    return loss


def make_inputs(images: int, patches: int, width: int) -> list[Tensor]:
    """Return student, teacher, down and up; all but the teacher require grad."""
    generator = torch.Generator().manual_seed(0)
    shape = (images, 1 + patches, width)
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    down = torch.randn(width, RANK, generator=generator) / width**0.5
    up = 0.1 * torch.randn(RANK, width, generator=generator) / RANK**0.5
    return [student.requires_grad_(), teacher, down.requires_grad_(), up.requires_grad_()]


def check(name: str, loss: Loss, inputs: list[Tensor]) -> None:
    """Raise if a provider's loss is not the reference's.

    Raises:
        AssertionError: it differs by more than float32 rounding explains.
    """
    out = reference.fused_losses(*[tensor.detach().double() for tensor in inputs])
    terms = (out.kd, out.outlier, out.info)
    exact = sum(weight * term for weight, term in zip(WEIGHTS, terms, strict=True))
    error = abs(loss(*inputs).item() - exact.item()) / exact.item()
    if not error < 1e-5:
        raise AssertionError(f"{name} is wrong: relative error {error:.1e}")


def measure(providers: dict[str, Loss], inputs: list[Tensor], rounds: int) -> dict[str, float]:
    """Return each provider's median time of a forward and backward pass, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(rounds + 3):  # three rounds warm up
        for name, loss in providers.items():
            for tensor in inputs:
                tensor.grad = None
            start = time.perf_counter()
            loss(*inputs).backward()
            if number >= 3:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print one Markdown table row per workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    cpu = torch.device("cpu")
    usable = [name for name in backends.names() if backends.unavailable_reason(name, cpu) is None]
    providers: dict[str, Loss] = {"eager": eager, **{name: fused(name) for name in usable}}
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, milliseconds")
    print("| images | patches | width |", " | ".join(providers), "|")
    print("|---" * (3 + len(providers)) + "|")
    for workload in WORKLOADS:
        inputs = make_inputs(*workload)
        for name, loss in providers.items():
            check(name, loss, inputs)
        medians = measure(providers, inputs, rounds)
        ratio = {name: medians["eager"] / value for name, value in medians.items()}
        cells = [f"{value:.1f} ({ratio[name]:.2f}x)" for name, value in medians.items()]
        print("|", " | ".join(map(str, workload)), "|", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
