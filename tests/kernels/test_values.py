"""Every backend against numbers that can be checked on paper, then against ``truth.py``."""

import math

import pytest
import torch
from cases import (
    WEIGHTS,
    Shape,
    assert_gradients,
    assert_near,
    assert_values,
    outlier_case,
    random_case,
    tied_case,
    total,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from singer_kernels import fused_losses, gram_loss, kd_loss, outlier_loss, refine, token_norms

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64


def f64(rows):
    return tensor(rows, dtype=F64)


# --- on paper -------------------------------------------------------------------------------------


def test_refine_changes_the_patches_and_leaves_the_prefix():
    teacher = f64([[[1, 2], [3, 4], [5, 6]]])
    down, up = f64([[1], [0]]), f64([[0, -1]])  # subtracts the first entry from the second
    expected = f64([[[1, 2], [3, 1], [5, 1]]])
    assert torch.equal(refine(teacher, down, up, 1), expected)
    expected = f64([[[1, 1], [3, 1], [5, 1]]])
    assert torch.equal(refine(teacher, down, up, 0), expected)
    expected = f64([[[1, 2], [3, 4], [5, 1]]])
    assert torch.equal(refine(teacher, down, up, 2), expected)


def test_refine_takes_one_prefix_token_by_default():
    teacher = f64([[[1, 2], [3, 4]]])
    assert torch.equal(refine(teacher, f64([[1], [0]]), f64([[0, -1]]))[0, :, 1], f64([2, 1]))


def test_token_norms():
    tokens = f64([[[9, 9], [3, 4], [0, 0]], [[9, 9], [-5, 12], [8, 15]]])
    assert torch.equal(token_norms(tokens), f64([[5, 0], [13, 17]]))
    assert torch.equal(token_norms(tokens, 2), f64([[0], [17]]))


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [
        pytest.param(0.75, 36.0, id="rank 3 is the norm 4: only 10 exceeds it, by 6"),
        pytest.param(0.5, 25.0, id="rank 2 is the norm 3: (1² + 7²) / 2"),
        pytest.param(0.875, 9.0, id="rank 3.5 lies halfway from 4 to 10: (10 - 7)²"),
        pytest.param(0.625, 21.25, id="rank 2.5 lies halfway from 3 to 4: (0.5² + 6.5²) / 2"),
        pytest.param(0.0, (1 + 4 + 9 + 81) / 4, id="the least norm, 1: the others exceed it"),
        pytest.param(1.0, 0.0, id="the largest norm: none exceeds it"),
    ],
)
def test_outlier_loss_interpolates_the_quantile(gamma, expected):
    norms = f64([[10, 3, 1, 4, 2]])
    assert outlier_loss(norms, gamma).item() == expected


def test_outlier_loss_averages_over_the_exceeding_patches_of_the_batch():
    # γ = 0.75 of five: rank 3. Image 0 exceeds 4 by 6; image 1 has no outlier; image 2: 0 by 8.
    norms = f64([[1, 2, 3, 4, 10], [1, 1, 1, 1, 1], [0, 0, 0, 0, 8]])
    assert outlier_loss(norms, 0.75).item() == (36 + 64) / 2


def test_outlier_gradient_flows_to_the_exceeding_patches_only_and_not_through_the_quantile():
    norms = f64([[1, 2, 3, 4, 10], [7, 1, 1, 1, 3]]).requires_grad_()
    outlier_loss(norms, 0.75).backward()
    # Excesses 10 - 4 = 6 and 7 - 3 = 4; two patches exceed, so each gradient is 2 · excess / 2.
    assert torch.equal(norms.grad, f64([[0, 0, 0, 0, 6], [4, 0, 0, 0, 0]]))


def test_patches_tied_with_the_quantile_do_not_exceed_it():
    norms = f64([[5, 1, 5, 7, 5]]).requires_grad_()
    loss = outlier_loss(norms, 0.5)
    loss.backward()
    assert loss.item() == 4
    assert torch.equal(norms.grad, f64([[0, 0, 0, 4, 0]]))


