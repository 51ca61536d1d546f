"""The reference in low and mixed precision, against tolerances derived in ``bounds.py``."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import truth
from bounds import U32, gradient_bounds, loss_bounds, unit
from cases import WEIGHTS, Shape, outlier_case, random_case, tied_case, total
from torch.utils._python_dispatch import TorchDispatchMode

from singer_kernels import fused_losses, gram_loss, kd_loss, outlier_loss, refine, token_norms

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# student, teacher, adapter; the products take the promoted dtype of teacher and adapter
pytestmark = pytest.mark.usefixtures("backend")

MIXES = [
    pytest.param(F32, F32, F32, id="float32"),
    pytest.param(BF16, BF16, BF16, id="bfloat16"),
    pytest.param(F16, F16, F16, id="float16"),
    pytest.param(BF16, BF16, F32, id="bfloat16, float32 adapter"),
    pytest.param(F16, F16, F32, id="float16, float32 adapter"),
    pytest.param(BF16, F32, F32, id="bfloat16 student"),
    pytest.param(F32, BF16, F32, id="bfloat16 teacher"),
    pytest.param(F32, F32, BF16, id="bfloat16 adapter"),
    pytest.param(F32, BF16, BF16, id="float32 student"),
    pytest.param(BF16, F16, F32, id="all different"),
    pytest.param(F32, F16, BF16, id="float16 teacher, bfloat16 adapter: float32 products"),
]


def array(x):
    return x.detach().double().numpy()


PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "matmul", "linear"}
# H, H Wu and two Gram matrices, or all at once.
CALLS = {"torch": 4, "reference": 4, "triton": 1, "cuda": 1, "cpu": 1}
REDUCTIONS = {"sum", "mean", "linalg_vector_norm", "norm", "sort", "lerp", "_softmax"}


class Recorder(TorchDispatchMode):
    """Collects the floating dtypes that the products and the reductions are handed.

    Of an operator that fuses both, those that it is told.
    """

    def __init__(self):
        super().__init__()
        self.products, self.reductions = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        dtypes = {a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()}
        if name.startswith("singer_kernels::"):
            given = dict(zip([a.name for a in func._schema.arguments], args, strict=True))
            self.products.append({given["product"]})
            self.reductions.append({given["acc"]})
        elif name in PRODUCTS:
            self.products.append(dtypes)
        elif name in REDUCTIONS and dtypes:
            self.reductions.append(dtypes)
        return func(*args, **(kwargs or {}))


def mild_case():
    """One patch of each image has 8 times the usual norm: clear of its threshold in bfloat16.

    The Gram target is unrelated, so that G(F̂) - G(R) stands out of bfloat16's rounding.
    """
    case = random_case(Shape(2, 1, 12, 16, 5), 0.95, with_target=True)
    case.teacher[0, 4] *= 8
    case.teacher[1, 9] *= 8
    return replace(case, down=0.5 * case.down, up=0.5 * case.up)


def cancelled_case():
    """Outliers of 500 times the usual norm, 99 % of them cancelled: float32 products keep up."""
    return outlier_case(Shape(2, 1, 12, 16, 5), 0.95)


def assert_within(actual, expected, bound):
    assert (np.abs(array(actual) - expected) <= bound).all()


def assert_losses_within(out, case, bounds):
    exact = case.values()
    assert out.kd.dtype == out.outlier.dtype == out.info.dtype == F32
    assert out.norms.dtype == out.threshold.dtype == F32
    for name in ("kd", "outlier", "info"):
        # A bound as large as the loss itself would accept anything.
        assert getattr(bounds, name) < 0.5 * getattr(exact, name)
        assert_within(getattr(out, name), getattr(exact, name), getattr(bounds, name))
    assert_within(out.norms, exact.norms, bounds.norms)
    assert_within(out.threshold, exact.threshold, bounds.threshold[:, 0])


def float32_products(mix):
    return torch.promote_types(mix.values[1], mix.values[2]) == F32


@pytest.mark.parametrize(
    ("make", "student", "teacher", "adapter"),
    [pytest.param(mild_case, *mix.values, id=mix.id) for mix in MIXES]
    + [
        pytest.param(cancelled_case, *mix.values, id=f"cancelled outliers, {mix.id}")
        for mix in filter(float32_products, MIXES)
    ],
)
def test_losses_are_float32_and_near_the_truth(make, student, teacher, adapter):
    product = torch.promote_types(teacher, adapter)
    case = make().rounded(student, teacher, adapter)
    tensors = case.tensors(student, teacher, adapter)
    out = case.run(tensors, return_refined=True)
    bounds = loss_bounds(case, product, rows=product, target_rows=teacher)
    assert_losses_within(out, case, bounds)

    exact = case.values().refined
    assert out.refined.dtype == teacher
    assert_within(out.refined, exact, bounds.refined + 1.01 * unit(teacher) * np.abs(exact))

    total(out).backward()
    for name in ("student", "down", "up"):
        assert tensors[name].grad.dtype == tensors[name].dtype
        assert tensors[name].grad.isfinite().all()


def exact_case():
    """Small dyadic numbers: every product is exact, even in bfloat16."""
    return tied_case(Shape(2, 1, 13, 11, 3), 0.75, seed=6)


@pytest.mark.parametrize(("student", "teacher", "adapter"), MIXES)
def test_reductions_are_float32(student, teacher, adapter):
    # Exact products leave the errors of the float32 reductions alone: a reduction in bfloat16 or
    # float16 would miss these bounds by orders of magnitude.
    case = exact_case()
    exact = case.values()
    out = case.run(case.tensors(student, teacher, adapter), return_refined=True)
    assert np.array_equal(array(out.refined), exact.refined)
    assert_within(out.norms, exact.norms, 11 * U32 * exact.norms)
    assert_within(out.kd, exact.kd, (case.teacher.size + 3) * U32 * exact.kd)
    # The excess is a difference: its error is that of the norms, relative to the largest.
    excess = (exact.norms - exact.threshold[:, None])[exact.norms > exact.threshold[:, None]]
    lost = (2 * 11 + 4 * 13) * U32 * exact.norms.max() / excess.min()
    assert_within(out.outlier, exact.outlier, (2 * lost + 30 * U32) * exact.outlier)


@pytest.mark.parametrize(("student", "teacher", "adapter"), MIXES)
def test_gradients_are_near_the_truth(student, teacher, adapter):
    case = exact_case()
    tensors = case.tensors(student, teacher, adapter)
    weights = (1.0, 2.0)
    total(case.run(tensors, gram=False)._replace(info=0.0), (*weights, 0.0)).backward()
    product = torch.promote_types(teacher, adapter)
    bounds = gradient_bounds(case, weights, student, product, adapter)
    expected = case.gradients((*weights, 0.0))
    for name in ("student", "down", "up"):
        bound, gradient = getattr(bounds, name), getattr(expected, name)
        assert bound.max() < 0.2 * np.abs(gradient).max()
        assert_within(tensors[name].grad, gradient, bound)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_pieces_return_float32(dtype):
    tokens, other = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    tokens.requires_grad_()
    norms = token_norms(tokens)
    losses = [norms.sum(), gram_loss(tokens, other), kd_loss(tokens, other), outlier_loss(norms)]
    for loss in losses:
        assert loss.dtype == F32
        (grad,) = torch.autograd.grad(loss, tokens, retain_graph=True)
        assert grad.dtype == dtype
    half_norms = norms.detach().to(dtype).requires_grad_()
    loss = outlier_loss(half_norms)
    loss.backward()
    assert loss.dtype == F32
    assert half_norms.grad.dtype == dtype
    assert refine(tokens.detach(), torch.ones(8, 1), torch.ones(1, 8)).dtype == dtype


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_the_pieces_reduce_in_float32(dtype):
    a, b = torch.randn(2, 2, 9, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    wide_a, wide_b = array(a), array(b)
    with Recorder() as recorder:
        norms = token_norms(a)
        kd, outlier = kd_loss(a, b), outlier_loss(norms.to(dtype), 0.5)
        gram_loss(a, b)
    assert all(dtypes == {F32} for dtypes in recorder.reductions)
    assert_within(norms, truth.token_norms(wide_a, 1), 16 * U32 * array(norms))
    exact = truth.kd_loss(wide_a, wide_b)
    assert_within(kd, exact, (a.numel() + 3) * U32 * exact)
    rounded = array(norms.to(dtype))
    exact = truth.outlier_loss(rounded, 0.5)
    # n and q are good to 4 P u32 of the largest norm; sums of squares as in a mean over P.
    lost = 4 * 8 * U32 * rounded.max()
    assert_within(outlier, exact, 2 * lost * np.sqrt(exact) + lost**2 + 30 * U32 * exact)


@pytest.mark.parametrize("wide", ["student", "teacher", "down", "up"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_one_float64_input_gives_float64_losses(wide, dtype):
    case = mild_case()
    tensors = case.tensors(dtype, dtype, dtype)
    tensors[wide] = tensors[wide].detach().double()
    out = case.run(tensors)
    assert {x.dtype for x in (out.kd, out.outlier, out.info, out.norms, out.threshold)} == {F64}


def test_a_float64_gram_target_gives_a_float64_info():
    case = mild_case()
    tensors = case.tensors(F32, F32, F32)
    tensors["gram_target"] = torch.from_numpy(case.student)
    assert case.run(tensors).info.dtype == F64


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_float64_pieces_with_a_narrow_partner_are_float64(dtype):
    wide = torch.randn(2, 5, 8, dtype=F64, generator=torch.Generator().manual_seed(0))
    narrow = wide.to(dtype)
    assert token_norms(wide).dtype == outlier_loss(token_norms(wide)).dtype == F64
    for loss in (gram_loss, kd_loss):
        assert loss(wide, narrow).dtype == loss(narrow, wide).dtype == F64


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [F32, BF16])
def test_autocast_runs_products_in_bfloat16_and_reductions_in_float32(backend, given):
    case = mild_case()
    tensors = case.tensors(given, given, F32)
    with Recorder() as recorder:
        with torch.autocast("cpu", torch.bfloat16):
            out = case.run(tensors, return_refined=True)
        forward = len(recorder.products)
        total(out).backward()
    assert forward >= CALLS[backend]
    assert all(dtypes == {BF16} for dtypes in recorder.products)
    assert len(recorder.reductions) >= CALLS[backend]
    assert all(dtypes == {F32} for dtypes in recorder.reductions)
    assert out.refined.dtype == given
    for name, dtype in (("student", given), ("down", F32), ("up", F32)):
        assert tensors[name].grad.dtype == dtype


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_reductions_of_narrow_inputs_run_in_float32(backend, dtype):
    case = mild_case()
    with Recorder() as recorder:
        total(case.run(case.tensors(dtype, dtype, dtype))).backward()
    assert all(dtypes == {dtype} for dtypes in recorder.products)
    assert len(recorder.reductions) >= CALLS[backend]
    assert all(dtypes == {F32} for dtypes in recorder.reductions)


def test_autocast_losses_are_near_the_truth(backend):
    case = mild_case().rounded(F32, F32, F32)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.run(case.tensors(F32, F32, F32))
    assert_losses_within(out, case, loss_bounds(case, BF16, BF16, BF16, operand=BF16))
    if backend in ("triton", "cuda", "cpu"):  # they keep H and F̂ to more digits
        return
    # And they are not those of float32 products, whose error is 2^16 times smaller.
    bounds = loss_bounds(case, F32, F32, F32)
    assert abs(out.info.item() - case.values().info) > bounds.info
    assert abs(out.kd.item() - case.values().kd) > bounds.kd


def test_autocast_leaves_float64_alone():
    case = random_case(Shape(2, 1, 9, 8, 3), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        out = case.run(case.tensors())
    expected = case.run(case.tensors())
    for name in ("kd", "outlier", "info"):
        assert torch.equal(getattr(out, name), getattr(expected, name))


def test_autocast_of_the_pieces(backend):
    case = mild_case()
    tensors = case.tensors(F32, F32, F32)
    teacher, down, up = (tensors[name] for name in ("teacher", "down", "up"))
    with Recorder() as recorder, torch.autocast("cpu", torch.bfloat16):
        refined = refine(teacher, down, up)
        norms = token_norms(refined)
        losses = [gram_loss(refined, teacher), kd_loss(refined, teacher), outlier_loss(norms)]
    assert len(recorder.products) >= CALLS[backend]
    assert all(dtypes == {BF16} for dtypes in recorder.products)
    assert all(dtypes == {F32} for dtypes in recorder.reductions)
    assert {x.dtype for x in (refined, norms, *losses)} == {F32}


# --- range ----------------------------------------------------------------------------------------


def test_norms_and_differences_beyond_the_range_of_float16():
    # Norm 2e4 · √64 = 1.6e5 and a difference of 8e4 both exceed 65504, float16's largest number.
    teacher = torch.ones(1, 5, 64, dtype=F16)
    teacher[:, 4] = 2e4
    student = torch.full_like(teacher, -6e4)
    down, up = torch.zeros(64, 2, dtype=F16), torch.zeros(2, 64, dtype=F16)
    inputs = [x.requires_grad_() for x in (student, down, up)]
    out = fused_losses(student, teacher, down, up, quantile=0.5)
    # Norms 8, 8, 8, 1.6e5 (all of it exact); the threshold is 8.
    assert torch.equal(out.norms, torch.tensor([[8.0, 8.0, 8.0, 1.6e5]]))
    assert out.outlier.item() == pytest.approx((1.6e5 - 8) ** 2, rel=4 * U32)
    expected = np.mean((array(student) - array(teacher)) ** 2)
    assert out.kd.item() == pytest.approx(expected, rel=320 * U32)
    (WEIGHTS[0] * out.kd).backward()
    assert all(x.grad.isfinite().all() for x in inputs)
