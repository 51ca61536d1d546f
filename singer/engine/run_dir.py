"""The folder of a run: what is in it, and how it is written."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from singer.errors import SingerError

_logger = logging.getLogger("singer")

CONFIG, METRICS, STUDENT = "config.yaml", "metrics.jsonl", "student.safetensors"
STUDENT_EMA = "student_ema.safetensors"
CHECKPOINTS, TENSORBOARD = "checkpoints", "tensorboard"


def check_new(path: str | Path, advice: str = "") -> Path:
    """Check that a run's folder does not exist yet, and return it as a path.

    Args:
        path: the folder.
        advice: what else a user can do than to name another one.

    Raises:
        SingerError: it exists, or can't be made.
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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the system inside the block into one that names the path."""
    try:
        yield
    except OSError as error:
        raise SingerError(f"output: {path} can't be written: {error.strerror or error}") from error


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file aside, then put it in place in one step.

    Args:
        path: the file; its folder must exist.
        write: writes the content to the path that it is given.

    Raises:
        SingerError: the file can't be written; what stood at ``path`` before is untouched.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            write(aside)
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """Return what a killed process may have left of :func:`write_atomically` in a folder."""
    return [path for path in folder.glob(".*.partial") if path.is_file()]


class RunFolder:
    """The folder of a run, or of one of its students, made anew.

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
    | ``checkpoints/`` | what the run needs to go on, see :mod:`singer.engine.checkpoints` |

    Args:
        path: the folder.

    Raises:
        SingerError: it exists already, or can't be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = check_new(path)
        self._make()

    def _make(self) -> None:
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)

    @classmethod
    def reopen(cls, path: str | Path) -> RunFolder:
        """Take the folder as an interrupted run left it; make it if it is not there.

        Raises:
            SingerError: it can't be made or written.
        """
        folder = cls.__new__(cls)
        folder.path = Path(path)
        folder._make()
        for leftover in leftovers(folder.path):
            leftover.unlink()
        return folder

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file atomically and return its path."""
        path = self.path / name
        write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))
        return path

    def write_json(self, name: str, value: Any) -> Path:
        """Write a JSON file atomically and return its path."""
        return self.write_text(name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def write_tensors(
        self, name: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> Path:
        """Write a safetensors file atomically and return its path."""
        path = self.path / name
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        # Not save_file: it ignores the umask and makes files that their owner alone can read.
        content = save(on_cpu, metadata=dict(metadata))
        write_atomically(path, lambda aside: aside.write_bytes(content))
        return path

    def append_metrics(self, records: list[dict[str, Any]]) -> None:
        """Append records to ``metrics.jsonl``, one JSON object a line; all of them, or none."""
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
        """Make what :meth:`append_metrics` wrote outlive a power failure."""
        path = self.path / METRICS
        with writing(path), open(path, "ab") as file:
            os.fsync(file.fileno())

    def cut_metrics(self, step: int) -> None:
        """Take out of ``metrics.jsonl`` what came after a step, and what is damaged."""
        path = self.path / METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                is_kept = json.loads(line)["step"] <= step
            except (ValueError, TypeError, KeyError):
                break  # cut short by a kill, or damaged: nothing can be said of what follows
            if is_kept and line.endswith(b"\n"):
                kept.append(line)
        if len(kept) < step:
            _logger.warning("%s: the records of some steps up to %d are lost", path, step)
        write_atomically(path, lambda aside: aside.write_bytes(b"".join(kept)))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the records of ``metrics.jsonl``; none if it is not there."""
        path = self.path / METRICS
        if not path.exists():
            return []
        with open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.path)

    def figure_path(self, name: str) -> Path:
        """Return where the figure ``name`` goes, and make its folder."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.png"
