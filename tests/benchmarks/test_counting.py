"""Counted bytes and operations equal the committed ones; memory of a pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness.counting import EXPECTED, Counter
from harness.memory import peak_memory_increase, saved_for_backward

import singer_kernels

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def counted():
    pytest.importorskip("triton")
    # In a fresh process: in this one Triton's interpreter may be on.
    command = [sys.executable, "-m", "harness.counting"]
    paths = [EXPECTED.parents[1], Path(singer_kernels.__file__).parents[1]]
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_equal_up_to_quantile(actual, expected):
    # torch releases compose torch.quantile of different operators: a few, on [B, P] tensors.
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        slack = {"operators": 5, "bytes": value / 1000}.get(key, 0)
        assert abs(actual[key] - value) <= slack, key


@pytest.mark.parametrize("provider", ["eager", "eager-masked", "torch", "cpu", "cuda", "triton"])
def test_counts_are_the_committed_ones(counted, provider):
    """If a change moves more or less: cd benchmarks && python -m harness.counting --write."""
    if provider == "cpu" and provider not in counted:
        pytest.skip("the extension is not built")
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))[provider]
    assert counted[provider].keys() == expected.keys()
    for precision, counts in expected.items():
        if provider in ("eager", "eager-masked", "torch"):
            for phase, count in counts.items():
                assert_equal_up_to_quantile(counted[provider][precision][phase], count)
        else:
            assert counted[provider][precision] == counts


def test_backends_save_and_move_a_third_of_eager_code(counted):
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    for precision in ("fp32", "bf16"):
        eager, ours = expected["eager"][precision], expected["cpu"][precision]
        assert 3 * ours["forward"]["saved"] < eager["forward"]["saved"]
        moved = sum(handed for _, handed in expected["triton"][precision])
        assert 3 * moved < sum(eager[phase]["bytes"] for phase in ("forward", "backward"))


def test_a_matrix_product_is_counted():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with Counter() as counter:
        a @ b
    numbers = 3 * 4 + 4 * 5 + 3 * 5
    assert counter.total == {"operators": 1, "bytes": 4 * numbers, "operations": 2 * 3 * 4 * 5}


def test_views_and_empty_tensors_are_free():
    a = torch.ones(3, 4)
    with Counter() as counter:
        a.T[1:].reshape(9).unsqueeze(0)
        torch.empty(5)
    # The reshape of a transposed tensor copies.
    assert counter.total == {"operators": 1, "bytes": 2 * 9 * 4, "operations": 0}


def test_an_expanded_dimension_counts_once():
    a = torch.ones(1, 4).expand(3, 4)
    with Counter() as counter:
        a + 1
    assert counter.total["bytes"] == (4 + 12) * 4


def test_saved_memory_counts_each_storage_once_and_no_input():
    x = torch.ones(10, requires_grad=True)
    y = x.exp()  # keeps its result
    z = (y * y).sum()  # keeps it again
    assert saved_for_backward([z], [x]) == y.nbytes
    w = (x * torch.full((10,), 2.0)).sum() + z
    assert saved_for_backward([w], [x]) == 2 * y.nbytes
    assert saved_for_backward([x.detach()], [x]) == 0


def test_saved_memory_of_functions_written_in_python():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x.new_ones(7), None)
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            raise NotImplementedError

    x = torch.ones(10, requires_grad=True)
    assert saved_for_backward([Keeps.apply(x)], [x]) == 7 * 4


def test_peak_memory_of_an_allocation():
    size = 64 * 2**20
    increase = peak_memory_increase(lambda: torch.ones(size // 4).sum().item(), CPU)
    if increase is None:
        pytest.skip("needs Linux's clear_refs and glibc")
    assert 0.9 * size < increase < 1.5 * size
    assert peak_memory_increase(lambda: None, CPU) < 0.1 * size
