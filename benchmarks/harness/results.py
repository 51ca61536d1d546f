"""The file of a run's results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 1
DIGITS = 5


def empty(setting: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Return the results of a run that has measured nothing yet.

    Args:
        setting: the machine; see :func:`machine.environment`.
        quick: whether the sizes are tiny.

    Returns:
        ``schema``, ``quick``, ``setting``, ``losses`` (see :func:`comparison.compare`), ``steps``
        (see :func:`steps.run`; empty: not measured), ``startup``, ``unavailable`` (provider to
        reason) and ``left_out`` (reason to what was).
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


def write(path: Path, found: dict[str, Any]) -> None:
    """Write results, or leave the file as it was. Numbers carry five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(_rounded(found), indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def read(path: Path) -> dict[str, Any]:
    """Read results.

    Raises:
        ValueError: the file holds something else, or another version of it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: schema: got {schema!r}, expected {SCHEMA}")
    return found
