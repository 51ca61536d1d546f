"""The folder of a run: what is in it, and how it is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from singer.errors import SingerError

CONFIG, METRICS, STUDENT = "config.yaml", "metrics.jsonl", "student.safetensors"
STUDENT_EMA = "student_ema.safetensors"
CHECKPOINTS = "checkpoints"


def check_new(path: str | Path) -> Path:
    """Check that a run's folder does not exist yet, and return it as a path.

    Raises:
        SingerError: it exists, or can't be made.
    """
    path = Path(path)
    if path.exists():
        raise SingerError(
            f"output: {str(path)!r} exists already and is left untouched; name another folder"
        )
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SingerError(f"output: {str(path)!r} can't be made: {parent} is no writable folder")
    return path


def _unwritable(path: Path, error: OSError) -> SingerError:
    return SingerError(f"output: {path} can't be written: {error.strerror or error}")


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
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        aside.unlink(missing_ok=True)


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
    | ``checkpoints/`` | what the run needs to go on, see :mod:`singer.checkpoints` |

    Args:
        path: the folder.

    Raises:
        SingerError: it exists already, or can't be made.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = check_new(path)
        self._make()

    def _make(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.path, error) from error

    @classmethod
    def reopen(cls, path: str | Path) -> RunFolder:
        """Take the folder as an interrupted run left it; make it if it is not there.

        Raises:
            SingerError: it can't be made or written.
        """
        folder = cls.__new__(cls)
        folder.path = Path(path)
        folder._make()
        for leftover in folder.path.glob(".*.partial"):
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
        try:
            with open(path, "ab", buffering=0) as file:
                before = file.tell()
                try:
                    if file.write(content) < len(content):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(before)
                    raise
        except OSError as error:
            raise _unwritable(path, error) from error

    def cut_metrics(self, step: int) -> None:
        """Take out of ``metrics.jsonl`` what came after a step, and a line that was cut short."""
        path = self.path / METRICS
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        write_atomically(path, lambda aside: aside.write_text("".join(kept), encoding="utf-8"))

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the records of ``metrics.jsonl``."""
        with open(self.path / METRICS, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        shutil.rmtree(self.path)

    def figure_path(self, name: str) -> Path:
        """Return where the figure ``name`` goes, and make its folder."""
        folder = self.path / "figures"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.png"
