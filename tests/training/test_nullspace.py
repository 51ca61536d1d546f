"""The adapter's initialisation: linearised blocks, and the directions that they ignore."""

import logging

import numpy as np
import pytest
import torch
from timm.layers import RmsNorm
from tiny_models import (
    BEIT,
    DEIT3,
    DINOV2,
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

from singer.errors import SingerError
from singer.models.nullspace import linearize, nullspace_basis, select_vectors

F64 = torch.float64
PLAIN = [VIT, DEIT3, DINOV2, REG4, SIGLIP, DINOV3, ROPE_MIXED, BEIT, DISTILLED]
CLOSED_FORMS = ["mlp", "mlp_folded", "block"]
SCALE = dict.fromkeys([DEIT3, DINOV2, REG4], "ls{}.gamma") | dict.fromkeys(
    [DINOV3, ROPE_MIXED, BEIT], "gamma_{}"
)


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def array(tensor):
    return tensor.detach().double().numpy()


def orthonormal(dim, count, seed=0):
    return torch.linalg.qr(randn(dim, count, seed=seed))[0]


def plant(block, matrix):
    """Make the block's MLP have ``(fc2 fc1)ᵀ = matrix``, up to the weights' rounding."""
    dim = matrix.shape[0]
    with torch.no_grad():
        block.mlp.fc1.weight.zero_()[:dim] = matrix.T
        block.mlp.fc2.weight.zero_()[:, :dim] = torch.eye(dim)


def planted_spectrum(values, seed=0):
    """Return a backbone whose MLP of block 1 has these singular values, and its vectors."""
    dim = len(values)
    left, right = orthonormal(dim, dim, seed), orthonormal(dim, dim, seed + 1)
    backbone = tiny_backbone(VIT, depth=2, dim=dim)
    backbone.model.double()
    plant(backbone.block(1), left * torch.tensor(values, dtype=F64) @ right.T)
    return backbone, left


# --- closed forms ---------------------------------------------------------------------------------


def folded(block, name, which, first, second):
    """Push each basis vector through LayerNorm's linear part, two matrices and LayerScale."""
    norm = array(getattr(block, f"norm{which}").weight)
    scale = array(block.get_parameter(SCALE[name].format(which))) if name in SCALE else 1.0
    rows = []
    for direction in np.eye(len(norm)):
        normed = (direction - direction.mean()) * norm
        rows.append(scale * (second @ (first @ normed)))
    return np.array(rows)


@pytest.mark.parametrize("name", PLAIN)
def test_the_closed_forms_are_what_they_say(name):
    backbone = tiny_backbone(name)
    block = backbone.block(1)
    fc1, fc2 = array(block.mlp.fc1.weight), array(block.mlp.fc2.weight)
    value = np.split(array(block.attn.qkv.weight), 3)[2]
    mlp = folded(block, name, 2, fc1, fc2)
    attention = folded(block, name, 1, value, array(block.attn.proj.weight))
    expected = {
        "mlp": np.array([fc2 @ (fc1 @ direction) for direction in np.eye(32)]),
        "mlp_folded": mlp,
        "block": np.concatenate([attention, mlp], axis=1),
    }
    for linearization, matrix in expected.items():
        found, used = linearize(backbone, 1, linearization)
        assert used == linearization
        assert found.dtype == F64
        assert not found.requires_grad
        # float64 sums of at most 4 D products of order 1
        np.testing.assert_allclose(found.numpy(), matrix, rtol=1e-12, atol=1e-13)


def test_a_separate_value_projection_is_read():
    backbone = tiny_backbone(DINOV3, qkv_fused=False)
    block = backbone.block(1)
    attention = folded(
        block, DINOV3, 1, array(block.attn.v_proj.weight), array(block.attn.proj.weight)
    )
    found, used = linearize(backbone, 1, "block")
    assert used == "block"
    np.testing.assert_allclose(found[:, :32].numpy(), attention, rtol=1e-12, atol=1e-13)


def test_rmsnorm_does_not_centre():
    backbone = tiny_backbone(VIT, norm_layer=RmsNorm)
    block = backbone.block(1)
    scaled = array(block.mlp.fc1.weight) * array(block.norm2.weight)
    found, used = linearize(backbone, 1, "mlp_folded")
    assert used == "mlp_folded"
    expected = (array(block.mlp.fc2.weight) @ scaled).T
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", [VIT, DINOV3, BEIT])
def test_layernorm_ignores_the_mean(name):
    backbone = tiny_backbone(name)
    images = random_images(backbone, dtype=F64)
    backbone.model.double()
    ones = torch.ones(32, dtype=F64) / 32**0.5
    # The Jacobian's W̃ is the square root of a sum with float64's relative error, 2e-16.
    for linearization, bound in (("mlp_folded", 1e-13), ("block", 1e-13), ("jacobian", 1e-7)):
        matrix, _ = linearize(backbone, 1, linearization, images)
        assert (ones @ matrix).norm() < bound * torch.linalg.matrix_norm(matrix, 2), linearization
    matrix, _ = linearize(backbone, 1, "mlp")
    assert (ones @ matrix).norm() > 0.1


# --- selection ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 5, 32])
@pytest.mark.parametrize("linearization", CLOSED_FORMS)
def test_paper_takes_the_smallest_singular_values(linearization, rank):
    backbone = tiny_backbone(DEIT3)
    basis = nullspace_basis(backbone, 1, rank, linearization)
    matrix = linearize(backbone, 1, linearization)[0].numpy()
    values = np.linalg.svd(matrix, compute_uv=False)
    assert basis.vectors.dtype == torch.float32
    assert basis.vectors.shape == (32, rank)
    assert (basis.linearization, basis.block, basis.num_random) == (linearization, 1, 0)
    vectors = array(basis.vectors)
    # N is rounded to float32: an error of 2^-24 per entry, of σ_max √(D r) 2^-24 in Nᵀ W̃.
    rounding = values[0] * (32 * rank) ** 0.5 * 2**-24
    found = np.linalg.svd(vectors.T @ matrix, compute_uv=False)
    np.testing.assert_allclose(found, values[-rank:], rtol=0, atol=2 * rounding)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(rank), atol=rank * 2**-23)
    np.testing.assert_allclose(basis.singular_values.numpy(), values, atol=1e-13 * values[0])
    np.testing.assert_allclose(basis.selected.numpy(), values[-rank:][::-1], atol=1e-13 * values[0])


