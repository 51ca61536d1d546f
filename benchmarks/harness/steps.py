"""Time whole training steps of SiNGER against the authors' step (``authors_step.py``).

    cd benchmarks
    python -m harness.steps [--device cuda] [--config FILE] [--variant paper] [--json FILE]

On a CPU the configuration is the demo's: DINOv2 ViT-S/14 to ViT-Tiny/14 at 126 px, batch 16. On a
GPU it is ViT-L/16 to ViT-T/16 at 224 px, batch 128, random weights. All steps start from the same
weights and use the same batches (uint8, already on the device) of random pixels, since time does
not depend on their values. A step is: normalisation of the images by both models, forward,
backward, AdamW. ``bf16`` is autocast; our step then holds the teacher's weights in bfloat16.

A provider is timed only if its losses are correct: see ``step_check.py``. Providers are interleaved
within each round, so that a drift of the machine's speed hits all alike. Images per second are
medians over the rounds; a ratio is the median of the ratios within the rounds. On a busy machine
compare the fastest steps: other programs only add time. Peak memory is that of the first three
steps above the level before them, without the weights of the models: resident memory (``VmHWM``) of
a fresh process per provider on a CPU, ``max_memory_allocated`` on a GPU.
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
from harness.memory import peak_memory_increase
from harness.step_check import check, is_correct
from harness.timing import TimedRun, interleave
from singer.config.loading import load_config
from singer.config.schema import Config, parse_config
from singer.demo import DemoOptions, demo_config
from singer.engine.student import create_optimizer
from singer.methods import METHODS, SiNGER
from singer.models.backbones import create_backbone
from singer_kernels import resolve_backend

PROVIDERS = {  # name to the devices on which it is timed by default
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
STEPS_PER_ROUND = {"cpu": 1, "cuda": 5}
WARM_UP_ROUNDS = 3


def default_providers(device: str) -> list[str]:
    """Return the providers that are timed by default on ``cpu`` or ``cuda``."""
    return [name for name in PROVIDERS if device in PROVIDERS[name]]


def step_config(device: str, path: str | None, variant: str) -> Config:
    """Return the configuration to time.

    Args:
        device: ``cpu`` or ``cuda``.
        path: file with a configuration of ``singer distill``; None: the device's default.
        variant: variant of SiNGER.
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
    """Return the method with the initial weights of both models, in float32 and training mode."""
    torch.manual_seed(config.train.seed)
    teacher, student = (
        create_backbone(
            model.name,
            config.image_size,
            key,
            model.weights,
            model.options,
            model.weights_prefix,
        )
        for key, model in (("teacher", config.teacher), ("student", config.student))
    )
    options = config.method.model_dump(exclude={"name"})
    method = METHODS[config.method.name](teacher, student, seed=config.train.seed, **options)
    return method.to(device).train()


def make_batches(config: Config, device: str) -> list[Tensor]:
    """Return uint8 batches ``[B, 3, H, W]``, as the loader yields them."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCHES, config.train.batch_size, 3, config.image_size, config.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return list(images.to(device))


class Stopwatch:
    """Times the phases of a step: host time on a CPU, stream time between events on a GPU.

    Args:
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """End a phase, which began at the mark before this one."""
        if self.on_gpu:
            moment: Any = torch.cuda.Event(enable_timing=True)
            moment.record()
        else:
            moment = time.perf_counter()
        self.marks.append((phase, moment))

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase, summed over its occurrences, and clear the marks."""
        seconds = dict.fromkeys(PHASES, 0.0)
        if self.on_gpu:
            torch.cuda.synchronize()
        for (_, begin), (phase, end) in zip(self.marks, self.marks[1:], strict=False):
            taken = 1e-3 * begin.elapsed_time(end) if self.on_gpu else end - begin
            seconds[phase] += taken
        self.marks.clear()
        return seconds


class Provider:
    """One implementation of a training step, with its own copy of the weights.

    Args:
        name: one of :data:`PROVIDERS`.
        method: the initial weights, which are copied.
        config: the run; only the optimiser's options are used.
        device: ``cpu`` or ``cuda``.
    """

    def __init__(self, name: str, method: SiNGER, config: Config, device: str) -> None:
        kind, _, precision = name.partition("-")
        self.name, self.device = name, device
        self.is_authors = kind == "authors"
        self.is_bf16 = precision.startswith("bf16")
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
            if self.is_bf16:
                self.model.teacher.cast(torch.bfloat16)
            if precision.endswith("compiled"):
                self.model.teacher.compile()
                self.model.student_backbone.compile()
            self.optimizer = create_optimizer(self.model, train)

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the forward pass."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.is_bf16)

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
        """Run a training step on a batch ``[B, 3, H, W]``, uint8."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.losses(images, watch)
        losses["loss"].backward()
        watch.mark("backward")
        self.optimizer.step()
        if self.is_authors:
            for value in losses.values():
                value.item()  # their logging: one synchronisation per loss
        watch.mark("optimiser")


