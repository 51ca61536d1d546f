"""The cache of teacher tokens: what it gives back, and what it refuses."""

import errno
import json
import mmap
import multiprocessing
import os
import pickle
import sys
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save

from singer.errors import SingerError
from singer.features import cache as token_cache
from singer.features import shards as token_shards
from singer.features.cache import MANIFEST, TokenCache

IMAGES, TOKENS, DIM = 11, 5, 6  # of 4 images a shard: the last one is not full
LAYERS = (2, 3)
FINGERPRINT = {"teacher": "vit", "weights": "0123", "layers": list(LAYERS), "image_size": 224}

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(token_cache, "IMAGES_PER_SHARD", 4)


def tokens_of(image, layer, dim=DIM):
    draw = torch.Generator().manual_seed(1000 * layer + image)
    return torch.randn(TOKENS, dim, generator=draw)


class Teacher:
    """Gives the tokens of images, and remembers for which ones it was asked."""

    def __init__(self, dim=DIM, break_at=None, error=None):
        self.dim, self.break_at, self.error = dim, break_at, error
        self.asked = []

    def __call__(self, images):
        if self.break_at in images:
            raise self.error
        self.asked.append(list(images))
        return {
            layer: torch.stack([tokens_of(image, layer, self.dim) for image in images])
            for layer in reversed(LAYERS)
        }

    @property
    def images(self):
        return sorted(image for batch in self.asked for image in batch)


def build(folder, compute=None, fingerprint=FINGERPRINT, images=IMAGES, **options):
    return TokenCache.open_or_build(
        folder, fingerprint, images, compute or Teacher(), **{"batch_size": 3, **options}
    )


def never(images):
    raise AssertionError(f"images {images} were computed again")


def shard_paths(folder):
    return sorted(folder.glob("tokens-*.safetensors"))


