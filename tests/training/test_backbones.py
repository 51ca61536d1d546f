"""Block tokens of every family: what they are, what computes them, what is left behind."""

import re

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from tiny_models import (
    BEIT,
    DINOV2,
    DINOV3,
    FAMILIES,
    REG4,
    SIGLIP,
    VIT,
    random_images,
    timm_tokens,
    tiny_backbone,
    tiny_model,
)
from torch import nn

from singer.errors import SingerError
from singer.models.backbones import Backbone, inspect_backbone

DEPTH = 3
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=str)
each_masked_family = pytest.mark.parametrize(
    "family", [f for f in FAMILIES.values() if f.takes_mask], ids=str
)


def normalised(family, images):
    mean, std = (torch.tensor(values)[:, None, None] for values in family.normalisation)
    return (images - mean) / std


def hook_count(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def count_calls(model):
    """Count the calls of every block, and return the list that holds the counts."""
    calls = [0] * len(model.blocks)

    def wrap(index, block):
        forward = block.forward

        def counted(*args, **kwargs):
            calls[index] += 1
            return forward(*args, **kwargs)

        block.forward = counted

    for index, block in enumerate(model.blocks):
        wrap(index, block)
    return calls


# --- what a backbone is ---------------------------------------------------------------------------


@each_family
def test_the_model_is_described(family):
    backbone = tiny_backbone(family.name, grid=3)
    assert backbone.depth == DEPTH
    assert backbone.dim == 32
    assert backbone.num_prefix_tokens == family.prefix
    assert backbone.has_class_token is family.has_class_token
    assert backbone.grid == (3, 3)
    assert backbone.num_patches == 9
    assert backbone.image_size == (3 * family.patch, 3 * family.patch)
    assert (backbone.mean, backbone.std) == family.normalisation
    data = resolve_model_data_config(backbone.model)
    assert (backbone.mean, backbone.std) == (data["mean"], data["std"])


@each_family
def test_a_block_gives_prefix_tokens_and_patches(family):
    backbone = tiny_backbone(family.name)
    tokens = backbone.tokens(random_images(backbone), [0])[0]
    assert tokens.shape == (2, family.prefix + 4, 32)


@each_family
def test_the_structure_alone_is_described_alike(family):
    backbone = tiny_backbone(family.name)
    options = {"depth": DEPTH, "embed_dim": 32, "num_heads": 2}
    structure = inspect_backbone(family.name, 2 * family.patch, "teacher", options)
    for name in ("depth", "dim", "num_prefix_tokens", "has_class_token", "grid", "mean", "std"):
        assert getattr(structure, name) == getattr(backbone, name), name
    assert {p.device.type for p in structure.model.parameters()} == {"meta"}


def test_images_need_not_be_square():
    model = timm.create_model(
        VIT, num_classes=0, img_size=(32, 48), depth=2, embed_dim=32, num_heads=2
    ).eval()
    backbone = Backbone(model)
    assert (backbone.grid, backbone.image_size, backbone.num_patches) == ((2, 3), (32, 48), 6)
    assert backbone.tokens(random_images(backbone), [1])[1].shape == (2, 7, 32)


# --- the tokens -----------------------------------------------------------------------------------


@each_family
def test_every_block_gives_the_raw_residual_stream(family):
    backbone = tiny_backbone(family.name)
    images = random_images(backbone)
    with torch.no_grad():
        found = backbone.tokens(images, range(DEPTH))
        expected = timm_tokens(backbone.model, normalised(family, images))
    for layer in range(DEPTH):
        # The same operations on the same numbers, but for the order of the normalisation's.
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], rtol=0.1, atol=0.1)


@each_family
def test_a_block_runs_again_on_given_tokens(family):
    backbone = tiny_backbone(family.name)
    images = random_images(backbone)
    with torch.no_grad():
        found = backbone.tokens(images, range(DEPTH))
        for layer in range(1, DEPTH):
            again = backbone.run_block(layer, found[layer - 1], found.calls[layer])
            assert torch.equal(again, found[layer])


@each_family
def test_block_input_is_the_output_of_the_block_before(family):
    backbone = tiny_backbone(family.name)
    images = random_images(backbone)
    with torch.no_grad():
        found = backbone.tokens(images, range(DEPTH))
        for layer in range(1, DEPTH):
            tokens, call = backbone.block_input(images, layer)
            assert torch.equal(tokens, found[layer - 1])
            assert torch.equal(backbone.run_block(layer, tokens, call), found[layer])
        tokens, call = backbone.block_input(images, 0)
        assert torch.equal(backbone.run_block(0, tokens, call), found[0])


