"""State of a benchmark run: device, time budget and results."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from harness import results
from harness.comparison import Budget, compare
from harness.machine import environment, slug
from harness.workloads import Case

TIME_LIMITS = {"cpu": 290, "cuda": 350}  # seconds
BUDGETS = {"cpu": Budget(1.5), "cuda": Budget(0.7, min_rounds=10, max_rounds=200)}
QUICK_BUDGET = Budget(0.0, min_rounds=2)


class Session:
    """Device, options, remaining time and results of a run of the benchmarks.

    Args:
        config: pytest's, with the options of ``conftest.py``.
    """

    def __init__(self, config: pytest.Config) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(config.getoption("--device") or default)
        self.quick: bool = config.getoption("--quick")
        self.budget = QUICK_BUDGET if self.quick else BUDGETS[self.device.type]
        self.begin = time.monotonic()
        limit = config.getoption("--time-limit")
        self.limit = TIME_LIMITS[self.device.type] if limit is None else limit
        path: Path | None = config.getoption("--results")
        if path is not None and path.suffix != ".json":
            path = path / f"{slug(self.device)}.json"
        self.path = path
        self.results = results.empty(environment(self.device), self.quick)
        self._losses: dict[str, tuple[dict[str, Any], dict[str, list[float]]]] = {}

    def skip_if_out_of_time(self, what: str) -> None:
        """Skip the test, and list ``what`` as left out, if the time limit has passed."""
        if time.monotonic() - self.begin > self.limit:
            reason = f"no time left within {self.limit:g} s"
            left = self.results["left_out"].setdefault(reason, [])
            if what not in left:
                left.append(what)
            pytest.skip(reason)

    def losses(
        self, case: Case, names: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, list[float]]]:
        """Return :func:`comparison.compare` of a case, measured at the first call only."""
        key = f"{case.series}/{case.label}"
        if key not in self._losses:
            self.skip_if_out_of_time(key)
            self._losses[key] = compare(case, names, self.device, self.budget)
            self.results["losses"].append(self._losses[key][0])
            self.save()
        return self._losses[key]

    def save(self) -> None:
        """Write the results so far, if a path was given."""
        self.results["seconds"] = time.monotonic() - self.begin
        if self.path is not None:
            results.write(self.path, self.results)