@pytest.mark.parametrize(
    ("norms", "gamma"),
    [
        pytest.param([[3, 3, 3, 3]], 0.5, id="all equal"),
        pytest.param([[1, 2, 5]], 1.0, id="the largest norm is the threshold"),
        pytest.param([[4], [9]], 0.0, id="one patch is its own quantile"),
        pytest.param([[4], [9]], 0.97, id="one patch, default quantile"),
    ],
)
def test_no_outlier_gives_zero_and_a_zero_gradient(norms, gamma):
    norms = f64(norms).requires_grad_()
    loss = outlier_loss(norms, gamma)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(norms.grad, torch.zeros_like(norms))


@pytest.mark.parametrize(
    ("patches", "target", "expected"),
    [
        pytest.param([[1, 0], [0, 3]], [[2, 0], [5, 0]], 0.5, id="orthogonal, parallel: 2 · 1 / 4"),
        pytest.param([[1, 0], [-2, 0]], [[1, 0], [5, 0]], 2.0, id="opposite, parallel: 2 · 2² / 4"),
        pytest.param([[3, 4], [4, 3]], [[1, 0], [0, 1]], 2 * 0.96**2 / 4, id="24 / 25, orthogonal"),
        pytest.param([[3, 4], [4, 3]], [[0, 2], [24, 7]], 2 * 0.68**2 / 4, id="0.96, 0.28"),
        pytest.param([[0, 0], [1, 0]], [[0, 1], [1, 0]], 0.25, id="a zero row is like nothing"),
        pytest.param([[7, 1]], [[0, 3]], 0.0, id="one patch: both matrices are 1"),
    ],
)
def test_gram_loss(patches, target, expected):
    tokens, target = f64([[[8, 8], *patches]]), f64([[[-1, 0], *target]])
    assert gram_loss(tokens, target).item() == pytest.approx(expected, rel=1e-14, abs=1e-30)


def test_gram_loss_counts_the_prefix_only_when_told_that_there_is_none():
    tokens, target = f64([[[1, 0], [0, 1]]]), f64([[[1, 0], [1, 0]]])
    assert gram_loss(tokens, target, 0).item() == 0.5
    assert gram_loss(tokens, target, 1).item() == 0


def test_gram_gradient_turns_the_patches_and_does_not_stretch_them():
    tokens = f64([[[2, 0], [1, 1]]]).requires_grad_()
    target = f64([[[1, 0], [0, 1]]]).requires_grad_()
    gram_loss(tokens, target, 0).backward()
    # The loss is c² / 2 with c = cos 45°: its slope along c is c, once per patch. A unit turn of
    # patch 0 (norm 2) changes c by c / 2 per unit of its second entry; patch 1 lies on the diagonal
    # with norm √2, where c changes by (1/2, -1/2) / √2.
    c = math.sqrt(0.5)
    assert_near(tokens.grad, f64([[[0, c * c / 2], [c / 2 * c, -c / 2 * c]]]).numpy())
    # Slope along the target's cosine: -c; at right angles it changes at the full rate.
    assert_near(target.grad, f64([[[0, -c], [-c, 0]]]).numpy())


def test_kd_loss_counts_every_entry_prefix_included():
    student, tokens = f64([[[1, 0], [0, 4]]]).requires_grad_(), f64([[[0, 0], [0, 2]]])
    loss = kd_loss(student, tokens)
    loss.backward()
    assert loss.item() == (1 + 4) / 4
    assert torch.equal(student.grad, f64([[[0.5, 0], [0, 1]]]))  # 2 (S - F̂) / 4


