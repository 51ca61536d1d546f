"""Crops of images, their order, and their way into batches."""

import multiprocessing
import os
import pickle
import signal
import time
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms

from singer.config.schema import PHOTOS, DataConfig
from singer.data.crops import CenterCrop
from singer.data.loader import (
    BatchLoader,
    CropDataset,
    UnreadableLimit,
    check_batch,
    create_loader,
)
from singer.data.sampler import EpochBatchSampler
from singer.data.sources import ImageFiles, open_source, photo_paths
from singer.errors import STOP_SIGNALS, SingerError


def _crops(folder, seed=0, **options):
    data = DataConfig(source=str(folder), **options)
    return CropDataset(open_source(data), 32, data, seed)


def _assert_equal(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def _assert_same_batches(one, other):
    assert len(one) == len(other) > 0
    for left, right in zip(one, other, strict=True):
        _assert_equal(left.images, right.images)
        _assert_equal(left.sample_ids, right.sample_ids)
        assert left.unreadable == right.unreadable


def _break(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"broken")


# Crops


def test_crop_is_a_function_of_seed_and_sample_id(image_folder):
    first, again = _crops(image_folder), _crops(image_folder)
    torch.manual_seed(1)
    one = first[5]
    torch.manual_seed(2)
    _assert_equal(again[5], one)
    assert one.shape == (3, 32, 32)
    assert one.dtype == torch.uint8
    assert not torch.equal(_crops(image_folder, seed=1)[5], one)
    next_epoch = first[5 + len(first)]  # the same image
    assert not torch.equal(next_epoch, one)


def test_crops_leave_the_global_random_state_alone(image_folder):
    _break(image_folder, "class0/0.png")
    crops = _crops(image_folder)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    crops.batch(range(12))
    _assert_equal(torch.get_rng_state(), state)
    assert (np.random.get_state()[1] == numpy_state).all()


def test_a_batch_holds_the_crops_of_its_sample_ids(image_folder):
    crops = _crops(image_folder)
    batch = crops.batch([13, 2, 7])
    assert batch.images.dtype == torch.uint8
    assert batch.sample_ids.dtype == torch.int64
    assert batch.sample_ids.tolist() == [13, 2, 7]
    assert batch.unreadable == []
    _assert_equal(batch.images, torch.stack([crops[13], crops[2], crops[7]]))


def test_an_epoch_can_take_several_crops_of_each_image(image_folder):
    crops = _crops(image_folder, epoch_size=30, crop_scale=(0.2, 0.3))
    assert len(crops) == 30
    indices = [crops.source_index(sample_id) for sample_id in range(60)]
    assert indices == [sample % 12 for sample in range(30)] * 2
    assert not torch.equal(crops[1], crops[13])  # the same image


def test_centre_crops_stay_as_they_are(image_folder):
    crops = _crops(image_folder, crops="center", crop_scale=(0.1, 0.2), hflip=1, epoch_size=24)
    image = crops.source.read(5)
    bicubic = transforms.InterpolationMode.BICUBIC
    expected = transforms.functional.pil_to_tensor(
        transforms.functional.center_crop(
            transforms.functional.resize(image, [32], interpolation=bicubic), [32, 32]
        )
    )
    for sample_id in (5, 17, 24 + 5, 7 * 24 + 17):
        _assert_equal(crops[sample_id], expected)


def test_centre_crops_show_the_middle_unmirrored(tmp_path):
    ramp = np.broadcast_to(np.arange(128, dtype=np.uint8)[None, :, None], (64, 128, 3))
    Image.fromarray(ramp.copy()).save(tmp_path / "ramp.png")
    row = _crops(tmp_path, crops="center")[0][0, 16].long()
    # Halved: columns 2i and 2i + 1 become i, and of 64 columns 16 to 47 stay. A ramp stays a ramp.
    expected = 2 * torch.arange(16, 48) + 0.5
    assert ((row - expected).abs() <= 1).all()  # half a level from the mean, half from rounding


@pytest.mark.parametrize("size", [(9, 40), (40, 9), (90, 41), (16, 128)])
@pytest.mark.parametrize("image_size", [32, 33])
def test_centre_crops_of_ordinary_images_are_torchvisions(size, image_size):
    pixels = np.random.default_rng(0).integers(0, 256, size=(*size, 3), dtype=np.uint8)
    image, crop = Image.fromarray(pixels), CenterCrop(image_size)
    _assert_equal(*map(transforms.functional.pil_to_tensor, (crop(image), crop.whole(image))))


@pytest.mark.parametrize(
    "size", [(3, 100), (100, 3), (7, 61), (61, 7), (1, 9), (40, 400), (41, 999)]
)
@pytest.mark.parametrize("image_size", [32, 33])
def test_centre_crops_of_long_images_are_torchvisions_up_to_rounding(size, image_size):
    # Of little contrast: no value is clipped between Pillow's two passes, whose order may differ.
    pixels = np.random.default_rng(0).integers(100, 156, size=(*size, 3), dtype=np.uint8)
    image, crop = Image.fromarray(pixels), CenterCrop(image_size)
    one, other = (transforms.functional.pil_to_tensor(of(image)) for of in (crop, crop.whole))
    assert one.shape == other.shape == (3, image_size, image_size)
    # Each rounds by 0.5 twice; the second pass amplifies the first error less than 1.5 times.
    assert (one.int() - other.int()).abs().max() <= 2


@pytest.mark.parametrize("crops", ["center", "random"])
@pytest.mark.parametrize("size", [(1, 4000), (4000, 1)])
def test_a_long_image_takes_no_more_memory_than_its_crop(tmp_path, monkeypatch, crops, size):
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "long.png")
    resize, areas = Image.Image.resize, []

    def measure(image, *args, **kwargs):
        resized = resize(image, *args, **kwargs)
        areas.append(resized.width * resized.height)
        return resized

    monkeypatch.setattr(Image.Image, "resize", measure)
    crop = _crops(tmp_path, crops=crops)[0]
    assert areas == [32 * 32]
    assert (crop == torch.tensor([10, 20, 30], dtype=torch.uint8)[:, None, None]).all()


