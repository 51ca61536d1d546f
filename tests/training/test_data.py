"""Images, their crops and their order."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from singer.config import PHOTOS, DataConfig
from singer.data import (
    HELD_OUT_PHOTOS,
    TRAIN_PHOTOS,
    ImageCrops,
    TicketSampler,
    create_loader,
    find_images,
    photo_paths,
    read_image,
)
from singer.errors import SingerError


def _crops(folder, seed=0, **options):
    data = DataConfig(source=str(folder), **options)
    return ImageCrops(find_images(str(folder)), 32, data, seed)


def test_crop_is_a_function_of_seed_and_ticket(image_folder):
    first, again = _crops(image_folder), _crops(image_folder)
    torch.manual_seed(1)
    one = first[5]
    torch.manual_seed(2)
    torch.testing.assert_close(again[5], one, rtol=0, atol=0)
    assert one.shape == (3, 32, 32)
    assert one.dtype == torch.uint8
    assert not torch.equal(_crops(image_folder, seed=1)[5], one)
    next_epoch = first[5 + len(first)]  # the same image
    assert not torch.equal(next_epoch, one)


def test_crops_leave_the_global_random_state_alone(image_folder):
    crops = _crops(image_folder)
    state = torch.get_rng_state()
    crops[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_workers_change_nothing(image_folder, make_config):
    batches = []
    for workers in (0, 2):
        loader = create_loader(make_config(data={"num_workers": workers}))
        batches.append(torch.cat(list(loader)))
    assert torch.equal(*batches)


def test_every_epoch_is_a_permutation_of_its_own():
    sampler = TicketSampler(10, seed=0)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert sorted(first) == list(range(10))
    assert sorted(second) == list(range(10, 20))
    assert first != [ticket - 10 for ticket in second]
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(TicketSampler(10, seed=1)) != first


def test_an_epoch_can_take_several_crops_of_each_image(image_folder):
    crops = _crops(image_folder, epoch_size=24, crop_scale=(1.0, 1.0), hflip=0)
    assert len(crops) == 24
    batch = next(iter(DataLoader(crops, batch_size=24, sampler=TicketSampler(24, 0))))
    assert batch.shape == (24, 3, 32, 32)


def test_folders_are_searched_in_a_fixed_order(image_folder):
    found = find_images(str(image_folder))
    assert len(found) == 12
    assert found == sorted(found, key=lambda path: (path.parent.name, int(path.stem)))


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


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_fixed_range_are_refused(tmp_path, dtype):
    Image.fromarray(np.ones((8, 8), dtype=dtype)).save(tmp_path / "image.tiff")
    with pytest.raises(SingerError, match=r"image\.tiff holds .* no fixed range"):
        read_image(tmp_path / "image.tiff")


@pytest.mark.parametrize("name", ["a.webp", "a.tif", "a.bmp", "a.gif", "A.JPG"])
def test_common_formats_are_found(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    assert find_images(str(tmp_path)) == [tmp_path / name]


def test_a_folder_of_the_photographs_name_is_pointed_out(tmp_path, monkeypatch, caplog):
    (tmp_path / PHOTOS).mkdir()
    monkeypatch.chdir(tmp_path)
    find_images(PHOTOS)
    assert "for the folder say ./photos" in caplog.text


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n broken"])
def test_unreadable_image_is_named(image_folder, content):
    (image_folder / "bad.png").write_bytes(content)
    crops = _crops(image_folder)
    bad = crops.paths.index(image_folder / "bad.png")
    with pytest.raises(SingerError, match=r"bad\.png can't be read as an image"):
        crops[bad]


def test_truncated_image_is_named(image_folder):
    path = image_folder / "class0" / "0.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(SingerError, match=r"0\.png can't be read as an image"):
        read_image(path)


def test_missing_and_empty_sources_are_named(tmp_path):
    with pytest.raises(SingerError, match="expected an existing folder"):
        find_images(str(tmp_path / "absent"))
    with pytest.raises(SingerError, match="holds no image file"):
        find_images(str(tmp_path))


def test_batch_larger_than_an_epoch_is_refused(make_config):
    with pytest.raises(SingerError, match=r"train\.batch_size: got 13, expected at most 12"):
        create_loader(make_config(train={"batch_size": 13}))


def test_photographs_are_there_and_none_is_in_both_sets():
    train, held_out = photo_paths(TRAIN_PHOTOS), photo_paths(HELD_OUT_PHOTOS)
    assert find_images(PHOTOS) == train
    assert not set(train) & set(held_out)
    for path in (*train, *held_out):
        assert min(read_image(path).size) >= 126


def test_missing_photographs_name_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SingerError, match=r"scikit-image is not installed.*demo extra"):
        photo_paths(TRAIN_PHOTOS)


def test_photographs_are_decoded_once_and_travel_to_a_worker():
    data = DataConfig(source=PHOTOS, epoch_size=24)
    crops = ImageCrops(find_images(PHOTOS)[:2], 32, data, seed=0)
    first = crops[0]
    again = pickle.loads(pickle.dumps(crops))  # as workers that are spawned, not forked, get it
    assert len(crops._kept) == 1
    assert torch.equal(again[0], first)