def test_fused_losses_on_paper():
    # The adapter removes the second entry: the patches (3, 4), (5, 12) become (3, 0), (5, 0).
    teacher = f64([[[1, 2], [3, 4], [5, 12]]])
    student = f64([[[1, 0], [3, 3], [4, 0]]]).requires_grad_()
    down, up = f64([[0], [1]]).requires_grad_(), f64([[0, -1]]).requires_grad_()
    out = fused_losses(student, teacher, down, up, quantile=0.5, return_refined=True)
    assert torch.equal(out.refined, f64([[[1, 2], [3, 0], [5, 0]]]))
    assert torch.equal(out.norms, f64([[3, 5]]))
    assert torch.equal(out.threshold, f64([4]))
    assert out.kd.item() == pytest.approx((4 + 9 + 1) / 6, rel=1e-15)
    assert out.outlier.item() == 1
    cosine = (3 * 5 + 4 * 12) / (5 * 13)  # of the plain patches; the refined ones are parallel
    assert out.info.item() == pytest.approx(2 * (1 - cosine) ** 2 / 4, rel=1e-13)

    # Outlier: patch (5, 0) exceeds by 1, its gradient is 2 · 1 · (1, 0). H = (4, 12):
    # dWu = Hᵀ dF̂ = 12 · (2, 0), dWd = Fᵀ dF̂ Wuᵀ = 0, for Wuᵀ = (0, -1).
    d_down, d_up = torch.autograd.grad(out.outlier, [down, up], retain_graph=True)
    assert_near(d_up, f64([[24, 0]]).numpy())
    assert_near(d_down, f64([[0], [0]]).numpy())
    # KD: dF̂ = 2 (F̂ - S) / 6 on the patches: (0, -1), (1/3, 0). dWu = 4 (0, -1) + 12 (1/3, 0);
    # dF̂ Wuᵀ = (1, 0), so dWd = (3, 4).
    d_student, d_down, d_up = torch.autograd.grad(out.kd, [student, down, up])
    assert_near(d_student, f64([[[0, -2 / 3], [0, 1], [-1 / 3, 0]]]).numpy())
    assert_near(d_up, f64([[4, -4]]).numpy())
    assert_near(d_down, f64([[3], [4]]).numpy())


@pytest.mark.parametrize("count", [2, 10, 101, 196])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.97, 1.0])
def test_the_float32_threshold_is_that_of_torch_quantile(backend, count, gamma):
    tokens = torch.randn(3, count, 4, generator=torch.Generator().manual_seed(count))
    none = torch.zeros(4, 1)
    out = fused_losses(tokens, tokens, none, none.T, quantile=gamma, num_prefix_tokens=0)
    expected = torch.quantile(out.norms, gamma, dim=1)
    if backend in ("torch", "reference"):  # they call it
        assert torch.equal(out.threshold, expected)
        return
    # Releases of torch differ in whether the rank, up to P, and the interpolation are rounded.
    spread = out.norms.amax(dim=1) - out.norms.amin(dim=1)
    assert ((out.threshold - expected).abs() <= 2**-23 * (expected + count * spread)).all()


# --- against the truth ----------------------------------------------------------------------------

SHAPES = [
    pytest.param(Shape(1, 0, 1, 1, 1), id="the least of everything"),
    pytest.param(Shape(2, 1, 1, 8, 2), id="one patch"),
    pytest.param(Shape(2, 0, 6, 8, 3), id="no prefix, rank no power of two"),
    pytest.param(Shape(3, 1, 7, 5, 1), id="rank 1, odd sizes"),
    pytest.param(Shape(2, 5, 13, 11, 5), id="registers, all sizes odd"),
    pytest.param(Shape(1, 1, 49, 16, 4), id="one image, a 7 x 7 map"),
    pytest.param(Shape(2, 1, 33, 12, 12), id="rank = width, one patch past a tile of 32"),
    pytest.param(Shape(1, 5, 65, 24, 7), id="one patch past a tile of 64"),
]
GAMMAS = [0.0, 0.5, 0.97, 1.0]


def check(case):
    tensors = case.tensors()
    out = case.run(tensors, return_refined=True)
    assert_values(out, case)
    total(out).backward()
    assert_gradients(tensors, case.gradients(WEIGHTS))


@pytest.mark.sample(7)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("make", [random_case, outlier_case, tied_case])
def test_values_and_gradients(make, shape, gamma):
    check(make(shape, gamma))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_gram_target_that_requires_grad(shape):
    check(random_case(shape, 0.5, with_target=True))


@pytest.mark.slow
@given(data=st.data())
@settings(deadline=None, derandomize=True, max_examples=80)
def test_any_shape(data):
    def draw(low, high):
        return data.draw(st.integers(low, high))

    width = draw(1, 17)
    shape = Shape(draw(1, 3), draw(0, 5), draw(1, 24), width, draw(1, width))
    # Multiples of 1/64 make the rank exact: a threshold is a norm, or clearly between two.
    gamma = draw(0, 64) / 64
    make = data.draw(st.sampled_from([random_case, outlier_case]))
    options = {"with_target": data.draw(st.booleans())} if make is random_case else {}
    check(make(shape, gamma, draw(0, 2**32 - 1), **options))


