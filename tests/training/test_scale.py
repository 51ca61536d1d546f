"""What makes big runs affordable, and that it changes no result."""

import copy
import functools
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from singer.config.schema import parse_config
from singer.data.loader import CropDataset, create_loader
from singer.engine import run as training
from singer.engine.student import StudentTrainer
from singer.engine.trainer import Trainer
from singer.errors import SingerError, StoppedError

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


def _metrics(folder):
    with open(Path(folder, "metrics.jsonl"), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _student(folder, name="student"):
    return load_file(Path(folder, f"{name}.safetensors"))


def _equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def count_blocks(monkeypatch):
    """Count how often each of the teacher's blocks runs within a training step."""
    counts = {}
    original_build, original_step = training.build_methods, Trainer._step
    is_step = []

    def build(*arguments):
        methods = original_build(*arguments)
        for index, block in enumerate(methods[0].teacher.model.blocks):
            counts[index] = 0

            def hook(*_, index=index):
                counts[index] += len(is_step)

            block.register_forward_hook(hook)
        return methods

    def step(self, *arguments):
        is_step.append(True)
        original_step(self, *arguments)
        is_step.pop()

    monkeypatch.setattr(training, "build_methods", build)
    monkeypatch.setattr(Trainer, "_step", step)
    return counts


def test_several_students_share_one_pass_of_the_teacher(values, tmp_path, count_blocks):
    values["method"]["layers"] = [0, 2]  # block 1 also takes the refined tokens of block 0
    alone = parse_config({**values, "output": str(tmp_path / "alone")})
    training.train(alone, QUIET)
    assert count_blocks == {0: 6, 1: 12, 2: 6, 3: 0}  # 6 steps; nothing needs the last block
    small = copy.deepcopy(values.pop("student"))
    big = copy.deepcopy(small)
    big["options"]["embed_dim"] = 32
    values["students"] = [{**big, "folder": "big"}, {**small, "folder": "small"}]
    results = training.train(parse_config(values), QUIET)
    assert count_blocks == {0: 6, 1: 18, 2: 6, 3: 0}
    output = Path(values["output"])
    assert [result.folder for result in results] == [output / "big", output / "small"]
    # Sharing changes nothing: the small one is what it would have become alone.
    for name in ("student", "projections", "adapters"):
        assert _equal(_student(output / "small", name), _student(tmp_path / "alone", name))
    assert _metrics(output / "small") == _metrics(tmp_path / "alone")
    assert _student(output / "big")["cls_token"].shape[-1] == 32
    assert not (output / "student.safetensors").exists()


def test_parts_of_a_batch_add_up_to_it(make_config, tmp_path):
    runs = []
    for parts in (1, 4):
        changes = {"grad_accum_steps": parts, "lr": 1e-4}
        config = make_config(train=changes, output=str(tmp_path / str(parts)))
        training.train(config, QUIET)
        runs.append(_metrics(config.output))
    for expected, found in zip(*runs, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)  # float32 sums in another order


def _record_norms(monkeypatch):
    norms = []
    original = torch.optim.AdamW.step

    def step(self, *arguments, **options):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return original(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return norms


def test_gradients_are_clipped_as_a_whole(make_config, tmp_path, monkeypatch):
    norms = _record_norms(monkeypatch)
    training.train(make_config(train={"steps": 1}), QUIET)
    limit = norms[0] / 3
    clipped = make_config(
        train={"steps": 1, "max_grad_norm": limit}, output=str(tmp_path / "clipped")
    )
    training.train(clipped, QUIET)
    loose = make_config(train={"steps": 1, "max_grad_norm": 1e6}, output=str(tmp_path / "loose"))
    training.train(loose, QUIET)
    # clip_grad_norm_ divides by the norm plus 1e-6.
    assert norms[1:] == pytest.approx([limit, norms[0]], rel=1e-5)


def test_the_moving_average_is_that_of_the_weights_after_each_step(make_config, monkeypatch):
    seen = []
    original = StudentTrainer.step

    def step(self, *arguments):
        original(self, *arguments)
        seen.append(
            {name: value.clone() for name, value in self.method.student.state_dict().items()}
        )

    monkeypatch.setattr(StudentTrainer, "step", step)
    config = make_config(train={"ema": 0.75, "lr": 1e-2})
    training.train(config, QUIET)
    average = seen[0]
    for number, weights in enumerate(seen[1:], start=2):
        # The decay rises with the number of steps, 1 - (1 + t) ** (-2 / 3), up to the given one.
        decay = min(0.75, 1 - number ** (-2 / 3))
        average = {name: decay * average[name] + (1 - decay) * weights[name] for name in weights}
    found = _student(config.output, "student_ema")
    assert found.keys() == average.keys()
    for name, value in average.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    assert not _equal(found, _student(config.output))


def test_decay_reaches_everything_only_if_asked(make_config):
    for decay_norm_and_bias in (False, True):
        config = make_config(
            train={"decay_norm_and_bias": decay_norm_and_bias, "weight_decay": 0.1}
        )
        (method,) = training.build_methods(config, create_loader(config), CPU)
        accelerator = training.create_accelerator("fp32")
        student = StudentTrainer(config.student_specs()[0], method, config, accelerator, 6)
        decays = {
            id(parameter): group["weight_decay"]
            for group in student._optimizer.param_groups
            for parameter in group["params"]
        }
        own = dict(method.named_parameters())
        assert decays[id(own["student.blocks.0.attn.qkv.weight"])] == 0.1
        for name in ("student.blocks.0.norm1.weight", "student.cls_token", "student.pos_embed"):
            assert decays[id(own[name])] == (0.1 if decay_norm_and_bias else 0.0), name


@pytest.mark.parametrize(
    ("precision", "teacher", "expected"),
    [
        ("fp32", "auto", torch.float32),
        ("bf16", "auto", torch.bfloat16),
        ("bf16", "fp32", torch.float32),
        ("fp32", "bf16", torch.bfloat16),
    ],
)
def test_the_teacher_has_the_precision_asked_for(make_config, precision, teacher, expected):
    changes = {"teacher": {"precision": teacher}, "train": {"precision": precision}}
    method = training.distill(make_config(**changes), QUIET).method
    assert {p.dtype for p in method.teacher.model.parameters()} == {expected}
    assert {p.dtype for p in method.parameters()} == {torch.float32}
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    tokens = method.teacher_tokens(images)
    assert {value.dtype for value in tokens.tokens.values()} == {expected}


def test_bases_come_from_the_weights_before_they_are_rounded(make_config):
    methods = []
    for precision in ("fp32", "bf16"):
        config = make_config(teacher={"precision": precision})
        methods += training.build_methods(config, create_loader(config), CPU)
    assert all(
        torch.equal(methods[0].bases[k].vectors, methods[1].bases[k].vectors) for k in (2, 3)
    )


def test_a_bf16_teacher_gives_nearly_the_same_losses(make_config, tmp_path):
    runs = []
    for precision in ("fp32", "bf16"):
        config = make_config(
            teacher={"precision": precision},
            train={"steps": 3, "lr": 1e-4},
            output=str(tmp_path / precision),
        )
        training.train(config, QUIET)
        runs.append(_metrics(config.output))
    for expected, found in zip(*runs, strict=True):
        # bfloat16 rounds to 2 ** -9; four blocks and their sums make some hundredths of it.
        assert found["kd"] == pytest.approx(expected["kd"], rel=0.03)
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.03)


def test_attention_is_torchs_fused_one(make_config, monkeypatch):
    calls = []
    original = functional.scaled_dot_product_attention

    def count(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", count)
    training.train(make_config(train={"steps": 1}), QUIET)
    assert len(calls) >= 4 + 1 + 2  # the teacher's blocks, one of them twice, and the student's


def test_compiled_blocks_train_alike_and_are_compiled_once(make_config, tmp_path, monkeypatch):
    # Traced and differentiated as by default, but run op by op: code is not generated in tests.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", False)
    torch._dynamo.reset()
    runs = []
    for is_compiled in (False, True):
        changes = {"compile": is_compiled, "lr": 1e-4, "ema": 0.9}
        config = make_config(train=changes, output=str(tmp_path / str(is_compiled)))
        torch._dynamo.utils.counters.clear()
        training.train(config, QUIET)
        runs.append(_metrics(config.output))
    for expected, found in zip(*runs, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)  # the same operations, another order
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    # The teacher's block without gradient, one with it (the refined tokens), the student's block.
    assert frames == 3
    assert not torch._dynamo.utils.counters["graph_break"]
    assert _student(tmp_path / "True").keys() == _student(tmp_path / "False").keys()


class _Reads(TorchDispatchMode):
    """Counts what would wait for a GPU: values that Python reads from tensors."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_nothing_waits_for_the_device_between_logs(
    make_config, monkeypatch, variant, max_grad_norm
):
    reads = _Reads()
    for name in ("backward", "step"):
        original = getattr(StudentTrainer, name)

        def counted(self, *arguments, original=original):
            with reads:
                original(self, *arguments)

        monkeypatch.setattr(StudentTrainer, name, counted)
    monkeypatch.setattr(StudentTrainer, "log", lambda self: [])
    monkeypatch.setattr(Trainer, "_plot", lambda self: None)
    train = {"max_grad_norm": max_grad_norm, "steps": 2}
    config = make_config(method={"variant": variant}, train=train)
    monkeypatch.setattr(training, "_last_losses", lambda *_: {})
    training.train(config, QUIET)
    assert reads.found == []


@pytest.fixture
def cached(make_config, tmp_path):
    def make(name, **changes):
        data = {"crops": "center", **changes.pop("data", {})}
        teacher = {"cache": str(tmp_path / "cache"), **changes.pop("teacher", {})}
        return make_config(data=data, teacher=teacher, output=str(tmp_path / name), **changes)

    return make


def test_cached_tokens_take_the_teachers_place(cached, tmp_path, count_blocks):
    first = cached("first")
    training.train(first, QUIET)
    # The next block still takes the refined tokens, which change at every step.
    assert count_blocks == {0: 0, 1: 0, 2: 0, 3: 6}
    assert list((tmp_path / "cache").glob("*.safetensors"))
    second = cached("second")
    training.train(second, QUIET)
    assert _equal(_student(first.output), _student(second.output))
    computed = cached("computed", teacher={"cache": None})
    training.train(computed, QUIET)
    for expected, found in zip(_metrics(computed.output), _metrics(first.output), strict=True):
        assert found["kd"] == pytest.approx(expected["kd"], rel=0.01)  # bfloat16: 2 ** -9 a token
    assert [record["loss"] for record in _metrics(first.output)] != [
        record["loss"] for record in _metrics(computed.output)
    ]


@pytest.mark.parametrize(
    "data", [{"interpolation": "bilinear"}, {"normalization": "imagenet"}], ids=str
)
def test_a_cache_of_other_inputs_is_refused(cached, data):
    training.train(cached("first"), QUIET)
    with pytest.raises(SingerError, match=f"teacher.cache: .*{next(iter(data))}"):
        training.train(cached("other", data=data), QUIET)


def test_a_cache_of_other_images_or_another_teacher_is_refused(cached, tmp_path):
    training.train(cached("first"), QUIET)
    other = cached("other", train={"seed": 1})  # the random teacher has other weights
    with pytest.raises(SingerError, match=r"teacher\.cache: .*weights"):
        training.train(other, QUIET)
    assert not (tmp_path / "other").exists()


def test_a_cache_of_another_background_is_refused(cached):
    training.train(cached("first"), QUIET)
    other = cached("other", data={"background": [0, 0, 0]})
    with pytest.raises(SingerError, match=r"teacher\.cache: .*background"):
        training.train(other, QUIET)


def test_a_cache_of_images_decoded_otherwise_is_refused(cached, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(training, "DECODING", 1)
        training.train(cached("first"), QUIET)
    with pytest.raises(SingerError, match=r"teacher\.cache: .*decoding 1 \(this run: 2\)"):
        training.train(cached("second"), QUIET)


def test_a_cache_of_random_crops_is_refused(make_config, tmp_path):
    with pytest.raises(SingerError, match=r"teacher\.cache: .*data\.crops is 'random'"):
        make_config(teacher={"cache": str(tmp_path / "cache")})


def test_a_cache_needs_every_image(cached, image_folder):
    (image_folder / "class0" / "2.png").write_bytes(b"broken")
    with pytest.raises(SingerError, match=r"2\.png can't be read, and teacher\.cache needs every"):
        training.train(cached("run", data={"max_unreadable": 1.0}), QUIET)


def test_filling_a_cache_heeds_a_signal(cached, monkeypatch):
    calls = []
    original = CropDataset.batch

    def batch(self, sample_ids):
        calls.append(1)
        if len(calls) == 4:  # after the calibration, and the look at a first image
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, sample_ids)

    config = cached("run", train={"grad_accum_steps": 4})  # an image at a time
    monkeypatch.setattr(CropDataset, "batch", batch)
    with pytest.raises(StoppedError, match=r"by SIGTERM while teacher\.cache was filled"):
        training.train(config, QUIET)
    assert len(calls) == 4
    assert not Path(config.output).exists()
    assert training.distill(config, QUIET).steps == 6


def test_an_image_lost_after_its_tokens_were_kept_ends_the_run(cached, image_folder):
    training.train(cached("first"), QUIET)
    (image_folder / "class0" / "2.png").write_bytes(b"broken")
    lenient = cached("second", data={"max_unreadable": 1.0})
    with pytest.raises(SingerError, match=r"2\.png can't be read any more, but teacher\.cache"):
        training.train(lenient, QUIET)


def test_a_cache_serves_any_length_of_an_epoch(cached, tmp_path):
    training.train(cached("first", data={"epoch_size": 24}), QUIET)
    second = cached("second", data={"epoch_size": 30})
    training.train(second, QUIET)  # of the same images, in the same order
    computed = cached("computed", data={"epoch_size": 30}, teacher={"cache": None})
    training.train(computed, QUIET)
    for expected, found in zip(_metrics(computed.output), _metrics(second.output), strict=True):
        assert found["kd"] == pytest.approx(expected["kd"], rel=0.01)  # bfloat16: 2 ** -9 a token


def test_an_epoch_that_leaves_images_out_is_refused(make_config):
    with pytest.raises(SingerError, match=r"data\.epoch_size: got 8, expected at least 12"):
        training.check(make_config(data={"epoch_size": 8}))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"students": [], "student": None}, "got neither of student and students"),
        ({"students": [{"name": "vit_tiny_patch16_224"}]}, "got both of student and students"),
        (
            {"student": None, "students": [{"name": "a"}, {"name": "a"}]},
            r"students: got the folders \['a', 'a'\]",
        ),
        ({"student": None, "students": [{"name": "a", "folder": "../x"}]}, "without slashes"),
        ({"student": None, "students": [{"name": "a", "folder": "config.yaml"}]}, "not config"),
        ({"student": None, "students": [{"name": "a", "folder": ".b.partial"}]}, "a dot"),
        ({"student": None, "students": [{"name": "a", "wings": 2}]}, r"students\.0\.wings"),
    ],
)
def test_students_must_be_told_apart(values, changes, expected):
    with pytest.raises(SingerError, match=expected):
        parse_config({**values, **changes})


def test_a_student_of_several_that_does_not_fit_is_named(values):
    student = values.pop("student")
    values["students"] = [student, {**student, "name": "vit_tiny_patch16_225", "folder": "b"}]
    with pytest.raises(SingerError, match=r"students\.1\.name: timm knows no model"):
        training.train(parse_config(values), QUIET)


def test_float16_and_several_students_do_not_go_together(values):
    student = values.pop("student")
    values["students"] = [student]
    values["train"]["precision"] = "fp16"
    with pytest.raises(SingerError, match="'fp16' with several students"):
        training.check(parse_config(values))


def test_one_result_is_for_one_student(values):
    values["students"] = [values.pop("student")]
    with pytest.raises(SingerError, match="students: got several"):
        training.distill(parse_config(values), QUIET)
    assert math.isfinite(training.train(parse_config(values), QUIET)[0].losses["loss"])
