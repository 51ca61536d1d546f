"""A run that was interrupted ends with the very weights of one that was not."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

from singer import training
from singer.checkpoints import CheckpointStore
from singer.cli import main
from singer.config import parse_config
from singer.config_changes import differences
from singer.data import ImageCrops
from singer.errors import SingerError, StoppedError
from singer.methods import SiNGER
from singer.run_folder import RunFolder
from singer.trainer import Trainer

QUIET = Console(quiet=True)

KILLED = """
import os, signal, sys
from singer import checkpoints, learner, run_folder, trainer
from singer.cli import main

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def from_step(step, method):
    def patched(self, *arguments):
        return die() if self.done + 1 >= step else method(self, *arguments)
    return patched

place = sys.argv[1]
if place == "step":
    trainer.Trainer._step = from_step(6, trainer.Trainer._step)
elif place == "checkpoint":  # its files are there, its state is not
    write = checkpoints._write
    checkpoints._write = lambda path, content: (
        die() if path.name == "state.json" and "step-000000006" in str(path)
        else write(path, content)
    )
elif place == "export":  # between the checkpoint and the student
    trainer.Trainer._export = from_step(6, trainer.Trainer._export)
elif place == "end":  # after the last checkpoint
    trainer.Trainer._export = from_step(10, trainer.Trainer._export)
elif place == "metrics":  # in the middle of a line
    append = run_folder.RunFolder.append_metrics
    def cut(self, records):
        append(self, records)
        if records[-1]["step"] >= 6:
            with open(self.path / "metrics.jsonl", "rb+") as file:
                file.truncate(file.seek(0, 2) - 20)
            die()
    run_folder.RunFolder.append_metrics = cut
sys.exit(main(sys.argv[2:]))
"""


def _weights(folder):
    return {path.name: load_file(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def _assert_same(folder, expected):
    found, wanted = _weights(folder), _weights(expected)
    assert found.keys() == wanted.keys() >= {"student.safetensors", "student_ema.safetensors"}
    for name, tensors in wanted.items():
        assert tensors.keys() == found[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(found[name][key], tensor), f"{name}: {key}"
    lines = [Path(path, "metrics.jsonl").read_text() for path in (folder, expected)]
    assert lines[0] == lines[1]


@pytest.fixture
def whole(values, tmp_path):
    """The tiny run's configuration, with all that has a state, and an uninterrupted run of it."""
    values["train"] = {
        "steps": 9,
        "batch_size": 4,
        "accumulate": 2,
        "clip_norm": 0.05,
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
        reference = {**values, "output": str(tmp_path / "whole")}
        training.train(parse_config(reference), QUIET)
        return parse_config(values), tmp_path / "whole"

    return run


def _interrupted(monkeypatch, config, step):
    """Run until just before a step's update, as if the power failed."""
    original = Trainer._step

    def fail(self, number, batches):
        if number == step:
            raise RuntimeError("the power failed")
        original(self, number, batches)

    monkeypatch.setattr(Trainer, "_step", fail)
    with pytest.raises(RuntimeError, match="power"):
        training.train(config, QUIET, resume=True)
    monkeypatch.setattr(Trainer, "_step", original)


@pytest.mark.parametrize("method", ["singer", "fitnet", "vitkd"])
def test_every_method_goes_on_exactly(whole, monkeypatch, method):
    options = {"rank": 8} if method == "singer" else {}
    config, expected = whole(method={"name": method, **options})
    for step in (2, 4, 9):  # before any checkpoint, after one, before the last step
        torch.rand(step)
        _interrupted(monkeypatch, config, step)
    training.train(config, QUIET, resume=True)
    _assert_same(config.output, expected)


def test_several_students_go_on_exactly(whole, values, monkeypatch):
    student = dict(values.pop("student"))
    students = [{**student, "folder": name} for name in ("a", "b")]
    students[1]["options"] = {**student["options"], "embed_dim": 32}
    config, expected = whole(students=students)
    _interrupted(monkeypatch, config, 6)
    training.train(config, QUIET, resume=True)
    for name in ("a", "b"):
        _assert_same(f"{config.output}/{name}", expected / name)


def _command(place, tmp_path, config):
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))
    arguments = ["distill", "--config", str(path), "--resume"]
    return [sys.executable, "-c", KILLED, place, *arguments]


