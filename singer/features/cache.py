"""Cache of the teacher's tokens of fixed crops, on disk: computed once, read by later epochs.

A cache is a directory of shards (:mod:`singer.features.shards`), :data:`IMAGES_PER_SHARD` images
each, ``tokens-00000.safetensors`` and so on, and ``manifest.json``, written last. Each shard
records its fingerprint, so that an interrupted build continues with the shards that are complete.

Tokens are rounded to bfloat16, to the nearest: a relative error of at most 2⁻⁸ (none for a teacher
that runs in bfloat16).

Reading hundreds of GB to verify them would take longer than an epoch, so opening checks each
shard's length and header only, and :meth:`TokenCache.read` verifies the checksum of every image
it returns. A cache in use must not be changed: truncating a mapped file ends the process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from singer.errors import SingerError
from singer.features.shards import (
    KEY,
    Shard,
    ShardWriter,
    check_fingerprint,
    checksums,
    corrupt,
    tensor_bytes,
    unreadable,
    writing,
)
from singer.io import atomic_write

IMAGES_PER_SHARD = 512
"""Images per file."""

MANIFEST = "manifest.json"

_FORMAT = "singer token cache 1"


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's weights, in hexadecimal.

    It covers names, dtypes, shapes and bytes of the state dict, in the order of the names, and does
    not depend on the device.

    Args:
        model: the model, on any device.

    Raises:
        TypeError: the state dict holds something else than tensors.
    """
    digest = sha256()
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):
            raise TypeError(f"model: {name} is a {type(value).__name__}, expected a tensor")
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(tensor_bytes(value.detach().cpu().contiguous()))
    return digest.hexdigest()


def _to_disk(tokens: Mapping[int, Tensor], images: list[int]) -> dict[int, Tensor]:
    """Round a batch to bfloat16 on the CPU, and check it."""
    if not tokens:
        raise ValueError("compute: got no tokens")
    rounded: dict[int, Tensor] = {}
    for layer, batch in sorted(tokens.items()):
        if batch.ndim != 3 or len(batch) != len(images):
            raise ValueError(
                f"compute: got tokens {tuple(batch.shape)} of block {layer}, expected "
                f"({len(images)}, T, D)"
            )
        narrow = batch.detach().to(torch.bfloat16)
        finite = narrow.flatten(1).isfinite().all(dim=1).cpu()
        if not finite.all():
            image = images[int(finite.logical_not().nonzero()[0])]
            raise SingerError(
                f"{KEY}: the teacher's tokens of image {image}, block {layer}, are not finite; "
                f"look at that image and at teacher.weights"
            )
        rounded[layer] = narrow.cpu().contiguous()
    return rounded


@dataclass(frozen=True)
class _Layout:
    """The files of a cache, and the fingerprint of what its tokens are computed from."""

    folder: Path
    fingerprint: dict[str, Any]
    num_images: int
    images_per_shard: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.images_per_shard)

    def path(self, shard: int) -> Path:
        return self.folder / f"tokens-{shard:05d}.safetensors"

    def images(self, shard: int) -> range:
        first = shard * self.images_per_shard
        return range(first, min(first + self.images_per_shard, self.num_images))

    def present(self) -> list[int]:
        return [shard for shard in range(self.num_shards) if self.path(shard).exists()]

    def missing(self) -> list[int]:
        return sorted(set(range(self.num_shards)).difference(self.present()))

    def open(self, shard: int) -> Shard:
        return Shard(self.path(shard), self.fingerprint, self.images(shard))

    def check(self) -> bool:
        """Check the existing files against this run, and return whether the cache is complete."""
        has_manifest = self._check_manifest()
        for shard in self.present():
            self.open(shard)
        return has_manifest and not self.missing()

    def _check_manifest(self) -> bool:
        path = self.folder / MANIFEST
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise unreadable(path, error) from error
        except ValueError as error:
            raise corrupt(path, error) from error
        if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
            raise SingerError(f"{KEY}: {path} is no token cache's; name another folder")
        check_fingerprint(path, manifest.get("fingerprint"), self.fingerprint)
        sizes = manifest.get("bytes")
        if not isinstance(sizes, dict):
            raise corrupt(path, "it lists no shards")
        for shard in self.present():
            file = self.path(shard)
            if (size := file.stat().st_size) != sizes.get(file.name):
                raise corrupt(file, f"{size} bytes, the manifest says {sizes.get(file.name)}")
        return True

    def write_manifest(self) -> None:
        paths = [self.path(shard) for shard in range(self.num_shards)]
        manifest = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "bytes": {path.name: path.stat().st_size for path in paths},
        }
        text = json.dumps(manifest, indent=2) + "\n"
        path = self.folder / MANIFEST
        with writing(path), atomic_write(path) as tmp_path:
            tmp_path.write_text(text, encoding="utf-8")

    def build(
        self,
        shard: int,
        compute: Callable[[list[int]], Mapping[int, Tensor]],
        batch_size: int,
    ) -> None:
        """Compute a shard and write it atomically."""
        images = self.images(shard)
        with ShardWriter(self.path(shard), self.fingerprint, images) as writer:
            for first in range(0, len(images), batch_size):
                batch = list(images[first : first + batch_size])
                writer.append(_to_disk(compute(batch), batch))


