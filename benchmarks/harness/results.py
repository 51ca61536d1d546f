"""Results file of a run: JSON, versioned by ``schema``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 1
DIGITS = 5


def empty(setting: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Return the empty results of a run.

    Args:
        setting: machine and versions; see :func:`machine.environment`.
        quick: whether ``--quick`` was given: tiny sizes.

    Returns:
        ``schema``, ``quick``, ``setting``, ``losses`` (see :func:`comparison.compare`), ``steps``
        (see :func:`steps.run`; empty: not measured), ``startup``, ``unavailable`` (provider to
        reason) and ``left_out`` (reason to the names of measurements).
    """
    return {
        "schema": SCHEMA,
        "quick": quick,
        "setting": setting,
        "losses": [],
        "steps": {},
        "startup": {},
        "unavailable": {},
        "left_out": {},
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def write(path: Path, run: dict[str, Any]) -> None:
    """Write results atomically, with five significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = path.with_name(f"{path.name}.{os.getpid()}")
    tmp_path.write_text(json.dumps(_rounded(run), indent=1) + "\n", encoding="utf-8")
    tmp_path.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Read results.

    Raises:
        ValueError: the file is not JSON, or its schema is another version.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    schema = run.get("schema") if isinstance(run, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema: got {schema!r}, expected {SCHEMA}")
    return run
