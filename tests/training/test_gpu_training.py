"""Whole runs on a GPU: ``pytest -m gpu``."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from rich.console import Console

from singer.engine import run as training
from singer.engine.trainer import Trainer

pytestmark = pytest.mark.gpu

QUIET = Console(quiet=True)


def _metrics(config):
    with open(Path(config.output, "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("variant", ["paper", "official"])
def test_losses_are_those_of_the_cpu(make_config, tmp_path, monkeypatch, precision, variant):
    changes = {"method": {"variant": variant}, "image_size": 64}
    train = {"lr": 1e-4, "steps": 3}
    config = make_config(**changes, train={**train, "precision": precision})
    training.train(config, QUIET)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    expected = make_config(**changes, train=train, output=str(tmp_path / "cpu"))
    training.train(expected, QUIET)
    # float32: sums in another order, and TF32 nowhere; else the rounding of a bfloat16 teacher.
    tolerance = 1e-3 if precision == "fp32" else 0.05
    for found, wanted in zip(_metrics(config), _metrics(expected), strict=True):
        assert found["kd"] == pytest.approx(wanted["kd"], rel=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_step_waits_for_the_device(make_config, monkeypatch, precision):
    original = Trainer._step

    def step(self, number, batches):
        if number <= 2:  # kernels are loaded, statistics of the images copied
            return original(self, number, batches)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(self, number, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_step", step)
    train = {"precision": precision, "max_grad_norm": 1.0, "ema": 0.9, "log_every": 3}
    config = make_config(image_size=64, train=train)
    training.train(config, QUIET)
    assert len(_metrics(config)) == 6


def test_a_run_is_resumed(make_config):
    train = {"ema": 0.9, "precision": "bf16"}
    training.train(make_config(image_size=64, train={**train, "steps": 3}), QUIET)
    longer = make_config(image_size=64, train={**train, "steps": 6})
    training.train(longer, QUIET, resume=True, force=True)
    assert [record["step"] for record in _metrics(longer)] == [1, 2, 3, 4, 5, 6]
    assert math.isfinite(_metrics(longer)[-1]["loss"])


def test_compiled_blocks_run(make_config):
    config = make_config(image_size=64, train={"compile": True, "precision": "bf16"})
    training.train(config, QUIET)
    assert all(math.isfinite(record["loss"]) for record in _metrics(config))
