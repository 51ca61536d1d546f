"""Images from files of every kind, as RGB."""

import errno
import io
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from singer.config.schema import DataConfig
from singer.data.decoding import read_image
from singer.data.listing import EXTENSIONS
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


def _pack_bits(values, bits):
    """Pack a row of values, the upper bits first in each byte; whole bytes are little-endian."""
    if bits % 8 == 0:
        return np.asarray(values).astype(f"<u{bits // 8}").tobytes()
    packed = "".join(f"{value:0{bits}b}" for value in np.ravel(values))
    return int(packed.ljust(-(-len(packed) // 8) * 8, "0"), 2).to_bytes(-(-len(packed) // 8))


def _tiff(path, values, bits, photometric=1, compression=1, planes=False, extra=()):
    """Write a row of unsigned values of so many bits, ``[width]`` or ``[width, samples]``.

    Args:
        photometric: 0: grey, white is zero; 1: grey; 2: RGB; 5: CMYK.
        compression: 1: none; 8: deflate.
        planes: write the samples one after the other, not those of each pixel together.
        extra: (tag, value) of further tags, in order.
    """
    values = np.reshape(values, (len(values), -1))
    strips = [_pack_bits(part, bits) for part in (values.T if planes else [values])]
    strips = [zlib.compress(strip) if compression == 8 else strip for strip in strips]
    samples = values.shape[1]
    tags = [
        (256, "I", [len(values)]),  # width
        (257, "I", [1]),
        (258, "H", [bits] * samples),
        (259, "H", [compression]),
        (262, "H", [photometric]),
        (273, "I", [0] * len(strips)),  # where the strips start; filled below
        *((tag, "H", [value]) for tag, value in extra if tag < 277),
        (277, "H", [samples]),
        (278, "I", [1]),
        (279, "I", [len(strip) for strip in strips]),
        (284, "H", [2 if planes else 1]),
        *((tag, "H", [value]) for tag, value in extra if tag > 284),
    ]
    strips_start = 8 + 2 + 12 * len(tags) + 4 + sum(4 * len(of) for *_, of in tags)
    ends = np.cumsum([strips_start, *map(len, strips)]).tolist()
    tags[5] = (273, "I", ends[:-1])
    entries, long_values = b"", b""
    for tag, kind, of in tags:
        packed = struct.pack(f"<{len(of)}{kind}", *of)
        if len(packed) > 4:  # an offset stands for them
            start = 8 + 2 + 12 * len(tags) + 4 + len(long_values)
            long_values, packed = long_values + packed, struct.pack("<I", start)
        kind_number = {"H": 3, "I": 4}[kind]
        entries += struct.pack("<HHI", tag, kind_number, len(of)) + packed.ljust(4, b"\0")
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + long_values
    path.write_bytes(head.ljust(strips_start, b"\0") + b"".join(strips))


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize(  # Pillow knows no white-is-zero form of 12 and 32 bits
    ("bits", "white_is_zero"),
    [(8, False), (8, True), (12, False), (16, False), (16, True), (32, False)],
)
def test_grey_tiffs_are_scaled_by_their_own_bit_depth(tmp_path, bits, white_is_zero, compression):
    levels = np.array([0, 1, 100, 127, 128, 200, 254, 255])
    values = [int(level) * 2 ** (bits - 8) + 2 ** (bits - 8) - 1 for level in levels]
    _tiff(tmp_path / "grey.tif", values, bits, 0 if white_is_zero else 1, compression)
    expected = 255 - levels if white_is_zero else levels
    assert np.asarray(read_image(tmp_path / "grey.tif"))[0].tolist() == [[v] * 3 for v in expected]


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize(
    ("bits", "photometric", "samples"),
    [
        *((bits, photometric, 1) for bits in (1, 4, 8, 16) for photometric in (0, 1)),
        (12, 1, 1),
        *((bits, 2, samples) for bits in (8, 16) for samples in (3, 4)),  # RGB, RGBA
        *((bits, 5, 4) for bits in (8, 16)),  # CMYK
    ],
)
def test_separate_planes_of_a_tiff_are_its_pixels(
    tmp_path, bits, photometric, samples, compression
):
    values = np.random.default_rng(0).integers(0, 2**bits, size=(16, samples))
    extra = [(338, 2)] if (photometric, samples) == (2, 4) else []  # alpha
    pixels = []
    for planes in (False, True):
        _tiff(tmp_path / "x.tif", values, bits, photometric, compression, planes, extra)
        pixels.append(np.asarray(read_image(tmp_path / "x.tif"))[0])
        with open(tmp_path / "x.tif", "rb") as file:
            pixels.append(np.asarray(read_image(io.BytesIO(file.read()), "x"))[0])
    if samples < 4:
        scaled = values >> (bits - 8) if bits > 8 else values * 255 // (2**bits - 1)
        scaled = 255 - scaled if photometric == 0 else scaled
        np.testing.assert_array_equal(pixels[0], np.broadcast_to(scaled, (16, 3)))
    for other in pixels[1:]:
        np.testing.assert_array_equal(other, pixels[0])


@pytest.mark.parametrize("compression", [1, 8])
def test_separate_planes_that_pillow_misreads_are_refused(tmp_path, compression):
    _tiff(tmp_path / "x.tif", [[1, 255]] * 8, 8, 1, compression, True, [(338, 2)])
    with pytest.raises(SingerError, match=r"x\.tif can't .* TIFF of LA pixels in separate planes"):
        read_image(tmp_path / "x.tif")


def test_deep_colours_of_a_png_keep_their_upper_bits():
    row = np.array([0, 255, 256, 32768, 51400, 65535], dtype=">u2")
    pixels = np.asarray(read_image(io.BytesIO(_png(16, 2, row.tobytes(), [1, 1, 1])), "x"))
    assert pixels[0].tolist() == [[0, 0, 1], [128, 200, 255]]


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


# Orientation

_UPRIGHT = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
_STORED = {  # how a camera stores the upright image, by the orientation that it notes
    1: _UPRIGHT,
    2: _UPRIGHT[:, ::-1],
    3: _UPRIGHT[::-1, ::-1],
    4: _UPRIGHT[::-1],
    5: _UPRIGHT.T,
    6: np.rot90(_UPRIGHT),
    7: _UPRIGHT[::-1, ::-1].T,
    8: np.rot90(_UPRIGHT, -1),
}


def _exif(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", _STORED)
@pytest.mark.parametrize("form", ["png", "webp", "tiff", "jpeg", "deep png", "deep tiff", "alpha"])
def test_images_are_turned_as_their_exif_data_say(tmp_path, form, orientation):
    stored, form, kind = _STORED[orientation], form.split()[-1], form.split()[0]
    expected, options = _UPRIGHT, {}
    if kind == "deep":
        stored = stored.astype(np.uint16) * 256 + 255
    elif kind == "alpha":
        stored, form = np.stack([stored] * 3 + [stored // 40 * 51], axis=-1), "png"
        alpha = _UPRIGHT // 40 / 5
        expected = _UPRIGHT * alpha + 100 * (1 - alpha)
    elif form == "webp":
        options["lossless"] = True
    elif form == "jpeg":  # blocks of one value
        stored = np.kron(stored, np.ones((16, 16), np.uint8))
        options = {"quality": 100, "subsampling": 0}
    Image.fromarray(stored).save(tmp_path / "x", form, exif=_exif(orientation), **options)
    pixels = np.asarray(read_image(tmp_path / "x", background=(100, 100, 100)))
    step = 16 if form == "jpeg" else 1
    difference = pixels[step // 2 :: step, step // 2 :: step].astype(int) - expected[..., None]
    assert difference.shape == (2, 3, 3)
    assert np.abs(difference).max() <= (1 if kind in ("jpeg", "alpha") else 0)  # rounding


@pytest.mark.parametrize("planes", [False, True])
def test_a_tiff_in_planes_is_turned_once(tmp_path, planes):
    values = np.arange(9).reshape(3, 3) * 256
    _tiff(tmp_path / "x.tif", values, 16, 2, 1, planes, [(274, 6)])
    pixels = np.asarray(read_image(tmp_path / "x.tif"))
    assert pixels.tolist() == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]


@pytest.mark.parametrize("form", ["png", "webp", "jpeg"])
@pytest.mark.parametrize(
    "exif", [b"", b"Exif\0\0no TIFF header", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12\0\3"]
)
def test_broken_exif_data_leave_an_image_as_it_is(tmp_path, form, exif):
    Image.new("RGB", (16, 8), (200, 200, 200)).save(tmp_path / "x", form, exif=exif)
    pixels = np.asarray(read_image(tmp_path / "x"))
    assert pixels.shape == (8, 16, 3)
    assert (pixels == 200).all()


def test_a_length_beyond_the_file_is_the_images_fault(tmp_path):
    if ".jp2" not in EXTENSIONS:
        pytest.skip("this Pillow reads no JPEG 2000")
    boxes = b"\0\0\0\x0cjP  \r\n\x87\n" + b"\0\0\0\x14ftypjp2 \0\0\0\0jp2 "
    boxes += b"\0\0\0\1jp2h" + (2**42).to_bytes(8, "big")
    (tmp_path / "bad.jp2").write_bytes(boxes + bytes(64))
    with pytest.raises(SingerError, match=r"bad\.jp2 can't be read as an image"):
        read_image(tmp_path / "bad.jp2")


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


@pytest.mark.parametrize("error", [ValueError, struct.error, IndexError, OSError])
def test_whatever_a_decoder_raises_names_the_image(image_folder, monkeypatch, error):
    def fail(self):
        raise error("from deep\ninside")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    with pytest.raises(SingerError, match=r"0\.png can't be read .*\(from deep inside\)"):
        read_image(image_folder / "class0" / "0.png")


EXHAUSTED = [OSError(code, "full") for code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)]


@pytest.mark.parametrize(
    ("place", "error"),
    # Where a file is opened, a damaged header may ask for more memory than there is.
    [*(("open", x) for x in EXHAUSTED), *(("load", x) for x in (MemoryError(), *EXHAUSTED))],
    ids=str,
)
def test_too_little_memory_is_not_the_images_fault(image_folder, monkeypatch, error, place):
    def fail(*_):
        raise error

    name = {"open": "PIL.Image.open", "load": "PIL.PngImagePlugin.PngImageFile.load"}[place]
    monkeypatch.setattr(name, fail)
    expected = str(error) or r"too little memory to read .*class0/0\.png$"
    with pytest.raises(type(error), match=expected.replace("[", r"\[")) as caught:
        _open(image_folder).read(0)
    assert getattr(caught.value, "errno", None) == getattr(error, "errno", None)


def test_an_image_that_is_gone_is_named(image_folder):
    source = _open(image_folder)
    shutil.rmtree(image_folder)
    with pytest.raises(SingerError, match=r"0\.png can't be read as an image .*No such file"):
        source.read(0)