@pytest.mark.parametrize("loss", ["kd", "outlier", "info"])
def test_each_loss_is_differentiable_alone(loss):
    case = random_case(Shape(2, 1, 9, 8, 3), 0.5, with_target=True)
    tensors = case.tensors()
    getattr(case.run(tensors), loss).backward()
    weights = tuple(float(loss == name) for name in ("kd", "outlier", "info"))
    expected = case.gradients(weights)
    for name in ("student", "down", "up", "gram_target"):
        grad = tensors[name].grad
        # A loss that does not read an input may give no gradient at all.
        grad = torch.zeros_like(tensors[name]) if grad is None else grad
        assert_near(grad, getattr(expected, name))


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("gram", [True, False])
def test_refined_is_differentiable_through_the_next_block(prefix, gram):
    shape = Shape(2, prefix, 9, 8, 3)
    case = random_case(shape, 0.5)
    tensors = case.tensors()
    out = case.run(tensors, gram=gram, return_refined=True)
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(shape.width, 6, dtype=F64, generator=generator)
    weight = torch.randn(*shape.tokens[:2], 6, dtype=F64, generator=generator)
    after = torch.tanh(out.refined @ block)
    info = WEIGHTS[2] * out.info if gram else 0.0
    (WEIGHTS[0] * out.kd + WEIGHTS[1] * out.outlier + info + (weight * after).sum()).backward()

    slope = weight.numpy() * (1 - after.detach().numpy() ** 2)
    weights = (*WEIGHTS[:2], WEIGHTS[2] if gram else 0.0)
    assert_gradients(tensors, case.gradients(weights, d_refined=slope @ block.numpy().T))


def test_refine_alone_is_differentiable_in_the_adapter():
    case = random_case(Shape(2, 1, 9, 8, 3), 0.5)
    tensors = case.tensors()
    refined = refine(tensors["teacher"], tensors["down"], tensors["up"], case.prefix)
    weight = torch.randn(refined.shape, dtype=F64, generator=torch.Generator().manual_seed(1))
    (refined * weight).sum().backward()
    expected = case.gradients((0.0, 0.0, 0.0), d_refined=weight.numpy())
    assert_near(tensors["down"].grad, expected.down)
    assert_near(tensors["up"].grad, expected.up)


def test_the_pieces_compose_to_the_fused_losses():
    case = outlier_case(Shape(2, 1, 33, 8, 3), 0.9)
    tensors = case.tensors()
    refined = refine(tensors["teacher"], tensors["down"], tensors["up"], case.prefix)
    norms = token_norms(refined, case.prefix)
    w_kd, w_out, w_info = WEIGHTS
    loss = (
        w_kd * kd_loss(tensors["student"], refined)
        + w_out * outlier_loss(norms, case.gamma)
        + w_info * gram_loss(refined, tensors["teacher"], case.prefix)
    )
    loss.backward()
    assert_near(loss, total(case.run(tensors)).item())
    assert_gradients(tensors, case.gradients(WEIGHTS))


def test_gradcheck_of_the_smooth_outputs(backend):
    # Not of the outlier loss: its threshold is a constant for the gradient, not for a difference.
    case = random_case(Shape(2, 1, 4, 3, 2), 0.5, with_target=True)
    tensors = case.tensors()
    inputs = [tensors[name] for name in ("student", "down", "up", "gram_target")]

    def smooth(student, down, up, gram_target):
        out = fused_losses(
            student,
            tensors["teacher"],
            down,
            up,
            gram_target=gram_target,
            return_refined=True,
        )
        return out.kd, out.info, out.refined

    # Two calls for every entry, or along one direction: that is for the interpreter.
    assert torch.autograd.gradcheck(smooth, inputs, fast_mode=backend == "triton")


def test_gradcheck_of_the_norms():
    tokens = random_case(Shape(2, 1, 4, 3, 2), 0.5).tensors()["student"]
    assert torch.autograd.gradcheck(lambda x: token_norms(x, 1), [tokens])


def test_gradcheck_of_the_outlier_loss_where_the_threshold_stays():
    # γ = 0.5 of five: the threshold is the third norm. Moving the outer four leaves it in place.
    outer = f64([[1, 2, 4, 6]]).requires_grad_()

    def loss(outer):
        return outlier_loss(torch.cat([outer, f64([[3]])], dim=1), 0.5)

    assert torch.autograd.gradcheck(loss, [outer])