SPECTRUM = [9.0, 5.0, 2.0, 1.0, 0.04, 0.03, 0.02, 0.01]


@pytest.mark.parametrize(
    ("selection", "threshold", "rank", "columns"),
    [
        ("paper", 0.05, 3, [5, 6, 7]),
        ("paper", 0.001, 2, [6, 7]),  # the threshold is none of the paper's
        ("official", 0.05, 3, [4, 5, 6]),  # the least null of the four below it
        ("official", 0.05, 4, [4, 5, 6, 7]),
        ("official", 0.025, 1, [6]),
        ("official", 0.05, 6, [4, 5, 6, 7]),  # and two random ones
        ("official", 0.001, 3, []),
        ("official", 100.0, 3, [0, 1, 2]),
    ],
)
def test_each_selection_takes_its_vectors_in_order(selection, threshold, rank, columns):
    backbone, left = planted_spectrum(SPECTRUM)
    basis = nullspace_basis(backbone, 1, rank, "mlp", selection, threshold)
    assert basis.num_random == rank - len(columns)
    assert basis.vectors.shape == (8, rank)
    cosines = (left.T @ basis.vectors.double()).abs()  # [8, r]
    for position, column in enumerate(columns):
        assert cosines[column, position] > 1 - 1e-6
    torch.testing.assert_close(basis.vectors.norm(dim=0), torch.ones(rank), rtol=0, atol=8 * 2**-24)
    expected = torch.tensor([SPECTRUM[column] for column in reversed(columns)], dtype=F64)
    torch.testing.assert_close(basis.selected, expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(
        basis.singular_values, torch.tensor(SPECTRUM, dtype=F64), rtol=1e-6, atol=1e-12
    )


def test_padding_is_random_by_seed_and_logged(caplog):
    backbone, _ = planted_spectrum(SPECTRUM)
    with caplog.at_level(logging.WARNING, "singer"):
        first = nullspace_basis(backbone, 1, 6, "mlp", "official", seed=0).vectors
    assert "4 singular values lie below 0.05, so 2 of the 6 directions are random" in caplog.text
    again = nullspace_basis(backbone, 1, 6, "mlp", "official", seed=0).vectors
    other = nullspace_basis(backbone, 1, 6, "mlp", "official", seed=1).vectors
    assert torch.equal(first, again)
    assert torch.equal(first[:, :4], other[:, :4])
    assert ((first[:, 4:] * other[:, 4:]).sum(0).abs() < 0.999).all()
    assert (first[:, 4] @ first[:, 5]).abs() < 0.999
    caplog.clear()
    nullspace_basis(backbone, 1, 4, "mlp", "official")
    assert not caplog.records


def test_padding_can_be_orthonormal():
    backbone, _ = planted_spectrum(SPECTRUM)
    gaussian, orthonormal = (
        nullspace_basis(backbone, 1, 6, "mlp", "official", random_vectors=kind)
        for kind in ("gaussian", "orthonormal")
    )
    assert torch.equal(gaussian.vectors[:, :4], orthonormal.vectors[:, :4])
    assert gaussian.num_random == orthonormal.num_random == 2
    gram = array(orthonormal.vectors).T @ array(orthonormal.vectors)
    np.testing.assert_allclose(gram, np.eye(6), atol=8 * 2**-23)
    by_default = nullspace_basis(backbone, 1, 6, "mlp", "official")
    assert torch.equal(by_default.vectors, gaussian.vectors)
    with pytest.raises(SingerError, match="random_vectors: got 'other', expected one of"):
        nullspace_basis(backbone, 1, 6, random_vectors="other")


def test_a_random_basis_can_be_gaussian():
    """As the authors' code draws it: of length 1, at any angle."""
    vectors = nullspace_basis(tiny_backbone(EVA02), 2, 32, "random", "official").vectors.double()
    torch.testing.assert_close(vectors.norm(dim=0), torch.ones(32, dtype=F64), rtol=1e-6, atol=0)
    cosines = (vectors.T @ vectors)[~torch.eye(32, dtype=bool)]
    # Of 992 cosines of random directions in 32 dimensions, each of variance 1/32: the sample's
    # variance lies within 5 of its standard deviations, (2 / 496)^½, relatively.
    assert abs(32 * cosines.square().mean() - 1) < 5 * (2 / 496) ** 0.5


def test_selection_serves_a_wide_matrix():
    matrix = randn(6, 12)
    vectors, values, chosen, num_random = select_vectors(matrix, 2, "paper", 0.05, generator(0))
    expected = np.linalg.svd(matrix.numpy(), compute_uv=False)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(chosen.numpy(), expected[[5, 4]], rtol=1e-12)
    found = torch.linalg.vector_norm(vectors.T @ matrix, dim=1)
    np.testing.assert_allclose(found.numpy(), expected[4:], rtol=1e-12)
    assert num_random == 0


@pytest.mark.parametrize("rank", [1, 7, 32])
def test_a_random_basis_is_orthonormal_and_of_no_block(rank):
    backbone = tiny_backbone(EVA02)
    basis = nullspace_basis(backbone, 2, rank, "random", seed=3)
    assert basis.vectors.shape == (32, rank)
    gram = array(basis.vectors).T @ array(basis.vectors)
    np.testing.assert_allclose(gram, np.eye(rank), atol=rank * 2**-23)
    assert (basis.linearization, basis.block, basis.num_random) == ("random", 2, 0)
    assert basis.singular_values.numel() == basis.selected.numel() == 0
    again = nullspace_basis(backbone, 2, rank, "random", seed=3)
    other = nullspace_basis(backbone, 2, rank, "random", seed=4)
    assert torch.equal(basis.vectors, again.vectors)
    assert not torch.allclose(basis.vectors, other.vectors, atol=1e-3)


# --- blocks that no closed form describes ---------------------------------------------------------


@pytest.mark.parametrize("name", [EVA02, PARALLEL])
@pytest.mark.parametrize("linearization", CLOSED_FORMS)
def test_other_blocks_are_measured(name, linearization, caplog):
    backbone = tiny_backbone(name, dim=16)
    images = random_images(backbone)
    with caplog.at_level(logging.WARNING, "singer"):
        basis = nullspace_basis(backbone, 1, 3, linearization, images=images)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert repr(linearization) in record.message
    assert "block 1" in record.message
    assert basis.linearization == "jacobian"
    caplog.clear()
    measured = nullspace_basis(backbone, 1, 3, "jacobian", images=images)
    assert torch.equal(basis.vectors, measured.vectors)
    assert not caplog.records
    with pytest.raises(SingerError, match=rf"block 1 of {name} needs 'jacobian'.*images"):
        nullspace_basis(backbone, 1, 3, linearization)


def test_jacobian_needs_images():
    with pytest.raises(SingerError, match="needs a calibration batch of images"):
        nullspace_basis(tiny_backbone(VIT), 1, 3, "jacobian")


def test_a_normalisation_inside_the_attention_is_no_plain_value_path():
    for options in ({"scale_attn_norm": True}, {"attn_layer": "diff"}):
        backbone = tiny_backbone(VIT, dim=16, **options)
        assert linearize(backbone, 1, "mlp_folded")[1] == "mlp_folded"
        _, used = linearize(backbone, 1, "block", random_images(backbone))
        assert used == "jacobian", options


def test_a_normalisation_inside_the_mlp_is_no_plain_mlp():
    backbone = tiny_backbone(VIT, dim=16, scale_mlp_norm=True)
    for linearization in CLOSED_FORMS:
        assert linearize(backbone, 1, linearization, random_images(backbone))[1] == "jacobian"


# --- what is refused, and what is left as it was --------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 33}, r"method\.rank: got 33, expected 1 to 32"),
        ({"rank": 0}, r"method\.rank: got 0, expected 1 to 32"),
        ({"linearization": "hessian"}, "linearization: got 'hessian'.*mlp, mlp_folded, block"),
        ({"selection": "best"}, "selection: got 'best', expected one of paper, official"),
        ({"linearization": "random", "rank": 33}, r"method\.rank: got 33"),
    ],
)
def test_wrong_options_are_refused(changes, message):
    options = {"rank": 4, "linearization": "mlp", "selection": "paper"} | changes
    with pytest.raises(SingerError, match=message):
        nullspace_basis(tiny_backbone(VIT), 1, **options)


@pytest.mark.parametrize("linearization", [*CLOSED_FORMS, "jacobian", "random"])
@pytest.mark.parametrize("selection", ["paper", "official"])
def test_the_model_and_the_global_random_state_are_left_alone(linearization, selection):
    backbone = tiny_backbone(DEIT3)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    images = random_images(backbone)
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    # Nothing lies below this threshold, so that `official` draws random vectors.
    options = {"linearization": linearization, "selection": selection, "threshold": 1e-9}
    first = nullspace_basis(backbone, 1, 5, images=images, seed=2, **options)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(3)
    second = nullspace_basis(backbone, 1, 5, images=images, seed=2, **options)
    assert torch.equal(first.vectors, second.vectors)
    assert not first.vectors.requires_grad
    after = backbone.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None and p.requires_grad for p in backbone.model.parameters())
    assert not any(module._forward_pre_hooks for module in backbone.model.modules())
