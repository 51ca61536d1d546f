"""Backend "triton" in Triton's interpreter: tiles, splits, Gram modes (GPU: ``test_gpu.py``)."""

import numpy as np
import pytest
import torch
from bounds import U32, refined_bound, unit
from cases import (
    WEIGHTS,
    Shape,
    assert_gradients,
    assert_near,
    assert_values,
    random_case,
    total,
)
from conftest import BACKENDS
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from singer_kernels import gram_loss, refine
from singer_kernels.backends.operators import ForwardInputs
from singer_kernels.backends.triton import configs, gram_pairs, gram_tile, losses, ops

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    "triton" not in BACKENDS, reason="kernels are compiled where there is a GPU"
)
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# Tiles are 16 rows by 32 columns here.
SHAPES = [
    pytest.param(Shape(2, 1, 16, 32, 16), id="one full tile"),
    pytest.param(Shape(2, 5, 33, 65, 17), id="one more than two tiles, in every size"),
    pytest.param(Shape(1, 0, 47, 40, 3), id="one less than three tiles"),
    pytest.param(Shape(3, 1, 7, 100, 30), id="several images in a tile of tokens"),
]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setenv("SINGER_BACKEND", "triton")
    monkeypatch.setattr(configs, "INTERPRETER", configs.Config(16, 32, 1, 1))


@pytest.fixture(params=["rows", "pairs"])
def _by_rows_and_pairs(request, monkeypatch):
    """Compute the Gram stage by ``gram_rows``, then by ``gram_pairs``."""
    monkeypatch.setattr(configs, "MIN_PATCHES_FOR_PAIRS", 1 if request.param == "pairs" else 10**6)


def one_step(case, dtypes=(F64, F64, F64), **options):
    tensors = case.tensors(*dtypes)
    out = case.run(tensors, **options)
    total(out).backward()
    return tensors, out


@pytest.mark.sample(3)
@pytest.mark.usefixtures("_by_rows_and_pairs")
@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_several_tiles(shape, with_target):
    case = random_case(shape, 0.8, with_target=with_target)
    tensors, out = one_step(case, return_refined=True)
    assert_values(out, case)
    assert_gradients(tensors, case.gradients(WEIGHTS))


@pytest.mark.parametrize("splits", [1, 3, 100])
def test_any_number_of_splits(splits, monkeypatch):
    monkeypatch.setattr(configs, "SPLITS", splits)
    case = random_case(Shape(2, 1, 33, 20, 5), 0.8)
    tensors, _ = one_step(case)
    assert_gradients(tensors, case.gradients(WEIGHTS))


def test_a_mid_layer_with_several_tiles():
    case = random_case(Shape(2, 5, 33, 65, 17), 0.8)
    tensors = case.tensors()
    out = case.run(tensors, gram=False, return_refined=True)
    grad_refined = np.random.default_rng(5).standard_normal(case.teacher.shape)
    loss = WEIGHTS[0] * out.kd + WEIGHTS[1] * out.outlier
    (loss + (out.refined * torch.from_numpy(grad_refined)).sum()).backward()
    assert_gradients(tensors, case.gradients((*WEIGHTS[:2], 0.0), grad_refined))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("prefix", [0, 2])
