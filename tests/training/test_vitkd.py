"""ViTKD: its losses against independent formulas, its masks, and that all of it trains."""

import pytest
import torch
from tiny_models import (
    BEIT,
    DINOV3,
    EVA02,
    REG4,
    SIGLIP,
    VIT,
    generator,
    random_images,
    tiny_backbone,
)

from singer.errors import SingerError
from singer.methods import METHODS, FitNet, ViTKD, ViTKDSameLayers
from singer.methods.vitkd import Generator, count_masked


def teacher_of(name=VIT, **options):
    return tiny_backbone(name, depth=4, dim=32, patch_size=16, seed=1, **options)


def student_of(name=VIT, **options):
    return tiny_backbone(name, depth=3, dim=16, patch_size=16, seed=2, **options)


def make(kind, options, layers=(1, 3), teacher=VIT, student=VIT):
    return kind(teacher_of(teacher), student_of(student), list(layers), **options)


def tokens_of(method, seed=0):
    images = random_images(method.teacher, seed=seed)
    return method.student_tokens(images), method.teacher_tokens(images)


def drawn_masks(method, batch=2, seed=3):
    """Return what the next call masks, ``[B, P]``, and leave the generator where it was."""
    seen = []
    hook = method.generator.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    torch.manual_seed(seed)
    student, teacher = tokens_of(method)
    method.losses(student, teacher)
    hook.remove()
    torch.manual_seed(seed)
    return seen[0].squeeze(-1).bool()


def shake(method):
    """Move the generator off its start, so that a test sees the mask token."""
    with torch.no_grad():
        for parameter in method.generator.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator(4)))
    return method


def convolve(image, weight, bias):
    """A padded 3x3 cross-correlation of ``[D, rows, columns]``, written out."""
    depth, rows, columns = image.shape
    padded = torch.zeros(depth, rows + 2, columns + 2, dtype=image.dtype)
    padded[:, 1:-1, 1:-1] = image
    out = torch.empty(weight.shape[0], rows, columns, dtype=image.dtype)
    for row in range(rows):
        for column in range(columns):
            window = padded[:, row : row + 3, column : column + 3]
            out[:, row, column] = (weight * window).sum(dim=(1, 2, 3)) + bias
    return out


def generation_by_hand(method, found, expected, masks):
    """Complete every image's masked patches, given ``[B, P, D]`` twice, and return their error."""
    squared, entries = 0.0, 0
    first, _, second = method.generator.layers
    for image in range(len(found)):
        patches = found[image].clone()
        patches[masks[image]] = method.generator.mask_token
        grid = patches.T.reshape(-1, *method.teacher.grid)
        hidden = convolve(grid, first.weight, first.bias).clamp(min=0)
        generated = convolve(hidden, second.weight, second.bias).flatten(1).T
        difference = (generated - expected[image])[masks[image]]
        squared = squared + (difference**2).sum()
        entries += difference.numel()
    return squared / entries


def layer_norm_by_hand(tokens, norm):
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    variance = (centred**2).mean(dim=-1, keepdim=True)
    return centred / (variance + norm.eps).sqrt() * norm.weight + norm.bias


# float64 sums of at most a few thousand terms of order 1
NEAR = {"rtol": 1e-10, "atol": 1e-12}


# --- the published method -------------------------------------------------------------------------

BOTH = pytest.mark.parametrize(
    ("kind", "layers"), [(ViTKD, (3,)), (ViTKDSameLayers, (1, 3))], ids=["vitkd", "same_layers"]
)


@pytest.mark.parametrize(
    ("teacher", "student", "prefix"), [(VIT, VIT, 1), (REG4, VIT, 5), (SIGLIP, VIT, 0)]
)
@pytest.mark.parametrize("mimic_layers", [(0, 1), (1,), [1, 0]], ids=str)
def test_the_published_losses_are_those_of_the_formulas(teacher, student, prefix, mimic_layers):
    options = {"kd_weight": 2.0, "generation_weight": 3.0, "mimic_layers": mimic_layers}
    method = shake(make(ViTKD, options, (3,), teacher, student)).double()
    masks = drawn_masks(method)
    of_student, of_teacher = tokens_of(method)
    losses = method.losses(of_student, of_teacher)
    mimicked = sorted(mimic_layers)
    assert (method.layers, method.student_layers) == ([*mimicked, 3], [*mimicked, 2])
    assert set(of_teacher.tokens) == {*mimicked, 3}

    def project(layer, tokens):
        linear = method.projections[str(layer)]
        return tokens @ linear.weight.T + linear.bias

    kd = sum(
        ((project(layer, of_student[layer][:, 1:]) - of_teacher[layer][:, prefix:]) ** 2).mean()
        for layer in mimicked
    )
    found = project(3, layer_norm_by_hand(of_student[2], method.student.norm))[:, 1:]
    expected = layer_norm_by_hand(of_teacher[3], method.teacher.model.norm)[:, prefix:]
    torch.testing.assert_close(losses["kd"], kd, **NEAR)
    generation = generation_by_hand(method, found, expected, masks)
    torch.testing.assert_close(losses["generation"], generation, **NEAR)
    torch.testing.assert_close(losses["loss"], 2.0 * kd + 3.0 * generation, **NEAR)
    assert list(losses) == ["loss", "kd", "generation"]


