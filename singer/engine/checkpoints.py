"""Checkpoints on disk: written atomically, verified by checksums.

A checkpoint is a directory of safetensors files and a ``state.json`` that holds their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from singer.errors import SingerError
from singer.io import atomic_write

_logger = logging.getLogger("singer")

_STATE = "state.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        step: number of completed optimiser steps.
        tensors: file name without its ending to named tensors.
        state: everything else, in JSON's types.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


class CorruptCheckpointError(Exception):
    """A file of a checkpoint is missing, truncated or altered."""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


class CheckpointStore:
    """The checkpoints of one run: directories named ``step-N``.

    Args:
        folder: their parent directory; created with the first one.
        keep: number of newest checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending; none is read."""
        if not self.folder.is_dir():
            return []
        matches = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Return the directory of a step's checkpoint, whether or not it exists."""
        return self.folder / f"step-{step:09d}"

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then remove old ones.

        Args:
            checkpoint: what to write; tensors may be on any device.

        Returns:
            Its directory.

        Raises:
            SingerError: it can't be written; earlier ones are untouched.
        """
        final = self.path(checkpoint.step)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_stale_tmp()
            with atomic_write(final) as tmp_path:  # it replaces a corrupt one
                tmp_path.mkdir()
                self._write_content(tmp_path, checkpoint)
        except OSError as error:
            kept = [step for step in self.steps() if step < checkpoint.step]
            earlier = f"that of step {kept[-1]} is untouched" if kept else "there is none yet"
            raise SingerError(
                f"output: the checkpoint {final} can't be written: {error.strerror or error}; "
                f"{earlier}"
            ) from error
        self._remove_old(checkpoint.step)
        return final

    def _write_content(self, folder: Path, checkpoint: Checkpoint) -> None:
        digests = {}
        for name, tensors in checkpoint.tensors.items():
            on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            content = save(on_cpu, metadata={"format": "pt"})
            file_name = f"{name}.safetensors"
            digests[file_name] = _digest(content)
            (folder / file_name).write_bytes(content)
        body = {"step": checkpoint.step, "files": digests, "state": checkpoint.state}
        whole = {"sha256": _digest(_canonical(body)), **body}
        (folder / _STATE).write_text(json.dumps(whole, indent=1, allow_nan=False))

    def _remove_stale_tmp(self) -> None:
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self, newest: int) -> None:
        """Keep the last ones up to ``newest``; later ones are corrupt, or their run was redone."""
        steps = self.steps()
        kept = [step for step in steps if step <= newest][-self.keep :]
        for step in steps:
            if step not in kept:
                # Rename first: a partly removed directory must not look like a checkpoint.
                hidden = self.folder / f".{self.path(step).name}.removed"
                try:
                    os.rename(self.path(step), hidden)
                except OSError as error:
                    _logger.warning("%s can't be removed: %s", self.path(step), error)
        self._remove_stale_tmp()

    def newest(self) -> Checkpoint | None:
        """Read the newest intact checkpoint; corrupt ones are named in the log.

        Returns:
            The checkpoint, on the CPU; None if there is none.

        Raises:
            SingerError: all of them are corrupt.
        """
        corrupt = []
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except CorruptCheckpointError as error:
                corrupt.append(str(error))
                _logger.warning("%s; it is passed over", error)
        if corrupt:
            raise SingerError(
                f"output: no checkpoint can be used: {'; '.join(corrupt)}; start anew in another "
                f"folder"
            )
        return None

    def read(self, step: int) -> Checkpoint:
        """Read and verify the checkpoint of a step.

        Raises:
            CorruptCheckpointError: a file is missing, truncated or altered; the message names it.
        """
        folder = self.path(step)
        whole = self._read_state(folder / _STATE)
        if whole["step"] != step:
            raise CorruptCheckpointError(f"{folder} holds the checkpoint of step {whole['step']}")
        tensors = {}
        for name, digest in whole["files"].items():
            path = folder / name
            content = self._read_file(path)
            if _digest(content) != digest:
                raise CorruptCheckpointError(
                    f"{path} is truncated or altered (its SHA-256 differs)"
                )
            try:
                tensors[path.stem] = load(content)
            except SafetensorError as error:
                raise CorruptCheckpointError(f"{path} is no safetensors file ({error})") from error
        return Checkpoint(whole["step"], tensors, whole["state"])

    def _read_state(self, path: Path) -> Mapping[str, Any]:
        try:
            whole = json.loads(self._read_file(path))
            body = {key: whole[key] for key in ("step", "files", "state")}
            intact = whole["sha256"] == _digest(_canonical(body))
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise CorruptCheckpointError(f"{path} is truncated or altered (its SHA-256 differs)")
        return whole

    def _read_file(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise CorruptCheckpointError(
                f"{path} can't be read ({error.strerror or error})"
            ) from error
