"""The losses inside torch.compile, torch.export, torch.func, gradient checkpointing and AMP."""

import itertools

import pytest
import torch
from cases import Shape, random_case, total
from conftest import BACKENDS
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from singer_kernels import (
    FusedLosses,
    backends,
    fused_losses,
    gram_loss,
    kd_loss,
    outlier_loss,
    refine,
    token_norms,
)

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


@pytest.mark.sample(3)
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


FUNCTIONS = {
    "fused_losses": lambda s, f, d, u: sum(fused_losses(s, f, d, u)[:3]),
    "intermediate layer": lambda s, f, d, u: fused_losses(
        s, f, d, u, gram=False, return_refined=True
    ).refined.sum(),
    "refine": lambda s, f, d, u: refine(f, d, u).sum(),
    "token_norms": lambda s, f, d, u: token_norms(s).sum(),
    "outlier_loss": lambda s, f, d, u: outlier_loss(s[..., 0]),
    "gram_loss": lambda s, f, d, u: gram_loss(s, f),
    "kd_loss": lambda s, f, d, u: kd_loss(s, f),
}


def inputs_of(images, tokens, width=6, rank=3):
    generator = torch.Generator().manual_seed(images * tokens)
    shapes = (images, tokens, width), (images, tokens, width), (width, rank), (rank, width)
    student, teacher, down, up = (torch.randn(s, generator=generator) for s in shapes)
    return student.requires_grad_(), teacher, down.requires_grad_(), up.requires_grad_()


def losses_and_gradients(function, inputs):
    """Return the loss and its gradients; 0 where there is none: a compiled graph makes no None."""
    loss = function(*inputs)
    leaves = [x for x in inputs if x.requires_grad]
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [loss.detach(), *grads]


KERNELS = ("fused_losses", "intermediate layer", "gram_loss")  # the rest is the reference's
GRAPHS = [(name, function) for name in BACKENDS for function in KERNELS]
GRAPHS += [("reference", function) for function in FUNCTIONS if function not in KERNELS]
# By default one of KERNELS with each backend, and each function that is the reference's.
BY_DEFAULT = list(zip(BACKENDS, itertools.cycle(KERNELS[::-1]), itertools.cycle([None, True])))
BY_DEFAULT += [
    (*graph, dynamic)
    for graph, dynamic in zip(GRAPHS[len(BACKENDS) * len(KERNELS) :], itertools.cycle([None, True]))
]


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize(
    ("name", "function", "dynamic"),
    [
        pytest.param(*case, marks=[] if case in BY_DEFAULT else pytest.mark.slow)
        for case in ((*graph, dynamic) for graph in GRAPHS for dynamic in (None, True))
    ],
)
def test_a_few_graphs_serve_every_batch_and_token_count(name, function, dynamic, monkeypatch):
    monkeypatch.setenv("SINGER_BACKEND", name)
    function = FUNCTIONS[function]
    counter = CompileCounterWithBackend("aot_eager")
    wrapped = torch.compile(function, fullgraph=True, backend=counter, dynamic=dynamic)
    sizes = [(2, 5), (2, 7), (3, 9), (2, 10), (4, 12), (2, 13), (5, 14), (1, 15), (2, 17)]
    # From 256 patches on, the backend "torch" cuts its Gram products into panels.
    sizes += [(2, 290)] if (name, function) == ("torch", FUNCTIONS["fused_losses"]) else []
    for size in sizes:
        found = losses_and_gradients(wrapped, inputs_of(*size))
        expected = losses_and_gradients(function, inputs_of(*size))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count <= 6


