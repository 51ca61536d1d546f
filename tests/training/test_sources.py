"""Where images come from."""

import io
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
from image_sources import assert_left_out, assert_same_images, open_at, pack_folder, pixels_of
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


@pytest.mark.parametrize("kind", ["folder", "tar", "hfds"])
def test_every_source_puts_the_configured_background(tmp_path, kind):
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGBA", (8, 8), (90, 90, 90, 0)).save(folder / "x.png")
    path = folder
    if kind == "tar":
        path = pack_folder(folder, tmp_path / "a.tar")
    elif kind == "hfds":
        pytest.importorskip("datasets", reason="the package datasets is not installed")
        path = f"hfds/{folder}"
    assert open_at(path).read(0).getpixel((3, 3)) == (255, 255, 255)
    assert open_at(path, background=(1, 2, 3)).read(0).getpixel((3, 3)) == (1, 2, 3)


# Photographs


def test_photographs_are_there_and_none_is_in_both_sets():
    train, held_out = photo_paths(TRAIN_PHOTOS), photo_paths(HELD_OUT_PHOTOS)
    source = open_at(PHOTOS)
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


# Hugging Face datasets


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SingerError, match=r"hfds/some/name needs .* pip install datasets"):
        open_at("hfds/some/name")


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    module = pytest.importorskip("datasets", reason="the package datasets is not installed")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    module.disable_progress_bars()
    return module


@pytest.fixture
def parquet(datasets, image_folder, tmp_path):
    """The folder's images in a parquet file, without labels, and an empty row after them."""
    source = open_at(image_folder)
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
    whole = open_at(f"hfds/{parquet}", image_key=key)
    assert len(whole) == 13
    first = open_at(f"hfds/{parquet}", image_key=key, split="train[:12]")
    assert_same_images(pickle.loads(pickle.dumps(first)), open_at(image_folder))
    with pytest.raises(SingerError, match=r"split train, row 12 can't be read as an image"):
        whole.read(12)


def test_a_hugging_face_folder_of_images_is_the_folder(datasets, image_folder):
    packed = open_at(f"hfds/{image_folder}")  # its images are paths, not bytes
    images = {image.tobytes() for image in pixels_of(packed)}
    assert images == {image.tobytes() for image in pixels_of(open_at(image_folder))}


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
    one = open_at(f"{prefix}{saved}/one")
    assert_same_images(pickle.loads(pickle.dumps(one)), open_at(image_folder))
    pixels = pixels_of(one)
    for split, first, last in (
        ("train", 0, 6),
        ("test", 6, 12),
        ("test[:50%]", 6, 9),
        ("train[4:]+test[:1]", 4, 7),
    ):
        part = pixels_of(open_at(f"{prefix}{saved}/dict", split=split))
        np.testing.assert_array_equal(
            [image.shape for image in part], [image.shape for image in pixels[first:last]]
        )
        assert all(map(np.array_equal, part, pixels[first:last]))
    assert len(open_at(f"{prefix}{saved}/one", split="train[:2]")) == 2
    for split, reason in (("dev", "Unknown split"), ("train[:0]", "no rows")):
        with pytest.raises(SingerError, match=rf"can't be loaded with data\.split=.*\({reason}"):
            open_at(f"{prefix}{saved}/dict", split=split)


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
    source = open_at(tmp_path / "one", split="train[1:]")
    assert len(source) == 2
    assert source.read(1).getpixel((0, 0)) == (1, 2, 3)


# Several sources


def test_a_list_of_sources_follows_its_order(image_folder, tmp_path):
    tar = pack_folder(image_folder / "class1", tmp_path / "b.tar")
    both = _open_list([tar, image_folder / "class0"])
    assert both.name(5) == f"{tar}:./11.png"
    assert both.name(6) == str(image_folder / "class0" / "0.png")
    expected = pixels_of(open_at(image_folder / "class1")) + pixels_of(
        open_at(image_folder / "class0")
    )
    for left, right in zip(pixels_of(pickle.loads(pickle.dumps(both))), expected, strict=True):
        np.testing.assert_array_equal(left, right)


def _open_list(sources, **options):
    return open_source(DataConfig(source=[str(source) for source in sources], **options))


def test_a_list_may_hold_a_hugging_face_dataset_and_photographs(parquet, image_folder):
    several = _open_list([f"hfds/{parquet}", PHOTOS, image_folder], split="train[:2]")
    assert len(several) == 2 + len(TRAIN_PHOTOS) + 12
    assert several.name(1).startswith("hfds/")
    np.testing.assert_array_equal(
        np.asarray(several.read(2 + len(TRAIN_PHOTOS))), pixels_of(open_at(image_folder))[0]
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
        pack_folder(image_folder / "class0", tmp_path / f"train-{number:03}.tar")
    if numbers is None:
        with pytest.raises(SingerError, match=r"data\.source: nothing matches '.*x-01\?\.tar'"):
            open_at(tmp_path / pattern)
        return
    for source in (open_at(tmp_path / pattern), _open_list([tmp_path / pattern])):
        tars = [source.name(index).partition(".tar:")[0] for index in range(0, len(source), 6)]
        assert tars == [f"{tmp_path}/train-{number:03}" for number in numbers]


def test_patterns_of_folders_and_names_that_look_like_patterns(image_folder, tmp_path):
    for name in ("a", "b[1]", "{c}"):
        shutil.copytree(image_folder / "class0", tmp_path / "sets" / name)
    assert len(open_at(tmp_path / "sets" / "*")) == 18
    assert len(open_at(tmp_path / "sets" / "b[1]")) == 6
    assert len(open_at(tmp_path / "sets" / "{c}")) == 6


def test_a_source_that_is_named_twice_is_read_once(image_folder, tmp_path, caplog):
    tar = pack_folder(image_folder, tmp_path / "a.tar")
    (tmp_path / "link").symlink_to(image_folder)
    source = _open_list([image_folder, tar, tmp_path / "link", tmp_path / "*.tar"])
    assert len(source) == 24
    assert_left_out(caplog, "sources named again: 2 (", "link", "a.tar")


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
        open_at(f"hfds/{tmp_path}/absent")
    with pytest.raises(SingerError, match=r"can't be loaded with data\.split='dev'.*'train'"):
        open_at(f"hfds/{parquet}", split="dev")
    with pytest.raises(SingerError, match=r"data\.split='train\[:0\]' .*no data"):
        open_at(f"hfds/{parquet}", split="train[:0]")
    with pytest.raises(SingerError, match=r"data\.image_key: got 'img', expected a column .*: ima"):
        open_at(f"hfds/{parquet}", image_key="img")
    for key in ("number", "several"):
        with pytest.raises(SingerError, match=rf"data\.image_key: got '{key}', .* it holds \S+"):
            open_at(f"hfds/{parquet}", image_key=key)


def test_tars_are_taken_in_the_order_given(image_folder, tmp_path):
    tars = [
        pack_folder(image_folder / name, tmp_path / f"{name}.tar") for name in ("class1", "class0")
    ]
    source = TarImages(tars)
    assert source.name(0) == f"{tars[0]}:./1.png"
    assert source.name(11) == f"{tars[1]}:./10.png"
