"""Times whole training steps of SiNGER beside the authors' step (``authors_step.py``).

    cd benchmarks
    python -m harness.steps [--device cuda] [--config FILE] [--variant paper] [--json FILE]

On a CPU the setting is the demo's: DINOv2 ViT-S/14 to ViT-Tiny/14 at 126 px, batch 16. On a GPU it
is ViT-L/16 to ViT-T/16 at 224 px, batch 128, random weights. Both steps start from the same weights
and take the same batches (uint8, in the device's memory), of random pixels: time does not depend on
their values. A step is: both models' own normalisation, forward, backward, AdamW. ``bf16`` is
autocast; ours then holds the teacher's weights in bfloat16.

A provider is timed only if its losses are right: see ``step_check.py``. Providers take turns within
each round, so that a drift of the machine's speed hits all alike. Images per second are medians
over the rounds; a ratio is the median of the ratios within the rounds. Where other programs take
turns on the machine, the fastest step of each says more: they only add time. Peak memory is that of
the first three steps above the level before them, weights of both models excluded: resident memory
(``VmHWM``) of a fresh process per provider on a CPU, ``max_memory_allocated`` on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from harness import machine
from harness.authors_step import AuthorsStep
from harness.memory import peak_rise
from harness.step_check import check, is_right
from harness.timing import Turn, interleave
from singer.config.schema import Config, load_config, parse_config
from singer.demo import DemoOptions, demo_config
from singer.engine.student import create_optimizer
from singer.methods import METHODS, SiNGER
from singer.models.backbones import create_backbone
from singer_kernels import resolve_backend

PROVIDERS = {  # and on which device each is timed unless others are named
    "authors": ("cpu", "cuda"),
    "authors-bf16": ("cpu", "cuda"),
    "ours": ("cpu", "cuda"),
    "ours-bf16": ("cpu", "cuda"),
    "ours-compiled": ("cuda",),
    "ours-bf16-compiled": ("cuda",),
}
PHASES = ("teacher", "student", "losses", "backward", "optimiser")
BATCHES = 4
MIB = 2**20
STEPS_PER_TURN = {"cpu": 1, "cuda": 5}
WARM_UP_ROUNDS = 3


def names_on(device: str) -> list[str]:
    """Return the providers that are timed on ``cpu`` or ``cuda`` unless others are named."""
    return [name for name in PROVIDERS if device in PROVIDERS[name]]


def setting(device: str, path: str | None, variant: str) -> Config:
    """Return the run that is timed.

    Args:
        device: ``cpu`` or ``cuda``.
        path: a configuration of ``singer distill`` to time instead of the device's own.
        variant: of SiNGER.
    """
    if path is not None:
        config = load_config(path)
    elif device == "cpu":
        config = demo_config(DemoOptions(), "singer", "unused")
    else:
        config = parse_config(
            {
                "teacher": {"name": "vit_large_patch16_224", "weights": "random"},
                "student": {"name": "vit_tiny_patch16_224"},
                "method": {"name": "singer"},
                "data": {"source": "unused"},
                "train": {"batch_size": 128},
                "output": "unused",
            }
        )
    method = config.method.model_copy(update={"variant": variant})
    return config.model_copy(update={"method": method})


def build(config: Config, device: str) -> SiNGER:
    """Return the method with both models' initial weights, in float32 and training mode."""
    torch.manual_seed(config.train.seed)
    teacher, student = (
        create_backbone(model.name, config.image_size, key, model.weights, model.options)
        for key, model in (("teacher", config.teacher), ("student", config.student))
    )
    options = config.method.model_dump(exclude={"name"})
    method = METHODS[config.method.name](teacher, student, seed=config.train.seed, **options)
    return method.to(device).train()


