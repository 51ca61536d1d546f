"""The methods as modules: what trains, what stays frozen, what runs, what is saved."""

import pytest
import torch
from timm.optim import create_optimizer_v2
from tiny_models import (
    BEIT,
    DEIT3,
    DINOV3,
    DISTILLED,
    EVA02,
    PARALLEL,
    REG4,
    ROPE_MIXED,
    SIGLIP,
    VIT,
    generator,
    random_images,
    tiny_backbone,
)

from singer.config.schema import method_config
from singer.errors import SingerError
from singer.methods import METHODS, FitNet, SiNGER, ViTKD, ViTKDSameLayers
from singer.models.nullspace import nullspace_basis

RANK = 5
KINDS = [
    pytest.param(SiNGER, {"variant": "paper", "rank": RANK}, id="paper"),
    pytest.param(SiNGER, {"variant": "official", "rank": RANK}, id="official"),
    pytest.param(FitNet, {}, id="fitnet"),
    pytest.param(ViTKDSameLayers, {}, id="vitkd_same_layers"),
    pytest.param(ViTKD, {}, id="vitkd"),
]
OWN_PART = {
    SiNGER: {"adapters"},
    FitNet: set(),
    ViTKDSameLayers: {"generator"},
    ViTKD: {"generator"},
}
METHOD_NAMES = {kind: name for name, kind in METHODS.items()}
each_kind = pytest.mark.parametrize(("kind", "options"), KINDS)
each_at_any_layers = pytest.mark.parametrize(("kind", "options"), KINDS[:-1])
each_singer = pytest.mark.parametrize(("kind", "options"), KINDS[:2])


def teacher_of(name=VIT, **options):
    return tiny_backbone(name, depth=4, dim=32, patch_size=16, seed=1, **options)


def student_of(name=VIT, **options):
    return tiny_backbone(name, depth=3, dim=16, patch_size=16, seed=2, **options)


def layers_of(kind):
    return [3] if kind is ViTKD else [1, 3]


def make(kind, options, layers=None, teacher=VIT, student=VIT):
    return kind(teacher_of(teacher), student_of(student), layers or layers_of(kind), **options)


def block_inputs(backbone):
    """Record the shape of every block's input, in the order of the calls."""
    seen = []
    for index, block in enumerate(backbone.model.blocks):
        block.register_forward_pre_hook(
            lambda _, args, kwargs, index=index: seen.append((index, tuple(args[0].shape))),
            with_kwargs=True,
        )
    return seen


def train(method, steps, weight_decay=0.0, seed=0):
    trainable = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=weight_decay)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        losses = method(random_images(method.teacher, seed=seed + step))
        losses["loss"].backward()
        optimizer.step()
    return losses


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# --- the teacher ----------------------------------------------------------------------------------


@each_kind
def test_the_teacher_stands_outside_the_module(kind, options):
    method = make(kind, options)
    of_teacher = {id(p) for p in method.teacher.model.parameters()}
    modules_of_teacher = {id(m) for m in method.teacher.model.modules()}
    assert not of_teacher & {id(p) for p in method.parameters()}
    assert not modules_of_teacher & {id(m) for _, m in method.named_modules()}
    parts = {name.split(".")[0] for name in method.state_dict()}
    assert parts == {"student", "projections"} | OWN_PART[kind]
    own = {name for name in method.state_dict() if name.startswith("student.")}
    assert own == {f"student.{name}" for name in method.student.state_dict()}


@each_kind
def test_the_teacher_never_moves(kind, options):
    method = make(kind, options)
    method.train()
    before = snapshot(method.teacher.model)
    train(method, steps=4, weight_decay=0.1)
    after = method.teacher.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for parameter in method.teacher.model.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


@each_kind
def test_the_teacher_stays_in_evaluation_mode(kind, options):
    teacher = teacher_of()
    teacher.model.train()
    method = kind(teacher, student_of(), layers_of(kind), **options)
    method.train()
    assert not any(module.training for module in method.teacher.model.modules())
    assert all(module.training for module in method.student.modules())
    method.eval()
    assert not any(module.training for module in method.student.modules())


@each_kind
@pytest.mark.parametrize("training", [True, False])
def test_the_students_mode_and_frozen_weights_are_kept(kind, options, training):
    student = student_of()
    student.model.train(training)
    student.model.patch_embed.requires_grad_(False)
    method = kind(teacher_of(), student, layers_of(kind), **options)
    assert all(module.training is training for module in method.student.modules())
    assert not any(p.requires_grad for p in method.student.patch_embed.parameters())
    assert method.student.pos_embed.requires_grad
    assert all(p.grad is None for p in method.parameters())