@pytest.mark.parametrize("error", [SystemError("odd image"), ValueError("odd\nimage")])
@pytest.mark.parametrize("crops", ["center", "random"])
def test_an_image_that_cannot_be_cropped_is_replaced_and_named(
    image_folder, monkeypatch, crops, error
):
    resize, odd = Image.Image.resize, Image.open(image_folder / "class0" / "4.png").size

    def refuse(image, *args, **kwargs):
        if image.getpixel((0, 0)) == (1, 2, 3):
            raise error
        return resize(image, *args, **kwargs)

    dataset = _crops(image_folder, crops=crops, crop_scale=(1.0, 1.0))
    Image.new("RGB", odd, (1, 2, 3)).save(image_folder / "class0" / "4.png")
    monkeypatch.setattr(Image.Image, "resize", refuse)
    batch = dataset.batch([1, 2])
    assert batch.unreadable == [str(image_folder / "class0" / "4.png")]
    assert not (batch.images[1] == batch.images[1, :, :1, :1]).all()
    dataset.source = ImageFiles(batch.unreadable)
    with pytest.raises(SingerError, match=r"no readable image among 1 .*4\.png .*odd image"):
        dataset.batch([2])


def test_too_little_memory_for_a_crop_ends_the_batch(image_folder, monkeypatch):
    def refuse(image, *args, **kwargs):
        raise MemoryError

    dataset = _crops(image_folder, crops="center")
    monkeypatch.setattr(Image.Image, "resize", refuse)
    with pytest.raises(MemoryError, match=r"^too little memory to read .*class0/0\.png$"):
        dataset.batch([0])


