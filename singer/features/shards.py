"""Shards of a :mod:`singer.features.cache`: format, checks, writing, reading.

A shard is a safetensors file. For each of the teacher's blocks it holds ``tokens.BLOCK``,
``[n, T, D]``, bfloat16, and ``checksums.BLOCK``, ``[n]``, int64. Its metadata holds the first
image's index, ``first_image``, and the fingerprint in JSON, ``fingerprint``.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import reprlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from singer import io
from singer.errors import SingerError

KEY = "teacher.cache"
"""The configuration key of a cache's directory."""


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, of any shape and dtype, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def checksums(tokens: Tensor) -> Tensor:
    """Add up each image's bytes as integers, modulo 2⁶⁴.

    The sum changes with any one bit. It reads memory at the speed of a copy.

    Args:
        tokens: ``[n, T, D]``, bfloat16, contiguous.

    Returns:
        ``[n]``, int64.
    """
    flat = tokens.flatten(1)
    words = flat.view(torch.int64 if flat.shape[1] % 4 == 0 else torch.int16)
    return words.sum(dim=1, dtype=torch.int64)


def writing(path: Path) -> AbstractContextManager[None]:
    """Turn a failure of the disk inside the block into a ``SingerError``."""
    advice = "; shards that are complete stay, and the next run goes on from them"
    return io.writing(path, KEY, advice)


def unreadable(path: Path, error: OSError) -> SingerError:
    """Return the error of a file that can't be read."""
    return SingerError(f"{KEY}: {path} can't be read: {error.strerror or error}")


def corrupt(path: Path, reason: object) -> SingerError:
    """Return the error of a corrupt file."""
    return SingerError(
        f"{KEY}: {path} is damaged ({' '.join(str(reason).split())}); delete this file, and the "
        f"next run makes it again"
    )


def check_fingerprint(path: Path, actual: Any, expected: Mapping[str, Any]) -> None:
    """Check a file's fingerprint.

    Args:
        path: the file.
        actual: its fingerprint, as read from JSON.
        expected: this run's.

    Raises:
        SingerError: they differ; every differing field is named, with both values.
    """
    if actual == expected:
        return
    if not isinstance(actual, dict):
        raise corrupt(path, "it does not say what it was made from")
    absent = object()
    fields = [
        f"{field} {reprlib.repr(actual.get(field))} (this run: {reprlib.repr(expected.get(field))})"
        for field in sorted(actual.keys() | expected.keys())
        if actual.get(field, absent) != expected.get(field, absent)
    ]
    raise SingerError(
        f"{KEY}: {path.parent} was made from something else, and is left untouched: "
        f"{', '.join(fields)}; name another folder, or delete that one"
    )


def _find_madvise() -> Callable[[int, int, int], int] | None:
    # The C library's: Python's own serves only Python's maps, of which each keeps a file open.
    if not hasattr(mmap, "MADV_WILLNEED"):  # Windows
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


_madvise = _find_madvise()


