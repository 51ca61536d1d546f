"""One thread per test process: the tensors here are small, and threads would only wait."""

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:  # they run compiled kernels on CUDA tensors, and nothing else
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
