"""The methods' losses and gradients against a second, plain computation from the formulas."""

import pytest
import torch
from tiny_models import (
    DEIT3,
    DINOV3,
    DISTILLED,
    FAMILIES,
    REG4,
    ROPE_MIXED,
    SIGLIP,
    VIT,
    random_images,
    timm_tokens,
    tiny_backbone,
)

from singer.methods import FitNet, SiNGER

F64 = torch.float64
GRID, QUANTILE = 3, 0.8
# Sums of at most 1e4 float64 terms in another order: 1e4 · 2^-53 ≈ 1e-12, times a few blocks.
NEAR = {"rtol": 1e-10, "atol": 1e-12}


def pair(teacher=VIT, student=VIT, depth=4, student_depth=3):
    """Return teacher and student, of one patch size, 32 and 16 wide."""
    return (
        tiny_backbone(teacher, depth=depth, dim=32, grid=GRID, patch_size=16, seed=1),
        tiny_backbone(student, depth=student_depth, dim=16, grid=GRID, patch_size=16, seed=2),
    )


def make(method, teacher, student, layers, seed=0, **options):
    distiller = method(teacher, student, layers, seed=seed, **options).to(F64)
    with torch.no_grad():  # off the start, where Wu is Wd's transpose
        for parameter in getattr(distiller, "adapters", torch.nn.Module()).parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            parameter += 0.1 * noise.to(F64)
    return distiller


def shared_and_patches(tokens, own_prefix, shared):
    return torch.cat([tokens[:, :shared], tokens[:, own_prefix:]], dim=1)


def normalised(backbone, images):
    mean, std = (
        torch.tensor(values, dtype=F64)[:, None, None]
        for values in FAMILIES[backbone.name].normalisation
    )
    return (images - mean) / std


def quantile_by_hand(values, quantile):
    ordered = sorted(values)
    position = quantile * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def outlier_by_hand(refined_patches):
    excess = []
    for image in refined_patches:
        norms = [(patch * patch).sum().sqrt() for patch in image]
        limit = quantile_by_hand([norm.item() for norm in norms], QUANTILE)
        excess += [(norm - limit) ** 2 for norm in norms if norm.item() > limit]
    return torch.stack(excess).mean()


def gram_by_hand(patches, target):
    total = 0.0
    for first, second in zip(patches, target, strict=True):
        first, second = (x / (x * x).sum(-1, keepdim=True).sqrt() for x in (first, second))
        total = total + ((first @ first.T - second @ second.T) ** 2).mean()
    return total / len(patches)


def run_teacher_block(teacher, index, tokens, images):
    """Run a block with the rotary embedding that its family needs, found without the package."""
    block = teacher.model.blocks[index]
    if teacher.name not in (DINOV3, ROPE_MIXED):
        return block(tokens)
    _, rope = teacher.model._pos_embed(teacher.model.patch_embed(normalised(teacher, images)))
    return block(tokens, rope=rope[index] if teacher.name == ROPE_MIXED else rope)


def tokens_of_both(method, images, shared):
    """Return the teacher's raw tokens, and per layer the shared (student, teacher) tokens."""
    teacher, student = method.teacher, method.student_backbone
    with torch.no_grad():
        raw = timm_tokens(teacher.model, normalised(teacher, images))
    learned = timm_tokens(method.student, normalised(student, images))
    aligned = {}
    for layer, student_layer in zip(method.layers, method.student_layers, strict=True):
        tokens = shared_and_patches(learned[student_layer], FAMILIES[student.name].prefix, shared)
        projection = method.projections[str(layer)]
        aligned[layer] = (
            tokens @ projection.weight.T + projection.bias,
            shared_and_patches(raw[layer], FAMILIES[teacher.name].prefix, shared),
        )
    return raw, aligned