@pytest.mark.parametrize("place", ["step", "checkpoint", "export", "end", "metrics"])
def test_killed_anywhere_it_goes_on_exactly(whole, tmp_path, place):
    config, expected = whole()
    done = subprocess.run(
        _command(place, tmp_path, config),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    training.train(config, QUIET, resume=True)
    _assert_same(config.output, expected)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_has_an_exit_code_of_its_own(whole, tmp_path, monkeypatch, capsys, name):
    config, expected = whole()
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))
    original, calls = SiNGER.losses, []

    def losses(self, student, teacher):
        calls.append(1)
        if len(calls) == 6:  # the second part of step 3, which no log or checkpoint falls on
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, student, teacher)

    monkeypatch.setattr(SiNGER, "losses", losses)
    handler = signal.getsignal(getattr(signal, name))
    assert main(["distill", "--config", str(path), "train.log_every=100"]) == 75
    assert signal.getsignal(getattr(signal, name)) == handler
    assert f"stopped by {name} after step 3 of 9" in capsys.readouterr().err
    assert CheckpointStore(Path(config.output, "checkpoints")).newest().step == 3
    changed = config.model_copy(
        update={"train": config.train.model_copy(update={"log_every": 100})}
    )
    training.train(changed, QUIET, resume=True)
    _assert_same(config.output, expected)


def test_a_signal_before_the_first_step_saves_nothing(make_config, monkeypatch):
    original = training.build_methods

    def build(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(training, "build_methods", build)
    config = make_config()
    with pytest.raises(StoppedError, match="after step 0"):
        training.train(config, QUIET)
    monkeypatch.setattr(training, "build_methods", original)
    assert training.distill(config, QUIET, resume=True).steps == 6


def _flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _fail_at(monkeypatch, owner, name, call, error):
    """Raise an error in place of a method's n-th call; return what undoes it."""
    original, calls = getattr(owner, name), []

    def fail(self, *arguments):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, fail)
    return lambda: monkeypatch.setattr(owner, name, original)


def _steps(config):
    with open(f"{config.output}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["step"] for line in file]


def _saved(config):
    return CheckpointStore(Path(config.output, "checkpoints")).steps()


@pytest.mark.parametrize(
    ("call", "error"), [(5, KeyboardInterrupt()), (6, KeyboardInterrupt()), (6, SingerError("bad"))]
)
def test_what_ends_in_the_middle_of_a_step_keeps_the_steps_before(whole, monkeypatch, call, error):
    config, expected = whole()
    undo = _fail_at(monkeypatch, SiNGER, "losses", call, error)  # step 3, its first or second part
    with pytest.raises(type(error)) as caught:
        training.train(config, QUIET)
    assert caught.value is error
    assert _steps(config) == [1, 2]
    assert _saved(config) == [2]
    undo()
    training.train(config, QUIET, resume=True)
    _assert_same(config.output, expected)


@pytest.mark.parametrize(("batch", "saved"), [(7, [2, 3]), (8, [2])])
def test_images_that_fail_keep_what_can_be_gone_on_from(whole, monkeypatch, batch, saved):
    config, expected = whole()
    # Of step 4: its first part, before anything moved on, or its second. Two calls calibrate.
    undo = _fail_at(monkeypatch, ImageCrops, "batch", batch + 1, SingerError("no image"))
    with pytest.raises(SingerError, match="no image"):
        training.train(config, QUIET)
    assert _steps(config) == [1, 2, 3]
    assert _saved(config) == saved
    undo()
    training.train(config, QUIET, resume=True)
    _assert_same(config.output, expected)


def test_records_that_could_not_be_written_are_not_missing_in_the_end(whole, monkeypatch):
    config, expected = whole()
    undo = _fail_at(monkeypatch, RunFolder, "append_metrics", 3, SingerError("disk full"))
    with pytest.raises(SingerError, match="disk full"):
        training.train(config, QUIET)
    assert _saved(config) == [2, 4]
    undo()
    training.train(config, QUIET, resume=True)
    _assert_same(config.output, expected)


@pytest.mark.parametrize("place", ["__init__", "add_scalar"])
def test_tensorboard_on_a_full_disk_is_one_line(make_config, monkeypatch, place):
    config = make_config()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, place, full)
    with pytest.raises(SingerError, match=r"tensorboard can't be written: No space left"):
        training.train(config, QUIET)
    # What was begun and did nothing leaves no folder.
    assert Path(config.output).exists() == (place == "add_scalar")


def test_a_run_that_cannot_be_reopened_keeps_its_checkpoints(make_config, monkeypatch):
    config = make_config()
    training.train(config, QUIET)
    saved = _saved(config)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "__init__", full)
    with pytest.raises(SingerError, match="No space left"):
        training.train(config, QUIET, resume=True)
    assert _saved(config) == saved


def test_a_kill_before_the_configuration_is_written_can_be_resumed(make_config):
    config = make_config()
    Path(config.output).mkdir()
    Path(config.output, ".config.yaml.partial").write_text("teach")
    assert training.distill(config, QUIET, resume=True).steps == 6


