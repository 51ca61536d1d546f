"""The losses of one layer, forward and backward: the workloads, in every precision."""

from __future__ import annotations

from typing import Any

import pytest
from harness.providers import NAMES
from harness.replay import replays
from harness.workloads import Point, workloads

points = workloads


@replays
@pytest.mark.parametrize("provider", NAMES)
def test_losses(measure_losses: Any, point: Point, provider: str) -> None:
    """Measure a provider beside all others."""
    measure_losses(point, provider)