@each_at_any_layers
@pytest.mark.parametrize(
    ("layers", "plain", "again"),
    [
        ([3], [0, 1, 2, 3], []),
        ([1, 3], [0, 1, 2, 3], [2]),
        ([0, 2], [0, 1, 2], [1]),  # block 3 is never needed
        ([1, 2], [0, 1, 2], [2]),
        ([0, 1, 3], [0, 1, 2, 3], [1, 2]),
        ([0], [0], []),
    ],
    ids=str,
)
def test_every_block_runs_once_and_the_next_ones_once_more(kind, options, layers, plain, again):
    method = make(kind, options, layers)
    calls, of_student = block_inputs(method.teacher), block_inputs(method.student_backbone)
    method(random_images(method.teacher))
    indices = [index for index, _ in calls]
    assert indices == plain + (again if kind is SiNGER else [])
    assert [index for index, _ in of_student] == [0, 1, 2]


@each_singer
@pytest.mark.parametrize(
    ("teacher", "student", "prefix", "shared"),
    [(REG4, VIT, 5, 1), (DINOV3, VIT, 5, 1), (DISTILLED, SIGLIP, 2, 0), (SIGLIP, VIT, 0, 0)],
)
def test_the_next_block_gets_all_of_the_teachers_tokens(
    kind, options, teacher, student, prefix, shared
):
    method = make(kind, options, teacher=teacher, student=student)
    calls = block_inputs(method.teacher)
    losses = method(random_images(method.teacher))
    assert [shape for _, shape in calls] == [(2, prefix + 4, 32)] * 5
    assert method.num_prefix_tokens == shared
    tokens = method.teacher_tokens(random_images(method.teacher))
    aligned = method.aligned_teacher(3, tokens)
    assert torch.equal(aligned[:, shared:], tokens[3][:, prefix:])
    assert torch.equal(aligned[:, :shared], tokens[3][:, :shared])
    assert all(value.isfinite() for value in losses.values())


@each_kind
def test_the_teacher_follows_the_module(kind, options):
    method = make(kind, options)
    assert method.to(torch.float64) is method
    found = {value.dtype for value in method.teacher.model.state_dict().values()}
    assert found == {torch.float64}
    losses = method(random_images(method.teacher, dtype=torch.float64))
    assert losses["loss"].dtype == torch.float64
    method.bfloat16()
    assert {p.dtype for p in method.teacher.model.parameters()} == {torch.bfloat16}
    method.to("meta")
    assert {p.device.type for p in method.teacher.model.parameters()} == {"meta"}
    assert not any(p.requires_grad for p in method.teacher.model.parameters())


@each_kind
def test_given_teacher_tokens_replace_the_teachers_run(kind, options):
    method = make(kind, options)
    images = random_images(method.teacher)
    torch.manual_seed(0)  # ViTKD draws masks
    expected = method(images)
    tokens = method.teacher_tokens(images)
    assert set(tokens.tokens) == set(method.teacher_layers)
    assert not any(value.requires_grad for value in tokens.tokens.values())
    calls = block_inputs(method.teacher)
    torch.manual_seed(0)
    found = method(images, tokens)
    assert [index for index, _ in calls] == ([2] if kind is SiNGER else [])
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- what trains ----------------------------------------------------------------------------------

STUDENTS = [VIT, DEIT3, SIGLIP, DISTILLED, REG4, DINOV3, EVA02, ROPE_MIXED, BEIT, PARALLEL]
UNUSED = {  # what a student holds besides what its block tokens depend on
    SIGLIP: {"norm", "attn_pool"},
    EVA02: {"fc_norm"},
    BEIT: {"fc_norm"},
}


@each_kind
@pytest.mark.parametrize("student", STUDENTS)
def test_every_trainable_parameter_has_a_gradient_and_moves(kind, options, student):
    method = make(kind, options, student=student)
    method.train()
    before = snapshot(method)
    train(method, steps=1)
    for name, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert (parameter.grad != 0).any(), name
            assert not torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is None, name
            assert torch.equal(parameter, before[name]), name


@each_kind
@pytest.mark.parametrize("student", STUDENTS)
def test_what_the_tokens_do_not_depend_on_is_frozen(kind, options, student):
    method = make(kind, options, student=student)
    unused = UNUSED.get(student, {"norm"})
    if kind is ViTKD:  # it reads the final norm
        unused = unused - {"norm", "fc_norm"}
    for name, parameter in method.student.named_parameters():
        assert parameter.requires_grad == (name.split(".")[0] not in unused), name
    others = [p for n, p in method.named_parameters() if not n.startswith("student.")]
    assert others
    assert all(p.requires_grad for p in others)


@each_kind
def test_training_lowers_the_loss(kind, options):
    method = make(kind, options)
    method.train()
    images = random_images(method.teacher, seed=9)
    with torch.no_grad():
        before = method(images)["loss"]
    for _ in range(3):
        train(method, steps=5, seed=9)
    with torch.no_grad():
        assert method(images)["loss"] < before


