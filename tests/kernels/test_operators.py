"""What the backends with kernels share: "triton" (interpreted), "cuda" (emulated) and "cpu"."""

import numpy as np
import pytest
import torch
from cases import Shape, random_case, total
from conftest import BACKENDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from singer_kernels import fused_losses
from singer_kernels.backends.operators import BackwardInputs

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(
    params=[
        pytest.param(
            name,
            marks=pytest.mark.skipif(name not in BACKENDS, reason=f"{name!r} can't run on a CPU"),
        )
        for name in ("triton", "cuda", "cpu")
    ],
    autouse=True,
)
def kernels(request, monkeypatch):
    monkeypatch.setenv("SINGER_BACKEND", request.param)
    if request.param == "triton":
        from singer_kernels.backends.triton import configs

        monkeypatch.setattr(configs, "INTERPRETER", configs.Config(16, 32, 1, 1))
    return request.param


def one_step(case, dtypes):
    tensors = case.tensors(*dtypes)
    out = case.run(tensors)
    total(out).backward()
    return tensors, out


# More than the 32 patches of a block in csrc/cpu: the partial sums of blocks are added.
SEVERAL_BLOCKS = Shape(2, 1, 40, 70, 20)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (F32, SEVERAL_BLOCKS),
        (BF16, Shape(2, 1, 18, 40, 20)),
        (F16, Shape(2, 1, 18, 40, 20)),
        pytest.param(BF16, SEVERAL_BLOCKS, marks=pytest.mark.slow),
        pytest.param(F16, SEVERAL_BLOCKS, marks=pytest.mark.slow),
    ],
)
def test_the_same_input_gives_the_same_bits(dtype, shape):
    case = random_case(shape, 0.8)
    first, second = (one_step(case, (dtype, dtype, F32)) for _ in range(2))
    for a, b in zip(first[1][:3], second[1][:3], strict=True):
        assert torch.equal(a, b)
    for name in ("student", "down", "up"):
        assert torch.equal(first[0][name].grad, second[0][name].grad)


def test_h_does_not_matter_without_a_gradient_of_the_outlier_loss(kernels):
    tokens, hz = torch.ones(1, 4, 8), torch.full((1, 3, 4), torch.inf)
    inputs = BackwardInputs(
        student=tokens,
        teacher=tokens,
        up=torch.ones(2, 8),
        hz=hz,
        grad_hz=None,
        residual=torch.ones(1, 3, 2),
        norms=torch.ones(1, 3),
        threshold=torch.ones(1),
        outlier_weight=torch.ones(()),
        grad_kd=torch.tensor(16.0),
        grad_outlier=None,
        grad_info=None,
        grad_refined=None,
        num_prefix_tokens=1,
        acc=F32,
        product=F32,
        student_dtype=None,
        down_dtype=F32,
        up_dtype=None,
    )
    operator = getattr(torch.ops.singer_kernels, f"{kernels}_losses_backward")
    # dH = 2 · 16 / (B T D) (F̂ − S) Wuᵀ = 1, and dWd its sum over three patches.
    assert torch.equal(operator(*inputs)[1], torch.full((8, 2), 3.0))


def held(case, backend, dtype):
    """Return the bytes that the forward keeps for the backward, beside its inputs."""
    tensors = case.tensors(dtype, dtype, dtype)
    given_storages = {x.untyped_storage().data_ptr() for x in tensors.values() if x is not None}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in given_storages:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        case.run(tensors, backend=backend)
    return sum(storage.nbytes() for storage in kept.values())


def test_at_most_a_tenth_of_the_references_memory_is_held(kernels):
    # D / r as in ViT-L with rank 64: per patch 14 r bytes in bfloat16 and 20 r in float32, beside
    # the norms.
    case = random_case(Shape(1, 1, 17, 256, 16), 0.97)
    dtype = F32 if kernels == "cpu" else BF16
    assert held(case, kernels, dtype) <= 0.1 * held(case, "reference", dtype)


# --- strides --------------------------------------------------------------------------------------