def measure(
    providers: Sequence[Provider], batches: Sequence[Tensor], rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Return the seconds of each phase of a step, for each provider and round."""

    def timed_run(provider: Provider) -> TimedRun:
        watch, steps = Stopwatch(provider.device), STEPS_PER_ROUND[provider.device]

        def run(number: int) -> dict[str, float]:
            if watch.on_gpu:
                torch.cuda.synchronize()
            watch.mark("start")
            for step in range(steps):
                provider.step(batches[(number + step) % len(batches)], watch)
            return {name: taken / steps for name, taken in watch.read().items()}

        return run

    runs = {provider.name: timed_run(provider) for provider in providers}
    return interleave(runs, rounds, warm_up=WARM_UP_ROUNDS)


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
    """Return the GFLOP of the matrix products and convolutions of a step.

    The counter sees torch's own operators only, so our step uses the backend ``"torch"`` here.
    """
    gflops = {}
    for name in ("authors", "ours"):
        provider = Provider(name, method, config, device)
        for adapter in provider.model.adapters.values():
            adapter.backend = "torch"
        with FlopCounterMode(display=False) as counter:
            provider.step(images, Stopwatch(device))
        gflops[name] = 1e-9 * counter.get_total_flops()
    return gflops


def peak_memory(provider: Provider, batches: Sequence[Tensor]) -> float | None:
    """Return the peak memory of the first three steps above the level before them, in MiB.

    Args:
        provider: a provider that has run no step yet: AdamW's state counts.
        batches: three or more.

    Returns:
        MiB; None on a CPU without Linux's accounting.
    """

    def run() -> None:
        for images in batches[:3]:
            provider.step(images, Stopwatch(provider.device))

    increase = peak_memory_increase(run, torch.device(provider.device))
    return None if increase is None else increase / MIB


def _fresh_peak_memory(config: Config, name: str, device: str) -> float | None:
    provider = Provider(name, build(config, device), config, device)
    return peak_memory(provider, make_batches(config, device))


def peak_memories(config: Config, names: Sequence[str], device: str) -> dict[str, float | None]:
    """Return :func:`peak_memory` of each provider.

    On a CPU each is measured in a fresh process: memory that an earlier provider freed may stay
    resident, and reusing it would not count. A GPU's allocator counts exactly.
    """
    if device == "cuda":
        method, batches = build(config, device), make_batches(config, device)
        return {
            name: peak_memory(Provider(name, method, config, device), batches) for name in names
        }
    peaks = {}
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            peaks[name] = pool.submit(_fresh_peak_memory, config, name, device).result()
    return peaks


def environment(config: Config, device: str) -> dict[str, Any]:
    """Return what the figures depend on: machine, versions, models and sizes."""
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
    """Return each provider's speed, its speed-up over the authors' steps, and its phases."""
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
    """Print a Markdown table with a row per provider; a wrong one has no times."""
    columns = "step | images/s (quartiles; fastest) | x authors | x authors-bf16 | peak MiB"
    print(f"| {columns} | ms: {', '.join(PHASES)} | fused losses |")
    print("|---" * 7 + "|")
    for name, errors in shares.items():
        row = results.get(name)
        if not is_correct(errors):
            text = ", ".join(f"{key} {share:.1e}" for key, share in errors.items())
            print(f"| {name} | wrong, error / tolerance: {text} | | | | | |")
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
        config: the run; see :func:`step_config`.
        names: some of :data:`PROVIDERS`.
        device: ``cpu`` or ``cuda``.
        rounds: number of rounds that are counted.
        with_memory: whether to measure peak memory; on a CPU in a fresh process per provider.

    Returns:
        ``setting``, ``error_in_tolerances``, ``results`` (see :func:`summarize`; correct providers
        only), ``peak_MiB`` and ``dense_gflops``; and the seconds of every step of each provider.
    """
    setting = environment(config, device)
    memory = peak_memories(config, names, device) if with_memory else {}
    method = build(config, device)
    providers = [Provider(name, method, config, device) for name in names]
    batches = make_batches(config, device)
    losses = {provider.name: provider.loss_values for provider in providers}
    shares = check(losses, method, batches[0])
    correct = [provider for provider in providers if is_correct(shares[provider.name])]
    times = measure(correct, batches, rounds)
    results = summarize(times, config.train.batch_size)
    for provider in correct:
        if not provider.is_authors:
            taken = 1e3 * fused_losses_seconds(provider, batches[0], rounds)
            results[provider.name]["fused_losses_milliseconds"] = taken
    setting["busy_processors_after"] = machine.busy_processors()
    record = {
        "setting": setting,
        "error_in_tolerances": shares,
        "results": results,
        "peak_MiB": memory,
        "dense_gflops": dense_gflops(method, config, batches[0], device),
    }
    return record, {name: [sum(row.values()) for row in rows] for name, rows in times.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure and print; return 1 if a provider is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", choices=list(STEPS_PER_ROUND), default="cpu")
    parser.add_argument(
        "--config",
        help="a configuration of singer distill; default: the demo's (CPU), ViT-L to ViT-T (GPU)",
    )
    parser.add_argument("--variant", choices=["official", "paper"], default="official")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-memory", action="store_true", help="don't measure peak memory")
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args(arguments)
    if options.rounds < 2:
        parser.error(f"--rounds: got {options.rounds}, expected at least 2")
    names = options.providers or default_providers(options.device)
    config = step_config(options.device, options.config, options.variant)
    record, _ = run(config, names, options.device, options.rounds, not options.no_memory)
    print(json.dumps(record["setting"]))
    show(record["results"], record["error_in_tolerances"], record["peak_MiB"])
    dense = record["dense_gflops"]
    ratio = dense["authors"] / dense["ours"]
    rounded = ", ".join(f"{name} {count:.4g}" for name, count in dense.items())
    print(f"GFLOP of matrix products and convolutions per step: {rounded} ({ratio:.2f}x)")
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(not all(map(is_correct, record["error_in_tolerances"].values())))


if __name__ == "__main__":
    sys.exit(main())
