"""Settings that every test of the kernels shares."""

import pytest


@pytest.fixture(autouse=True)
def _no_backend_in_the_environment(monkeypatch):
    monkeypatch.delenv("SINGER_BACKEND", raising=False)
