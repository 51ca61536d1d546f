"""Times that can be compared: providers take turns, and a turn is one forward and one backward."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from harness.workloads import Inputs, Precision

Turn = Callable[[int], dict[str, float]]
"""Takes a round's number; returns the seconds of each phase."""

WARM_UP_ROUNDS = 2
QUEUE_HZ = 2e9  # a GPU's clock, at most: cycles that keep it busy for a time
MOST_QUEUED = 0.05  # seconds


def interleave(
    turns: Mapping[str, Turn], rounds: int, *, warm_up: int = WARM_UP_ROUNDS
) -> dict[str, list[dict[str, float]]]:
    """Let all take a turn in each round, so that a drift of the machine's speed hits all alike.

    Who follows whom changes from round to round. Python's garbage collector waits meanwhile.

    Args:
        turns: name to what takes a turn.
        rounds: how many are counted.
        warm_up: how many before them are not.

    Returns:
        Name to the times of each round.
    """
    names = list(turns)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds + warm_up):
            first = number % max(1, len(names))
            for name in (*names[first:], *names[:first]):
                taken = turns[name](number)
                if number >= warm_up:
                    times[name].append(taken)
    finally:
        if was_enabled:
            gc.enable()
    return times


def rounds_within(turns: Mapping[str, Turn], seconds: float, least: int, most: int) -> int:
    """Return how many rounds fit into a time, going by one round taken now."""
    begin = time.perf_counter()
    for turn in turns.values():
        turn(0)
    taken = time.perf_counter() - begin
    return max(least, min(most, int(seconds / taken)))


class PassTurn:
    """A provider's turn: forward, then backward to student and adapter.

    On a CPU times are the host's. On a GPU they are the stream's, by events, behind enough queued
    work that launches are not waited for; ``host`` is how long, on a device with nothing to do, the
    host is busy issuing them (or, where the provider makes it wait, waiting).

    Args:
        loss: the provider.
        sets: inputs; they take turns too, so that the last-level cache holds none of them.
        precision: their dtypes.
        upstream: the gradients of the losses that come back.
    """

    def __init__(
        self,
        loss: Callable[[Inputs], Sequence[Tensor]],
        sets: Sequence[Inputs],
        precision: Precision,
        upstream: Sequence[Tensor],
    ) -> None:
        self.loss, self.sets, self.upstream = loss, sets, upstream
        self.precision, self.device = precision, sets[0].student.device

    def run(self, inputs: Inputs, between: Callable[[], Any] = lambda: None) -> None:
        """Run forward, ``between`` and backward once."""
        with self.precision.context(self.device):
            losses = self.loss(inputs)
        between()
        torch.autograd.grad(losses, inputs.trained, self.upstream)

    def __call__(self, number: int) -> dict[str, float]:
        """Take a turn."""
        inputs = self.sets[number % len(self.sets)]
        return self._on_gpu(inputs) if self.device.type == "cuda" else self._on_cpu(inputs)

    def _on_cpu(self, inputs: Inputs) -> dict[str, float]:
        marks = [time.perf_counter()]
        self.run(inputs, lambda: marks.append(time.perf_counter()))
        end = time.perf_counter()
        begin, middle = marks
        return {"forward": middle - begin, "backward": end - middle, "both": end - begin}

    def _on_gpu(self, inputs: Inputs) -> dict[str, float]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.run(inputs)
        host = time.perf_counter() - start
        begin, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        # The device has more to do than the host needs for the launches.
        torch.cuda._sleep(int(min(MOST_QUEUED, 1.5 * host) * QUEUE_HZ))
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


class CallTurn:
    """A turn of something that is timed as a whole: the ceilings.

    Args:
        call: what is timed.
        device: whose time.
    """

    def __init__(self, call: Callable[[], Any], device: torch.device) -> None:
        self.call, self.device = call, device

    def __call__(self, number: int) -> dict[str, float]:
        """Take a turn."""
        if self.device.type != "cuda":
            begin = time.perf_counter()
            self.call()
            return {"both": time.perf_counter() - begin}
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(2e-4 * QUEUE_HZ))
        first.record()
        self.call()
        last.record()
        last.synchronize()
        return {"both": 1e-3 * first.elapsed_time(last)}


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and minimum of two or more times, in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4)
    return {
        "median": 1e3 * statistics.median(seconds),
        "low": 1e3 * low,
        "high": 1e3 * high,
        "fastest": 1e3 * min(seconds),
    }


def ratio(base: Sequence[float], seconds: Sequence[float]) -> float:
    """Return how many times as fast as the base: the median of the ratios within the rounds."""
    return statistics.median(a / b for a, b in zip(base, seconds, strict=True))
