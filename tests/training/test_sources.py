"""Where images come from."""

import io
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import types
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from singer.config.schema import PHOTOS, DataConfig
from singer.data.decoding import read_image
from singer.data.sources import (
    HELD_OUT_PHOTOS,
    TRAIN_PHOTOS,
    ImageFiles,
    TarImages,
    open_source,
    photo_paths,
)
from singer.errors import SingerError


def _open(path, **options):
    return open_source(DataConfig(source=str(path), **options))


def _pixels(source):
    return [np.asarray(source.read(index)) for index in range(len(source))]


def _assert_same_images(one, other):
    assert len(one) == len(other) > 0
    for left, right in zip(_pixels(one), _pixels(other), strict=True):
        np.testing.assert_array_equal(left, right)


def _pack_folder(folder, path, under="."):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, under)
    return path


def _write(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def _names_in(source, folder):
    return [os.path.relpath(source.name(index), folder) for index in range(len(source))]


@pytest.mark.parametrize("kind", ["folder", "tar", "hfds"])
def test_every_source_puts_the_configured_background(tmp_path, kind):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGBA", (8, 8), (90, 90, 90, 0)).save(folder / "x.png")
    path = folder
    if kind == "tar":
        path = _pack_folder(folder, tmp_path / "a.tar")
    elif kind == "hfds":
        pytest.importorskip("datasets", reason="the package datasets is not installed")
        path = f"hfds/{folder}"
    assert _open(path).read(0).getpixel((3, 3)) == (255, 255, 255)
    assert _open(path, background=(1, 2, 3)).read(0).getpixel((3, 3)) == (1, 2, 3)


# Folders


def test_folders_are_searched_in_a_fixed_order(image_folder):
    names = _names_in(_open(image_folder), image_folder)
    assert names == [f"class{k}/{index}.png" for k in (0, 1) for index in range(k, 12, 2)]


@pytest.mark.parametrize("backwards", [False, True])
def test_names_that_read_alike_keep_an_order_of_their_own(tmp_path, monkeypatch, backwards):
    names = ["01.png", "1.PNG", "1.png", "2.png", "A.png", "a.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    scandir = os.scandir

    @contextmanager
    def listed(folder):  # as a disk may list them
        with scandir(folder) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=backwards)

    monkeypatch.setattr("os.scandir", listed)
    assert _names_in(_open(tmp_path), tmp_path) == names


@pytest.mark.parametrize("name", ["a.webp", "a.tif", "a.bmp", "a.gif", "A.JPG", "ä \udcff.png"])
def test_common_formats_and_odd_names_are_found(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    source = _open(tmp_path)
    assert source.name(0) == str(tmp_path / name)
    assert source.read(0).size == (8, 8)


def test_what_macos_leaves_beside_an_image_is_none(image_folder):
    (image_folder / "class0" / "._0.png").write_bytes(b"resource fork")
    assert len(_open(image_folder)) == 12
    assert len(_open(_pack_folder(image_folder, image_folder.parent / "a.tar"))) == 12


def test_image_files_go_before_tars_and_a_warning_says_so(image_folder, caplog):
    _pack_folder(image_folder / "class0", image_folder / "left.tar")
    source = _open(image_folder)
    assert len(source) == 12
    assert source.name(0).endswith("class0/0.png")
    assert "holds 12 image files and 1 .tar files" in caplog.text


def _assert_left_out(caplog, *parts):
    lines = [record.message for record in caplog.records if "left out" in record.message]
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


def test_links_to_the_folder_itself_repeat_no_image(image_folder, caplog):
    (image_folder / "again").symlink_to(image_folder)
    (image_folder / "class1" / "up").symlink_to("..")
    names = _names_in(_open(image_folder), image_folder)
    assert names == [f"class{k}/{index}.png" for k in (0, 1) for index in range(k, 12, 2)]
    _assert_left_out(caplog, "links to folders that are searched anyway: 2 (", "images/again")


def test_two_links_to_one_folder_count_once(image_folder, tmp_path, caplog):
    linked = tmp_path / "linked"
    (linked / "b").mkdir(parents=True)
    shutil.copy(image_folder / "class0" / "0.png", linked / "b")
    (linked / "a").symlink_to("b")  # found first, but the folder goes under its own name
    (linked / "x").symlink_to(image_folder / "class1")
    (linked / "y").symlink_to(image_folder)
    expected = ["b/0.png"]
    expected += [f"x/{index}.png" for index in range(1, 12, 2)]
    expected += [f"y/class0/{index}.png" for index in range(0, 12, 2)]
    assert _names_in(_open(linked), linked) == expected
    _assert_left_out(caplog, "links to folders that are searched anyway: 2 (")


def test_hidden_folders_are_left_out_and_counted(image_folder, caplog):
    for name in (".ipynb_checkpoints", "class0/.Trash-1000/files"):
        folder = image_folder / name
        folder.mkdir(parents=True)
        shutil.copy(image_folder / "class0" / "0.png", folder / "0-checkpoint.png")
    assert len(_open(image_folder)) == 12
    _assert_left_out(caplog, "hidden folders: 2 (", ".ipynb_checkpoints", "class0/.Trash-1000")


def test_a_source_that_is_hidden_itself_is_read(image_folder, caplog):
    hidden = image_folder.rename(image_folder.with_name(".images"))
    assert len(_open(hidden)) == 12
    assert caplog.text == ""


def test_what_is_no_regular_file_is_never_opened(image_folder, caplog):
    os.mkfifo(image_folder / "pipe.png")  # opened, it would wait for ever
    (image_folder / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(image_folder / "s.png"))
        source = _open(image_folder)
    assert len(source) == 12
    _assert_left_out(caplog, "named pipes, sockets and devices: 3 (", "pipe.png", "device.jpg")
    first = image_folder / "class0" / "0.png"
    first.unlink()
    os.mkfifo(first)
    with pytest.raises(SingerError, match=r"0\.png can't be read .*no regular file"):
        source.read(0)


def test_a_tar_that_is_a_named_pipe_is_never_opened(image_folder, tmp_path, caplog):
    shards = tmp_path / "shards"
    shards.mkdir()
    _pack_folder(image_folder, shards / "a.tar")
    os.mkfifo(shards / "b.tar")
    assert len(_open(shards)) == 12
    _assert_left_out(caplog, "named pipes, sockets and devices: 1 (", "b.tar")
    with pytest.raises(SingerError, match=r"got the file .*b\.tar.*expected an uncompressed"):
        _open(shards / "b.tar")


def test_links_to_nothing_are_named_when_they_are_read(image_folder):
    (image_folder / "gone.png").symlink_to("nowhere.png")
    (image_folder / "loop.png").symlink_to("loop.png")
    source = _open(image_folder)
    assert _names_in(source, image_folder)[-2:] == ["gone.png", "loop.png"]
    for index in (12, 13):
        with pytest.raises(SingerError, match=r"(gone|loop)\.png can't be read as an image"):
            source.read(index)


def test_a_subfolder_that_may_not_be_read_is_counted(image_folder, monkeypatch, caplog):
    scandir = os.scandir

    def refuse(path):  # root may read anything
        if os.path.basename(path) == "class1":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    assert len(_open(image_folder)) == 6
    _assert_left_out(caplog, "folders that can't be read: 1 (", "images/class1")


# Photographs


def test_photographs_are_there_and_none_is_in_both_sets():
    train, held_out = photo_paths(TRAIN_PHOTOS), photo_paths(HELD_OUT_PHOTOS)
    source = _open(PHOTOS)
    assert [source.name(index) for index in range(len(source))] == [str(path) for path in train]
    assert not set(train) & set(held_out)
    for path in (*train, *held_out):
        assert min(read_image(path).size) >= 126


def test_missing_photographs_name_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SingerError, match=r"scikit-image is not installed.*demo extra"):
        photo_paths(TRAIN_PHOTOS)


def test_a_folder_of_the_photographs_name_is_pointed_out(tmp_path, monkeypatch, caplog):
    (tmp_path / PHOTOS).mkdir()
    monkeypatch.chdir(tmp_path)
    open_source(DataConfig(source=PHOTOS))
    assert "for the folder say ./photos" in caplog.text


def test_images_to_keep_are_decoded_once(image_folder):
    path = image_folder / "class0" / "0.png"
    kept, fresh = ImageFiles([path], keep=True), ImageFiles([path])
    first = kept.read(0)
    path.write_bytes(b"")
    assert kept.read(0) is first
    with pytest.raises(SingerError):
        fresh.read(0)


# Tars


@pytest.mark.parametrize("under", [".", "train", "x" * 120])  # the last needs a long-name header
def test_class_folders_in_a_tar_are_the_folder(image_folder, tmp_path, under):
    packed = _open(_pack_folder(image_folder, tmp_path / "train.tar", under))
    _assert_same_images(packed, _open(image_folder))
    assert packed.name(1).endswith("class0/2.png")
    assert packed.name(1).startswith(f"{tmp_path}/train.tar:")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_shards_are_the_folder(image_folder, tmp_path, form):
    source = _open(image_folder)
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in (10, 2, 1):  # not the order in which they are to be taken
        with tarfile.open(shards / f"train-{shard}.tar", "w", format=form) as tar:
            position = {1: 0, 2: 1, 10: 2}[shard] * 4
            for index in range(position, position + 4):
                with open(source.name(index), "rb") as file:
                    _write(tar, f"{index:05}.png", file.read())
                _write(tar, f"{index:05}.json", b'{"width": 8}')
                _write(tar, f"{index:05}.cls", b"7")
    packed = _open(shards)
    _assert_same_images(packed, source)
    assert packed.name(4) == f"{shards}/train-2.tar:00004.png"


def test_tars_in_a_tar_are_the_folder(image_folder, tmp_path):
    """As ImageNet is distributed: a tar of each class in one tar."""
    outer = tmp_path / "ILSVRC.tar"
    with tarfile.open(outer, "w") as tar:
        for name in ("class1", "class0"):
            inner = _pack_folder(image_folder / name, tmp_path / f"{name}.tar")
            tar.add(inner, f"{name}.tar")
    packed = _open(outer)
    _assert_same_images(packed, _open(image_folder))
    assert packed.name(0) == f"{outer}:class0.tar:./0.png"


def test_opening_a_tar_writes_and_keeps_open_nothing(image_folder, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    tar = _pack_folder(image_folder, folder / "a.tar")
    source = _open(folder)
    source.read(0)
    assert os.listdir(folder) == ["a.tar"]
    tar.unlink()  # a file that is open could still be read
    with pytest.raises(SingerError, match=r"a\.tar:\./class0/0\.png can't be read .*No such file"):
        source.read(0)


def test_a_broken_image_in_a_tar_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        _write(tar, "x.jpg", b"no image")
    source = _open(tmp_path)
    with pytest.raises(
        SingerError, match=r"a\.tar:x\.jpg can't be .* \(in no known image format\)"
    ):
        source.read(0)


@pytest.mark.parametrize("kind", ["files", "tar"])
def test_sources_travel_to_a_spawned_worker(image_folder, tmp_path, kind):
    source = _open(image_folder)
    if kind == "tar":
        source = _open(_pack_folder(image_folder, tmp_path / "a.tar"))
    source.read(0)
    _assert_same_images(pickle.loads(pickle.dumps(source)), source)


def _link(tar, name, target, kind=tarfile.SYMTYPE):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    tar.addfile(member)


@pytest.fixture
def encoded(image_folder):
    """Images to put into a tar, by number."""
    source = ImageFiles(sorted(image_folder.glob("*/*.png")))
    return [Path(source.name(index)).read_bytes() for index in range(len(source))]


def _extract(path, folder):
    folder.mkdir()
    tar = shutil.which("tar")
    if tar is None:
        pytest.skip("there is no program tar")
    subprocess.run([tar, "-xf", path, "-C", folder], check=True, capture_output=True)
    return folder


def _assert_as_extracted(path, folder):
    """Names and pixels are those of the extracted tar."""
    packed, extracted = _open(path), _open(_extract(path, folder))
    names = [f"{path}:{name}" for name in _names_in(extracted, folder)]
    assert [packed.name(index) for index in range(len(packed))] == names
    _assert_same_images(packed, extracted)


def test_files_that_gnu_tar_packs_as_hard_links_are_images(image_folder, tmp_path):
    os.link(image_folder / "class0" / "0.png", image_folder / "class1" / "0.png")
    os.link(image_folder / "class0" / "0.png", image_folder / "class0" / "00.png")
    path = _pack_folder(image_folder, tmp_path / "a.tar", "train")
    with tarfile.open(path) as tar:
        assert sum(member.islnk() for member in tar) == 2
    _assert_as_extracted(path, tmp_path / "extracted")


def test_links_give_what_extraction_gives(encoded, tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        _link(tar, "a/later.png", "../b/1.png")
        _link(tar, "a/chain.png", "later.png")
        _link(tar, "a/through_a_folder.png", "../c/1.png")
        _link(tar, "c", "b")  # a folder, whose images count once
        _write(tar, "b/1.png", encoded[1])
        _write(tar, "./b/2.png", encoded[2])
        _link(tar, "b/earlier.png", "./2.png")
        _link(tar, "b/hard.png", "b/2.png", tarfile.LNKTYPE)
        _link(tar, "b/hard_chain.png", "b/hard.png", tarfile.LNKTYPE)
        _link(tar, "b/hard_link_of_link.png", "b/earlier.png", tarfile.LNKTYPE)
        _write(tar, "blobs/3f2a", encoded[3])
        _link(tar, "b/3.png", "../blobs/3f2a")  # a file without an extension of its own
        _link(tar, "b/4.png", "blobs/3f2a", tarfile.LNKTYPE)
    packed, extracted = (
        _open(tmp_path / "a.tar"),
        _open(_extract(tmp_path / "a.tar", tmp_path / "x")),
    )
    names = [packed.name(index).partition(".tar:")[2] for index in range(len(packed))]
    assert [os.path.normpath(name) for name in sorted(names, key=os.path.normpath)] == sorted(
        _names_in(extracted, tmp_path / "x")
    )
    by_name = {
        os.path.normpath(name): pixels for name, pixels in zip(names, _pixels(packed), strict=True)
    }
    for index, pixels in enumerate(_pixels(extracted)):
        name = os.path.relpath(extracted.name(index), tmp_path / "x")
        np.testing.assert_array_equal(by_name[name], pixels)
    assert len(packed) == 11
    lines = [record.message for record in caplog.records]
    assert lines == [lines[0]]  # of the extracted folder, about c
    assert "links to folders that are searched anyway: 1" in lines[0]


def test_of_members_with_one_name_the_last_counts(encoded, tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        _write(tar, "1.png", encoded[1])
        _link(tar, "2.png", "1.png", tarfile.LNKTYPE)  # of what is there now
        _write(tar, "1.png", encoded[3])
        _link(tar, "1.png", "1.png", tarfile.LNKTYPE)  # as GNU tar packs a file named twice
    _assert_as_extracted(tmp_path / "a.tar", tmp_path / "extracted")
    _assert_left_out(caplog, "members that a later one replaces: 1 (", "a.tar:1.png")


def test_links_to_tars_in_a_tar_are_followed(image_folder, tmp_path):
    inner = _pack_folder(image_folder / "class0", tmp_path / "class0.tar")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(inner, "class0.tar")
        _link(tar, "hard.tar", "class0.tar", tarfile.LNKTYPE)
        _link(tar, "soft.tar", "hard.tar")
    packed = _open(tmp_path / "a.tar")
    assert packed.name(6) == f"{tmp_path}/a.tar:hard.tar:./0.png"
    expected = _pixels(_open(image_folder / "class0")) * 3
    for left, right in zip(_pixels(packed), expected, strict=True):
        np.testing.assert_array_equal(left, right)


def _add_sparse(tar, name):
    member = tarfile.TarInfo(name)
    member.type = tarfile.GNUTYPE_SPARSE
    tar.addfile(member)


@pytest.mark.parametrize("is_nested", [False, True])
def test_what_a_tar_does_not_serve_is_counted_and_named(encoded, tmp_path, caplog, is_nested):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        _write(tar, "1.png", encoded[1])
        _link(tar, "absolute.png", "/etc/passwd.png")
        _link(tar, "escaping.png", "../1.png")
        _link(tar, "folder", "/data/images")
        _link(tar, "circle.png", "circle.png")
        _link(tar, "missing.png", "x.png")
        _link(tar, "hard_to_a_later_one.png", "2.png", tarfile.LNKTYPE)
        _link(tar, "notes.txt", "/etc/notes.txt")  # no image
        _write(tar, "2.png", encoded[2])
        for name, kind in (("pipe.png", tarfile.FIFOTYPE), ("disk.png", tarfile.BLKTYPE)):
            _link(tar, name, "", kind)
        _add_sparse(tar, "sparse.png")
        _link(tar, "link_to_sparse.png", "sparse.png")
        _write(tar, ".ipynb_checkpoints/1-checkpoint.png", encoded[1])
        _link(tar, "blob.tar", "1.png")
    if is_nested:
        with tarfile.open(tmp_path / "outer.tar", "w") as tar:
            tar.add(tmp_path / "a.tar", "a.tar")
    source = _open(tmp_path / ("outer.tar" if is_nested else "a.tar"))
    assert len(source) == 2
    assert np.array_equal(
        np.asarray(source.read(1)), np.asarray(Image.open(io.BytesIO(encoded[2])))
    )
    _assert_left_out(
        caplog,
        "links to nothing in the tar: 6 (",
        "a.tar:absolute.png",
        "a.tar:folder",
        "named pipes, sockets and devices: 2 (",
        "sparse files: 2 (",
        "a.tar:link_to_sparse.png",
        "images in hidden folders: 1 (",
        "links to files of another kind: 1 (",
    )
    assert "notes.txt" not in caplog.text


def test_a_tar_of_sparse_images_alone_says_so(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        _add_sparse(tar, "a.png")
    with pytest.raises(SingerError, match=r"no image file .* in .*a\.tar$"):
        _open(tmp_path / "a.tar")
    _assert_left_out(caplog, "sparse files: 1 (", "a.tar:a.png")


def test_what_several_tars_leave_out_is_one_line(encoded, tmp_path, caplog):
    for name in "ab":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            _write(tar, "1.png", encoded[1])
            _link(tar, "2.png", "x.png")
    assert len(TarImages([tmp_path / "a.tar", tmp_path / "b.tar"])) == 2
    _assert_left_out(caplog, "links to nothing in the tar: 2 (", "a.tar:2.png", "b.tar:2.png")


def _gzipped(path, folder):
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, ".")


def _cut(path, folder):
    _pack_folder(folder, path)
    path.write_bytes(path.read_bytes()[:5000])


def _cut_in_a_header(path, folder):
    _pack_folder(folder, path)
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset + 100])


def _overwritten(path, folder):
    _pack_folder(folder, path)
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    content = bytearray(path.read_bytes())
    content[last.offset : last.offset + 512] = b"x" * 512
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("break_tar", "reason"),
    [
        (lambda path, folder: path.write_bytes(b""), "empty"),
        (lambda path, folder: path.write_bytes(b"no tar " * 200), r"\S+"),
        (_gzipped, r"\S+"),
        (_cut, r"unexpected end of data"),
        (_cut_in_a_header, r"damaged or cut off at byte \d+"),
        (_overwritten, r"damaged or cut off at byte \d+"),
    ],
)
def test_a_file_that_is_no_sound_tar_is_refused(image_folder, tmp_path, break_tar, reason):
    path = tmp_path / "a.tar"
    break_tar(path, image_folder)
    with pytest.raises(
        SingerError, match=rf"data\.source: .*a\.tar can't be read as an uncomp.*\(.*{reason}"
    ) as caught:
        _open(path)
    assert "\n" not in str(caught.value)


def test_a_tar_without_an_end_mark_is_sound(image_folder, tmp_path):
    path = _pack_folder(image_folder, tmp_path / "a.tar")
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + -(-last.size // 512) * 512])
    assert len(_open(path)) == 12


# Sources that are none


def test_missing_and_empty_sources_are_named(tmp_path):
    with pytest.raises(SingerError, match=r"data\.source: got .*absent.*expected an existing fold"):
        _open(tmp_path / "absent")
    with pytest.raises(SingerError, match=r"data\.source: .* is an empty folder"):
        _open(tmp_path)
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(SingerError, match=r"data\.source: .* holds no image file .*, nor a \.tar"):
        _open(tmp_path)
    with pytest.raises(SingerError, match=r"got the file .*notes\.txt.*expected an .*\.tar"):
        _open(tmp_path / "notes.txt")


def test_tars_without_an_image_are_named(tmp_path):
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            _write(tar, "x.json", b"{}")
    with pytest.raises(SingerError, match=r"no image file .* in .*a\.tar$"):
        _open(tmp_path / "a.tar")
    with pytest.raises(SingerError, match=r"no image file .* in 2 tars, .*a\.tar the first"):
        _open(tmp_path)


def test_a_folder_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)  # root may read anything
    with pytest.raises(SingerError, match=r"data\.source: .*: Permission denied"):
        _open(tmp_path)


# Hugging Face datasets


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SingerError, match=r"hfds/some/name needs .* pip install datasets"):
        _open("hfds/some/name")


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    module = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    module.disable_progress_bars()
    return module


