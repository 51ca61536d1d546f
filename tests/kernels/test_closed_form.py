"""What a closed form can get wrong where autograd can't; run on every backend all the same."""

import contextlib
import itertools

import pytest
import torch
from cases import WEIGHTS, Shape, assert_gradients, assert_values, random_case, total

from singer_kernels import fused_losses, gram_loss

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.usefixtures("backend")


def test_many_patches():
    # More than one panel of the symmetric product, the last of them narrower.
    case = random_case(Shape(1, 1, 300, 6, 3), 0.97)
    tensors = case.tensors()
    out = case.run(tensors)
    assert_values(out, case)
    total(out).backward()
    assert_gradients(tensors, case.gradients(WEIGHTS))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_the_student_reaches_no_gradient_but_that_of_kd(bad):
    case = random_case(Shape(2, 1, 9, 8, 3), 0.5)
    expected = case.gradients((0.0, 1.0, 1.0))
    tensors = case.tensors()
    with torch.no_grad():
        tensors["student"][1, 4, 3] = bad
    out = case.run(tensors)
    (out.outlier + out.info).backward()
    for name in ("down", "up"):
        wanted = torch.from_numpy(getattr(expected, name))
        torch.testing.assert_close(tensors[name].grad, wanted, rtol=1e-10, atol=1e-12)


def test_a_loss_that_is_not_asked_for_affects_nothing():
    case = random_case(Shape(2, 1, 9, 8, 3), 0.5, with_target=True)
    case.target[0, 3, 2] = float("nan")
    tensors = case.tensors()
    case.run(tensors).kd.backward()
    for name in ("student", "down", "up"):
        assert tensors[name].grad.isfinite().all()


@pytest.mark.parametrize("prefix", [0, 1])
def test_features_made_in_inference_mode(backend, prefix):
    case = random_case(Shape(2, prefix, 9, 8, 3), 0.5, with_target=True)
    expected = case.tensors()
    total(case.run({**expected, "gram_target": expected["gram_target"].detach()})).backward()
    tensors = case.tensors()
    with torch.inference_mode():
        teacher = tensors["teacher"].clone()
        target = tensors["gram_target"].detach().clone()
    given = {**tensors, "teacher": teacher, "gram_target": target}
    if backend == "reference" and prefix == 0:  # autograd can't keep such a tensor for a product
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            case.run(given)
        return
    total(case.run(given)).backward()
    for name in ("student", "down", "up"):
        torch.testing.assert_close(tensors[name].grad, expected[name].grad)


def test_refined_may_be_changed_in_place():
    case = random_case(Shape(2, 1, 9, 8, 3), 0.5)
    tensors = case.tensors(F32, F32, F32)
    with torch.no_grad():
        refined = case.run(tensors, return_refined=True).refined
    refined.add_(1)


def test_a_patch_that_is_all_but_cancelled_in_float16():
    teacher = 0.1 * torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(0))
    teacher[0, 3] = 0
    teacher[0, 3, :2] = torch.tensor([3e4, 0.01])
    down, up = torch.zeros(64, 2), torch.zeros(2, 64)
    down[0, 0], up[0, 0] = 1, -1
    student, teacher, down, up = (x.to(F16) for x in (0 * teacher, teacher, down, up))
    inputs = [down.requires_grad_(), up.requires_grad_()]
    out = fused_losses(student, teacher, *inputs)
    assert out.info.isfinite()
    for grad in torch.autograd.grad(out.info, inputs):
        assert not grad.isnan().any()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_backward_may_run_under_autocast(backend, autocast):
    case = random_case(Shape(2, 1, 9, 8, 3), 0.5, with_target=True)
    gradients = []
    for inside in (False, autocast):
        tensors = case.tensors(F32, F32, F32)
        loss = total(case.run(tensors))
        context = torch.autocast("cpu", BF16) if inside else contextlib.nullcontext()
        with context:
            loss.backward()
        gradients.append([tensors[name].grad for name in ("student", "down", "up", "gram_target")])
    # Autograd's own backward may round there to 2^-8, in a chain of four; a closed form does not.
    tolerance = 2**-6 if backend == "reference" and autocast else 0
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.sample(3)
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)))
def test_each_gradient_alone_is_that_of_all_together(wanted):
    case = random_case(Shape(2, 1, 9, 8, 3), 0.5, with_target=True)
    names = ("student", "down", "up", "gram_target")
    everything, some = case.tensors(), case.tensors()
    total(case.run(everything)).backward()
    for name, needed in zip(names, wanted, strict=True):
        some[name].requires_grad_(needed)
    if not any(wanted):
        assert not total(case.run(some)).requires_grad
        return
    total(case.run(some)).backward()
    for name, needed in zip(names, wanted, strict=True):
        if needed:
            torch.testing.assert_close(some[name].grad, everything[name].grad)
        else:
            assert some[name].grad is None


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    case = random_case(Shape(2, 1, 9, 8, 3), 0.5, with_target=True)
    tensors = case.tensors()
    loss = total(case.run(tensors, return_refined=True))
    inputs = [tensors[name] for name in ("student", "down", "up", "gram_target")]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, inputs), strict=True):
        assert torch.equal(a, b)


def test_tf32_products_take_no_difference_of_large_numbers(backend):
    # Under TF32 the identity for F Fᵀ would subtract rounded numbers: the direct product is used.
    case = random_case(Shape(2, 1, 9, 8, 3), 0.5)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        out = case.run(case.tensors(F32, F32, F32))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    exact = case.rounded(F32, F32, F32).values()
    assert out.info.item() == pytest.approx(exact.info, rel=1e-5)


def test_devices_without_autocast(backend):
    student, teacher = torch.empty(2, 5, 8, device="meta"), torch.empty(2, 5, 8, device="meta")
    down, up = torch.empty(8, 3, device="meta"), torch.empty(3, 8, device="meta")
    inputs = [x.requires_grad_() for x in (student, down, up)]
    needs = {"triton": "a CUDA device", "cuda": "a CUDA device", "cpu": "a CPU"}.get(backend)
    if needs is not None:
        with pytest.raises(RuntimeError, match=f"'{backend}' can't run on meta: it needs {needs}"):
            fused_losses(inputs[0], teacher, *inputs[1:])
        return
    out = fused_losses(inputs[0], teacher, *inputs[1:])
    total(out).backward()
    assert [x.grad.shape for x in inputs] == [x.shape for x in inputs]
    assert gram_loss(student, teacher).shape == ()
