"""Whole training steps: both compute the same, and the authors' step does the authors' work."""

import copy
import json
import math
import sys

import pytest
import torch
from harness import step_check, steps
from harness.authors_step import AuthorsStep
from tiny_models import SIGLIP, VIT, tiny_backbone

from singer.config.loading import to_yaml
from singer.config.schema import parse_config
from singer.methods import SiNGER

LAYERS = [1, 2]
RANK = 4


def make_method(variant="official", layers=LAYERS, name=VIT):
    teacher = tiny_backbone(name, depth=4, grid=4, seed=1)
    student = tiny_backbone(name, depth=3, dim=16, grid=4, seed=2)
    return SiNGER(teacher, student, layers, variant=variant, rank=RANK).train()


def make_images(method, batch=3):
    shape = (batch, 3, *method.teacher.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator())


@pytest.fixture
def config():
    def model(dim, depth):
        options = {"patch_size": 8, "depth": depth, "embed_dim": dim, "num_heads": 2}
        return {"name": VIT, "weights": "random", "options": options}

    return parse_config(
        {
            "teacher": model(32, 4),
            "student": model(16, 2),
            "image_size": 32,
            "method": {"name": "singer", "variant": "official", "layers": LAYERS, "rank": RANK},
            "data": {"source": "unused"},
            "train": {"batch_size": 4},
            "output": "unused",
        }
    )


def outlier_cancellation_ratio(method, images):
    """Return the largest norm over the smallest excess: the digits lost to cancellation."""
    with torch.no_grad():
        teacher, student = method.teacher_tokens(images), method.student_tokens(images)
        worst = 1.0
        for layer in method.layers:
            out = method.adapters[str(layer)](
                method.projected_student(layer, student), method.aligned_teacher(layer, teacher)
            )
            excess = (out.norms - out.threshold[:, None]).abs()
            worst = max(worst, (out.norms.max() / excess.min()).item())
    return worst


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", ["official", "paper"])
def test_both_steps_give_the_same_losses_and_gradients(variant, dtype):
    method = make_method(variant)
    images = make_images(method)
    exact = step_check.values(AuthorsStep(method).double(), images)
    allowed = step_check.tolerances(method, exact, images, dtype)
    gradients = []
    for model in (AuthorsStep(method), copy.deepcopy(method)):
        model.to(dtype)
        losses = model.losses(model.student_tokens(images), model.teacher_tokens(images))
        losses["loss"].backward()
        for name, value in losses.items():
            assert abs(value.item() - exact[name]) <= allowed[name], name
        modules = (model.student, model.projections, model.adapters)
        gradients.append([dict(module.named_parameters()) for module in modules])

    # A gradient has the roundings of the forward and of the backward products, and those of a sum
    # over all tokens. Cancellation in the outliers' excess affects it too.
    tokens = method.teacher.num_patches + 1
    terms = images.shape[0] * tokens * (torch.finfo(dtype).eps / 2) ** 2
    relative = math.sqrt(2 * step_check.roundoff(method, dtype, tokens) ** 2 + terms)
    relative *= outlier_cancellation_ratio(method, images)
    assert relative < 0.05
    trained = 0
    for theirs, ours in zip(*gradients, strict=True):
        assert theirs.keys() == ours.keys()
        for name, parameter in ours.items():
            expected = theirs[name].grad
            if not parameter.requires_grad:  # the final norm: the authors' step does not reach it
                assert expected is None, name
                continue
            trained += 1
            error = (parameter.grad - expected).norm()
            assert expected.norm() > 0, name
            assert error <= relative * expected.norm(), name
    assert trained > 30