@pytest.fixture
def parquet(datasets, image_folder, tmp_path):
    """The folder's images in a parquet file, without labels, and an empty row after them."""
    source = _open(image_folder)
    rows = []
    for index in range(len(source)):
        with open(source.name(index), "rb") as file:
            rows.append({"bytes": file.read(), "path": None})
    rows.append(None)
    columns = {
        "image": rows,
        "raw": [row and row["bytes"] for row in rows],
        "number": list(range(13)),
        "several": [[row] for row in rows],
    }
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "raw": datasets.Value("binary"),
            "number": datasets.Value("int64"),
            "several": [datasets.Image()],
        }
    )
    folder = tmp_path / "parquet"
    folder.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / "train.parquet")
    return folder


@pytest.mark.parametrize("key", ["image", "raw"])
def test_a_hugging_face_dataset_without_labels_is_the_folder(parquet, image_folder, key):
    whole = _open(f"hfds/{parquet}", image_key=key)
    assert len(whole) == 13
    first = _open(f"hfds/{parquet}", image_key=key, split="train[:12]")
    _assert_same_images(pickle.loads(pickle.dumps(first)), _open(image_folder))
    with pytest.raises(SingerError, match=r"split train, row 12 can't be read as an image"):
        whole.read(12)


def test_a_hugging_face_folder_of_images_is_the_folder(datasets, image_folder):
    packed = _open(f"hfds/{image_folder}")  # its images are paths, not bytes
    images = {image.tobytes() for image in _pixels(packed)}
    assert images == {image.tobytes() for image in _pixels(_open(image_folder))}


