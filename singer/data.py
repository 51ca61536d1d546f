"""Images, their crops and their order.

Order and augmentation are functions of the seed, the epoch and the sample alone: they do not
depend on the number of workers, on the model, or on what ran before.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2 as transforms

from singer.config import PHOTOS, Config, DataConfig
from singer.errors import DEMO_EXTRA_HINT, SingerError
from singer.seeding import cpu_seed

_logger = logging.getLogger("singer")

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")

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
    """Return where the installed wheels keep their photographs.

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


def find_images(source: str) -> list[Path]:
    """List a source's images, in a fixed order.

    Args:
        source: a folder, searched with its subfolders, or ``photos``.

    Raises:
        SingerError: the folder does not exist or holds no image.
    """
    if source == PHOTOS:
        if os.path.isdir(PHOTOS):
            _logger.warning(
                "data.source=%s names the sample photographs; for the folder say ./%s",
                PHOTOS,
                PHOTOS,
            )
        return photo_paths(TRAIN_PHOTOS)
    if not os.path.isdir(source):
        raise SingerError(f"data.source: got {source!r}, expected an existing folder or {PHOTOS!r}")
    try:
        reader = create_reader("", root=source, input_key=";".join(EXTENSIONS))
    except RuntimeError as error:
        raise SingerError(
            f"data.source: {source!r} holds no image file ({', '.join(EXTENSIONS)})"
        ) from error
    return [Path(path) for path in reader.filenames(absolute=True)]


def read_image(path: Path) -> Image.Image:
    """Decode an image as 8-bit RGB; of 16-bit grey values the upper 8 bits are kept.

    Raises:
        SingerError: the file can't be read as an image, or its values have no fixed range (32-bit
            integers, floats); the message names it.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):  # Pillow would clip at 255
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode in ("I", "F"):
                raise SingerError(
                    f"data.source: {path} holds {image.mode!r} pixels, which have no fixed range; "
                    f"convert it to 8 bits"
                )
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise SingerError(
            f"data.source: {path} can't be read as an image ({reason}); remove or replace it"
        ) from error


class ImageCrops(Dataset[Tensor]):
    """Random crops of images.

    A ticket ``t`` names the crop: epoch ``t // epoch_size``, sample ``t % epoch_size`` of it. The
    crop is a function of the seed and the ticket alone.

    Args:
        paths: the images.
        image_size: pixels of the square crops.
        data: crop scale, flips and the size of an epoch. The few photographs of ``photos`` are
            decoded once and kept.
        seed: of the crops.
    """

    def __init__(self, paths: Sequence[Path], image_size: int, data: DataConfig, seed: int) -> None:
        self.paths = list(paths)
        self.epoch_size = data.epoch_size or len(self.paths)
        self.seed = seed
        self._keep = data.source == PHOTOS
        self._kept: dict[Path, Image.Image] = {}
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(
                    image_size,
                    scale=data.crop_scale,
                    interpolation=transforms.InterpolationMode.BICUBIC,
                ),
                transforms.RandomHorizontalFlip(data.hflip),
                transforms.PILToTensor(),
            ]
        )

    def __len__(self) -> int:
        """Return the number of samples per epoch."""
        return self.epoch_size

    def __getitem__(self, ticket: int) -> Tensor:
        """Return one crop, ``[3, image_size, image_size]``, uint8.

        Raises:
            SingerError: the image can't be read.
        """
        sample = ticket % self.epoch_size
        image = self._image(self.paths[sample % len(self.paths)])
        with cpu_seed(self.seed * 0x9E3779B1 + ticket):
            return self.transform(image)

    def _image(self, path: Path) -> Image.Image:
        if not self._keep:
            return read_image(path)
        if path not in self._kept:
            self._kept[path] = read_image(path)
        return self._kept[path]


class TicketSampler(Sampler[int]):
    """Shuffled tickets of :class:`ImageCrops`, a fresh order every epoch.

    Args:
        epoch_size: samples per epoch.
        seed: of the order.
    """

    def __init__(self, epoch_size: int, seed: int) -> None:
        self.epoch_size = epoch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, whose tickets are drawn."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of samples per epoch."""
        return self.epoch_size

    def __iter__(self) -> Iterator[int]:
        """Draw the epoch's tickets."""
        generator = torch.Generator().manual_seed(self.seed * 0x9E3779B1 + self.epoch)
        first = self.epoch * self.epoch_size
        for sample in torch.randperm(self.epoch_size, generator=generator).tolist():
            yield first + sample


def create_loader(config: Config) -> DataLoader[Tensor]:
    """Build the loader of a run: batches ``[batch_size, 3, H, W]``, uint8, whole batches only.

    Args:
        config: the run's configuration.

    Raises:
        SingerError: the source holds no image, or fewer samples than a batch.
    """
    dataset = ImageCrops(
        find_images(config.data.source), config.image_size, config.data, config.train.seed
    )
    if len(dataset) < config.train.batch_size:
        raise SingerError(
            f"train.batch_size: got {config.train.batch_size}, expected at most {len(dataset)}, "
            f"the samples of an epoch; lower it or raise data.epoch_size"
        )
    return DataLoader(
        dataset,
        batch_size=config.train.batch_size,
        sampler=TicketSampler(len(dataset), config.train.seed),
        num_workers=config.data.num_workers,
        persistent_workers=config.data.num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )
