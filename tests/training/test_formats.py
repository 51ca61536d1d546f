"""Which files are images, in folders and in tars, and the names that a tar gives them."""

import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from image_sources import assert_left_out, open_at, pack_folder, pixels_of, write_member
from PIL import Image, features

from singer.data import listing
from singer.data.sources import ImageFiles
from singer.errors import SingerError


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.jfif", "jpeg"),
        ("a.JPE", "jpeg"),
        ("a.mpo", "mpo"),
        ("a.apng", "png"),
        ("a.dib", "dib"),
        ("a.ppm", "ppm"),
        ("a.pnm", "ppm"),
        ("a.pgm", "ppm"),
        ("a.pbm", "ppm"),
        ("a.jp2", "jpeg2000"),
        ("a.j2k", "jpeg2000"),
        ("a.avif", "avif"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_formats_that_pillow_reads_are_images(tmp_path, name, form, kind):
    feature = {"jpeg2000": "jpg_2000", "avif": "avif"}.get(form)
    if feature and not (".avif" in listing.EXTENSIONS and features.check(feature)):
        pytest.skip(f"this Pillow reads no {form}")
    folder = tmp_path / "images"
    folder.mkdir()
    grey = 255 if name.endswith(".pbm") else 200
    mode = {".pgm": "L", ".pbm": "1"}.get(name[-4:], "RGB")
    Image.new("RGB", (16, 8), (grey,) * 3).convert(mode).save(folder / name, form)
    source = open_at(folder if kind == "folder" else pack_folder(folder, tmp_path / "a.tar"))
    (pixels,) = pixels_of(source)
    assert pixels.shape == (8, 16, 3)
    assert np.abs(pixels.astype(int) - grey).max() <= 1  # lossy


UNREAD = ["a.heic", "b/c.DNG", "d.jxl", "e.tar.gz", "b/f.tgz", "g.zip"]


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_images_and_archives_that_are_not_read_are_counted(image_folder, tmp_path, caplog, kind):
    (image_folder / "b").mkdir()
    for name in (*UNREAD, "._a.heic", "labels.csv", "h.gz"):
        (image_folder / name).write_bytes(b"x")
    path = image_folder if kind == "folder" else pack_folder(image_folder, tmp_path / "a.tar")
    assert len(open_at(path)) == 12
    assert_left_out(
        caplog,
        "images in formats that are not read: 3 (",
        "compressed archives: 3 (",
        *UNREAD,
    )
    assert "labels" not in caplog.text


def test_a_folder_of_archives_alone_names_them(tmp_path, caplog):
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    with pytest.raises(SingerError, match=r"holds no image file"):
        open_at(tmp_path)
    assert_left_out(caplog, "compressed archives: 1 (", "a.tar.gz")


def test_without_pillows_avif_such_images_are_counted(image_folder, monkeypatch, caplog):
    monkeypatch.setattr(listing, "EXTENSIONS", (".png",))
    (image_folder / "a.avif").write_bytes(b"x")
    assert len(open_at(image_folder)) == 12
    assert_left_out(caplog, "images in formats that are not read: 1 (", "a.avif")


def test_members_of_any_name_are_read(image_folder, tmp_path):
    """Extraction refuses ``..``, but reading writes nothing."""
    encoded = [path.read_bytes() for path in sorted(image_folder.glob("*/*.png"))]
    names = ["../../b/5.png", "../1.png", "../6.png", "/2.png", "6.png", "a/../../3.png"]
    links = [("../7.png", "../../b/5.png", tarfile.LNKTYPE), ("8.png", "../1.png", tarfile.SYMTYPE)]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for index, name in enumerate(names):
            write_member(tar, name, encoded[index])
        for name, target, kind in links:
            member = tarfile.TarInfo(name)
            member.linkname, member.type = target, kind
            tar.addfile(member)
    source = open_at(tmp_path / "a.tar")
    expected = {**dict(zip(names, encoded, strict=False)), "../7.png": encoded[0]}
    expected["8.png"] = encoded[1]
    found = [source.name(index).removeprefix(f"{tmp_path}/a.tar:") for index in range(len(source))]
    assert sorted(found) == sorted(expected)
    for index, name in enumerate(found):
        pixels = np.asarray(Image.open(io.BytesIO(expected[name])))
        np.testing.assert_array_equal(np.asarray(source.read(index)), pixels)
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "images"]


def test_one_long_name_lengthens_no_other():
    names = [f"{index}.png" for index in range(10_000)] + ["x" * 10_000, "é\udcff.png", ""]
    source = ImageFiles(names)
    assert len(pickle.dumps(source)) < 1_000_000
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.name(index) for index in range(len(copy))] == names
