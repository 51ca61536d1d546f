"""The result's fields, differentiating twice, the choice of a backend, and the module form."""

import logging
import re
import sys
import types

import pytest
import torch
from cases import Shape, random_case, total

import singer_kernels
from singer_kernels import (
    FusedLosses,
    FusedLossesOutput,
    backends,
    fused_losses,
    gram_loss,
    kd_loss,
    outlier_loss,
    refine,
    resolve_backend,
    token_norms,
)

CPU, META = torch.device("cpu"), torch.device("meta")
SHAPE = Shape(2, 1, 9, 8, 3)


def tensors():
    return random_case(SHAPE, 0.97).tensors()


# --- the result -----------------------------------------------------------------------------------


def test_the_public_names():
    assert sorted(singer_kernels.__all__) == [
        "FusedLosses",
        "FusedLossesOutput",
        "__version__",
        "fused_losses",
        "gram_loss",
        "kd_loss",
        "outlier_loss",
        "refine",
        "resolve_backend",
        "token_norms",
    ]
    assert all(hasattr(singer_kernels, name) for name in singer_kernels.__all__)


def test_the_result_is_a_named_tuple():
    out = fused_losses(**tensors(), return_refined=True)
    assert type(out) is FusedLossesOutput
    assert isinstance(out, tuple)
    assert out._fields == ("kd", "outlier", "info", "refined", "norms", "threshold")
    assert [tuple(x.shape) for x in out] == [(), (), (), (2, 10, 8), (2, 9), (2,)]
    assert [x.requires_grad for x in out] == [True, True, True, True, False, False]


def test_defaults():
    out = fused_losses(**tensors())
    assert out.refined is None
    same = fused_losses(
        **tensors(), gram=True, quantile=0.97, num_prefix_tokens=1, return_refined=False
    )
    other = fused_losses(**tensors(), quantile=0.9, num_prefix_tokens=2)
    for name in ("kd", "outlier", "info"):
        assert torch.equal(getattr(out, name), getattr(same, name))
        assert not torch.equal(getattr(out, name), getattr(other, name))


def test_the_default_target_is_the_plain_teacher():
    given = tensors()
    explicit = fused_losses(**{**given, "gram_target": given["teacher"]})
    # A backend may use that F is known; what it then computes is equal to float64 rounding.
    torch.testing.assert_close(fused_losses(**given).info, explicit.info, rtol=1e-12, atol=0)


def test_without_gram_there_is_no_info_and_the_rest_is_the_same():
    out, with_gram = fused_losses(**tensors(), gram=False), fused_losses(**tensors())
    assert out.info is None
    for name in ("kd", "outlier", "norms", "threshold"):
        assert torch.equal(getattr(out, name), getattr(with_gram, name))


# --- differentiating twice ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("output", ["kd", "outlier", "info", "refined"])
def test_differentiating_fused_losses_twice_raises(output):
    case = random_case(SHAPE, 0.5, with_target=True)
    given = case.tensors()
    out = case.run(given, return_refined=True)
    getattr(out, output).sum().backward(create_graph=True)
    grads = [x.grad for x in given.values() if x.grad is not None]
    assert len(grads) >= 2
    for grad in grads:
        with pytest.raises(RuntimeError, match="twice"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize(
    ("piece", "count"),
    [
        (lambda a, b: refine(torch.ones(2, 5, 6, dtype=a.dtype), a[0, :, :3], b[0, :3]), 2),
        (lambda a, b: token_norms(a), 1),
        (lambda a, b: outlier_loss(a[0].abs(), 0.5), 1),
        (lambda a, b: gram_loss(a, b), 2),
        (lambda a, b: kd_loss(a, b), 2),
    ],
    ids=["refine", "token_norms", "outlier_loss", "gram_loss", "kd_loss"],
)
def test_differentiating_a_piece_twice_raises(piece, count):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 2, 6, 6, dtype=torch.float64, generator=generator)
    inputs = [a.requires_grad_(), b.requires_grad_()][:count]
    grads = torch.autograd.grad(piece(a, b).sum(), inputs, create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="twice"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("output", ["kd", "outlier", "info"])
def test_a_gradient_penalty_is_refused_even_beside_a_term_that_has_a_gradient(output):
    # Were the penalty's part dropped in silence, the other term would hide it.
    given = random_case(SHAPE, 0.5).tensors()
    loss = getattr(fused_losses(**given, quantile=0.5), output)
    (grad,) = torch.autograd.grad(loss, given["up"], create_graph=True)
    penalised = grad.square().sum() + given["up"].square().sum()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(penalised, given["up"])


def test_a_graph_around_the_losses_may_be_differentiated_once_more_elsewhere():
    # A penalty on another branch of the student still has its second derivative.
    given = tensors()
    x = given["student"]
    out = fused_losses(**given)
    (slope,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    (out.kd + slope.sum()).backward()
    (d_kd,) = torch.autograd.grad(fused_losses(**given).kd, x)
    assert torch.allclose(x.grad, d_kd + 6 * x.detach(), rtol=1e-14, atol=1e-14)


# --- the choice of a backend ----------------------------------------------------------------------


@pytest.fixture
def fresh():
    """Forget the automatic choices made so far, and those that the test makes."""
    backends._chosen.clear()
    yield
    backends._chosen.clear()
    backends._loaded.pop("fake", None)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="singer_kernels")
    return caplog


@pytest.fixture
def fake(monkeypatch, fresh):
    """A backend, preferred to all others, that says it can't run."""

    class Fake(backends.Backend):
        reason = "the driver is from 1993"

        def unavailable_reason(self, device, explicit):
            return self.reason

        def fused_losses(self, inputs):
            raise NotImplementedError

        def kd_loss(self, student, tokens):
            return "from the fake"

    module = types.ModuleType("singer_kernels.backends.fake")
    module.backend = Fake()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "NAMES", ("fake", "reference"))
    return module.backend