def test_the_last_student_block_is_trained_at_equal_depths():
    student = tiny_backbone(VIT, depth=4, dim=16, patch_size=16)
    method = FitNet(teacher_of(), student)
    assert method.layers == method.student_layers == [2, 3]


def test_the_teacher_runs_without_gradient():
    method = make(FitNet, {})
    images = random_images(method.teacher).requires_grad_()
    assert not any(tokens.requires_grad for tokens in method.teacher_tokens(images).tokens.values())
    assert method.student_tokens(images)[2].requires_grad


def test_a_student_of_another_dtype_is_taken():
    student = student_of()
    student.model.double()
    method = FitNet(teacher_of(), student, [3])
    assert not method.student.norm.weight.requires_grad
    assert method.student.pos_embed.requires_grad


# --- the initialisation ---------------------------------------------------------------------------


@each_singer
@pytest.mark.parametrize("linearization", ["mlp", "mlp_folded", "block", "jacobian", "random"])
def test_adapters_start_at_the_nullspace_of_the_block_that_follows(kind, options, linearization):
    images = random_images(teacher_of())
    method = kind(
        teacher_of(),
        student_of(),
        [0, 1, 3],
        linearization=linearization,
        images=images,
        seed=7,
        **options,
    )
    assert list(method.adapters) == ["0", "1", "3"]
    for layer, block in ((0, 1), (1, 2), (3, 3)):  # the last layer's own block stands for it
        adapter, basis = method.adapters[str(layer)], method.bases[layer]
        seed = 7 * 4096 + layer  # each layer draws what is random anew
        expected = nullspace_basis(
            teacher_of(), block, RANK, linearization, options["variant"], images=images, seed=seed
        )
        assert (basis.block, basis.linearization) == (block, linearization)
        assert torch.equal(basis.vectors, expected.vectors)
        assert torch.equal(adapter.down.detach(), expected.vectors)
        assert torch.equal(adapter.up.detach(), expected.vectors.T)


def test_the_selection_and_its_threshold_can_be_chosen():
    options = {"rank": RANK, "variant": "paper", "selection": "official", "threshold": 100.0}
    method = SiNGER(teacher_of(), student_of(), [3], **options)
    expected = nullspace_basis(teacher_of(), 3, RANK, "mlp", "official", 100.0)
    assert torch.equal(method.adapters["3"].down.detach(), expected.vectors)
    paper = nullspace_basis(teacher_of(), 3, RANK, "mlp", "paper")
    assert not torch.equal(expected.vectors, paper.vectors)


@each_kind
def test_projections_can_start_at_the_identity(kind, options):
    def build(init, dim):
        student = tiny_backbone(VIT, depth=3, dim=dim, patch_size=16, seed=2)
        return kind(teacher_of(), student, layers_of(kind), projection_init=init, **options)

    method = build("identity", 32)
    student = method.student_tokens(random_images(method.teacher))
    for layer, block in zip(method.layers, method.student_layers, strict=True):
        projected = method.projected_student(layer, student)
        own = student[block]
        if kind is ViTKD and layer == 3:
            own = method.student_backbone.final_norm(own)
        assert torch.equal(projected, own)
    assert all(p.requires_grad for p in method.projections.parameters())
    for name, value in build("random", 32).projections.state_dict().items():
        assert not torch.equal(method.projections.state_dict()[name], value)
    message = r"method\.projection_init: got 'identity' for tokens of width 16 .* and 32"
    with pytest.raises(SingerError, match=message):
        build("identity", 16)
    defaults = {key: f.default for key, f in method_config(METHOD_NAMES[kind]).model_fields.items()}
    with pytest.raises(SingerError, match=message):
        kind.check(
            teacher_of(),
            student_of(),
            {**defaults, "layers": layers_of(kind), "projection_init": "identity"},
        )


def test_methods_with_one_seed_have_the_same_projections():
    torch.manual_seed(1)
    fitnet = FitNet(teacher_of(), student_of(), [1, 3], seed=4)
    torch.manual_seed(2)
    singer = SiNGER(teacher_of(), student_of(), [1, 3], seed=4, rank=RANK)
    other = FitNet(teacher_of(), student_of(), [1, 3], seed=5)
    ours, theirs = fitnet.projections.state_dict(), singer.projections.state_dict()
    assert set(ours) == set(theirs) == {f"{i}.{n}" for i in (1, 3) for n in ("weight", "bias")}
    assert ours["3.weight"].shape == (32, 16)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name])
        assert not torch.equal(value, other.projections.state_dict()[name])


