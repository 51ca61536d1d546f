"""A run small enough for tests: tiny random models on a few generated images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from interrupted_runs import QUIET
from matplotlib.figure import Figure
from PIL import Image

from singer.config.schema import Config, parse_config
from singer.engine import run as training

TEACHER = {
    "name": "vit_tiny_patch16_224",
    "weights": "random",
    "options": {"patch_size": 8, "depth": 4, "embed_dim": 32, "num_heads": 2},
}
STUDENT = {
    "name": "vit_tiny_patch16_224",
    "options": {"patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2},
}


@pytest.fixture(autouse=True)
def _fresh_accelerate_state() -> None:
    """Accelerate keeps one precision per process; each test may take its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _no_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run on the CPU, whose results are the same bits everywhere; but not what is marked gpu."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of processes that a test starts


@pytest.fixture(autouse=True)
def _no_drawing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make figures, but draw them in tests marked draws alone: it takes longer than a tiny run."""
    if "draws" not in request.keywords:

        def write(figure: Figure, path: Path, **options: Any) -> None:
            Path(path).write_bytes(b"not drawn")

        monkeypatch.setattr(Figure, "savefig", write)


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Don't wait for the disk: no power fails here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Twelve images of random sizes, in two subfolders."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    for index in range(12):
        height, width = rng.integers(40, 90, size=2)
        pixels = rng.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        path = folder / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def values(tmp_path: Path, image_folder: Path) -> dict[str, Any]:
    """The tiny run's configuration, as nested mappings."""
    return {
        "teacher": dict(TEACHER),
        "student": dict(STUDENT),
        "image_size": 32,
        "method": {"name": "singer", "rank": 8},
        "data": {"source": str(image_folder), "num_workers": 0},
        "train": {"steps": 6, "batch_size": 4, "log_every": 2, "lr": 1e-3},
        "output": str(tmp_path / "run"),
    }


def _merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(values)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


@pytest.fixture
def make_config(values: dict[str, Any]) -> Callable[..., Config]:
    """Build the tiny run's configuration with some values changed: sections by keyword."""

    def make(**changes: Any) -> Config:
        return parse_config(_merge(values, changes))

    return make


@pytest.fixture(scope="session")
def whole_runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict[str, Any]], Path]:
    """Run a configuration, once for the same values and images; its folder is only read."""
    folders: dict[str, Path] = {}

    def run(values: dict[str, Any]) -> Path:
        source = Path(values["data"]["source"])
        images = {
            str(path.relative_to(source)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(source.rglob("*.*"))
        }
        data = {**values["data"], "source": images}
        key = json.dumps({**values, "data": data, "output": None}, sort_keys=True)
        if key not in folders:
            folder = tmp_path_factory.mktemp("whole") / "run"
            training.train(parse_config({**values, "output": str(folder)}), QUIET)
            folders[key] = folder
        return folders[key]

    return run


@pytest.fixture
def whole(values, whole_runs):
    """The tiny run's configuration, with all that has a state, and an uninterrupted run of it."""
    values["train"] = {
        "steps": 9,
        "batch_size": 4,
        "grad_accum_steps": 2,
        "max_grad_norm": 0.05,
        "ema": 0.9,
        "log_every": 2,
        "save_every": 2,
    }
    values["data"]["epoch_size"] = 20  # five steps: no other step than 5 ends an epoch
    # Random numbers in training: dropped paths.
    values["student"] = {**values["student"]}
    values["student"]["options"] = {**values["student"]["options"], "drop_path_rate": 0.3}

    def run(**changes):
        values.update(changes)
        return parse_config(values), whole_runs(values)

    return run
