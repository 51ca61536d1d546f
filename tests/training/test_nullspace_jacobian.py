"""The measured Jacobian against the exact one, and what a nullspace means for the block."""

import itertools

import pytest
import torch
from tiny_models import (
    BEIT,
    DINOV3,
    EVA02,
    PARALLEL,
    REG4,
    SIGLIP,
    VIT,
    ShiftedLinearBlock,
    generator,
    random_images,
    tiny_backbone,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from singer.errors import SingerError
from singer.models.nullspace import measure_jacobian, nullspace_basis

F64 = torch.float64
LINEARIZATIONS = ["mlp", "mlp_folded", "block", "jacobian"]


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=generator(seed))


def orthonormal(matrix):
    return torch.linalg.qr(matrix)[0]


def test_a_jacobian_that_is_not_finite_is_refused():
    backbone = tiny_backbone(VIT, depth=4, grid=4).freeze()
    backbone.model.blocks[2].norm1.weight.fill_(1e30)
    with pytest.raises(
        SingerError, match=r"Jacobian of block 2 .* largest weight is blocks\.2\.norm1\.weight, 1e"
    ):
        nullspace_basis(backbone, 2, 4, "jacobian", images=random_images(backbone, batch=2))


def double_backbone(name, **options):
    backbone = tiny_backbone(name, **options).freeze()
    backbone.model.double()
    return backbone


def added(backbone, layer, call):
    return lambda x: backbone.run_block(layer, x, call) - x


# --- the measurement ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VIT, REG4, SIGLIP])
def test_a_linear_block_is_measured_exactly(name):
    """Token by token, the signs cancel: ``W̃ = (A Aᵀ)^½`` whatever they are."""
    backbone = double_backbone(name, dim=8)
    matrix = randn(8, 8)
    matrix[2] = 0  # a direction that the block ignores
    backbone.model.blocks[1] = ShiftedLinearBlock(matrix)
    images = random_images(backbone, batch=3, dtype=F64)
    left, values, _ = torch.linalg.svd(matrix)
    expected = (left * values) @ left.T
    for seed in (0, 1):
        found = measure_jacobian(backbone, 1, images, seed)
        assert found.dtype == F64
        assert torch.equal(found, found.T) or torch.allclose(found, found.T, atol=1e-12)
        # A square root of an energy that is exact to 1e-15: 0 comes back as up to 1e-7.
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-6)
        torch.testing.assert_close(found @ found, matrix @ matrix.T, rtol=1e-11, atol=1e-11)


def patch_jacobians(backbone, layer, images):
    """Return the exact Jacobians ``[B, P, T·D, D]`` of what the block adds, one per patch."""
    tokens, call = backbone.block_input(images, layer)
    jacobians = []
    with sdpa_kernel(SDPBackend.MATH):
        for image in tokens:
            whole = torch.func.jacrev(added(backbone, layer, call))(image[None])
            whole = whole[0, :, :, 0].flatten(0, 1)  # [T·D, T, D]
            jacobians.append(whole[:, backbone.num_prefix_tokens :].transpose(0, 1))
    return torch.stack(jacobians)


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        *((name, 32) for name in (VIT, EVA02, BEIT)),
        *(
            pytest.param(name, 64, marks=pytest.mark.slow)
            for name in (VIT, REG4, EVA02, PARALLEL, BEIT)
        ),
    ],
)
def test_every_measurement_is_that_of_one_sign_per_patch(name, seeds):
    backbone = double_backbone(name, dim=8)
    images = random_images(backbone, batch=1, dtype=F64)
    (jacobians,) = patch_jacobians(backbone, 1, images)  # [4, T·D, 8]
    energies = []
    for signs in itertools.product([1.0, -1.0], repeat=3):  # a common sign changes nothing
        change = torch.einsum("p,pok->ok", torch.tensor([1.0, *signs], dtype=F64), jacobians)
        energies.append(change.T @ change / 4)
    energies = torch.stack(energies)
    seen = set()
    for seed in range(seeds):
        matrix = measure_jacobian(backbone, 1, images, seed)
        errors = (matrix @ matrix - energies).abs().amax((1, 2))
        assert errors.min() < 1e-11 * energies.abs().max()
        seen.add(errors.argmin().item())
    assert seen == set(range(8))


