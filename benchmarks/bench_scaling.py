"""Benchmark how the losses scale with the number of patches and with the width.

``compiled`` and ``compiled-max`` are left out: every size would be compiled separately.
"""

from __future__ import annotations

from typing import Any

import pytest
from harness.providers import NAMES
from harness.replay import replays
from harness.workloads import Case, sweeps

cases = sweeps


@replays
@pytest.mark.parametrize("provider", [name for name in NAMES if not name.startswith("compiled")])
def test_scaling(measure_losses: Any, case: Case, provider: str) -> None:
    """Compare a provider with the others."""
    measure_losses(case, provider)