def singer_by_hand(method, variant, images, shared, detach_kd=False):
    raw, aligned = tokens_of_both(method, images, shared)
    own_prefix = FAMILIES[method.teacher.name].prefix
    terms = {"kd": [], "outlier": [], "info": []}
    refined_before = None
    for layer in method.layers:
        student, plain = aligned[layer]
        adapter = method.adapters[str(layer)]
        patches = plain[:, shared:]
        refined_patches = patches + patches @ adapter.down @ adapter.up
        refined = torch.cat([plain[:, :shared], refined_patches], dim=1)
        followed = refined.detach() if detach_kd else refined
        terms["kd"].append(((student - followed) ** 2).mean())
        terms["outlier"].append(outlier_by_hand(refined_patches))
        if layer == method.layers[-1]:
            target = refined_before if variant == "official" and refined_before is not None else (
                patches
            )  # fmt: skip
            terms["info"].append(gram_by_hand(refined_patches, target))
            continue
        refined_before = refined_patches
        whole = torch.cat([raw[layer][:, :own_prefix], refined_patches], dim=1)
        after = run_teacher_block(method.teacher, layer + 1, whole, images)
        if variant == "official":
            terms["info"].append(((after - raw[layer + 1]) ** 2).mean())
        else:
            terms["info"].append(
                gram_by_hand(after[:, own_prefix:], raw[layer + 1][:, own_prefix:])
            )
    count = 1 if variant == "paper" else len(method.layers)
    return {name: sum(values) / count for name, values in terms.items()}


def assert_same(method, found, expected):
    """Compare the losses, and each one's gradient to every trainable parameter."""
    assert set(found) == set(expected)
    named = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    for key in expected:
        assert found[key].shape == ()
        assert found[key].dtype == F64
        torch.testing.assert_close(found[key], expected[key], **NEAR)
        gradients = [
            torch.autograd.grad(losses[key], parameters, retain_graph=True, materialize_grads=True)
            for losses in (found, expected)
        ]
        scale = max(gradient.abs().max().item() for gradient in gradients[1])
        assert scale > 0
        for (name, _), *both in zip(named, *gradients, strict=True):
            torch.testing.assert_close(
                *both, rtol=1e-9, atol=1e-11 * scale, msg=lambda m, at=(key, name): f"{at}: {m}"
            )


VARIANTS = pytest.mark.parametrize("variant", ["paper", "official"])


@VARIANTS
@pytest.mark.parametrize("layers", [None, [3], [1], [0, 3], [0, 1, 3], [0, 1, 2], [-1, 1]], ids=str)
def test_singer(variant, layers):
    method = make(
        SiNGER, *pair(), layers, variant=variant, rank=5, quantile=QUANTILE, outlier_weight=0.3
    )
    images = random_images(method.teacher, batch=3, dtype=F64)
    expected = singer_by_hand(method, variant, images, shared=1)
    expected["loss"] = expected["kd"] + 0.3 * expected["outlier"] + expected["info"]
    assert all(value > 1e-6 for value in expected.values())
    assert_same(method, method(images), expected)


@VARIANTS
@pytest.mark.parametrize(
    ("teacher", "student", "shared"),
    [
        (DEIT3, VIT, 1),
        (REG4, VIT, 1),
        (REG4, REG4, 5),
        (DINOV3, VIT, 1),
        (DINOV3, REG4, 5),
        (ROPE_MIXED, VIT, 1),
        (DISTILLED, VIT, 1),
        (REG4, DISTILLED, 1),  # a register is no distillation token
        (SIGLIP, VIT, 0),
        (VIT, SIGLIP, 0),
        (REG4, SIGLIP, 0),
        (SIGLIP, SIGLIP, 0),
        (VIT, DINOV3, 1),
    ],
)
def test_singer_between_families(variant, teacher, student, shared):
    """Registers and a missing CLS: shared tokens are distilled, all go through the next block."""
    method = make(
        SiNGER, *pair(teacher, student), [1, 3], variant=variant, rank=5, quantile=QUANTILE
    )
    assert method.num_prefix_tokens == shared
    images = random_images(method.teacher, dtype=F64)
    expected = singer_by_hand(method, variant, images, shared)
    expected["loss"] = expected["kd"] + 0.01 * expected["outlier"] + expected["info"]
    assert_same(method, method(images), expected)


@VARIANTS
@pytest.mark.parametrize("layers", [[3], [0, 1, 3]], ids=str)
def test_kd_can_be_detached_from_the_adapters(variant, layers):
    options = {"variant": variant, "rank": 5, "quantile": QUANTILE, "outlier_weight": 0.3}
    method = make(SiNGER, *pair(), layers, detach_kd=True, **options)
    images = random_images(method.teacher, batch=3, dtype=F64)
    expected = singer_by_hand(method, variant, images, shared=1, detach_kd=True)
    expected["loss"] = expected["kd"] + 0.3 * expected["outlier"] + expected["info"]
    found = method(images)
    assert_same(method, found, expected)
    attached = make(SiNGER, *pair(), layers, **options)(images)
    for name, value in attached.items():
        torch.testing.assert_close(found[name], value, **NEAR)
    adapters = list(method.adapters.parameters())
    kd, *_ = torch.autograd.grad(found["kd"], adapters, allow_unused=True)
    assert kd is None


