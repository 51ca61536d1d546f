"""Report interleaved timings through pytest-benchmark.

The plugin measures one function after the other; the harness interleaves providers. So the plugin
gets a fake timer, which each round advances by the seconds that were measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest


class _Clock:
    """Fake timer."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


_clock = _Clock()


def replayed_time() -> float:
    """Return the time of the fake timer."""
    return _clock()


replays = pytest.mark.benchmark(timer=replayed_time)
"""Mark of the tests that report measured times with :func:`replay`."""


def replay(benchmark: Any, seconds: Sequence[float], extra_info: Mapping[str, Any]) -> None:
    """Report measured times as those of a test.

    Args:
        benchmark: the plugin's fixture, in a test marked :data:`replays`.
        seconds: of each round.
        extra_info: further entries of the plugin's JSON.
    """
    benchmark.extra_info.update(extra_info)
    rounds = iter(seconds)
    benchmark.pedantic(lambda: _clock.advance(next(rounds)), rounds=len(seconds))
