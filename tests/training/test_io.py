"""Atomic writes: a file or directory is there whole, or not at all."""

import os

import pytest

from singer.errors import SingerError
from singer.io import atomic_write, stale_tmp, writing


def test_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail_half_way():
        with writing(path), atomic_write(path) as written:
            written.write_text("ne")
            raise OSError("no space left")

    with pytest.raises(SingerError, match="file can't be written: no space left"):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path) as written:
        written.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def _write_directory(path, text):
    with atomic_write(path) as written:
        written.mkdir()
        (written / "a").write_text(text)


def test_a_directory_that_can_not_be_replaced_stays(tmp_path, monkeypatch):
    path = tmp_path / "directory"
    _write_directory(path, "old")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        _write_directory(path, "new")
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "directory"
    _write_directory(path, "old")
    (path / "b").write_text("of the old one")
    _write_directory(path, "new")
    assert list(tmp_path.iterdir()) == [path]
    assert [(file.name, file.read_text()) for file in path.iterdir()] == [("a", "new")]


def test_a_failed_directory_leaves_nothing_behind(tmp_path):
    path = tmp_path / "directory"
    _write_directory(path, "old")

    def fail_half_way():
        with atomic_write(path) as written:
            written.mkdir()
            (written / "a").write_text("ne")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail_half_way()
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_temporary_files_of_a_killed_process_are_found(tmp_path):
    left = tmp_path / ".file.partial"
    left.write_text("ha")
    (tmp_path / ".folder.partial").mkdir()
    (tmp_path / "file").write_text("x")
    assert stale_tmp(tmp_path) == [left]
