"""What is left of a run that ends early: by an error, by Ctrl-C, on a full disk."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from interrupted_runs import QUIET, assert_same, fail_at, interrupted, saved_steps, steps
from torch.utils.tensorboard import SummaryWriter

from singer.cli import main
from singer.config.changes import differences
from singer.config.loading import to_yaml
from singer.config.schema import parse_config
from singer.data.loader import CropDataset
from singer.engine import run as training
from singer.engine.run_dir import RunDir
from singer.engine.student import StudentTrainer
from singer.engine.trainer import Trainer
from singer.errors import SingerError
from singer.methods import SiNGER


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (5, KeyboardInterrupt()),
        pytest.param(6, KeyboardInterrupt(), marks=pytest.mark.slow),
        (6, SingerError("bad")),
    ],
)
def test_what_ends_in_the_middle_of_a_step_keeps_the_steps_before(whole, monkeypatch, call, error):
    config, expected = whole()
    undo = fail_at(monkeypatch, SiNGER, "losses", call, error)  # step 3, its first or second part
    with pytest.raises(type(error)) as caught:
        training.train(config, QUIET)
    assert caught.value is error
    assert steps(config) == [1, 2]
    assert saved_steps(config) == [2]
    undo()
    training.train(config, QUIET, resume=True)
    assert_same(config.output, expected)


@pytest.mark.parametrize("batch", [7, 8])
def test_images_that_fail_keep_what_can_be_gone_on_from(whole, monkeypatch, batch):
    config, expected = whole()
    # Of step 4: its first part or its second. Two calls calibrate.
    undo = fail_at(monkeypatch, CropDataset, "batch", batch + 1, SingerError("no image"))
    with pytest.raises(SingerError, match="no image"):
        training.train(config, QUIET)
    assert steps(config) == [1, 2, 3]
    assert saved_steps(config) == [2, 3]
    undo()
    training.train(config, QUIET, resume=True)
    assert_same(config.output, expected)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [(SiNGER, "losses", 15), (CropDataset, "batch", 15), (StudentTrainer, "log", 2)],
)
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA error"), OSError(5, "EIO")])
def test_any_error_saves_the_completed_steps(
    whole, values, monkeypatch, capsys, owner, name, call, error
):
    config, expected = whole(train={**values["train"], "save_every": 100, "log_every": 7})
    path = Path(config.output).with_suffix(".yaml")
    path.write_text(to_yaml(config))
    undo = fail_at(monkeypatch, owner, name, call, error)
    assert main(["distill", "--config", str(path)]) == 2
    undo()
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("singer: error: step ")
    assert type(error).__name__ in line
    assert f"the run is saved after step {saved_steps(config)[-1]}" in line
    assert saved_steps(config)[-1] >= 6
    assert "Traceback" in Path(config.output, "traceback-0.txt").read_text()
    training.train(config, QUIET, resume=True)
    assert_same(config.output, expected)


def test_buffers_that_moved_in_half_a_step_are_not_saved(whole, monkeypatch):
    config, expected = whole()
    original = SiNGER.losses

    def losses(self, *given):
        self.get_buffer("count").add_(1)
        return original(self, *given)

    built = training.build_methods

    def build(*given):
        methods = built(*given)
        methods[0].register_buffer("count", torch.zeros(()))
        return methods

    monkeypatch.setattr(training, "build_methods", build)
    monkeypatch.setattr(SiNGER, "losses", losses)
    undo = fail_at(monkeypatch, CropDataset, "batch", 9, MemoryError())  # step 4, second part
    with pytest.raises(SingerError, match="MemoryError; the run is saved after step 2"):
        training.train(config, QUIET)
    undo()
    training.train(config, QUIET, resume=True)
    assert_same(config.output, expected)


def test_an_error_that_is_not_expected_is_one_line_and_a_traceback_if_asked_for(
    values, tmp_path, capsys, monkeypatch
):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(parse_config(values)))

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(training, "build_methods", fail)
    assert main(["distill", "--config", str(path)]) == 2
    expected = "singer: error: MemoryError (SINGER_DEBUG=1 shows the traceback)\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setenv("SINGER_DEBUG", "1")
    assert main(["distill", "--config", str(path)]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_unreadable_image_does_not_make_half_a_step_a_checkpoint(whole, monkeypatch):
    config, expected = whole()
    original = Trainer._step

    def step(self, number, batches):
        if number == 3:
            self._new_unreadable.append("gone.png")
        original(self, number, batches)

    monkeypatch.setattr(Trainer, "_step", step)
    undo = fail_at(monkeypatch, StudentTrainer, "step", 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        training.train(config, QUIET)
    assert saved_steps(config) == [2]
    undo()
    monkeypatch.setattr(Trainer, "_step", original)
    training.train(config, QUIET, resume=True)
    assert_same(config.output, expected)


def test_a_first_step_that_fails_leaves_no_folder_nor_a_checkpoint(make_config, monkeypatch):
    config = make_config()
    undo = fail_at(monkeypatch, SiNGER, "losses", 1, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(SingerError, match=r"raise train\.grad_accum_steps \(CUDA out of memory\)"):
        training.train(config, QUIET, resume=True)
    assert not Path(config.output).exists()
    undo()
    training.train(config, QUIET)
    undo = fail_at(monkeypatch, SiNGER, "losses", 1, SingerError("bad"))
    shutil.rmtree(Path(config.output, "checkpoints"))
    with pytest.raises(SingerError, match="bad"):  # it begins anew, but the folder was there
        training.train(config, QUIET, resume=True)
    assert saved_steps(config) == []
    assert Path(config.output, "student.safetensors").exists()


def test_where_it_goes_on_is_said(make_config, caplog):
    caplog.set_level("INFO")
    config = make_config()
    training.train(config, QUIET)
    training.train(config, QUIET, resume=True)
    assert "going on after step 6" in caplog.text
    shutil.rmtree(Path(config.output, "checkpoints"))
    training.train(config, QUIET, resume=True)
    assert "holds no checkpoint: the run begins anew" in caplog.text


def test_a_damaged_configuration_in_the_folder_is_named(make_config):
    config = make_config()
    training.train(config, QUIET)
    written = Path(config.output, "config.yaml")
    written.write_text("train: {}")
    with pytest.raises(SingerError, match=r"output: .*config\.yaml is damaged \(.*missing"):
        training.train(config, QUIET, resume=True)


def test_records_that_could_not_be_written_are_not_missing_in_the_end(whole, monkeypatch):
    config, expected = whole()
    undo = fail_at(monkeypatch, RunDir, "append_metrics", 3, SingerError("disk full"))
    with pytest.raises(SingerError, match="disk full"):
        training.train(config, QUIET)
    assert saved_steps(config) == [2, 4, 6]  # those of 5 and 6 could be written a moment later
    undo()
    training.train(config, QUIET, resume=True)
    assert_same(config.output, expected)


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
    saved = saved_steps(config)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "__init__", full)
    with pytest.raises(SingerError, match="No space left"):
        training.train(config, QUIET, resume=True)
    assert saved_steps(config) == saved


def test_a_kill_before_the_configuration_is_written_can_be_resumed(make_config):
    config = make_config()
    Path(config.output).mkdir()
    Path(config.output, ".config.yaml.partial").write_text("teach")
    assert training.distill(config, QUIET, resume=True).steps == 6


@pytest.mark.parametrize("damage", ["NULs", "missing"])
def test_damaged_records_do_not_stop_a_run(whole, monkeypatch, caplog, damage):
    config, _ = whole()
    interrupted(monkeypatch, config, 5)
    path = Path(config.output, "metrics.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(lines[0] + bytes(len(lines[1])) + b"".join(lines[2:]))
    training.train(config, QUIET, resume=True)
    lost = [1, 2, 3, 4] if damage == "missing" else [2, 3, 4]
    assert steps(config) == [step for step in range(1, 10) if step not in lost]
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
        interrupted(monkeypatch, config, step)
    training.train(config, QUIET, resume=True)
    assert told == [1, 1, 5]


def test_what_is_known_of_unreadable_images_is_kept(
    whole, values, image_folder, monkeypatch, caplog
):
    (image_folder / "class0" / "4.png").write_bytes(b"broken")
    values["data"]["max_unreadable"] = 0.1
    config, expected = whole()
    caplog.clear()
    interrupted(monkeypatch, config, 8)
    training.train(config, QUIET, resume=True)
    assert caplog.text.count("4.png can't be read; another image takes its place") == 1
    assert_same(config.output, expected)


def test_a_loss_gone_bad_names_the_checkpoint_that_was_resumed(whole, monkeypatch):
    config, _ = whole()
    interrupted(monkeypatch, config, 3)
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
    path.write_text(yaml.safe_dump(values))
    command = ["distill", "--config", str(path)]
    assert main([*command, "train.lr=1e-4", "--resume", "train.steps=2"]) == 0
    assert len(steps(parse_config(values))) == 2
    with pytest.raises(SystemExit):
        main([*command, "train.lr=1e-4", "--resumee"])
    assert "unrecognized arguments: --resumee" in capsys.readouterr().err