def test_decompression_bombs_are_replaced_and_named(image_folder, monkeypatch):
    Image.new("RGB", (400, 400)).save(image_folder / "class0" / "4.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400 * 400 // 2 - 1)
    batch = _crops(image_folder).batch([2])
    assert batch.unreadable == [str(image_folder / "class0" / "4.png")]


def test_a_loader_takes_a_list_of_sources(make_config, image_folder):
    sources = [str(image_folder / "class1"), str(image_folder / "class0")]
    loader = create_loader(make_config(data={"source": sources}))
    assert len(loader.dataset.source) == 12
    for index in range(12):
        _break(image_folder, f"class{index % 2}/{index}.png")
    with pytest.raises(SingerError, match=r"class1, .*class0 holds no readable image \(12 of 12"):
        create_loader(make_config(data={"source": sources}))


def test_photographs_travel_to_a_spawned_worker(image_folder):
    source = ImageFiles(photo_paths([("sklearn", "flower.jpg")]), keep=True)
    crops = CropDataset(source, 32, DataConfig(source=PHOTOS, epoch_size=4), seed=0)
    first = crops[3]
    _assert_equal(pickle.loads(pickle.dumps(crops))[3], first)


# Order


def _epoch(sampler, epoch=0, step=0):
    sampler.seek(epoch, step)
    return list(sampler)


def _joined(batches):
    return list(chain.from_iterable(batches))


def test_every_epoch_is_a_permutation_of_its_own():
    sampler = EpochBatchSampler(12, 0, 4)
    first, second = _epoch(sampler, 0), _epoch(sampler, 1)
    assert sorted(_joined(first)) == list(range(12))
    assert sorted(_joined(second)) == list(range(12, 24))
    assert _joined(first) != [sample_id - 12 for sample_id in _joined(second)]
    assert _epoch(sampler, 0) == first
    assert _epoch(EpochBatchSampler(12, 1, 4), 0) != first
    assert _joined(first) == sampler.order(0).tolist()


@pytest.mark.parametrize(
    ("processes", "grad_accum_steps"), [(1, 1), (1, 3), (2, 1), (2, 3), (6, 1)]
)
def test_steps_do_not_depend_on_processes_or_accumulation(processes, grad_accum_steps):
    size, batch = 32, 6
    order = EpochBatchSampler(size, 7, batch).order(2).tolist()
    samplers = [
        EpochBatchSampler(size, 7, batch, grad_accum_steps, index, processes)
        for index in range(processes)
    ]
    parts = [_epoch(sampler, epoch=2) for sampler in samplers]
    assert {len(sampler) for sampler in samplers} == {5 * grad_accum_steps}
    for step in range(5):
        taken = [
            part
            for process in parts
            for part in process[step * grad_accum_steps : (step + 1) * grad_accum_steps]
        ]
        assert {len(part) for part in taken} == {batch // processes // grad_accum_steps}
        assert _joined(taken) == order[step * batch : (step + 1) * batch]


def test_seeking_is_leaving_steps_out():
    sampler = EpochBatchSampler(26, 3, 8, grad_accum_steps=2)
    assert sampler.steps_per_epoch == 3
    whole = _epoch(sampler, 4)
    for step in range(4):
        assert _epoch(sampler, 4, step) == whole[2 * step :]
        assert len(sampler) == len(whole) - 2 * step
    assert list(sampler) == []  # iterating does not move the place
    sampler.seek(4, 1)
    batches = iter(sampler)
    sampler.seek(5)
    assert list(batches) == whole[2:]


def test_an_iteration_may_span_epochs():
    sampler = EpochBatchSampler(26, 3, 8, 2)
    epochs = []
    for epoch in range(3):
        sampler.seek(epoch)
        epochs += sampler
    sampler.seek(0, 1, num_steps=7)
    assert len(sampler) == 14
    assert list(sampler) == epochs[2:16]


@pytest.mark.parametrize(("epoch", "step"), [(-1, 0), (0, -1), (0, 4)])
def test_seeking_outside_is_refused(epoch, step):
    with pytest.raises(ValueError, match=f"got {epoch}, {step}, expected .* 0 to 3"):
        EpochBatchSampler(26, 3, 8).seek(epoch, step)


def test_batches_that_can_not_be_shared_are_refused():
    with pytest.raises(ValueError, match=r"batch_size: got 8, expected a multiple of .* = 6"):
        EpochBatchSampler(26, 3, 8, grad_accum_steps=3, num_processes=2)
    with pytest.raises(ValueError, match="process_index: got 2, expected 0 to 1"):
        EpochBatchSampler(26, 3, 8, process_index=2, num_processes=2)


# Loader


def test_workers_change_nothing(image_folder, make_config):
    _break(image_folder, "class0/0.png", "class1/3.png")
    runs = []
    for workers in (0, 2):
        loader = create_loader(
            make_config(data={"num_workers": workers}, train={"grad_accum_steps": 2})
        )
        batches = []
        for epoch, step in ((0, 0), (1, 1), (0, 2)):
            loader.batch_sampler.seek(epoch, step)
            assert len(loader) == 6 - 2 * step
            batches += list(loader)
        assert len(batches) == 6 + 4 + 2
        runs.append(batches)
    _assert_same_batches(*runs)
    assert any(batch.unreadable for batch in runs[0])


def test_an_abandoned_epoch_leaves_nothing_behind(make_config):
    loader = create_loader(make_config(data={"num_workers": 2}, train={"batch_size": 2}))
    whole = list(loader)
    next(iter(loader))
    loader.batch_sampler.seek(0, 4)
    _assert_same_batches(list(loader), whole[4:])


def test_processes_share_the_batches_of_one(make_config):
    whole = list(create_loader(make_config(train={"batch_size": 6})))
    shares = [list(create_loader(make_config(train={"batch_size": 6}), k, 2)) for k in (0, 1)]
    for batch, *parts in zip(whole, *shares, strict=True):
        _assert_equal(batch.images, torch.cat([part.images for part in parts]))
        _assert_equal(batch.sample_ids, torch.cat([part.sample_ids for part in parts]))


@pytest.mark.parametrize("workers", [0, 1])
def test_iterating_leaves_the_global_random_state_alone(make_config, workers):
    loader = create_loader(make_config(data={"num_workers": workers}))
    state = torch.get_rng_state()
    list(loader)
    _assert_equal(torch.get_rng_state(), state)


def test_spawned_workers_make_the_same_batches(make_config):
    config = make_config(data={"num_workers": 1})
    loader = create_loader(config)
    spawned = BatchLoader(
        loader.dataset,
        batch_sampler=loader.batch_sampler,
        collate_fn=loader.collate_fn,
        worker_init_fn=loader.worker_init_fn,
        num_workers=1,
        multiprocessing_context="spawn",
    )
    _assert_same_batches(list(spawned), list(loader))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs sigwaitinfo (Linux)")
def test_workers_survive_the_signals_meant_for_the_trainer(make_config):
    loader = create_loader(
        make_config(data={"num_workers": 2, "epoch_size": 96}, train={"batch_size": 2})
    )
    others = multiprocessing.active_children()
    batches = iter(loader)
    taken = [next(batches)]
    workers = [child for child in multiprocessing.active_children() if child not in others]
    sender = os.fork()  # the trainer's own SIGTERM would end them
    if sender == 0:
        for number in (getattr(signal, name) for name in STOP_SIGNALS):
            for worker in workers:
                os.kill(worker.pid, number)
        os._exit(0)
    os.waitpid(sender, 0)
    taken += batches
    assert len(taken) == 48
    started = time.monotonic()
    for worker in workers:
        worker.terminate()
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert time.monotonic() - started < 60


@pytest.mark.parametrize(
    ("processes", "grad_accum_steps", "batch_size", "nearest"),
    [(3, 2, 100, "96 or 102"), (8, 1, 5, "8"), (1, 3, 4, "3 or 6")],
)
def test_batches_that_do_not_divide_name_the_nearest(
    make_config, processes, grad_accum_steps, batch_size, nearest
):
    config = make_config(train={"batch_size": batch_size, "grad_accum_steps": grad_accum_steps})
    many = f"{processes} process(es)?"
    with pytest.raises(
        SingerError,
        match=rf"train\.batch_size: got {batch_size}, which {many} with train\.grad_accum_steps="
        rf"{grad_accum_steps} .* multiple of {processes * grad_accum_steps}, such as {nearest}$",
    ):
        create_loader(config, 0, processes)
    for fitting in nearest.split(" or "):
        train = {"batch_size": int(fitting), "grad_accum_steps": grad_accum_steps}
        check_batch(make_config(train=train), processes)


def test_batch_larger_than_an_epoch_is_refused(make_config):
    with pytest.raises(SingerError, match=r"train\.batch_size: got 13, expected at most 12"):
        create_loader(make_config(train={"batch_size": 13}))


def test_a_batch_may_reach_into_the_next_epoch(image_folder):
    crops = _crops(image_folder)
    images = crops.batch(range(14)).images
    _assert_equal(images, torch.stack([crops[sample_id] for sample_id in range(14)]))


# Unreadable images


def test_an_unreadable_image_is_replaced_and_named(tmp_path):
    for index in range(6):
        Image.new("L", (40, 40), 10 * index).save(tmp_path / f"{index}.png")
    _break(tmp_path, "2.png", "4.png")
    crops = _crops(tmp_path, epoch_size=12)
    batch = crops.batch(range(12))
    shown = [set((image // 10).flatten().tolist()) for image in batch.images]
    for sample_id in (0, 1, 3, 5, 6, 7, 9, 11):
        assert shown[sample_id] == {sample_id % 6}
    for sample_id in (2, 4, 8, 10):
        assert len(shown[sample_id]) == 1
        assert shown[sample_id] <= {0, 1, 3, 5}
    assert batch.unreadable == [str(tmp_path / "2.png"), str(tmp_path / "4.png")]  # each once
    _assert_same_batches([_crops(tmp_path, epoch_size=12).batch(range(12))], [batch])
    assert crops.batch([1, 3]).unreadable == []


def test_replacements_change_with_the_epoch_but_not_of_centre_crops(image_folder):
    _break(image_folder, "class0/0.png")
    for kind, changes in (("random", True), ("center", False)):
        crops = _crops(image_folder, crops=kind)
        replacements = {crops[12 * epoch].numpy().tobytes() for epoch in range(8)}
        assert (len(replacements) > 1) == changes


def _break_all(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")


@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_image_found_is_one_line(image_folder, make_config, workers):
    loader = create_loader(make_config(data={"num_workers": workers}))
    _break_all(image_folder)
    with pytest.raises(SingerError) as caught:
        list(loader)
    assert str(caught.value).startswith("data.source: no readable image among ")
    assert str(caught.value).count("data.source") == 1
    assert "\n" not in str(caught.value)


def test_a_source_without_a_readable_image_is_refused(image_folder, make_config):
    _break_all(image_folder)
    with pytest.raises(
        SingerError,
        match=r"data\.source: .*images holds no readable image \(12 of 12 tried; first: "
        r".*class0/0\.png can't be read as an image",
    ):
        create_loader(make_config())
    Image.new("RGB", (8, 8)).save(image_folder / "fine.png")
    assert len(create_loader(make_config())) == 3


@pytest.mark.parametrize(
    ("total", "share", "allowed"),
    [(12, 0.001, 0), (1000, 0.001, 1), (1999, 0.001, 1), (100, 0.29, 29), (5, 1, 5), (5, 0, 0)],
)
def test_the_limit_is_the_share_in_decimals(total, share, allowed):
    assert UnreadableLimit(total, share).allowed == allowed  # 0.29 * 100 < 29 in floats


def test_the_limit_counts_every_image_once():
    limit = UnreadableLimit(20, 0.1)
    assert limit.add(["b", "a", "b"]) == ["b", "a"]
    assert limit.add(["a"]) == []
    assert not limit.exceeded
    resumed = UnreadableLimit(20, 0.1)
    resumed.add(limit.names)
    assert resumed.names == ["a", "b"]
    assert resumed.add(["b", "c"]) == ["c"]
    assert resumed.exceeded
    assert str(resumed.error()) == (
        "data.source: 3 of 20 images can't be read, and data.max_unreadable=0.1 allows 2: a, b, c; "
        "remove or replace them, or raise data.max_unreadable"
    )
    resumed.add(list("defg"))
    assert ": a, b, c, d, e, …; " in str(resumed.error())