@pytest.fixture
def saved(parquet, datasets, tmp_path):
    """The folder's images as ``save_to_disk`` writes a ``Dataset`` and a ``DatasetDict``."""
    rows = datasets.load_dataset(str(parquet), split="train[:12]").with_format("numpy")
    rows.save_to_disk(tmp_path / "one")
    both = {"train": rows.select(range(6)), "test": rows.select(range(6, 12))}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "dict")
    return tmp_path


@pytest.mark.parametrize("prefix", ["", "hfds/"])
def test_what_save_to_disk_wrote_is_the_folder(saved, image_folder, prefix):
    one = _open(f"{prefix}{saved}/one")
    _assert_same_images(pickle.loads(pickle.dumps(one)), _open(image_folder))
    pixels = _pixels(one)
    for split, first, last in (
        ("train", 0, 6),
        ("test", 6, 12),
        ("test[:50%]", 6, 9),
        ("train[4:]+test[:1]", 4, 7),
    ):
        part = _pixels(_open(f"{prefix}{saved}/dict", split=split))
        np.testing.assert_array_equal(
            [image.shape for image in part], [image.shape for image in pixels[first:last]]
        )
        assert all(map(np.array_equal, part, pixels[first:last]))
    assert len(_open(f"{prefix}{saved}/one", split="train[:2]")) == 2
    for split, reason in (("dev", "Unknown split"), ("train[:0]", "no rows")):
        with pytest.raises(SingerError, match=rf"can't be loaded with data\.split=.*\({reason}"):
            _open(f"{prefix}{saved}/dict", split=split)