def test_gram_loss_alone_with_several_tiles(prefix, backward):
    case = random_case(Shape(2, prefix, 33, 65, 3), 0.8, with_target=True)
    tokens, target = (
        torch.from_numpy(x).requires_grad_(backward) for x in (case.student, case.target)
    )
    loss = gram_loss(tokens, target, prefix)
    expected = gram_loss(tokens, target, prefix, backend="reference")
    torch.testing.assert_close(loss, expected)
    if backward:
        inputs = [tokens, target]
        for found, wanted in zip(
            torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(found, wanted)


# --- several functions on the same tensors, in one process ----------------------------------------


def fused(case, tensors, grad_refined):
    """Return the outputs of ``fused_losses`` and the gradients of all, ``grad_refined`` of F̂."""
    out = case.run(tensors, return_refined=True, backend="triton")
    inputs = [tensors[name] for name in ("student", "down", "up")]
    loss = total(out) + (out.refined * grad_refined).sum()
    return out, torch.autograd.grad(loss, inputs)


def refined(case, tensors, grad_refined):
    """Return ``refine`` and the gradients of down and up."""
    inputs = [tensors["down"], tensors["up"]]
    out = refine(tensors["teacher"], *inputs, case.prefix, backend="triton")
    return out, torch.autograd.grad(out, inputs, grad_refined)


ORDERS = [("refine",), ("fused", "refine", "fused"), ("refine", "fused", "refine")]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_refine_beside_fused_losses_in_float64(order):
    case = random_case(Shape(2, 1, 33, 64, 8), 0.8)
    tensors = case.tensors()
    grad_refined = np.random.default_rng(5).standard_normal(case.teacher.shape)
    for name in order:
        if name == "refine":
            out, grads = refined(case, tensors, torch.from_numpy(grad_refined))
            assert_near(out, case.values().refined)
            expected = case.gradients((0.0, 0.0, 0.0), grad_refined)
        else:
            out, (grad_student, *grads) = fused(case, tensors, torch.from_numpy(grad_refined))
            assert_values(out, case)
            expected = case.gradients(WEIGHTS, grad_refined)
            assert_near(grad_student, expected.student)
        assert_near(grads[0], expected.down)
        assert_near(grads[1], expected.up)


@pytest.mark.parametrize(
    "order",
    [pytest.param(order, marks=[pytest.mark.slow] * ("fused" in order[1:])) for order in ORDERS],
    ids="-".join,
)
def test_refine_beside_fused_losses_in_bfloat16(order):
    # The Gram identity: bfloat16, and 6 r <= D.
    case = random_case(Shape(2, 1, 33, 64, 8), 0.8).rounded(BF16, BF16, BF16)
    tensors = case.tensors(BF16, BF16, BF16)
    grad_refined = torch.ones_like(tensors["teacher"])
    exact = case.values().refined
    # F̂ is rounded once more, to the teacher's dtype.
    bound = refined_bound(case, BF16)
    bound += unit(BF16) * (np.abs(exact) + bound)
    seen = {}
    for name in order:
        out, grads = {"refine": refined, "fused": fused}[name](case, tensors, grad_refined)
        results = [*(out[:4] if name == "fused" else [out]), *grads]
        found = (out.refined if name == "fused" else out).detach().double().numpy()
        assert (np.abs(found - exact) <= bound).all()
        for a, b in zip(results, seen.setdefault(name, results), strict=True):
            assert torch.equal(a, b)


# --- the Gram identity ----------------------------------------------------------------------------


def info_error(case):
    case = case.rounded(BF16, BF16, BF16)
    out = case.run(case.tensors(BF16, BF16, BF16))
    return abs(out.info.item() / case.values().info - 1)


@pytest.mark.usefixtures("_by_rows_and_pairs")
def test_the_identity_is_more_exact_than_bfloat16_products():
    # A small adapter: G(F̂) − G(R) is small beside the rounding error of either.
    case = random_case(Shape(2, 1, 17, 64, 8), 0.8)
    case.up[:] *= 0.02
    assert info_error(case) < 2**-9


def cancelled_case(patches, count, images=2):
    """The first ``count`` patches have 500 times the usual norm; the adapter cancels 255/256."""
    case = random_case(Shape(images, 1, patches, 64, 8), 0.8)
    heights = np.random.default_rng(1).uniform(0.8, 1.2, (images, count))
    case.teacher[:, 1 : 1 + count, 0] += 500 * 8 * heights
    case.down[:] *= 0.1
    case.down[:, 0] = np.eye(64)[0]
    case.up[:] *= 0.1
    case.up[0] = (2**-8 - 1) * np.eye(64)[0]
    return case


@pytest.mark.usefixtures("_by_rows_and_pairs")
@pytest.mark.parametrize("count", [1, 17])
def test_cancelled_rows_are_recomputed(count, monkeypatch):
    case = cancelled_case(17, count)
    guarded = info_error(case)
    monkeypatch.setattr(gram_tile, "MAX_CANCELLATION", gram_tile.tl.constexpr(float("inf")))
    unguarded = info_error(case)
    assert guarded < 2**-9
    if count == 17:
        assert unguarded > 2**-6


@pytest.mark.usefixtures("_by_rows_and_pairs")
def test_identity_and_recompute_in_one_batch():
    case = cancelled_case(33, 33)
    case.teacher[1] = random_case(Shape(2, 1, 33, 64, 8), 0.8, seed=3).teacher[1]
    case.teacher[1, :, 0] = 0
    assert info_error(case) < 2**-9


# --- E in groups of images, partial sums ----------------------------------------------------------


def pairs_case(kind):
    """A case of three images, and its dtypes."""
    if kind == "identity, one image recomputed":
        case = cancelled_case(17, 17, images=3)
        case.teacher[1:] = random_case(Shape(2, 1, 17, 64, 8), 0.8, seed=3).teacher
        case.teacher[1:, :, 0] = 0
        return case.rounded(BF16, BF16, BF16), (BF16, BF16, BF16)
    return random_case(Shape(3, 2, 17, 33, 5), 0.8, with_target=kind == "target"), (F64,) * 3


@pytest.mark.parametrize(
    ("kind", "fit"),  # with 0 the limit is less than an image's E
    [("teacher", 0), ("target", 2), ("identity, one image recomputed", 2)],
)
def test_groups_of_images_change_no_bit(kind, fit, monkeypatch):
    monkeypatch.setattr(configs, "MIN_PATCHES_FOR_PAIRS", 1)
    case, dtypes = pairs_case(kind)
    held = []

    def launch(*args, _launch=gram_tile.launch_modes, **flags):
        held.append(len(args[4][0]))
        _launch(*args, **flags)

    monkeypatch.setattr(gram_pairs, "launch_modes", launch)
    found = []
    for limit in (configs.MAX_DIFFERENCE_BYTES, fit * 17 * 32 * dtypes[0].itemsize):
        monkeypatch.setattr(configs, "MAX_DIFFERENCE_BYTES", limit)
        tensors, out = one_step(case, dtypes, return_refined=True)
        leaves = [x for x in tensors.values() if x is not None and x.requires_grad]
        found.append([*out, *(leaf.grad for leaf in leaves)])
    # Images whose E is in memory, for each group
    assert held == [3, *([2, 2] if fit else [1, 1, 1])]
    for whole, grouped in zip(*found, strict=True):
        assert torch.equal(whole, grouped)
    if dtypes[0] == F64:
        assert_values(out, case)
        assert_gradients(tensors, case.gradients(WEIGHTS))


def test_partial_sums_of_working_tiles_alone(monkeypatch):
    monkeypatch.setattr(configs, "MIN_PATCHES_FOR_PAIRS", 1)
    given = []

    def record(*args, _sum=losses.sum_losses):
        given.append(args[2])
        return _sum(*args)

    monkeypatch.setattr(losses, "sum_losses", record)
    case = random_case(Shape(2, 1, 40, 20, 5), 0.8)
    case.run(case.tensors())
    assert given[0].numel() == 2 * 6  # of 3 x 3 tiles those on and above the diagonal
    assert (given[0] > 0).all()


@pytest.mark.parametrize("count", [1, 4096, 4097, 10_000])
def test_many_partial_sums_are_added_by_many_programs(count):
    partials = torch.rand(count, generator=torch.Generator().manual_seed(0))
    few = losses.few_partials(partials)
    assert few.numel() <= configs.MAX_PARTIALS
    # 1024 numbers in a tree: at most 10 roundings of each partial sum.
    torch.testing.assert_close(few.double().sum(), partials.double().sum(), rtol=10 * U32, atol=0)


def test_losses_of_many_partial_sums(monkeypatch):
    monkeypatch.setattr(configs, "MIN_PATCHES_FOR_PAIRS", 1)
    monkeypatch.setattr(configs, "MAX_PARTIALS", 2)
    monkeypatch.setattr(losses, "CHUNK", 2)
    case = random_case(Shape(2, 1, 17, 20, 5), 0.8)
    assert_values(case.run(case.tensors(), return_refined=True), case)


class Operators(TorchDispatchMode):
    """Collects the names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [F32, BF16])  # with and without the identity
def test_no_product_is_a_library_s(dtype):
    case = random_case(Shape(2, 1, 17, 64, 8), 0.8)
    tensors = case.tensors(dtype, dtype, dtype)
    student, teacher, down, up = (
        tensors[name].detach() for name in ("student", "teacher", "down", "up")
    )
    flags = dict.fromkeys(("has_refined", "has_residual", "has_grad_hz"), True)
    inputs = ForwardInputs(
        student,
        teacher,
        down,
        up,
        gram_target=None,
        gram=True,
        quantile=0.8,
        num_prefix_tokens=1,
        has_grad_target=False,
        acc=F32,
        product=dtype,
        gram_product=dtype,
        **flags,
    )
    with Operators() as operators:
        ops.losses_forward(inputs)
    # Buffers and views alone; the interpreter copies.
    products = {"mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "einsum", "dot", "mv"}
    assert "new_empty" in operators.names
    assert not operators.names & products


# --- outputs --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_by_rows_and_pairs")
@pytest.mark.parametrize("options", [{}, {"gram": False}, {"return_refined": True}])
def test_every_output_is_written(options):
    case = random_case(Shape(2, 1, 20, 40, 5), 0.8)
    expected, _ = one_step_of(case, options)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        assert torch.empty(1).isnan()
        found, _ = one_step_of(case, options)
    finally:
        torch.use_deterministic_algorithms(before)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def one_step_of(case, options):
    tensors = case.tensors(F32, F32, F32)
    out = case.run(tensors, **options)
    loss = out.kd + out.outlier + (0 if out.info is None else out.info)
    if out.refined is not None:
        loss = loss + out.refined.square().mean()
    loss.backward()
    given = [out.kd, out.outlier, out.info, out.refined, out.norms, out.threshold]
    grads = [tensors[name].grad for name in ("student", "down", "up")]
    return [x.detach() for x in given + grads if x is not None], out


def test_more_than_a_thousand_patches(monkeypatch):
    monkeypatch.setattr(configs, "INTERPRETER", configs.Config(256, 32, 1, 1))
    case = random_case(Shape(1, 5, 1100, 8, 2), 0.97)
    results = []
    for backend in ("triton", "reference"):
        tensors = case.tensors()
        out = case.run(tensors, backend=backend)
        total(out).backward()
        grads = [tensors[name].grad for name in ("student", "down", "up")]
        results.append([out.kd, out.outlier, out.info, out.threshold, *grads])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
