"""Image sources: folders, tar files, Hugging Face datasets, photographs inside wheels.

A source gives random access to its images; :mod:`singer.data.loader` decides on their order.
"""

from __future__ import annotations

import bisect
import importlib.util
import io
import itertools
import logging
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.utils import natural_key

from singer.config.schema import PHOTOS, DataConfig
from singer.data.decoding import WHITE, decoding_errors, read_image
from singer.data.listing import (
    EXTENSIONS,
    FOUND_BEFORE,
    LeftOut,
    expand_pattern,
    has_extension,
    images_in_folder,
    images_in_tar,
    in_natural_order,
    is_special,
    was_found,
)
from singer.errors import DEMO_EXTRA_HINT, SingerError, one_line

_logger = logging.getLogger("singer")

HUGGING_FACE = "hfds/"
"""What ``data.source`` starts with for a Hugging Face dataset, as in timm."""

TRAIN_PHOTOS = (
    ("skimage", "astronaut.png"),
    ("skimage", "brick.png"),
    ("skimage", "camera.png"),
    ("skimage", "coins.png"),
    ("skimage", "grass.png"),
    ("skimage", "gravel.png"),
    ("skimage", "hubble_deep_field.jpg"),
    ("skimage", "ihc.png"),
    ("skimage", "moon.png"),
    ("skimage", "motorcycle_left.png"),
    ("skimage", "retina.jpg"),
    ("sklearn", "china.jpg"),
)
HELD_OUT_PHOTOS = (
    ("skimage", "chelsea.png"),
    ("skimage", "coffee.png"),
    ("skimage", "rocket.jpg"),
    ("sklearn", "flower.jpg"),
)
_PHOTO_FOLDERS = {"skimage": ("data",), "sklearn": ("datasets", "images")}


def photo_paths(photos: Sequence[tuple[str, str]]) -> list[Path]:
    """Return the paths of photographs inside installed wheels.

    Args:
        photos: (package, file name).

    Raises:
        SingerError: scikit-image or scikit-learn is not installed, or lacks a file.
    """
    paths = []
    for package, name in photos:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
            raise SingerError(f"the package {distribution} is not installed; {DEMO_EXTRA_HINT}")
        path = Path(spec.submodule_search_locations[0], *_PHOTO_FOLDERS[package], name)
        if not path.is_file():
            raise SingerError(f"{path}: the photograph is missing; reinstall {package}")
        paths.append(path)
    return paths


class ImageSource(ABC):
    """Images with random access by index. It can be pickled, for workers that are spawned.

    Attributes:
        background: what shows through transparent images: red, green and blue, 0 to 255.
    """

    background: tuple[int, int, int] = WHITE

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """Decode one image as 8-bit RGB, see :func:`singer.data.decoding.read_image`.

        Args:
            index: from 0 to the number of images less one.

        Raises:
            SingerError: it can't be read; the message names it.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the location of an image: a path, ``tar:member``, or dataset and row."""


class _Names:
    """Names as bytes: forked workers copy a list of strings that they read.

    (Counting references writes to its memory pages.)
    """

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self._ends[index], self._ends[index + 1]
        return self._bytes[start:end].decode("utf-8", "surrogateescape")


class ImageFiles(ImageSource):
    """Images that are files of their own.

    Args:
        paths: of the files.
        keep: keep every image once it is decoded.
    """

    def __init__(self, paths: Sequence[str | Path], keep: bool = False) -> None:
        self._paths = _Names([str(path) for path in paths])
        self._cache_decoded = keep
        self._decoded: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._paths)

    def read(self, index: int) -> Image.Image:
        """Decode one file. Do not alter the image: it may be kept."""
        if index in self._decoded:
            return self._decoded[index]
        image = read_image(self.name(index), background=self.background)
        if self._cache_decoded:
            self._decoded[index] = image
        return image

    def name(self, index: int) -> str:
        """Return a file's path."""
        return self._paths[index]


