"""The losses inside what users wrap around them: torch.compile, gradient checkpointing, AMP."""

import pytest
import torch
from cases import Shape, random_case, total
from conftest import BACKENDS
from torch.utils.checkpoint import checkpoint

from singer_kernels import backends, gram_loss

F32 = torch.float32
NAMES = ("student", "down", "up", "gram_target")


@pytest.fixture
def _fresh():
    torch._dynamo.reset()
    backends._chosen.clear()
    yield
    torch._dynamo.reset()


def gradients(case, wrap, autocast=False, **options):
    tensors = case.tensors(F32, F32, F32)

    def losses(student, down, up, gram_target):
        given = {"student": student, "down": down, "up": up, "gram_target": gram_target}
        return total(case.run({"teacher": tensors["teacher"], **given}, **options))

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = wrap(losses)(*[tensors[name] for name in NAMES])
    loss.backward()
    return [loss.detach(), *[tensors[name].grad for name in NAMES if tensors[name] is not None]]


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def checkpointed(function):
    return lambda *inputs: checkpoint(function, *inputs, use_reentrant=False)


# The reference is a specification: torch.quantile, which it calls, can't be compiled everywhere.
WRAPPED = [(name, checkpointed) for name in BACKENDS]
WRAPPED += [(name, compiled) for name in BACKENDS if name != "reference"]


@pytest.mark.sample(5)
@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("with_target", [False, True])
@pytest.mark.parametrize(("name", "wrap"), WRAPPED)
def test_wrapped_gives_the_same(name, wrap, with_target, autocast, monkeypatch):
    monkeypatch.setenv("SINGER_BACKEND", name)
    case = random_case(Shape(2, 1, 9, 8, 3), 0.8, with_target=with_target)
    expected = gradients(case, lambda function: function, autocast)
    for found, wanted in zip(gradients(case, wrap, autocast), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.usefixtures("_fresh")
def test_compiled_with_the_automatic_backend():
    case = random_case(Shape(2, 1, 9, 8, 3), 0.8)
    found = gradients(case, compiled)
    torch.testing.assert_close(found, gradients(case, lambda function: function))


@pytest.mark.usefixtures("_fresh")
def test_compiled_gram_loss():
    generator = torch.Generator().manual_seed(0)
    tokens, target = (torch.randn(2, 6, 5, generator=generator).requires_grad_() for _ in "ab")
    results = []
    for function in (gram_loss, compiled(gram_loss)):
        loss = function(tokens, target)
        results.append([loss, *torch.autograd.grad(loss, [tokens, target])])
    torch.testing.assert_close(*results)
