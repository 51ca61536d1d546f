"""Interleaved timing: in every round each provider runs one forward and one backward pass."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.workloads import Inputs, Precision

TimedRun = Callable[[int], dict[str, float]]
"""Runs once, given the number of the round; returns the seconds of each phase."""

WARM_UP_ROUNDS = 2
GPU_CLOCK_HZ = 2e9  # upper bound: converts seconds to cycles of torch.cuda._sleep
MAX_QUEUED_SECONDS = 0.05


def interleave(
    runs: Mapping[str, TimedRun], rounds: int, *, warm_up: int = WARM_UP_ROUNDS
) -> dict[str, list[dict[str, float]]]:
    """Time all runs round by round, so that a drift of the machine's speed hits all alike.

    Args:
        runs: name to timed run.
        rounds: number of rounds that are counted.
        warm_up: number of rounds before them that are not.

    Returns:
        Name to the times of each round.
    """
    names = list(runs)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would be charged to whichever run triggers it
    try:
        for number in range(rounds + warm_up):
            # Rotate the order: none always runs first, after the caches of the last one.
            first = number % max(1, len(names))
            for name in (*names[first:], *names[:first]):
                taken = runs[name](number)
                if number >= warm_up:
                    times[name].append(taken)
    finally:
        if was_enabled:
            gc.enable()
    return times


def rounds_within(
    runs: Mapping[str, TimedRun], seconds: float, min_rounds: int, max_rounds: int
) -> int:
    """Return how many rounds fit into a time, estimated from one round run now."""
    begin = time.perf_counter()
    for run in runs.values():
        run(0)
    taken = time.perf_counter() - begin
    return max(min_rounds, min(max_rounds, int(seconds / taken)))


class TimedPass:
    """Times forward, then backward to student and adapter, of one provider.

    On a CPU times are the host's. On a GPU they are the stream's, between events, with enough work
    queued before them that no launch is waited for. ``host`` is how long the host takes to issue
    one pass to an idle device (or waits, where the provider synchronises).

    Args:
        loss: the provider.
        sets: inputs, rotated over the rounds so that the last-level cache holds none of them.
        precision: dtypes.
        grad_outputs: gradients of the losses for the backward pass.
    """

    def __init__(
        self,
        loss: Callable[[Inputs], Sequence[Tensor]],
        sets: Sequence[Inputs],
        precision: Precision,
        grad_outputs: Sequence[Tensor],
    ) -> None:
        self.loss, self.sets, self.grad_outputs = loss, sets, grad_outputs
        self.precision, self.device = precision, sets[0].student.device

    def run(self, inputs: Inputs, between: Callable[[], Any] = lambda: None) -> None:
        """Run forward, ``between`` and backward once."""
        with self.precision.context(self.device):
            losses = self.loss(inputs)
        between()
        # autograd.grad, not backward(): nothing accumulates in .grad.
        torch.autograd.grad(losses, inputs.trained, self.grad_outputs)

    def __call__(self, number: int) -> dict[str, float]:
        """Run and time the pass of round ``number``."""
        inputs = self.sets[number % len(self.sets)]
        return self._on_gpu(inputs) if self.device.type == "cuda" else self._on_cpu(inputs)

    def _on_cpu(self, inputs: Inputs) -> dict[str, float]:
        marks = [time.perf_counter()]
        self.run(inputs, lambda: marks.append(time.perf_counter()))
        end = time.perf_counter()
        begin, middle = marks
        return {"forward": middle - begin, "backward": end - middle, "both": end - begin}

    def _on_gpu(self, inputs: Inputs) -> dict[str, float]:
        # 1. Host time: how long the launches of one pass take on an idle device.
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.run(inputs)
        host = time.perf_counter() - start
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        # 2. Stream time: a sleep kernel keeps the device busy for longer than the launches take,
        # so the kernels between the events run back to back.
        torch.cuda._sleep(int(min(MAX_QUEUED_SECONDS, 1.5 * host) * GPU_CLOCK_HZ))
        begin.record()
        self.run(inputs, middle.record)
        end.record()
        end.synchronize()
        forward, backward = 1e-3 * begin.elapsed_time(middle), 1e-3 * middle.elapsed_time(end)
        return {
            "forward": forward,
            "backward": backward,
            "both": forward + backward,
            "host": host,
        }


class TimedCall:
    """Times one call as a whole, such as a roofline probe.

    Args:
        call: the call.
        device: the device it runs on.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self.call, self.device = call, device

    def __call__(self, number: int) -> dict[str, float]:
        """Run and time the call; the number of the round is not used."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            self.call()
            return {"both": time.perf_counter() - begin}
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(2e-4 * GPU_CLOCK_HZ))  # covers the launch of a single kernel
        first.record()
        self.call()
        last.record()
        last.synchronize()
        return {"both": 1e-3 * first.elapsed_time(last)}


def time_stats(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and minimum of two or more times, in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4)
    return {
        "median": 1e3 * statistics.median(seconds),
        "low": 1e3 * low,
        "high": 1e3 * high,
        "fastest": 1e3 * min(seconds),
    }


def ratio(base: Sequence[float], seconds: Sequence[float]) -> float:
    """Return the speed-up over a baseline: the median of the ratios within the rounds.

    A ratio of medians would compare rounds that ran at different clock speeds.
    """
    return statistics.median(a / b for a, b in zip(base, seconds, strict=True))