def make_batches(config: Config, device: str) -> list[Tensor]:
    """Return batches ``[B, 3, H, W]`` as the loader gives them: uint8."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCHES, config.train.batch_size, 3, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return list(images.to(device))


class Stopwatch:
    """Takes the time of a step's phases: of the host on a CPU, of the stream on a GPU.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """End a phase; it began where the one before it ended."""
        if self.on_gpu:
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((phase, moment))

    def read(self) -> dict[str, float]:
        """Return each phase's time in seconds, summed over its occurrences, and start anew."""
        seconds = dict.fromkeys(PHASES, 0.0)
        if self.on_gpu:
            torch.cuda.synchronize()
        for (_, begin), (phase, end) in zip(self.marks, self.marks[1:], strict=False):
            taken = 1e-3 * begin.elapsed_time(end) if self.on_gpu else end - begin
            seconds[phase] += taken
        self.marks.clear()
        return seconds


class Provider:
    """One way to take a training step, with weights of its own.

    Args:
        name: one of :data:`PROVIDERS`.
        method: the initial weights; they are copied.
        config: the run; the optimiser's options are read.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, name: str, method: SiNGER, config: Config, device: str) -> None:
        kind, _, precision = name.partition("-")
        self.name, self.device = name, device
        self.is_authors = kind == "authors"
        self.is_narrow = precision.startswith("bf16")
        self.model = AuthorsStep(method) if self.is_authors else copy.deepcopy(method)
        train = config.train
        if self.is_authors:
            self.optimizer = torch.optim.AdamW(
                self.model.learnable(),
                lr=train.lr,
                weight_decay=train.weight_decay,
                betas=train.betas,
            )
        else:
            if self.is_narrow:
                self.model.teacher.cast(torch.bfloat16)
            if precision.endswith("compiled"):
                self.model.teacher.compile()
                self.model.student_backbone.compile()
            self.optimizer = create_optimizer(self.model, train)

    def autocast(self) -> torch.autocast:
        """Return the context of its forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.is_narrow)

    def losses(self, images: Tensor, watch: Stopwatch) -> dict[str, Tensor]:
        """Return the losses of a batch ``[B, 3, H, W]``, uint8: ``loss`` and its terms."""
        with self.autocast():
            teacher = self.model.teacher_tokens(images)
            watch.mark("teacher")
            student = self.model.student_tokens(images)
            watch.mark("student")
            losses = self.model.losses(student, teacher)
            watch.mark("losses")
        return losses

    def loss_values(self, images: Tensor) -> dict[str, float]:
        """Return the losses of a batch ``[B, 3, H, W]``, uint8, as numbers."""
        losses = self.losses(images, Stopwatch(self.device))
        return {name: value.item() for name, value in losses.items()}

    def step(self, images: Tensor, watch: Stopwatch) -> None:
        """Take a training step on a batch ``[B, 3, H, W]``, uint8."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(images, watch)
        losses["loss"].backward()
        watch.mark("backward")
        self.optimizer.step()
        if self.is_authors:
            for value in losses.values():
                value.item()
        watch.mark("optimiser")


def measure(
    providers: Sequence[Provider], batches: Sequence[Tensor], rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Return, for each provider and round, the seconds that each phase of a step took."""

    def turn_of(provider: Provider) -> Turn:
        watch, steps = Stopwatch(provider.device), STEPS_PER_TURN[provider.device]

        def turn(number: int) -> dict[str, float]:
            if watch.on_gpu:
                torch.cuda.synchronize()
            watch.mark("start")
            for step in range(steps):
                provider.step(batches[(number + step) % len(batches)], watch)
            return {name: taken / steps for name, taken in watch.read().items()}

        return turn

    turns = {provider.name: turn_of(provider) for provider in providers}
    return interleave(turns, rounds, warm_up=WARM_UP_ROUNDS)


def fused_losses_seconds(provider: Provider, images: Tensor, rounds: int) -> float:
    """Return the median time of ``fused_losses`` alone, all layers, forward and backward."""
    method = provider.model
    with torch.no_grad(), provider.autocast():
        teacher, student = method.teacher_tokens(images), method.student_tokens(images)
        inputs = {layer: method.projected_student(layer, student) for layer in method.layers}
    watch = Stopwatch(provider.device)
    taken = []
    for _ in range(rounds + WARM_UP_ROUNDS):
        watch.mark("start")
        total, before = 0.0, None
        with provider.autocast():
            for layer, projected in inputs.items():
                is_last = layer == method.last_layer
                out = method.adapters[str(layer)](
                    projected.requires_grad_(),
                    method.aligned_teacher(layer, teacher),
                    before if is_last and method.variant == "official" else None,
                )
                before = out.refined
                total = total + out.kd + out.outlier + (out.info if is_last else 0.0)
        total.backward()
        watch.mark("losses")
        taken.append(watch.read()["losses"])
    return statistics.median(taken[WARM_UP_ROUNDS:])


