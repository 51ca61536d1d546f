"""A run that was interrupted ends with the very weights of one that was not."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from interrupted_runs import QUIET, assert_same, interrupted
from programs import Program

from singer.cli import main
from singer.data.loader import CropDataset
from singer.engine import checkpoints
from singer.engine import run as training
from singer.engine.checkpoints import CheckpointStore
from singer.engine.run_dir import RunDir
from singer.engine.trainer import Trainer
from singer.errors import SingerError, StoppedError
from singer.methods import SiNGER


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def from_step(step, method):
    def patched(self, *arguments):
        return die() if self.completed_steps + 1 >= step else method(self, *arguments)

    return patched


def main_killed_at(place, arguments):
    """Run in a process of its own: nothing is put back."""
    if place == "step":
        Trainer._step = from_step(6, Trainer._step)
    elif place == "checkpoint":  # its files are there, its state is not
        canonical = checkpoints._canonical
        checkpoints._canonical = lambda value: die() if value["step"] == 6 else canonical(value)
    elif place == "export":  # between the checkpoint and the student
        Trainer._export = from_step(6, Trainer._export)
    elif place == "end":  # after the last checkpoint
        Trainer._export = from_step(10, Trainer._export)
    elif place == "metrics":  # in the middle of a line
        append = RunDir.append_metrics

        def cut(self, records):
            append(self, records)
            if records[-1]["step"] >= 6:
                with open(self.path / "metrics.jsonl", "rb+") as file:
                    file.truncate(file.seek(0, 2) - 20)
                die()

        RunDir.append_metrics = cut
    return main(arguments)


@pytest.mark.parametrize("method", ["singer", "fitnet", "vitkd", "vitkd_same_layers"])
def test_every_method_goes_on_exactly(whole, monkeypatch, method):
    options = {"rank": 8} if method == "singer" else {}
    config, expected = whole(method={"name": method, **options})
    for step in (2, 4, 9):  # before any checkpoint, after one, before the last step
        torch.rand(step)
        interrupted(monkeypatch, config, step)
    training.train(config, QUIET, resume=True)
    assert_same(config.output, expected)


def test_several_students_go_on_exactly(whole, values, monkeypatch):
    student = dict(values.pop("student"))
    students = [{**student, "folder": name} for name in ("a", "b")]
    students[1]["options"] = {**student["options"], "embed_dim": 32}
    config, expected = whole(students=students)
    interrupted(monkeypatch, config, 6)
    training.train(config, QUIET, resume=True)
    for name in ("a", "b"):
        assert_same(f"{config.output}/{name}", expected / name)


@pytest.mark.sample(2, partial="each case starts a process")
@pytest.mark.parametrize("place", ["step", "checkpoint", "export", "end", "metrics"])
def test_killed_anywhere_it_goes_on_exactly(whole, tmp_path, place):
    config, expected = whole()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    arguments = ["distill", "--config", str(path), "--resume"]
    program = Program(tmp_path, main_killed_at, place, arguments)
    assert program.wait() == -signal.SIGKILL, program.stderr
    training.train(config, QUIET, resume=True)
    assert_same(config.output, expected)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("SIGHUP", 75),
        ("SIGTERM", 75),
        *(
            pytest.param(name, 75, marks=pytest.mark.slow)
            for name in ("SIGUSR1", "SIGUSR2", "SIGXCPU")
        ),
        ("SIGINT", 130),
    ],
)
def test_a_signal_saves_and_has_an_exit_code_of_its_own(
    whole, tmp_path, monkeypatch, capsys, name, code
):
    config, expected = whole()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    original, calls = SiNGER.losses, []

    def losses(self, student, teacher):
        calls.append(1)
        if len(calls) == 6:  # the second part of step 3, which no log or checkpoint falls on
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, student, teacher)

    monkeypatch.setattr(SiNGER, "losses", losses)
    handler = signal.getsignal(getattr(signal, name))
    assert main(["distill", "--config", str(path), "train.log_every=100"]) == code
    assert signal.getsignal(getattr(signal, name)) == handler
    assert f"stopped by {name} after step 3 of 9" in capsys.readouterr().err
    assert CheckpointStore(Path(config.output, "checkpoints")).newest().step == 3
    changed = config.model_copy(
        update={"train": config.train.model_copy(update={"log_every": 100})}
    )
    training.train(changed, QUIET, resume=True)
    assert_same(config.output, expected)


def test_a_signal_before_the_first_step_saves_nothing(make_config, monkeypatch):
    original = training.build_methods

    def build(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the set-up goes on")

    monkeypatch.setattr(training, "build_methods", build)
    config = make_config()
    with pytest.raises(StoppedError, match="before training began"):
        training.train(config, QUIET)
    assert not Path(config.output).exists()
    monkeypatch.setattr(training, "build_methods", original)
    assert training.distill(config, QUIET, resume=True).steps == 6


def _flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_corrupt_checkpoint_is_passed_over(whole, monkeypatch, caplog):
    config, expected = whole()
    interrupted(monkeypatch, config, 8)
    newest = max(Path(config.output, "checkpoints").iterdir())
    assert newest.name == "step-000000006"
    _flip_last_byte(newest / "student.optimizer.safetensors")
    training.train(config, QUIET, resume=True)
    assert f"{newest / 'student.optimizer.safetensors'} is truncated or altered" in caplog.text
    assert_same(config.output, expected)


def test_a_finished_run_stays_as_it_is(whole):
    config, expected = whole()
    training.train(config, QUIET)
    assert training.distill(config, QUIET, resume=True).losses["loss"] > 0
    assert_same(config.output, expected)


def test_another_configuration_is_refused_unless_forced(make_config, monkeypatch, caplog):
    training.train(make_config(train={"steps": 4}), QUIET)
    other = make_config(train={"steps": 6, "lr": 2e-3})
    with pytest.raises(SingerError) as caught:
        training.train(other, QUIET, resume=True)
    for text in ("train.steps: 4 → 6", "train.lr: 0.001 → 0.002", "--force"):
        assert text in str(caught.value)
    assert "train.batch_size" not in str(caught.value)
    training.train(other, QUIET, resume=True, force=True)
    assert "train.steps: 4 → 6" in caplog.text
    with open(f"{other.output}/metrics.jsonl", encoding="utf-8") as file:
        assert [json.loads(line)["step"] for line in file] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("batch_size", [1, 5, 6])
def test_with_another_batch_size_no_sample_is_seen_twice(make_config, monkeypatch, batch_size):
    original, seen = CropDataset.__getitems__, []

    def getitems(self, sample_ids):
        seen.append(sample_ids)
        return original(self, sample_ids)

    monkeypatch.setattr(CropDataset, "__getitems__", getitems)
    train = {"steps": None, "epochs": 3, "save_every": 7, "batch_size": 2}
    config = make_config(train=train)
    interrupted(monkeypatch, config, 8)  # after 14 samples: the second of epoch 1
    assert len(seen) == 7
    changed = make_config(train={**train, "batch_size": batch_size})
    training.train(changed, QUIET, resume=True, force=True)
    samples = [sample for batch in seen for sample in batch]
    assert len(set(samples)) == len(samples)
    left = (12 - 2) // batch_size
    assert len(samples) == 14 + batch_size * (left + 12 // batch_size)
    with open(f"{config.output}/metrics.jsonl", encoding="utf-8") as file:
        epochs = [json.loads(line)["epoch"] for line in file]
    assert epochs == 6 * [0] + (1 + left) * [1] + 12 // batch_size * [2]
    training.train(changed, QUIET, resume=True)  # finished: nothing is left to do
    assert len(samples) == sum(map(len, seen))


def test_other_images_are_refused(make_config, image_folder):
    config = make_config(train={"steps": 4})
    training.train(config, QUIET)
    (image_folder / "class0" / "0.png").rename(image_folder / "class1" / "zero.png")
    with pytest.raises(SingerError, match=r"another configuration \(images: "):
        training.train(config, QUIET, resume=True)


@pytest.mark.parametrize("key", ["position", "unreadable", "scaler"])
@pytest.mark.parametrize("force", [False, True])
def test_a_checkpoint_of_another_version_is_refused(make_config, key, force):
    config = make_config(train={"steps": 2})
    training.train(config, QUIET)
    store = CheckpointStore(Path(config.output, "checkpoints"))
    checkpoint = store.newest()
    del checkpoint.state[key]
    store.save(checkpoint)
    with pytest.raises(SingerError, match=rf"^output: the checkpoint .*step-0+2 is .* no {key};"):
        training.train(config, QUIET, resume=True, force=force)


@pytest.mark.parametrize("changes", [{"embed_dim": 32}, {"depth": 3}])
def test_a_checkpoint_of_another_student_is_refused_even_if_forced(make_config, changes):
    training.train(make_config(train={"steps": 4}), QUIET)
    other = make_config(student={"options": changes})
    before = sorted(Path(other.output).rglob("*"))
    with pytest.raises(SingerError, match="checkpoint: student is of another model"):
        training.train(other, QUIET, resume=True, force=True)
    assert sorted(Path(other.output).rglob("*")) == before


def test_a_folder_that_is_no_runs_is_left_alone(make_config):
    config = make_config()
    Path(config.output).mkdir()
    Path(config.output, "thesis.tex").write_text("x")
    with pytest.raises(SingerError, match=r"is no run's output directory: it has no config\.yaml"):
        training.train(config, QUIET, resume=True)
    assert [path.name for path in Path(config.output).iterdir()] == ["thesis.tex"]


def test_a_full_disk_during_a_save_keeps_the_checkpoint_before(whole, monkeypatch):
    config, expected = whole()
    original = os.fsync
    written = []

    def fsync(descriptor):
        written.append(descriptor)
        if len(written) > 60:
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SingerError, match="No space left on device"):
        training.train(config, QUIET)
    monkeypatch.setattr(os, "fsync", original)
    store = CheckpointStore(Path(config.output, "checkpoints"))
    assert store.newest().step >= 2
    training.train(config, QUIET, resume=True)
    assert_same(config.output, expected)


def test_force_goes_with_resume(tmp_path, capsys):
    assert main(["distill", "--config", str(tmp_path / "absent.yaml"), "--force"]) == 2
    assert "--force: goes with --resume" in capsys.readouterr().err
