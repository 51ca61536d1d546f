"""Sizes, inputs and roofline costs of the benchmarks."""

import itertools

import pytest
import torch
from harness.workloads import (
    PHASES,
    PRECISIONS,
    QUANTILE,
    Workload,
    make_inputs,
    roofline_cost,
    sweeps,
    workloads,
)

from singer_kernels import fused_losses

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", list(PRECISIONS))
def test_inputs_have_outliers_and_the_dtypes_of_the_precision(name):
    precision = PRECISIONS[name]
    inputs = make_inputs(Workload("", 3, 100, 32, 4), precision, CPU)
    assert inputs.student.dtype == inputs.teacher.dtype == precision.features
    assert inputs.down.dtype == inputs.up.dtype == precision.adapter
    assert [x.requires_grad for x in inputs] == [True, False, True, True]
    out = fused_losses(*inputs, quantile=QUANTILE, backend="reference")
    # Two of a hundred patches are outliers; the 0.97 quantile is one of the others' norms.
    assert ((out.norms > 3 * out.threshold[:, None]).sum(dim=1) == 2).all()
    assert out.kd > 0
    assert out.outlier > 0
    assert out.info > 0


def test_seeds_give_other_inputs():
    made = [make_inputs(Workload("", 1, 8, 16, 4), PRECISIONS["fp32"], CPU, s) for s in (0, 0, 1)]
    for first, same, other in zip(*made, strict=True):
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


def test_roofline_cost_of_a_small_case_by_hand():
    workload = Workload("", 2, 3, 8, 4)
    forward, backward, both = (roofline_cost(workload, PRECISIONS["bf16"], p) for p in PHASES)
    features, adapter = 2 * 4 * 8 * 2, 2 * 8 * 4 * 2  # bytes
    assert forward.bytes == 2 * features + adapter  # S and F
    assert backward.bytes == 3 * features + 2 * adapter  # S, F and dS; the adapter and its gradient
    rank_product = 2 * (2 * 3) * 8 * 4
    # One triangle of 3 x 3 has 6 entries.
    assert forward.operations == 2 * rank_product + 2 * (2 * 6) * (8 + 2 * 4)
    assert backward.operations == 6 * rank_product + 2 * (2 * 9) * (2 * 4)
    assert both == tuple(map(sum, zip(forward, backward, strict=True)))


def test_autocast_moves_float32_and_multiplies_bfloat16():
    workload = Workload("", 2, 3, 8, 4)
    precision = PRECISIONS["autocast"]
    assert precision.product == torch.bfloat16
    assert roofline_cost(workload, precision, "both") == roofline_cost(
        workload, PRECISIONS["fp32"], "both"
    )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_points_have_unique_labels_and_the_documented_sizes(device):
    cases = [*workloads(device), *sweeps(device)]
    labels = [(case.series, case.label) for case in cases]
    assert len(set(labels)) == len(labels)
    of_series = {
        series: [case.workload for case in cases if case.series == series]
        for series in ("workloads", "patches", "widths")
    }
    named = {(w.patches, w.width) for w in of_series["workloads"]}
    assert named == {(196, 1024), (1369, 1024), (256, 1536), (196, 384), (196, 768)}
    assert len(of_series["workloads"]) == 5 * len(PRECISIONS)
    swept = [w.patches for w in of_series["patches"]]
    assert (swept[0], swept[-1]) == (64, 4096)
    for series, size in (("patches", "patches"), ("widths", "width")):
        for first, second in itertools.pairwise(of_series[series]):
            assert getattr(first, size) < getattr(second, size)
            fixed = {"name": "", size: 0}
            assert first._replace(**fixed) == second._replace(**fixed)


def test_quick_points_are_tiny():
    for case in (*workloads("cpu", quick=True), *sweeps("cpu", quick=True)):
        assert case.workload.images * case.workload.patches * case.workload.width <= 4096