def test_authors_step_runs_the_next_block_again_and_leaves_gradients_on_it(config):
    method = make_method()
    images = make_images(method)
    config = config.model_copy(update={"train": config.train.model_copy(update={"lr": 1e-30})})
    calls = {}
    for name in ("authors", "ours"):
        provider = steps.Provider(name, method, config, "cpu")
        authors = provider.model if provider.is_authors else None
        backbone = provider.model.teacher if authors is None else authors.teacher_backbone
        count = calls[name] = [0] * backbone.depth
        for layer in range(backbone.depth):

            def note(*_, layer=layer, count=count):
                count[layer] += 1

            backbone.block(layer).register_forward_hook(note)
        provider.step(images, steps.Stopwatch("cpu"))
        gradients = {
            key: parameter.grad.clone()
            for key, parameter in backbone.model.named_parameters()
            if parameter.grad is not None
        }
        if authors is None:
            assert not gradients
            continue
        block = {f"blocks.{LAYERS[0] + 1}.{key}" for key, _ in backbone.block(0).named_parameters()}
        assert gradients.keys() == block
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())
        optimised = {id(p) for group in provider.optimizer.param_groups for p in group["params"]}
        assert not optimised & {id(parameter) for parameter in authors.teacher.parameters()}
        assert optimised == {id(parameter) for parameter in authors.learnable()}
        # They accumulate; at this learning rate the weights hardly move.
        provider.step(images, steps.Stopwatch("cpu"))
        for key, gradient in gradients.items():
            torch.testing.assert_close(backbone.model.get_parameter(key).grad, 2 * gradient)
        count[:] = [number // 2 for number in count]
    # The block after layer 1 runs on the images, on refined tokens and, in the authors', again.
    assert calls == {"authors": [1, 1, 3, 1], "ours": [1, 1, 2, 0]}


def test_a_step_trains_everything_but_the_teacher(config):
    method = make_method()
    images = make_images(method)
    for name in ("authors", "authors-bf16", "ours", "ours-bf16"):
        provider = steps.Provider(name, method, config, "cpu")
        before = copy.deepcopy(provider.model.state_dict())
        watch = steps.Stopwatch("cpu")
        watch.mark("start")
        provider.step(images, watch)
        taken = watch.read()
        assert list(taken) == list(steps.PHASES)
        assert all(seconds > 0 for seconds in taken.values())
        moved = {
            key
            for key, value in provider.model.state_dict().items()
            if (value != before[key]).any()
        }
        trained = {
            f"student.{key}" for key, p in method.student.named_parameters() if p.requires_grad
        }
        trained |= {
            f"{part}.{key}"
            for part in ("projections", "adapters")
            for key in getattr(method, part).state_dict()
        }
        assert moved == trained


@pytest.mark.slow
def test_main_measures_and_writes_json(config, tmp_path, capsys):
    path, output = tmp_path / "run.yaml", tmp_path / "steps.json"
    path.write_text(to_yaml(config), encoding="utf-8")
    arguments = ["--config", str(path), "--rounds", "2", "--json", str(output)]
    assert steps.main([*arguments, "--no-memory"]) == 0
    results = json.loads(output.read_text(encoding="utf-8"))["results"]
    assert list(results) == ["authors", "authors-bf16", "ours", "ours-bf16"]
    for row in results.values():
        assert row["images_per_second"] > 0
        assert list(row["ratio_to"]) == ["authors", "authors-bf16"]
        assert list(row["milliseconds"]) == list(steps.PHASES)
    assert results["authors"]["ratio_to"]["authors"] == 1.0
    assert "wrong" not in capsys.readouterr().out

    assert steps.main([*arguments, "--providers", "ours"]) == 0
    written = json.loads(output.read_text(encoding="utf-8"))
    assert written["dense_gflops"]["authors"] > written["dense_gflops"]["ours"] > 0
    assert {"torch", "timm"} <= written["setting"]["versions"].keys()
    assert written["setting"]["variant"] == "official"
    memory = written["peak_MiB"]["ours"]
    # The gradients and AdamW's two moments of the student's 7,000 weights are 0.08 MiB.
    assert memory is None if not sys.platform.startswith("linux") else memory > 0.08


def test_a_wrong_step_is_not_timed(config, tmp_path, monkeypatch, capsys):
    path, output = tmp_path / "run.yaml", tmp_path / "steps.json"
    path.write_text(to_yaml(config), encoding="utf-8")
    right = steps.Provider.losses

    def wrong(self, images, watch):
        losses = right(self, images, watch)
        return losses | {"kd": 1.001 * losses["kd"]} if self.name == "ours" else losses

    monkeypatch.setattr(steps.Provider, "losses", wrong)
    names = ["--providers", "authors", "ours"]
    options = ["--no-memory", "--rounds", "2", "--json", str(output)]
    assert steps.main(["--config", str(path), *names, *options]) == 1
    written = json.loads(output.read_text(encoding="utf-8"))
    assert list(written["results"]) == ["authors"]
    assert written["error_in_tolerances"]["ours"]["kd"] > 1
    assert "| ours | wrong" in capsys.readouterr().out


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.1])
def test_an_error_above_its_tolerance_is_wrong(value):
    assert step_check.is_correct({"kd": 1.0, "info": 0.0})
    assert not step_check.is_correct({"kd": 0.0, "info": value})


def test_the_authors_step_rejects_what_it_does_not_support():
    with pytest.raises(ValueError, match=r"method.layers: got \[3\], expected two or more"):
        AuthorsStep(make_method(layers=[3]))
    with pytest.raises(ValueError, match="other prefix tokens than CLS"):
        AuthorsStep(make_method(name=SIGLIP))