class TarImages(ImageSource):
    """Images inside uncompressed tar files: class folders, WebDataset shards, tars of tars.

    Every member with an image's extension is an image; other members of a WebDataset sample are
    ignored, and links are followed (:func:`singer.data.listing.images_in_tar`). The tars are taken
    in the order given, and in each the images in the natural order of their names.

    Opening it reads all headers once, for random access. timm's streaming ``wds/`` reader has none,
    and its ``ReaderImageInTar`` may write beside the data and keeps files open that forked workers
    would share.

    Args:
        tars: the tar files.

    Raises:
        SingerError: a file is no uncompressed tar or is corrupt, or no tar holds an image.
    """

    def __init__(self, tars: Sequence[str | Path]) -> None:
        names: list[str] = []
        locations: list[tuple[int, int, int]] = []
        left_out = LeftOut()
        for number, tar in enumerate(tars):
            try:
                with open(tar, "rb") as file:
                    found = sorted(
                        images_in_tar(file, str(tar), left_out),
                        key=lambda image: (natural_key(image.name), image),
                    )
            except (tarfile.TarError, OSError, ValueError) as error:
                raise SingerError(
                    f"data.source: {tar} can't be read as an uncompressed tar ({one_line(error)})"
                ) from error
            names += [name for name, _, _ in found]
            locations += [(number, position, size) for _, position, size in found]
        where = tars[0] if len(tars) == 1 else f"{len(tars)} tars, {tars[0]} the first of them"
        left_out.log(str(where))
        if not names:
            raise SingerError(f"data.source: no image file ({', '.join(EXTENSIONS)}) in {where}")
        self._tars = [str(tar) for tar in tars]
        self._names = _Names(names)
        self._locations = np.array(locations, dtype=np.int64)  # [images, 3]: tar, position, size

    def __len__(self) -> int:
        """Return the number of images in all tars."""
        return len(self._names)

    def read(self, index: int) -> Image.Image:
        """Decode one image, as :func:`read_image` does."""
        tar, position, size = self._locations[index].tolist()
        name = self.name(index)
        with decoding_errors(name), open(self._tars[tar], "rb") as file:
            file.seek(position)
            return read_image(io.BytesIO(file.read(size)), name, self.background)

    def name(self, index: int) -> str:
        """Return ``tar:member``."""
        return f"{self._tars[self._locations[index, 0]]}:{self._names[index]}"


def _is_saved_dataset(folder: str) -> bool:
    """Return whether ``save_to_disk`` of a Hugging Face ``Dataset`` or ``DatasetDict`` wrote it."""
    files = (["dataset_dict.json"], ["state.json", "dataset_info.json"])
    return any(all(os.path.isfile(os.path.join(folder, f)) for f in of) for of in files)