def _only_builder(folder: Path) -> AbstractContextManager[Any]:
    """Lock a folder against other runs inside the block; a killed process releases its lock."""
    with writing(folder):
        try:
            return FileLock(folder / ".lock").acquire(timeout=0)
        except Timeout as error:
            raise SingerError(
                f"{KEY}: another run is filling {folder}; start this one when it has finished"
            ) from error


class TokenCache:
    """A complete cache, opened by :meth:`open_or_build`.

    Several processes may read it at once, forked or spawned: each maps the files itself.

    Attributes:
        folder: its directory.
        num_images: number of images.
        layers: the teacher's blocks, ascending.
    """

    def __init__(self, layout: _Layout) -> None:
        self._layout = layout
        self._shards = [layout.open(shard) for shard in range(layout.num_shards)]
        self._shapes = self._shards[0].shapes
        for shard in self._shards:
            if shard.shapes != self._shapes:
                reason = f"its blocks' tokens are {shard.shapes}, the others' {self._shapes}"
                raise corrupt(shard.path, reason)
        self.folder = layout.folder
        self.num_images = layout.num_images
        self.layers = list(self._shapes)

    def __reduce__(self) -> tuple[type[TokenCache], tuple[_Layout]]:
        return TokenCache, (self._layout,)  # a spawned process makes its own maps

    @classmethod
    def open_or_build(
        cls,
        folder: Path,
        fingerprint: Mapping[str, Any],
        num_images: int,
        compute: Callable[[list[int]], Mapping[int, Tensor]],
        *,
        batch_size: int,
        process_index: int = 0,
        num_processes: int = 1,
        wait: Callable[[], None] = lambda: None,
    ) -> TokenCache:
        """Open a cache, after computing what is missing in it.

        All processes of a run call this together, on a shared directory. Process p builds the
        missing ones of the shards p, p + ``num_processes`` and so on; process 0 writes the manifest
        at the end. An existing shard is never overwritten.

        Args:
            folder: its directory.
            fingerprint: what the tokens depend on, in JSON's types: the teacher's name and
                :func:`weights_digest`, the blocks, the image size, the images.
            num_images: number of images.
            compute: indices of b images to the tokens of their fixed crops: block to
                ``[b, T, D]``, any floating dtype, any device.
            batch_size: the largest b.
            process_index: this process, from 0.
            num_processes: number of processes.
            wait: a barrier of all processes; it is always called twice.

        Returns:
            The complete cache.

        Raises:
            SingerError: an existing file has another fingerprint, is corrupt, or is being written
                by another run; a file can't be read or written; or a token is not finite in
                bfloat16 (the image's index is named). Complete shards stay.
            ValueError: a number is below 1, ``fingerprint`` does not fit into JSON, or ``compute``
                gives other shapes than it should.
        """
        for name, value in (("num_images", num_images), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        sizes = {"num_images": num_images, "images_per_shard": IMAGES_PER_SHARD}
        # As it will be read back.
        fingerprint = json.loads(json.dumps({**fingerprint, **sizes}, allow_nan=False))
        layout = _Layout(Path(folder).absolute(), fingerprint, num_images, IMAGES_PER_SHARD)
        with writing(layout.folder):
            layout.folder.mkdir(parents=True, exist_ok=True)
        is_builder = not layout.check() and process_index == 0
        with _only_builder(layout.folder) if is_builder else nullcontext():
            wait()
            for shard in layout.missing():
                if shard % num_processes == process_index:
                    layout.build(shard, compute, batch_size)
            wait()
            if missing := layout.missing():
                raise SingerError(
                    f"{KEY}: {layout.path(missing[0])} is missing, although each process has built "
                    f"its shards; name a folder that all machines see"
                )
            cache = cls(layout)
            if is_builder:
                layout.write_manifest()
        return cache

    def read(self, indices: Sequence[int] | Tensor) -> dict[int, Tensor]:
        """Return the tokens of some images.

        Args:
            indices: ``[b]``, from 0, in any order, repeated or not; best on the CPU.

        Returns:
            Block to tokens, ``[b, T, D]``, bfloat16, on the CPU, contiguous, newly allocated.

        Raises:
            IndexError: an index is out of range.
            SingerError: an image's tokens do not match their checksum.
        """
        images = torch.as_tensor(indices, dtype=torch.int64).tolist()
        for image in images:
            if not 0 <= image < self.num_images:
                raise IndexError(f"indices: got {image}, expected 0 to {self.num_images - 1}")
        locations = [divmod(image, self._layout.images_per_shard) for image in images]
        for shard, row in locations:
            self._shards[shard].prefetch(row)
        tokens_by_layer: dict[int, Tensor] = {}
        for layer, shape in self._shapes.items():
            tokens = torch.empty(len(images), *shape, dtype=torch.bfloat16)
            expected = torch.empty(len(images), dtype=torch.int64)
            for position, (shard, row) in enumerate(locations):
                tokens[position] = self._shards[shard].tokens[layer][row]
                expected[position] = self._shards[shard].checksums[layer][row]
            for position in (checksums(tokens) != expected).nonzero().flatten().tolist():
                path = self._shards[locations[position][0]].path
                raise corrupt(path, f"image {images[position]} has lost its checksum")
            tokens_by_layer[layer] = tokens
        return tokens_by_layer
