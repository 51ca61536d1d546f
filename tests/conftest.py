"""Settings that all tests share."""

import os

import pytest
import torch

# The tensors here are small, and threads would only wait.
torch.set_num_threads(1)

# Before any test's module imports Triton, as torch does in places: without a GPU its interpreter
# runs the kernels, and what is imported before that is set does not take part.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:  # they run compiled kernels on CUDA tensors, and nothing else
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
