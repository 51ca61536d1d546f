"""No backend may be further from the float64 truth than the reference in the same dtype is.

``bounds.oracle_slack`` says by how much it may.
"""

import pytest
import torch
from bounds import oracle_slack, relative_errors
from cases import WEIGHTS, Shape, outlier_case, random_case, tied_case, total
from conftest import BACKENDS

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

SHAPES = [
    pytest.param(Shape(2, 1, 49, 32, 4), id="a 7 x 7 map"),
    pytest.param(Shape(2, 5, 65, 96, 7), id="registers, odd rank, one patch past a tile of 64"),
    pytest.param(Shape(1, 0, 33, 64, 8), id="no prefix, one image"),
    pytest.param(Shape(4, 1, 100, 192, 16), id="the width of ViT-Tiny"),
]
# Student, teacher and adapter; whether under bfloat16 autocast; the products' dtype.
MIXES = [
    pytest.param((F32, F32, F32), False, F32, id="float32"),
    pytest.param((BF16, BF16, BF16), False, BF16, id="bfloat16"),
    pytest.param((F16, F16, F16), False, F16, id="float16"),
    pytest.param((BF16, BF16, F32), False, F32, id="bfloat16 features, float32 adapter"),
    pytest.param((F32, F32, F32), True, BF16, id="autocast"),
    pytest.param((BF16, BF16, F32), True, BF16, id="autocast, bfloat16 features"),
]


def errors(case, dtypes, autocast):
    tensors = case.tensors(*dtypes)
    with torch.autocast("cpu", BF16, enabled=autocast):
        out = case.run(tensors, return_refined=True)
    total(out).backward()
    return relative_errors(case, tensors, out, WEIGHTS)


@pytest.mark.sample(7)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize(("dtypes", "autocast", "product"), MIXES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [random_case, outlier_case, tied_case, "target"])
def test_no_less_accurate_than_the_reference(
    name, make, shape, dtypes, autocast, product, monkeypatch
):
    if name == "triton" and shape.width == 192 and make is not outlier_case:
        shape = Shape(1, 1, 70, 72, 16)  # two tiles of 64 in every size, for the interpreter's sake
    case = random_case(shape, 0.9, with_target=True) if make == "target" else make(shape, 0.9)
    case = case.rounded(*dtypes)
    found = {}
    for backend in ("reference", name):
        monkeypatch.setenv("SINGER_BACKEND", backend)
        found[backend] = errors(case, dtypes, autocast)
    slack = oracle_slack(case, product)
    assert found[name].keys() == found["reference"].keys()
    for output, error in found[name].items():
        assert error <= found["reference"][output] + slack[output], output
