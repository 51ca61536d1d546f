"""The output directory of a run: its files, and how they are written."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from singer.errors import SingerError
from singer.io import atomic_write, stale_tmp, writing

_logger = logging.getLogger("singer")

CONFIG, METRICS, STUDENT = "config.yaml", "metrics.jsonl", "student.safetensors"
STUDENT_EMA = "student_ema.safetensors"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"


def check_new(path: str | Path, advice: str = "") -> Path:
    """Check that an output directory does not exist yet, and return it as a path.

    Args:
        path: the directory.
        advice: appended to the message if it exists.

    Raises:
        SingerError: it exists, or can't be created.
    """
    path = Path(path)
    with writing(path):
        exists = path.exists()
    if exists:
        raise SingerError(
            f"output: {str(path)!r} exists already and is left untouched; name another folder"
            f"{advice}"
        )
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SingerError(f"output: {str(path)!r} can't be made: {parent} is no writable folder")
    return path


class RunDir:
    """The directory of a run, or of one of its students.

    | file | content |
    |---|---|
    | ``config.yaml`` | the resolved configuration |
    | ``metrics.jsonl`` | a JSON object per step |
    | ``tensorboard/`` | the same, for TensorBoard |
    | ``student.safetensors`` | the student, under timm's keys |
    | ``student_ema.safetensors`` | its moving average, if there is one |
    | ``projections.safetensors``, ``adapters.safetensors`` | what else was trained |
    | ``spectrum.json`` | the singular values behind each adapter |
    | ``figures/`` | PNG figures |
    | ``checkpoints/`` | checkpoints to resume from, see :mod:`singer.engine.checkpoints` |

    Args:
        path: the directory; created if it does not exist.
        reopen: it may exist, as that of an interrupted run does.

    Raises:
        SingerError: it exists already, or can't be created.
    """

    def __init__(self, path: str | Path, *, reopen: bool = False) -> None:
        self.path = Path(path) if reopen else check_new(path)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        for tmp_path in stale_tmp(self.path):
            tmp_path.unlink()

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically, in UTF-8, and return its path."""
        return self._write(name, text.encode())

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file atomically and return its path."""
        return self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> Path:
        """Write a safetensors file atomically and return its path."""
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        # Not save_file: it ignores the umask and makes files that their owner alone can read.
        return self._write(name, save(on_cpu, metadata=dict(metadata)))

    def _write(self, name: str, content: bytes) -> Path:
        path = self.path / name
        with writing(path), atomic_write(path) as tmp_path:
            tmp_path.write_bytes(content)
        return path

    def append_metrics(self, records: list[dict[str, Any]]) -> None:
        """Append records to ``metrics.jsonl``, one JSON object per line; all of them or none."""
        path = self.path / METRICS
        content = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode()
        with writing(path), open(path, "ab", buffering=0) as file:
            before = file.tell()
            try:
                if file.write(content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(before)
                raise

    def sync_metrics(self) -> None:
        """Flush ``metrics.jsonl`` to the disk."""
        path = self.path / METRICS
        with writing(path), open(path, "ab") as file:
            os.fsync(file.fileno())

    def truncate_metrics(self, step: int) -> None:
        """Truncate ``metrics.jsonl`` after a step and drop corrupt lines."""
        path = self.path / METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                is_kept = json.loads(line)["step"] <= step
            except (ValueError, TypeError, KeyError):
                break  # cut short by a kill, or corrupt: what follows can't be trusted
            if is_kept and line.endswith(b"\n"):
                kept.append(line)
        if len(kept) < step:
            _logger.warning("%s: the records of some steps up to %d are lost", path, step)
        self._write(METRICS, b"".join(kept))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the records of ``metrics.jsonl``; none if it does not exist."""
        path = self.path / METRICS
        if not path.exists():
            return []
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]
