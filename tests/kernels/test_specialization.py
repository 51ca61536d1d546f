"""Variants that Triton's launcher would compile, counted without a GPU and without compiling."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# A driver that knows its target alone: the hook notes each variant and stops before compiling it.
SCRIPT = """
import json
import torch
import triton
from triton.backends.compiler import GPUTarget
from singer_kernels.backends.triton import launch, ops
from singer_kernels.backends.operators import BackwardInputs

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0

variants = []

def note(*, key, fn, **_):
    variants.append((fn.name, key))
    return True

triton.runtime.driver.set_active(Driver())
triton.knobs.runtime.jit_cache_hook = note
launch.architecture = lambda: 90

def backward(grad_kd, grad_outlier, grad_info):
    images, patches, width, rank = 2, 48, 128, 16
    half = {"dtype": torch.bfloat16}
    tokens = torch.zeros(images, patches + 1, width, **half)
    hz = torch.zeros(images, patches, 2 * rank)
    ops.losses_backward(
        BackwardInputs(
            tokens,
            tokens,
            torch.zeros(rank, width, **half),
            hz,
            hz.to(torch.bfloat16),
            torch.zeros(images, patches, rank, **half),
            torch.zeros(images, patches),
            torch.zeros(images),
            torch.zeros(()),
            grad_kd,
            grad_outlier,
            grad_info,
            grad_refined=None,
            num_prefix_tokens=1,
            acc=torch.float32,
            product=torch.bfloat16,
            student_dtype=torch.bfloat16,
            down_dtype=torch.float32,
            up_dtype=torch.float32,
        )
    )

backward(*(torch.ones(()) for _ in range(3)))
first = set(variants)
for order in range(3):
    views = torch.ones(7)[order:].unbind()
    assert any(x.data_ptr() % 16 for x in views[:3])
    backward(*views[:3])
print(json.dumps([sorted(name for name, _ in first), len(set(variants) - first)]))
"""


def test_upstream_gradients_that_are_views_compile_nothing_further():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kernels, further = json.loads(done.stdout)
    assert kernels == ["backward_rows_kernel", "backward_tokens_kernel", "sum_partials_kernel"]
    assert further == 0