class Layer(torch.nn.Module):
    def __init__(self, gram):
        super().__init__()
        self.losses = FusedLosses(6, 3, gram=gram, return_refined=not gram)

    def forward(self, student, teacher):
        return [x for x in self.losses(student, teacher) if x is not None]


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("name", BACKENDS)
def test_export_with_dynamic_batch_and_tokens(name, gram, monkeypatch):
    monkeypatch.setenv("SINGER_BACKEND", name)
    layer = Layer(gram)
    limits = {"min": 3, "max": 4096}  # the kernels' own are 65535 images and 16384 patches
    sizes = {0: torch.export.Dim("images", max=1024), 1: torch.export.Dim("tokens", **limits)}
    example = [x.detach() for x in inputs_of(3, 11)[:2]]
    program = torch.export.export(layer, tuple(example), dynamic_shapes=(sizes, sizes)).module()
    for size in ((2, 4), (5, 40), (1, 70)):
        tokens = [x.detach() for x in inputs_of(*size)[:2]]
        torch.testing.assert_close(program(*tokens), layer(*tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_inference_tensors_need_no_compilation(name, monkeypatch):
    """Eagerly they are copied; a compiled graph, in which torch saves them, names no_grad."""
    monkeypatch.setenv("SINGER_BACKEND", name)
    student, teacher, down, up = inputs_of(2, 7)
    with torch.inference_mode():
        inference = teacher + 0
    function = FUNCTIONS["fused_losses"]
    expected = losses_and_gradients(function, (student, teacher, down, up))
    found = losses_and_gradients(function, (student, inference, down, up))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
        compiled(function)(student, inference, down, up)


@pytest.mark.parametrize("name", [None, *BACKENDS])
def test_torch_func_grad(name):
    """First derivatives by the reference; the other backends refuse, in one line."""
    student, teacher, *adapter = inputs_of(2, 7)

    def losses(down, up):
        tokens = teacher + (teacher @ down) @ up
        out = fused_losses(student.detach(), teacher, down, up, backend=name)
        pieces = kd_loss(student.detach(), tokens, backend=name)
        pieces = pieces + gram_loss(tokens, teacher, backend=name)
        norms = token_norms(tokens, backend=name)
        return sum(out[:3]) + pieces + outlier_loss(norms, backend=name)

    detached = [x.detach() for x in adapter]
    gradient = torch.func.grad(losses, argnums=(0, 1))
    if name not in (None, "reference"):
        with pytest.raises(RuntimeError, match=r"^backend: '\w+' can't run.* torch\.func .*'ref"):
            gradient(*detached)
        return
    expected = torch.autograd.grad(losses(*adapter), adapter)
    torch.testing.assert_close(gradient(*detached), expected)
    with pytest.raises(RuntimeError, match="can't be differentiated twice"):
        torch.func.grad(lambda down: gradient(down, detached[1])[0].sum())(detached[0])


@pytest.mark.parametrize("how", ["jvp", "dual numbers"])
@pytest.mark.parametrize("name", [None, *BACKENDS])
def test_forward_mode(name, how):
    """Directional derivatives by the reference; the other backends refuse, in one line."""
    student, teacher, down, up = (x.detach() for x in inputs_of(2, 7))
    direction = torch.ones_like(down)

    def losses(down):
        tokens = refine(teacher, down, up, backend=name)
        out = fused_losses(student, teacher, down, up, backend=name)
        pieces = kd_loss(student, tokens, backend=name) + gram_loss(tokens, teacher, backend=name)
        norms = token_norms(tokens, backend=name)
        return sum(out[:3]) + pieces + outlier_loss(norms, backend=name)

    def derivative():
        if how == "jvp":
            return torch.func.jvp(losses, (down,), (direction,))[1]
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(losses(forward_ad.make_dual(down, direction))).tangent

    if name not in (None, "reference"):
        with pytest.raises(RuntimeError, match=r"^backend: '\w+' can't run.* 'reference' alone$"):
            derivative()
        return
    leaf = down.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(losses(leaf), leaf)
    torch.testing.assert_close(derivative(), (gradient * direction).sum())


@pytest.mark.parametrize("with_target", [False, True])
def test_batched_backward(backend, with_target):
    """Several backward passes at once, as Jacobians are taken."""
    student, teacher, down, up = inputs_of(2, 7)
    target = inputs_of(2, 7)[0] * 2 if with_target else None
    out = fused_losses(student, teacher, down, up, gram_target=target)
    losses = torch.stack(out[:3])
    inputs = [student, down, up, *([target] if with_target else [])]
    found = torch.autograd.grad(
        losses, inputs, torch.eye(3), is_grads_batched=True, retain_graph=True
    )
    for index in range(3):
        expected = torch.autograd.grad(losses[index], inputs, retain_graph=True, allow_unused=True)
        for rows, one in zip(found, expected, strict=True):
            torch.testing.assert_close(
                rows[index], torch.zeros_like(rows[0]) if one is None else one
            )