def test_the_published_weights_are_the_originals():
    """Sums per image, times 3e-5 and 3e-6 / 0.5, are means times one common factor."""
    method = shake(make(ViTKD, {}, (3,))).double()
    masks = drawn_masks(method)
    student, teacher = tokens_of(method)
    pairs = [[t[:, 1:] for t in method.token_pair(layer, student, teacher)] for layer in (0, 1, 3)]
    images, patches, dim = pairs[0][0].shape
    original = 3e-5 * sum(((a - b) ** 2).sum() for a, b in pairs[:2]) / images
    masked = generation_by_hand(method, *pairs[2], masks) * images * (patches // 2) * dim
    original = original + 3e-6 / 0.5 * masked / images
    loss = method.losses(student, teacher)["loss"]
    torch.testing.assert_close(3e-5 * patches * dim * loss, original, **NEAR)


@pytest.mark.parametrize("family", [VIT, REG4, SIGLIP, DINOV3, EVA02, BEIT])
def test_every_module_of_the_published_method_trains(family):
    method = shake(make(ViTKD, {}, (3,), family, family))
    method(random_images(method.teacher))["loss"].backward()
    norm = method.student.fc_norm if family in (EVA02, BEIT) else method.student.norm
    assert all(p.grad.abs().sum() > 0 for p in norm.parameters())
    for name, parameter in method.named_parameters():
        assert parameter.requires_grad == (not name.startswith("student.attn_pool")), name
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    parts = {name.rpartition(".")[0] for name, _ in method.projections.named_parameters()}
    assert parts == {"0", "1", "3"}


def test_a_frozen_final_norm_stays_frozen():
    student = student_of()
    student.model.norm.requires_grad_(False)
    method = ViTKD(teacher_of(), student, [3])
    assert not any(p.requires_grad for p in method.student.norm.parameters())


def test_a_cast_teacher_norms_in_its_own_precision():
    method = make(ViTKD, {}, (3,))
    method.teacher.cast(torch.bfloat16)
    images = random_images(method.teacher)
    with torch.autocast("cpu", dtype=torch.float16):
        tokens = method.teacher_tokens(images)
        assert method.aligned_teacher(3, tokens).dtype == torch.bfloat16
    cached = tokens[3].float()
    assert torch.equal(method.teacher.final_norm(cached), method.aligned_teacher(3, tokens))


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ([1, 3], {}, r"method\.layers: got \[1, 3\], expected one block.*method\.layers=\[-1\]"),
        ([3], {"mimic_layers": (0, 3)}, r"method\.mimic_layers: got 3, expected -3 to 2"),
        ([3], {"mimic_layers": ()}, r"method\.mimic_layers: got no layer"),
        ([3], {"mimic_layers": (1, 1)}, r"method\.mimic_layers: got \[1, 1\].*twice"),
        ([1], {}, r"method\.mimic_layers: got \[0, 1\], expected blocks before .* block 1"),
        ([1], {"mimic_layers": (0, 2)}, r"method\.mimic_layers: got \[0, 2\].*block 1"),
        ([4], {}, r"method\.layers: got 4"),
    ],
)
def test_wrong_layers_of_the_published_method_are_refused(layers, options, message):
    defaults = {"mimic_layers": (0, 1), "mask_ratio": 0.5}
    with pytest.raises(SingerError, match=message):
        make(ViTKD, options, layers)
    with pytest.raises(SingerError, match=message):
        ViTKD.check(teacher_of(), student_of(), {**defaults, **options, "layers": layers})


def test_the_published_method_generates_the_last_block_by_default():
    method = ViTKD(teacher_of(), student_of())
    assert (method.layers, method.student_layers) == ([0, 1, 3], [0, 1, 2])


# --- the losses at the layers of the other methods ------------------------------------------------


