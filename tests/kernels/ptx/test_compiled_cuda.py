"""The CUDA kernels from the PTX of nvcc, 32 lanes a warp, run in the emulator.

An error may be as large as the reference's in the same dtype plus ``bounds.oracle_slack``.
"""

import dataclasses
import re

import pytest
import torch
from bounds import oracle_slack, relative_errors
from cases import WEIGHTS, Shape, outlier_case, random_case, total

from ptx import cuda_driver
from ptx.memory import PtxError
from singer_kernels import extension

pytestmark = [
    pytest.mark.slow,  # it compiles
    pytest.mark.skipif(cuda_driver.find_nvcc() is None, reason="there is no nvcc"),
    pytest.mark.skipif(
        not extension.has_kernels("cuda_refine", "cpu"), reason="there is no g++ to emulate with"
    ),
]
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return cuda_driver.compile_kernels(80, tmp_path_factory.mktemp("ptx"))


def step(case, dtypes, backend, gram=True):
    """Return the errors of a training step; without the Gram loss, of a mid layer."""
    tensors = case.tensors(*dtypes)
    out = case.run(tensors, gram=gram, return_refined=True, backend=backend)
    if gram:
        loss, weights, grad = total(out), WEIGHTS, None
    else:
        grad = torch.ones_like(out.refined)
        loss = WEIGHTS[0] * out.kd + WEIGHTS[1] * out.outlier + (out.refined * grad).sum()
        weights, grad = (*WEIGHTS[:2], 0.0), grad.double().numpy()
    loss.backward()
    return relative_errors(case, tensors, out, weights, grad)


# Widths and numbers of patches that are, and are not, multiples of the 8 numbers of a vector.
SHAPES = [Shape(2, 1, 40, 64, 8), Shape(2, 5, 33, 35, 7), Shape(1, 0, 70, 300, 3)]


@pytest.mark.parametrize(
    "dtypes", [(F64,) * 3, (F32,) * 3, (BF16,) * 3, (F16,) * 3, (BF16, BF16, F32)]
)
@pytest.mark.parametrize("kind", ["random", "outliers", "target", "mid"])
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_kernels_are_accurate(shape, kind, dtypes, kernels):
    case = (
        outlier_case(shape, 0.9)
        if kind == "outliers"
        else random_case(shape, 0.9, with_target=kind == "target")
    )
    case = case.rounded(*dtypes)
    with cuda_driver.emulated(kernels) as launched:
        found = step(case, dtypes, "cuda", kind != "mid")
    assert {re.sub("<.*", "", name) for name in launched} >= {"refine_kernel", "outlier_kernel"}
    expected = step(case, dtypes, "reference", kind != "mid")
    slack = oracle_slack(case, dtypes[2])
    wrong = {
        k: (x, expected[k], slack[k]) for k, x in found.items() if not x <= expected[k] + slack[k]
    }
    assert not wrong


def test_a_kernel_that_leaves_its_tensors_is_reported(kernels):
    case = random_case(SHAPES[0], 0.8)
    name = "refine_kernel<float>"
    changed = [
        x._replace(operands=(x.operands[0], x.operands[1]._replace(offset=2**20)))
        if x.opcode.startswith("ld.global")
        else x
        for x in kernels[name].instructions
    ]
    faulty = kernels | {name: dataclasses.replace(kernels[name], instructions=changed)}
    with cuda_driver.emulated(faulty), pytest.raises(PtxError, match="outside"):
        case.run(case.tensors(F32, F32, F32), backend="cuda")
