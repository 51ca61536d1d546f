"""Every example runs: its loss falls, its adapters train, and its teacher stays as it was."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import distributed

import singer_kernels

EXAMPLES = Path(__file__).parents[2] / "examples"
GRID = 2
MODELS = {
    "student": {"embed_dim": 24, "depth": 2},
    "teacher": {"embed_dim": 32, "depth": 4},
    "teacher_reg": {"embed_dim": 32, "depth": 4, "reg_tokens": 3},
    "teacher_gap": {"embed_dim": 32, "depth": 5, "class_token": False, "global_pool": "avg"},
    "teacher_reg_gap": {
        "embed_dim": 32,
        "depth": 4,
        "class_token": False,
        "reg_tokens": 1,
        "global_pool": "avg",
    },
}
SHARED_PREFIX = {"teacher": 1, "teacher_reg": 1, "teacher_gap": 0, "teacher_reg_gap": 0}
OPTIONS = ["--image-size", str(16 * GRID), "--student", "student", "--rank", "4", "--steps", "12"]

torch.set_num_threads(1)

make_model = partial(timm.create_model, "vit_tiny_patch16_224", num_heads=2)


def load(name):
    if name == "timm_task":
        pytest.importorskip("timm", minversion="1.0.31", reason="timm.task was another before")
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Watch:
    """Makes the tiny models, and remembers them with the weights they had at first."""

    def __init__(self):
        self.models, self.first, self.adapters = {}, {}, []

    def create_model(self, name, pretrained=False, **options):
        assert not pretrained
        return self.keep(name, make_model(**MODELS[name], **options))

    def keep(self, name, model):
        self.models[name] = model
        self.first[name] = {key: value.clone() for key, value in model.state_dict().items()}
        return model

    def has_changed(self, name):
        now = self.models[name].state_dict()
        return any(not torch.equal(now[key], value) for key, value in self.first[name].items())

    def check(self, history, teacher, num_prefix_tokens):
        assert sum(history[-3:]) < 0.9 * sum(history[:3])
        assert self.has_changed("student")
        assert not self.has_changed(teacher)
        assert not self.models[teacher].training
        for parameter in self.models[teacher].parameters():
            assert not parameter.requires_grad
            assert parameter.grad is None
        assert self.adapters
        for adapter in self.adapters:
            assert adapter.num_prefix_tokens == num_prefix_tokens
            assert adapter.seen == {num_prefix_tokens + GRID**2}
            assert not torch.equal(adapter.down, adapter.up.T)  # as they were at first


@pytest.fixture
def watch(monkeypatch):
    watch = Watch()

    class Watched(singer_kernels.FusedLosses):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.seen = set()
            watch.adapters.append(self)

        def forward(self, student, teacher, gram_target=None):
            self.seen.update({student.shape[1], teacher.shape[1]})
            return super().forward(student, teacher, gram_target)

    monkeypatch.setattr(timm, "create_model", watch.create_model)
    monkeypatch.setattr(singer_kernels, "FusedLosses", Watched)
    return watch


@pytest.mark.parametrize("name", ["plain_pytorch", "timm_task"])
@pytest.mark.parametrize("teacher", SHARED_PREFIX)
def test_timm_examples(watch, capsys, name, teacher):
    history = load(name).main([*OPTIONS, "--teacher", teacher])
    assert len(history) == 12
    watch.check(history, teacher, SHARED_PREFIX[teacher])
    assert len(watch.adapters) == (2 if name == "plain_pytorch" else 1)
    assert capsys.readouterr().out.count("outlier") == 3  # steps 1, 5, 10


def test_plain_pytorch_needs_singer_kernels_alone():
    source = (EXAMPLES / "plain_pytorch.py").read_text()
    assert "from singer_kernels import" in source
    assert "from singer." not in source
    assert "import singer\n" not in source


def test_plain_pytorch_reads_a_folder(watch, image_folder):
    data = ["--data", str(image_folder), "--batch-size", "5", "--steps", "50"]
    history = load("plain_pytorch").main([*OPTIONS, "--teacher", "teacher", *data])
    assert len(history) == 50  # of 3 batches an epoch
    watch.check(history, "teacher", 1)


def test_transformers_example(watch, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    make = transformers.AutoModel.from_config
    monkeypatch.setattr(
        transformers.AutoModel, "from_config", lambda config: watch.keep("hf", make(config))
    )
    history = load("transformers_vit").main([*OPTIONS, "--width", "36"])
    watch.check(history, "hf", 1)


def test_transformers_example_distils_the_raw_tokens_of_the_last_block(watch, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    make, raw, given = transformers.AutoModel.from_config, [], []

    def from_config(config):
        model = watch.keep("hf", make(config))
        blocks = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
        blocks[-1].register_forward_hook(lambda block, args, output: raw.append(output))
        return model

    forward = singer_kernels.FusedLosses.forward

    def recorded(self, student, teacher, gram_target=None):
        given.append(teacher)
        return forward(self, student, teacher, gram_target)

    monkeypatch.setattr(transformers.AutoModel, "from_config", from_config)
    monkeypatch.setattr(singer_kernels.FusedLosses, "forward", recorded)
    load("transformers_vit").main([*OPTIONS, "--width", "36", "--steps", "1"])
    assert torch.equal(given[0], raw[-1])


@pytest.fixture
def make_task(watch):
    example = load("timm_task")

    def make(seed):
        torch.manual_seed(seed)
        student = watch.create_model("student", num_classes=5)
        teacher = watch.create_model("teacher", num_classes=0)
        weights = {"task_loss_weight": 0.5, "distill_loss_weight": 2.0}
        return example.SiNGERTask(student, teacher, rank=4, **weights)

    return make


IMAGES = torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 4, 2])


def test_timm_task_weighs_its_terms(make_task):
    result = make_task(0)(IMAGES, LABELS)
    assert result["output"].shape == (3, 5)
    distilled = result["kd"] + 0.01 * result["outlier"] + result["info"]
    torch.testing.assert_close(result["loss"], 0.5 * result["task_loss"] + 2.0 * distilled)


def test_timm_task_checkpoint(make_task):
    task, other = make_task(0), make_task(1)
    task.setup_ema(decay=0.5)
    state = task.get_checkpoint_state()
    student = make_model(num_classes=5, **MODELS["student"])
    student.load_state_dict(state["state_dict"])
    assert torch.equal(student.eval()(IMAGES), task.eval()(IMAGES, LABELS)["output"])
    assert "adapter.down" in state["task_state"]["projection"]
    assert "task_state_ema" in task.get_checkpoint_state(ema=True)
    other.teacher = task.teacher  # what a script has before it loads the checkpoint
    other.load_checkpoint_state(state["state_dict"], state["task_state"])
    for name, value in other.eval()(IMAGES, LABELS).items():
        assert torch.equal(value, task(IMAGES, LABELS)[name])


def test_timm_task_in_data_parallel(make_task):
    task, alone = make_task(0), make_task(0)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        task.prepare_distributed()
        task(IMAGES, LABELS)["loss"].backward()
    finally:
        distributed.destroy_process_group()
    alone(IMAGES, LABELS)["loss"].backward()
    wrapped = task.get_trainable_module()
    assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    gradients = {name: p.grad for name, p in wrapped.module.named_parameters()}
    for name, parameter in alone.get_trainable_module().named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    clipped = set(map(id, task.get_clip_parameters()))
    assert clipped == {id(parameter) for parameter in wrapped.parameters()}