def refuse(match, folder, compute=never, **options):
    """The cache is refused with that message, in one line, and no file of it changes."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SingerError, match=match) as caught:
        build(folder, compute, **options)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("teacher.cache: ")
    before[".lock"] = b""
    assert {path.name: path.read_bytes() for path in folder.iterdir()} | {".lock": b""} == before


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "IMAGES_PER_SHARD", 4)
        return build(tmp_path_factory.mktemp("cache") / "deep" / "folder")


@given(indices=st.lists(st.integers(0, IMAGES - 1), max_size=20), as_tensor=st.booleans())
@settings(max_examples=60, deadline=None)
def test_read_gives_the_tokens_in_bfloat16(built, indices, as_tensor):
    found = built.read(torch.tensor(indices, dtype=torch.int64) if as_tensor else indices)
    assert list(found) == built.layers == list(LAYERS)
    for layer, tokens in found.items():
        assert tokens.shape == (len(indices), TOKENS, DIM)
        assert tokens.is_contiguous()
        for image, row in zip(indices, tokens, strict=True):
            assert torch.equal(row, tokens_of(image, layer).bfloat16())


@pytest.mark.parametrize("dim", [6, 7, 8])  # a checksum adds up 8 bytes at a time, or 2
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_widths_and_dtypes(tmp_path, dim, dtype):
    cache = build(
        tmp_path, lambda images: {k: v.to(dtype) for k, v in Teacher(dim)(images).items()}
    )
    for layer, tokens in cache.read(range(IMAGES)).items():
        computed = torch.stack([tokens_of(image, layer, dim) for image in range(IMAGES)])
        assert torch.equal(tokens, computed.to(dtype).bfloat16())
        assert (tokens - computed).abs().le(2.0**-8 * computed.abs()).all()


def test_what_is_read_belongs_to_the_caller(built):
    expected = tokens_of(1, 2).bfloat16()
    built.read([1])[2].zero_()
    assert torch.equal(built.read([1])[2][0], expected)


@pytest.mark.parametrize("index", [-1, IMAGES])
def test_index_out_of_range(built, index):
    with pytest.raises(IndexError, match=f"got {index}, expected 0 to {IMAGES - 1}"):
        built.read([0, index])


def test_files_are_safetensors_with_a_manifest(built):
    paths = shard_paths(built.folder)
    assert [path.name for path in paths] == [f"tokens-0000{i}.safetensors" for i in (0, 1, 2)]
    manifest = json.loads((built.folder / MANIFEST).read_text())
    assert manifest["fingerprint"] == {**FINGERPRINT, "num_images": IMAGES, "images_per_shard": 4}
    assert manifest["bytes"] == {path.name: path.stat().st_size for path in paths}
    assert int.from_bytes(paths[2].read_bytes()[:8], "little") % 8 == 0  # the tensors are aligned
    last = load_file(paths[2])
    assert {name: tuple(tensor.shape) for name, tensor in last.items()} == {
        "tokens.2": (3, TOKENS, DIM),
        "tokens.3": (3, TOKENS, DIM),
        "checksums.2": (3,),
        "checksums.3": (3,),
    }
    assert torch.equal(last["tokens.3"][2], tokens_of(10, 3).bfloat16())
    names = {path.name for path in built.folder.iterdir()}
    assert names == {*manifest["bytes"], MANIFEST, ".lock"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_shards_are_mapped_not_loaded(built):
    maps = Path("/proc/self/maps").read_text()
    assert all(str(path) in maps for path in shard_paths(built.folder))
    opened = {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}
    assert not any(str(path) in opened for path in shard_paths(built.folder))


@pytest.mark.skipif(token_shards._madvise is None, reason="no madvise here")
def test_images_are_fetched_ahead(built, monkeypatch):
    advised = []
    monkeypatch.setattr(token_shards, "_madvise", lambda *call: advised.append(call))
    built.read([9])
    assert len(advised) == len(LAYERS)
    for tokens, (start, length, advice) in zip(
        built._shards[2].tokens.values(), advised, strict=True
    ):
        first = tokens[1].data_ptr()
        assert start % mmap.PAGESIZE == 0
        assert start <= first < start + mmap.PAGESIZE
        assert start + length == first + TOKENS * DIM * 2
        assert advice == mmap.MADV_WILLNEED


@pytest.mark.skipif(token_shards._madvise is None, reason="no madvise here")
def test_madvise_is_the_systems(built):
    start = built._shards[0].tokens[2].data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    assert token_shards._madvise(start, 1, mmap.MADV_WILLNEED) == 0
    assert token_shards._madvise(start + 1, 1, mmap.MADV_WILLNEED) == -1  # not on a page


def test_each_image_is_computed_once_in_batches(tmp_path):
    teacher = Teacher()
    build(tmp_path, teacher)
    assert teacher.asked == [[0, 1, 2], [3], [4, 5, 6], [7], [8, 9, 10]]
    build(tmp_path, never)


def test_complete_cache_in_a_folder_that_cannot_be_written(built, monkeypatch):
    def refuse_write(*_args, **_options):
        raise AssertionError("a complete cache needs no writing")

    monkeypatch.setattr(token_cache, "atomic_write", refuse_write)
    monkeypatch.setattr(token_cache, "FileLock", refuse_write)
    assert build(built.folder, never).num_images == IMAGES


@pytest.mark.parametrize("break_at", [0, 3, 5, 10])
def test_interrupted_build_goes_on_with_complete_shards(tmp_path, break_at):
    first = Teacher(break_at=break_at, error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, first)
    complete = break_at // 4
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {".lock"} == {f"tokens-{shard:05d}.safetensors" for shard in range(complete)}
    second = Teacher()
    cache = build(tmp_path, second)
    assert second.images == list(range(4 * complete, IMAGES))
    assert torch.equal(cache.read([break_at])[3][0], tokens_of(break_at, 3).bfloat16())


def test_what_a_killed_build_leaves_is_no_shard(tmp_path):
    stale = tmp_path / ".tokens-00001.safetensors.partial"
    stale.write_bytes(b"x" * 10_000)
    cache = build(tmp_path)
    assert torch.equal(cache.read([5])[2][0], tokens_of(5, 2).bfloat16())
    assert not stale.exists()


def test_deleted_shard_alone_is_made_again(tmp_path):
    build(tmp_path)
    content = shard_paths(tmp_path)[1].read_bytes()
    shard_paths(tmp_path)[1].unlink()
    teacher = Teacher()
    build(tmp_path, teacher)
    assert teacher.images == [4, 5, 6, 7]
    assert shard_paths(tmp_path)[1].read_bytes() == content


def test_error_of_the_teacher_is_passed_on_as_it_is(tmp_path):
    error = OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(OSError, match="Too many open files") as caught:
        build(tmp_path, Teacher(break_at=9, error=error))
    assert caught.value is error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fingerprint": {**FINGERPRINT, "image_size": 126}}, r"image_size 224 \(this run: 126\)"),
        ({"fingerprint": {**FINGERPRINT, "layers": [3]}}, r"layers \[2, 3\] \(this run: \[3\]\)"),
        ({"fingerprint": {**FINGERPRINT, "crop": 0.9}}, r"crop None \(this run: 0\.9\)"),
        (
            {"fingerprint": {**FINGERPRINT, "teacher": "eva", "weights": "9"}},
            r"teacher 'vit' \(this run: 'eva'\), weights '0123' \(this run: '9'\)",
        ),
        ({"images": 12}, r"num_images 11 \(this run: 12\)"),
    ],
)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_other_fingerprint_is_refused(tmp_path, options, message, has_manifest):
    build(tmp_path)
    if not has_manifest:  # as in an interrupted build
        (tmp_path / MANIFEST).unlink()
    refuse(rf"{tmp_path} was made from something else.*: {message}; name an", tmp_path, **options)


def test_equal_fingerprint_in_other_types_is_accepted(tmp_path):
    build(tmp_path)
    build(tmp_path, never, fingerprint={**FINGERPRINT, "layers": tuple(LAYERS)})


def corrupt(path, change):
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-2],
        lambda content: b"",
        lambda content: content + b"\0\0",
        lambda content: content[:8] + b"[" + content[9:],
    ],
    ids=["cut", "empty", "longer", "header"],
)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_corrupt_shard_is_named(tmp_path, change, has_manifest):
    build(tmp_path)
    if not has_manifest:
        (tmp_path / MANIFEST).unlink()
    path = shard_paths(tmp_path)[1]
    corrupt(path, change)
    refuse(rf"{path} is damaged \(.*\); delete this file", tmp_path)
    path.unlink()
    assert build(tmp_path).num_images == IMAGES


@pytest.mark.parametrize("from_end", [1, 2, 17, TOKENS * DIM * 2])  # within the last image
def test_any_altered_byte_shows_when_its_image_is_read(tmp_path, from_end):
    build(tmp_path)
    path = shard_paths(tmp_path)[2]
    content = bytearray(path.read_bytes())
    content[-from_end] ^= 0x10
    path.write_bytes(content)
    cache = build(tmp_path, never)
    assert torch.equal(cache.read([9])[3][0], tokens_of(9, 3).bfloat16())
    with pytest.raises(SingerError, match=rf"{path} is damaged \(image 10 .*delete this file"):
        cache.read([10])


def test_damage_is_found_before_anything_is_computed(tmp_path):
    build(tmp_path)
    shard_paths(tmp_path)[0].unlink()
    corrupt(shard_paths(tmp_path)[1], lambda content: content[:-2])
    (tmp_path / MANIFEST).unlink()
    refuse("tokens-00002.* is damaged", tmp_path)


def test_shard_of_another_length_than_the_manifest_says(tmp_path):
    build(tmp_path)
    path = shard_paths(tmp_path)[1]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    path.write_bytes(save(load_file(path), metadata | {"more": "x"}))
    refuse(rf"{path} is damaged \(\d+ bytes, the manifest says \d+\)", tmp_path)


def test_shard_in_anothers_place_shows(tmp_path):
    build(tmp_path, images=12)
    paths = shard_paths(tmp_path)
    paths[0].write_bytes(paths[2].read_bytes())
    refuse("is damaged", tmp_path, images=12)


def test_shards_of_other_shapes_show(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, Teacher(break_at=4, error=KeyboardInterrupt()))
    with pytest.raises(SingerError, match=r"tokens-00001\S* is damaged \(its blocks' tokens are"):
        build(tmp_path, Teacher(dim=DIM + 1))


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "other"}'])
def test_foreign_manifest_is_refused(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    refuse("manifest.json", tmp_path)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SingerError, match=r"teacher\.cache: .*file/cache can't be written: Not a"):
        build(tmp_path / "file" / "cache")


def test_disk_full_counts_nothing_half_written(tmp_path):
    resource = pytest.importorskip("resource", reason="sets a limit of POSIX")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (800, hard))  # a write beyond it fails
        with pytest.raises(SingerError, match=r"tokens-00000.* can't be written: File too large"):
            build(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in tmp_path.iterdir()} <= {".lock"}
    assert build(tmp_path).num_images == IMAGES


def test_disk_that_fills_up_later_keeps_the_shards_before(tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def fail_third_time(fd):
        calls.append(fd)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(fd)

    monkeypatch.setattr(os, "fsync", fail_third_time)
    with pytest.raises(
        SingerError, match=r"^teacher\.cache: .*tokens-00002\S* can't be written: No space left"
    ):
        build(tmp_path)
    names = {path.name for path in tmp_path.iterdir()} - {".lock"}
    assert names == {"tokens-00000.safetensors", "tokens-00001.safetensors"}
    second = Teacher()
    build(tmp_path, second)
    assert second.images == [8, 9, 10]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3.4e38])  # the last: no bfloat16
def test_non_finite_tokens_name_the_image(tmp_path, value):
    def compute(images):
        tokens = Teacher()(images)
        if 6 in images:
            tokens[3][images.index(6), 4, 2] = value
        return tokens

    with pytest.raises(SingerError, match=r"image 6, block 3, are not finite"):
        build(tmp_path, compute)
    assert [path.name for path in shard_paths(tmp_path)] == ["tokens-00000.safetensors"]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({}, "no tokens"),
        ({2: torch.zeros(2, TOKENS, DIM)}, r"\(2, 5, 6\) of block 2, expected \(3, T, D\)"),
        ({2: torch.zeros(3, DIM)}, r"\(3, 6\) of block 2"),
    ],
)
def test_wrong_shapes_are_refused(tmp_path, result, message):
    with pytest.raises(ValueError, match=f"compute: got .*{message}"):
        build(tmp_path, lambda images: result)


def test_shapes_that_change_are_refused(tmp_path):
    with pytest.raises(ValueError, match="compute: got tokens of shapes"):
        build(tmp_path, lambda images: {2: torch.zeros(len(images), TOKENS, 4 + len(images))})


@pytest.mark.parametrize("options", [{"images": 0}, {"batch_size": 0}])
def test_numbers_below_one_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="got 0, expected at least 1"):
        build(tmp_path, **options)


@pytest.mark.parametrize("processes", [2, 4])  # 4: one of them has no shard
def test_processes_share_the_work(tmp_path, processes):
    barrier = threading.Barrier(processes)
    teachers = [Teacher() for _ in range(processes)]
    caches, errors = {}, []

    def run(process):
        try:
            caches[process] = build(
                tmp_path,
                teachers[process],
                process_index=process,
                num_processes=processes,
                wait=lambda: barrier.wait(timeout=30),
            )
        except BaseException as error:  # for the main thread to show
            barrier.abort()
            errors.append(error)

    threads = [threading.Thread(target=run, args=(process,)) for process in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for process, teacher in enumerate(teachers):
        assert {image // 4 % processes for image in teacher.images} <= {process}
    assert sorted(image for teacher in teachers for image in teacher.images) == list(range(IMAGES))
    for cache in caches.values():
        assert torch.equal(cache.read([10])[2][0], tokens_of(10, 2).bfloat16())
    assert (tmp_path / MANIFEST).exists()


def test_manifest_comes_last_and_from_process_0(tmp_path):
    states = []

    def wait():
        states.append((len(shard_paths(tmp_path)), (tmp_path / MANIFEST).exists()))

    for process in (1, 2):  # one after the other: theirs are there when process 0 comes
        with pytest.raises(SingerError, match=r"tokens-00000\S* is missing.*all machines see"):
            build(tmp_path, process_index=process, num_processes=3)
    build(tmp_path, process_index=0, num_processes=3, wait=wait)
    assert states == [(2, False), (3, False)]
    assert (tmp_path / MANIFEST).exists()


def test_barrier_is_passed_as_often_by_a_process_with_nothing_to_do(tmp_path):
    build(tmp_path)
    calls = []
    build(tmp_path, never, process_index=1, num_processes=2, wait=lambda: calls.append(1))
    assert len(calls) == 2


def test_two_runs_do_not_fill_one_folder(tmp_path):
    with FileLock(tmp_path / ".lock"):
        refuse(rf"another run is filling {tmp_path}", tmp_path)
    build(tmp_path)
    with FileLock(tmp_path / ".lock"):  # reading is nobody's business
        build(tmp_path, never)


def _read_in_child(cache, connection):
    connection.send(cache.read([7, 0])[2].float().sum().item())


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_forked_process_reads(built):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_read_in_child, args=(built, theirs))
    child.start()
    assert ours.poll(60)
    assert ours.recv() == built.read([7, 0])[2].float().sum().item()
    child.join()
    assert child.exitcode == 0


def test_a_pickled_cache_is_small_and_reads(built):
    content = pickle.dumps(built)
    assert len(content) < shard_paths(built.folder)[0].stat().st_size
    again = pickle.loads(content)
    assert torch.equal(again.read([4])[3], built.read([4])[3])
