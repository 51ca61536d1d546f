"""Checkpoints on disk: all that a run needs to go on, and no way to lose it half-way.

A checkpoint is a folder of safetensors files and a ``state.json`` that holds the SHA-256 of each.
It is written aside, flushed to the disk, and renamed: it is there whole, or not at all.
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

_logger = logging.getLogger("singer")

_STATE = "state.json"
_NAME = re.compile(r"step-(\d+)")


@dataclass
class Checkpoint:
    """What is saved.

    Attributes:
        step: optimiser steps done.
        tensors: file name without its ending to named tensors.
        state: everything else, as JSON can hold it.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


class DamagedError(Exception):
    """A checkpoint is not what was written."""


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False).encode()


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make renames inside a folder last, where the system can (Windows can't)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class CheckpointStore:
    """The checkpoints of one run: ``step-N`` folders.

    Args:
        folder: where they are; it is made with the first one.
        keep: how many of the last ones stay.
    """

    def __init__(self, folder: Path, keep: int = 3) -> None:
        self.folder = folder
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the steps of which a checkpoint is there, ascending; none of them is read."""
        if not self.folder.is_dir():
            return []
        matches = [_NAME.fullmatch(path.name) for path in self.folder.iterdir()]
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:09d}"

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then remove those that are no longer kept.

        Args:
            checkpoint: what to write; tensors may be on any device.

        Returns:
            Its folder.

        Raises:
            SingerError: it can't be written; the earlier ones are untouched then.
        """
        final = self.path(checkpoint.step)
        aside = self.folder / f".{final.name}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_leftovers()
            aside.mkdir()
            self._write_content(aside, checkpoint)
            _sync_folder(aside)
            if final.exists():  # one that was damaged: its run went on from an earlier one
                os.rename(final, self.folder / f".{final.name}.replaced")
            os.rename(aside, final)
            _sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
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
            _write(folder / file_name, content)
        body = {"step": checkpoint.step, "files": digests, "state": checkpoint.state}
        whole = {"sha256": _digest(_canonical(body)), **body}
        _write(folder / _STATE, json.dumps(whole, indent=1, allow_nan=False).encode())

    def _remove_leftovers(self) -> None:
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self, newest: int) -> None:
        """Keep the last ones up to ``newest``; later ones were damaged, or their run was redone."""
        steps = self.steps()
        kept = [step for step in steps if step <= newest][-self.keep :]
        for step in steps:
            if step not in kept:
                # Out of sight first: what is half removed must not look like a checkpoint.
                hidden = self.folder / f".{self.path(step).name}.removed"
                try:
                    os.rename(self.path(step), hidden)
                except OSError as error:
                    _logger.warning("%s can't be removed: %s", self.path(step), error)
        self._remove_leftovers()

    def newest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole; name those that are not in the log.

        Returns:
            The checkpoint, on the CPU; None if there is none at all.

        Raises:
            SingerError: there are some, and all are damaged.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                return self.read(step)
            except DamagedError as error:
                damaged.append(str(error))
                _logger.warning("%s; it is passed over", error)
        if damaged:
            raise SingerError(
                f"output: no checkpoint can be used: {'; '.join(damaged)}; start anew in another "
                f"folder"
            )
        return None

    def read(self, step: int) -> Checkpoint:
        """Read and verify the checkpoint of a step.

        Raises:
            DamagedError: a file is missing, truncated or altered; the message names it.
        """
        folder = self.path(step)
        whole = self._read_state(folder / _STATE)
        if whole["step"] != step:
            raise DamagedError(f"{folder} holds the checkpoint of step {whole['step']}")
        tensors = {}
        for name, digest in whole["files"].items():
            path = folder / name
            content = self._read_file(path)
            if _digest(content) != digest:
                raise DamagedError(f"{path} is truncated or altered (its SHA-256 differs)")
            try:
                tensors[path.stem] = load(content)
            except SafetensorError as error:
                raise DamagedError(f"{path} is no safetensors file ({error})") from error
        return Checkpoint(whole["step"], tensors, whole["state"])

    def _read_state(self, path: Path) -> Mapping[str, Any]:
        try:
            whole = json.loads(self._read_file(path))
            body = {key: whole[key] for key in ("step", "files", "state")}
            intact = whole["sha256"] == _digest(_canonical(body))
        except (ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            raise DamagedError(f"{path} is truncated or altered (its SHA-256 differs)")
        return whole

    def _read_file(self, path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise DamagedError(f"{path} can't be read ({error.strerror or error})") from error
