"""Experiment trackers: what is logged where, and that a missing one is refused early."""

import os
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate.utils import LoggerType
from interrupted_runs import QUIET, interrupted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from singer.engine import run as training
from singer.engine import trackers
from singer.engine.checkpoints import CheckpointStore
from singer.engine.trackers import check_trackers
from singer.errors import SingerError

LOSSES = ["loss", "kd", "outlier", "info"]
PER_STEP = {f"train/{name}" for name in ("lr", "grad_norm", *LOSSES)}
PER_LOG = {f"train/{name}" for name in ("images_per_second", "data_seconds", "peak_memory_gib")}


def _scalars(config):
    events = EventAccumulator(str(Path(config.output, "tensorboard")))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_losses_rate_norm_speed_and_memory(make_config, monkeypatch):
    norms = []
    original = torch.optim.AdamW.step

    def step(self, *arguments, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    config = make_config(train={"log_every": 2})
    training.train(config, QUIET)
    scalars = _scalars(config)
    assert scalars.keys() == PER_STEP | PER_LOG
    for tag in PER_STEP:
        assert [event.step for event in scalars[tag]] == [1, 2, 3, 4, 5, 6]
    for tag in PER_LOG:
        assert [event.step for event in scalars[tag]] == [2, 4, 6]
        assert all(event.value > 0 for event in scalars[tag])
    found = [event.value for event in scalars["train/grad_norm"]]
    assert found == pytest.approx(norms, rel=1e-6)  # the same sum in float32


def test_the_norm_is_that_before_clipping(make_config, tmp_path):
    logged = []
    for limit in (None, 1e-3):
        train = {"steps": 1, "max_grad_norm": limit}
        config = make_config(train=train, output=str(tmp_path / str(limit)))
        training.train(config, QUIET)
        logged += [event.value for event in _scalars(config)["train/grad_norm"]]
    assert logged[0] > 1e-3
    assert logged[1] == pytest.approx(logged[0], rel=1e-6)


def test_several_students_are_told_apart_by_name(values):
    student = values.pop("student")
    values["students"] = [{**student, "folder": name} for name in ("a", "b")]
    config = training.Config.model_validate(values)
    training.train(config, QUIET)
    expected = {f"{name}/{tag}" for name in ("a", "b") for tag in PER_STEP}
    assert _scalars(config).keys() == expected | PER_LOG


def test_a_resumed_run_has_each_step_once(whole, monkeypatch):
    config, _ = whole()
    interrupted(monkeypatch, config, 5)
    training.train(config, QUIET, resume=True)
    steps = [event.step for event in _scalars(config)["train/loss"]]
    assert steps == list(range(1, 10))


def test_without_trackers_the_metrics_are_written(make_config):
    config = make_config(train={"trackers": []})
    training.train(config, QUIET)
    assert not Path(config.output, "tensorboard").exists()
    assert len(Path(config.output, "metrics.jsonl").read_text().splitlines()) == 6


def test_a_missing_tracker_is_refused_before_any_weight(make_config, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setattr(training, "create_backbone", None)  # calling it would fail
    config = make_config(train={"trackers": ["tensorboard", "wandb"]})
    with pytest.raises(SingerError, match=r"train\.trackers: the package of 'wandb' is not inst"):
        training.train(config, QUIET)
    assert not Path(config.output).exists()


def test_an_unknown_tracker_is_refused():
    with pytest.raises(SingerError, match=r"got 'tensorbord', .*; did you mean 'tensorboard'\?"):
        check_trackers(["tensorbord"])


class _Recorder:
    """Stands for a tracker whose package is not installed here."""

    requires_logging_directory = False
    calls: ClassVar[list] = []

    def __init__(self, project, **options):
        self.calls.append(("init", project, options))

    def start(self):
        self.calls.append(("start",))

    def store_init_configuration(self, values):
        self.calls.append(("config", values["train"]["batch_size"]))

    def log(self, values, step):
        self.calls.append(("log", step, set(values)))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(_Recorder, "calls", [])
    monkeypatch.setitem(trackers.LOGGER_TYPE_TO_CLASS, "wandb", _Recorder)
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [LoggerType.WANDB])
    return _Recorder


def test_other_trackers_get_the_configuration_and_steps_in_order(values, recorder):
    student = values.pop("student")
    values["students"] = [{**student, "folder": name} for name in ("a", "b")]
    values["train"]["trackers"] = ["wandb"]
    training.train(training.Config.model_validate(values), QUIET)
    start, logs, end = recorder.calls[:3], recorder.calls[3:-1], recorder.calls[-1]
    assert start == [("init", "singer", {"name": "run"}), ("start",), ("config", 4)]
    assert [log[1] for log in logs] == [1, 2, 3, 4, 5, 6]  # W&B drops what comes out of order
    assert all({"a/train/loss", "b/train/loss"} <= log[2] for log in logs)
    assert end == ("finish",)


def test_a_tracker_that_does_not_start_is_one_line(make_config, recorder, monkeypatch):
    def fail(self):
        raise RuntimeError("no\nkey")

    monkeypatch.setattr(recorder, "start", fail)
    config = make_config(train={"trackers": ["wandb"]})
    with pytest.raises(SingerError, match="'wandb' can't be started: RuntimeError: no key"):
        training.train(config, QUIET)
    assert not Path(config.output).exists()


def test_a_tracker_that_fails_later_is_named(make_config, recorder, monkeypatch, caplog):
    def fail(self, values=None, step=None):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(recorder, "log", fail)
    monkeypatch.setattr(recorder, "finish", fail)
    config = make_config(train={"trackers": ["wandb"]})
    with pytest.raises(SingerError, match=r"^train.trackers: 'wandb': OSError: no network$"):
        training.train(config, QUIET)
    assert "train.trackers: 'wandb': OSError: no network" in caplog.text
    assert "tensorboard" not in caplog.text


def test_a_tracker_that_fails_loses_no_step(make_config, recorder, monkeypatch):
    def fail(self, values, step):
        if step > 2:
            raise OSError("no network")

    monkeypatch.setattr(recorder, "log", fail)
    config = make_config(train={"trackers": ["wandb"], "save_every": 100})
    with pytest.raises(SingerError, match=r"^train.trackers: 'wandb': OSError: no network$"):
        training.train(config, QUIET)
    assert CheckpointStore(Path(config.output, "checkpoints")).newest().step == 4


def test_mlflow_offline(make_config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)
    config = make_config(train={"trackers": ["mlflow"]})
    training.train(config, QUIET)
    (run,) = mlflow.search_runs(experiment_names=["singer"], output_format="list")
    assert run.data.metrics.keys() == PER_STEP | PER_LOG
    assert "train" in run.data.params


def test_wandb_offline(make_config, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    training.train(make_config(train={"trackers": ["wandb"]}), QUIET)
    assert any(name.startswith("offline-run") for name in os.listdir(tmp_path / "wandb"))