def dense_gflops(method: SiNGER, config: Config, images: Tensor, device: str) -> dict[str, float]:
    """Return the 10⁹ operations of a step's matrix products and convolutions: what bounds it.

    The counter sees torch's own operators alone: here the losses of ours come from the backend
    ``"torch"``.
    """
    found = {}
    for name in ("authors", "ours"):
        provider = Provider(name, method, config, device)
        for adapter in provider.model.adapters.values():
            adapter.backend = "torch"
        with FlopCounterMode(display=False) as counter:
            provider.step(images, Stopwatch(device))
        found[name] = 1e-9 * counter.get_total_flops()
    return found


def peak_memory(provider: Provider, batches: Sequence[Tensor]) -> float | None:
    """Return by how much the first three steps raise memory at their peak, in MiB.

    Args:
        provider: one that has taken no step.
        batches: three or more.

    Returns:
        The rise; None on a CPU without Linux's accounting.
    """

    def run() -> None:
        for images in batches[:3]:
            provider.step(images, Stopwatch(provider.device))

    rise = peak_rise(run, torch.device(provider.device))
    return None if rise is None else rise / MIB


def _fresh_peak_memory(config: Config, name: str, device: str) -> float | None:
    provider = Provider(name, build(config, device), config, device)
    return peak_memory(provider, make_batches(config, device))


def peak_memories(config: Config, names: Sequence[str], device: str) -> dict[str, float | None]:
    """Return :func:`peak_memory` of each provider.

    On a CPU each is measured in a process of its own: there, what was freed before can't be told
    from what is taken. A GPU's allocator counts exactly.
    """
    if device == "cuda":
        method, batches = build(config, device), make_batches(config, device)
        return {
            name: peak_memory(Provider(name, method, config, device), batches) for name in names
        }
    found = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found[name] = pool.submit(_fresh_peak_memory, config, name, device).result()
    return found


def environment(config: Config, device: str) -> dict[str, Any]:
    """Return what the figures depend on: the machine, and what is trained."""
    return {
        **machine.environment(torch.device(device)),
        "backend": resolve_backend(config.method.backend, torch.device(device)),
        "teacher": config.teacher.name,
        "student": config.student.name,
        "image_size": config.image_size,
        "batch_size": config.train.batch_size,
        "variant": config.method.variant,
    }


def summarize(
    times: dict[str, list[dict[str, float]]], batch_size: int
) -> dict[str, dict[str, Any]]:
    """Return each provider's speed, its ratio to either of the authors' steps, and its phases."""
    totals = {name: [sum(phases.values()) for phases in rows] for name, rows in times.items()}
    results: dict[str, dict[str, Any]] = {}
    for name, seconds in totals.items():
        quartiles = statistics.quantiles([batch_size / taken for taken in seconds], n=4)
        ratios = {
            other: statistics.median(a / b for a, b in zip(totals[other], seconds, strict=True))
            for other in ("authors", "authors-bf16")
            if other in totals
        }
        phases = {
            phase: 1e3 * statistics.median(row[phase] for row in times[name]) for phase in PHASES
        }
        results[name] = {
            "images_per_second": statistics.median(batch_size / taken for taken in seconds),
            "quartiles": [quartiles[0], quartiles[2]],
            "fastest": batch_size / min(seconds),
            "ratio_to": ratios,
            "milliseconds": phases,
        }
    return results


