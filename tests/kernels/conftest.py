"""Settings that every test of the kernels shares."""

import emulation
import pytest
import torch

from singer_kernels import backends

emulation.load()

CPU = torch.device("cpu")
BACKENDS = [name for name in backends.NAMES if backends.unavailable_reason(name, CPU) is None]


@pytest.fixture(autouse=True)
def _no_backend_in_the_environment(monkeypatch):
    monkeypatch.delenv("SINGER_BACKEND", raising=False)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch, _no_backend_in_the_environment):
    """Run the test with every backend, by way of the environment."""
    monkeypatch.setenv("SINGER_BACKEND", request.param)
    return request.param
