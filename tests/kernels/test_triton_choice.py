"""Backend "triton": supported calls, reasons why it can't run, table of configurations."""

import logging

import numpy as np
import pytest
import torch
from bounds import unit
from conftest import BACKENDS

pytest.importorskip("triton")

from singer_kernels import backends, fused_losses
from singer_kernels.backends import CallSpec
from singer_kernels.backends.precision import MatmulPrecision
from singer_kernels.backends.triton import configs, outlier

CPU = torch.device("cpu")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
pytestmark = pytest.mark.skipif(
    "triton" not in BACKENDS, reason="kernels are compiled where there is a GPU"
)


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch):
    monkeypatch.setenv("SINGER_BACKEND", "triton")


def test_what_is_not_served_is_refused_with_the_reason():
    x = torch.zeros(1, 3, 512)
    with pytest.raises(
        RuntimeError, match="'triton' can't run this call: rank 257 is more than 256"
    ):
        fused_losses(x, x, torch.zeros(512, 257), torch.zeros(257, 512))
    x = torch.zeros(1, 1, 2).expand(65536, 3, 2)
    with pytest.raises(RuntimeError, match="65536 images are more than 65535"):
        fused_losses(x, x, torch.zeros(2, 1), torch.zeros(1, 2))
    x = torch.zeros(1, 16386, 2)
    with pytest.raises(RuntimeError, match="16385 patches are more than 16384"):
        fused_losses(x, x, torch.zeros(2, 1), torch.zeros(1, 2))


def test_float64_is_for_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backend = backends.load("triton")
    reason = backend.unsupported_reason(CallSpec(2, 9, 3, MatmulPrecision(F64, F64)))
    assert reason == "it does not compute in float64"
    assert backend.unsupported_reason(CallSpec(2, 9, 3, MatmulPrecision(F32, F32))) is None


def test_wide_float16_products_are_not_served(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backend = backends.load("triton")
    assert backend.unsupported_reason(CallSpec(2, 9, 128, MatmulPrecision(F16, F32))) is None
    assert backend.unsupported_reason(CallSpec(2, 9, 129, MatmulPrecision(BF16, F32))) is None
    reason = backend.unsupported_reason(CallSpec(2, 9, 129, MatmulPrecision(F16, F32)))
    assert reason == "float16 products of rank 129 are wider than 128"


def test_the_automatic_choice_passes_over_what_is_not_served(monkeypatch, caplog):
    monkeypatch.delenv("SINGER_BACKEND")
    monkeypatch.setattr(backends, "NAMES", ("triton", "torch", "reference"))
    monkeypatch.setattr(backends, "_chosen", {CPU: "triton"})
    monkeypatch.setattr(backends, "_logged_fallbacks", set())
    x = torch.randn(1, 3, 300, generator=torch.Generator().manual_seed(0))
    small, large = torch.zeros(300, 4), torch.zeros(300, 257)
    with caplog.at_level(logging.INFO, "singer_kernels"):
        fused_losses(x, x, small, small.mT)
        assert caplog.messages == []
        for _ in range(2):
            fused_losses(x, x, large, large.mT)
    assert caplog.messages == [
        "backend 'torch' takes calls on cpu (triton: rank 257 is more than 256)"
    ]


def test_the_interpreter_is_never_the_automatic_choice():
    backend = backends.load("triton")
    assert backend.unavailable_reason(CPU, explicit=True) is None
    assert backend.unavailable_reason(CPU, explicit=False) == "the interpreter is for tests"


def test_a_device_is_looked_at_while_tracing(monkeypatch):
    backend = backends.load("triton")
    device = torch.device("cuda", 0)

    def function(x):
        return x + 1 if backend.unavailable_reason(device, True) is not None else x

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(())) == 1
    assert backend.unavailable_reason(device, True) == "torch finds no NVIDIA GPU"


def test_an_old_device_is_refused_with_its_capability(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    reason = backends.load("triton").unavailable_reason(torch.device("cuda", 0), True)
    assert reason == "it needs compute capability 8.0, the device has 7.5"


def test_a_triton_that_can_not_start_is_refused_with_its_reason(monkeypatch):
    import triton

    class Driver:
        def get_current_target(self):
            raise RuntimeError("Failed to find\nC compiler.")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(type(triton.runtime.driver), "active", Driver())
    reason = backends.load("triton").unavailable_reason(torch.device("cuda", 0), True)
    assert reason == "Triton can't start: Failed to find C compiler."


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 9), 86),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
        ((12, 0), 86),
        ((12, 1), 86),
    ],
)
def test_every_device_has_an_architecture_in_the_table(capability, expected):
    assert configs.architecture(capability) == expected


@pytest.mark.parametrize("rank", [1, 16, 17, 64, 65, 128, 129, 200, 256])
@pytest.mark.parametrize("operand", ["bfloat16", "float32"])
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_every_call_has_a_configuration(arch, operand, rank):
    for kernel in configs.TABLE:
        if kernel == "gram_rows" and rank > configs.MAX_GRAM_ROWS_RANK:
            continue
        is_identity = operand == "bfloat16" and rank <= configs.MAX_IDENTITY_RANK
        if kernel.endswith("_recompute") and not is_identity:
            continue
        assert configs.lookup(kernel, arch, operand, rank).rows >= 16


@pytest.mark.parametrize("kernel", ["gram_rows", "gram_pairs"])
@pytest.mark.parametrize("arch", configs.ARCHITECTURES)
def test_both_launches_of_the_identity_share_their_tiles(arch, kernel):
    identity, recompute = (
        configs.lookup(name, arch, "bfloat16", configs.MAX_IDENTITY_RANK).rows
        for name in (kernel, f"{kernel}_recompute")
    )
    assert identity == recompute


def test_every_configuration_has_its_reason():
    for choices in configs.TABLE.values():
        for choice in choices:
            assert len(choice.reason) > 10
            assert "\n" not in choice.reason


@pytest.mark.parametrize("patches", [1, 2, 10, 196, 1369])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.97, 1.0])
def test_the_quantile_position(patches, quantile):
    index, fraction = outlier.quantile_position(quantile, patches, F64)
    assert 0 <= index < patches
    assert index + fraction == quantile * (patches - 1)
    index, fraction = outlier.quantile_position(quantile, patches, F32)
    position = (torch.tensor(quantile) * (patches - 1)).item()
    assert (index, fraction) == (int(position), position - int(position))
    assert abs(fraction - np.float32(fraction)) <= unit(F32)