@pytest.mark.slow
def test_measurements_average_to_the_sum_over_patches():
    backbone = double_backbone(VIT, dim=8)
    images = random_images(backbone, batch=2, dtype=F64)
    jacobians = patch_jacobians(backbone, 1, images)  # [2, 4, T·D, 8]
    exact = torch.einsum("bpok,bpol->kl", jacobians, jacobians) / 8
    cross = torch.einsum("bpok,bqol->bpqkl", jacobians, jacobians)
    variance = torch.zeros(8, 8, dtype=F64)
    for first, second in itertools.combinations(range(4), 2):
        # ε_p ε_q of different pairs (and images) are uncorrelated, with mean 0 and variance 1.
        pair = cross[:, first, second] + cross[:, second, first]
        variance += pair.square().sum(0) / 8**2
    count = 300
    mean = torch.zeros(8, 8, dtype=F64)
    for seed in range(count):
        matrix = measure_jacobian(backbone, 1, images, seed)
        mean += matrix @ matrix / count
    # Five standard errors: by chance, one of 36 entries would miss once in 50,000 choices of seeds.
    bound = 5 * (variance / count).sqrt() + 1e-12
    assert ((mean - exact).abs() < bound).all()
    without_signs = jacobians.sum(1)
    biased = torch.einsum("bok,bol->kl", without_signs, without_signs) / 8
    assert ((biased - exact).abs() > bound).any()


def test_prefix_tokens_are_not_moved_but_their_change_counts():
    """Registers that alone attend to the patches: all change is theirs, none comes from them."""
    backbone = double_backbone(REG4, dim=8)

    class Summing(torch.nn.Module):
        def forward(self, x, attn_mask=None, is_causal=False):
            prefix, patches = x[:, :5], x[:, 5:]
            moved = prefix * 4 + patches.sum(1, keepdim=True) * 2  # 3 · prefix + 2 · sum
            return torch.cat([moved, patches], dim=1)

    backbone.model.blocks[1] = Summing()
    images = random_images(backbone, batch=1, dtype=F64)
    # Each of 5 tokens changes by 2 (Σ ε) e_k, so that the energy is 5 · 4 (Σ ε)² / 4 patches.
    allowed = torch.tensor([0.0, 5 * 4 * 4 / 4, 5 * 4 * 16 / 4], dtype=F64)
    for seed in range(5):
        matrix = measure_jacobian(backbone, 1, images, seed)
        energy = matrix @ matrix
        torch.testing.assert_close(energy, energy[0, 0] * torch.eye(8, dtype=F64))
        assert (energy[0, 0] - allowed).abs().min() < 1e-9


