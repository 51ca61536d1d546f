"""Benchmark start-up: imports and each backend's first call, in fresh processes.

``cold`` starts with an empty kernel cache, ``warm`` with the cache that ``cold`` filled; a backend
without run-time compilation has ``warm`` only. The operating system's file cache is not cleared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness.providers import BACKENDS, unavailable_reason
from harness.replay import replay, replays
from harness.session import Session

import singer_kernels

COMPILED_AT_RUN_TIME = ("triton",)
STARTS = {"cold": 1, "warm": 2}
TIMEOUT = 120  # seconds, of one start
SCRIPT = Path(__file__).parent / "harness" / "startup.py"


def _start(backend: str, device: str, cache: Path) -> dict[str, float]:
    # The child imports the same copy of the package as this process.
    package = str(Path(singer_kernels.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, str(SCRIPT), backend, "--device", device]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"{backend}: a start had not ended after {TIMEOUT} s", pytrace=False)
    if done.returncode != 0:
        pytest.fail(f"{backend}: a start failed:\n{done.stderr}", pytrace=False)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for the kernel caches of the backends."""
    return tmp_path_factory.mktemp("caches")


@replays
@pytest.mark.parametrize("state", list(STARTS))
@pytest.mark.parametrize("backend", BACKENDS)
def test_first_call(
    session: Session, caches: Path, backend: str, state: str, benchmark: Any
) -> None:
    """Measure a backend's imports, first and second call."""
    reason = unavailable_reason(backend, session.device)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    if state == "cold" and backend not in COMPILED_AT_RUN_TIME:
        pytest.skip("it compiles nothing at its first call: only warm")
    session.skip_if_out_of_time(f"start-up of {backend}")
    starts = [
        _start(backend, session.device.type, caches / backend)
        for _ in range(1 if session.quick else STARTS[state])
    ]
    medians = {name: statistics.median(start[name] for start in starts) for name in starts[0]}
    session.results["startup"].setdefault(backend, {})[state] = medians
    session.save()
    benchmark.group = f"start-up: first call, {state}"
    replay(benchmark, [start["first_call"] for start in starts], medians)