@pytest.mark.parametrize("damage", ["NULs", "missing"])
def test_damaged_records_do_not_stop_a_run(whole, monkeypatch, caplog, damage):
    config, _ = whole()
    _interrupted(monkeypatch, config, 5)
    path = Path(config.output, "metrics.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(lines[0] + bytes(len(lines[1])) + b"".join(lines[2:]))
    training.train(config, QUIET, resume=True)
    lost = [1, 2, 3, 4] if damage == "missing" else [2, 3, 4]
    assert _steps(config) == [step for step in range(1, 10) if step not in lost]
    if damage == "NULs":
        assert "records of some steps up to 4 are lost" in caplog.text
    path.unlink()
    assert training.distill(config, QUIET, resume=True).losses == {}


def test_tensorboard_is_told_what_is_done_again(whole, monkeypatch):
    config, _ = whole()
    told = []
    original = SummaryWriter.__init__

    def init(self, *arguments, purge_step=None, **options):
        told.append(purge_step)
        original(self, *arguments, purge_step=purge_step, **options)

    monkeypatch.setattr(SummaryWriter, "__init__", init)
    for step in (2, 5):
        _interrupted(monkeypatch, config, step)
    training.train(config, QUIET, resume=True)
    assert told == [1, 1, 5]


def test_what_is_known_of_unreadable_images_is_kept(
    whole, values, image_folder, monkeypatch, caplog
):
    (image_folder / "class0" / "4.png").write_bytes(b"broken")
    values["data"]["max_unreadable"] = 0.1
    config, expected = whole()
    caplog.clear()
    _interrupted(monkeypatch, config, 8)
    training.train(config, QUIET, resume=True)
    assert caplog.text.count("4.png can't be read; another image takes its place") == 1
    _assert_same(config.output, expected)


def test_a_loss_gone_bad_names_the_checkpoint_that_was_resumed(whole, monkeypatch):
    config, _ = whole()
    _interrupted(monkeypatch, config, 3)
    original = SiNGER.losses
    monkeypatch.setattr(
        SiNGER,
        "losses",
        lambda *given: {name: loss * math.nan for name, loss in original(*given).items()},
    )
    with pytest.raises(
        SingerError, match=r"step 3: info is nan; .*student\.safetensors, of step 2"
    ):
        training.train(config, QUIET, resume=True)


def test_fewer_steps_than_are_done_are_refused(make_config):
    training.train(make_config(), QUIET)
    shorter = make_config(train={"steps": 5})
    before = Path(shorter.output, "config.yaml").read_text()
    with pytest.raises(SingerError, match=r"train\.steps: got 5 in all, .*has done 6"):
        training.train(shorter, QUIET, resume=True, force=True)
    assert Path(shorter.output, "config.yaml").read_text() == before


def test_a_changed_student_of_several_is_named(values):
    student = values.pop("student")
    values["students"] = [student, {**student, "folder": "b"}]
    before = parse_config(values)
    values["students"][1] = {
        **student,
        "folder": "b",
        "options": {**student["options"], "depth": 3},
    }
    assert differences(before, parse_config(values)) == ["students.1.options.depth: 2 → 3"]


def test_options_may_stand_between_overrides(values, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    command = ["distill", "--config", str(path)]
    assert main([*command, "train.lr=1e-4", "--resume", "train.steps=2"]) == 0
    assert len(_steps(parse_config(values))) == 2
    with pytest.raises(SystemExit):
        main([*command, "train.lr=1e-4", "--resumee"])
    assert "unrecognized arguments: --resumee" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over(whole, monkeypatch, caplog):
    config, expected = whole()
    _interrupted(monkeypatch, config, 8)
    newest = max(Path(config.output, "checkpoints").iterdir())
    assert newest.name == "step-000000006"
    _flip_last_byte(newest / "student.optimizer.safetensors")
    training.train(config, QUIET, resume=True)
    assert f"{newest / 'student.optimizer.safetensors'} is truncated or altered" in caplog.text
    _assert_same(config.output, expected)


def test_a_finished_run_stays_as_it_is(whole):
    config, expected = whole()
    training.train(config, QUIET)
    assert training.distill(config, QUIET, resume=True).losses["loss"] > 0
    _assert_same(config.output, expected)


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


def test_other_images_are_refused(make_config, image_folder):
    config = make_config(train={"steps": 4})
    training.train(config, QUIET)
    (image_folder / "class0" / "0.png").rename(image_folder / "class1" / "zero.png")
    with pytest.raises(SingerError, match=r"another configuration \(images: "):
        training.train(config, QUIET, resume=True)


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
    with pytest.raises(SingerError, match=r"is no run's folder: it has no config\.yaml"):
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
    _assert_same(config.output, expected)


def test_force_goes_with_resume(tmp_path, capsys):
    assert main(["distill", "--config", str(tmp_path / "absent.yaml"), "--force"]) == 2
    assert "--force: goes with --resume" in capsys.readouterr().err
