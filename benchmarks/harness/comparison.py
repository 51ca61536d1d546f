"""One comparison: all providers of the losses on one workload, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from harness.ceilings import Ceiling, ceilings, floor_seconds
from harness.machine import cache_bytes
from harness.memory import held_for_backward, peak_rise
from harness.oracle import Oracle, upstream_of
from harness.providers import Loss, build
from harness.timing import PassTurn, Turn, interleave, ratio, rounds_within, spread
from harness.workloads import PHASES, Inputs, Point, least_cost, make_inputs

MIB = 2**20
MOST_SETS = 8
BASES = ("eager", "compiled")  # what ratios are taken to


class Effort(NamedTuple):
    """How long a comparison may measure, and within which number of rounds."""

    seconds: float
    least: int = 5
    most: int = 60


def input_sets(point: Point, device: torch.device) -> list[Inputs]:
    """Return different inputs, so many that the last-level cache can't hold what is read next."""
    first = make_inputs(point.workload, point.precision, device)
    # A set comes back after all others: together they are twice the cache.
    wanted = 1 + math.ceil(2 * cache_bytes(device) / first.nbytes)
    count = max(2, min(MOST_SETS, wanted))
    rest = (make_inputs(point.workload, point.precision, device, seed) for seed in range(1, count))
    return [first, *rest]


class _Contender:
    """A provider that was found right, ready to be timed."""

    def __init__(self, loss: Loss, sets: Sequence[Inputs], point: Point) -> None:
        with point.precision.context(sets[0].student.device):
            losses = loss(sets[0])
        self.held = held_for_backward(losses, sets[0])
        self.turn = PassTurn(loss, sets, point.precision, upstream_of(losses))
        del losses
        self.turn(0)
        self.peak = peak_rise(lambda: self.turn.run(sets[0]), sets[0].student.device)


def _summarize_ceilings(
    given: dict[str, Ceiling], times: dict[str, list[dict[str, float]]]
) -> dict[str, float]:
    # Nothing makes a machine faster than it is: the fastest time says what it can do.
    fastest = {name: min(row["both"] for row in times[name]) for name in given}
    operations = [c.cost.operations / fastest[name] for name, c in given.items()]
    return {
        "bytes_per_second": given["copy"].cost.bytes / fastest["copy"],
        "operations_per_second": max(operations),
    }


def compare(
    point: Point, names: Sequence[str], device: torch.device, effort: Effort
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Check, measure and summarize.

    Args:
        point: what to compute.
        names: the providers; what a ratio is taken to should be among them.
        device: where.
        effort: how long.

    Returns:
        The comparison as it goes into the results, and each timed provider's seconds of a forward
        and backward pass in every round. A provider's ``status`` is ``timed``, ``wrong``,
        ``failed`` or ``out of memory``, the last three with a ``reason`` and without times.
    """
    torch.compiler.reset()  # what was compiled for other sizes
    sets = input_sets(point, device)
    oracle = Oracle(sets[0], point.precision)
    found: dict[str, dict[str, Any]] = {}
    contenders: dict[str, _Contender] = {}
    for name in names:
        entry: dict[str, Any] = {"status": "timed"}
        found[name] = entry
        try:
            loss = build(name)
            verdict = oracle.judge(name, loss)
            entry["errors"] = verdict.errors
            if verdict.is_right:
                contenders[name] = _Contender(loss, sets, point)
            else:
                entry |= {"status": "wrong", "reason": verdict.reason}
        except torch.cuda.OutOfMemoryError:
            entry |= {"status": "out of memory", "reason": "the device's memory was full"}
            torch.cuda.empty_cache()
        except Exception as error:  # reported as failed, and fails its test
            message = " ".join(f"{type(error).__name__}: {error}".split())
            entry |= {"status": "failed", "reason": message[:500]}
    del oracle

    limits = ceilings(point.precision, device)
    turns: dict[str, Turn] = {name: contender.turn for name, contender in contenders.items()}
    turns |= {f"ceiling-{name}": limit.turn for name, limit in limits.items()}
    rounds = rounds_within(turns, effort.seconds, effort.least, effort.most)
    times = interleave(turns, rounds)
    speed = _summarize_ceilings(limits, {name: times.pop(f"ceiling-{name}") for name in limits})
    floors = {phase: least_cost(point.workload, point.precision, phase) for phase in PHASES}
    seconds = {phase: floor_seconds(cost, *speed.values()) for phase, cost in floors.items()}
    seconds["both"] = seconds["forward"] + seconds["backward"]  # one does not hide the other
    for name, contender in contenders.items():
        of_phase = {phase: [row[phase] for row in times[name]] for phase in times[name][0]}
        entry = found[name]
        entry["milliseconds"] = {phase: spread(taken) for phase, taken in of_phase.items()}
        entry["ratio"] = {
            base: {
                phase: ratio([row[phase] for row in times[base]], of_phase[phase])
                for phase in PHASES
            }
            for base in BASES
            if base in times
        }
        entry["share_of_ceiling"] = {
            phase: 1e3 * seconds[phase] / entry["milliseconds"][phase]["median"] for phase in PHASES
        }
        entry["held_MiB"] = contender.held / MIB
        entry["peak_MiB"] = None if contender.peak is None else contender.peak / MIB
    record = {
        "series": point.series,
        "workload": point.workload._asdict(),
        "precision": point.precision.name,
        "rounds": rounds,
        "sets": len(sets),
        "inputs_MiB": sets[0].nbytes / MIB,
        "least": {phase: cost._asdict() for phase, cost in floors.items()},
        "ceilings": speed,
        "floor_milliseconds": {phase: 1e3 * value for phase, value in seconds.items()},
        "providers": found,
    }
    return record, {name: [row["both"] for row in rows] for name, rows in times.items()}