@pytest.mark.parametrize(
    ("teacher", "student", "shared"),
    [(VIT, VIT, 1), (REG4, VIT, 1), (SIGLIP, VIT, 0), (DINOV3, REG4, 5)],
)
@pytest.mark.parametrize("layers", [None, [3], [0, 1, 3]], ids=str)
def test_fitnet(teacher, student, shared, layers):
    method = make(FitNet, *pair(teacher, student), layers, kd_weight=0.7)
    images = random_images(method.teacher, dtype=F64)
    _, aligned = tokens_of_both(method, images, shared)
    kd = sum(((mine - target) ** 2).mean() for mine, target in aligned.values())
    assert_same(method, method(images), {"loss": 0.7 * kd, "kd": kd})


def test_fitnets_layers_can_be_weighted():
    method = make(FitNet, *pair(), [1, 3], kd_weight=10.0, layer_weights=[0.5, 2.0])
    images = random_images(method.teacher, dtype=F64)
    _, aligned = tokens_of_both(method, images, 1)
    errors = {layer: ((mine - target) ** 2).mean() for layer, (mine, target) in aligned.items()}
    kd = 0.5 * errors[1] + 2.0 * errors[3]
    assert_same(method, method(images), {"loss": 10.0 * kd, "kd": kd})


@VARIANTS
def test_the_weights_weigh_their_terms(variant):
    weights = {"kd_weight": 2.0, "outlier_weight": 3.0, "info_weight": 5.0}
    method = make(SiNGER, *pair(), [1, 3], variant=variant, rank=5, **weights)
    found = method(random_images(method.teacher, dtype=F64))
    expected = 2 * found["kd"] + 3 * found["outlier"] + 5 * found["info"]
    torch.testing.assert_close(found["loss"], expected, rtol=1e-14, atol=0)


def test_the_variants_differ_where_they_should():
    images, found = None, {}
    for variant in ("paper", "official"):
        method = make(
            SiNGER, *pair(), [1, 3], variant=variant, selection="paper", rank=5, quantile=QUANTILE
        )
        images = random_images(method.teacher, dtype=F64)
        found[variant] = method(images)
    for term in ("kd", "outlier"):  # a sum against a mean, over two layers
        torch.testing.assert_close(found["paper"][term], 2 * found["official"][term], **NEAR)
    assert not torch.isclose(found["paper"]["info"], 2 * found["official"]["info"], rtol=0.1)


def test_the_official_gram_target_is_not_detached():
    """The last layer's information term moves the adapter of the layer before."""
    gradients = {}
    for variant in ("paper", "official"):
        method = make(SiNGER, *pair(), [1, 3], variant=variant, selection="paper", rank=5)
        images = random_images(method.teacher, dtype=F64)
        student, teacher = method.student_tokens(images), method.teacher_tokens(images)
        method._next_block_loss = lambda *_: torch.zeros((), dtype=F64)
        info = method.losses(student, teacher)["info"]
        gradients[variant] = torch.autograd.grad(
            info, method.adapters["1"].down, allow_unused=True
        )[0]
    assert gradients["paper"] is None
    assert gradients["official"].abs().max() > 1e-6


@VARIANTS
@pytest.mark.parametrize("layers", [[3], [1, 3]], ids=str)
def test_a_nan_image_shows_in_every_loss(variant, layers):
    methods = [
        make(SiNGER, *pair(), layers, variant=variant, rank=5),
        make(FitNet, *pair(), layers),
    ]
    images = random_images(methods[0].teacher, dtype=F64)
    with_nan = images.clone()
    with_nan[1, 0, 3, 4] = float("nan")
    for method in methods:
        assert all(value.isfinite() for value in method(images).values())
        assert all(value.isnan() for value in method(with_nan).values())


def test_single_precision_agrees_with_double():
    method = make(SiNGER, *pair(), [1, 3], rank=5, quantile=QUANTILE)
    images = random_images(method.teacher, dtype=F64)
    exact = method(images)
    single = method.float()(images.float())
    for name, value in single.items():
        assert value.dtype == torch.float32
        # Some 1e3 roundings of 2^-24 on the way through four blocks.
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=0)
