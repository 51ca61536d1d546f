"""Atomic writes (a file or directory is there whole, or not at all); output that may be lost."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from singer.errors import SingerError


@contextmanager
def writing(path: Path, key: str = "output", advice: str = "") -> Iterator[None]:
    """Turn an ``OSError`` inside the block into a ``SingerError`` that names the key and the path.

    Args:
        path: the file or directory that the block writes.
        key: of the configuration.
        advice: appended to the message.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise SingerError(f"{key}: {path} can't be written: {reason}{advice}") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path; after the block, flush it to the disk and rename it to ``path``.

    The block writes a file or a directory of files there. After an error in it, ``path`` is as it
    was and the temporary path is gone. A killed process may leave it behind: :func:`stale_tmp`.

    Args:
        path: the file or directory; its parent must exist.

    Raises:
        OSError: it can't be written.
    """
    tmp_path = path.with_name(f".{path.name}.partial")
    try:
        yield tmp_path
        is_directory = tmp_path.is_dir()
        for written in [*(tmp_path.iterdir() if is_directory else ()), tmp_path]:
            _sync(written)
        replaced = path.with_name(f".{path.name}.replaced")
        if is_directory and path.exists():  # a directory can't be replaced in one step
            os.rename(path, replaced)
        try:
            os.replace(tmp_path, path)
        except BaseException:
            if is_directory and replaced.exists():
                os.rename(replaced, path)
            raise
        if is_directory:
            _sync(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
    finally:
        if tmp_path.is_dir():
            shutil.rmtree(tmp_path, ignore_errors=True)
        else:
            tmp_path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if not path.is_dir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    elif os.name != "nt":  # Windows can't flush a directory
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def stale_tmp(directory: Path) -> list[Path]:
    """Return the temporary files of :func:`atomic_write` that a killed process left behind."""
    return [path for path in directory.glob(".*.partial") if path.is_file()]


class _OptionalStream:
    """A text stream that drops what can't be written."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


@contextmanager
def optional_output() -> Iterator[None]:
    """Let standard output and error fail within the block: a terminal that was closed, a full disk.

    After it, a stream that still fails leads nowhere: Python flushes both when it ends, and would
    change the exit code.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream is not None]
    with (
        redirect_stdout(sys.stdout and cast("TextIO", _OptionalStream(sys.stdout))),
        redirect_stderr(sys.stderr and cast("TextIO", _OptionalStream(sys.stderr))),
    ):
        try:
            yield
        finally:
            for stream in streams:
                try:
                    stream.flush()
                except OSError:
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, stream.fileno())
                    os.close(nowhere)
