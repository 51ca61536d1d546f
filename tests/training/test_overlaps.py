"""Folders and tars that several sources, links or patterns lead to, and patterns themselves."""

import errno
import glob
import os
import shutil
import signal
from contextlib import contextmanager

import numpy as np
import pytest
from image_sources import assert_left_out, names_in, open_at, pack_folder, pixels_of
from PIL import Image

from singer.config.schema import DataConfig
from singer.data.listing import LeftOut, expand_pattern
from singer.data.sources import open_source
from singer.errors import SingerError


def _open_list(*sources):
    return open_source(DataConfig(source=[str(source) for source in sources]))


@contextmanager
def _in_seconds(seconds):
    def expire(*_):
        raise AssertionError("not done in time")  # glob catches an OSError, a TimeoutError too

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


CLASSES = [[f"class{k}/{index}.png" for index in range(k, 12, 2)] for k in (0, 1)]


@pytest.mark.parametrize(
    ("parts", "classes", "count"),
    [
        (["", "class0"], [0, 1], 1),
        (["class1", ""], [1, 0], 1),
        (["class1", "class0", ""], [1, 0], 2),
        (["**/"], [0, 1], 2),
        (["class0", "linked", "class1"], [0, 1], 1),
        (["{class1,class0,class1/}", "*"], [1, 0], 1),
    ],
)
def test_an_image_of_several_sources_is_read_once(
    image_folder, tmp_path, caplog, parts, classes, count
):
    if "linked" in parts:
        (tmp_path / "other").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / "other" / "x.png")
        (tmp_path / "other" / "link").symlink_to(image_folder / "class0")
        (image_folder / "linked").symlink_to(tmp_path / "other")
    source = _open_list(*(f"{image_folder}/{part}" for part in parts))
    names = [name.replace("//", "/") for name in names_in(source, image_folder)]
    expected = [name for k in classes for name in CLASSES[k]]
    if "linked" in parts:
        expected.insert(6, "linked/x.png")
    assert names == expected
    lines = [record.message for record in caplog.records]
    counts = [line.partition("found before: ")[2][:1] for line in lines if "found before" in line]
    again = [line.partition("named again: ")[2][:1] for line in lines if "named again" in line]
    assert sum(map(int, counts)) == (count if parts[-1] != "*" else 0)
    assert again == ([] if parts[-1] != "*" else ["3"])


@pytest.mark.parametrize("parts", [["", "b.tar"], ["b.tar", ""], ["*.tar", ""], ["", "*.tar"]])
def test_a_tar_of_several_sources_is_read_once(image_folder, tmp_path, caplog, parts):
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("class0", "class1"):
        pack_folder(image_folder / name, shards / f"{'ba'[name == 'class0']}.tar")
    source = _open_list(*(shards / part for part in parts))
    first = 6 if parts[0] == "b.tar" else 0
    assert source.name(first) == f"{shards}/a.tar:./0.png"
    assert source.name(6 - first) == f"{shards}/b.tar:./1.png"
    assert len(source) == 12
    assert "folders and tars that were found before: " in caplog.text


def test_two_names_of_one_tar_count_once(image_folder, tmp_path, caplog):
    shards = tmp_path / "shards"
    shards.mkdir()
    pack_folder(image_folder, shards / "a.tar")
    (shards / "b.tar").symlink_to("a.tar")
    os.link(shards / "a.tar", shards / "c.tar")
    assert len(open_at(shards)) == 12
    assert_left_out(caplog, "folders and tars that were found before: 2 (")


def test_tars_in_a_subfolder_are_counted_and_read_when_they_are_named(
    image_folder, tmp_path, caplog
):
    inner = image_folder / "tars"
    inner.mkdir()
    pack_folder(image_folder / "class0", inner / "a.tar")
    assert len(open_at(image_folder)) == 12
    assert_left_out(caplog, "tars in subfolders: 1 (", "images/tars/a.tar")
    assert len(_open_list(image_folder, inner)) == 18


def test_tars_beside_images_that_were_found_before_are_not_read(image_folder, caplog):
    pack_folder(image_folder / "class1", image_folder / "class0" / "a.tar")
    assert len(_open_list(image_folder, image_folder / "class0")) == 12
    assert "class0 holds 6 image files and 1 .tar files; the images are taken" in caplog.text


