"""Autotuning (``SINGER_AUTOTUNE=1``): measured configurations instead of the fixed table's.

The first call of each kernel, size and device measures the table's configuration and a grid of
others, the most similar first, and caches the fastest in memory and in a file:
``SINGER_AUTOTUNE_CACHE``, or ``singer_kernels/autotune.json`` in the user's cache directory. After
``SINGER_AUTOTUNE_SECONDS`` (60) for one kernel and size no further one is begun; one that can't be
compiled or launched is left out. A configuration sets the order of sums: results may differ in
their last bits between cache files, not between calls with one file.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from singer_kernels.backends.triton.configs import Config

_logger = logging.getLogger("singer_kernels")
_cached: dict[str, Config] = {}
_Result = TypeVar("_Result")

SWITCH, CACHE = "SINGER_AUTOTUNE", "SINGER_AUTOTUNE_CACHE"
SECONDS, DEFAULT_SECONDS = "SINGER_AUTOTUNE_SECONDS", 60.0

ROWS, INNER, WARPS, STAGES = (16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
"""Grid of candidate configurations."""


def is_on() -> bool:
    """Whether ``SINGER_AUTOTUNE`` is set."""
    return os.environ.get(SWITCH, "0").lower() in ("1", "true", "yes", "on")


def seconds() -> float:
    """Return the time after which no further candidate of a kernel and size is measured.

    Raises:
        ValueError: the variable holds no number of seconds.
    """
    text = os.environ.get(SECONDS) or str(DEFAULT_SECONDS)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not limit >= 0:
        raise ValueError(f"{SECONDS}: got {text!r}, expected a number of seconds, 0 or more")
    return limit


def cache_file() -> Path:
    """Return the path of the cache file."""
    path = os.environ.get(CACHE)
    if path:
        return Path(path)
    directory = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(directory) / "singer_kernels" / "autotune.json"


def _read(path: Path) -> dict[str, Config]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {key: Config(*values) for key, values in entries.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        _logger.warning(
            "%s is no file of tuned configurations (%s): it is written anew", path, error
        )
        return {}


def _write(path: Path, entries: dict[str, Config]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(entries, file, indent=1, sort_keys=True)
    os.replace(name, path)


def candidates(first: Config) -> Iterator[Config]:
    """Yield the table's configuration, then the rest of the grid, the most similar first."""

    def distance(config: Config) -> float:
        pairs = zip(config[:4], first[:4], strict=True)
        return sum(abs(math.log2(number / own)) for number, own in pairs)

    yield first
    grid = (Config(*values) for values in itertools.product(ROWS, INNER, WARPS, STAGES))
    yield from sorted((config for config in grid if config != first), key=distance)


def _milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=30))


def _fastest(
    first: Config,
    launch: Callable[[Config], object],
    measure: Callable[[Callable[[], object]], float],
) -> Config:
    end = time.monotonic() + seconds()
    times: dict[Config, float] = {}
    failures: list[Exception] = []
    for config in candidates(first):
        if times and time.monotonic() >= end:
            break
        try:
            times[config] = measure(functools.partial(launch, config))
        except torch.OutOfMemoryError:  # of the moment, not of the configuration
            raise
        except Exception as error:  # the compiler's, ptxas' and the driver's have no common type
            _logger.debug("%s can't run: %s", config, error)
            failures.append(error)
    if not times:
        raise failures[0]
    _logger.info("measured %d configurations, %d can't run", len(times), len(failures))
    return min(times, key=lambda config: times[config])


def run_tuned(
    kernel: str,
    first: Config,
    launch: Callable[[Config], _Result],
    key: tuple[object, ...],
    measure: Callable[[Callable[[], object]], float] = _milliseconds,
) -> _Result:
    """Run a stage with the fastest configuration for its key; measure it if it is not cached.

    Args:
        kernel: a key of ``configs.TABLE``.
        first: the table's configuration.
        launch: runs the stage with a configuration.
        key: device, versions, dtypes and sizes that the choice depends on.
        measure: returns the time of a call.

    Raises:
        ValueError: ``SINGER_AUTOTUNE_SECONDS`` holds no number of seconds.
        Exception: no configuration can run; the error of the table's.

    Returns:
        The result of ``launch``. During the capture of a CUDA graph nothing is measured: a key
        that is not cached runs with the table's configuration.
    """
    name = " ".join(map(str, (kernel, *key)))
    if name not in _cached:
        _cached.update(_read(cache_file()))
    if name not in _cached:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return launch(first)
        _cached[name] = _fastest(first, launch, measure)
        _logger.info("%s: %s is the fastest", name, _cached[name])
        path = cache_file()
        _write(path, {**_read(path), name: _cached[name]})
    return launch(_cached[name])