def test_the_seed_decides():
    backbone = double_backbone(VIT, dim=8)
    images = random_images(backbone, batch=2, dtype=F64)
    first, again, other = (measure_jacobian(backbone, 1, images, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_single_precision_is_measured_nearly_as_double():
    images = random_images(tiny_backbone(VIT, dim=16), dtype=F64)
    exact = measure_jacobian(double_backbone(VIT, dim=16), 1, images)
    single = measure_jacobian(tiny_backbone(VIT, dim=16).freeze(), 1, images.float())
    assert single.dtype == F64
    difference = single @ single - exact @ exact
    # Each change has a relative error of some 2^-24 · √(operations per entry, about 1e3).
    assert difference.norm() < 1e-4 * (exact @ exact).norm()


# --- what it means --------------------------------------------------------------------------------

RANK, DIM = 6, 32


@torch.no_grad()
def plant_nullspace(backbone, fold_weight, value_rank=RANK):
    """Make block 1 ignore RANK directions exactly, to first order; return them, ``[D, RANK]``.

    The MLP and the attention read nothing of the directions, and nothing before writes any of
    them: then the tokens have no component there that LayerNorm's scale would depend on.
    """
    model, block = backbone.model, backbone.block(1)
    centred = randn(DIM, RANK, seed=1)
    null = orthonormal(centred - centred.mean(0))
    keep = torch.eye(DIM, dtype=F64) - null @ null.T
    for parameter in (model.cls_token, model.pos_embed):
        parameter.copy_(parameter @ keep)
    projection = model.patch_embed.proj
    projection.weight.copy_(torch.einsum("de,ecij->dcij", keep, projection.weight))
    projection.bias.copy_(keep @ projection.bias)
    for linear in (
        model.blocks[0].attn.proj,
        model.blocks[0].mlp.fc2,
        block.attn.proj,
    ):
        linear.weight.copy_(keep @ linear.weight)
        linear.bias.copy_(keep @ linear.bias)
    for norm in (block.norm1, block.norm2):
        if not fold_weight:
            norm.weight.fill_(1.0)

    def ignore(weight, norm, directions):
        scaled = orthonormal(norm.weight[:, None] * directions)
        weight -= weight @ scaled @ scaled.T

    ignore(block.mlp.fc1.weight, block.norm2, null)
    ignore(block.attn.qkv.weight[: 2 * DIM], block.norm1, null)
    ignore(block.attn.qkv.weight[2 * DIM :], block.norm1, null[:, :value_rank])
    return null


def first_order_change(backbone, images, basis):
    """Return the size of the block's change per unit step of the patches along a basis."""
    tokens, call = backbone.block_input(images, 1)
    direction = torch.zeros_like(tokens)
    patches = tokens[:, backbone.num_prefix_tokens :]
    steps = randn(*patches.shape[:2], basis.shape[1], seed=7)
    direction[:, backbone.num_prefix_tokens :] = steps @ basis.double().T
    with sdpa_kernel(SDPBackend.MATH):
        _, change = torch.func.jvp(added(backbone, 1, call), (tokens,), (direction,))
    return change.norm() / direction.norm()


@pytest.mark.parametrize("linearization", LINEARIZATIONS)
def test_a_planted_nullspace_is_found_and_is_what_the_block_ignores(linearization):
    backbone = double_backbone(VIT, depth=2, dim=DIM)
    # `mlp` alone knows nothing of LayerNorm's weight: let that be 1 there.
    null = plant_nullspace(backbone, fold_weight=linearization != "mlp")
    images = random_images(backbone, dtype=F64)
    basis = nullspace_basis(backbone, 1, RANK, linearization, images=images, seed=4)
    assert basis.linearization == linearization
    random = nullspace_basis(backbone, 1, RANK, "random", seed=4)
    # Nothing but N's rounding to float32 remains: 2^-24 per entry, against a change of order 1.
    ignored = first_order_change(backbone, images, basis.vectors)
    assert ignored < 1e-5 * first_order_change(backbone, images, random.vectors)
    assert first_order_change(backbone, images, null) < 1e-12
    inside = null
    if linearization != "mlp":  # those that know LayerNorm know that it ignores the mean, too
        inside = torch.cat([null, torch.full((DIM, 1), DIM**-0.5, dtype=F64)], dim=1)
    outside = basis.vectors.double() - inside @ (inside.T @ basis.vectors.double())
    assert outside.norm() < 1e-6


def test_the_value_path_narrows_the_nullspace():
    """The MLP ignores RANK directions, the attention's values three of them, and `block` both."""
    backbone = double_backbone(VIT, depth=2, dim=DIM)
    null = plant_nullspace(backbone, fold_weight=True, value_rank=3)
    ones = torch.full((DIM, 1), DIM**-0.5, dtype=F64)
    both = torch.cat([null[:, :3], ones], dim=1)
    images = random_images(backbone, dtype=F64)
    for linearization in ("block", "jacobian"):
        found = nullspace_basis(backbone, 1, 4, linearization, images=images)
        vectors = found.vectors.double()
        assert (vectors - both @ (both.T @ vectors)).norm() < 1e-6, linearization
        # Those of the MLP alone are the next: the attention does not ignore them.
        assert found.singular_values[-5] > 1e-3 * found.singular_values[0]
    mlp = nullspace_basis(backbone, 1, 7, "mlp_folded")
    assert mlp.selected.max() < 1e-12 * mlp.singular_values[0]


@pytest.mark.parametrize("name", [DINOV3, EVA02, PARALLEL])
def test_a_measured_basis_is_ignored_more_than_a_random_one(name):
    backbone = double_backbone(name, dim=16)
    images = random_images(backbone, batch=4, dtype=F64)
    measured = nullspace_basis(backbone, 1, 4, "jacobian", images=images)
    random = nullspace_basis(backbone, 1, 4, "random")
    changes = [first_order_change(backbone, images, basis.vectors) for basis in (measured, random)]
    # The 4 smallest of 16 directions of a random block against 4 average ones.
    assert changes[0] < 0.6 * changes[1]