def _load_rows(dataset: str, split: str) -> Any:
    """Return the ``datasets.Dataset`` of a split."""
    import datasets

    if not _is_saved_dataset(dataset):
        return datasets.load_dataset(dataset, split=split)
    saved = datasets.load_from_disk(dataset)
    splits = saved if isinstance(saved, dict) else {str(saved.split): saved, "train": saved}
    sizes = {name: len(rows) for name, rows in splits.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    rows = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    if not any(map(len, rows)):
        raise ValueError("no rows")
    return datasets.concatenate_datasets(rows)


class HuggingFaceImages(ImageSource):
    """One column of a Hugging Face dataset's split.

    ``datasets`` is called directly: timm's reader asks for a label in every row.

    Args:
        dataset: a name on the hub, or a local folder that ``datasets.load_dataset`` understands or
            ``save_to_disk`` wrote (the one split of a saved ``Dataset`` is called train too).
        split: such as ``train`` or ``train[:10%]``.
        key: the column of encoded images.

    Raises:
        SingerError: the package ``datasets`` is not installed, the dataset can't be loaded, or it
            has no such split, no rows in it, or no such column.
    """

    def __init__(self, dataset: str, split: str, key: str) -> None:
        try:
            import datasets
        except ImportError as error:
            raise SingerError(
                f"data.source: {HUGGING_FACE}{dataset} needs the package datasets, which can't be "
                f"imported ({one_line(error)}); pip install datasets"
            ) from error
        self._title = f"{HUGGING_FACE}{dataset}, split {split}"
        try:
            rows = _load_rows(os.path.expanduser(dataset), split)
        except Exception as error:  # of data files, hub and network: datasets has no common one
            raise SingerError(
                f"data.source: {HUGGING_FACE}{dataset} can't be loaded with data.split={split!r} "
                f"({one_line(error)})"
            ) from error
        if key not in rows.column_names:
            raise SingerError(
                f"data.image_key: got {key!r}, expected a column of {self._title}: "
                f"{', '.join(rows.column_names)}"
            )
        try:
            encoded = datasets.Image(decode=False)
            self._rows = rows.with_format(None).select_columns([key]).cast_column(key, encoded)
        except (ValueError, TypeError, RuntimeError) as error:
            raise SingerError(
                f"data.image_key: got {key!r}, expected a column of images in {self._title}, but "
                f"it holds {rows.features[key]}"
            ) from error
        self._key = key

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def read(self, index: int) -> Image.Image:
        """Decode the image of one row, as :func:`read_image` does."""
        name = self.name(index)
        with decoding_errors(name):
            image = self._rows[index][self._key]
            if image is None:
                raise ValueError("the row holds none")
            encoded = image["bytes"]
            file = image["path"] if encoded is None else io.BytesIO(encoded)
            return read_image(file, name, self.background)

    def name(self, index: int) -> str:
        """Return dataset, split and row."""
        return f"{self._title}, row {index}"


def _open_folder(folder: str, found: set[tuple[int, int]]) -> ImageSource | None:
    """Open a folder; None: all that it holds was found before."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    except OSError as error:
        raise SingerError(f"data.source: {folder}: {error.strerror or error}") from error
    left_out = LeftOut()
    images = images_in_folder(folder, left_out, found)
    num_images = len(images)
    if FOUND_BEFORE in left_out:
        num_images = num_images or sum(has_extension(name, EXTENSIONS) for name in names)
    tars = [os.path.join(folder, name) for name in names if has_extension(name, ".tar")]
    tars = [tar for tar in tars if not os.path.isdir(tar) and not is_special(tar, left_out)]
    if num_images == 0:
        tars = [tar for tar in tars if not was_found(tar, found, left_out)]
    left_out.log(folder)
    if num_images and tars:
        _logger.warning(
            "data.source: %s holds %d image files and %d .tar files; the images are taken, the "
            "tars are not read",
            folder,
            num_images,
            len(tars),
        )
    if images:
        return ImageFiles(in_natural_order(images, folder))
    if tars and not num_images:
        return TarImages(in_natural_order(tars, folder))
    if FOUND_BEFORE in left_out:
        return None
    if not names:
        raise SingerError(
            f"data.source: {folder!r} is an empty folder, expected images or .tar files in it"
        )
    raise SingerError(
        f"data.source: {folder!r} holds no image file ({', '.join(EXTENSIONS)}), nor a .tar file"
    )


class ImageSources(ImageSource):
    """Several sources, one after the other.

    Args:
        sources: one at least.
    """

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        self._sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, sources)))

    def __len__(self) -> int:
        """Return the number of images in all sources."""
        return self._ends[-1]

    def _find(self, index: int) -> tuple[ImageSource, int]:
        number = bisect.bisect_right(self._ends, index)
        return self._sources[number], index - ([0, *self._ends][number])

    def read(self, index: int) -> Image.Image:
        """Decode one image, as its source does."""
        source, inner = self._find(index)
        return source.read(inner)

    def name(self, index: int) -> str:
        """Return the name that the image's source gives."""
        source, inner = self._find(index)
        return source.name(inner)


def _is_name(source: str) -> bool:
    return source == PHOTOS or source.startswith(HUGGING_FACE)


def open_source(data: DataConfig) -> ImageSource:
    """Open what ``data.source`` names. Nothing is written there.

    A folder is searched for image files with its subfolders, in the natural order of their paths. A
    folder without image files may hold ``.tar`` files, in the folder itself alone. Where it has
    both, the image files are taken, and a warning names the tars (archives are often left beside
    their content). Several sources follow one another in the order given; a folder or tar that
    several of them hold is read once, and the log counts it.

    Args:
        data: ``source`` and ``background``; of a Hugging Face dataset ``split`` and ``image_key``
            too.

    Raises:
        SingerError: there is no such source, or it holds no image; the message names the key.
    """
    named = [data.source] if isinstance(data.source, str) else data.source
    paths: dict[str, str] = {}
    left_out = LeftOut()
    expanded = ([n] if _is_name(n) else expand_pattern(n, left_out) for n in named)
    for path in itertools.chain.from_iterable(expanded):
        key = path if _is_name(path) else os.path.realpath(path)
        if key in paths:
            left_out.add("sources named again", path)
        else:
            paths[key] = path
    sources: list[ImageSource] = []
    found: set[tuple[int, int]] = set()
    for are_tars, group in itertools.groupby(paths.values(), _is_tar):
        if not are_tars:
            opened = [_open(path, data, found) for path in group]
            sources += [source for source in opened if source is not None]
        elif tars := [tar for tar in group if not was_found(tar, found, left_out)]:
            sources.append(TarImages(tars))
    left_out.log(", ".join(named))
    for source in sources:
        source.background = data.background
    return sources[0] if len(sources) == 1 else ImageSources(sources)


def _is_tar(source: str) -> bool:
    return source.lower().endswith(".tar") and os.path.isfile(source) and not _is_name(source)


def _open(source: str, data: DataConfig, found: set[tuple[int, int]]) -> ImageSource | None:
    if source == PHOTOS:
        if os.path.isdir(PHOTOS):
            _logger.warning(
                "data.source=%s names the sample photographs; for the folder say ./%s",
                PHOTOS,
                PHOTOS,
            )
        return ImageFiles(photo_paths(TRAIN_PHOTOS), keep=True)
    if source.startswith(HUGGING_FACE):
        return HuggingFaceImages(source.removeprefix(HUGGING_FACE), data.split, data.image_key)
    if _is_saved_dataset(source):
        return HuggingFaceImages(source, data.split, data.image_key)
    if os.path.isdir(source):
        return _open_folder(source, found)
    if not os.path.exists(source):
        raise SingerError(
            f"data.source: got {source!r}, expected an existing folder or .tar file, "
            f"{HUGGING_FACE}NAME or {PHOTOS!r}"
        )
    raise SingerError(
        f"data.source: got the file {source!r}, expected an uncompressed .tar file or a folder"
    )
