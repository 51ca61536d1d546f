"""Measuring configurations instead of taking the table's: ``SINGER_AUTOTUNE=1``.

The first call of each kernel, size and device tries the table's configuration and others around it
and keeps the fastest, in memory and in a file: ``SINGER_AUTOTUNE_CACHE``, or
``singer_kernels/autotune.json`` in the user's cache folder. Another configuration sums in another
order: results may differ in their last bits between machines, but not between calls that find the
same file.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from singer_kernels.backends.triton.configs import Config

_logger = logging.getLogger("singer_kernels")
_chosen: dict[str, Config] = {}
_Result = TypeVar("_Result")

SWITCH, CACHE = "SINGER_AUTOTUNE", "SINGER_AUTOTUNE_CACHE"

ROWS, INNER, WARPS, STAGES = (16, 32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
"""What is tried, in every combination."""


def is_on() -> bool:
    """Whether the environment asks for it."""
    return os.environ.get(SWITCH, "0").lower() in ("1", "true", "yes", "on")


def cache_file() -> Path:
    """Return the file that choices are kept in."""
    given = os.environ.get(CACHE)
    if given:
        return Path(given)
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "singer_kernels" / "autotune.json"


def _read(path: Path) -> dict[str, Config]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: Config(*values) for key, values in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        _logger.warning(
            "%s is no file of tuned configurations (%s): it is written anew", path, error
        )
        return {}


def _write(path: Path, chosen: dict[str, Config]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(chosen, file, indent=1, sort_keys=True)
    os.replace(name, path)


def candidates(first: Config) -> Iterator[Config]:
    """Yield the table's configuration, then the others."""
    yield first
    for values in itertools.product(ROWS, INNER, WARPS, STAGES):
        config = Config(*values)
        if config != first:
            yield config


def _milliseconds(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=30))


def _fastest(
    first: Config,
    launch: Callable[[Config], object],
    measure: Callable[[Callable[[], object]], float],
) -> Config:
    from triton.runtime.errors import OutOfResources, PTXASError

    times: dict[Config, float] = {}
    for config in candidates(first):
        try:
            times[config] = measure(functools.partial(launch, config))
        except (OutOfResources, PTXASError):  # it does not fit on this device
            continue
    return min(times, key=lambda config: times[config])


def run_tuned(
    kernel: str,
    first: Config,
    launch: Callable[[Config], _Result],
    key: tuple[object, ...],
    measure: Callable[[Callable[[], object]], float] = _milliseconds,
) -> _Result:
    """Run a stage with the fastest configuration for its key, which is measured if not known.

    Args:
        kernel: its key of ``configs.TABLE``.
        first: the table's configuration.
        launch: runs the stage with a configuration.
        key: what the choice depends on: device, versions, dtypes, sizes.
        measure: returns the time of a call.

    Returns:
        What ``launch`` does. While a CUDA graph is captured nothing is measured: what is not
        known yet runs as the table has it.
    """
    name = " ".join(map(str, (kernel, *key)))
    if name not in _chosen:
        _chosen.update(_read(cache_file()))
    if name not in _chosen:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return launch(first)
        _chosen[name] = _fastest(first, launch, measure)
        _logger.info("%s: %s is the fastest", name, _chosen[name])
        path = cache_file()
        _write(path, {**_read(path), name: _chosen[name]})
    return launch(_chosen[name])