@st.composite
def strided(draw):
    """A layout of ``[B, T, D]``: padding behind each dimension, steps, and which is expanded."""
    return {
        "padding": draw(st.tuples(*[st.integers(0, 3)] * 3)),
        "order": draw(st.permutations(range(3))),
        "expanded": draw(st.booleans()),
    }


def laid_out(values, layout):
    """Return a tensor with these values and that layout in memory."""
    shape, order = values.shape, layout["order"]
    room = [shape[axis] + layout["padding"][axis] for axis in order]
    backing = torch.full(room, float("nan"), dtype=values.dtype)
    view = backing.permute(*np.argsort(order).tolist())
    view = view[tuple(slice(0, size) for size in shape)]
    view.copy_(values)
    return view[:1].expand(shape) if layout["expanded"] else view


@pytest.mark.slow
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(student=strided(), teacher=strided(), target=strided(), has_target=st.booleans())
def test_any_strides(student, teacher, target, has_target):
    case = random_case(Shape(2, 1, 18, 35, 4), 0.8, with_target=True)
    given_tensors, plain_tensors = [], []
    for name, layout in (("student", student), ("teacher", teacher), ("target", target)):
        values = laid_out(torch.from_numpy(getattr(case, name)), layout)
        given_tensors.append(values)
        plain_tensors.append(values.contiguous())
    down, up = torch.from_numpy(case.down), torch.from_numpy(case.up)
    results = []
    for a, b, c in (given_tensors, plain_tensors):
        inputs = [x.detach().requires_grad_() for x in (a, down, up, c)]
        out = fused_losses(
            inputs[0], b, *inputs[1:3], gram_target=inputs[3] if has_target else None
        )
        wanted = inputs if has_target else inputs[:3]
        results.append([out.kd, out.outlier, out.info, *torch.autograd.grad(total(out), wanted)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


# --- the operators --------------------------------------------------------------------------------


def operator_samples(name):
    case = random_case(Shape(2, 1, 9, 8, 3), 0.8, with_target=True)
    student, teacher, down, up, target = (
        torch.from_numpy(x).to(F32)
        for x in (case.student, case.teacher, case.down, case.up, case.target)
    )
    forward = getattr(torch.ops.singer_kernels, f"{name}_losses_forward").default
    backward = getattr(torch.ops.singer_kernels, f"{name}_losses_backward").default
    gram = getattr(torch.ops.singer_kernels, f"{name}_gram_loss").default
    for has_target, has_gram, needs in (
        (True, True, True),
        (False, True, True),
        (False, False, True),
        (False, True, False),
    ):
        arguments = (
            student,
            teacher,
            down,
            up,
            target if has_target else None,
            has_gram,
            0.8,
            1,
            not has_gram,
            needs,
            has_gram and needs,
            has_target,
            F32,
            F32,
            F32,
        )
        yield forward, arguments
        if needs:
            out = forward(*arguments)
            one = torch.ones(())
            yield (
                backward,
                (
                    student,
                    teacher,
                    up,
                    out[7],
                    out[9] if has_gram else None,
                    out[8],
                    out[4],
                    out[5],
                    out[6],
                    one,
                    one,
                    one if has_gram else None,
                    None if has_gram else torch.ones_like(teacher),
                    1,
                    F32,
                    F32,
                    F32,
                    F32,
                    F32,
                ),
            )
    yield gram, (student, target, 1, True, True, F32, F32)
    yield gram, (student, target, 1, False, False, F32, F32)


@pytest.mark.sample(2)
@pytest.mark.parametrize("index", range(9))
def test_opcheck(kernels, index):
    samples = list(operator_samples(kernels))
    assert len(samples) == 9
    operator, arguments = samples[index]
    torch.library.opcheck(operator, arguments)


class Losses(torch.nn.Module):
    def forward(self, student, teacher, down, up):
        return tuple(fused_losses(student, teacher, down, up)[:3])


def test_export():
    case = random_case(Shape(2, 1, 9, 8, 3), 0.97)
    inputs = tuple(
        torch.from_numpy(x).to(F32) for x in (case.student, case.teacher, case.down, case.up)
    )
    program = torch.export.export(Losses(), inputs)
    for found, expected in zip(program.module()(*inputs), Losses()(*inputs), strict=True):
        assert torch.equal(found, expected)