def show(
    results: dict[str, dict[str, Any]],
    shares: dict[str, dict[str, float]],
    memory: dict[str, float | None],
) -> None:
    """Print a Markdown table row per provider; one that is wrong gets no time."""
    columns = "step | images/s (quartiles; fastest) | x authors | x authors-bf16 | peak MiB"
    print(f"| {columns} | ms: {', '.join(PHASES)} | fused losses |")
    print("|---" * 7 + "|")
    for name, errors in shares.items():
        row = results.get(name)
        if not is_right(errors):
            found = ", ".join(f"{key} {share:.1e}" for key, share in errors.items())
            print(f"| {name} | wrong, errors in tolerances: {found} | | | | | |")
        elif row is not None:
            low, high = row["quartiles"]
            ratios = [
                f"{row['ratio_to'][other]:.2f}x" if other in row["ratio_to"] else ""
                for other in ("authors", "authors-bf16")
            ]
            mib = "" if memory.get(name) is None else f"{memory[name]:.0f}"
            speed = (
                f"{row['images_per_second']:.1f} ({low:.1f} to {high:.1f}; {row['fastest']:.1f})"
            )
            phases = ", ".join(f"{value:.1f}" for value in row["milliseconds"].values())
            fused = row.get("fused_losses_milliseconds")
            share = "" if fused is None else f"{fused / sum(row['milliseconds'].values()):.1%}"
            print(f"| {name} | {speed} | {' | '.join(ratios)} | {mib} | {phases} | {share} |")


def run(
    config: Config, names: Sequence[str], device: str, rounds: int, with_memory: bool
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Check and measure whole training steps.

    Args:
        config: the run; see :func:`setting`.
        names: of :data:`PROVIDERS`.
        device: ``cpu`` or ``cuda``.
        rounds: how many are counted.
        with_memory: whether peak memory is measured, in processes of its own.

    Returns:
        ``setting``, ``error_in_tolerances``, ``results`` (see :func:`summarize`; of those that are
        right), ``peak_MiB`` and ``dense_gflops``; and the seconds of each step of each provider.
    """
    facts = environment(config, device)
    memory = peak_memories(config, names, device) if with_memory else {}
    method = build(config, device)
    providers = [Provider(name, method, config, device) for name in names]
    batches = make_batches(config, device)
    losses = {provider.name: provider.loss_values for provider in providers}
    shares = check(losses, method, batches[0])
    right = [provider for provider in providers if is_right(shares[provider.name])]
    times = measure(right, batches, rounds)
    results = summarize(times, config.train.batch_size)
    for provider in right:
        if not provider.is_authors:
            taken = 1e3 * fused_losses_seconds(provider, batches[0], rounds)
            results[provider.name]["fused_losses_milliseconds"] = taken
    facts["busy_processors_after"] = machine.busy_processors()
    found = {
        "setting": facts,
        "error_in_tolerances": shares,
        "results": results,
        "peak_MiB": memory,
        "dense_gflops": dense_gflops(method, config, batches[0], device),
    }
    return found, {name: [sum(row.values()) for row in rows] for name, rows in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure and print; return 1 if a provider is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(STEPS_PER_TURN), default="cpu")
    parser.add_argument("--config", help="a configuration of singer distill; default: see above")
    parser.add_argument("--variant", choices=["official", "paper"], default="official")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-memory", action="store_true", help="don't measure peak memory")
    parser.add_argument("--json", help="a file for the same as JSON")
    given = parser.parse_args(arguments)
    if given.rounds < 2:
        parser.error(f"--rounds: got {given.rounds}, expected at least 2")
    names = given.providers or names_on(given.device)
    config = setting(given.device, given.config, given.variant)
    found, _ = run(config, names, given.device, given.rounds, not given.no_memory)
    print(json.dumps(found["setting"]))
    show(found["results"], found["error_in_tolerances"], found["peak_MiB"])
    dense = found["dense_gflops"]
    ratio = dense["authors"] / dense["ours"]
    rounded = ", ".join(f"{name} {count:.4g}" for name, count in dense.items())
    print(f"dense products of a step, GFLOP: {rounded} ({ratio:.2f}x)")
    if given.json:
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(not all(map(is_right, found["error_in_tolerances"].values())))


if __name__ == "__main__":
    sys.exit(main())