def kd(backend=None, device="cpu"):
    x = torch.ones(1, 2, 3, device=device)
    return kd_loss(x, x, backend=backend)


def test_the_automatic_choice_is_logged_once_per_device(fresh, log):
    for _ in range(3):
        kd()
        fused_losses(**tensors())
    assert len(log.records) == 1
    record = log.records[0]
    assert (record.name, record.levelno) == ("singer_kernels", logging.INFO)
    assert "cpu" in record.getMessage()
    assert repr(resolve_backend(None, CPU)) in record.getMessage()
    kd(device="meta")
    kd(device="meta")
    assert len(log.records) == 2
    assert "meta" in log.records[1].getMessage()


def test_a_forced_backend_is_not_logged(fresh, log, monkeypatch):
    kd("reference")
    monkeypatch.setenv("SINGER_BACKEND", "reference")
    kd()
    assert log.records == []


def test_the_automatic_choice_falls_back_and_says_why(fake, log):
    assert isinstance(kd(), torch.Tensor)
    assert len(log.records) == 1
    message = log.records[0].getMessage()
    assert "'reference'" in message
    assert "fake: the driver is from 1993" in message


def test_the_automatic_choice_prefers_the_first_that_can_run(fake, log):
    fake.reason = None
    assert kd() == "from the fake"
    assert "'fake'" in log.records[0].getMessage()


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_forced_backend_that_can_not_run_raises_with_its_reason(fake, monkeypatch, by):
    if by == "environment":
        monkeypatch.setenv("SINGER_BACKEND", "fake")
    source = {"argument": "backend", "environment": "SINGER_BACKEND"}[by]
    with pytest.raises(RuntimeError, match="the driver is from 1993") as caught:
        kd("fake" if by == "argument" else None)
    assert str(caught.value).startswith(f"{source}: 'fake' can't run on cpu")


def test_the_argument_goes_before_the_environment(fake, monkeypatch):
    monkeypatch.setenv("SINGER_BACKEND", "fake")
    assert isinstance(kd("reference"), torch.Tensor)
    monkeypatch.setenv("SINGER_BACKEND", "reference")
    fake.reason = None
    assert kd("fake") == "from the fake"
    assert isinstance(kd(), torch.Tensor)


def test_the_environment_goes_before_the_automatic_choice(fake, monkeypatch):
    fake.reason = None
    monkeypatch.setenv("SINGER_BACKEND", "reference")
    assert isinstance(kd(), torch.Tensor)
    monkeypatch.setenv("SINGER_BACKEND", "")
    assert kd() == "from the fake"


def test_resolve_backend_names_what_a_call_would_use(fake, monkeypatch):
    assert resolve_backend(None, CPU) == resolve_backend("reference", CPU) == "reference"
    with pytest.raises(RuntimeError, match="the driver is from 1993"):
        resolve_backend("fake", CPU)
    with pytest.raises(ValueError, match=r"^backend: got 'nope', expected one of fake, reference"):
        resolve_backend("nope", CPU)
    fake.reason = None
    assert resolve_backend("fake", CPU) == "fake"
    monkeypatch.setenv("SINGER_BACKEND", "fake")
    assert resolve_backend(None, CPU) == "fake"
    monkeypatch.setenv("SINGER_BACKEND", "nope")
    with pytest.raises(ValueError, match=r"^SINGER_BACKEND: got 'nope'"):
        resolve_backend(None, CPU)


