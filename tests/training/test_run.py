"""Whole runs, small: what they write, and that they do what they say."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

from singer.config.loading import load_config
from singer.config.schema import method_config, parse_config
from singer.data.loader import CropDataset, create_loader
from singer.engine import run as training
from singer.engine.checkpoints import CheckpointStore
from singer.engine.run_dir import RunDir
from singer.engine.student import StudentTrainer, create_schedule
from singer.engine.trainer import Trainer
from singer.errors import SingerError
from singer.methods import SiNGER
from singer.models import backbones
from singer.models.backbones import create_backbone, inspect_backbone

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


def _distill(config, **options):
    return training.distill(config, QUIET, **options)


def _build(config):
    (method,) = training.build_methods(config, create_loader(config), CPU)
    return method


def _metrics(config):
    with open(f"{config.output}/metrics.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _weights(config, name="student"):
    return load_file(f"{config.output}/{name}.safetensors")


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.draws
def test_the_output_directory_holds_all_files(make_config):
    config = make_config()
    result = _distill(config)
    written = {str(p.relative_to(result.folder)) for p in result.folder.rglob("*") if p.is_file()}
    events = {name for name in written if name.startswith("tensorboard/")}
    assert len(events) == 1
    checkpoints = {name for name in written if name.startswith("checkpoints/")}
    assert written - events - checkpoints == {
        "config.yaml",
        "metrics.jsonl",
        "student.safetensors",
        "projections.safetensors",
        "adapters.safetensors",
        "spectrum.json",
        "figures/losses.png",
    }
    assert load_config(result.folder / "config.yaml") == config
    metrics = _metrics(config)
    assert [record["step"] for record in metrics] == [1, 2, 3, 4, 5, 6]
    assert [record["epoch"] for record in metrics] == [0, 0, 0, 1, 1, 1]
    assert set(metrics[0]) == {"step", "epoch", "lr", "loss", "kd", "outlier", "info"}
    for record in metrics:
        terms = record["kd"] + 0.01 * record["outlier"] + record["info"]
        assert math.isclose(record["loss"], terms, rel_tol=1e-5)
    assert result.losses["kd"] == metrics[-1]["kd"]  # the last tenth of 6 steps is one step
    spectrum = json.loads((result.folder / "spectrum.json").read_text())
    assert set(spectrum) == {"2", "3"}
    assert len(spectrum["2"]["singular_values"]) == 32
    assert len(spectrum["2"]["selected"]) == 8
    assert spectrum["2"]["block"] == 3


def test_saved_student_gives_its_features_in_plain_timm(make_config):
    config = make_config()
    method = _distill(config).method
    model = timm.create_model(
        config.student.name, num_classes=0, img_size=32, **config.student.options
    )
    model.load_state_dict(load_file(f"{config.output}/student.safetensors"), strict=True)
    model.eval()
    method.eval()
    images = torch.rand(2, 3, 32, 32)
    data = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(data[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        tokens = method.student_tokens(images)[1]
        prefix, patches = tokens[:, :1], tokens[:, 1:]
        ((expected, expected_prefix),) = model.forward_intermediates(
            (images - mean) / std,
            indices=[1],
            norm=False,
            output_fmt="NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
        )
    torch.testing.assert_close(patches, expected, rtol=0, atol=0)
    torch.testing.assert_close(prefix, expected_prefix, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["singer", "fitnet"])
def test_one_seed_gives_one_result(make_config, tmp_path, method):
    runs = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)  # whatever ran before must not matter
        output = str(tmp_path / name)
        config = _with_method(make_config, method, train={"seed": seed}, output=output)
        _distill(config)
        runs.append(config)
    first, second, other = runs
    for name in ("student", "projections"):
        assert _equal(_weights(first, name), _weights(second, name))
        assert not _equal(_weights(first, name), _weights(other, name))
    assert _metrics(first) == _metrics(second)


def _with_method(make_config, name, **changes):
    config = make_config(**changes)
    if name == "fitnet":
        config = config.model_copy(update={"method": method_config("fitnet")()})
    return config


def test_methods_see_the_same_images_and_start_from_the_same_student(make_config, monkeypatch):
    seen = []
    for method in ("singer", "fitnet"):
        config = _with_method(make_config, method)
        built = _build(config)
        batches = [batch.images for batch in create_loader(config)]
        seen.append((built.student.state_dict(), built.projections.state_dict(), batches))
    (student_a, projections_a, batches_a), (student_b, projections_b, batches_b) = seen
    assert _equal(student_a, student_b)
    assert _equal(projections_a, projections_b)
    assert all(torch.equal(a, b) for a, b in zip(batches_a, batches_b, strict=True))


def test_teacher_stays_and_everything_trainable_moves(make_config):
    config = make_config()
    before = _build(config)
    after = _distill(config).method
    assert _equal(before.teacher.model.state_dict(), after.teacher.model.state_dict())
    assert all(p.grad is None and not p.requires_grad for p in after.teacher.model.parameters())
    start = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        assert torch.equal(start[name], parameter) == (not parameter.requires_grad), name
    frozen = {name for name, p in after.named_parameters() if not p.requires_grad}
    assert frozen == {"student.norm.weight", "student.norm.bias"}


def test_every_epoch_draws_every_image_in_a_new_order(make_config, monkeypatch):
    sample_ids = []
    original = CropDataset.batch

    def record(self, numbers):
        sample_ids.extend(numbers)
        return original(self, numbers)

    monkeypatch.setattr(CropDataset, "batch", record)
    config = make_config(train={"steps": 6})
    _distill(config)
    assert sorted(sample_ids[-24:-12]) == list(range(12))
    assert sorted(sample_ids[-12:]) == list(range(12, 24))
    assert [sample_id - 12 for sample_id in sample_ids[-12:]] != sample_ids[-24:-12]


def test_how_often_it_logs_or_saves_changes_no_weight(make_config, tmp_path):
    often = make_config(train={"log_every": 1, "save_every": 1}, output=str(tmp_path / "often"))
    seldom = make_config(train={"log_every": 100}, output=str(tmp_path / "seldom"))
    _distill(often)
    _distill(seldom)
    assert _equal(_weights(often), _weights(seldom))
    assert _metrics(often) == _metrics(seldom)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_backends_train_alike(make_config, tmp_path, variant):
    runs = []
    for name in ("reference", "torch"):
        changes = {"backend": name, "variant": variant}
        config = make_config(
            method=changes, train={"steps": 20, "lr": 1e-4}, output=str(tmp_path / name)
        )
        _distill(config)
        runs.append(_metrics(config))
    for expected, found in zip(*runs, strict=True):
        # Rounding of 1e-7 that twenty small steps can't have made a hundred times larger.
        assert found == pytest.approx(expected, rel=1e-5)


def test_losses_fall(make_config):
    config = make_config(train={"steps": 60, "lr": 3e-3})
    _distill(config)
    metrics = _metrics(config)
    assert metrics[-1]["kd"] < 0.5 * metrics[0]["kd"]


@pytest.mark.parametrize("changes", [{"variant": "official"}, {"layers": [-1]}, {"layers": [0]}])
def test_variants_run(make_config, changes):
    assert math.isfinite(_distill(make_config(method=changes)).losses["loss"])


def test_bf16_autocast_runs(make_config):
    result = _distill(make_config(train={"precision": "bf16"}))
    assert math.isfinite(result.losses["loss"])
    assert all(p.dtype == torch.float32 for p in result.method.parameters())


def test_jacobian_is_measured_on_the_runs_own_images(make_config):
    method = _distill(make_config(method={"linearization": "jacobian"})).method
    assert isinstance(method, SiNGER)
    assert {basis.linearization for basis in method.bases.values()} == {"jacobian"}


def test_learning_rate_rises_then_falls_along_a_cosine(make_config):
    config = make_config(train={"warmup": 0.25, "min_lr": 0.1, "lr": 1.0})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.train.lr)
    schedule = create_schedule(optimizer, config.train, 20)
    rates = []
    for step in range(20):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    warmup = [(step + 1) / 6 for step in range(5)]
    decay = [0.1 + 0.45 * (1 + math.cos(math.pi * step / 15)) for step in range(15)]
    assert rates == pytest.approx(warmup + decay, rel=1e-9)


def _poison(monkeypatch, bad_step, term):
    """Make one term of the losses NaN from a step on."""
    original = SiNGER.losses
    calls = []

    def losses(self, student, teacher):
        calls.append(1)
        terms = original(self, student, teacher)
        if len(calls) >= bad_step:
            terms[term] = terms[term] * math.nan
            terms["loss"] = terms["loss"] * math.nan
        return terms

    monkeypatch.setattr(SiNGER, "losses", losses)


def test_non_finite_loss_names_step_loss_and_last_good_checkpoint(make_config, monkeypatch):
    _poison(monkeypatch, bad_step=4, term="outlier")
    config = make_config(train={"save_every": 3, "log_every": 100})
    with pytest.raises(SingerError) as caught:
        _distill(config)
    message = str(caught.value)
    for text in ("step 4: outlier is nan", "student.safetensors, of step 3", "train.lr"):
        assert text in message
    assert all(tensor.isfinite().all() for tensor in _weights(config).values())
    assert [record["step"] for record in _metrics(config)] == [1, 2, 3]


def test_non_finite_loss_without_a_checkpoint_says_so(make_config, monkeypatch):
    _poison(monkeypatch, bad_step=1, term="kd")
    config = make_config()
    with pytest.raises(SingerError, match=r"step 1: kd is nan; no checkpoint had been saved"):
        _distill(config)
    assert not (training.Path(config.output) / "student.safetensors").exists()


def _weight(student):
    return student.method.student.cls_token


def _moving_average(student):
    return student.ema.module.cls_token


def _second_moment(student):
    return student._optimizer.state[_weight(student)]["exp_avg_sq"]


@pytest.mark.parametrize(
    ("find", "name"),
    [
        (_weight, r"student\.cls_token \(weights\)"),
        (_moving_average, r"cls_token \(ema\)"),
        (_second_moment, r"student\.cls_token/exp_avg_sq \(optimizer\)"),
    ],
)
def test_what_is_not_finite_is_never_saved(make_config, monkeypatch, find, name):
    original = StudentTrainer.log

    def log_and_break(self):
        records = original(self)
        if records and records[-1]["step"] == 6:
            with torch.no_grad():
                find(self).fill_(math.inf)
        return records

    monkeypatch.setattr(StudentTrainer, "log", log_and_break)
    config = make_config(train={"save_every": 4, "log_every": 100, "ema": 0.9})
    with pytest.raises(SingerError, match=rf"step 6: {name} is not finite.*step 4"):
        _distill(config)
    assert all(tensor.isfinite().all() for tensor in _weights(config).values())
    assert CheckpointStore(training.Path(config.output, "checkpoints")).steps() == [4]


def test_a_checkpoint_that_is_not_finite_is_refused(make_config, monkeypatch):
    config = make_config()
    _distill(config)
    original = CheckpointStore.read

    def read(self, step):
        checkpoint = original(self, step)
        checkpoint.tensors["student.optimizer"]["student.cls_token/exp_avg"].fill_(math.nan)
        return checkpoint

    monkeypatch.setattr(CheckpointStore, "read", read)
    with pytest.raises(
        SingerError, match=r"^checkpoint: student\.cls_token/exp_avg \(optimizer\) is not .*step 6"
    ):
        training.distill(config, QUIET, resume=True)


@pytest.mark.parametrize("key", ["teacher", "student"])
@pytest.mark.parametrize("linearization", ["jacobian", "random"])
def test_huge_weights_are_named(values, make_config, tmp_path, key, linearization):
    model = create_backbone(values[key]["name"], 32, key, options=values[key]["options"]).model
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[0].fill_(1e30)
    torch.save(model.state_dict(), tmp_path / "huge.pth")
    config = make_config(
        **{key: {"weights": str(tmp_path / "huge.pth")}}, method={"linearization": linearization}
    )
    expected = r"block 1 .*largest weight is blocks\.1\.attn\.proj\.weight, 1e\+30"
    with pytest.raises(SingerError, match=rf"^{key}\.weights: .* {expected}"):
        _distill(config)


def test_each_models_structure_is_built_once(make_config, monkeypatch):
    calls = []

    def count(name, size, key, options=None):
        calls.append(key)
        return inspect_backbone(name, size, key, options)

    monkeypatch.setattr(training, "inspect_backbone", count)
    monkeypatch.setattr(backbones, "inspect_backbone", count)
    _distill(make_config(train={"steps": 1}))
    assert calls == ["teacher", "student"]


def test_save_every_alone_decides_when_a_checkpoint_is_written(make_config):
    config = make_config(train={"steps": 10, "save_every": 4, "keep_checkpoints": 9})
    assert len(create_loader(config)) == 3  # steps of an epoch
    _distill(config)
    assert CheckpointStore(training.Path(config.output, "checkpoints")).steps() == [4, 8, 10]


def test_a_file_gets_a_line_at_each_log(make_config, monkeypatch, tmp_path):
    path, seen = tmp_path / "out.txt", []
    original = Trainer._step

    def step(self, number, batches):
        seen.append(path.read_text())  # what has been flushed so far
        original(self, number, batches)

    monkeypatch.setattr(Trainer, "_step", step)
    with open(path, "w", encoding="utf-8") as file:
        training.train(make_config(train={"steps": 5, "save_every": 3}), Console(file=file))
    assert [text.count("\n") for text in seen] == [0, 0, 1, 1, 2]
    lines = path.read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["2/5", "4/5", "5/5"]
    for line in lines:
        assert re.fullmatch(r"step \S+  loss \S+ kd \S+ outlier \S+ info \S+  \S+ img/s", line)


def test_existing_output_is_refused_before_anything_is_loaded(make_config, monkeypatch):
    config = make_config()
    RunDir(config.output).write_text("kept", "x")
    monkeypatch.setattr(training, "create_backbone", None)  # calling it would fail
    with pytest.raises(SingerError, match=r"output: .* exists already"):
        _distill(config)
    assert [path.name for path in training.Path(config.output).iterdir()] == ["kept"]


def _break_image(config, position):
    """Break the image that is drawn at a position of the first epoch; return its name."""
    dataset = create_loader(config).dataset
    order = create_loader(config).batch_sampler.order(0).tolist()
    index = dataset.source_index(order[position])
    name = dataset.source.name(index)
    training.Path(name).write_bytes(b"broken")
    return name


def test_an_unreadable_image_is_named_and_replaced(make_config, caplog):
    config = make_config(data={"max_unreadable": 0.1})
    name = _break_image(config, 5)
    assert math.isfinite(_distill(config).losses["loss"])
    assert [record["step"] for record in _metrics(config)] == [1, 2, 3, 4, 5, 6]
    assert caplog.text.count(f"{name} can't be read; another image takes its place") == 1


def test_too_many_unreadable_images_stop_the_run_and_what_it_did_is_kept(make_config):
    config = make_config(train={"log_every": 2, "batch_size": 2, "save_every": 100})
    name = _break_image(config, 6)  # seen in step 4; the losses are read after steps 2, 4, 6
    with pytest.raises(SingerError, match=r"1 of 12 images can't be read") as caught:
        _distill(config)
    assert name in str(caught.value)
    assert [record["step"] for record in _metrics(config)] == [1, 2, 3, 4]
    with safe_open(f"{config.output}/student.safetensors", "pt") as file:
        assert file.metadata()["step"] == "4"


def test_a_run_without_a_completed_step_leaves_no_directory(make_config, monkeypatch):
    def fail(self, student, teacher):
        raise SingerError("nothing came of it")

    monkeypatch.setattr(SiNGER, "losses", fail)
    config = make_config()
    with pytest.raises(SingerError, match="nothing came of it"):
        _distill(config)
    assert not training.Path(config.output).exists()


def test_ctrl_c_keeps_the_losses_and_the_last_checkpoint(make_config, monkeypatch):
    original, calls = SiNGER.losses, []

    def interrupt(self, student, teacher):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, student, teacher)

    monkeypatch.setattr(SiNGER, "losses", interrupt)
    config = make_config(train={"save_every": 2, "log_every": 100})
    with pytest.raises(KeyboardInterrupt):
        _distill(config)
    assert [record["step"] for record in _metrics(config)] == [1, 2, 3]
    with safe_open(f"{config.output}/student.safetensors", "pt") as file:
        assert file.metadata()["step"] == "3"  # after the checkpoint of step 2


def test_names_that_are_no_utf8_are_no_obstacle(make_config, image_folder):
    os.rename(image_folder / "class0" / "0.png", os.fsencode(image_folder) + b"/\xe9t\xe9.png")
    assert math.isfinite(_distill(make_config()).losses["loss"])


def test_a_parameter_without_a_gradient_is_named(make_config, monkeypatch):
    original = SiNGER.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options)
        self.spare = torch.nn.Linear(2, 2)

    monkeypatch.setattr(SiNGER, "__init__", init)
    config = make_config()
    with pytest.raises(SingerError, match=r"'singer' trains spare\.weight, spare\.bias, which"):
        _distill(config)
    assert not training.Path(config.output).exists()


def test_a_methods_own_check_comes_before_any_weight(values, monkeypatch):
    monkeypatch.setattr(training, "create_backbone", None)  # calling it would fail
    values["method"] = {"name": "vitkd", "mask_ratio": 0.01}
    with pytest.raises(SingerError, match="which masks 0 of an image's 16 patches"):
        _distill(parse_config(values))


def test_float16_needs_a_gpu(make_config):
    with pytest.raises(SingerError, match=r"train\.precision: got 'fp16', which needs a GPU"):
        _distill(make_config(train={"precision": "fp16"}))


def test_what_is_random_differs_from_layer_to_layer(make_config):
    config = make_config(method={"linearization": "random"})
    method = _build(config)
    first, second = method.adapters.values()
    assert not torch.equal(first.down, second.down)


def test_a_second_precision_in_one_process_is_refused(make_config, tmp_path):
    _distill(make_config())
    with pytest.raises(SingerError, match=r"train\.precision: got 'bf16'.*start a new one"):
        _distill(make_config(train={"precision": "bf16"}, output=str(tmp_path / "second")))
    assert not (tmp_path / "second").exists()


def test_checkpoint_says_how_to_rebuild_the_model(make_config):
    config = make_config()
    _distill(config)
    with safe_open(f"{config.output}/student.safetensors", "pt") as file:
        metadata = file.metadata()
    model = timm.create_model(metadata["model"], **json.loads(metadata["options"]))
    model.load_state_dict(_weights(config), strict=True)
    assert metadata["step"] == "6"
    assert json.loads(metadata["normalization"]) == {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize("method", ["singer", "vitkd"])
def test_the_documented_projection_gives_the_projected_features(make_config, values, method):
    values["method"] = {"name": method}
    config = make_config(method={"rank": 8} if method == "singer" else {"layers": [3]})
    trained = _distill(config).method.eval()
    document = Path(__file__).parents[2] / "docs/training.md"
    snippet = document.read_text().partition("```python\n")[2].partition("```")[0]
    snippet = snippet.replace("runs/a", config.output)
    if method == "vitkd":
        snippet = snippet.replace("output_fmt=", "norm=True, output_fmt=")
    options = config.student.options
    model = timm.create_model(config.student.name, num_classes=0, img_size=32, **options)
    model.load_state_dict(_weights(config))
    images = torch.rand(2, 3, 32, 32)
    names = {"model": model.eval(), "images": (images - 0.5) / 0.5}
    with torch.no_grad():
        exec(snippet, names)
        expected = trained.projected_student(3, trained.student_tokens(images))
    assert names["features"].shape == (2, 16, 32)
    torch.testing.assert_close(names["features"], expected[:, 1:])


def test_inputs_are_normalised_as_configured(make_config):
    images = torch.rand(2, 3, 32, 32)
    for normalization, mean, std in (
        ("model", [0.5] * 3, [0.5] * 3),
        ("imagenet", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ):
        method = _build(make_config(data={"normalization": normalization}))
        mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        for backbone in (method.teacher, method.student_backbone):
            torch.testing.assert_close(backbone.normalize(images), (images - mean) / std)
