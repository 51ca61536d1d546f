"""Times the losses of one layer, forward and backward, every backend beside the eager loss.

    python benchmarks/losses.py [--device cuda] [--rounds N] [--json FILE]

The providers take turns within each round, so that a drift of the machine's speed hits all alike;
printed are medians and the ratio to ``eager``. Before it is timed, a provider's losses must agree
with the reference in float64. On a CPU the tensors are float32; on a GPU they are bfloat16, timed
by CUDA events, and the memory that the forward holds for the backward is printed too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from eager import gram_loss, outlier_loss, refine
from torch import Tensor

from singer_kernels import backends, fused_losses, reference

WORKLOADS = {  # images, patches, width
    "cpu": [(8, 196, 1024), (1, 1369, 1024), (8, 196, 384)],
    "cuda": [(128, 196, 1024), (16, 1369, 1024), (64, 256, 1536), (64, 196, 384)],
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
RANK = 64
WEIGHTS = (1.0, 0.01, 1.0)  # of KD, outlier and information loss
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager(student: Tensor, teacher: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """Return the total loss of a last layer the way the authors' code computes it."""
    refined = refine(teacher, down, up)
    kd, outlier = F.mse_loss(student, refined), outlier_loss(refined, 0.97)
    info = gram_loss(refined, teacher)
    return WEIGHTS[0] * kd + WEIGHTS[1] * outlier + WEIGHTS[2] * info


def fused(backend: str) -> Loss:
    """Return the same loss from a backend of ``singer_kernels``."""

    def loss(student: Tensor, teacher: Tensor, down: Tensor, up: Tensor) -> Tensor:
        out = fused_losses(student, teacher, down, up, backend=backend)
        return WEIGHTS[0] * out.kd + WEIGHTS[1] * out.outlier + WEIGHTS[2] * out.info

    return loss


def make_inputs(images: int, patches: int, width: int, device: str) -> list[Tensor]:
    """Return student, teacher, down and up; all but the teacher require grad."""
    generator = torch.Generator().manual_seed(0)
    shape = (images, 1 + patches, width)
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    down = torch.randn(width, RANK, generator=generator) / width**0.5
    up = 0.1 * torch.randn(RANK, width, generator=generator) / RANK**0.5
    tensors = [tensor.to(device, DTYPES[device]) for tensor in (student, teacher, down, up)]
    return [tensor.requires_grad_(index != 1) for index, tensor in enumerate(tensors)]


def check(name: str, loss: Loss, inputs: list[Tensor]) -> None:
    """Raise if a provider's loss is not the reference's.

    Raises:
        AssertionError: it differs by more than 160 roundings to the tensors' dtype.
    """
    out = reference.fused_losses(*[tensor.detach().double() for tensor in inputs])
    terms = (out.kd, out.outlier, out.info)
    exact = sum(weight * term for weight, term in zip(WEIGHTS, terms, strict=True))
    error = abs(loss(*inputs).item() - exact.item()) / exact.item()
    if not error < 80 * torch.finfo(inputs[0].dtype).eps:
        raise AssertionError(f"{name} is wrong: relative error {error:.1e}")


def milliseconds(loss: Loss, inputs: list[Tensor]) -> float:
    """Return the time of one forward and backward pass."""
    for tensor in inputs:
        tensor.grad = None
    if not inputs[0].is_cuda:
        start = time.perf_counter()
        loss(*inputs).backward()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # A busy device, so that the launches are not waited for.
    torch.cuda._sleep(5_000_000)
    begin.record()
    loss(*inputs).backward()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(providers: dict[str, Loss], inputs: list[Tensor], rounds: int) -> dict[str, float]:
    """Return each provider's median time of a forward and backward pass, in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(rounds + 3):  # three rounds warm up
        for name, loss in providers.items():
            taken = milliseconds(loss, inputs)
            if number >= 3:
                times[name].append(taken)
    return {name: statistics.median(values) for name, values in times.items()}


def held(loss: Loss, inputs: list[Tensor]) -> float:
    """Return the memory that a forward pass holds for its backward, in MiB; 0 on a CPU."""
    if not inputs[0].is_cuda:
        return 0.0
    before = torch.cuda.memory_allocated()
    value = loss(*inputs)
    taken = torch.cuda.memory_allocated() - before
    del value
    return taken / 2**20


def providers_on(device: str) -> dict[str, Loss]:
    """Return what is timed: the eager loss, compiled too on a GPU, and every backend."""
    found: dict[str, Loss] = {"eager": eager}
    if device == "cuda":
        found["compiled"] = torch.compile(eager)
    for name in backends.names():
        if backends.unavailable_reason(name, torch.device(device)) is None:
            found[name] = fused(name)
    return found


def main() -> None:
    """Print one Markdown table row per workload."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(WORKLOADS), default="cpu")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", help="a file for the same as JSON")
    given = parser.parse_args()
    device = given.device
    providers = providers_on(device)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    threads = torch.get_num_threads()
    setting = f"torch {torch.__version__}, {name}, {threads} threads, {DTYPES[device]}"
    print(f"{setting}, milliseconds (ratio to eager), MiB held for the backward on a GPU")
    print("| images | patches | width |", " | ".join(providers), "|")
    print("|---" * (3 + len(providers)) + "|")
    results = []
    for workload in WORKLOADS[device]:
        inputs = make_inputs(*workload, device)
        for provider, loss in providers.items():
            check(provider, loss, inputs)
        medians = measure(providers, inputs, given.rounds)
        memory = {provider: held(loss, inputs) for provider, loss in providers.items()}
        cells = []
        for provider, value in medians.items():
            ratio = medians["eager"] / value
            note = f", {memory[provider]:.0f} MiB" if device == "cuda" else ""
            cells.append(f"{value:.3g} ({ratio:.2f}x{note})")
        print("|", " | ".join(map(str, workload)), "|", " | ".join(cells), "|", flush=True)
        sizes = dict(zip(("images", "patches", "width"), workload, strict=True))
        results.append({**sizes, "milliseconds": medians, "MiB": memory})
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"setting": setting, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
