"""A run of the benchmarks: its device, its time, and what it has measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import results
from harness.comparison import Effort, compare
from harness.machine import environment, slug
from harness.workloads import Point

LIMITS = {"cpu": 290, "cuda": 350}  # seconds
EFFORT = {"cpu": Effort(1.5), "cuda": Effort(0.7, least=10, most=200)}
QUICK = Effort(0.0, least=2)


class Session:
    """A run of the benchmarks: what was measured, and how much time is left.

    Args:
        config: pytest's.
    """

    def __init__(self, config: pytest.Config) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(config.getoption("--device") or default)
        self.quick: bool = config.getoption("--quick")
        self.effort = QUICK if self.quick else EFFORT[self.device.type]
        self.begin = time.monotonic()
        limit = config.getoption("--time-limit")
        self.limit = LIMITS[self.device.type] if limit is None else limit
        path: Path | None = config.getoption("--results")
        if path is not None and path.suffix != ".json":
            path = path / f"{slug(self.device)}.json"
        self.path = path
        self.found = results.empty(environment(self.device), self.quick)
        self._losses: dict[str, tuple[dict[str, Any], dict[str, list[float]]]] = {}

    def require_time(self, what: str) -> None:
        """Skip the test if the time for measuring is over; ``what`` is noted as left out."""
        if time.monotonic() - self.begin > self.limit:
            reason = f"no time left within {self.limit:g} s"
            left = self.found["left_out"].setdefault(reason, [])
            if what not in left:
                left.append(what)
            pytest.skip(reason)

    def losses(
        self, point: Point, names: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """Return the comparison of a point, measured once: see :func:`comparison.compare`."""
        key = f"{point.series}/{point.label}"
        if key not in self._losses:
            self.require_time(key)
            self._losses[key] = compare(point, names, self.device, self.effort)
            self.found["losses"].append(self._losses[key][0])
            self.save()
        return self._losses[key]

    def save(self) -> None:
        """Write what was measured so far, if a path was given."""
        self.found["seconds"] = time.monotonic() - self.begin
        if self.path is not None:
            results.write(self.path, self.found)
