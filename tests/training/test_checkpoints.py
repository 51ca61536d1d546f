"""Checkpoints: written atomically, and never used when corrupt."""

import errno
import hashlib
import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from singer.engine.checkpoints import Checkpoint, CheckpointStore
from singer.engine.state_dicts import (
    load_module,
    load_optimizer,
    optimizer_tensors,
    random_state,
    set_random_state,
)
from singer.errors import SingerError

CPU = torch.device("cpu")


def _checkpoint(step):
    tensors = {"weights": {"w": torch.full((3,), float(step))}, "random": {"rank0": torch.ones(2)}}
    return Checkpoint(step, tensors, {"images": "abc", "unreadable": []})


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


def _saved(store, *steps):
    for step in steps:
        store.save(_checkpoint(step))
    return store


def test_what_is_written_is_read_back(store):
    assert store.newest() is None
    found = _saved(store, 5).newest()
    assert (found.step, found.state) == (5, {"images": "abc", "unreadable": []})
    assert torch.equal(found.tensors["weights"]["w"], torch.full((3,), 5.0))
    assert found.tensors.keys() == {"weights", "random"}


def test_the_last_ones_are_kept_in_the_order_of_their_steps(store):
    _saved(store, 9, 10, 99, 100, 1000)
    assert store.steps() == [99, 100, 1000]
    assert [path.name for path in sorted(store.folder.iterdir())] == [
        "step-000000099",
        "step-000000100",
        "step-000001000",
    ]


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _change_step(path):
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({**whole, "step": 3}))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weights.safetensors", _truncate),
        ("weights.safetensors", _flip),
        ("weights.safetensors", os.remove),
        ("random.safetensors", _flip),
        ("state.json", _truncate),
        ("state.json", _change_step),
        ("state.json", os.remove),
        ("state.json", lambda path: path.write_text("[]")),
    ],
)
def test_a_corrupt_one_is_named_and_the_one_before_it_used(store, caplog, name, damage):
    _saved(store, 1, 2)
    damage(store.path(2) / name)
    assert store.newest().step == 1
    assert str(store.path(2) / name) in caplog.text
    _saved(store, 2)  # the run that went on from step 1 comes to step 2 again
    assert store.newest().step == 2


def test_one_under_another_steps_name_is_not_trusted(store, caplog):
    _saved(store, 6)
    shutil.copytree(store.path(6), store.path(8))
    assert store.newest().step == 6
    assert f"{store.path(8)} holds the checkpoint of step 6" in caplog.text


def test_a_corrupt_one_never_displaces_a_good_one(tmp_path):
    store = _saved(CheckpointStore(tmp_path, keep=2), 5, 9)
    _flip(store.path(9) / "weights.safetensors")
    assert store.newest().step == 5
    _saved(store, 7)
    assert store.steps() == [5, 7]


def test_when_all_are_corrupt_nothing_is_made_up(store):
    _saved(store, 1, 2)
    for step in (1, 2):
        _truncate(store.path(step) / "state.json")
    with pytest.raises(SingerError, match=r"no checkpoint can be used: .*step-000000002.*anew"):
        store.newest()


def test_nothing_is_unpickled(store):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(store.folder / "owned"),))

    _saved(store, 1, 2)
    # Even one whose checksum is right.
    content = pickle.dumps(Evil())
    path = store.path(2) / "weights.safetensors"
    path.write_bytes(content)
    body = {
        "step": 2,
        "files": {path.name: hashlib.sha256(content).hexdigest()},
        "state": {},
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (store.path(2) / "state.json").write_text(json.dumps({"sha256": digest, **body}))
    assert store.newest().step == 1
    assert not (store.folder / "owned").exists()


@pytest.mark.parametrize("call", ["fsync", "replace", "mkdir"])
def test_a_full_disk_loses_no_earlier_one_and_says_so(store, monkeypatch, call):
    _saved(store, 1)
    before = sorted(store.folder.iterdir())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(SingerError, match=r"No space left on device; that of step 1 is untouched"):
        store.save(_checkpoint(2))
    monkeypatch.undo()
    assert sorted(store.folder.iterdir()) == before
    assert store.newest().step == 1
    assert _saved(store, 2).newest().step == 2


def test_stale_temporary_files_are_removed(store):
    _saved(store, 1)
    for name in (".step-000000002.partial", ".step-000000000.removed"):
        (store.folder / name).mkdir()
        (store.folder / name / "weights.safetensors").write_bytes(b"ha")
    assert store.newest().step == 1
    _saved(store, 2)
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "step-000000001",
        "step-000000002",
    ]


def _draw():
    return random.gauss(0, 1), np.random.randn(3).tolist(), torch.randn(3).tolist()


@given(st.integers(0, 2**31 - 1), st.integers(0, 5))
def test_random_generators_go_on_where_they_were(seed, drawn):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for _ in range(drawn):  # an odd number of Gaussians leaves one in store
        _draw()
    state = random_state(CPU)
    expected = [_draw() for _ in range(3)]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    set_random_state(state, CPU)
    assert [_draw() for _ in range(3)] == expected


def test_a_random_state_of_another_length_is_refused():
    with pytest.raises(SingerError, match=r"random generators' state has 8 bytes, expected \d+"):
        set_random_state(torch.zeros(8, dtype=torch.uint8), CPU)


def _trained(seed, width=4):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim > 1]},
    ]
    return model, torch.optim.AdamW(groups, lr=0.1)


def _steps(model, optimizer, count):
    for index in range(count):
        optimizer.zero_grad()
        model(torch.full((2, 3), float(index))).square().sum().backward()
        optimizer.step()


def test_an_optimiser_goes_on_where_it_was():
    first, second = _trained(0), _trained(1)
    _steps(*first, 3)
    load_module(second[0], first[0].state_dict(), "model")
    load_optimizer(second[1], second[0], load(save(optimizer_tensors(first[1], first[0]))))
    for pair in (first, second):
        _steps(*pair, 3)
    for one, other in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_optimiser_keeps_its_own_options():
    first, second = _trained(0), _trained(1)
    _steps(*first, 1)
    second[1].param_groups[0]["lr"] = 0.5
    load_optimizer(second[1], second[0], optimizer_tensors(first[1], first[0]))
    assert second[1].param_groups[0]["lr"] == 0.5


def test_what_is_of_another_model_is_refused():
    first, second = _trained(0), _trained(0, width=5)
    _steps(*first, 1)
    tensors = optimizer_tensors(first[1], first[0])
    with pytest.raises(SingerError, match=r"checkpoint: 0\.\S+ has the shape .*, expected"):
        load_optimizer(second[1], second[0], tensors)
    with pytest.raises(SingerError, match="holds absent/exp_avg, a parameter that is not trained"):
        load_optimizer(first[1], first[0], {"absent/exp_avg": torch.zeros(1)})
    with pytest.raises(SingerError, match=r"checkpoint: student is of another model: .*size mism"):
        load_module(second[0], first[0].state_dict(), "student")
