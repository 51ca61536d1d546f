"""Which images a folder and a tar hold, and what is left out."""

import io
import os
import pickle
import shutil
import socket
import subprocess
import tarfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from image_sources import (
    assert_left_out,
    assert_same_images,
    names_in,
    open_at,
    pack_folder,
    pixels_of,
    write_member,
)
from PIL import Image

from singer.data.sources import (
    ImageFiles,
    TarImages,
)
from singer.errors import SingerError

# Folders


def test_folders_are_searched_in_a_fixed_order(image_folder):
    names = names_in(open_at(image_folder), image_folder)
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
    assert names_in(open_at(tmp_path), tmp_path) == names


@pytest.mark.parametrize("name", ["a.webp", "a.tif", "a.bmp", "a.gif", "A.JPG", "ä \udcff.png"])
def test_common_formats_and_odd_names_are_found(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    source = open_at(tmp_path)
    assert source.name(0) == str(tmp_path / name)
    assert source.read(0).size == (8, 8)


def test_what_macos_leaves_beside_an_image_is_none(image_folder):
    (image_folder / "class0" / "._0.png").write_bytes(b"resource fork")
    assert len(open_at(image_folder)) == 12
    assert len(open_at(pack_folder(image_folder, image_folder.parent / "a.tar"))) == 12


def test_image_files_go_before_tars_and_a_warning_says_so(image_folder, caplog):
    pack_folder(image_folder / "class0", image_folder / "left.tar")
    source = open_at(image_folder)
    assert len(source) == 12
    assert source.name(0).endswith("class0/0.png")
    assert "holds 12 image files and 1 .tar files" in caplog.text


def test_links_to_the_folder_itself_repeat_no_image(image_folder, caplog):
    (image_folder / "again").symlink_to(image_folder)
    (image_folder / "class1" / "up").symlink_to("..")
    names = names_in(open_at(image_folder), image_folder)
    assert names == [f"class{k}/{index}.png" for k in (0, 1) for index in range(k, 12, 2)]
    assert_left_out(caplog, "links to folders that are searched anyway: 2 (", "images/again")


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
    assert names_in(open_at(linked), linked) == expected
    assert_left_out(caplog, "links to folders that are searched anyway: 2 (")


def test_hidden_folders_are_left_out_and_counted(image_folder, caplog):
    for name in (".ipynb_checkpoints", "class0/.Trash-1000/files"):
        folder = image_folder / name
        folder.mkdir(parents=True)
        shutil.copy(image_folder / "class0" / "0.png", folder / "0-checkpoint.png")
    assert len(open_at(image_folder)) == 12
    assert_left_out(caplog, "hidden folders: 2 (", ".ipynb_checkpoints", "class0/.Trash-1000")


def test_a_source_that_is_hidden_itself_is_read(image_folder, caplog):
    hidden = image_folder.rename(image_folder.with_name(".images"))
    assert len(open_at(hidden)) == 12
    assert caplog.text == ""


def test_what_is_no_regular_file_is_never_opened(image_folder, caplog):
    os.mkfifo(image_folder / "pipe.png")  # opened, it would wait for ever
    (image_folder / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(image_folder / "s.png"))
        source = open_at(image_folder)
    assert len(source) == 12
    assert_left_out(caplog, "named pipes, sockets and devices: 3 (", "pipe.png", "device.jpg")
    first = image_folder / "class0" / "0.png"
    first.unlink()
    os.mkfifo(first)
    with pytest.raises(SingerError, match=r"0\.png can't be read .*no regular file"):
        source.read(0)


def test_a_tar_that_is_a_named_pipe_is_never_opened(image_folder, tmp_path, caplog):
    shards = tmp_path / "shards"
    shards.mkdir()
    pack_folder(image_folder, shards / "a.tar")
    os.mkfifo(shards / "b.tar")
    assert len(open_at(shards)) == 12
    assert_left_out(caplog, "named pipes, sockets and devices: 1 (", "b.tar")
    with pytest.raises(SingerError, match=r"got the file .*b\.tar.*expected an uncompressed"):
        open_at(shards / "b.tar")


def test_links_to_nothing_are_named_when_they_are_read(image_folder):
    (image_folder / "gone.png").symlink_to("nowhere.png")
    (image_folder / "loop.png").symlink_to("loop.png")
    source = open_at(image_folder)
    assert names_in(source, image_folder)[-2:] == ["gone.png", "loop.png"]
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
    assert len(open_at(image_folder)) == 6
    assert_left_out(caplog, "folders that can't be read: 1 (", "images/class1")


# Tars


@pytest.mark.parametrize("under", [".", "train", "x" * 120])  # the last needs a long-name header
def test_class_folders_in_a_tar_are_the_folder(image_folder, tmp_path, under):
    packed = open_at(pack_folder(image_folder, tmp_path / "train.tar", under))
    assert_same_images(packed, open_at(image_folder))
    assert packed.name(1).endswith("class0/2.png")
    assert packed.name(1).startswith(f"{tmp_path}/train.tar:")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_webdataset_shards_are_the_folder(image_folder, tmp_path, form):
    source = open_at(image_folder)
    shards = tmp_path / "shards"
    shards.mkdir()
    for shard in (10, 2, 1):  # not the order in which they are to be taken
        with tarfile.open(shards / f"train-{shard}.tar", "w", format=form) as tar:
            position = {1: 0, 2: 1, 10: 2}[shard] * 4
            for index in range(position, position + 4):
                with open(source.name(index), "rb") as file:
                    write_member(tar, f"{index:05}.png", file.read())
                write_member(tar, f"{index:05}.json", b'{"width": 8}')
                write_member(tar, f"{index:05}.cls", b"7")
    packed = open_at(shards)
    assert_same_images(packed, source)
    assert packed.name(4) == f"{shards}/train-2.tar:00004.png"


def test_tars_in_a_tar_are_the_folder(image_folder, tmp_path):
    """As ImageNet is distributed: a tar of each class in one tar."""
    outer = tmp_path / "ILSVRC.tar"
    with tarfile.open(outer, "w") as tar:
        for name in ("class1", "class0"):
            inner = pack_folder(image_folder / name, tmp_path / f"{name}.tar")
            tar.add(inner, f"{name}.tar")
    packed = open_at(outer)
    assert_same_images(packed, open_at(image_folder))
    assert packed.name(0) == f"{outer}:class0.tar:./0.png"


def test_opening_a_tar_writes_and_keeps_open_nothing(image_folder, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    tar = pack_folder(image_folder, folder / "a.tar")
    source = open_at(folder)
    source.read(0)
    assert os.listdir(folder) == ["a.tar"]
    tar.unlink()  # a file that is open could still be read
    with pytest.raises(SingerError, match=r"a\.tar:\./class0/0\.png can't be read .*No such file"):
        source.read(0)


def test_a_broken_image_in_a_tar_is_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        write_member(tar, "x.jpg", b"no image")
    source = open_at(tmp_path)
    with pytest.raises(
        SingerError, match=r"a\.tar:x\.jpg can't be .* \(in no known image format\)"
    ):
        source.read(0)


@pytest.mark.parametrize("kind", ["files", "tar"])
def test_sources_travel_to_a_spawned_worker(image_folder, tmp_path, kind):
    source = open_at(image_folder)
    if kind == "tar":
        source = open_at(pack_folder(image_folder, tmp_path / "a.tar"))
    source.read(0)
    assert_same_images(pickle.loads(pickle.dumps(source)), source)


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
    packed, extracted = open_at(path), open_at(_extract(path, folder))
    names = [f"{path}:{name}" for name in names_in(extracted, folder)]
    assert [packed.name(index) for index in range(len(packed))] == names
    assert_same_images(packed, extracted)


def test_files_that_gnu_tar_packs_as_hard_links_are_images(image_folder, tmp_path):
    os.link(image_folder / "class0" / "0.png", image_folder / "class1" / "0.png")
    os.link(image_folder / "class0" / "0.png", image_folder / "class0" / "00.png")
    path = pack_folder(image_folder, tmp_path / "a.tar", "train")
    with tarfile.open(path) as tar:
        assert sum(member.islnk() for member in tar) == 2
    _assert_as_extracted(path, tmp_path / "extracted")


def test_links_give_what_extraction_gives(encoded, tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        _link(tar, "a/later.png", "../b/1.png")
        _link(tar, "a/chain.png", "later.png")
        _link(tar, "a/through_a_folder.png", "../c/1.png")
        _link(tar, "c", "b")  # a folder, whose images count once
        write_member(tar, "b/1.png", encoded[1])
        write_member(tar, "./b/2.png", encoded[2])
        _link(tar, "b/earlier.png", "./2.png")
        _link(tar, "b/hard.png", "b/2.png", tarfile.LNKTYPE)
        _link(tar, "b/hard_chain.png", "b/hard.png", tarfile.LNKTYPE)
        _link(tar, "b/hard_link_of_link.png", "b/earlier.png", tarfile.LNKTYPE)
        write_member(tar, "blobs/3f2a", encoded[3])
        _link(tar, "b/3.png", "../blobs/3f2a")  # a file without an extension of its own
        _link(tar, "b/4.png", "blobs/3f2a", tarfile.LNKTYPE)
    packed, extracted = (
        open_at(tmp_path / "a.tar"),
        open_at(_extract(tmp_path / "a.tar", tmp_path / "x")),
    )
    names = [packed.name(index).partition(".tar:")[2] for index in range(len(packed))]
    assert [os.path.normpath(name) for name in sorted(names, key=os.path.normpath)] == sorted(
        names_in(extracted, tmp_path / "x")
    )
    by_name = {
        os.path.normpath(name): pixels
        for name, pixels in zip(names, pixels_of(packed), strict=True)
    }
    for index, pixels in enumerate(pixels_of(extracted)):
        name = os.path.relpath(extracted.name(index), tmp_path / "x")
        np.testing.assert_array_equal(by_name[name], pixels)
    assert len(packed) == 11
    lines = [record.message for record in caplog.records]
    assert lines == [lines[0]]  # of the extracted folder, about c
    assert "links to folders that are searched anyway: 1" in lines[0]


def test_of_members_with_one_name_the_last_counts(encoded, tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        write_member(tar, "1.png", encoded[1])
        _link(tar, "2.png", "1.png", tarfile.LNKTYPE)  # of what is there now
        write_member(tar, "1.png", encoded[3])
        _link(tar, "1.png", "1.png", tarfile.LNKTYPE)  # as GNU tar packs a file named twice
    _assert_as_extracted(tmp_path / "a.tar", tmp_path / "extracted")
    assert_left_out(caplog, "members that a later one replaces: 1 (", "a.tar:1.png")


def test_links_to_tars_in_a_tar_are_followed(image_folder, tmp_path):
    inner = pack_folder(image_folder / "class0", tmp_path / "class0.tar")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(inner, "class0.tar")
        _link(tar, "hard.tar", "class0.tar", tarfile.LNKTYPE)
        _link(tar, "soft.tar", "hard.tar")
    packed = open_at(tmp_path / "a.tar")
    assert packed.name(6) == f"{tmp_path}/a.tar:hard.tar:./0.png"
    expected = pixels_of(open_at(image_folder / "class0")) * 3
    for left, right in zip(pixels_of(packed), expected, strict=True):
        np.testing.assert_array_equal(left, right)


def _add_sparse(tar, name):
    member = tarfile.TarInfo(name)
    member.type = tarfile.GNUTYPE_SPARSE
    tar.addfile(member)


@pytest.mark.parametrize("is_nested", [False, True])
def test_what_a_tar_does_not_serve_is_counted_and_named(encoded, tmp_path, caplog, is_nested):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        write_member(tar, "1.png", encoded[1])
        _link(tar, "absolute.png", "/etc/passwd.png")
        _link(tar, "escaping.png", "../1.png")
        _link(tar, "folder", "/data/images")
        _link(tar, "circle.png", "circle.png")
        _link(tar, "missing.png", "x.png")
        _link(tar, "hard_to_a_later_one.png", "2.png", tarfile.LNKTYPE)
        _link(tar, "notes.txt", "/etc/notes.txt")  # no image
        write_member(tar, "2.png", encoded[2])
        for name, kind in (("pipe.png", tarfile.FIFOTYPE), ("disk.png", tarfile.BLKTYPE)):
            _link(tar, name, "", kind)
        _add_sparse(tar, "sparse.png")
        _link(tar, "link_to_sparse.png", "sparse.png")
        write_member(tar, ".ipynb_checkpoints/1-checkpoint.png", encoded[1])
        _link(tar, "blob.tar", "1.png")
    if is_nested:
        with tarfile.open(tmp_path / "outer.tar", "w") as tar:
            tar.add(tmp_path / "a.tar", "a.tar")
    source = open_at(tmp_path / ("outer.tar" if is_nested else "a.tar"))
    assert len(source) == 2
    assert np.array_equal(
        np.asarray(source.read(1)), np.asarray(Image.open(io.BytesIO(encoded[2])))
    )
    assert_left_out(
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
        open_at(tmp_path / "a.tar")
    assert_left_out(caplog, "sparse files: 1 (", "a.tar:a.png")


def test_what_several_tars_leave_out_is_one_line(encoded, tmp_path, caplog):
    for name in "ab":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            write_member(tar, "1.png", encoded[1])
            _link(tar, "2.png", "x.png")
    assert len(TarImages([tmp_path / "a.tar", tmp_path / "b.tar"])) == 2
    assert_left_out(caplog, "links to nothing in the tar: 2 (", "a.tar:2.png", "b.tar:2.png")


def _gzipped(path, folder):
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, ".")


def _cut(path, folder):
    pack_folder(folder, path)
    path.write_bytes(path.read_bytes()[:5000])


def _cut_in_a_header(path, folder):
    pack_folder(folder, path)
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset + 100])


def _overwritten(path, folder):
    pack_folder(folder, path)
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
        open_at(path)
    assert "\n" not in str(caught.value)


def test_a_tar_without_an_end_mark_is_sound(image_folder, tmp_path):
    path = pack_folder(image_folder, tmp_path / "a.tar")
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + -(-last.size // 512) * 512])
    assert len(open_at(path)) == 12


# Sources that are none


def test_missing_and_empty_sources_are_named(tmp_path):
    with pytest.raises(SingerError, match=r"data\.source: got .*absent.*expected an existing fold"):
        open_at(tmp_path / "absent")
    with pytest.raises(SingerError, match=r"data\.source: .* is an empty folder"):
        open_at(tmp_path)
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(SingerError, match=r"data\.source: .* holds no image file .*, nor a \.tar"):
        open_at(tmp_path)
    with pytest.raises(SingerError, match=r"got the file .*notes\.txt.*expected an .*\.tar"):
        open_at(tmp_path / "notes.txt")


def test_tars_without_an_image_are_named(tmp_path):
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            write_member(tar, "x.json", b"{}")
    with pytest.raises(SingerError, match=r"no image file .* in .*a\.tar$"):
        open_at(tmp_path / "a.tar")
    with pytest.raises(SingerError, match=r"no image file .* in 2 tars, .*a\.tar the first"):
        open_at(tmp_path)


def test_a_folder_that_may_not_be_read_says_so(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.scandir", refuse)  # root may read anything
    with pytest.raises(SingerError, match=r"data\.source: .*: Permission denied"):
        open_at(tmp_path)
