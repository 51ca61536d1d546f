"""Settings that all tests share."""

import collections
import os

import pytest
import torch

# The tensors here are small, and threads would only wait.
torch.set_num_threads(1)

# Before any test's module imports Triton, as torch does in places: without a GPU its interpreter
# runs the kernels, and what is imported before that is set does not take part.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)  # before "-m" selects by the markers added here
def pytest_collection_modifyitems(items):
    # @pytest.mark.sample(n): every n-th case of a grid belongs to the ordinary run, the others are
    # slow. Choose an n that has no divisor in common with the lengths of the grid's last axes, so
    # that the sample meets every value of every axis.
    counts = collections.Counter()
    for item in items:
        marker = item.get_closest_marker("sample")
        if marker is not None:
            grid = (item.path, item.originalname)
            if counts[grid] % marker.args[0]:
                item.add_marker(pytest.mark.slow)
            counts[grid] += 1
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:  # they run compiled kernels on CUDA tensors, and nothing else
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
