"""Differences between two configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from singer.config.schema import Config


def differences(before: Config, after: Config) -> list[str]:
    """Return what differs between two configurations but ``output``: ``key: old → new``."""
    old, new = _flat(before.model_dump(mode="json")), _flat(after.model_dump(mode="json"))
    keys = [key for key in {**old, **new} if key != "output"]
    return [
        f"{key}: {old.get(key)} → {new.get(key)}"
        for key in keys
        if key not in old or key not in new or old[key] != new[key]
    ]


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        return {key: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat.update(_flat(inner, f"{key}.{name}" if key else str(name)))
    return flat
