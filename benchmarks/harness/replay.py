"""Hands pytest-benchmark times that were measured elsewhere.

The plugin times one thing after the other; ours take turns. So its timer is a clock that stands
still, but for what each round is said to have taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest


class _Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


_clock = _Clock()


def replayed_time() -> float:
    """Return the time of the clock that stands still."""
    return _clock()


replays = pytest.mark.benchmark(timer=replayed_time)
"""Marks the tests whose times are replayed."""


def replay(benchmark: Any, seconds: Sequence[float], more: Mapping[str, Any]) -> None:
    """Report times as a test's own.

    Args:
        benchmark: the plugin's fixture, in a test that :data:`replays` marks.
        seconds: what each round took.
        more: what else goes into the plugin's JSON, as ``extra_info``.
    """
    benchmark.extra_info.update(more)
    rounds = iter(seconds)
    benchmark.pedantic(lambda: _clock.advance(next(rounds)), rounds=len(seconds))