def test_what_save_to_disk_wrote_is_read_without_the_package_installed(tmp_path, monkeypatch):
    """With a stand-in for it."""
    (tmp_path / "one").mkdir()
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / "one" / name).write_text("{}")
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(encoded, "png")

    class Rows(list):
        split, column_names = None, ["image"]

        def select(self, indices):
            return Rows([self[index] for index in indices])

        def with_format(self, form):
            return self

        def select_columns(self, names):
            return self

        def cast_column(self, name, feature):
            return self

    class ReadInstruction:
        @classmethod
        def from_spec(cls, spec):
            return cls()

        def to_absolute(self, sizes):
            return [types.SimpleNamespace(splitname="train", from_=1, to=sizes["train"])]

    row = {"image": {"bytes": encoded.getvalue(), "path": None}}
    stand_in = types.ModuleType("datasets")
    stand_in.load_from_disk = lambda folder: Rows([row] * 3)
    stand_in.ReadInstruction = ReadInstruction
    stand_in.concatenate_datasets = lambda parts: parts[0]
    stand_in.Image = lambda decode: None
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    source = _open(tmp_path / "one", split="train[1:]")
    assert len(source) == 2
    assert source.read(1).getpixel((0, 0)) == (1, 2, 3)


# Several sources


def test_a_list_of_sources_follows_its_order(image_folder, tmp_path):
    tar = _pack_folder(image_folder / "class1", tmp_path / "b.tar")
    both = _open_list([tar, image_folder / "class0"])
    assert both.name(5) == f"{tar}:./11.png"
    assert both.name(6) == str(image_folder / "class0" / "0.png")
    expected = _pixels(_open(image_folder / "class1")) + _pixels(_open(image_folder / "class0"))
    for left, right in zip(_pixels(pickle.loads(pickle.dumps(both))), expected, strict=True):
        np.testing.assert_array_equal(left, right)


