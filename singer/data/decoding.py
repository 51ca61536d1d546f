"""Decoding of images, with errors that name the image."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

from singer.errors import SingerError, is_exhaustion, one_line

WHITE = (255, 255, 255)

DECODING = 2
"""Version of what :func:`read_image` returns: a cache of tokens of other pixels is refused."""

_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By EXIF orientation: what shows the image upright."""

_COLOUR_KEY_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
"""By PNG raw mode: pixels that Pillow decodes per unit of the file's transparent colour."""


@contextmanager
def decoding_errors(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises (a broken file can raise anything) into a SingerError.

    Too little memory and too many open files are not the image's fault, and stay such errors.
    """
    try:
        yield
    except SingerError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError):
            raise MemoryError(f"too little memory to read {name}") from error
        if is_exhaustion(error):
            raise
        is_unknown = isinstance(error, UnidentifiedImageError)  # its text has an address in memory
        reason = "in no known image format" if is_unknown else one_line(error)
        raise SingerError(
            f"data.source: {name} can't be read as an image ({reason}); remove or replace it"
        ) from error


class _LibTiffFile(TiffImageFile):
    """An uncompressed TIFF that libtiff decodes: Pillow's own code misreads separate planes."""

    use_load_libtiff = property(lambda self: True, lambda self, value: None)  # type: ignore[assignment]


def _open(file: BinaryIO) -> Image.Image:
    try:
        return Image.open(file)
    except MemoryError as error:  # nothing is decoded yet: a damaged header asked for it
        raise ValueError("a length in its header is beyond its end") from error


def _separate_planes(image: Image.Image, file: BinaryIO) -> Image.Image:
    """Return the image; of a TIFF in separate planes another one, whose planes are read right."""
    if getattr(image, "tag_v2", {}).get(PLANAR_CONFIGURATION) != 2:
        return image
    if image.mode in ("LA", "PA", "LAB"):  # Pillow takes their planes for red, green and blue
        raise ValueError(f"a TIFF of {image.mode} pixels in separate planes")
    file.seek(0)
    return _LibTiffFile(file)


def _bit_depth(image: Image.Image) -> int | None:
    """Return the bits of a grey value, 8 of colours; None of signed integers and floats."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode == "F" or set(tags.get(SAMPLEFORMAT, ())) & {2, 3}:
        return None
    if image.mode.startswith("I;16"):
        return tags.get(BITSPERSAMPLE, (16,))[0]
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return 16
    if image.mode == "I":
        return 32 if tags.get(BITSPERSAMPLE) == (32,) else None
    return 8


def _eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """Scale grey values by their bit depth: the upper 8 bits are kept."""
    colour_key = image.info.get("transparency")
    if bits > 8:
        values = np.asarray(image).astype(np.uint32 if bits == 32 else np.uint16)
        if getattr(image, "tag_v2", {}).get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
            values = (2**bits - 1) - values
        grey = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
        if colour_key is not None:
            grey.putalpha(Image.fromarray((values != colour_key) * np.uint8(255)))
        return grey
    scale = _COLOUR_KEY_SCALES.get(str(image.tile[0][3])) if image.tile else None
    if colour_key is not None and scale is not None:
        scaled = tuple((np.atleast_1d(colour_key) * scale).astype(int).tolist())
        image.info["transparency"] = scaled if len(scaled) > 1 else scaled[0]
    return image


def _transposition(image: Image.Image) -> Image.Transpose | None:
    """Return what shows a decoded image upright, by its EXIF data; None: nothing."""
    try:
        return _TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a broken EXIF block raises anything, and says nothing of the pixels
        return None


def read_image(
    file: str | Path | BinaryIO, name: str = "", background: tuple[int, int, int] = WHITE
) -> Image.Image:
    """Decode an image as 8-bit RGB; of deeper values the upper 8 bits are kept.

    It is turned and mirrored as the file's EXIF orientation says; broken EXIF data are ignored.

    Args:
        file: its path, or the encoded image.
        name: what to call it in messages; empty: the path.
        background: what shows through a transparent image: red, green and blue, 0 to 255.

    Raises:
        SingerError: it can't be read as an image, or its values have no fixed range (signed
            integers, floats); the message names it.
        MemoryError, OSError: too little memory, or too many open files.
    """
    name = name or str(file)
    with decoding_errors(name):
        if isinstance(file, (str, Path)):
            if not stat.S_ISREG(os.stat(file).st_mode):
                raise ValueError("no regular file")  # opening a named pipe may wait for ever
            # Pillow maps files that it opens itself, and misreads those of TIFFs to be turned.
            with open(file, "rb") as content:
                return read_image(content, name, background)
        opened = _separate_planes(_open(file), file)
        bits = _bit_depth(opened)
        if bits is None:
            raise SingerError(
                f"data.source: {name} holds {opened.mode!r} pixels, which have no fixed range; "
                f"convert it to 8 bits"
            )
        image = _eight_bits(opened, bits)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            behind = Image.new("RGBA", image.size, (*background, 255))
            image = Image.alpha_composite(behind, image)
        image = image.convert("RGB")
        transposition = _transposition(opened)  # after decoding: Pillow turns some formats itself
        return image if transposition is None else image.transpose(transposition)
