"""Runs that are interrupted, and what is left of them."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from singer.engine import run as training
from singer.engine.checkpoints import CheckpointStore
from singer.engine.trainer import Trainer

QUIET = Console(quiet=True)


def weights(folder):
    return {path.name: load_file(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def assert_same(folder, expected):
    found, wanted = weights(folder), weights(expected)
    assert found.keys() == wanted.keys() >= {"student.safetensors", "student_ema.safetensors"}
    for name, tensors in wanted.items():
        assert tensors.keys() == found[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(found[name][key], tensor), f"{name}: {key}"
    lines = [Path(path, "metrics.jsonl").read_text() for path in (folder, expected)]
    assert lines[0] == lines[1]


class PowerFailure(BaseException):
    """Nothing in the trainer handles it, as nothing handles a failure of the power."""


def interrupted(monkeypatch, config, step):
    """Run until just before a step's update, as if the power failed."""
    original = Trainer._step

    def fail(self, number, batches):
        if number == step:
            raise PowerFailure
        original(self, number, batches)

    monkeypatch.setattr(Trainer, "_step", fail)
    with pytest.raises(PowerFailure):
        training.train(config, QUIET, resume=True)
    monkeypatch.setattr(Trainer, "_step", original)


def fail_at(monkeypatch, owner, name, call, error):
    """Raise an error in place of a method's n-th call; return what undoes it."""
    original, calls = getattr(owner, name), []

    def fail(self, *arguments):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, fail)
    return lambda: monkeypatch.setattr(owner, name, original)


def steps(config):
    with open(f"{config.output}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["step"] for line in file]


def saved_steps(config):
    return CheckpointStore(Path(config.output, "checkpoints")).steps()