def _open_list(sources, **options):
    return open_source(DataConfig(source=[str(source) for source in sources], **options))


def test_a_list_may_hold_a_hugging_face_dataset_and_photographs(parquet, image_folder):
    several = _open_list([f"hfds/{parquet}", PHOTOS, image_folder], split="train[:2]")
    assert len(several) == 2 + len(TRAIN_PHOTOS) + 12
    assert several.name(1).startswith("hfds/")
    np.testing.assert_array_equal(
        np.asarray(several.read(2 + len(TRAIN_PHOTOS))), _pixels(_open(image_folder))[0]
    )


@pytest.mark.parametrize(
    ("pattern", "numbers"),
    [
        ("train-{008..010}.tar", [8, 9, 10]),
        ("train-*.tar", [8, 9, 10, 11]),
        ("train-0{10,08}.tar", [10, 8]),
        ("{x,train}-01?.tar", None),
        ("train-01[01].tar", [10, 11]),
    ],
)
def test_shard_patterns_name_several_tars(image_folder, tmp_path, pattern, numbers):
    for number in (8, 9, 10, 11):
        _pack_folder(image_folder / "class0", tmp_path / f"train-{number:03}.tar")
    if numbers is None:
        with pytest.raises(SingerError, match=r"data\.source: nothing matches '.*x-01\?\.tar'"):
            _open(tmp_path / pattern)
        return
    for source in (_open(tmp_path / pattern), _open_list([tmp_path / pattern])):
        tars = [source.name(index).partition(".tar:")[0] for index in range(0, len(source), 6)]
        assert tars == [f"{tmp_path}/train-{number:03}" for number in numbers]