def test_a_backend_that_can_not_be_imported_is_one_that_can_not_run(monkeypatch, fresh, log):
    monkeypatch.setattr(backends, "NAMES", ("missing", "reference"))
    assert isinstance(kd(), torch.Tensor)
    assert "missing: it can't be imported" in log.records[0].getMessage()
    with pytest.raises(RuntimeError, match="it can't be imported"):
        kd("missing")


def test_no_backend_can_run(fake, monkeypatch):
    monkeypatch.setattr(backends, "NAMES", ("fake",))
    with pytest.raises(RuntimeError, match="no backend can run on cpu: fake: the driver is from"):
        kd()


def test_every_backend_has_every_function():
    for name in backends.NAMES:
        if backends.unavailable_reason(name, CPU) is None:
            module = backends.load(name)
            for function in (fused_losses, refine, token_norms, outlier_loss, gram_loss, kd_loss):
                assert callable(getattr(module, function.__name__))


# --- the module form ------------------------------------------------------------------------------


def test_the_module_holds_the_adapter_and_nothing_else():
    layer = FusedLosses(8, 3)
    assert set(layer.state_dict()) == {"down", "up"}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"down", "up"}
    assert list(layer.buffers()) == []
    assert layer.down.shape == (8, 3)
    assert layer.up.shape == (3, 8)
    assert layer.down.is_contiguous()
    assert layer.up.is_contiguous()


def test_the_rank_is_64_unless_told():
    assert FusedLosses(80).down.shape == (80, 64)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_parameters_start_from_an_orthonormal_basis(rank):
    layer = FusedLosses(8, rank, dtype=torch.float64)
    first = layer.down.detach().clone()
    for _ in range(2):
        gram = layer.down.detach().mT @ layer.down.detach()
        # The basis is drawn in float32.
        assert torch.allclose(gram, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-6)
        assert torch.equal(layer.up, layer.down.mT)
        layer.reset_parameters()
        assert not torch.equal(layer.down, first)


def test_the_seed_decides_the_basis():
    torch.manual_seed(3)
    first = FusedLosses(8, 3)
    torch.manual_seed(3)
    assert torch.equal(FusedLosses(8, 3).down, first.down)


def test_set_basis():
    layer = FusedLosses(8, 3)
    down, up = layer.down, layer.up
    basis = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    layer.set_basis(basis)
    assert layer.down is down
    assert layer.up is up
    assert torch.equal(layer.down, basis.float())
    assert torch.equal(layer.up, basis.float().mT)
    assert layer.down.is_leaf
    assert layer.down.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_parameters_have_the_dtype_and_device_asked_for(dtype):
    layer = FusedLosses(8, 3, dtype=dtype, device="meta")
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert {p.device for p in layer.parameters()} == {META}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("with_target", [False, True])
def test_the_module_computes_what_the_function_computes(with_target):
    case = random_case(Shape(2, 2, 9, 8, 3), 0.8, with_target=with_target)
    given = case.tensors()
    layer = FusedLosses(
        8,
        3,
        quantile=0.8,
        num_prefix_tokens=2,
        return_refined=True,
        dtype=torch.float64,
    )
    layer.load_state_dict({"down": given["down"].detach(), "up": given["up"].detach()})
    out = layer(given["student"].detach(), given["teacher"], given["gram_target"])
    expected = case.run(given, return_refined=True)
    for a, e in zip(out, expected, strict=True):
        assert torch.equal(a, e)
    total(out).backward()
    for grad in ("down", "up"):
        (e,) = torch.autograd.grad(total(expected), given[grad], retain_graph=True)
        assert torch.equal(getattr(layer, grad).grad, e)


def test_the_module_passes_every_option_on():
    layer = FusedLosses(8, 3, gram=False, dtype=torch.float64)
    out = layer(tensors()["student"], tensors()["teacher"])
    assert out.info is None
    assert out.refined is None
    text = repr(layer)
    for part in ("dim=8", "rank=3", "gram=False", "quantile=0.97", "num_prefix_tokens=1"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "kind", "expected"),
    [
        ({"dtype": torch.int32}, TypeError, "dtype: got torch.int32"),
        ({"backend": 3}, TypeError, "backend: got 3"),
        ({"backend": "warp"}, ValueError, "backend: got 'warp'"),
    ],
)
def test_module_refuses_what_it_could_not_use_later(options, kind, expected):
    with pytest.raises(kind, match=re.escape(expected)):
        FusedLosses(6, 2, **options)


def test_module_of_mixed_precision_with_no_adapter_has_no_information_loss():
    # G(F̂) and G(F) take one dtype: rounding them apart would leave a loss where nothing changed.
    module = FusedLosses(16, 2, backend="reference")
    torch.nn.init.zeros_(module.up)
    teacher = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert module(teacher, teacher).info.item() == 0.0
