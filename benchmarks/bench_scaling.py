"""How the losses' cost grows with the number of patches and with the width.

What is compiled is left out: it would be compiled anew for every size.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness.providers import NAMES
from harness.replay import replays
from harness.workloads import Point, sweeps

points = sweeps


@replays
@pytest.mark.parametrize("provider", [name for name in NAMES if not name.startswith("compiled")])
def test_scaling(measure_losses: Any, point: Point, provider: str) -> None:
    """Measure a provider beside all others."""
    measure_losses(point, provider)
