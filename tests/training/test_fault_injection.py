"""One fault, of each kind, at each step and each file operation of a run.

A run that meets it ends in one line, and what it leaves behind goes on to the bits of a run that
met none: its newest checkpoint is that run's of the same step, or it begins anew.
"""

import builtins
import errno
import io
import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from interrupted_runs import QUIET

from singer.data.loader import create_loader
from singer.engine import run as training
from singer.engine.checkpoints import CheckpointStore
from singer.engine.trainer import Trainer
from singer.errors import SingerError, StoppedError
from singer.report import figures

STEPS = 3

ERRORS = {
    **{
        name: OSError(getattr(errno, name), os.strerror(getattr(errno, name)))
        for name in ("ENOSPC", "EIO", "EACCES", "EROFS")
    },
    "MemoryError": MemoryError(),
    "RuntimeError": RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed."),
    "KeyboardInterrupt": KeyboardInterrupt(),
}
SIGNALS = ("SIGTERM", "SIGHUP", "SIGUSR1")

PLACES = ("step", "log", "open", "fsync", "rename", "mkdir")
CASES = list(itertools.product([*ERRORS, *SIGNALS], PLACES))
# Each error or signal once, the places with many calls, which take longest, once.
BY_DEFAULT = set(
    zip(
        [*ERRORS, *SIGNALS],
        ["open", "fsync", "mkdir", "rename", "step", "log", "step", "log", "step", "log"],
        strict=True,
    )
)


class Fault:
    """Meets the run at the n-th call of a place, once."""

    def __init__(self, name, call):
        self.name = name
        self.call = call
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.calls != self.call:
            return
        if self.name in SIGNALS:
            os.kill(os.getpid(), getattr(signal, self.name))
        else:
            raise ERRORS[self.name]


def _before(patch, owner, name, fault, applies=lambda *_: True):
    original = getattr(owner, name)

    def wrapped(*arguments, **options):
        if applies(*arguments):
            fault()
        return original(*arguments, **options)

    patch.setattr(owner, name, wrapped)


def _inject(patch, place, fault, output):
    def inside(path, *_):
        return isinstance(path, (str, os.PathLike)) and str(path).startswith(output)

    def written(path, mode="r", *_):
        return inside(path) and set(mode) & set("wa+x")

    if place == "step":
        _before(patch, Trainer, "_step", fault)
    elif place == "log":
        _before(patch, Trainer, "_log_and_save", fault)
    elif place == "open":
        for module in (builtins, io):
            _before(patch, module, "open", fault, written)
    elif place == "rename":
        _before(patch, os, "rename", fault, inside)
        _before(patch, os, "replace", fault, inside)
    elif place == "mkdir":
        _before(patch, os, "mkdir", fault, inside)
    else:
        _before(patch, os, "fsync", fault)


def _assert_equal(found, expected):
    assert found.state == expected.state
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensors in expected.tensors.items():
        for key, tensor in tensors.items():
            assert torch.equal(found.tensors[name][key], tensor), f"{name}: {key}"


def _metrics(output):
    path = Path(output, "metrics.jsonl")
    return path.read_text().splitlines() if path.exists() else []


class _Drawing:
    def savefig(self, path, **_):
        Path(path).write_bytes(b"not drawn")


@pytest.fixture
def tiny(values, make_config, tmp_path, monkeypatch):
    """A run without what takes long; its checkpoints of all steps, its metrics."""
    monkeypatch.setattr(training, "check", lambda config, **_: create_loader(config))
    monkeypatch.setattr(figures, "plot_losses", lambda _, path: figures._save(_Drawing(), path))
    values["student"]["options"] = {**values["student"]["options"], "drop_path_rate": 0.3}
    train = {"steps": STEPS, "save_every": 1, "log_every": 1, "trackers": []}
    whole = make_config(train=train, output=str(tmp_path / "whole"))
    training.train(whole, QUIET)
    store = CheckpointStore(tmp_path / "whole" / "checkpoints")
    expected = {step: store.read(step) for step in store.steps()}
    return make_config(train={**train, "save_every": 2}), expected, _metrics(whole.output)


@pytest.mark.parametrize(
    ("name", "place"),
    [pytest.param(*case, marks=[] if case in BY_DEFAULT else pytest.mark.slow) for case in CASES],
)
def test_a_fault_loses_nothing(tiny, tmp_path, place, name):
    config, expected, metrics = tiny
    call = 0
    while True:
        call += 1
        config = config.model_copy(update={"output": str(tmp_path / f"run{call}")})
        fault = Fault(name, call)
        error = None
        with pytest.MonkeyPatch.context() as patch:
            _inject(patch, place, fault, config.output)
            try:
                training.train(config, QUIET)
            except (Exception, KeyboardInterrupt) as caught:
                error = caught
        if fault.calls < call:
            break
        newest = _check(config, expected, metrics, error, f"{place} {call}")
        completed = call - (place == "step" and name in ERRORS)
        if place in ("step", "log") and completed > 0:
            assert newest == completed
            assert isinstance(error, (SingerError, StoppedError, KeyboardInterrupt))
    assert error is None
    assert call > STEPS or place == "mkdir"


def _check(config, expected, metrics, error, where):
    store = CheckpointStore(Path(config.output, "checkpoints"))
    newest = store.newest()
    saved = None if newest is None else newest.step
    if newest is None:
        assert error is not None, where
        training.train(config, QUIET, resume=True)
        newest = store.newest()
        assert newest.step == STEPS, where
    assert "\n" not in str(error), where
    # Of others the command line makes one line; a file that can't be written is named.
    assert not isinstance(error, OSError), where
    _assert_equal(newest, expected[newest.step])
    assert _metrics(config.output)[: newest.step] == metrics[: newest.step], where
    if error is None:
        assert newest.step == STEPS, where
    return saved
