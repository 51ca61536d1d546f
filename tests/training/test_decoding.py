"""Images from files of every kind, as RGB."""

import io
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from singer.config.schema import DataConfig
from singer.data.decoding import read_image
from singer.data.sources import open_source
from singer.errors import SingerError


def _open(path, **options):
    return open_source(DataConfig(source=str(path), **options))


def _names_in(source, folder):
    return [os.path.relpath(source.name(index), folder) for index in range(len(source))]


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / "image.tiff"
    if mode == "I;16":
        Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8)).save(path)
    else:
        Image.new(mode, (8, 8)).save(path)
    assert read_image(path).mode == "RGB"


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    pixels = np.asarray(read_image(tmp_path / "deep.png"))
    assert pixels[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def _short(*values):
    return struct.pack(f"<{len(values)}H", *values)


def _tiff(path, values, bits, white_is_zero=False, compression=1):
    """Write a row of unsigned grey values of so many bits, low bits first in each byte pair."""
    if bits == 12:
        packed = "".join(f"{value:012b}" for value in values)
        strip = int(packed.ljust(-(-len(packed) // 8) * 8, "0"), 2).to_bytes(-(-len(packed) // 8))
    else:
        strip = np.array(values, dtype=f"<u{bits // 8}").tobytes()
    if compression == 8:
        strip = zlib.compress(strip)
    tags = [
        (256, 3, len(values)),  # width
        (257, 3, 1),
        (258, 3, bits),
        (259, 3, compression),
        (262, 3, 0 if white_is_zero else 1),
        (273, 4, 8 + 2 + 12 * 9 + 4),  # where the strip starts
        (277, 3, 1),
        (278, 3, 1),
        (279, 4, len(strip)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    path.write_bytes(b"II*\0\x08\0\0\0" + _short(9) + entries + bytes(4) + strip)


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize(  # Pillow knows no white-is-zero form of 12 and 32 bits
    ("bits", "white_is_zero"),
    [(8, False), (8, True), (12, False), (16, False), (16, True), (32, False)],
)
def test_grey_tiffs_are_scaled_by_their_own_bit_depth(tmp_path, bits, white_is_zero, compression):
    levels = np.array([0, 1, 100, 127, 128, 200, 254, 255])
    values = [int(level) * 2 ** (bits - 8) + 2 ** (bits - 8) - 1 for level in levels]
    _tiff(tmp_path / "grey.tif", values, bits, white_is_zero, compression)
    expected = 255 - levels if white_is_zero else levels
    assert np.asarray(read_image(tmp_path / "grey.tif"))[0].tolist() == [[v] * 3 for v in expected]


def test_deep_pgm_is_scaled(tmp_path):
    (tmp_path / "grey.pgm").write_bytes(b"P5 3 1 65535 " + struct.pack(">3H", 0, 32768, 65535))
    assert np.asarray(read_image(tmp_path / "grey.pgm"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_fixed_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((8, 8), dtype=dtype)).save(tmp_path / "image.tiff")
    with pytest.raises(SingerError, match=r"image\.tiff holds .* no fixed range"):
        read_image(tmp_path / "image.tiff")


def test_signed_bytes_are_refused(tmp_path):
    image = Image.fromarray(np.zeros((8, 8), dtype=np.uint8))
    image.save(tmp_path / "image.tiff", tiffinfo={339: 2})
    with pytest.raises(SingerError, match=r"image\.tiff holds .* no fixed range"):
        read_image(tmp_path / "image.tiff")


# Transparency


def _assert_first_is_transparent(image_file, second):
    """The left pixel is transparent, the right one has the given colour."""
    for background in ((255, 255, 255), (10, 20, 30)):
        pixels = np.asarray(read_image(image_file, "x", background))
        assert pixels[0].tolist() == [list(background), [*second]]


@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("RGBA", "png"),
        ("RGBA", "tiff"),
        ("RGBA", "webp"),
        ("LA", "png"),
        ("LA", "tiff"),
        ("P", "png"),
        ("P", "gif"),
        ("PA", "tiff"),
    ],
)
def test_transparent_pixels_show_the_background(tmp_path, mode, form):
    second = (200, 200, 200)
    image = Image.fromarray(np.array([[[90, 90, 90, 0], [*second, 255]]], dtype=np.uint8))
    options = {"exact": True, "lossless": True} if form == "webp" else {}
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
        image.putpalette([90, 90, 90, *second])
        options["transparency"] = 0
    elif mode == "PA":
        image = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
        image.putpalette([90, 90, 90, *second])
        image = image.convert("PA")
        image.putalpha(Image.fromarray(np.array([[0, 255]], dtype=np.uint8)))
    else:
        image = image.convert(mode)
    image.save(tmp_path / "x", form, **options)
    _assert_first_is_transparent(tmp_path / "x", second)


def test_half_transparent_pixels_mix_with_the_background(tmp_path):
    Image.new("RGBA", (1, 1), (200, 100, 0, 51)).save(tmp_path / "x.png")  # a fifth
    pixel = read_image(tmp_path / "x.png", background=(0, 50, 100)).getpixel((0, 0))
    assert pixel == (40, 60, 80)


def test_opaque_pixels_stay_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, size=(16, 16, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "x.png")), pixels[..., :3])


def _png(depth, colour_type, row, transparent):
    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        [
            chunk(b"IHDR", header),
            chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent)),
            chunk(b"IDAT", zlib.compress(b"\0" + row)),
            chunk(b"IEND", b""),
        ]
    )


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "second"),
    [
        (1, b"\x80", [1], (0, 0, 0)),
        (2, b"\x60", [1], (170, 170, 170)),
        (4, b"\x5a", [5], (170, 170, 170)),
        (8, bytes([5, 200]), [5], (200, 200, 200)),
        (16, struct.pack(">2H", 1000, 51400), [1000], (200, 200, 200)),
        (8, bytes([1, 2, 3, 4, 5, 6]), [1, 2, 3], (4, 5, 6)),
        (16, struct.pack(">6H", 257, 514, 771, 1028, 1285, 1542), [257, 514, 771], (4, 5, 6)),
    ],
)
def test_the_transparent_colour_of_a_png_shows_the_background(depth, row, transparent, second):
    colour_type = 2 if len(transparent) == 3 else 0
    encoded = _png(depth, colour_type, row, transparent)
    _assert_first_is_transparent(io.BytesIO(encoded), second)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_image_is_named(image_folder, content):
    path = image_folder / "class1" / "1.png"
    path.write_bytes(content)
    source = _open(image_folder)
    bad = _names_in(source, image_folder).index("class1/1.png")
    with pytest.raises(
        SingerError, match=r"class1/1\.png can't be read as an image \(\S"
    ) as caught:
        source.read(bad)
    assert "\n" not in str(caught.value)


def test_truncated_image_is_named(image_folder):
    path = image_folder / "class0" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SingerError, match=r"0\.png can't be read as an image"):
        read_image(path)


@pytest.mark.parametrize("error", [ValueError, struct.error, IndexError, MemoryError])
def test_whatever_a_decoder_raises_names_the_image(image_folder, monkeypatch, error):
    def fail(self):
        raise error("from deep\ninside")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(SingerError, match=r"0\.png can't be read .*\(from deep inside\)"):
        read_image(image_folder / "class0" / "0.png")


def test_an_image_that_is_gone_is_named(image_folder):
    source = _open(image_folder)
    shutil.rmtree(image_folder)
    with pytest.raises(SingerError, match=r"0\.png can't be read as an image .*No such file"):
        source.read(0)