@pytest.mark.parametrize(
    ("teacher", "student", "prefix"), [(VIT, VIT, 1), (REG4, REG4, 5), (SIGLIP, VIT, 0)]
)
@pytest.mark.parametrize("layers", [(3,), (1, 3), (0, 1, 3)], ids=str)
def test_losses_are_those_of_the_formulas(teacher, student, prefix, layers):
    method = shake(
        make(
            ViTKDSameLayers, {"kd_weight": 2.0, "generation_weight": 3.0}, layers, teacher, student
        )
    )
    method.double()
    masks = drawn_masks(method)
    of_student, of_teacher = tokens_of(method)
    losses = method.losses(of_student, of_teacher)
    pairs = [
        (method.projected_student(layer, of_student), method.aligned_teacher(layer, of_teacher))
        for layer in layers
    ]
    found, expected = pairs[-1]
    assert method.num_prefix_tokens == prefix
    kd = sum(((a - b) ** 2).mean() for a, b in pairs[:-1])
    kd = kd + ((found - expected)[:, :prefix] ** 2).sum() / found.numel()
    generation = generation_by_hand(method, found[:, prefix:], expected[:, prefix:], masks)
    torch.testing.assert_close(losses["kd"], torch.as_tensor(kd), **NEAR)
    torch.testing.assert_close(losses["generation"], generation, **NEAR)
    total = 2.0 * losses["kd"] + 3.0 * losses["generation"]
    torch.testing.assert_close(losses["loss"], total, **NEAR)
    assert list(losses) == ["loss", "kd", "generation"]


def test_the_earlier_layers_are_fitnets():
    method, fitnet = make(ViTKDSameLayers, {}), make(FitNet, {})
    for name, value in fitnet.projections.state_dict().items():
        assert torch.equal(method.projections.state_dict()[name], value)
    student, teacher = tokens_of(method)
    with torch.no_grad():  # what is left of the last layer is the share of its prefix tokens
        found, expected = method.projected_student(3, student), method.aligned_teacher(3, teacher)
        last = ((found - expected) ** 2).mean()
        of_class_token = ((found - expected)[:, :1] ** 2).sum() / found.numel()
    expected_kd = fitnet.losses(student, teacher)["kd"] - last + of_class_token
    # float32: a difference of sums of order 1
    torch.testing.assert_close(
        method.losses(student, teacher)["kd"], expected_kd, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("grid", [(2, 3), (3, 2)])
def test_the_generator_keeps_the_order_of_the_patches(grid):
    module = Generator(4, grid)
    patches = torch.randn(1, 6, 4, generator=generator(0))
    visible = torch.zeros(1, 6, 1)
    moved = patches.clone()
    moved[0, 0] += 1.0  # the corner: patches further than two rows or columns don't see it
    changed = (module(moved, visible) - module(patches, visible)).abs().sum(dim=-1)[0] > 0
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    assert torch.equal(changed, ((rows <= 2) & (columns <= 2)).flatten())
    with torch.no_grad():
        for layer in (module.layers[0], module.layers[2]):
            layer.weight.zero_()
            layer.bias.zero_()
            layer.weight[:, :, 1, 1] = torch.eye(4)
    # Convolutions that pass their input on leave what ReLU leaves, where it was.
    assert torch.equal(module(patches, visible), patches.relu())


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", range(5))
@BOTH
def test_what_is_not_finite_shows(kind, layers, where, value, token):
    method = make(kind, {}, layers=layers)
    student, teacher = tokens_of(method)
    layer = 2 if where == "student" else 3
    tokens = {"student": student, "teacher": teacher}[where].tokens
    tokens[layer] = tokens[layer].clone()
    tokens[layer][1, token, 7] = value
    is_unread = kind is ViTKD and token == 0  # patches only
    for _ in range(3):  # masked in some calls, visible in others
        assert method.losses(student, teacher)["loss"].isfinite() == is_unread


@BOTH
def test_autocast_in_bfloat16(kind, layers):
    method = make(kind, {}, layers)
    torch.manual_seed(0)
    plain = method(random_images(method.teacher))
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = method(random_images(method.teacher))
    cast["loss"].backward()
    for name, value in plain.items():
        assert cast[name].dtype == torch.float32
        # bfloat16 keeps 8 bits, 2^-9 to each rounding, of which a token collects a dozen in its
        # blocks; the squares double the error.
        torch.testing.assert_close(cast[name], value, rtol=2 * 12 * 2**-9, atol=0)
    assert all(p.grad.isfinite().all() for p in method.parameters() if p.requires_grad)


# --- the masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.66, 0.9])
@BOTH
def test_every_image_has_its_own_mask_of_the_exact_size(kind, layers, ratio):
    method = kind(teacher_of(grid=3), student_of(grid=3), layers, mask_ratio=ratio)
    masks = torch.cat([drawn_masks(method, seed=seed) for seed in range(40)])
    assert (masks.sum(dim=1) == round(9 * ratio)).all()
    assert len(masks.unique(dim=0)) > 5
    # 80 masks: a patch's frequency lies within 5 standard deviations of the ratio.
    share = round(9 * ratio) / 9
    deviation = (share * (1 - share) / len(masks)) ** 0.5
    assert ((masks.float().mean(dim=0) - share).abs() < 5 * deviation).all()


@BOTH
def test_masks_follow_the_global_generator_alone(kind, layers):
    method = make(kind, {}, layers)
    images = random_images(method.teacher)
    torch.manual_seed(5)
    method(images)
    state = torch.get_rng_state()
    second = method(images)["loss"]
    assert not torch.equal(method(images)["loss"], second)
    torch.set_rng_state(state)
    assert torch.equal(method(images)["loss"], second)


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.9, 1.0, -1.0, 2.0])
def test_a_mask_of_none_or_all_patches_is_refused(ratio):
    with pytest.raises(SingerError, match=rf"method\.mask_ratio: got {ratio}, which masks"):
        make(ViTKDSameLayers, {"mask_ratio": ratio})
    with pytest.raises(SingerError, match=r"method\.mask_ratio"):
        count_masked(0.5, 1)


