"""Decoding of images, with errors that name the image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from singer.errors import SingerError, one_line


@contextmanager
def decoding_errors(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises (a broken file can raise anything) into a SingerError."""
    try:
        yield
    except SingerError:
        raise
    except Exception as error:
        is_unknown = isinstance(error, UnidentifiedImageError)  # its text has an address in memory
        reason = "in no known image format" if is_unknown else one_line(error)
        raise SingerError(
            f"data.source: {name} can't be read as an image ({reason}); remove or replace it"
        ) from error


def read_image(file: str | Path | BinaryIO, name: str = "") -> Image.Image:
    """Decode an image as 8-bit RGB; of 16-bit grey values the upper 8 bits are kept.

    A rotation that the file's EXIF data asks for is not applied.

    Args:
        file: its path, or the encoded image.
        name: what to call it in messages; empty: the path.

    Raises:
        SingerError: it can't be read as an image, or its values have no fixed range (32-bit
            integers, floats); the message names it.
    """
    name = name or str(file)
    with decoding_errors(name):
        if isinstance(file, (str, Path)) and os.path.exists(file) and not os.path.isfile(file):
            raise ValueError("no regular file")  # opening a named pipe may wait for ever
    with decoding_errors(name), Image.open(file) as image:
        if image.mode.startswith("I;16"):  # Pillow would clip at 255
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise SingerError(
                f"data.source: {name} holds {image.mode!r} pixels, which have no fixed range; "
                f"convert it to 8 bits"
            )
        return image.convert("RGB")
