"""Kinds of crops."""

from __future__ import annotations

from PIL import Image
from torch import nn
from torchvision.transforms import v2 as transforms

from singer.config.schema import DataConfig

_MAX_RESIZED = 8
"""Largest area of an image resized whole, in crops: of a longer one only the crop is computed."""


class CenterCrop(nn.Module):
    """The middle of an image whose shorter side is scaled to the crop's, as torchvision cuts it.

    Args:
        size: pixels of the crop's side.
        interpolation: ``bicubic`` or ``bilinear``.
    """

    def __init__(self, size: int, interpolation: str = "bicubic") -> None:
        super().__init__()
        self.size = size
        self.resampling = Image.Resampling[interpolation.upper()]
        mode = transforms.InterpolationMode(interpolation)
        self.whole = transforms.Compose(
            [
                transforms.Resize(size, interpolation=mode, antialias=True),
                transforms.CenterCrop(size),
            ]
        )

    def forward(self, image: Image.Image) -> Image.Image:
        """Return the crop, resized with antialiasing; memory is bounded by image and crop."""
        short, long = sorted(image.size)
        if long <= _MAX_RESIZED * short:
            return self.whole(image)
        resized = int(self.size * long / short)
        first = round((resized - self.size) / 2)
        start, end = (edge * long / resized for edge in (first, first + self.size))
        is_wide = image.width == long
        box = (start, 0, end, short) if is_wide else (0, start, short, end)
        return image.resize((self.size, self.size), self.resampling, box)


def create_crop(data: DataConfig, image_size: int) -> nn.Module:
    """Return the transform of an RGB image to a crop, ``[3, image_size, image_size]``, uint8.

    Args:
        data: kind of crop, interpolation, crop scale and flips.
        image_size: pixels of a crop's side.
    """
    if data.crops == "center":
        crop = [CenterCrop(image_size, data.interpolation)]
    else:
        crop = [
            transforms.RandomResizedCrop(
                image_size,
                scale=data.crop_scale,
                interpolation=transforms.InterpolationMode(data.interpolation),
                antialias=True,
            ),
            transforms.RandomHorizontalFlip(data.hflip),
        ]
    return transforms.Compose([*crop, transforms.PILToTensor()])