@each_kind
def test_the_construction_leaves_the_global_random_state_alone(kind, options):
    """Methods compared with one seed must go on to draw the same dropouts and augmentations."""
    teacher, student = teacher_of(), student_of()
    torch.manual_seed(6)
    state = torch.random.get_rng_state()
    kind(teacher, student, layers_of(kind), **options)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- what is saved and told -----------------------------------------------------------------------


@each_kind
def test_exports(kind, options):
    method = make(kind, options)
    exports = method.exports()
    expected = {"projections": method.projections}
    if kind is SiNGER:
        expected["adapters"] = method.adapters
        assert set(exports["adapters"]) == {"1.down", "1.up", "3.down", "3.up"}
    if "generator" in OWN_PART[kind]:
        expected["generator"] = method.generator
    assert set(exports) == set(expected)
    for name, module in expected.items():
        tensors = dict(module.named_parameters())
        assert set(exports[name]) == set(tensors)
        assert all(torch.equal(exports[name][key], tensors[key]) for key in tensors)


@each_singer
@pytest.mark.parametrize(("teacher", "student"), [(VIT, VIT), (REG4, VIT), (SIGLIP, VIT)])
def test_refined_teacher(kind, options, teacher, student):
    method = make(kind, options, teacher=teacher, student=student)
    with torch.no_grad():
        for parameter in method.adapters.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator(3))
        images = random_images(method.teacher)
        tokens = method.teacher_tokens(images)
        out = method.adapters["1"](
            method.projected_student(1, method.student_tokens(images)),
            method.aligned_teacher(1, tokens),
        )
        # One product of 5 terms, added in one step or in two.
        torch.testing.assert_close(method.refined_teacher(1, tokens), out.refined)
        for layer in (1, 3):
            adapter, plain = method.adapters[str(layer)], method.aligned_teacher(layer, tokens)
            expected = plain.clone()
            patches = expected[:, method.num_prefix_tokens :]
            patches += patches @ adapter.down @ adapter.up
            found = method.refined_teacher(layer, tokens)
            # float32 products of 32 and 5 terms of order 1
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert not torch.allclose(found, plain, atol=1e-2)


@each_kind
@pytest.mark.parametrize("student", [VIT, DISTILLED, SIGLIP, REG4, EVA02])
def test_no_weight_decay_is_the_students_own(kind, options, student):
    method = make(kind, options, student=student)
    named = dict(method.named_parameters())
    found = {name for name in method.no_weight_decay() if name in named}
    students = dict(method.student.named_parameters())
    assert found == {f"student.{n}" for n in method.student.no_weight_decay() if n in students}
    assert "student.pos_embed" in found
    optimizer = create_optimizer_v2(method, opt="adamw", lr=1e-3, weight_decay=0.1)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {decay[id(named[name])] for name in found} == {0.0}
    assert decay[id(method.projections["3"].weight)] == 0.1


def test_a_student_without_such_a_list_has_none():
    student = student_of()
    student.model.no_weight_decay = set
    assert FitNet(teacher_of(), student, [3]).no_weight_decay() == set()


# --- what is refused ------------------------------------------------------------------------------


@each_kind
def test_grids_that_differ_are_refused(kind, options):
    with pytest.raises(SingerError, match=r"3x3 patches, the teacher into 2x2"):
        kind(teacher_of(), student_of(grid=3), **options)


@each_at_any_layers
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], r"method\.layers: got 4, expected -4 to 3"),
        ([3, -1], r"method\.layers: .*twice"),
        ([], r"method\.layers: got no layer"),
        ([0, 1, 2, 3], r"method\.layers: got 4 layers, expected at most 3"),
    ],
)
def test_wrong_layers_are_refused(kind, options, layers, message):
    with pytest.raises(SingerError, match=message):
        kind(teacher_of(), student_of(), layers, **options)


def test_wrong_options_are_refused():
    for options, message in (
        ({"variant": "papper"}, r"method\.variant: got 'papper', expected paper or official"),
        ({"rank": 33}, r"method\.rank: got 33, expected 1 to 32"),
        ({"rank": 4, "linearization": "jacobian"}, "calibration batch of images"),
    ):
        with pytest.raises(SingerError, match=message):
            SiNGER(teacher_of(), student_of(), [3], **options)
    options = {"layers": [1, 3], "layer_weights": [1.0]}
    message = r"method\.layer_weights: got 1 weights, expected 2, .* layers \[1, 3\]"
    with pytest.raises(SingerError, match=message):
        FitNet(teacher_of(), student_of(), **options)
    with pytest.raises(SingerError, match=message):
        FitNet.check(teacher_of(), student_of(), options)


def test_methods_are_known_by_name():
    assert dict(METHODS) == {
        "singer": SiNGER,
        "fitnet": FitNet,
        "vitkd": ViTKD,
        "vitkd_same_layers": ViTKDSameLayers,
    }
