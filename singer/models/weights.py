"""Checkpoints of models: reading, and the prefix of a model's keys."""

from __future__ import annotations

import argparse
import logging
import re
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from singer.errors import SingerError

_logger = logging.getLogger("singer")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; of a training state, the part that timm takes."""
    if path.suffix == ".safetensors":
        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's arguments
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    for part in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(checkpoint.get(part), Mapping):
            return checkpoint[part]
    return checkpoint


def _flat(values: Mapping[str, Any], parents: str = "") -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{parents}{name}."))
        elif isinstance(value, Tensor):
            flat[f"{parents}{name}"] = value
    return flat


def without_prefix(
    state: Mapping[str, Any], expected: Container[str], least: float, key: str, prefix: str | None
) -> dict[str, Any]:
    """Return the entries under the one prefix that the model's keys have, without it.

    Args:
        state: a checkpoint; mappings in it, as DINO's, are prefixes, too.
        expected: the model's keys.
        least: number of them that must be there.
        key: the configuration key, for messages.
        prefix: to take, where several match; None: the only one.

    Raises:
        SingerError: several prefixes match, and none is chosen; or the chosen one does not match.
    """
    flat = _flat(state)
    counts = Counter(
        name[:start]
        for name in flat
        for start in (0, *(match.end() for match in re.finditer(r"\.", name)))
        if name[start:] in expected
    )
    matching = sorted(found for found, count in counts.items() if count >= least)
    if prefix is not None:
        chosen = f"{prefix.removesuffix('.')}." if prefix else ""
        if chosen not in matching:
            known = ", ".join(map(repr, matching)) or "none, for none matches the model's keys"
            raise SingerError(f"{key}.weights_prefix: got {prefix!r}, expected {known}")
    elif len(matching) > 1:
        raise SingerError(
            f"{key}.weights: several models are in it, under {' and '.join(map(repr, matching))}; "
            f"set {key}.weights_prefix to one of them"
        )
    elif not matching:
        return timm.models.clean_state_dict(state)  # timm may know the layout
    else:
        (chosen,) = matching
    if chosen:
        _logger.info("%s.weights: taking the prefix %r off the keys", key, chosen)
    others = tuple(found for found in matching if len(found) > len(chosen))
    return {
        name.removeprefix(chosen): value
        for name, value in flat.items()
        if name.startswith(chosen) and not name.startswith(others)
    }