class Shard:
    """A memory-mapped shard: tokens are read from the disk on access. No file stays open.

    Args:
        path: the file.
        fingerprint: the expected one.
        images: indices of the n images that it must hold.

    Attributes:
        path: the file.
        tokens: block to ``[n, T, D]``, bfloat16, mapped.
        checksums: block to ``[n]``, int64, in memory.

    Raises:
        SingerError: it can't be read, or its length, header or fingerprint is wrong.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], images: range) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:  # it checks header and length
                metadata = file.metadata() or {}
                check_fingerprint(
                    path, json.loads(metadata.get("fingerprint", "null")), fingerprint
                )
                names = [name.partition(".") for name in file.keys()]  # noqa: SIM118  (no mapping)
                layers = sorted(int(layer) for name, _, layer in names if name == "tokens")
                self.tokens = {layer: file.get_tensor(f"tokens.{layer}") for layer in layers}
                self.checksums = {
                    layer: file.get_tensor(f"checksums.{layer}").clone() for layer in layers
                }
        except OSError as error:
            raise unreadable(path, error) from error
        except (SafetensorError, ValueError) as error:
            raise corrupt(path, error) from error
        if not layers or metadata.get("first_image") != str(images.start):
            raise corrupt(path, f"not the tokens of image {images.start} and on")
        for layer in layers:
            tokens, sums = self.tokens[layer], self.checksums[layer]
            kinds = (tokens.dtype, tokens.ndim, len(tokens), sums.dtype, tuple(sums.shape))
            if kinds != (torch.bfloat16, 3, len(images), torch.int64, (len(images),)):
                raise corrupt(path, f"block {layer}: not the tokens of {len(images)} images")

    @property
    def shapes(self) -> dict[int, tuple[int, ...]]:
        """Block to the shape of an image's tokens, ``(T, D)``."""
        return {layer: tuple(tokens.shape[1:]) for layer, tokens in self.tokens.items()}

    def prefetch(self, row: int) -> None:
        """Load an image's tokens, of all blocks, in the background (a page fault would block)."""
        if _madvise is None:
            return
        for tokens in self.tokens.values():
            image = tokens[row]
            start = image.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
            end = image.data_ptr() + image.nbytes
            _madvise(start, end - start, mmap.MADV_WILLNEED)  # advice: where refused, it is slower


class ShardWriter:
    """Context manager that writes a shard atomically, batch by batch: memory holds one batch.

    Args:
        path: the shard; it exists once the block has ended without an error.
        fingerprint: in JSON's types.
        images: indices of the n images; all are appended within the block.

    Raises:
        SingerError: by any method: the file can't be written.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], images: range) -> None:
        self.path = path
        self._stack = ExitStack()
        self._metadata = {
            "format": "pt",
            "fingerprint": json.dumps(fingerprint),
            "first_image": str(images.start),
        }
        self._num_images = len(images)
        self._written = 0
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._starts: dict[str, int] = {}
        self._file: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        self._tmp_path = self._stack.enter_context(io.atomic_write(self.path))
        return self

    def __exit__(self, *error: Any) -> None:
        # After an error, it passes through as it is: closing may fail for the same reason.
        with writing(self.path) if error[0] is None else suppress(OSError):
            self._stack.__exit__(*error)

    def _open(self) -> BinaryIO:
        """Open the file, write the header, and find where each tensor starts."""
        header: dict[str, Any] = {"__metadata__": self._metadata}
        n, end = self._num_images, 0
        for kind, dtype, itemsize in (("checksums", "I64", 8), ("tokens", "BF16", 2)):
            for layer, shape in self._shapes.items():
                full = torch.Size((n, *shape) if kind == "tokens" else (n,))
                start, end = end, end + itemsize * full.numel()
                name = f"{kind}.{layer}"
                header[name] = {"dtype": dtype, "shape": full, "data_offsets": [start, end]}
                self._starts[name] = start
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors lie aligned
        self._starts = {name: 8 + len(text) + start for name, start in self._starts.items()}
        self._file = self._stack.enter_context(open(self._tmp_path, "wb"))  # noqa: SIM115
        self._file.write(len(text).to_bytes(8, "little") + text)
        return self._file

    def append(self, tokens: Mapping[int, Tensor]) -> None:
        """Write the next images.

        Args:
            tokens: block to ``[b, T, D]``, bfloat16, contiguous, on the CPU.

        Raises:
            ValueError: blocks or shapes differ from the first batch's.
        """
        shapes = {layer: tuple(batch.shape[1:]) for layer, batch in tokens.items()}
        self._shapes = self._shapes or shapes
        if shapes != self._shapes:
            raise ValueError(f"compute: got tokens of shapes {shapes}, before {self._shapes}")
        with writing(self.path):
            file = self._file or self._open()
            for layer, batch in tokens.items():
                for kind, rows in (("checksums", checksums(batch)), ("tokens", batch)):
                    skipped = self._written * rows[0].nbytes
                    file.seek(self._starts[f"{kind}.{layer}"] + skipped)
                    file.write(tensor_bytes(rows))
        self._written += len(next(iter(tokens.values())))