# --- what trains ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [(3,), (0, 1, 3), (0,)], ids=str)
@pytest.mark.parametrize(
    ("teacher", "student"), [(VIT, VIT), (SIGLIP, VIT), (DINOV3, VIT), (VIT, DINOV3)]
)
@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_every_trainable_parameter_gets_a_gradient(layers, teacher, student, ratio):
    method = shake(make(ViTKDSameLayers, {"mask_ratio": ratio}, layers, teacher, student))
    method(random_images(method.teacher))["loss"].backward()
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in method.teacher.model.parameters())


@pytest.mark.parametrize("options", [{"generation_weight": 0.0}, {"kd_weight": 0.0}])
def test_a_weight_of_zero_leaves_no_parameter_without_gradient(options):
    method = make(ViTKDSameLayers, options, teacher=SIGLIP, layers=(3,))
    method(random_images(method.teacher))["loss"].backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


@BOTH
def test_training_lowers_the_loss_and_leaves_the_teacher(kind, layers):
    torch.manual_seed(0)
    method = make(kind, {}, layers)
    before = {name: value.clone() for name, value in method.teacher.model.state_dict().items()}
    token = method.generator.mask_token.clone()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad(set_to_none=True)
        loss = method(random_images(method.teacher))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(method.generator.mask_token, token)
    after = method.teacher.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@BOTH
def test_exports_add_the_generator(kind, layers):
    method = make(kind, {}, layers)
    exports = method.exports()
    assert set(exports) == {"projections", "generator"}
    fresh = Generator(method.teacher.dim, method.teacher.grid)
    fresh.load_state_dict(exports["generator"])
    assert "mask_token" in exports["generator"]
    parts = {name.split(".")[0] for name in method.state_dict()}
    assert parts == {"student", "projections", "generator"}


@BOTH
def test_the_seed_decides_the_start_and_the_global_generator_is_left_alone(kind, layers):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    one, same, other = (make(kind, {"seed": seed}, layers) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    parameters = {n: p for n, p in one.named_parameters() if not n.startswith("student.")}
    assert len(parameters) == 5 + 2 * len(one.layers)
    drawn = set()
    for name, value in parameters.items():
        assert torch.equal(same.get_parameter(name), value)
        if name != "generator.mask_token":
            assert not torch.equal(other.get_parameter(name), value)
            drawn.add(value.flatten()[0].item())
    assert len(drawn) == len(parameters) - 1  # no two start alike


def test_the_generated_layer_starts_as_fitnets():
    """Compared with one seed, methods have the same projection of the last block."""
    method, fitnet = make(ViTKD, {}, (3,)), make(FitNet, {}, (3,))
    assert torch.equal(method.projections["3"].weight, fitnet.projections["3"].weight)


def test_registered_by_name():
    assert METHODS["vitkd"] is ViTKD
    assert METHODS["vitkd_same_layers"] is ViTKDSameLayers
