"""Benchmark the losses of one layer, forward and backward, in every precision."""

from __future__ import annotations

from typing import Any

import pytest
from harness.providers import NAMES
from harness.replay import replays
from harness.workloads import Case, workloads

cases = workloads


@replays
@pytest.mark.parametrize("provider", NAMES)
def test_losses(measure_losses: Any, case: Case, provider: str) -> None:
    """Compare a provider with the others."""
    measure_losses(case, provider)
