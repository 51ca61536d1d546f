"""Read the configuration: YAML files and ``key=value`` overrides."""

from __future__ import annotations

import copy
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

from yaml import YAMLError

from singer.config.schema import Config, method_name, parse_config, section
from singer.config.yaml_text import Plain, dump_yaml, load_yaml, parse_override
from singer.errors import SingerError, one_line


@contextmanager
def _naming(what: object) -> Iterator[None]:
    """Turn an error of a file or of YAML into one line that names a file or override."""
    try:
        yield
    except OSError as error:
        raise SingerError(f"configuration: {what}: {error.strerror or error}") from error
    except (YAMLError, ValueError, TypeError) as error:
        raise SingerError(f"configuration: {what}: {one_line(error)}") from error


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return two mappings merged key by key; those given may be shared by YAML's aliases."""
    merged = dict(values)
    for key, value in changes.items():
        is_section = isinstance(merged.get(key), dict)
        if is_section and isinstance(value, list):
            raise TypeError(f"{key}: got {reprlib.repr(value)}, expected keys and values")
        both = is_section and isinstance(value, dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _index(key: str, entries: list[Any], path: str) -> int:
    if key.isdecimal() and int(key) < len(entries):
        return int(key)
    expected = f"an index from 0 to {len(entries) - 1}" if entries else "no index: it is empty"
    raise ValueError(f"{path}: got {key!r}, expected {expected}")


def _default(path: Sequence[str | int], method: str | None) -> Any:
    """Return the list at a path of keys that no file names, or an empty mapping."""
    field = section(path[:-1], method).model_fields.get(str(path[-1]))
    default = None if field is None else field.get_default(call_default_factory=True)
    return list(default) if isinstance(default, (list, tuple)) else {}


def _override(values: dict[str, Any], keys: Sequence[str], value: Plain) -> None:
    """Set the value at a dotted key, in place.

    Raises:
        ValueError: a list has no such entry.
    """
    container: Any = values
    path: list[str | int] = []
    for depth, key in enumerate(keys):
        is_list = isinstance(container, list)
        name = _index(key, container, ".".join(map(str, path))) if is_list else key
        path.append(name)
        inner = container[name] if is_list else container.get(name)
        if depth == len(keys) - 1:
            if isinstance(inner, dict) and isinstance(value.value, dict):
                container[name] = _merge(inner, value.value)
            else:
                container[name] = value
        else:
            inner = inner.value if isinstance(inner, Plain) else inner
            if not isinstance(inner, (dict, list)):
                inner = _default(path, method_name(values.get("method")))
            container[name] = container = copy.copy(inner)


def load_config(paths: str | Path | Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Read and merge YAML files, apply overrides, and check the result.

    Args:
        paths: one or several YAML files, merged key by key; later files override earlier ones.
        overrides: ``key=value``, with dotted keys: ``train.lr=3e-4``, ``method.layers=[17,23]``,
            ``students.0.weights=a.safetensors``. A text is taken as written, ``null`` included
            where the key can't be null; other values are read as YAML.

    Returns:
        The configuration.

    Raises:
        SingerError: a file can't be read, an override is malformed, or see :func:`parse_config`.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    merged: dict[str, Any] = {}
    for path in paths:
        with _naming(path), open(path, encoding="utf-8") as file:
            values = load_yaml(file)
            if not isinstance(values, (dict, NoneType)):
                raise TypeError("expected keys and values at the top level")
            merged = _merge(merged, values or {})
    for override in overrides:
        key, equals, value = override.partition("=")
        keys = key.split(".")
        if not equals or not all(keys):
            raise SingerError(f"configuration: got {override!r}, expected key=value")
        with _naming(repr(override)):
            _override(merged, keys, parse_override(value))
    return parse_config(merged)


def to_yaml(config: Config) -> str:
    """Return the whole configuration, defaults included, as YAML that :func:`load_config` reads."""
    return dump_yaml(config.model_dump(mode="json"))
