"""Every backend at the edges: zero norms, NaN and Inf, strides, repeats, missing gradients."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import WEIGHTS, Shape, assert_near, outlier_case, random_case, total

from singer_kernels import fused_losses, gram_loss, kd_loss, outlier_loss, refine, token_norms

pytestmark = pytest.mark.usefixtures("backend")

F64 = torch.float64
NAN, INF = float("nan"), float("inf")
GAMMAS = [0.0, 0.5, 0.97, 1.0]
DIFFERENTIABLE = ("student", "down", "up", "gram_target")


def randn(*shape, dtype=F64, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def shows(*losses):
    return [not loss.isfinite().item() for loss in losses]


# --- zero-norm tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_zero_norm_patch_has_gradient_zero(dtype, gamma):
    tokens = randn(2, 7, 5, dtype=torch.float32).to(dtype)
    tokens[:, 3] = 0
    tokens.requires_grad_()
    target = randn(2, 7, 5, dtype=torch.float32, seed=1).to(dtype)
    target[:, 5] = 0
    target.requires_grad_()
    norms = token_norms(tokens)
    assert (norms[:, 2] == 0).all()
    gram = gram_loss(tokens, target)
    for loss in (norms.sum(), outlier_loss(norms, gamma), gram):
        grads = torch.autograd.grad(
            loss, [tokens, target], retain_graph=True, materialize_grads=True
        )
        assert loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0][:, 3] == 0).all()
        assert (grads[1][:, 5] == 0).all()
    assert (grads[0][:, 1] != 0).any()
    assert (grads[1][:, 1] != 0).any()


def cancelled():
    """The adapter removes the first entry, which is all that patch 2 of image 0 has."""
    case = random_case(Shape(2, 1, 6, 4, 2), 0.5)
    case.teacher[0, 3] = [6, 0, 0, 0]
    case.down[:], case.up[:] = 0, 0
    case.down[0, 0], case.up[0, 0] = 1, -1
    return case


@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0), WEIGHTS])
def test_a_patch_that_the_adapter_cancels_has_no_outlier_and_no_gram_gradient(weights):
    case = cancelled()
    tensors = case.tensors()
    out = case.run(tensors)
    assert out.norms[0, 2] == 0
    total(out, weights).backward()
    expected = case.gradients(weights)
    assert_near(tensors["down"].grad, expected.down)
    assert_near(tensors["up"].grad, expected.up)


@pytest.mark.parametrize("scale", [1e-11, 1e-13, 1e-20])
def test_norms_around_the_smallest_denominator(scale):
    # 1e-13 and 1e-20 lie below 1e-12, where the row is divided by the constant.
    case = random_case(Shape(1, 1, 5, 4, 2), 0.5, with_target=True)
    case.target[:, 2] *= scale
    tensors = case.tensors()
    info = case.run(tensors).info
    info.backward()
    assert_near(info, case.values().info)
    expected = case.gradients((0.0, 0.0, 1.0)).gram_target
    assert_near(tensors["gram_target"].grad[:, 2], expected[:, 2])
    others = [0, 1, 3, 4, 5]
    assert_near(tensors["gram_target"].grad[:, others], expected[:, others])


def test_all_zero_features_give_zero_losses_and_finite_gradients():
    zeros = torch.zeros(2, 5, 4)
    inputs = [torch.zeros(2, 5, 4), torch.ones(4, 2), torch.ones(2, 4), torch.zeros(2, 5, 4)]
    student, down, up, target = (x.requires_grad_() for x in inputs)
    out = fused_losses(student, zeros, down, up, gram_target=target)
    total(out).backward()
    assert [out.kd.item(), out.outlier.item(), out.info.item()] == [0, 0, 0]
    assert all((x.grad == 0).all() for x in (student, down, up, target))


# --- NaN and Inf ----------------------------------------------------------------------------------


@pytest.mark.sample(13)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("gamma", [*GAMMAS, 0.9])  # of 9 patches: a threshold of Inf
@pytest.mark.parametrize("patches", [1, 2, 9])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_a_bad_entry_of_one_patch_shows_in_every_loss(bad, gamma, patches, dtype):
    for patch in {0, patches // 2, patches - 1}:
        teacher = randn(3, 1 + patches, 4).to(dtype)
        teacher[1, 1 + patch, 2] = bad
        student, down, up = randn(3, 1 + patches, 4), randn(4, 2), randn(2, 4)
        inputs = [x.to(dtype) for x in (student, teacher, down, up)]
        out = fused_losses(*inputs, quantile=gamma)
        assert shows(out.kd, out.outlier, out.info) == [True, True, True]
        # The target holds the bad entry too; a clean one must not hide the refined side.
        clean = randn(3, 1 + patches, 4, seed=1)
        out = fused_losses(*inputs, gram_target=clean, quantile=gamma)
        assert shows(out.kd, out.outlier, out.info) == [True, True, True]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_whole_bad_image_shows_in_every_loss(bad, gamma):
    teacher = randn(2, 6, 4)
    teacher[1] = bad
    zero = torch.zeros(4, 2, dtype=F64)  # Inf · 0 is NaN as well
    for down in (zero, randn(4, 2)):
        out = fused_losses(randn(2, 6, 4), teacher, down, down.T, quantile=gamma)
        assert shows(out.kd, out.outlier, out.info) == [True, True, True]
        assert out.threshold[0].isfinite()
        assert out.norms[0].isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_a_bad_prefix_token_shows_in_kd_and_nowhere_else(bad, where):
    case = random_case(Shape(2, 2, 7, 4, 2), 0.5)
    clean = case.run(case.tensors())
    getattr(case, where)[1, 0, 3] = bad
    tensors = case.tensors()
    out = case.run(tensors)
    assert shows(out.kd, out.outlier, out.info) == [True, False, False]
    assert torch.equal(out.outlier, clean.outlier)
    assert torch.equal(out.info, clean.info)
    (out.outlier + out.info).backward()
    assert tensors["down"].grad.isfinite().all()
    assert tensors["up"].grad.isfinite().all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["student", "gram_target", "down", "up"])
def test_a_bad_entry_shows_in_the_losses_that_read_it(bad, where):
    tensors = random_case(Shape(2, 1, 7, 4, 2), 0.5, with_target=True).tensors()
    tensors[where].data.view(-1)[-1] = bad
    out = fused_losses(**tensors)
    expected = {"student": [True, False, False], "gram_target": [False, False, True]}
    assert shows(out.kd, out.outlier, out.info) == expected.get(where, [True, True, True])


@pytest.mark.sample(3)
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize(
    ("norms", "gamma"),
    [
        pytest.param([2.0, 0.0, 1.0], 1.0, id="the threshold is the bad norm"),
        pytest.param([2.0, 0.0, 1.0], 0.6, id="rank 1.2: interpolating to Inf gives Inf"),
        pytest.param([2.0, 0.0, 1.0], 0.75, id="rank 1.5: interpolating to Inf gives NaN"),
        pytest.param([2.0, 0.0, 1.0], 0.5, id="the threshold is the largest finite norm"),
        pytest.param([2.0, 0.0, 1.0], 0.0, id="the threshold is the least norm"),
        pytest.param([0.0], 0.97, id="one patch"),
        pytest.param([0.0, 0.0, 0.0], 0.5, id="all bad"),
    ],
)
def test_a_bad_norm_shows_in_the_outlier_loss(bad, norms, gamma):
    bad_image = [bad if norm == 0 else norm for norm in norms]
    for rows in ([bad_image], [norms, bad_image], [bad_image, norms]):
        loss = outlier_loss(torch.tensor(rows), gamma)
        assert shows(loss) == [True]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_entry_shows_in_the_pieces(bad):
    tokens, other = randn(2, 5, 4), randn(2, 5, 4, seed=1)
    tokens[1, 4, 0] = bad
    assert shows(kd_loss(tokens, other), kd_loss(other, tokens)) == [True, True]
    assert shows(gram_loss(tokens, other), gram_loss(other, tokens)) == [True, True]
    norms = token_norms(tokens)
    assert (~norms.isfinite()).nonzero().tolist() == [[1, 3]]
    refined = refine(tokens, randn(4, 2), randn(2, 4))
    assert (~refined.isfinite()).any(dim=-1).nonzero().tolist() == [[1, 4]]


# --- strides --------------------------------------------------------------------------------------


def transposed(x):
    return x.mT.contiguous().mT


def sliced(x):
    padded = torch.full([2 * size + 1 for size in x.shape], NAN, dtype=x.dtype)
    view = padded[tuple(slice(1, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def batch_last(x):
    return x.permute(*range(1, x.ndim), 0).contiguous().permute(-1, *range(x.ndim - 1))


def results(case, inputs):
    out = case.run(inputs, return_refined=True)
    (total(out) + out.refined.sum()).backward()
    grads = [x.grad for x in inputs.values() if x is not None and x.requires_grad]
    return [out.kd, out.outlier, out.info, out.refined, out.norms, out.threshold, *grads]


def assert_same_results(case, layout):
    """Give the same numbers to float64 rounding: a BLAS may order its sums by the strides."""
    contiguous, strided = case.tensors(), {}
    for name, x in contiguous.items():
        strided[name] = layout(x.detach()).requires_grad_(x.requires_grad)
        assert torch.equal(strided[name], x)
    for a, e in zip(results(case, strided), results(case, contiguous), strict=True):
        assert torch.allclose(a, e, rtol=1e-13, atol=1e-13 * max(1.0, e.abs().max().item()))


@pytest.mark.parametrize("layout", [transposed, sliced, batch_last])
def test_strided_inputs_give_the_results_of_their_contiguous_copies(layout):
    assert not layout(torch.zeros(2, 3, 4)).is_contiguous()
    assert_same_results(random_case(Shape(2, 1, 9, 6, 3), 0.5, with_target=True), layout)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_tokens_give_the_results_of_their_contiguous_copies(dim):
    case = random_case(Shape(3, 1, 9, 6, 3), 0.5, with_target=True)
    for array in (case.student, case.teacher, case.target):
        array[:] = array.take([0], axis=dim)

    def layout(x):
        return x.narrow(dim, 0, 1).expand(x.shape) if x.ndim == 3 else x

    assert layout(torch.zeros(2, 3, 4)).stride(dim) == 0
    assert_same_results(case, layout)


def test_expanded_adapters_give_the_results_of_their_contiguous_copies():
    case = random_case(Shape(2, 1, 9, 6, 3), 0.5, with_target=True)
    case.down[:], case.up[:] = case.down[:, :1], case.up[:, :1]
    assert_same_results(case, lambda x: x[:, :1].expand(x.shape) if x.ndim == 2 else x)


def test_stride_0_upstream_gradients():
    case = random_case(Shape(2, 1, 9, 6, 3), 0.5)
    d_refined = np.full(case.teacher.shape, 0.3)
    expected = case.gradients((0.3, 0.3, 0.3), d_refined=d_refined)
    tensors = case.tensors()
    out = case.run(tensors, return_refined=True)
    upstream = torch.tensor(0.3, dtype=F64)
    outputs = [out.kd, out.outlier, out.info, out.refined]
    torch.autograd.backward(outputs, [upstream.expand(x.shape) for x in outputs])
    for name in DIFFERENTIABLE[:3]:
        assert_near(tensors[name].grad, getattr(expected, name))


@pytest.mark.parametrize("piece", ["refine", "token_norms"])
def test_stride_0_upstream_gradients_of_the_pieces(piece):
    case = random_case(Shape(2, 1, 9, 6, 3), 0.5)
    tensors = case.tensors()
    if piece == "refine":
        inputs = [tensors["down"], tensors["up"]]
        output = refine(tensors["teacher"], *inputs)
    else:
        inputs = [tensors["student"]]
        output = token_norms(*inputs)
    upstream = torch.ones((), dtype=F64).expand(output.shape)
    expanded = torch.autograd.grad(output, inputs, upstream, retain_graph=True)
    full = torch.autograd.grad(output, inputs, upstream.contiguous())
    for a, e in zip(expanded, full, strict=True):
        assert torch.allclose(a, e, rtol=1e-13, atol=1e-13)


# --- side effects, repeats, missing gradients -----------------------------------------------------


def bits(tensors):
    return [x.detach().reshape(-1).view(torch.uint8).clone() for x in tensors]


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
def test_inputs_are_unchanged_afterwards(dtype):
    case = outlier_case(Shape(2, 1, 20, 8, 3), 0.9)
    case.teacher[0, 4] = NAN
    case.teacher[1, 3] = -0.0
    tensors = case.tensors(dtype, dtype, dtype)
    tensors["gram_target"] = (2 * tensors["student"].detach()).requires_grad_()
    before = bits(tensors.values())
    versions = [x._version for x in tensors.values()]
    results(case, tensors)
    assert_same_bits(before, bits(tensors.values()))
    assert versions == [x._version for x in tensors.values()]


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16])
def test_a_second_call_gives_the_same_bits(dtype):
    case = outlier_case(Shape(3, 1, 33, 16, 5), 0.9)
    runs = []
    for _ in range(3):
        tensors = case.tensors(dtype, dtype, dtype)
        runs.append(results(case, tensors))
    assert_same_bits(bits(runs[0]), bits(runs[1]))
    assert_same_bits(bits(runs[0]), bits(runs[2]))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_gradients_reach_exactly_the_inputs_that_ask_for_one(wanted):
    case = random_case(Shape(2, 1, 9, 6, 3), 0.5, with_target=True)
    expected = case.gradients(WEIGHTS)
    tensors = case.tensors()
    for name, wants in zip(DIFFERENTIABLE, wanted, strict=True):
        tensors[name].requires_grad_(wants)
    student, down, up, target = wanted
    out = case.run(tensors, return_refined=True)
    assert out.kd.requires_grad == (student or down or up)
    assert out.outlier.requires_grad == out.refined.requires_grad == (down or up)
    assert out.info.requires_grad == (down or up or target)
    if any(wanted):
        total(out).backward()
    for name, wants in zip(DIFFERENTIABLE, wanted, strict=True):
        if wants:
            assert_near(tensors[name].grad, getattr(expected, name))
        else:
            assert tensors[name].grad is None


def test_no_graph_is_built_under_no_grad():
    case = random_case(Shape(2, 1, 9, 6, 3), 0.5)
    with torch.no_grad():
        out = case.run(case.tensors(), return_refined=True)
    assert not any(x.requires_grad for x in out)
    assert torch.equal(out.kd, case.run(case.tensors()).kd)


def test_gradients_reach_a_student_that_is_a_view_and_shared_tensors():
    # One tensor as student and Gram target: its gradient is the sum of both.
    case = random_case(Shape(2, 1, 9, 6, 3), 0.5)
    case = replace(case, target=case.student)
    tensors = case.tensors()
    shared = tensors["student"]
    total(case.run({**tensors, "student": shared[:], "gram_target": shared})).backward()
    expected = case.gradients(WEIGHTS)
    assert_near(shared.grad, expected.student + expected.gram_target)
