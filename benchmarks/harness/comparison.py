"""Compare all providers of the losses on one case: check, time, measure memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from harness.machine import cache_bytes
from harness.memory import peak_memory_increase, saved_for_backward
from harness.oracle import Oracle, grad_outputs_for
from harness.providers import Loss, build
from harness.roofline import peak_rates, roofline_probes, roofline_seconds
from harness.timing import TimedPass, TimedRun, interleave, ratio, rounds_within, time_stats
from harness.workloads import PHASES, Case, Inputs, make_inputs, roofline_cost

MIB = 2**20
MAX_INPUT_SETS = 8
BASELINES = ("eager", "compiled")  # speed-ups are reported over these


class Budget(NamedTuple):
    """Time to spend on the timed rounds of a comparison, and bounds on their number."""

    seconds: float
    min_rounds: int = 5
    max_rounds: int = 60


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Return enough different inputs that the last-level cache can't hold the next set to read."""
    first = make_inputs(case.workload, case.precision, device)
    # A set is read again after all others, which together are twice the cache.
    wanted = 1 + math.ceil(2 * cache_bytes(device) / first.nbytes)
    count = max(2, min(MAX_INPUT_SETS, wanted))
    rest = (make_inputs(case.workload, case.precision, device, seed) for seed in range(1, count))
    return [first, *rest]


class _Candidate:
    """A provider that passed the accuracy check: its timed run and its memory in bytes."""

    def __init__(self, loss: Loss, sets: Sequence[Inputs], case: Case) -> None:
        with case.precision.context(sets[0].student.device):
            losses = loss(sets[0])
        self.saved = saved_for_backward(losses, sets[0])
        self.run = TimedPass(loss, sets, case.precision, grad_outputs_for(losses))
        del losses  # its graph would add to the peak
        self.run(0)  # warm up: the first call also allocates workspaces
        self.peak = peak_memory_increase(lambda: self.run.run(sets[0]), sets[0].student.device)


def compare(
    case: Case, names: Sequence[str], device: torch.device, budget: Budget
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Check, time and summarize the providers of one case.

    Args:
        case: sizes and dtypes.
        names: the providers; include the baselines of the ratios.
        device: the device to measure.
        budget: how long to measure.

    Returns:
        The record for the results file, and for each timed provider the seconds of forward and
        backward in every round. A provider's ``status`` is ``timed``, ``wrong``, ``failed`` or
        ``out of memory``; the last three come with a ``reason`` and without times.
    """
    torch.compiler.reset()  # drop what was compiled for other sizes
    sets = input_sets(case, device)
    oracle = Oracle(sets[0], case.precision)
    entries: dict[str, dict[str, Any]] = {}
    candidates: dict[str, _Candidate] = {}
    for name in names:
        entry: dict[str, Any] = {"status": "timed"}
        entries[name] = entry
        try:
            loss = build(name)
            accuracy = oracle.check(name, loss)
            entry["errors"] = accuracy.errors
            if accuracy.is_correct:
                candidates[name] = _Candidate(loss, sets, case)
            else:
                entry |= {"status": "wrong", "reason": accuracy.reason}
        except torch.cuda.OutOfMemoryError:
            entry |= {"status": "out of memory", "reason": "the device's memory was full"}
            torch.cuda.empty_cache()
        except Exception as error:  # reported as failed, and fails its test
            message = " ".join(f"{type(error).__name__}: {error}".split())
            entry |= {"status": "failed", "reason": message[:500]}
    del oracle  # its float64 results would stay in memory during the timing

    probes = roofline_probes(case.precision, device)
    runs: dict[str, TimedRun] = {name: candidate.run for name, candidate in candidates.items()}
    # The probes take part in the rounds: clock speed changes hit them and the providers alike.
    runs |= {f"probe-{name}": probe.run for name, probe in probes.items()}
    rounds = rounds_within(runs, budget.seconds, budget.min_rounds, budget.max_rounds)
    times = interleave(runs, rounds)
    rates = peak_rates(probes, {name: times.pop(f"probe-{name}") for name in probes})
    costs = {phase: roofline_cost(case.workload, case.precision, phase) for phase in PHASES}
    roofline = {phase: roofline_seconds(cost, *rates.values()) for phase, cost in costs.items()}
    # The phases run one after the other, so their times add: traffic of one can't overlap with
    # arithmetic of the other.
    roofline["both"] = roofline["forward"] + roofline["backward"]
    for name, candidate in candidates.items():
        of_phase = {phase: [row[phase] for row in times[name]] for phase in times[name][0]}
        entry = entries[name]
        entry["milliseconds"] = {phase: time_stats(taken) for phase, taken in of_phase.items()}
        entry["ratio"] = {
            base: {
                phase: ratio([row[phase] for row in times[base]], of_phase[phase])
                for phase in PHASES
            }
            for base in BASELINES
            if base in times
        }
        entry["fraction_of_roofline"] = {
            phase: 1e3 * roofline[phase] / entry["milliseconds"][phase]["median"]
            for phase in PHASES
        }
        entry["saved_MiB"] = candidate.saved / MIB
        entry["peak_MiB"] = None if candidate.peak is None else candidate.peak / MIB
    record = {
        "series": case.series,
        "workload": case.workload._asdict(),
        "precision": case.precision.name,
        "rounds": rounds,
        "sets": len(sets),
        "inputs_MiB": sets[0].nbytes / MIB,
        "roofline_cost": {phase: cost._asdict() for phase, cost in costs.items()},
        "peak_rates": rates,
        "roofline_milliseconds": {phase: 1e3 * value for phase, value in roofline.items()},
        "providers": entries,
    }
    return record, {name: [row["both"] for row in rows] for name, rows in times.items()}