@each_masked_family
def test_a_mask_reaches_every_block_and_its_second_run(family):
    backbone = tiny_backbone(family.name)
    images = random_images(backbone)
    length = family.prefix + 4
    mask = torch.ones(length, length, dtype=torch.bool)
    mask[:, -1] = False  # nothing may look at the last patch
    mask[-1, -1] = True
    with torch.no_grad():
        found = backbone.tokens(images, range(DEPTH), attn_mask=mask)
        plain = backbone.tokens(images, range(DEPTH))
        expected = timm_tokens(backbone.model, normalised(family, images), attn_mask=mask)
        assert torch.equal(backbone.run_block(2, found[1], found.calls[2]), found[2])
        changed = images.clone()
        size = family.patch
        changed[:, :, -size:, -size:] = 1 - changed[:, :, -size:, -size:]
        after_change = backbone.tokens(changed, range(DEPTH), attn_mask=mask)
    for layer in range(DEPTH):
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(found[layer], plain[layer], atol=1e-3)
        assert torch.equal(after_change[layer][:, :-1], found[layer][:, :-1])
        assert not torch.allclose(after_change[layer][:, -1], found[layer][:, -1], atol=1e-3)


def test_a_shared_position_bias_reaches_the_second_run():
    backbone = tiny_backbone(BEIT, use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    images = random_images(backbone)
    with torch.no_grad():
        found = backbone.tokens(images, [0, 1])
        bare = backbone.block(1)(found[0])
        assert torch.equal(backbone.run_block(1, found[0], found.calls[1]), found[1])
    assert not torch.allclose(bare, found[1], atol=1e-3)


def test_rotary_embeddings_differ_from_block_to_block():
    backbone = tiny_backbone("vit_base_patch16_rope_mixed_224")
    images = random_images(backbone)
    with torch.no_grad():
        found = backbone.tokens(images, range(DEPTH))
        other = backbone.run_block(2, found[1], found.calls[1])
    assert not torch.allclose(other, found[2], atol=1e-3)


def test_layers_may_come_in_any_order_and_twice():
    backbone = tiny_backbone(VIT)
    images = random_images(backbone)
    with torch.no_grad():
        found = backbone.tokens(images, [2, 0, 2])
        ordered = backbone.tokens(images, [0, 2])
    assert set(found.tokens) == set(found.calls) == {0, 2}
    for layer in (0, 2):
        assert torch.equal(found[layer], ordered[layer])


@pytest.mark.parametrize("layers", [[-1], [DEPTH], [0, 7]])
def test_a_layer_out_of_range_is_refused_before_the_model_runs(layers):
    backbone = tiny_backbone(VIT)
    calls = count_calls(backbone.model)
    with pytest.raises(ValueError, match=rf"layers: got {max(layers)}, expected 0 to {DEPTH - 1}"):
        backbone.tokens(random_images(backbone), layers)
    assert calls == [0, 0, 0]


# --- gradients ------------------------------------------------------------------------------------


@each_family
def test_a_frozen_block_hands_the_gradient_to_its_tokens_alone(family):
    backbone = tiny_backbone(family.name).freeze()
    images = random_images(backbone)
    with torch.no_grad():
        found = backbone.tokens(images, [0, 1])
    tokens = found[0].clone().requires_grad_()
    output = backbone.run_block(1, tokens, found.calls[1])
    assert output.requires_grad
    torch.testing.assert_close(output.detach(), found[1], rtol=1e-5, atol=1e-5)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weights).sum().backward()
    assert tokens.grad.isfinite().all()
    assert (tokens.grad != 0).any(-1).all()  # every token, prefix included
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())


def test_freeze_sets_evaluation_mode_and_returns_the_backbone():
    backbone = tiny_backbone(VIT)
    backbone.model.train()
    assert backbone.freeze() is backbone
    assert not any(module.training for module in backbone.model.modules())


def test_unfrozen_tokens_are_differentiable():
    backbone = tiny_backbone(VIT)
    found = backbone.tokens(random_images(backbone), [1])
    found[1].square().sum().backward()
    moved = {name.split(".")[1] for name, p in backbone.model.blocks.named_parameters("blocks")
             if p.grad is not None}  # fmt: skip
    assert moved == {"0", "1"}


# --- what runs, and what is left behind -----------------------------------------------------------


@each_family
def test_blocks_after_the_last_needed_never_run(family):
    backbone = tiny_backbone(family.name)
    images = random_images(backbone)
    calls = count_calls(backbone.model)
    with torch.no_grad():
        backbone.tokens(images, [1, 0])
        assert calls == [1, 1, 0]
        _, call = backbone.block_input(images, 1)
        assert calls == [2, 2, 0]
        backbone.run_block(0, backbone.tokens(images, [0])[0], call)
        assert calls == [4, 2, 0]


@each_family
def test_no_hook_is_left_behind(family):
    backbone = tiny_backbone(family.name)
    images = random_images(backbone)
    before = hook_count(backbone.model)
    with torch.no_grad():
        found = backbone.tokens(images, [0, 1])
        backbone.block_input(images, 1)
        backbone.run_block(1, found[0], found.calls[1])
    assert hook_count(backbone.model) == before


@pytest.mark.parametrize("run", ["tokens", "block_input"])
def test_no_hook_is_left_behind_by_a_failure(run):
    class FailureError(Exception):
        pass

    def fail(*_, **__):
        raise FailureError

    backbone = tiny_backbone(VIT)
    images = random_images(backbone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone.block(1), "forward", fail)
        with pytest.raises(FailureError):
            backbone.tokens(images, [0, 1, 2]) if run == "tokens" else backbone.block_input(
                images, 2
            )
    assert hook_count(backbone.model) == 0