def test_patterns_of_folders_and_names_that_look_like_patterns(image_folder, tmp_path):
    for name in ("a", "b[1]", "{c}"):
        shutil.copytree(image_folder / "class0", tmp_path / "sets" / name)
    assert len(_open(tmp_path / "sets" / "*")) == 18
    assert len(_open(tmp_path / "sets" / "b[1]")) == 6
    assert len(_open(tmp_path / "sets" / "{c}")) == 6


def test_a_source_that_is_named_twice_is_read_once(image_folder, tmp_path, caplog):
    tar = _pack_folder(image_folder, tmp_path / "a.tar")
    (tmp_path / "link").symlink_to(image_folder)
    source = _open_list([image_folder, tar, tmp_path / "link", tmp_path / "*.tar"])
    assert len(source) == 24
    _assert_left_out(caplog, "sources named again: 2 (", "link", "a.tar")


def test_every_source_of_a_list_puts_the_configured_background(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("LA", (8, 8), (90, 0)).save(tmp_path / name / "x.png")
    source = _open_list([tmp_path / "a", tmp_path / "b"], background=(1, 2, 3))
    assert [source.read(index).getpixel((0, 0)) for index in (0, 1)] == [(1, 2, 3)] * 2


def test_a_missing_source_of_a_list_is_named(image_folder, tmp_path):
    with pytest.raises(SingerError, match=r"data\.source: got '.*absent', expected an existing"):
        _open_list([image_folder, tmp_path / "absent"])


def test_mistakes_about_a_hugging_face_dataset_name_the_key(parquet, tmp_path):
    with pytest.raises(SingerError, match=r"data\.source: hfds/.*absent can't be loaded"):
        _open(f"hfds/{tmp_path}/absent")
    with pytest.raises(SingerError, match=r"can't be loaded with data\.split='dev'.*'train'"):
        _open(f"hfds/{parquet}", split="dev")
    with pytest.raises(SingerError, match=r"data\.split='train\[:0\]' .*no data"):
        _open(f"hfds/{parquet}", split="train[:0]")
    with pytest.raises(SingerError, match=r"data\.image_key: got 'img', expected a column .*: ima"):
        _open(f"hfds/{parquet}", image_key="img")
    for key in ("number", "several"):
        with pytest.raises(SingerError, match=rf"data\.image_key: got '{key}', .* it holds \S+"):
            _open(f"hfds/{parquet}", image_key=key)


def test_tars_are_taken_in_the_order_given(image_folder, tmp_path):
    tars = [
        _pack_folder(image_folder / name, tmp_path / f"{name}.tar") for name in ("class1", "class0")
    ]
    source = TarImages(tars)
    assert source.name(0) == f"{tars[0]}:./1.png"
    assert source.name(11) == f"{tars[1]}:./10.png"
