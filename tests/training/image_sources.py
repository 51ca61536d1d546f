"""Opening, packing and comparing sources of images."""

import io
import os
import tarfile

import numpy as np

from singer.config.schema import DataConfig
from singer.data.sources import open_source


def open_at(path, **options):
    return open_source(DataConfig(source=str(path), **options))


def pixels_of(source):
    return [np.asarray(source.read(index)) for index in range(len(source))]


def assert_same_images(one, other):
    assert len(one) == len(other) > 0
    for left, right in zip(pixels_of(one), pixels_of(other), strict=True):
        np.testing.assert_array_equal(left, right)


def pack_folder(folder, path, under="."):
    with tarfile.open(path, "w") as tar:
        tar.add(folder, under)
    return path


def write_member(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def names_in(source, folder):
    return [os.path.relpath(source.name(index), folder) for index in range(len(source))]


def assert_left_out(caplog, *parts):
    lines = [record.message for record in caplog.records if "left out" in record.message]
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]