def test_links_to_folders_above_take_in_no_other_folders(image_folder, tmp_path, caplog):
    source = image_folder / "class0"
    (source / "up").symlink_to("..")
    (source / "deeper").mkdir()
    (source / "deeper" / "up").symlink_to(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (8, 8)).save(other / "x.png")
    (source / "link").symlink_to(other)
    (other / "back").symlink_to(image_folder)
    assert names_in(open_at(source), source) == [
        *(f"{index}.png" for index in range(0, 12, 2)),
        "link/x.png",
    ]
    assert_left_out(caplog, "links to folders that hold the source: 3 (", "class0/up", "link/back")


@pytest.mark.parametrize("pattern", ["**/", "*/**/", "**/class?", "**/class0/"])
def test_recursive_patterns_end_and_meet_each_folder_once(image_folder, pattern):
    (image_folder / "again").symlink_to(image_folder)
    (image_folder / "more").symlink_to(image_folder)
    with _in_seconds(20):
        source = open_at(f"{image_folder}/{pattern}")
    expected = {name for of in CLASSES[: 1 if "class0" in pattern else 2] for name in of}
    names = [os.path.basename(name) for name in names_in(source, image_folder)]
    assert sorted(names) == sorted(map(os.path.basename, expected))


@pytest.mark.parametrize(
    "pattern",
    [
        *("**", "**/", "**/*", "a/**", "a/**/", "**/b", "**/b/**", "**/*.txt", "*/**/c*"),
        *("**/b/*.txt", "**/**/b", "a**/b", "nothing/**/*", "[a]/**/*.txt", "**/b[[]1]/*"),
    ],
)
def test_recursive_patterns_match_what_glob_matches(tmp_path, monkeypatch, pattern):
    for folder in ("a/b/c", "a/c/b", "b[1]/b", ".hidden/b", "a/.hidden", "x"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "n.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    for prefix in ("", f"{tmp_path}/"):
        expected = set(glob.glob(prefix + pattern, recursive=True)) - {""}
        if not expected:
            with pytest.raises(SingerError, match=r"data\.source: nothing matches"):
                expand_pattern(prefix + pattern, LeftOut())
            continue
        found = expand_pattern(prefix + pattern, LeftOut())
        assert len(found) == len(set(found))
        assert set(found) == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-{5..3}.tar", r"got the range \{5\.\.3\} in 'a-.*', expected .* ascends: \{3\.\.5\}$"),
        ("{x,y}/a-{10..09}.tar", r"got the range \{10\.\.09\} .* ascends: \{09\.\.10\}$"),
        ("a-{0..99999999999}.tar", r"stands for more than 1,000,000 paths$"),
        ("{0..999}{0..999}{0..9}", r"stands for more than 1,000,000 paths$"),
    ],
)
def test_ranges_that_can_not_be_meant_are_refused(pattern, expected):
    with pytest.raises(SingerError, match=rf"^data\.source: .*{expected}"):
        open_at(pattern)


def test_a_range_of_one_and_one_too_long_for_a_number(image_folder, tmp_path):
    pack_folder(image_folder, tmp_path / "a-3.tar")
    assert len(open_at(tmp_path / "a-{3..3}.tar")) == 12
    with pytest.raises(SingerError, match=r"data\.source: got .*, expected an existing folder"):
        open_at("{0.." + "1" * 5000 + "}")


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_too_many_open_files_leave_out_no_folder(image_folder, monkeypatch, code):
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "class1":
            raise OSError(code, "full")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(OSError, match="full") as caught:
        open_at(image_folder)
    assert caught.value.errno == code


def test_a_source_without_new_images_is_left_out(image_folder, tmp_path, caplog):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "x").symlink_to(image_folder / "class0")
    (image_folder / "empty").mkdir()
    source = _open_list(image_folder, image_folder / "empty", tmp_path / "links")
    assert len(source) == 12
    for left, right in zip(pixels_of(source), pixels_of(open_at(image_folder)), strict=True):
        np.testing.assert_array_equal(left, right)
    shutil.rmtree(tmp_path / "links")
    (tmp_path / "links").mkdir()
    with pytest.raises(SingerError, match=r"links' is an empty folder"):
        _open_list(image_folder, tmp_path / "links")