def test_the_backbone_leaves_the_callers_hooks():
    backbone = tiny_backbone(VIT)
    seen = []
    backbone.block(0).register_forward_hook(lambda *_: seen.append(1))
    backbone.tokens(random_images(backbone), [0])
    assert seen == [1]
    assert hook_count(backbone.model) == 1


# --- normalisation --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VIT, DINOV2, SIGLIP, "vit_base_patch16_clip_224"])
def test_bytes_and_floats_agree(name):
    backbone = tiny_backbone(name)
    size = (2, 3, *backbone.image_size)
    bytes_ = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator())
    floats = bytes_.float() / 255
    assert torch.equal(backbone.normalize(bytes_), backbone.normalize(floats))
    expected = normalised(FAMILIES[name], floats)
    torch.testing.assert_close(backbone.normalize(bytes_), expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(backbone.tokens(bytes_, [1])[1], backbone.tokens(floats, [1])[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_images_of_any_dtype_take_that_of_the_weights(dtype):
    backbone = tiny_backbone(DINOV2)
    backbone.model.to(dtype)
    floats = random_images(backbone, dtype=torch.float32)
    bytes_ = (floats * 255).to(torch.uint8)
    with torch.no_grad():
        for images in (bytes_, floats, floats.double()):
            assert backbone.normalize(images).dtype == dtype
            assert backbone.tokens(images, [1])[1].dtype == dtype


# --- models that are none -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "hiera_tiny_224"])
def test_a_model_that_is_no_vision_transformer_is_refused(name):
    model = timm.create_model(name, num_classes=0)
    with pytest.raises(SingerError, match=r"is no plain Vision Transformer.*take a vit_") as caught:
        Backbone(model, "teacher")
    assert type(model).__name__ in str(caught.value)
    with pytest.raises(SingerError, match=r"(?s)student.*Vision Transformer"):
        inspect_backbone(name, 224, "student")


def test_a_model_whose_blocks_lack_the_class_token_is_refused():
    """CaiT adds CLS after its blocks: their first token is a patch."""
    with pytest.raises(SingerError, match="no plain Vision Transformer"):
        inspect_backbone("cait_xxs24_224", 224, "student")


def test_an_unknown_model_suggests_the_nearest():
    with pytest.raises(SingerError, match=r"student\.name.*'vit_tiny_pach16_224'") as caught:
        inspect_backbone("vit_tiny_pach16_224", 224, "student")
    assert "did you mean 'vit_tiny_patch16_224'?" in str(caught.value)
    with pytest.raises(SingerError, match=r"teacher\.name") as caught:
        inspect_backbone("qqqqqqq", 224, "teacher")
    assert "did you mean" not in str(caught.value)


# 238 = 14 · 17 and 31 = 1 · 31: the pixels per cell of the grid would seem to divide them.
@pytest.mark.parametrize("size", [50, 225, 238, 239, 31, 8])
@pytest.mark.parametrize("name", [VIT, DINOV3])
def test_the_patch_must_divide_the_image(name, size):
    message = rf"student: .*patch of 16 px does not divide.*{size}"
    with pytest.raises(SingerError, match=message) as caught:
        inspect_backbone(name, size, "student", {"depth": 1})
    advised = [int(n) for n in re.findall(r"\d+", str(caught.value).split("take")[1])]
    assert (size // 16 + 1) * 16 in advised
    assert all(n > 0 and n % 16 == 0 for n in advised)


@pytest.mark.parametrize("size", [32, 224, 256])
def test_a_size_that_the_patch_divides_is_taken(size):
    assert inspect_backbone(VIT, size, "student", {"depth": 1}).grid == (size // 16, size // 16)


def test_an_option_that_timm_does_not_know_is_named():
    with pytest.raises(SingerError, match=rf"student: timm can't build '{REG4}'.*wdith"):
        inspect_backbone(REG4, 224, "student", {"wdith": 3})
    with pytest.raises(SingerError, match=r"student: .*num_classes"):
        inspect_backbone(VIT, 224, "student", {"num_classes": 10})
    with pytest.raises(SingerError, match=r"student: .*embed_dim"):
        inspect_backbone(VIT, 224, "student", {"embed_dim": 32})


def test_a_plain_module_is_refused():
    with pytest.raises(SingerError, match="model: Linear is no plain Vision Transformer"):
        Backbone(nn.Linear(2, 2))


def test_tiny_models_differ_by_seed():
    first, second = (tiny_model(VIT, seed=seed).cls_token for seed in (0, 1))
    assert not torch.equal(first, second)


def test_every_blocks_tokens_are_checked(monkeypatch):
    create = timm.create_model

    def narrowing(name, **options):
        model = create(name, **options)
        model.blocks[1] = torch.nn.Linear(192, 96)
        model.blocks[2] = torch.nn.Linear(96, 192)
        return model

    monkeypatch.setattr(timm, "create_model", narrowing)
    with pytest.raises(SingerError, match=r"its block 1 gives tokens \(1, 197, 96\), expected"):
        inspect_backbone(VIT, 224, "teacher")
